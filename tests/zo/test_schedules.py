"""Schedules: exact integers with ends that are known, the same everywhere."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo.schedules import scheduled

DECAYS = ["constant", "linear", "cosine", "halving"]
STEP = 2**28 // 50
PINNED = {
    "constant": [
        488064,
        976128,
        4880644,
        5368709,
        5368709,
        5368709,
        5368709,
        5368709,
        5368709,
        5368709,
        5368709,
        5368709,
    ],
    "linear": [488064, 976128, 4880644, 5368709, 3042268, 2982616, 2922963, 2684354, 596523, 59652, 0, 0],
    "cosine": [488064, 976128, 4880644, 5368709, 3242463, 3150487, 3057944, 2684354, 161886, 1635, 0, 0],
    "halving": [
        488064,
        976128,
        4880644,
        5368709,
        2684354,
        2684354,
        2684354,
        2684354,
        1342177,
        1342177,
        671088,
        335544,
    ],
}
PINNED_LARGE = [
    4611686018427387904,
    4383335774785663186,
    3743512610145685868,
    2818941349180563610,
    1792744669246824293,
    868173408281702035,
    228350243641724717,
    0,
]


def at(decay, round, rounds=100, step=STEP, warm_up=0):
    return scheduled(step, decay, round, rounds, warm_up=warm_up, half_life=30 if decay == "halving" else 0)


def test_steps_are_pinned():
    # Changing one changes what every ledger must say: audits of older runs would fail.
    rounds = (0, 1, 9, 10, 49, 50, 51, 55, 90, 99, 100, 150)
    seen = {decay: [at(decay, r, warm_up=10) for r in rounds] for decay in DECAYS}
    assert seen == PINNED


def test_a_cosine_of_a_large_step_is_pinned():
    assert [scheduled(2**62, "cosine", r, 7) for r in range(8)] == PINNED_LARGE


@given(st.sampled_from(DECAYS), st.integers(0, 2**62), st.integers(1, 400), st.data())
def test_it_grows_while_it_warms_up_falls_after_it_and_never_exceeds_the_step(decay, step, rounds, data):
    warm_up = data.draw(st.integers(0, rounds - 1))
    seen = [at(decay, r, rounds, step, warm_up) for r in range(rounds + 5)]
    assert seen[:warm_up] == sorted(seen[:warm_up])
    assert seen[warm_up:] == sorted(seen[warm_up:], reverse=True)
    assert max(seen) == seen[warm_up] == step
    assert min(seen) >= 0
    if decay in ("linear", "cosine"):
        assert seen[rounds:] == [0] * 5


@given(st.integers(1, 10**8), st.data())
def test_a_cosine_is_that_of_the_library_as_far_as_that_goes(rounds, data):
    round = data.draw(st.integers(0, rounds))
    expected = (1 + math.cos(math.pi * round / rounds)) / 2
    assert scheduled(2**60, "cosine", round, rounds) / 2**60 == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("round", [0, 1, 49_999_999, 50_000_000, 50_000_001, 99_999_998])
def test_a_cosine_falls_in_every_round_of_the_longest_run(round):
    assert scheduled(2**62, "cosine", round, 10**8) > scheduled(2**62, "cosine", round + 1, 10**8)


def test_a_cosine_is_symmetric():
    for rounds in (1, 2, 7, 100):
        for round in range(rounds + 1):
            both = scheduled(2**60, "cosine", round, rounds) + scheduled(
                2**60, "cosine", rounds - round, rounds
            )
            assert 2**60 - 1 <= both <= 2**60


def test_halving_halves():
    assert [at("halving", r, step=1024) for r in (0, 29, 30, 59, 60, 299, 300, 330, 10**8)] == [
        *(1024, 1024, 512, 512, 256, 2, 1, 0, 0),
    ]
