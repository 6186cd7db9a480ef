"""Whose codes are out of line, and how seldom an honest node's are."""

import numpy as np
import pytest

from coordinator.influence import Influence, boundary
from zo.codes import NO_VOTE, encode

NODES = tuple(range(16))


def honest(rng, num_nodes, directions, scale=32.0):
    return np.clip(np.rint(rng.standard_normal((num_nodes, directions)) * scale), -127, 127).astype(np.int8)


def play(change, rounds=40, directions=16, sides=2, seed=0):
    """What is found, by node, if `change` is what becomes of an honest commit's codes, (nodes, directions)."""
    rng, influence, found = np.random.default_rng(seed), Influence(sides), {}
    for round in range(rounds):
        codes = honest(rng, len(NODES), directions)
        change(codes, rng)
        for node, reason in influence.observe(NODES, codes.ravel()):
            found.setdefault(node, []).append((round, reason))
    kinds = [(node, reason.partition("codes")[2]) for node, said in found.items() for _, reason in said]
    assert len(kinds) == len(set(kinds)), "each is said once"
    return found


def test_honest_nodes_are_in_line():
    assert play(lambda codes, rng: None, rounds=2000) == {}


@pytest.mark.parametrize("scale", [0.1, 1, 3])
def test_a_node_with_other_data_than_the_others_is_in_line(scale):
    def change(codes, rng):
        codes[3] = honest(rng, 1, codes.shape[1], 32 * scale)[0]

    assert play(change, rounds=2000) == {}


@pytest.mark.attack
@pytest.mark.parametrize("value", [1, 32, 127, -127])
def test_who_always_sends_the_same_is_found_within_a_hundred_codes(value):
    def change(codes, rng):
        codes[[2, 5]] = value

    found = play(change)
    assert set(found) == {2, 5}
    assert all((said[-1][0] + 1) * 16 <= 100 for said in found.values())
    assert any("positive, where half of them should be" in reason for _, reason in found[2])


@pytest.mark.attack
def test_who_sends_the_largest_codes_of_either_sign_is_found():
    def change(codes, rng):
        codes[7] = np.where(codes[7] < 0, -127, 127)

    found = play(change)
    assert set(found) == {7}
    assert found[7][0][1].endswith("codes are at ±127, and others' are not")


@pytest.mark.parametrize("bits", [4, 1])
def test_narrow_codes_of_honest_nodes_are_in_line_and_those_of_others_are_found(bits):
    rng, influence, found = np.random.default_rng(0), Influence(2, bits), set()
    scales = np.where(np.arange(16) == 3, 96.0, 32.0)  # one has slopes three times as large as the others
    for _ in range(400):
        codes = encode(scales[:, None] * rng.standard_normal((16, 16)), 0, rng, bits)
        codes[5] = np.abs(codes[5])
        if bits == 4:
            codes[7] = np.where(codes[7] < 0, -84, 84)
        found |= {finding.node for finding in influence.observe(NODES, codes.ravel())}
    assert found == ({5, 7} if bits == 4 else {5})


@pytest.mark.attack
def test_inverted_codes_cannot_be_seen():
    """Their distribution is that of an honest node's: stated, not hidden."""

    def change(codes, rng):
        codes[:4] = -codes[:4]

    assert play(change, rounds=2000) == {}


def test_who_measures_nothing_is_found():
    def change(codes, rng):
        codes[1, rng.random(codes.shape[1]) < 0.6] = NO_VOTE

    found = play(change)
    assert set(found) == {1}
    assert "no vote" in found[1][0][1]


def test_a_slight_lean_is_found_in_the_long_run():
    def change(codes, rng):
        codes[4] = np.where(rng.random(codes.shape[1]) < 0.6, np.abs(codes[4]), -np.abs(codes[4]))

    assert set(play(change, rounds=400)) == {4}


def test_a_round_in_which_all_saturate_says_nothing_of_a_node():
    def change(codes, rng):
        codes[:] = np.where(codes < 0, -127, 127)

    assert play(change) == {}


def test_one_sided_slopes_have_no_symmetry_to_test():
    def change(codes, rng):
        codes[2] = np.abs(codes[2])

    assert play(change, sides=1, rounds=200) == {}
    assert set(play(change, sides=2, rounds=200)) == {2}


def test_of_a_node_that_measures_one_sided_in_a_two_sided_run_signs_say_nothing():
    rng, influence = np.random.default_rng(0), Influence(2)
    found = []
    for _ in range(200):
        codes = honest(rng, len(NODES), 16)
        codes[[2, 5]] = np.abs(codes[[2, 5]])
        found += influence.observe(NODES, codes.ravel(), one_sided={2})
    assert {finding.node for finding in found} == {5}


def test_directions_that_come_back_keep_their_sign_and_are_no_sign_of_anything():
    rng, codes = np.random.default_rng(0), np.full((4, 16), 40, np.int8)
    found = {flag: set() for flag in (True, False)}
    for flag in found:
        influence = Influence(2, comes_back=flag)
        for _ in range(40):
            codes[1:] = honest(rng, 3, 16)
            found[flag] |= {finding.node for finding in influence.observe(range(4), codes.ravel())}
    assert found == {True: set(), False: {0}}


def test_nodes_come_and_go():
    influence, rng = Influence(2), np.random.default_rng(0)
    assert influence.observe((), np.zeros(0, np.int8)) == []
    for participants in [(0, 9), (4,), (2, 300), (0, 2, 4, 9, 300)]:
        assert influence.observe(participants, honest(rng, len(participants), 8).ravel()) == []


def test_the_boundary_holds_at_all_times_at_once():
    """With a false alarm of 1 %, so that it can be counted: 4,000 fair coins, looked at after each of 2,000 throws."""
    rng = np.random.default_rng(1)
    sums = np.cumsum(rng.integers(0, 2, (4000, 2000)) - 0.5, axis=1)
    limit = boundary(np.arange(1.0, 2001.0), 0.01)
    share = np.mean(np.any(np.abs(sums) >= limit, axis=1))
    assert 0 < share < 0.01
