"""A fleet of both kinds in processes: who can only run the model reports slopes, who can train it reports moves."""

import pytest

from zo.commit import decode_entry

pytestmark = pytest.mark.e2e


def test_two_nodes_that_move_and_two_that_do_not_end_with_equal_weights(swarm):
    swarm.init("--moves", 32, "--updates", 4, "--rate", 0.1, "--quorum", 4, rounds=20).serve()
    kinds = {"ada": (), "ben": ("--moves",), "cho": (), "dia": ("--moves",)}
    for name, options in kinds.items():
        swarm.join(name, *options)
    swarm.poll_members(*kinds)
    swarm.open_until(8)
    swarm.poll_status(lambda s: s.round >= 8, "round 8")
    swarm.nodes["dia"].kill()
    swarm.coordinator.kill()
    swarm.serve()
    swarm.join("dia", "--moves")
    swarm.open_until(20)
    swarm.assert_finished(*kinds)
    commits = [decode_entry(frame) for frame in swarm.commits()]
    number_by_name = {member.name: member.node for member in swarm.status().members}
    movers = {number_by_name["ben"], number_by_name["dia"]}
    assert len(commits) == 20
    assert all(set(commit.movers) == movers and len(commit.participants) == 4 for commit in commits)
    estimators = {member.name: member.estimator for member in swarm.status().members}
    assert estimators == {"ada": "two-sided", "ben": "moves", "cho": "two-sided", "dia": "moves"}
