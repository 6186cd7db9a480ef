"""The fast kernels against the reference, bit for bit, and what must not change a bit."""

import re
import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo import kernels, reference
from zo.directions import Direction, stack

KEY = (0xDEAD_BEEF, 0x0BAD_CAFE)
SIZES = [0, 1, 31, 32, 33, 127, 128, 129, 4095, 4096, 4097, 8191, 12_345, 100_003]
STARTS = [0, 1, 31, 128, 130, 4095, 4096, 2**32 * 32 - 77, 2**32 * 128 - 4097]
LAST = 2**39


@pytest.fixture(autouse=True)
def _one_thread():
    kernels.set_threads(1)


def problem(size, num_directions, seed=0, magnitude=10**6):
    rng = np.random.default_rng(seed)
    return (
        rng.integers(-magnitude, magnitude, size, dtype=np.int32),
        rng.integers(0, 2**32, (num_directions, 3), dtype=np.uint32),
        rng.integers(-magnitude, magnitude, num_directions, dtype=np.int32),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_directions", [0, 1, 3, 4, 5, 9])
def test_fast_apply_equals_the_reference_bit_for_bit(size, num_directions):
    weights, directions, coefficients = problem(size, num_directions)
    expected = reference.apply(weights, KEY, directions, coefficients)
    kernels.apply(weights, KEY, directions, coefficients)
    assert np.array_equal(weights, expected)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("size", [1, 128, 4097])
def test_every_kernel_equals_the_reference_at_every_start(start, size):
    start = min(start, LAST - size)
    weights, directions, coefficients = problem(size, 6)
    name = Direction(*directions[0].tolist())
    assert np.array_equal(
        kernels.perturbation(KEY, name, size, start), reference.perturbation(KEY, name, size, start)
    )
    for fast, plain in zip(
        kernels.perturbed(weights, KEY, name, 1e-2, start),
        reference.perturbed(weights, KEY, name, 1e-2, start),
        strict=True,
    ):
        assert fast.dtype == plain.dtype == np.float32
        assert np.array_equal(fast, plain)
    expected = reference.apply(weights, KEY, directions, coefficients, start)
    kernels.apply(weights, KEY, directions, coefficients, start)
    assert np.array_equal(weights, expected)


def test_a_million_entries_equal_the_reference():
    weights, directions, coefficients = problem(1_000_003, 5)
    expected = reference.apply(weights, KEY, directions, coefficients)
    kernels.apply(weights, KEY, directions, coefficients)
    assert np.array_equal(weights, expected)


@pytest.mark.parametrize("num_threads", [2, 3, 7])
@pytest.mark.parametrize("size", [1, 4096, 50_001])
def test_the_number_of_threads_changes_no_bit(monkeypatch, num_threads, size):
    weights, directions, coefficients = problem(size, 5)
    expected = weights.copy()
    kernels.apply(expected, KEY, directions, coefficients, start=77)
    views = kernels.perturbed(expected, KEY, Direction(1, 2), 1e-3, start=77)
    monkeypatch.setattr(kernels, "WORK_PER_THREAD", 1)
    kernels.set_threads(num_threads)
    kernels.apply(weights, KEY, directions, coefficients, start=77)
    assert np.array_equal(weights, expected)
    for many, one in zip(
        kernels.perturbed(weights, KEY, Direction(1, 2), 1e-3, start=77), views, strict=True
    ):
        assert np.array_equal(many, one)


def test_callers_in_several_threads_do_not_disturb_each_other(monkeypatch):
    monkeypatch.setattr(kernels, "WORK_PER_THREAD", 1)
    kernels.set_threads(2)
    problems = [problem(20_000, 5, seed) for seed in range(4)]
    expected = [reference.apply(weights, KEY, *rest) for weights, *rest in problems]
    callers = [threading.Thread(target=kernels.apply, args=(w, KEY, d, c)) for w, d, c in problems]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(np.array_equal(w, e) for (w, _, _), e in zip(problems, expected, strict=True))


def test_threads_must_be_at_least_one():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        kernels.set_threads(0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.randoms(use_true_random=False))
def test_apply_is_independent_of_the_order_of_directions(seed, num_directions, random):
    weights, directions, coefficients = problem(700, num_directions, seed)
    order = list(range(num_directions))
    random.shuffle(order)
    shuffled = weights.copy()
    kernels.apply(weights, KEY, directions, coefficients)
    kernels.apply(shuffled, KEY, directions[order], coefficients[order])
    assert np.array_equal(weights, shuffled)


@given(
    st.integers(0, 2**39 - 9000),
    st.lists(st.integers(0, 9000), max_size=4),
    st.integers(0, 7),
    st.integers(0, 7),
)
@settings(max_examples=50)
def test_apply_is_independent_of_the_split_into_ranges_and_calls(start, cuts, num_directions, first):
    weights, directions, coefficients = problem(9000, num_directions)
    parts = weights.copy()
    kernels.apply(weights, KEY, directions, coefficients, start)
    edges = [0, *sorted(cuts), 9000]
    for low, high in pairwise(edges):
        for some in (slice(0, first), slice(first, None)):
            kernels.apply(parts[low:high], KEY, directions[some], coefficients[some], start + low)
    assert np.array_equal(weights, parts)


def test_sums_that_pass_int32_on_the_way_come_back():
    """Modular addition is associative: only the result must fit, not what happens on the way."""
    weights = np.full(1000, 2**31 - 1, np.int32)
    name = Direction(1, 2)
    directions = stack([name] * 5 + [name] * 5)
    coefficients = np.array([2**31 - 1] * 5 + [-(2**31) + 1] * 5, np.int32)
    kernels.apply(weights, KEY, directions, coefficients)
    assert np.array_equal(weights, np.full(1000, 2**31 - 1, np.int32))


def test_apply_moves_by_minus_coefficient_times_sign():
    weights = np.zeros(500, np.int32)
    kernels.apply(weights, KEY, stack([Direction(3, 4, 5)]), np.array([7], np.int32))
    assert np.array_equal(weights, -7 * reference.perturbation(KEY, Direction(3, 4, 5), 500).astype(np.int32))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=300), st.floats(2**-20, 1, width=32))
