"""One test for each thing that can go wrong with processes, disks and clocks, with parity in the end, always."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from benchmarks.soak_node import make_base
from coordinator.rundir import RunDirectory
from node.base import read_digest, read_tokenizer_digest
from node.state import load_result
from transport.messages import (
    PROTOCOL_VERSION,
    Fetch,
    Hello,
    Leave,
    Progress,
    Welcome,
    decode_from_coordinator,
    encode,
)
from transport.sockets import Link, NodeSocket
from transport.ticket import parse_ticket
from zo.commit import decode_entry

pytestmark = pytest.mark.e2e
INJECTED = Path(__file__).with_name("injected_coordinator.py")
MB = 2**20


def stop(swarm):
    swarm.coordinator.send(signal.SIGTERM)
    assert swarm.coordinator.wait() == 0, swarm.coordinator


def rounds_of(swarm, name):
    """The rounds that a node applied, over all its lives, in order."""
    return [record["round"] for record in swarm.log(name) if "members" in record]


def join_again(swarm, name, node):
    """Start a node that was there before, and wait for it; the status may still tell of its last life."""

    def arrivals():
        return sum(event.node == node for kind in ("joined", "replaced") for event in swarm.events(kind))

    before = arrivals()
    swarm.join(name)
    swarm.poll(lambda: arrivals() > before, f"{name} again")


# ---- nodes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["connecting", "loading", "catching-up", "fetching", "probing", "reported"])
def test_a_node_killed_in_any_state_comes_back(swarm, tmp_path, state):
    rounds, before = (160, 150) if state == "catching-up" else (16, 12)
    if state == "fetching":
        swarm.base = make_base(tmp_path / "large", (4096, 64))
    swarm.init("--quorum", 1, rounds=rounds).serve()
    swarm.join("ada")
    swarm.run_until(before)
    if state == "connecting":
        swarm.coordinator.kill()
        swarm.coordinator = None
    if state == "fetching":  # a history that takes rounds back cannot be replayed from the start
        swarm.nodes["ada"].send(signal.SIGTERM)
        assert swarm.nodes["ada"].wait() == 0
        stop(swarm)
        rolled = swarm.command("coordinator.cli", "rollback", swarm.run, "--to", 8)
        assert rolled.wait() == 0, rolled
        swarm.serve()
    ben = swarm.join("ben", "--freeze-at", state)
    if state == "reported":
        swarm.poll_status(
            lambda s: [m.round for m in s.members if m.name == "ben"] == [before], "ben at the gate"
        )
        swarm.nodes["ada"].send(signal.SIGSTOP)  # or its report might close the round first
        swarm.open_until(before + 1)
    swarm.poll(lambda: "frozen" in ben.out, f"a node that is {state}")
    ben.kill()
    if state == "fetching":
        (part,) = swarm.state("ben").glob("*.part")
        assert part.stat().st_size > 0, "what was fetched is not fetched again"
        swarm.join("ada")
    if state == "connecting":
        swarm.serve()
    swarm.nodes["ada"].send(signal.SIGCONT)
    join_again(swarm, "ben", 1)
    if state == "connecting":  # nor may ben come to the end before ada has found the coordinator again
        swarm.open_until(before + 1)
        swarm.poll(lambda: [event.node for event in swarm.events("joined")].count(0) == 2, "ada again")
    swarm.open_until(rounds)
    swarm.assert_finished("ada", "ben")
    assert [member.name for member in swarm.status().members] == ["ada", "ben"]


def test_two_processes_with_one_key(swarm):
    swarm.init("--quorum", 1).serve()
    older = swarm.join("ben")
    swarm.poll_members("ben")
    copied = swarm.directory / "states" / "copy"
    copied.mkdir()
    shutil.copy(swarm.state("ben") / "node.key", copied / "node.key")
    swarm.join("copy")
    swarm.poll(lambda: swarm.events("replaced"), "a replacement")
    swarm.open_until(30)
    assert older.wait() == 11, older
    assert "another process joined with the key of node 0; the newest session stays" in older.err
    swarm.assert_finished("copy")
    assert len(swarm.status().members) == 1
    for entry in map(decode_entry, swarm.commits()):
        assert entry.participants == (0,)


def test_saved_weights_that_were_cut_off_are_passed_over(swarm):
    swarm.init("--quorum", 1).serve()
    for name in ("ada", "ben"):
        swarm.join(name)
    swarm.poll_members("ada", "ben")
    swarm.run_until(8)
    swarm.poll(lambda: rounds_of(swarm, "ben") == list(range(8)), "ben at round 8")
    swarm.nodes["ben"].send(signal.SIGTERM)
    assert swarm.nodes["ben"].wait() == 0
    saved = swarm.state("ben") / "snapshot.zo"
    os.truncate(saved, saved.stat().st_size // 2)
    (swarm.state("ben") / "snapshot.zo.new").write_bytes(b"torn")
    (swarm.state("ben") / f"{bytes(16).hex()}.part").write_bytes(b"of a snapshot that is no more")
    join_again(swarm, "ben", swarm.member("ben").node)
    swarm.open_until(30)
    swarm.assert_finished("ada", "ben")
    assert rounds_of(swarm, "ben")[:16] == [*range(8), *range(8)], "it replayed the ledger from the start"


# ---- the coordinator ------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_coordinator_killed_at_every_write_boundary(swarm):
    """Incarnation n dies at its n-th boundary, until one has no more of them; each goes on from what the last left."""
    rounds = 8
    swarm.init("--quorum", 2, rounds=rounds).serve()
    stop(swarm)
    swarm.open_until(rounds)
    for name in ("ada", "ben"):
        swarm.join(name)
    port, known, deaths, number = parse_ticket(swarm.ticket).port, [], [], 0
    while True:
        number += 1
        swarm.coordinator = None
        process = swarm.start("coordinator", INJECTED, f"die-at={number}", "serve", swarm.run, "--port", port)
        swarm.poll(lambda p=process: not p.is_running, "the end of a coordinator")
        commits = swarm.commits()
        assert commits[: len(known)] == known, "what was committed stays"
        known = commits
        assert swarm.audit().rounds == len(known)
        if process.popen.returncode == 0:
            break
        assert process.popen.returncode == -signal.SIGKILL, process
        deaths.append(process.err.rpartition("killed ")[2].split(" (")[0].split(" VALUES")[0].strip())
        swarm.processes.remove(process)
    swarm.coordinator = process
    swarm.assert_finished("ada", "ben")
    for name in ("ada", "ben"):
        assert rounds_of(swarm, name) == list(range(rounds)), "nothing twice, nothing left out"
    assert len(deaths) >= 6
    assert any("commits" in death for death in deaths), deaths


def test_a_node_that_sleeps_at_the_end_of_the_run_still_gets_it(swarm):
    """As one in the midst of a long probe: it has read nothing of what it was sent, and would lose it."""
    swarm.init("--quorum", 1, rounds=16).serve()
    for name in ("ada", "ben"):
        swarm.join(name)
    swarm.poll_members("ada", "ben")
    swarm.run_until(8)
    swarm.poll(lambda: rounds_of(swarm, "ben") == list(range(8)), "ben at round 8")
    swarm.nodes["ben"].send(signal.SIGSTOP)
    swarm.open_until(16)
    assert swarm.nodes["ada"].wait() == 0, swarm.nodes["ada"]
    swarm.poll(lambda: swarm.events("left"), "ada has left")
    assert swarm.coordinator.is_running
    swarm.nodes["ben"].send(signal.SIGCONT)
    swarm.assert_finished("ada", "ben")


def test_a_coordinator_that_sleeps(swarm):
    swarm.init("--quorum", 2).serve()
    for name in ("ada", "ben"):
        swarm.join(name)
    swarm.run_until(8)
    swarm.coordinator.send(signal.SIGSTOP)
    swarm.open_until(20)
    swarm.join("cho")  # reaches a machine that answers, and a process that does not
    swarm.poll(lambda: (swarm.state("cho") / "log.jsonl").exists(), "a process")
    swarm.coordinator.send(signal.SIGCONT)
    swarm.poll(lambda: len(swarm.events("joined")) == 3, "cho")
    swarm.open_until(30)
    swarm.assert_finished("ada", "ben", "cho")
    for name in ("ada", "ben"):
        assert rounds_of(swarm, name) == list(range(30))


def test_a_read_only_run_directory_is_a_clear_error(swarm, says):
    """Also for root, whom permissions do not stop."""
    swarm.init("--quorum", 1, rounds=8).serve()
    swarm.join("ada")
    swarm.run_until(4)
    stop(swarm)
    before = swarm.commits()
    refused = swarm.start("read-only", INJECTED, "read-only", "serve", swarm.run, "--port", 0)
    says(refused, 7, "cannot write the run directory", "Read-only file system")
    assert swarm.commits() == before
    swarm.serve()
    swarm.open_until(8)
    swarm.assert_finished("ada")


def test_a_log_that_was_cut_off_is_a_shorter_ledger(swarm):
    """What a disk that lied about its writes leaves behind: it is proven, and who knows better is told so."""
    swarm.init("--quorum", 2).serve()
    for name in ("ada", "ben"):
        swarm.join(name)
    swarm.run_until(12)
    swarm.coordinator.kill()
    log = swarm.run / "ledger.sqlite-wal"
    os.truncate(log, log.stat().st_size // 3)
    left = swarm.audit().rounds
    assert left < 12
    swarm.open_until(30)
    swarm.serve()
    reached = {}
    for name in ("ada", "ben"):
        assert swarm.nodes[name].wait() == 11, swarm.nodes[name]
        said = swarm.nodes[name].err
        found = re.search(r"state at round (\d+) is not part of this ledger, which is at round (\d+)", said)
        reached[name] = int(found[1])
        assert int(found[2]) >= left
        assert "join with --start-over" in said
        swarm.join(name, "--start-over")
    swarm.assert_finished("ada", "ben")
    assert [member.node for member in swarm.status().members] == [0, 1], "they kept their numbers"
    for name in ("ada", "ben"):
        aside = load_result(swarm.state(name) / "set-aside-1")[1]
        assert aside.round == reached[name], "what the ledger has forgotten is there for who wants it"


def test_damaged_snapshots_are_passed_over(swarm):
    swarm.init("--quorum", 1).serve()
    swarm.join("ada")
    swarm.run_until(8)
    stop(swarm)  # leaves a snapshot
    (snapshot,) = (swarm.run / "snapshots").glob("*.zo")
    os.truncate(snapshot, snapshot.stat().st_size // 2)
    (swarm.run / "snapshots" / "9-torn.zo.new").write_bytes(b"torn")
    swarm.serve()
    assert "continuing at round 8, from start of the run" in swarm.coordinator.err
    swarm.open_until(30)
    swarm.assert_finished("ada")


def test_wall_clocks_that_jump(swarm):
    swarm.init("--quorum", 2).serve(entry=(INJECTED, "clock-jumps"))
    for name in ("ada", "ben"):
        swarm.join(name, "--clock-jumps")
    swarm.run_until(8)
    swarm.coordinator.kill()
    swarm.serve(entry=(INJECTED, "clock-jumps"))
    swarm.open_until(30)
    swarm.assert_finished("ada", "ben")
    times = [event.at for event in swarm.events()]
    assert times != sorted(times), "the clock did not jump"
    assert all(decode_entry(frame).participants == (0, 1) for frame in swarm.commits())


# ---- readers that do not read ---------------------------------------------------------------------------------------


class Peer:
    """A node that is nobody's: it says what a test wants, and reads only when it is told to."""

    def __init__(self, swarm):
        self.swarm = swarm
        self.ticket = parse_ticket(swarm.ticket)
        self.socket = NodeSocket(self.ticket, swarm.admitted_keys())

    def greet(self):
        self.swarm.poll(lambda: Link.UP in self.socket.poll(0.01)[0], "a connection")
        base = (
            bytes.fromhex(read_digest(self.swarm.base)),
            bytes.fromhex(read_tokenizer_digest(self.swarm.base)),
        )
        run = self.ticket.run_id
        self.say(Hello(PROTOCOL_VERSION, run, *base, 0, run, "mallory"))
        frames = self.swarm.poll(lambda: self.socket.poll(0.01)[1], "a welcome")
        welcome = decode_from_coordinator(frames[0])
        assert isinstance(welcome, Welcome)
        return welcome

    def say(self, message):
        return self.socket.send(encode(message))


