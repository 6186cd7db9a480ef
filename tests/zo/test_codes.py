"""One byte per projected gradient: rounding, clipping, no vote, and the integer coefficient."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo import kernels
from zo.codes import LIMIT, NO_VOTE, coefficients, decode, encode
from zo.directions import Direction, stack
from zo.packing import expressible

int32 = st.integers(-(2**31), 2**31 - 1)
code = st.integers(-128, 127)


def rng(seed=0):
    return np.random.default_rng(seed)


@given(st.lists(st.floats(width=64), max_size=30), st.integers(-60, 60), st.integers(0, 2**32))
def test_codes_stay_in_their_byte_and_say_when_there_is_no_vote(gradients, exponent, seed):
    values = np.array(gradients, np.float64)
    codes = encode(values, exponent, rng(seed))
    assert codes.dtype == np.int8
    assert np.array_equal(codes == NO_VOTE, ~np.isfinite(values))
    votes = codes[np.isfinite(values)].astype(int)
    assert np.all(np.abs(votes) <= LIMIT)


@given(st.floats(-200, 200), st.integers(-20, 20), st.integers(0, 2**32))
def test_a_code_is_one_of_the_two_nearest_or_the_limit(scaled, exponent, seed):
    value = np.clip(scaled, -LIMIT, LIMIT)
    result = int(encode(np.array([np.ldexp(scaled, exponent)]), exponent, rng(seed))[0])
    assert np.floor(value) <= result <= np.ceil(value)


@pytest.mark.parametrize("scaled", [0.25, -0.25, 3.7, -126.9, 0.001])
def test_codes_are_unbiased(scaled):
    num = 200_000
    mean = encode(np.full(num, scaled * 2.0**-9), -9, rng(1)).astype(float).mean()
    fraction = scaled - np.floor(scaled)
    assert abs(mean - scaled) < 5 * np.sqrt(fraction * (1 - fraction) / num)


def test_codes_clip_even_where_the_division_overflows():
    huge = np.array([1e308, -1e308, 127.0, -127.0, 127.5, -1e3])
    assert encode(huge, 0, rng()).tolist() == [127, -127, 127, -127, 127, -127]
    assert encode(huge[:2], -1000, rng()).tolist() == [127, -127]


def test_what_is_not_finite_is_no_vote_and_costs_one_draw_like_a_vote():
    some = np.array([0.5, np.nan, np.inf, -np.inf, 0.5])
    codes = encode(some, 0, rng(3))
    assert codes[1:4].tolist() == [NO_VOTE] * 3
    all_finite = encode(np.full(5, 0.5), 0, rng(3))
    assert (codes[0], codes[4]) == (all_finite[0], all_finite[4])


def test_decode_gives_back_exact_multiples():
    codes = np.array([-127, -1, 0, 5, NO_VOTE, 127], np.int8)
    values = decode(codes, -3)
    assert values.dtype == np.float64
    assert values[[0, 1, 2, 3, 5]].tolist() == [-15.875, -0.125, 0, 0.625, 15.875]
    assert np.isnan(values[4])
    assert np.array_equal(encode(values, -3, rng()), codes)


@given(st.lists(code, max_size=20), int32)
def test_coefficients_are_the_product_shifted_arithmetically(codes, step):
    result = coefficients(np.array(codes, np.int8), step)
    assert result.dtype == np.int32
    # // rounds down, as an arithmetic shift does
    assert result.tolist() == [0 if c == NO_VOTE else (c * step) // 256 for c in codes]


def test_a_negative_product_rounds_down():
    assert coefficients(np.array([-1, 1, -3], np.int8), 1).tolist() == [-1, 0, -1]
    assert coefficients(np.array([-127, 127], np.int8), -(2**31)).tolist() == [127 * 2**23, -127 * 2**23]


@pytest.mark.parametrize("step", [2**31, -(2**31) - 1])
def test_a_step_is_an_int32(step):
    with pytest.raises(ValueError, match=f"step must be an int32, got {step}"):
        coefficients(np.array([1], np.int8), step)


@given(int32)
def test_no_vote_moves_nothing(step):
    weights = np.arange(1000, dtype=np.int32)
    directions = stack(Direction(i, 0) for i in range(3))
    kernels.apply(weights, (1, 2), directions, coefficients(np.full(3, NO_VOTE, np.int8), step))
    assert np.array_equal(weights, np.arange(1000))


# ---- narrower codes -----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(), max_size=20), st.sampled_from([8, 4, 1]), st.integers(-64, 63))
def test_every_width_has_its_codes_and_nothing_else(gradients, bits, exponent):
    codes = encode(np.array(gradients, float), exponent, rng(), bits)
    assert np.isin(codes, expressible(bits)).all()
    assert ((codes == NO_VOTE) == ~np.isfinite(gradients)).all()


@pytest.mark.parametrize("scaled", [0.0, 5.0, -31.0, 83.9, -84.0])
def test_four_bits_are_right_in_expectation(scaled):
    codes = encode(np.full(40_000, scaled * 2.0**-9), -9, rng(1), 4)
    assert abs(codes.mean() - scaled) < 0.2
    assert len(set(codes.tolist())) <= 2


def test_four_bits_are_cut_off_at_84():
    assert encode(np.array([1e9, -1e9, 85.0, -97.0]), 0, rng(), 4).tolist() == [84, -84, 84, -84]


def test_one_bit_is_the_sign_however_small():
    tiny = np.array([1e-300, -1e-300, 1e300, -5.0, np.nan])
    assert encode(tiny, 63, rng(), 1).tolist() == [32, -32, 32, -32, NO_VOTE]
    coin = encode(np.zeros(10_000), 0, rng(), 1)
    assert abs(int(np.sign(coin).sum())) < 400


@pytest.mark.parametrize(("bits", "more"), [(8, 1.001), (4, 1.05), (1, np.pi / 2 + 0.01)])
@pytest.mark.parametrize("rms", [32 / 2**0.5, 32, 32 * 2**0.5])
def test_what_a_width_costs_in_steps(bits, more, rms):
    """By how many more steps its noise is made up for: 1 / cos² of the angle between slopes and codes."""
    slopes = rms * rng(2).standard_normal(100_000)
    codes = encode(slopes, 0, rng(3), bits).astype(float)
    assert (codes @ codes) * (slopes @ slopes) / (codes @ slopes) ** 2 < more
