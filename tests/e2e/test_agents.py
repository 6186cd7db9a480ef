"""Runs with several agents, in processes: an agent's weights are the same wherever it is trained, and only there."""

import json

import pytest

from coordinator.audit import audit
from coordinator.rundir import RunDirectory
from node.state import StateDirectory, load_result

pytestmark = pytest.mark.e2e


def audits(swarm):
    """Replay every agent's chain in this process."""
    directory = RunDirectory(swarm.run)
    manifest = directory.manifest()
    with directory.ledger(manifest, read_only=True) as ledger:
        return [
            audit(manifest, directory.initial(manifest, agent), ledger.track(agent), lambda *_: None)
            for agent in range(manifest.agents.count)
        ]


def assert_finished(swarm, agents_by_name):
    """Everyone ended well, with the digests of a fresh replay, of the agents that it trained and of no others."""
    for name in agents_by_name:
        assert swarm.nodes[name].wait() == 0, swarm.nodes[name]
    assert swarm.coordinator.wait() == 0, swarm.coordinator
    manifest = RunDirectory(swarm.run).manifest()
    proofs = audits(swarm)
    assert [proof.rounds for proof in proofs] == [manifest.run.rounds] * manifest.agents.count
    assert len({proof.digest for proof in proofs}) == len(proofs)
    for name, agents in agents_by_name.items():
        for agent in range(manifest.agents.count):
            if agent in agents:
                assert load_result(swarm.state(name), agent)[1].digest().hex() == proofs[agent].digest
            else:
                assert not StateDirectory(swarm.state(name)).agent(agent).snapshot_path.exists()
    for agent, proof in enumerate(proofs):
        assert load_result(swarm.run, agent)[1].digest().hex() == proof.digest
    for process in swarm.processes:
        assert "Traceback" not in process.err, process
    return proofs


def furthest(status):
    """The round of the agent that is furthest."""
    return max(each.round for each in status.agents)


def received(swarm, name):
    """What a node received, as it counted itself."""
    return swarm.log(name)[-1]["payload_down"]


def test_nodes_that_train_agents_of_their_own_choice_and_one_is_killed(swarm):
    # With a quorum of 2 agent 0 cannot go on without ada: the run does not end before she is back.
    swarm.init("--agents", 3, "--assignment", "by-node", "--quorum", 2, rounds=24).serve()
    chosen = {"ada": (0, 1), "ben": (1,), "cho": (2, 0), "dia": (1, 2)}
    for name, agents in chosen.items():
        swarm.join(name, "--agents", ",".join(map(str, agents)))
    swarm.poll_members(*chosen)
    swarm.open_until(10)
    swarm.poll_status(
        lambda s: furthest(s) >= 10, "round 10 of any agent"
    )  # whose nodes wait at the gate there
    swarm.nodes["ada"].kill()
    swarm.open_until(24)
    swarm.poll_status(lambda s: furthest(s) >= 14, "round 14 without ada")
    swarm.join("ada", "--agents", "0,1")
    assert_finished(swarm, chosen)

    status = swarm.status()
    names = [[member.name for member in each.members] for each in status.agents]
    assert [sorted(each) for each in names] == [["ada", "cho"], ["ada", "ben", "dia"], ["cho", "dia"]]
    # Ben trains agent 1 alone: all that he ever received was about it.
    (about_1,) = [member for member in status.agents[1].members if member.name == "ben"]
    assert received(swarm, "ben") == about_1.payload_bytes_down > 0
    shown = json.loads(swarm.command("coordinator.cli", "status", swarm.run, "--json").out)
    assert [each["digest"] for each in shown["agents"]] == [proof.digest for proof in audits(swarm)]


def test_nodes_that_train_all_agents_and_a_coordinator_that_is_killed(swarm):
    swarm.init("--agents", 2, "--quorum", 2, rounds=16).serve()
    for name in ("ada", "ben"):
        swarm.join(name)
    swarm.open_until(6)
    swarm.poll_status(lambda s: furthest(s) >= 6, "round 6 of any agent")
    swarm.coordinator.kill()
    swarm.serve()
    swarm.open_until(16)
    proofs = assert_finished(swarm, {"ada": (0, 1), "ben": (0, 1)})
    for name in ("ada", "ben"):
        for agent, proof in enumerate(proofs):
            assert f"agent {agent}: all 16 rounds are done, digest {proof.digest}" in swarm.nodes[name].out


@pytest.mark.parametrize(
    ("assignment", "option", "words"),
    [
        ("by-node", (), "this run has 3 agents, 0 to 2, and every node names those that it trains"),
        ("by-node", ("--agents", "1,5"), "this run has 3 agents, 0 to 2, got --agents 5"),
        ("by-node", ("--agents", "5"), "the run has the agents 0 to 2; this node asks for 5"),
        ("all", ("--agents", "1"), "in this run every node trains every agent"),
    ],
)
def test_agents_that_do_not_fit_the_run(swarm, assignment, option, words):
    swarm.init("--agents", 3, "--assignment", assignment).serve()
    node = swarm.join("ada", *option)
    assert node.wait() == 3, node
    assert words in node.err
    assert "Traceback" not in node.err
