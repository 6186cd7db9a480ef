"""A node on a GPU and one on a CPU in a run: what they measure differs in its last digits, what they hold does not."""

import json

import pytest

from node import embedded

pytestmark = [pytest.mark.e2e, pytest.mark.cuda]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_nodes_on_both_devices_end_with_the_same_weights(quantize, swarm, tmp_path):
    swarm.base = embedded.path()
    shape = ("--batch-size", 2, "--sequence-length", 32, "--directions", 4, "--quorum", 2)
    swarm.init(*shape, "--quantize", quantize, rounds=8)
    swarm.serve()
    (tmp_path / "data.txt").write_text("Return the absolute value of the number. " * 40)
    for name, device in (("ada", "cuda"), ("ben", "cpu")):
        arguments = ("--data", tmp_path / "data.txt", "--name", name, "--state", swarm.state(name))
        command = ("-m", "node.cli", "join", swarm.ticket, *arguments, "--threads", 1, "--device", device)
        swarm.nodes[name] = swarm.start(name, *command)
    swarm.assert_finished("ada", "ben")


def test_the_doctor_tries_the_gpu(swarm, tmp_path):
    told = swarm.command(
        "node.cli", "doctor", "--model", embedded.path(), "--quantize", "nf4", "--device", "cuda"
    )
    assert told.wait() == 0, told
    assert "NVIDIA" in told.out
    measured = {}
    (tmp_path / "data.txt").write_text("Return the absolute value of the number. " * 40)
    for device in ("cuda", "cpu"):
        data = ("--data", tmp_path / "data.txt", "--sequence-length", 32, "--json")
        found = swarm.command("node.cli", "evaluate", "--model", embedded.path(), *data, "--device", device)
        assert found.wait() == 0, found
        measured[device] = json.loads(found.out)["loss"]
    assert measured["cuda"] == pytest.approx(measured["cpu"], rel=1e-4)