def test_perturbed_is_the_weights_plus_and_minus_epsilon_z(values, epsilon):
    weights = np.array(values, np.int32)
    plus, minus = kernels.perturbed(weights, KEY, Direction(8, 9), epsilon)
    step = np.float32(epsilon) * reference.perturbation(KEY, Direction(8, 9), weights.size).astype(np.float32)
    value = weights.astype(np.float32) / np.float32(2**28)
    assert np.array_equal(plus, value + step)
    assert np.array_equal(minus, value - step)


def test_perturbed_reads_what_it_may_not_write_and_fills_what_it_is_given():
    weights, _, _ = problem(5000, 0)
    weights.flags.writeable = False
    before = weights.copy()
    out = np.empty(5000, np.float32), np.empty(5000, np.float32)
    result = kernels.perturbed(weights, KEY, Direction(1, 1), 0.5, out=out)
    assert result[0] is out[0]
    assert result[1] is out[1]
    assert np.array_equal(weights, before)
    assert np.array_equal(out[0], reference.perturbed(weights, KEY, Direction(1, 1), 0.5)[0])


def test_read_only_and_strided_directions_are_accepted():
    weights, directions, coefficients = problem(300, 8)
    expected = reference.apply(weights, KEY, directions[::2], coefficients[::2])
    read_only = np.frombuffer(coefficients.tobytes(), np.int32)
    kernels.apply(weights, KEY, directions[::2], read_only[::2])
    assert np.array_equal(weights, expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.zeros((2, 3), np.int32), "vector of int32, got int32 of shape"),
        (np.zeros(6, np.int64), "vector of int32, got int64"),
        (np.zeros(6, np.int32)[::2], "contiguous"),
        (np.frombuffer(bytes(24), np.int32), "writable"),
    ],
)
def test_apply_refuses_what_it_cannot_move_in_place(weights, message):
    with pytest.raises(ValueError, match=message):
        kernels.apply(weights, KEY, stack([Direction(0, 0)]), np.array([1], np.int32))


@pytest.mark.parametrize(
    ("directions", "coefficients"),
    [
        (np.zeros((2, 3), np.uint32), np.zeros(3, np.int32)),
        (np.zeros((3, 2), np.uint32), np.zeros(3, np.int32)),
        (np.zeros((3, 3), np.int64), np.zeros(3, np.int32)),
        (np.zeros((3, 3), np.uint32), np.zeros(3, np.int64)),
        (np.zeros((1, 3), np.uint32), np.zeros((), np.int32)),
    ],
)
def test_apply_refuses_directions_and_coefficients_that_do_not_match(directions, coefficients):
    weights = np.zeros(5, np.int32)
    with pytest.raises(ValueError, match="directions must be uint32 of"):
        kernels.apply(weights, KEY, directions, coefficients)
    assert not weights.any()


