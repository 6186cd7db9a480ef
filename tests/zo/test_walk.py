"""Local steps: what a node measures on its walk, and where the commit leads."""

import msgspec
import numpy as np
import pytest

from zo import reference
from zo.codes import NO_VOTE, coefficients
from zo.commit import STEP_MAX, Commit
from zo.directions import Direction, stack
from zo.steps import Scale, StepRule, step_rule
from zo.walk import first_step, next_step, walk
from zo.weights import WeightsOverflow

KEY = (5, 9)
NAMES = [Direction(2, sample) for sample in range(6)]
WEIGHTS = np.random.default_rng(3).integers(-(2**20), 2**20, 300).astype(np.int32)
RULE = StepRule(rounds=10, step=8000, decay="constant", smoothing=2, first_exponent=-4, full_votes=6)


def commit(codes, step, round=0):
    return Commit(round, (step,), (-4,), (2,), np.asarray(codes, np.int8).tobytes(), bytes(16))


class Measuring:
    """Codes that depend on nothing but the direction's name; it remembers where it was asked."""

    def __init__(self):
        self.at = []

    def __call__(self, weights, names):
        self.at.append(weights.copy())
        return np.array([NO_VOTE if name.sample == 3 else 10 * name.sample - 25 for name in names], np.int8)


@pytest.mark.parametrize("local_steps", [1, 2, 3, 6])
def test_every_step_is_measured_where_the_codes_before_it_lead(local_steps):
    measure, before = Measuring(), WEIGHTS.copy()
    codes = walk(measure, WEIGHTS, KEY, NAMES, local_steps, step=5000)
    assert codes.tolist() == [-25, -15, -5, NO_VOTE, 15, 25]
    assert np.array_equal(WEIGHTS, before)
    assert len(measure.at) == local_steps
    for number, found in enumerate(measure.at):
        done = number * len(NAMES) // local_steps
        amounts = coefficients(codes[:done], 5000)
        assert np.array_equal(found, reference.apply(WEIGHTS, KEY, stack(NAMES[:done]), amounts))


def test_a_walk_out_of_range_is_an_error_and_not_a_wrap():
    with pytest.raises(WeightsOverflow):
        walk(Measuring(), np.full(300, 2**31 - 2, np.int32), KEY, NAMES, 2, step=5000)


def test_before_any_commit_a_code_of_the_usual_size_moves_by_the_step_of_the_schedule():
    assert first_step(RULE, 0, -4) * 32 >> 8 == 8000
    decaying = msgspec.structs.replace(RULE, decay="linear")
    assert first_step(decaying, 5, -4) * 32 >> 8 == 4000
    raw = msgspec.structs.replace(RULE, step=2**60 // 1000, normalised=False)
    assert first_step(raw, 0, -4) * 32 >> 8 == pytest.approx(2**28 / 1000 * 32 / 16, rel=1e-3)


@pytest.mark.parametrize("num_nodes", [1, 2, 5])
def test_the_commit_is_the_mean_of_the_walks_if_a_nodes_directions_are_full_votes(num_nodes):
    """A walk's coefficient for a code is the commit's, times the number of nodes."""
    codes = np.array([32, -32, 30, -34, 31, -33] * num_nodes, np.int8)
    step, _ = RULE.advance(Scale(1024 << 16, -4), 0, codes)
    of_walk = next_step(RULE, commit(codes, step), codes, moved=0)
    assert of_walk == pytest.approx(step * num_nodes, rel=1e-3)


def test_a_vote_short_of_full_votes_is_a_whole_step_already():
    codes = np.array([32, -32, NO_VOTE], np.int8)
    assert next_step(RULE, commit(codes, 777), codes, moved=0) == 777


@pytest.mark.parametrize(("moved", "expected"), [(0, 1000), (2, 4000), (-3, 125), (60, STEP_MAX)])
def test_when_the_unit_of_codes_changes_a_step_goes_as_far_as_before(moved, expected):
    codes = np.array([1, -1], np.int8)
    assert next_step(RULE, commit(codes, 1000), codes, moved) == expected


def test_a_commit_that_moved_nothing_tells_no_step():
    codes = np.full(2, NO_VOTE, np.int8)
    assert next_step(RULE, commit(codes, 0), codes, 0) == first_step(RULE, 1, -4)


def test_the_rule_is_that_of_the_manifest(make_manifest):
    assert first_step(step_rule(make_manifest()), 0, -4) == round(0.02 * 2**28) * 8
