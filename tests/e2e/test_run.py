"""Whole runs: processes that die, sleep, leave, come late and come back; the weights are the same everywhere."""

import json
import signal
import subprocess
import sys

import pytest

from coordinator.rundir import RunDirectory
from node.state import load_result
from zo.commit import Commit, decode_entry
from zo.directions import SHARED
from zo.poolfile import decode_pool_file

pytestmark = pytest.mark.e2e
NAMES = ("ada", "ben", "cho", "dia")


def test_four_nodes_and_a_coordinator_end_with_one_digest(swarm):
    swarm.init("--quorum", 4).serve()
    for name in NAMES:
        swarm.join(name)
    swarm.run_until(30)
    proof = swarm.assert_finished(*NAMES)
    assert any(load_result(swarm.run)[1].weights), "nothing was learned"
    # The command says the same as the replay in this process.
    verified = swarm.command("coordinator.cli", "verify", swarm.run, "--json")
    assert verified.wait() == 0
    assert json.loads(verified.out)["digest"] == proof.digest
    assert json.loads(verified.out)["digests_proven"] == 8  # rounds 4, 8, … 28, and the last
    assert all(decode_entry(frame).participants == (0, 1, 2, 3) for frame in swarm.commits())
    losses = [record["loss"] for record in swarm.log("ada") if "loss" in record]
    assert losses[-1] < losses[0]


def test_a_killed_node_comes_back_from_its_state(swarm):
    swarm.init("--quorum", 1).serve()
    for name in ("ada", "ben"):
        swarm.join(name)
    swarm.poll_members("ada", "ben")
    swarm.run_until(8)
    swarm.nodes["ben"].kill()
    swarm.run_until(16)  # round 8 waits for it for a moment
    assert decode_entry(swarm.commits()[15]).participants == (swarm.member("ada").node,)
    swarm.poll_status(lambda s: s.live == 1, "one live member")
    swarm.join("ben")
    swarm.poll_members("ben")
    swarm.open_until(30)
    swarm.assert_finished("ada", "ben")
    assert len(swarm.status().members) == 2, "it kept its number"


def test_a_killed_coordinator_goes_on_where_its_ledger_ends(swarm):
    swarm.init("--quorum", 3).serve()
    names = NAMES[:3]
    for name in names:
        swarm.join(name)
    swarm.run_until(10)
    before = swarm.commits()
    ticket = swarm.ticket
    swarm.coordinator.kill()
    swarm.open_until(30)  # the nodes work into the void: their reports must survive
    swarm.serve()
    assert swarm.ticket == ticket
    assert "continuing at round 10" in swarm.coordinator.err
    swarm.assert_finished(*names)
    after = swarm.commits()
    assert after[:10] == before
    for name in names:  # nobody applied a commit twice, or left one out
        assert [r["round"] for r in swarm.log(name) if "members" in r] == list(range(30))


def test_a_coordinator_killed_again_and_again_loses_nothing(swarm):
    swarm.init("--quorum", 2).serve()
    for name in NAMES[:2]:
        swarm.join(name)
    swarm.open_until(3)
    for round in (3, 6, 9):  # the gate opens before the kill: it strikes in the middle of whatever happens
        swarm.poll_status(lambda s, r=round: s.round >= r, f"round {round}")
        swarm.open_until(round + 4)
        swarm.coordinator.kill()
        known = swarm.commits()
        swarm.serve()
        assert swarm.commits()[: len(known)] == known
    swarm.open_until(30)
    swarm.assert_finished(*NAMES[:2])


def test_a_late_node_catches_up_and_takes_part(swarm):
    swarm.init("--quorum", 1).serve()
    swarm.join("ada")
    swarm.run_until(20)
    swarm.join("late")
    swarm.poll_members("late")
    swarm.open_until(30)
    swarm.assert_finished("ada", "late")
    assert [r["round"] for r in swarm.log("late") if "members" in r] == list(range(30))
    assert swarm.member("late").payload_bytes_down > 20 * 20, "it was sent the history"


