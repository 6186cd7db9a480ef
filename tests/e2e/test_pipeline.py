"""Pipelined rounds in processes: nodes that measure ahead, and everything that may happen to them meanwhile."""

import json
import signal

import pytest

from coordinator.rundir import RunDirectory
from node.state import load_result
from zo.commit import Commit, decode_entry
from zo.steps import step_rule

pytestmark = pytest.mark.e2e


def test_a_pipelined_run_with_kills_a_rollback_and_a_late_node_ends_with_one_digest(swarm):
    swarm.init("--pipeline", "--local-steps", 2, "--quorum", 2, rounds=40).serve()
    for name in ("ada", "ben"):
        swarm.join(name)
    swarm.open_until(10)
    swarm.poll_status(lambda s: s.round >= 6, "round 6")
    swarm.nodes["ben"].kill()
    swarm.coordinator.kill()
    swarm.serve()
    swarm.join("ben")
    swarm.run_until(12)
    swarm.coordinator.send(signal.SIGTERM)
    assert swarm.coordinator.wait() == 0
    taken_back = swarm.command("coordinator.cli", "rollback", swarm.run, "--to", 9)
    assert taken_back.wait() == 0, taken_back
    swarm.serve()  # reports of rounds 12 and 13 are void: the rollback took a number
    swarm.open_until(20)
    swarm.poll_status(lambda s: s.round >= 20, "round 20")
    swarm.join("late")
    swarm.poll(
        lambda: (member := swarm.member("late")) and member.round >= 20, "a late node that has caught up"
    )
    swarm.open_until(40)
    proof = swarm.assert_finished("ada", "ben", "late")
    assert any(load_result(swarm.run)[1].weights), "nothing was learned"
    verified = swarm.command("coordinator.cli", "verify", swarm.run, "--json")
    assert verified.wait() == 0, verified
    assert json.loads(verified.out)["digest"] == proof.digest

    manifest = RunDirectory(swarm.run).manifest()
    assert (manifest.run.pipeline, step_rule(manifest).pipeline) == (1, 1)
    commits = [entry for entry in map(decode_entry, swarm.commits()) if isinstance(entry, Commit)]
    assert len(commits) == 39, "one round is the rollback"
    assert any(commit.participants == (0, 1, 2) for commit in commits)
    rounds = [r["round"] for r in swarm.log("ada") if "members" in r]
    assert rounds == sorted(set(rounds)), "nothing was applied twice"
