"""What goes wrong between processes: each has its exit code and one clear line, and the run loses nothing."""

import contextlib
import json
import resource
import shutil
import signal
import socket
from pathlib import Path

import msgspec
import numpy as np
import pytest

from node.state import load_result
from transport.keys import new_key_pair
from transport.messages import MAX_NODE_FRAME_BYTES, Report, encode
from transport.sockets import Link, NodeSocket
from transport.ticket import parse_ticket
from zo.commit import decode_entry

pytestmark = pytest.mark.e2e
CURVE_BYTES = 33
"""What encryption adds to a frame; the socket's limit counts it."""


@pytest.fixture
def node_says(swarm, says, tmp_path):
    """Runs `zo-node join` with a ticket and checks that it refuses as documented."""
    data = tmp_path / "data.txt"
    data.write_text("once upon a time\n")

    def check(ticket, code, *words, options=()):
        arguments = (
            "join",
            ticket,
            "--data",
            data,
            "--state",
            tmp_path / "state",
        )
        says(swarm.command("node.cli", *arguments, *options), code, *words)

    return check


def test_tickets_that_lead_nowhere_or_elsewhere(swarm, new_swarm, node_says):
    swarm.init().serve()
    ticket = parse_ticket(swarm.ticket)
    wrong_key = msgspec.structs.replace(ticket, key=new_key_pair().public)
    node_says(wrong_key, 10, f"127.0.0.1:{ticket.port} does not have the ticket's key")
    wrong_run = msgspec.structs.replace(ticket, run_id=bytes(16))
    node_says(
        wrong_run, 11, f"the ticket is for run {'00' * 16}, this coordinator serves {ticket.run_id.hex()}"
    )
    # The embedded base is not the made-up one of this run; who did not choose it is told how to choose.
    node_says(ticket, 5, "the run's base 'made-up' has", "Name the run's base with --model")
    swarm.coordinator.send(signal.SIGINT)
    assert swarm.coordinator.wait() == 0
    gone = ("--connect-timeout", 0.5)
    node_says(
        ticket, 9, f"nobody answers at 127.0.0.1:{ticket.port}", "Is the coordinator running", options=gone
    )
    other = new_swarm("other").init()
    other.ticket = swarm.ticket  # so that it takes over the port
    other.serve()
    node_says(ticket, 10, "does not have the ticket's key")
    assert other.status().members == []


def test_a_node_with_another_base_or_tokenizer_is_refused(swarm, tmp_path):
    swarm.init().serve()
    for file, word in (("config.json", "base"), ("tokenizer.json", "tokenizer")):
        another = tmp_path / word
        shutil.copytree(swarm.base, another)
        (another / file).write_text('{"a": 1}')
        node = swarm.join(word, base=another)
        assert node.wait() == 5, node
        assert f"this node's {word} has digest" in node.err
    assert len(swarm.events("refused")) == 2
    assert swarm.status().members == []


def test_a_run_is_served_once_and_a_port_by_one(swarm, new_swarm, says):
    swarm.init().serve()
    port = parse_ticket(swarm.ticket).port
    twice = swarm.start("twice", "-m", "coordinator.cli", "serve", swarm.run, "--port", 0)
    says(twice, 4, "is being served by another process; stop that one first")
    other = new_swarm("other").init()
    taken = other.start("taken", "-m", "coordinator.cli", "serve", other.run, "--port", port)
    says(taken, 4, f"127.0.0.1:{port} is in use", "--port")
    assert swarm.coordinator.is_running


