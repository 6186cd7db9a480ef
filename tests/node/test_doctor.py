"""The doctor: every finding in its good and its bad form, and what the command makes of them."""

import json
import shutil
import socket
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from node import cli, doctor, embedded
from node.base import BaseError
from node.quantization import Form
from node.state import StateDirectory
from transport.exits import Exit
from transport.keys import invitation_keys, new_key_pair
from transport.sockets import CoordinatorSocket
from transport.ticket import Ticket
from zo import kernels
from zo.manifest import Probing


@pytest.fixture
def coordinator():
    """A coordinator's socket that answers handshakes in a thread of its own; gives its ticket and what it admits."""
    keys, done, admitted = new_key_pair(), threading.Event(), []
    ready: list[CoordinatorSocket] = []
    bound = threading.Event()

    def serve():
        end = CoordinatorSocket("127.0.0.1", 0, keys, lambda key: not admitted or key in admitted)
        ready.append(end)
        bound.set()
        frames = []
        while not done.is_set():
            frames += end.receive(0.02)
        end.close()
        assert not frames, "the doctor says nothing to a coordinator"

    thread = threading.Thread(target=serve)
    thread.start()
    bound.wait()
    yield Ticket("127.0.0.1", ready[0].port, bytes(16), keys.public), admitted
    done.set()
    thread.join()


def states(findings):
    return {finding.check: finding.state for finding in findings}


def test_a_coordinator_that_answers(coordinator):
    ticket, _ = coordinator
    assert states(doctor.network(ticket, 10)) == {"network": "ok", "handshake": "ok"}


def test_a_coordinator_with_another_key(coordinator):
    ticket, _ = coordinator
    stranger = Ticket(ticket.host, ticket.port, ticket.run_id, new_key_pair().public)
    network, handshake = doctor.network(stranger, 10)
    assert (network.state, handshake.state) == ("ok", "fail")
    assert "does not have the ticket's key" in handshake.found
    assert "zo-coordinator serve" in handshake.cure


def test_a_coordinator_that_admits_only_known_keys(coordinator):
    ticket, admitted = coordinator
    admitted.append(bytes(32))
    *_, handshake = doctor.network(ticket, 10)
    assert handshake.state == "warn"
    assert "does not admit unknown keys" in handshake.found


def test_the_token_of_a_ticket_is_tried_and_not_used(coordinator):
    ticket, admitted = coordinator
    token = bytes(range(16))
    admitted.append(invitation_keys(token).public)
    *_, handshake = doctor.network(msgspec.structs.replace(ticket, token=token), 10)
    assert handshake.state == "ok"
    *_, handshake = doctor.network(msgspec.structs.replace(ticket, token=bytes(16)), 10)
    assert (handshake.state, "invite" in handshake.cure) == ("fail", True)


def test_a_port_that_is_closed_and_one_that_says_nothing():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        ticket = Ticket("127.0.0.1", port, bytes(16), new_key_pair().public)
        (refused,) = doctor.network(ticket, 1)
        assert (refused.state, "connection refused" in refused.found) == ("fail", True)
        assert "running there" in refused.cure
        listening.listen()
        *_, silent = doctor.network(ticket, 0.2)
        assert (silent.state, silent.found) == ("fail", "no answer to the handshake")


