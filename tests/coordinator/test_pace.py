"""How long a round waits, from the arrival of reports."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.pace import MIN_WAIT_S, Latency, is_worth_waiting_for, observe, typical_s, wait_s


def steady(seconds: float) -> Latency:
    return Latency(seconds, 0.0)


def test_the_first_sample_is_the_mean_and_half_of_it_the_deviation():
    assert observe(None, 2.0) == Latency(2.0, 1.0)
    assert observe(None, 2.0).timeout_s == 6.0


def test_later_samples_move_the_mean_by_an_eighth_and_the_deviation_by_a_quarter():
    assert observe(Latency(2.0, 1.0), 4.0) == Latency(2.25, 1.25)
    assert observe(Latency(2.0, 1.0), 2.0) == Latency(2.0, 0.75)


@given(st.floats(0.001, 1000))
def test_a_steady_member_is_soon_waited_for_no_longer_than_it_takes(seconds):
    latency = None
    for _ in range(60):
        latency = observe(latency, seconds)
    assert latency.mean_s == pytest.approx(seconds)
    # and a hiccup more: a member as regular as a clock is not given up when it is late once
    assert latency.timeout_s == pytest.approx(seconds + MIN_WAIT_S, rel=1e-3)


@given(st.lists(st.floats(0, 1000), min_size=1))
def test_estimates_stay_within_what_was_seen(samples):
    latency = None
    for sample in samples:
        latency = observe(latency, sample)
    assert min(samples) * 0.999 <= latency.mean_s <= max(samples) * 1.001
    assert 0 <= latency.deviation_s <= max(samples)


def test_typical_is_the_median_and_of_two_the_faster():
    assert typical_s({}) is None
    assert typical_s({0: steady(3)}) == 3
    assert typical_s({0: steady(1), 1: steady(2), 2: steady(900)}) == 2
    assert typical_s({0: steady(1), 1: steady(100)}) == 1


def test_who_is_worth_waiting_for():
    assert is_worth_waiting_for(None, 1.0, 4)
    assert is_worth_waiting_for(steady(100), None, 4)
    assert is_worth_waiting_for(steady(4), 1.0, 4)
    assert not is_worth_waiting_for(steady(4.01), 1.0, 4)
    assert is_worth_waiting_for(steady(MIN_WAIT_S), 0.001, 4)
    assert not is_worth_waiting_for(steady(MIN_WAIT_S * 1.01), 0.001, 4)


def test_how_long_a_round_waits():
    assert wait_s({0: None}, None, 4, 60) == 60  # nothing is known yet
    assert wait_s({0: Latency(1, 0.25), 1: Latency(1, 0.1)}, 1.0, 4, 60) == 2.0  # the slowest's time-out
    assert wait_s({0: Latency(1, 5)}, 1.0, 4, 60) == 4.0  # patience
    assert wait_s({0: None}, 1.0, 4, 60) == 4.0  # a new one has all the patience there is
    assert wait_s({0: Latency(1, 5)}, 1.0, 4, 3) == 3.0  # the configuration's limit
    assert wait_s({0: steady(0.001)}, 0.001, 4, 60) == MIN_WAIT_S
    assert wait_s({}, 1.0, 4, 60) == MIN_WAIT_S
    assert wait_s({0: steady(0.001)}, 0.001, 4, 0.05) == 0.05