def test_ranges_beyond_a_direction_are_refused():
    weights = np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="entries 0 to 549755813888"):
        kernels.apply(weights, KEY, stack([Direction(0, 0)]), np.array([1], np.int32), start=LAST - 1)
    with pytest.raises(ValueError, match="entries 0 to"):
        kernels.perturbed(weights, KEY, Direction(0, 0), 0.1, start=-1)
    with pytest.raises(ValueError, match="entries 0 to"):
        kernels.perturbation(KEY, Direction(0, 0), LAST + 1)


def test_names_that_are_not_uint32_are_refused():
    with pytest.raises(ValueError, match="uint32"):
        kernels.perturbation(KEY, Direction(2**32, 0), 1)
    with pytest.raises(ValueError, match="uint32"):
        kernels.apply(np.zeros(1, np.int32), (0, 2**32), stack([Direction(0, 0)]), np.array([1], np.int32))


def test_views_of_another_size_are_refused():
    short = np.empty(4, np.float32)
    with pytest.raises(ValueError, match="5 entries of weights, got 4"):
        kernels.perturbed(np.zeros(5, np.int32), KEY, Direction(0, 0), 0.1, out=(short, short))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", [1, 3, 12, 31])
@pytest.mark.parametrize("name", ["follow", "decay"])
def test_moving_towards_another_vector_equals_the_reference(monkeypatch, name, shift, size):
    rng = np.random.default_rng(size)
    weights, other = rng.integers(-(2**31), 2**31, (2, size)).astype(np.int32)
    weights[: size // 2] = other[: size // 2] + rng.integers(-5, 6, size // 2).astype(np.int32)  # near
    expected = getattr(reference, name)(weights, other, shift)
    threaded = weights.copy()
    getattr(kernels, name)(weights, other, shift)
    assert np.array_equal(weights, expected)
    monkeypatch.setattr(kernels, "WORK_PER_THREAD", 1)
    kernels.set_threads(3)
    other.flags.writeable = False
    getattr(kernels, name)(threaded, other, shift)
    assert np.array_equal(threaded, expected)


@pytest.mark.parametrize("move", [kernels.follow, kernels.decay])
def test_moving_towards_what_does_not_fit_is_refused(move):
    weights = np.zeros(4, np.int32)
    for other, shift, words in (
        (np.zeros(5, np.int32), 3, "must have the 4 entries"),
        (np.zeros(4, np.int64), 3, "int32"),
        (np.zeros(4, np.int32), 0, "shift must be within 1 and 31, got 0"),
        (np.zeros(4, np.int32), 32, "shift must be within 1 and 31, got 32"),
    ):
        with pytest.raises(ValueError, match=words):
            move(weights, other, shift)


@pytest.mark.parametrize("start", [0, 1, 130, 4095, 2**32 * 128 - 12_345])
@pytest.mark.parametrize("size", [0, 1, 33, 129, 4097, 12_345])
def test_projections_equal_the_reference_but_for_the_rounding_of_sums(monkeypatch, size, start):
    rng = np.random.default_rng(size)
    vector = rng.standard_normal(size).astype(np.float32)
    directions = rng.integers(0, 2**32, (5, 3), dtype=np.uint32)
    expected = reference.projections(vector, KEY, directions, start)
    found = kernels.projections(vector, KEY, directions, start)
    assert np.allclose(found, expected, rtol=0, atol=1e-5 * max(np.sqrt(size), 1))
    monkeypatch.setattr(kernels, "WORK_PER_THREAD", 1)
    kernels.set_threads(3)
    assert np.array_equal(kernels.projections(vector, KEY, directions, start), found)


@pytest.mark.parametrize(
    ("vector", "directions", "words"),
    [
        (
            np.zeros(8, np.float64),
            np.zeros((1, 3), np.uint32),
            "vector must be a contiguous vector of float32",
        ),
        (np.zeros(8, np.float32), np.zeros((1, 2), np.uint32), "directions must be uint32 of (n, 3)"),
        (np.zeros(8, np.float32), np.zeros((1, 3), np.int64), "directions must be uint32 of (n, 3)"),
    ],
)
def test_projections_refuse_other_arrays(vector, directions, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        kernels.projections(vector, KEY, directions)