def test_a_name_that_does_not_resolve(monkeypatch):
    def fail(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", fail)
    (found,) = doctor.network(Ticket("no.such.host", 1, bytes(16), bytes(32)), 1)
    assert (found.state, found.found) == ("fail", "no.such.host: Name or service not known")


def test_the_key_file(tmp_path):
    path = tmp_path / "node.key"
    assert doctor.key_file(path).state == "ok"
    assert not path.exists(), "a doctor makes no key"
    StateDirectory(tmp_path).keys()
    assert doctor.key_file(path).state == "ok"
    path.chmod(0o644)
    open_to_others = doctor.key_file(path)
    assert (open_to_others.state, open_to_others.cure) == ("fail", f"chmod 600 {path}")
    path.chmod(0o600)
    path.write_text("hello")
    assert doctor.key_file(path).cure == "restore it from a backup"


def test_the_clock():
    assert doctor.clock(doctor.EARLIEST.timestamp()).state == "ok"
    stopped = doctor.clock(0.0)
    assert (stopped.state, "1970-01-01" in stopped.found) == ("warn", True)


@pytest.mark.parametrize(
    ("free", "state"),
    [
        (doctor.ENOUGH_DISK_BYTES, "ok"),
        (doctor.LEAST_DISK_BYTES, "warn"),
        (doctor.LEAST_DISK_BYTES - 1, "fail"),
    ],
)
def test_the_disk(tmp_path, monkeypatch, free, state):
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = doctor.disk(tmp_path / "not" / "yet")
    assert found.state == state
    assert str(tmp_path) in found.found
    assert bool(found.cure) == (state != "ok")


@pytest.mark.parametrize(
    ("available", "state"), [(1000.0, "ok"), (110.0, "warn"), (99.0, "fail"), (None, "warn")]
)
def test_the_memory(available, state):
    assert doctor.enough(100.0, available, "none").state == state


def test_memory_is_counted_from_the_headers(tmp_path):
    folder = embedded.path()
    plain, int8, nf4 = (doctor.needed_bytes(folder, Form(kind)) for kind in ("none", "int8", "nf4"))
    assert doctor.needed_bytes(folder, Form(dtype="bfloat16")) == plain / 2
    assert doctor.memory(folder, Form()).state == "ok"
    assert plain == pytest.approx((folder / "model.safetensors").stat().st_size * 4 / 3, rel=0.01)
    assert plain > int8 > nf4
    (tmp_path / "model.safetensors").write_bytes(b"hello, this is no header")
    with pytest.raises(BaseError, match="is not a safetensors file"):
        doctor.needed_bytes(tmp_path, Form())


def test_a_base_that_is_not_here_yet_is_not_fetched(monkeypatch, tmp_path):
    def files(name, **options):
        assert options["dry_run"]
        sizes = [(10 * 10**9, True), (7, False)]
        return [SimpleNamespace(file_size=size, will_download=will) for size, will in sizes]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for free, state in ((11 * 10**9, "warn"), (9 * 10**9, "fail")):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        found = doctor.download("owner/name")
        assert found.state == state
        assert found.found.startswith("10.0 GB to fetch from the hub, ")
        assert found.cure
    assert doctor.download(str(embedded.path())) is None
    assert doctor.download("/no/such/base") is None
    checks = [each["check"] for each in json.loads(run("--model", "owner/name", "--json").stdout)]
    assert checks[-1] == "download"

    def offline(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert doctor.download("owner/name") is None


def test_the_generator(monkeypatch):
    assert doctor.generator().state == "ok"
    right = kernels.perturbation
    monkeypatch.setattr(kernels, "perturbation", lambda *args, **more: -right(*args, **more))
    assert doctor.generator().state == "fail"
    assert "published answers" in doctor.generator().found
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "apply", lambda *_: None)
    assert "the reference's update" in doctor.generator().found


def test_quantised_kernels_are_measured(monkeypatch):
    assert states(doctor.quantised_kernels("nf4")) == {"int8": "ok", "nf4": "ok", "fp4": "ok"}
    monkeypatch.setattr(doctor, "_quantised_error", lambda kind: 0.9)
    assert states(doctor.quantised_kernels("nf4")) == {"int8": "warn", "nf4": "fail", "fp4": "warn"}

    def fail(kind):
        raise ImportError("no such library\nand more")

    monkeypatch.setattr(doctor, "_quantised_error", fail)
    found = list(doctor.quantised_kernels("none"))
    assert {each.state for each in found} == {"warn"}
    assert found[0].found == "does not work here: no such library"


def test_digests_are_compared_with_the_runs(make_manifest):
    path = str(embedded.path())
    base, tokenizer = doctor.base_files(path, None)
    assert (base.state, tokenizer.state) == ("ok", "ok")
    digests = {"digest": base.found.split()[1], "tokenizer_digest": tokenizer.found.split()[1]}
    same = list(doctor.base_files(path, make_manifest(**digests)))
    assert all(each.found.endswith(", the run's") for each in same)
    assert {each.state for each in same} == {"ok"}
    other = doctor.base_files(path, make_manifest())
    assert [each.state for each in other] == ["fail", "fail"]
    (missing,) = doctor.base_files("/no/such/base", None)
    assert (missing.state, "does not exist" in missing.found) == ("fail", True)


def opened(**form):
    base, loading = doctor.load(str(embedded.path()), Form(**form), 1)
    assert loading.state == "ok", loading
    return base


def probing(**changes):
    return Probing(**{"epsilon": 0.01, "directions": 4, "batch_size": 2, "sequence_length": 16} | changes)


def test_noise_and_time_of_a_round(monkeypatch):
    noise, duration = doctor.a_round(opened(), None, probing())
    assert noise.state == "ok"
    assert "at epsilon 0.01 random tokens' L+ - L- is " in noise.found
    assert noise.found.endswith("equal passes differ by 0")
    assert "(8 of 2 × 16 tokens); " in duration.found


def test_an_epsilon_that_is_not_heard_and_a_base_that_overflows():
    noise, _ = doctor.a_round(opened(), None, probing(epsilon=1e-8))
    assert (noise.state, noise.cure) == ("warn", "`zo-node calibrate` measures which epsilon suits")
    base = opened()
    base.model.get_input_embeddings().weight[:] = np.nan
    noise, _ = doctor.a_round(base, None, probing())
    assert (noise.state, noise.cure) == ("fail", "use --dtype float32")


@pytest.mark.parametrize(
    "task",
    [
        {"kind": "completion"},
        {"kind": "completion", "objective": "token-f1", "max_new_tokens": 2},
        {"kind": "completion", "objective": "callable", "score": "m:f", "max_new_tokens": 2},
        {"kind": "verbalizer", "labels": ("0", "1"), "words": ("bad", "good"), "template": "{text}"},
        {"objective": "accuracy"},
    ],
)
def test_a_round_of_every_task_is_timed(make_manifest, task):
    manifest = make_manifest(**task, targets=("v_proj",))
    _, duration = doctor.a_round(opened(), manifest, probing(directions=2, batch_size=1))
    assert "(4 of 1 × 16 tokens); " in duration.found


def test_a_round_that_does_not_fit(monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr("node.trial.rehearse", Mock(side_effect=error))
        (found,) = doctor.a_round(opened(), None, probing())
        assert (found.state, "not enough memory to probe: " in found.found) == ("fail", True)
    monkeypatch.setattr("node.trial.rehearse", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        list(doctor.a_round(opened(), None, probing()))


def test_an_adapter_that_does_not_fit_the_base(make_manifest):
    (found,) = doctor.a_round(opened(), make_manifest(targets=("no_such",)), probing())
    assert (found.state, "no_such" in found.found) == ("fail", True)


def test_the_device():
    assert (doctor.device("cpu").state, doctor.device("cpu").found[:5]) == ("ok", "cpu, ")
    assert doctor.device("tpu").state == "fail"


def test_a_base_that_cannot_be_quantised_is_a_finding():
    base, loading = doctor.load(str(embedded.path()), Form("nf4", ("no_such",)), 1)
    assert base is None
    assert (loading.state, "no_such" in loading.found) == ("fail", True)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["doctor", *map(str, arguments)], terminal_width=80)


SMALL = ("--threads", 1, "--batch-size", 1, "--sequence-length", 8)


def test_the_command_shows_all_and_makes_nothing(tmp_path):
    result = run("--state", tmp_path / "state", *SMALL)
    assert result.exit_code == 0, result.output
    shown = [line.split()[0] for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert set(shown) == {"ok"}
    assert not (tmp_path / "state").exists()
    found = json.loads(run("--state", tmp_path / "state", "--json", *SMALL).stdout)
    assert [each["check"] for each in found][-3:] == ["loading", "noise", "a round"]


def test_an_encoder_is_examined_as_a_classifier(encoder, tmp_path):
    result = run("--state", tmp_path / "state", "--model", encoder, "--json", *SMALL)
    assert result.exit_code == 0, result.output
    found = {each["check"]: each["found"] for each in json.loads(result.stdout)}
    assert " s of forward passes (2 of 1 × 8 tokens); " in found["a round"]


def test_the_command_fails_if_a_check_does(tmp_path):
    result = run("--state", tmp_path, "--model", tmp_path, *SMALL)
    assert result.exit_code == Exit.MISMATCH
    assert "has no config.json" in " ".join(result.stdout.split())
    assert "→ name the run's base with --model" in result.stdout


def test_the_command_knows_the_run_that_this_node_has_joined(tmp_path, make_manifest):
    StateDirectory(tmp_path).save_manifest(make_manifest(directions=3, batch_size=2, sequence_length=16))
    result = run("--state", tmp_path, *SMALL)
    assert result.exit_code == Exit.MISMATCH
    assert "the run's has b0b0" in " ".join(result.stdout.split())