@pytest.mark.parametrize(
    "policy",
    [
        ("pool", "--pool-draw", "importance", "--momentum", 1),
        ("shared", "--combine", "majority", "--code-bits", 1),
    ],
)
def test_a_run_with_other_directions_is_rolled_back_and_joined_late(swarm, policy):
    """A pool's newcomer gets the pool instead of weights; a commit of shared directions has one row for all."""
    swarm.init("--quorum", 2, "--sides", 2, "--policy", *policy, rounds=16).serve()
    for name in ("ada", "ben"):
        swarm.join(name)
    swarm.run_until(5)
    swarm.coordinator.send(signal.SIGTERM)
    assert swarm.coordinator.wait() == 0
    taken_back = swarm.command("coordinator.cli", "rollback", swarm.run, "--to", 3)
    assert taken_back.wait() == 0, taken_back
    swarm.serve()
    swarm.open_until(10)
    swarm.poll_status(lambda s: s.round >= 9, "round 9")
    swarm.join("late")
    swarm.poll_members("late")
    swarm.open_until(16)
    swarm.assert_finished("ada", "ben", "late")
    first = next(r["round"] for r in swarm.log("late") if "members" in r)
    assert first > 5, "a snapshot was the way past the rollback"
    assert any(load_result(swarm.run)[1].weights), "nothing was learned"
    if policy[0] == "shared":
        entries = [decode_entry(frame) for frame in swarm.commits()]
        assert {entry.participants for entry in entries if isinstance(entry, Commit)} == {(SHARED,)}
        return
    exported = swarm.command("coordinator.cli", "export", swarm.run, "--pool", swarm.directory / "out.zo")
    assert exported.wait() == 0, exported
    found = decode_pool_file((swarm.directory / "out.zo").read_bytes())
    start = RunDirectory(swarm.run).initial(found.manifest)
    assert found.rebuilt(start).digest() == load_result(swarm.run)[1].digest()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_leaves_in_good_order_at_once(swarm, number):
    swarm.init("--quorum", 1).serve()
    for name in ("ada", "ben"):
        swarm.join(name)
    swarm.poll_members("ada", "ben")
    swarm.run_until(6)
    swarm.poll(lambda: any(r.get("round") == 5 for r in swarm.log("ben")), "the sixth commit at ben")
    swarm.nodes["ben"].send(number)  # in the midst of a probe, which the gate would not let end
    assert swarm.nodes["ben"].wait() == 0, swarm.nodes["ben"]
    assert "left at round 6; join again to go on" in swarm.nodes["ben"].out
    left = swarm.poll(lambda: swarm.events("left"), "a node that left")
    assert [event.text for event in left] == [f"node {swarm.member('ben').node} (ben) left"]
    assert load_result(swarm.state("ben"))[1].round == 6
    swarm.open_until(30)
    swarm.assert_finished("ada")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_coordinator_stops_in_good_order(swarm, number):
    swarm.init("--quorum", 1).serve()
    swarm.join("ada")
    swarm.run_until(6)
    swarm.coordinator.send(number)
    assert swarm.coordinator.wait() == 0, swarm.coordinator
    assert "stopped at round 6/30, digest" in swarm.coordinator.err
    status = swarm.status()
    assert (status.serving, status.live, status.round, status.digest_round) == (False, 0, 6, 6)
    swarm.serve()
    swarm.open_until(30)
    swarm.assert_finished("ada")


def test_rounds_go_on_without_a_node_that_sleeps(swarm):
    swarm.init("--quorum", 2, rounds=60).serve()
    for name in ("ada", "cho"):
        swarm.join(name)
    swarm.run_until(4)  # with a quorum of two both have reported: rounds wait for cho from now on
    swarm.join("ben")
    swarm.poll_members(*NAMES[:3])
    sleeper = swarm.member("cho").node
    swarm.run_until(8)
    swarm.poll_status(lambda s: all(m.digest_round == 8 for m in s.members), "digests of round 8")
    swarm.nodes["cho"].send(signal.SIGSTOP)  # it has nothing to say any more, and round 8 waits for it
    swarm.run_until(30)  # the others do not
    assert not any(sleeper in decode_entry(frame).participants for frame in swarm.commits()[8:30])
    missed = [event.round for event in swarm.events("missed") if event.node == sleeper]
    # A busy machine may have missed it earlier, too.
    assert [num_rounds for num_rounds in missed if num_rounds > 8] == [9], "once, as round 8 closed"
    swarm.nodes["cho"].send(signal.SIGCONT)
    swarm.poll_status(lambda s: s.members[sleeper].presence == "live", "cho awake")
    swarm.open_until(60)
    swarm.assert_finished(*NAMES[:3])
    assert any(sleeper in decode_entry(frame).participants for frame in swarm.commits()[30:])


