"""The simulation: what it promises holds, what follows from a seed follows from it, and a broken promise is noticed."""

import msgspec
import pytest

from coordinator import simulation
from coordinator.conductor import Conductor
from coordinator.membership import Member, Presence
from coordinator.simulation import Scenario, SimulationError, simulate, virtual
from coordinator.virtual_track import VirtualTrack
from transport.session import Session

SMALL = Scenario(nodes=60, rounds=80, seed=1)


def run(make_manifest, scenario=SMALL, **changes):
    scenario = msgspec.structs.replace(scenario, **changes)
    return simulate(virtual(make_manifest(directions=4), scenario), scenario, lambda done, total: None)


@pytest.mark.parametrize("seed", range(5))
def test_a_swarm_in_a_storm(make_manifest, seed):
    result = run(make_manifest, seed=seed)
    assert result.rounds == 80
    assert result.joins > 3 * 60
    assert result.frames_lost > 500
    assert result.coordinator_kills == 3, "two on the way, and one after the end"
    assert result.reports_counted > 80 * 10
    assert result.nodes_at_the_end > 20


def test_nodes_far_behind_take_a_snapshot(make_manifest):
    assert run(make_manifest, nodes=200, rounds=160, loss=0.02).leaps > 50


def test_everything_follows_from_the_seed(make_manifest):
    once, again, other = (run(make_manifest, seed=seed) for seed in (3, 3, 4))
    assert once == again
    assert once.digest != other.digest


@pytest.mark.parametrize("assignment", ["all", "by-node"])
@pytest.mark.parametrize("seed", range(3))
def test_a_swarm_with_several_agents_in_a_storm(make_manifest, seed, assignment):
    scenario = msgspec.structs.replace(SMALL, seed=seed, rounds=40)
    manifest = virtual(make_manifest(directions=4, count=3, assignment=assignment), scenario)
    result = simulate(manifest, scenario, lambda done, total: None)
    assert (result.agents, result.rounds) == (3, 40)
    assert result.coordinator_kills == 3
    assert result.frames_lost > 500
    assert result.reports_counted > 3 * 40 * 5
    assert result.nodes_at_the_end > 10


def test_a_swarm_in_which_some_report_moves_in_a_storm(make_manifest):
    manifest = virtual(make_manifest(directions=4, projections=7, bits=4, staleness=1), SMALL)
    result = simulate(manifest, SMALL, lambda done, total: None)
    assert result.rounds == 80
    assert result.reports_counted > 80 * 10


@pytest.mark.parametrize("bits", [4, 1])
def test_a_swarm_with_narrow_codes_in_a_storm(make_manifest, bits):
    manifest = virtual(make_manifest(directions=5, bits=bits, staleness=1), SMALL)
    result = simulate(manifest, SMALL, lambda done, total: None)
    assert result.rounds == 80
    assert result.reports_counted > 80 * 10


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "shared", "combine": "majority", "bits": 1},
        {"policy": "groups", "groups": 3, "combine": "median"},
        {"policy": "pool"},
        {"policy": "pool", "pool_draw": "importance", "momentum": 3},
    ],
)
def test_a_swarm_that_shares_directions_in_a_storm(make_manifest, fields):
    result = simulate(virtual(make_manifest(directions=4, **fields), SMALL), SMALL, lambda done, total: None)
    assert result.rounds == 80
    assert result.reports_counted > 80 * 10
    assert result.nodes_at_the_end > 20


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fields", [{}, {"projections": 7, "bits": 4}, {"policy": "shared", "count": 2}])
def test_a_pipelined_swarm_in_a_storm(make_manifest, seed, fields):
    scenario = msgspec.structs.replace(SMALL, seed=seed, rounds=60)
    manifest = virtual(make_manifest(directions=4, pipeline=1, **fields), scenario)
    result = simulate(manifest, scenario, lambda done, total: None)
    assert result.rounds == 60
    assert result.coordinator_kills == 3
    assert result.reports_counted > 60 * 10
    assert result.nodes_at_the_end > 10


def test_an_agent_that_differs_is_noticed(make_manifest, monkeypatch):
    start = VirtualTrack.start_conductor

    def flipped(self, *arguments):
        conductor = start(self, *arguments)
        conductor.replica.weights[0] ^= self.agent == 2
        return conductor

    monkeypatch.setattr(VirtualTrack, "start_conductor", flipped)
    manifest = virtual(make_manifest(directions=4, count=3), SMALL)
    with pytest.raises(SimulationError, match="replica differs from a replay at round 4 of agent 2"):
        simulate(manifest, SMALL, lambda done, total: None)


def test_without_kills_nobody_is_left_waiting_either(make_manifest):
    result = run(make_manifest, coordinator_kills=0)
    assert result.coordinator_kills == 0
    assert result.nodes_at_the_end > 20


def test_with_90_percent_of_the_nodes_lost_at_once_the_next_round_closes_within_its_deadline(make_manifest):
    result = run(make_manifest, nodes=1000, rounds=20, mass_loss=0.9, churn=0.0, loss=0.0, slow=0.0)
    assert result.nodes_at_the_end == 100
    assert result.round_after_mass_loss_s <= result.deadline_at_mass_loss_s + 1e-9
    assert result.round_after_mass_loss_s < 5 * result.median_round_s


def test_a_coordinator_that_goes_too_early_is_noticed(make_manifest, monkeypatch):
    monkeypatch.setattr(Member, "is_owed_the_end", lambda self, now: self.presence is not Presence.GONE)
    with pytest.raises(SimulationError, match="was left waiting for the end"):
        run(make_manifest)


def test_a_report_that_is_applied_twice_is_noticed(make_manifest, monkeypatch):
    """As if a late report were counted though it had counted in its own round."""
    close = Conductor._open_round

    def forget(self, round):
        close(self, msgspec.structs.replace(round, may_be_late=frozenset(self.members)))

    monkeypatch.setattr(Conductor, "_open_round", forget)
    manifest = virtual(make_manifest(directions=4, staleness=1, first_exponent=0), SMALL)
    with pytest.raises(SimulationError, match=r"was applied twice \(seed 1: `simulate --seed 1`"):
        simulate(manifest, SMALL, lambda done, total: None)


def test_a_node_that_gives_up_is_noticed(make_manifest, monkeypatch):
    monkeypatch.setattr(
        Session, "_history", lambda self, frames, now: self._fail(simulation.Exit.DAMAGED, "it is none")
    )
    with pytest.raises(SimulationError, match="gave up with exit code 6: it is none"):
        run(make_manifest)


def test_a_schedule_is_simulated_over_fewer_rounds_than_it_warms_up_in(make_manifest):
    scenario = msgspec.structs.replace(SMALL, rounds=3)
    manifest = make_manifest(rounds=100, warm_up=50, decay="cosine", directions=4)
    assert virtual(manifest, scenario).schedule.warm_up == 2


def test_a_swarm_with_momentum_and_weight_decay_in_a_storm(make_manifest):
    scenario = Scenario(nodes=200, rounds=160, loss=0.02)
    manifest = virtual(make_manifest(directions=4, momentum=3, weight_decay=6), scenario)
    result = simulate(manifest, scenario, lambda done, total: None)
    assert result.leaps > 0
    assert result.coordinator_kills == 3
