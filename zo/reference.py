"""The plain NumPy reference of `kernels`: every formula once, as readable as it gets, fast nowhere.

Philox4x32-10 is from Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC'11),
section 3.3; the constants are those of its reference library Random123.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from zo.directions import UINT32_MAX, Direction, RunKey
from zo.weights import FRACTION_BITS, WeightsOverflow

NUM_ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD251_1F53, 0xCD9E_8D57)
KEY_INCREMENTS: Final = (0x9E37_79B9, 0xBB67_AE85)
"""The Weyl sequence of the round keys: golden ratio and √3 − 1."""

WORDS_PER_BLOCK: Final = 4
BITS_PER_WORD: Final = 32
BITS_PER_BLOCK: Final = 128
MAX_BLOCKS: Final = 2**32
"""The block number is one uint32 of the counter: a direction has 2^39 entries and no more."""

UNIT: Final = np.float32(2.0**-FRACTION_BITS)


def check_range(start: int, size: int, per_block: int = BITS_PER_BLOCK) -> None:
    """Raise ValueError unless start..start + size lies within the 2^32 blocks that a direction has."""
    if start < 0 or size < 0 or start + size > MAX_BLOCKS * per_block:
        raise ValueError(
            f"a direction has entries 0 to {MAX_BLOCKS * per_block}, got {start} to {start + size}"
        )


def check_uint32(*parts: int) -> None:
    """Raise ValueError unless every part of a key or a name is a uint32."""
    if not all(0 <= part <= UINT32_MAX for part in parts):
        raise ValueError(f"keys and directions consist of uint32, got {parts}")


def philox4x32(counter: NDArray[np.uint32], key: RunKey) -> NDArray[np.uint32]:
    """Philox4x32-10 of each counter: (..., 4) uint32 to (..., 4) uint32."""
    low_half, shift = np.uint64(0xFFFF_FFFF), np.uint64(32)
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        product0 = c0 * np.uint64(MULTIPLIERS[0])
        product1 = c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(k0),
            product1 & low_half,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & low_half,
        )
        k0, k1 = (k0 + KEY_INCREMENTS[0]) % 2**32, (k1 + KEY_INCREMENTS[1]) % 2**32
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def words(key: RunKey, direction: Direction, num_words: int, start: int = 0) -> NDArray[np.uint32]:
    """Words start..start + num_words of a direction, (num_words,) uint32: word i is block i >> 2, lane i & 3.

    The counter of a block is (block, sample, node, agent).

    Raises:
        ValueError: words beyond the 2^34 of a direction, or a name that is not uint32.
    """
    check_range(start, num_words, WORDS_PER_BLOCK)
    check_uint32(*key, *direction)
    first = start // WORDS_PER_BLOCK
    past = -(-(start + num_words) // WORDS_PER_BLOCK)
    counter = np.empty((past - first, 4), np.uint32)
    counter[:, 0] = np.arange(first, past, dtype=np.uint64).astype(np.uint32)
    counter[:, 1:] = direction.sample, direction.node, direction.agent
    skip = start - first * WORDS_PER_BLOCK
    return philox4x32(counter, key).reshape(-1)[skip : skip + num_words]


def perturbation(key: RunKey, direction: Direction, size: int, start: int = 0) -> NDArray[np.int8]:
    """Entries start..start + size of the Rademacher perturbation z: (size,) int8, each −1 or +1.

    z[j] = +1 if bit j & 31 of word j >> 5 is set, else −1.

    Raises:
        ValueError: entries beyond the 2^39 of a direction, or a name that is not uint32.
    """
    check_range(start, size)
    first = start // BITS_PER_WORD
    past = -(-(start + size) // BITS_PER_WORD)
    stream = words(key, direction, past - first, first)
    bits = (stream[:, np.newaxis] >> np.arange(BITS_PER_WORD, dtype=np.uint32)) & np.uint32(1)
    skip = start - first * BITS_PER_WORD
    return (bits.reshape(-1)[skip : skip + size].astype(np.int8) << 1) - np.int8(1)


def apply(
    weights: NDArray[np.int32],
    key: RunKey,
    directions: NDArray[np.uint32],
    coefficients: NDArray[np.int32],
    start: int = 0,
) -> NDArray[np.int32]:
    """weights[j] − Σ_i coefficients[i] × z_i[start + j], a new (size,) int32.

    Args:
        weights: (size,) int32, entries start..start + size of the flat vector.
        key: of the run.
        directions: (n, 3) uint32 of node, sample, agent.
        coefficients: (n,) int32.
        start: where in the vector `weights` begins.

    Raises:
        WeightsOverflow: a sum leaves int32. (The kernel wraps there: `weights.Bound` keeps it from coming to
            that.)
        ValueError: as `perturbation`.
    """
    total = weights.astype(np.int64)
    for (node, sample, agent), coefficient in zip(directions.tolist(), coefficients.tolist(), strict=True):
        total -= coefficient * perturbation(key, Direction(node, sample, agent), weights.size, start).astype(
            np.int64
        )
    moved = total.astype(np.int32)
    if not np.array_equal(moved, total):
        raise WeightsOverflow(f"entry {start + int(np.argmax(moved != total))} leaves int32")
    return moved


def follow(weights: NDArray[np.int32], aim: NDArray[np.int32], shift: int) -> NDArray[np.int32]:
    """weights + ((aim − weights) >> shift), a new (size,) int32: 2^−shift of the way, rounded down.

    With v = aim − weights this is momentum: an update goes into v, of which 2^−shift moves the weights in each round
    (Polyak 1964, with a total gain of 1).

    Args:
        weights: (size,) int32.
        aim: (size,) int32.
        shift: 1 to 31.
    """
    way = aim.astype(np.int64) - weights
    moved: NDArray[np.int64] = weights + (way >> shift)
    return moved.astype(np.int32)


def decay(weights: NDArray[np.int32], start: NDArray[np.int32], shift: int) -> NDArray[np.int32]:
    """weights less 2^−shift of what they differ from `start` by, a new (size,) int32.

    Rounded to the nearest, half away from zero: the same in both directions.

    Args:
        weights: (size,) int32.
        start: (size,) int32.
        shift: 1 to 31.
    """
    way = weights.astype(np.int64) - start
    pull = (np.abs(way) + (1 << (shift - 1))) >> shift
    moved: NDArray[np.int64] = weights - np.sign(way) * pull
    return moved.astype(np.int32)


def perturbed(
    weights: NDArray[np.int32], key: RunKey, direction: Direction, epsilon: float, start: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The float views weights + εz and weights − εz, each (size,) float32.

    Every operation is one float32 rounding: int32 to float32, × 2^−28 (exact), ± ε.

    Raises:
        ValueError: as `perturbation`.
    """
    value = weights.astype(np.float32) * UNIT
    step = np.float32(epsilon) * perturbation(key, direction, weights.size, start).astype(np.float32)
    return value + step, value - step


def projections(
    vector: NDArray[np.float32], key: RunKey, directions: NDArray[np.uint32], start: int = 0
) -> NDArray[np.float64]:
    """Σ_j vector[j] × z_i[start + j] for each direction i, (n,) float64.

    Args:
        vector: (size,) float32.
        key: of the run.
        directions: (n, 3) uint32 of node, sample, agent.
        start: where in the flat vector `vector` begins.

    Raises:
        ValueError: as `perturbation`.
    """
    values = vector.astype(np.float64)
    return np.array(
        [values @ perturbation(key, Direction(*name), vector.size, start) for name in directions.tolist()],
        np.float64,
    )