def test_status_while_served_and_after(swarm):
    swarm.init("--quorum", 2).serve()
    assert swarm.command("coordinator.cli", "status", swarm.run).out.count("nobody has joined yet") == 1
    for name in NAMES[:2]:
        swarm.join(name)
    swarm.run_until(8)
    swarm.poll_status(
        lambda s: all(m.digest_round == 8 for m in s.members) and s.members, "digests of round 8"
    )
    shown = swarm.command("coordinator.cli", "status", swarm.run, "--json")
    assert shown.wait() == 0
    status = json.loads(shown.out)
    assert status["serving"]
    assert status["run"] == swarm.ticket.partition("#")[0].rpartition("/")[2]
    assert (status["round"], status["rounds"], status["live"]) == (8, 30, 2)
    assert sorted(m["name"] for m in status["members"]) == ["ada", "ben"]
    assert {m["digest"] for m in status["members"]} == {status["digest"]}
    assert status["payload_bytes_up"] > 2 * 8 * 5
    assert status["payload_bytes_down"] > status["payload_bytes_up"]
    assert 0 < status["loss"] < 1
    swarm.open_until(30)
    proof = swarm.assert_finished(*NAMES[:2])
    after = json.loads(swarm.command("coordinator.cli", "status", swarm.run, "--json").out)
    assert not after["serving"]
    assert (after["round"], after["digest"], after["live"]) == (30, proof.digest, 0)
    assert after["payload_bytes_up"] > status["payload_bytes_up"]
    table = swarm.command("coordinator.cli", "status", swarm.run).out
    assert "not served" in table
    assert proof.digest in table


@pytest.mark.parametrize("options", [["--watch"], ["--watch", "--json"]])
def test_watching_a_status_ends_quietly_with_ctrl_c(swarm, options):
    swarm.init()
    watch = swarm.start("watch", "-m", "coordinator.cli", "status", swarm.run, *options)
    swarm.poll_status(
        lambda s: watch.out or not watch.is_running, "a status"
    ) if "--json" in options else None
    if "--json" not in options:  # where there is no terminal, the view appears at the end
        swarm.poll_status(lambda s: _is_waiting(watch), "a watch that waits")
    watch.send(signal.SIGINT)
    assert watch.wait() == 0, watch
    assert watch.err == ""


def _is_waiting(process):
    """Whether a process has come so far that it sleeps between two looks."""
    path = f"/proc/{process.popen.pid}/wchan"
    try:
        with open(path) as file:
            return "nanosleep" in file.read()
    except OSError:
        return False


def test_serving_a_finished_run_for_those_who_come_late(swarm):
    swarm.init("--quorum", 1, rounds=8).serve()
    swarm.join("ada")
    swarm.open_until(8)
    proof = swarm.assert_finished("ada")
    swarm.serve("--stay")
    swarm.join("late")
    assert swarm.nodes["late"].wait() == 0, swarm.nodes["late"]
    assert proof.digest in swarm.nodes["late"].out
    swarm.coordinator.send(signal.SIGINT)
    swarm.assert_finished("ada", "late")
    again = swarm.start("again", "-m", "coordinator.cli", "serve", swarm.run, "--port", 0)
    assert again.wait() == 0
    assert "finished at round 8/8" in again.err


def test_a_light_node_and_the_coordinator_run_without_torch():
    check = "import sys; sys.path.insert(0, sys.argv[1]); import light_node, coordinator.cli; "
    check += "loaded = {'torch', 'transformers', 'peft'} & set(sys.modules); assert not loaded, loaded"
    here = __file__.rpartition("/")[0]
    subprocess.run([sys.executable, "-c", check, here], check=True, timeout=60)
