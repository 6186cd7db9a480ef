"""Fixed point, digest, and the bound that stops a run before a weight wraps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo import kernels, reference
from zo.directions import Direction, stack
from zo.weights import Bound, WeightsOverflow, digest, from_float, to_float, zeros

KEY = (1, 2)
EDGE = 2**31 - 1
int32 = st.integers(-(2**31), EDGE)


def test_zeros_are_int32():
    assert zeros(3).tolist() == [0, 0, 0]
    assert zeros(3).dtype == np.int32


def test_a_value_is_a_weight_times_2_to_the_minus_28():
    assert to_float(np.array([2**28, -(2**27), 1], np.int32)).tolist() == [1.0, -0.5, 2.0**-28]
    assert from_float(np.array([1.0, -0.5, 2.0**-28, 0.0])).tolist() == [2**28, -(2**27), 1, 0]


@given(st.lists(st.floats(-7.75, 7.75, width=32), min_size=1, max_size=50))
def test_from_float_is_within_half_a_unit_and_survives_the_way_back(values):
    weights = from_float(np.array(values, np.float32))
    assert np.all(np.abs(weights * 2.0**-28 - np.array(values)) <= 2.0**-29)
    # float32 has 24 bits, so what came from values above 2^-4 returns exactly
    exact = np.abs(np.array(values)) >= 2.0**-4
    assert np.array_equal(to_float(weights)[exact], np.array(values, np.float32)[exact])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 8.0, -8.0, 1e300])
def test_from_float_names_the_entry_it_cannot_hold(value):
    with pytest.raises(ValueError, match=r"within ±8, got .* at index 2"):
        from_float(np.array([0.0, 1.0, value, float("nan")]))


def test_the_digest_covers_round_agent_and_every_entry():
    weights = np.arange(10, dtype=np.int32)
    other = weights.copy()
    other[9] ^= 1
    digests = {
        digest(1, weights),
        digest(2, weights),
        digest(1, weights, agent=1),
        digest(1, other),
        digest(1, weights[:9]),
    }
    assert len(digests) == 5
    assert all(len(each) == 16 for each in digests)
    assert digest(1, np.arange(20, dtype=np.int32)[::2][:5]) == digest(1, np.arange(0, 10, 2, dtype=np.int32))


def test_the_digest_is_of_little_endian_bytes():
    weights = np.array([1, -2], np.int32)
    assert digest(3, weights) == digest(3, weights.astype(">i4").astype(np.int32))
    with pytest.raises(ValueError, match="must be int32, got int64"):
        digest(3, weights.astype(np.int64))


@given(
    st.lists(int32, min_size=1, max_size=8), st.lists(st.lists(int32, min_size=1, max_size=4), max_size=12)
)
def test_the_bound_never_lets_a_weight_wrap(start, updates):
    weights = np.array(start, np.int32)
    if weights.min() == -(2**31):
        weights[weights == -(2**31)] += 1
    bound = Bound(weights)
    for round, values in enumerate(updates):
        coefficients = np.array(values, np.int32)
        directions = stack(Direction(i, round) for i in range(coefficients.size))
        before = weights.copy()
        try:
            bound.admit(weights, coefficients)
        except WeightsOverflow:
            growth = sum(abs(value) for value in values)
            largest = max(abs(value) for value in weights.tolist())
            assert largest + growth > EDGE  # only when the true maximum, not the estimate, leaves no room
            assert bound.value == largest
            continue
        expected = reference.apply(before, KEY, directions, coefficients)  # raises if anything wrapped
        kernels.apply(weights, KEY, directions, coefficients)
        assert np.array_equal(weights, expected)
        assert max(abs(value) for value in weights.tolist()) <= bound.value <= EDGE


def test_the_bound_looks_again_before_it_refuses():
    weights = zeros(4)
    bound = Bound(weights)
    there, back = np.array([2**29], np.int32), np.array([-(2**29)], np.int32)
    for _ in range(10):
        for coefficients in (there, back):
            bound.admit(weights, coefficients)
            kernels.apply(weights, KEY, stack([Direction(1, 1)]), coefficients)
    assert not weights.any()


def test_the_bound_refuses_one_step_too_far_and_still_holds_then():
    weights = np.array([0, EDGE - 10], np.int32)
    bound = Bound(weights)
    bound.check(weights, np.array([-10], np.int32))
    with pytest.raises(WeightsOverflow, match="leave ±8"):
        bound.check(weights, np.array([5, -6], np.int32))
    assert bound.value == EDGE - 10
    bound.admit(weights, np.array([5, -5], np.int32))
    assert bound.value == EDGE


def test_the_lowest_int32_has_no_room_at_all():
    weights = np.array([-(2**31)], np.int32)
    assert Bound(weights).value == 2**31
    with pytest.raises(WeightsOverflow):
        Bound(weights).check(weights, np.array([1], np.int32))


def test_the_reference_refuses_to_wrap():
    weights = np.zeros(80, np.int32)
    weights[70] = EDGE if reference.perturbation(KEY, Direction(0, 0), 80)[70] < 0 else -EDGE - 1
    with pytest.raises(WeightsOverflow, match="entry 70 leaves int32"):
        reference.apply(weights, KEY, stack([Direction(0, 0)]), np.array([1], np.int32))