@pytest.fixture
def peer(swarm):
    made = []

    def make():
        made.append(Peer(swarm))
        return made[-1]

    yield make
    for each in made:
        each.socket.close()


def resident_bytes(process):
    """Memory of a process, as the kernel counts it."""
    pages = int(Path(f"/proc/{process.popen.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def test_a_member_that_never_answers_is_sent_a_window_and_waited_for_by_nobody(swarm, peer):
    swarm.init("--quorum", 1, rounds=400).serve()
    swarm.join("ada")
    swarm.run_until(8)
    peer().greet()
    before = resident_bytes(swarm.coordinator)
    swarm.open_until(400)
    swarm.poll_status(lambda s: s.round == 400, "the end")
    assert resident_bytes(swarm.coordinator) - before < 32 * MB
    stop(swarm)  # it would wait for mallory's farewell
    mallory = swarm.member("mallory")
    seals = 128 // 4  # one with every digest
    assert 0 < mallory.messages_down <= 128 + seals + 8, "no more than the window"
    assert not swarm.events("missed"), "no round waited for it"
    swarm.assert_finished("ada")


def test_a_member_that_asks_and_never_reads_is_dropped(swarm, tmp_path, peer):
    """Its answers fill its queue, which is bounded; then it is taken for gone, and the others have noticed nothing."""
    swarm.base = make_base(tmp_path / "large", (4096, 64))
    swarm.init("--quorum", 1, rounds=30).serve()
    swarm.join("ada")
    swarm.run_until(12)
    stop(swarm)  # leaves a snapshot
    swarm.serve()
    (stored,) = RunDirectory(swarm.run).snapshots().stored()
    mallory = peer()
    mallory.greet()
    before = resident_bytes(swarm.coordinator)
    asked = 0

    def is_dropped():
        nonlocal asked
        while asked < 4000 and mallory.say(Fetch(stored.content, 0)):
            asked += 1
        return any(event.node == 1 for event in swarm.events("lost"))

    swarm.poll(is_dropped, "an end of patience")
    assert resident_bytes(swarm.coordinator) - before < 64 * MB
    swarm.open_until(30)
    assert swarm.nodes["ada"].wait() == 0, swarm.nodes["ada"]
    stop(swarm)  # it would wait a while for mallory to come back
    swarm.assert_finished("ada")


def test_progress_that_was_never_made_is_not_believed(swarm, peer):
    swarm.init("--quorum", 1, rounds=30).serve()
    swarm.join("ada")
    swarm.run_until(8)
    mallory = peer()
    mallory.greet()
    assert mallory.say(Progress(2**40, bytes(16), None))
    swarm.poll_status(
        lambda s: any(m.name == "mallory" and m.messages_up >= 2 for m in s.members), "progress"
    )
    assert swarm.member("mallory").round == 8, "no more than it was sent"
    mallory.say(Leave())
    swarm.open_until(30)
    swarm.assert_finished("ada")
    assert load_result(swarm.run)[1].round == 30
