"""The generator and the layout of its bits: published vectors, the definition, and what a name means."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo import reference
from zo.directions import GROUP_0, INITIAL, MAX_NODE, SEED_POOL, SHARED, Direction, run_key, stack

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, result.
RANDOM123_KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

uint32 = st.integers(0, 2**32 - 1)
KEY = (0x0123_4567, 0x89AB_CDEF)


def parse(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_by_definition(counter: list[int], key: list[int]) -> list[int]:
    """SC'11, section 3.3, in Python integers: multiply, swap halves, xor, ten times."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123_KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    k0, k1 = parse(key)
    assert reference.philox4x32(np.array(parse(counter), np.uint32), (k0, k1)).tolist() == parse(expected)
    assert philox_by_definition(parse(counter), parse(key)) == parse(expected)


@given(st.lists(uint32, min_size=4, max_size=4), st.tuples(uint32, uint32))
def test_philox_equals_the_definition(counter, key):
    expected = philox_by_definition(counter, list(key))
    assert reference.philox4x32(np.array([[counter]], np.uint32), key).tolist() == [[expected]]


def test_the_counter_is_block_sample_node_agent():
    stream = reference.words(KEY, Direction(node=7, sample=9, agent=11), 8, start=4 * 1000)
    assert stream.tolist() == [
        word for block in (1000, 1001) for word in philox_by_definition([block, 9, 7, 11], list(KEY))
    ]


def test_a_set_bit_is_plus_one():
    direction = Direction(1, 2, 3)
    z = reference.perturbation(KEY, direction, 300)
    stream = reference.words(KEY, direction, 12)
    assert z.dtype == np.int8
    assert z.tolist() == [1 if int(stream[j >> 5]) >> (j & 31) & 1 else -1 for j in range(300)]


@given(start=st.integers(0, 2**39 - 600), size=st.integers(0, 300), more=st.integers(0, 300))
def test_a_part_of_a_direction_does_not_depend_on_the_rest(start, size, more):
    direction = Direction(4, 5)
    whole = reference.perturbation(KEY, direction, size + more, start)
    assert np.array_equal(whole[:size], reference.perturbation(KEY, direction, size, start))
    assert np.array_equal(whole[size:], reference.perturbation(KEY, direction, more, start + size))


def test_every_part_of_a_name_matters():
    names = [Direction(*parts) for parts in [(1, 2, 3), (2, 1, 3), (3, 2, 1), (1, 3, 2), (1, 2, 4)]]
    keys = [KEY, (KEY[1], KEY[0])]
    rows = [reference.perturbation(key, name, 1024).tobytes() for name in names for key in keys]
    assert len(set(rows)) == 10


def test_signs_are_balanced_and_directions_nearly_orthogonal():
    size = 1 << 18
    z = np.stack([reference.perturbation(KEY, Direction(0, i), size) for i in range(8)]).astype(np.float64)
    assert np.abs(z.mean(axis=1)).max() < 5 / np.sqrt(size)  # 5 standard deviations
    correlation = z @ z.T / size - np.eye(8)
    assert np.abs(correlation).max() < 5 / np.sqrt(size)


@pytest.mark.parametrize(("start", "size"), [(2**39 - 1, 2), (2**39 + 1, 0), (-1, 5), (0, -1)])
def test_entries_beyond_a_direction_are_refused(start, size):
    with pytest.raises(ValueError, match="entries 0 to 549755813888"):
        reference.perturbation(KEY, Direction(0, 0), size, start)


def test_words_beyond_a_direction_are_refused():
    assert reference.words(KEY, Direction(0, 0), 1, start=2**34 - 1).size == 1
    with pytest.raises(ValueError, match="entries 0 to 17179869184"):
        reference.words(KEY, Direction(0, 0), 2, start=2**34 - 1)


@pytest.mark.parametrize("name", [Direction(-1, 0), Direction(0, 2**32), Direction(0, 0, 2**32)])
def test_names_that_are_not_uint32_are_refused(name):
    with pytest.raises(ValueError, match="uint32"):
        reference.perturbation(KEY, name, 1)
    with pytest.raises(ValueError, match="2\\^32 − 1"):
        stack([Direction(0, 0), name])


def test_the_run_key_is_the_first_eight_bytes_of_the_run_id():
    assert run_key(bytes(range(16))) == (0x03020100, 0x07060504)
    with pytest.raises(ValueError, match="at least 8 bytes, got 7"):
        run_key(bytes(7))


def test_reserved_nodes_are_above_every_real_one():
    assert MAX_NODE < GROUP_0 < INITIAL < SHARED < SEED_POOL < 2**32


def test_stack_orders_node_sample_agent():
    names = stack([Direction(node=1, sample=2, agent=3), Direction(4, 5)])
    assert names.dtype == np.uint32
    assert names.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert stack([]).shape == (0, 3)