def test_a_full_disk_stops_the_coordinator_and_loses_nothing(swarm, says):
    swarm.init("--quorum", 2)

    def limit_files():  # what a full disk does to a file, without filling a disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    swarm.serve(preexec_fn=limit_files)
    for name in ("ada", "ben"):
        swarm.join(name)
    swarm.open_until(30)
    full = swarm.coordinator
    says(full, 7, "cannot write .*ledger.sqlite", "What was acknowledged is safe")
    before = swarm.commits()
    assert 0 < len(before) < 30
    for name in ("ada", "ben"):  # nobody has seen a commit that is not on the disk
        assert len([r for r in swarm.log(name) if "members" in r]) <= len(before)
    swarm.processes.remove(full)  # it failed, as it should
    swarm.serve()
    swarm.assert_finished("ada", "ben")
    assert swarm.commits()[: len(before)] == before
    assert swarm.command("coordinator.cli", "verify", swarm.run).wait() == 0
    for name in ("ada", "ben"):
        assert [r["round"] for r in swarm.log(name) if "members" in r] == list(range(30))


def test_strangers_who_take_all_the_files_of_a_process_take_none_from_nodes(swarm):
    few = 64

    def limit_descriptors():  # 1,024 are usual, and a peer could open as many connections
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    swarm.init("--quorum", 1, rounds=8).serve(preexec_fn=limit_descriptors)
    port = parse_ticket(swarm.ticket).port
    with contextlib.ExitStack() as strangers:
        for _ in range(2 * few):
            strangers.enter_context(socket.create_connection(("127.0.0.1", port)))
        files = Path(f"/proc/{swarm.coordinator.popen.pid}/fd")
        swarm.poll(lambda: len(list(files.iterdir())) > 2 * few, "all strangers accepted")
        swarm.join("ada")
        swarm.open_until(8)
        swarm.assert_finished("ada")


def test_a_peer_that_sends_junk_disturbs_nobody(swarm):
    swarm.init("--quorum", 1).serve()
    swarm.join("ada")
    swarm.run_until(4)
    mallory = NodeSocket(parse_ticket(swarm.ticket), swarm.admitted_keys())
    rng = np.random.default_rng(0)
    junk = [
        b"",
        b"\x00",
        b"\xc1",
        b"\x93\x02\x09",
        rng.bytes(200),
        rng.bytes(MAX_NODE_FRAME_BYTES - CURVE_BYTES),
    ]
    junk += [encode(Report(0, b"\x01\x01")), b"\x91" * 5000, msgspec.msgpack.encode({"tag": 1})]
    try:
        swarm.poll(lambda: Link.UP in mallory.poll(0.01)[0], "a connection")
        for frame in junk:
            assert mallory.send(frame)
        mallory._dealer.send_multipart([b"two", b"frames"])
        swarm.poll_status(lambda s: s.malformed_frames == len(junk) - 1, "malformed frames")
        links = []
        swarm.poll(
            lambda: links.extend(mallory.poll(0.01)[0]) or links == [Link.DOWN, Link.UP], "a new connection"
        )
        assert mallory.send(bytes(MAX_NODE_FRAME_BYTES + 1))
        swarm.poll(lambda: Link.DOWN in mallory.poll(0.01)[0], "the end of that one")
    finally:
        mallory.close()
    assert len(swarm.events("malformed")) == len(junk) - 1
    swarm.open_until(30)
    swarm.assert_finished("ada")
    assert [member.name for member in swarm.status().members] == ["ada"]


def test_losses_that_are_not_finite_move_nothing(swarm):
    swarm.init("--quorum", 1, rounds=12).serve()
    swarm.join("sick", "--broken")
    swarm.open_until(12)
    swarm.assert_finished("sick")
    entries = [decode_entry(frame) for frame in swarm.commits()]
    assert all(entry.codes == b"\x80\x80" for entry in entries)
    assert not load_result(swarm.run)[1].weights.any()
    assert "no votes 24" in swarm.nodes["sick"].out
    assert swarm.status().loss is None


def test_a_node_without_finite_losses_leaves_the_others_their_votes(swarm):
    swarm.init("--quorum", 2, rounds=12).serve()
    swarm.join("ada")
    swarm.join("sick", "--broken")
    swarm.poll_members("ada", "sick")
    swarm.open_until(12)
    swarm.assert_finished("ada", "sick")
    assert load_result(swarm.run)[1].weights.any()
    assert json.loads(swarm.command("coordinator.cli", "status", swarm.run, "--json").out)["round"] == 12
