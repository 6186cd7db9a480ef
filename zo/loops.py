"""The Numba loops behind `kernels`: unchecked arguments, one thread, in place. Call them through `kernels`.

What makes them fast:

- Philox keeps a block's ten rounds in registers, 32 blocks side by side, a SIMD lane each;
- four directions are added in one pass over a tile of 4,096 sums, which stays in L1 until all are in;
- a bit becomes a sign by a test against a constant vector of masks, and the −1 half is one term at the end:
  Σ c z = 2 Σ_{bit set} c − Σ c.

The wrapping uint32 and int32 arithmetic is deliberate. Tiles begin at the block that `start` lies in.
"""

from typing import Any, Final

import numpy as np
from numba import types

from zo.compiled import Kernel, inlined, kernel
from zo.reference import BITS_PER_BLOCK, KEY_INCREMENTS, MULTIPLIERS, NUM_ROUNDS, UNIT

LANES: Final = 32
TILE: Final = LANES * BITS_PER_BLOCK
GROUP: Final = 4
"""Directions added in one pass; measured best of 1, 2, 4, 8 and 16."""

# Inside kernels every integer must have its width: Numba would widen a Python constant to int64. Globals are frozen
# when a kernel is compiled, and a cached kernel notices a change of this file only: to change a constant that comes
# from another one, as no run in the field allows, touch this one too.
_u32, _u64, _i32, _i64 = np.uint32, np.uint64, np.int32, np.int64
_MASKS = np.uint32(1) << np.arange(32, dtype=np.uint32)
_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_K0, _K1 = np.uint32(KEY_INCREMENTS[0]), np.uint32(KEY_INCREMENTS[1])
_HALF = np.uint64(32)
_BLOCK_SHIFT: Final = 7
_BLOCK_MASK: Final = BITS_PER_BLOCK - 1


@inlined
def _blocks(words: Any, first: Any, sample: Any, node: Any, agent: Any, key0: Any, key1: Any) -> None:
    """Philox4x32-10 of blocks first..first + 32 into words (4, 32) uint32: lane by block."""
    for lane in range(LANES):
        a, b, c, d = _u32(first + _u32(lane)), sample, node, agent
        k0, k1 = key0, key1
        for _ in range(NUM_ROUNDS):
            p0, p1 = _M0 * _u64(a), _M1 * _u64(c)
            a, b, c, d = _u32(p1 >> _HALF) ^ b ^ k0, _u32(p1), _u32(p0 >> _HALF) ^ d ^ k1, _u32(p0)
            k0, k1 = _u32(k0 + _K0), _u32(k1 + _K1)
        words[0, lane], words[1, lane], words[2, lane], words[3, lane] = a, b, c, d


@inlined
def _add_group(sums: Any, words: Any, twice: Any, num_blocks: Any) -> None:
    """sums[j] += Σ twice[g] over directions g whose bit j is set; words (4, 4, 32), sums (4096,) int32."""
    t0, t1, t2, t3 = twice[0], twice[1], twice[2], twice[3]
    zero = _i32(0)
    for block in range(num_blocks):
        for lane in range(4):
            w0, w1, w2, w3 = (
                words[0, lane, block],
                words[1, lane, block],
                words[2, lane, block],
                words[3, lane, block],
            )
            at = (block * 4 + lane) * 32
            part = sums[at : at + 32]
            for bit in range(32):
                mask = _MASKS[bit]
                total = _i32(part[bit] + (t0 if w0 & mask else zero))
                total = _i32(total + (t1 if w1 & mask else zero))
                total = _i32(total + (t2 if w2 & mask else zero))
                part[bit] = _i32(total + (t3 if w3 & mask else zero))


@inlined
def _add_one(sums: Any, words: Any, twice: Any, num_blocks: Any) -> None:
    """As `_add_group`, for one direction; words (4, 32)."""
    zero = _i32(0)
    for block in range(num_blocks):
        for lane in range(4):
            word = words[lane, block]
            at = (block * 4 + lane) * 32
            part = sums[at : at + 32]
            for bit in range(32):
                part[bit] = _i32(part[bit] + (twice if word & _MASKS[bit] else zero))


@inlined
def _spread(entries: Any, words: Any, positive: Any, negative: Any, num_blocks: Any) -> None:
    """entries[j] = positive where bit j is set, else negative; words (4, 32), entries (4096,)."""
    for block in range(num_blocks):
        for lane in range(4):
            word = words[lane, block]
            at = (block * 4 + lane) * 32
            part = entries[at : at + 32]
            for bit in range(32):
                part[bit] = positive if word & _MASKS[bit] else negative


def _array(dtype: Any, ndim: int = 1, readonly: bool = True) -> Any:
    """A C-contiguous array type; writable arrays are accepted where readonly ones are."""
    return types.Array(dtype, ndim, "C", readonly=readonly)


@kernel(
    _array(types.int32, readonly=False),
    *(types.int64, types.int64),
    _array(types.uint32, 2),
    _array(types.int32),
    types.int64,
)
def apply(weights, key0, key1, directions, coefficients, start):  # type: ignore[no-untyped-def]
    """weights[j] −= Σ coefficients[i] z_i[start + j]; directions (n, 3)."""
    n, size = coefficients.shape[0], weights.shape[0]
    k0, k1 = _u32(key0), _u32(key1)
    total = _i32(0)
    for i in range(n):
        total = _i32(total + coefficients[i])
    sums = np.empty(TILE, np.int32)
    words = np.empty((GROUP, 4, LANES), np.uint32)
    twice = np.empty(GROUP, np.int32)
    skip, done = start & _BLOCK_MASK, 0
    block = start >> _BLOCK_SHIFT
    while done < size:
        count = min(TILE - skip, size - done)
        num_blocks = (skip + count + _BLOCK_MASK) >> _BLOCK_SHIFT
        first = _u32(block)
        for j in range(num_blocks * BITS_PER_BLOCK):
            sums[j] = 0
        grouped = n - n % GROUP
        for i in range(0, grouped, GROUP):
            for g in range(GROUP):
                name = directions[i + g]
                twice[g] = _i32(coefficients[i + g] << 1)
                _blocks(words[g], first, name[1], name[0], name[2], k0, k1)
            _add_group(sums, words, twice, num_blocks)
        for i in range(grouped, n):
            name = directions[i]
            _blocks(words[0], first, name[1], name[0], name[2], k0, k1)
            _add_one(sums, words[0], _i32(coefficients[i] << 1), num_blocks)
        target, source = weights[done : done + count], sums[skip : skip + count]
        for j in range(count):
            target[j] = _i32(target[j] + total - source[j])
        done += count
        block += LANES
        skip = 0


@kernel(_array(types.int32, readonly=False), _array(types.int32), types.int64)
def follow(weights, aim, shift):  # type: ignore[no-untyped-def]
    """weights += (aim − weights) >> shift."""
    for j in range(weights.shape[0]):
        weights[j] = _i32(weights[j] + ((_i64(aim[j]) - _i64(weights[j])) >> shift))


@kernel(_array(types.int32, readonly=False), _array(types.int32), types.int64)
def decay(weights, start, shift):  # type: ignore[no-untyped-def]
    """weights −= (weights − start) / 2^shift, rounded half away from zero."""
    half = _i64(1) << (shift - 1)
    for j in range(weights.shape[0]):
        way = _i64(weights[j]) - _i64(start[j])
        pull = (abs(way) + half) >> shift
        weights[j] = _i32(weights[j] - (pull if way > 0 else -pull))


@kernel(
    _array(types.int32),
    *(types.int64, types.int64, types.int64, types.int64, types.int64),
    types.float32,
    types.int64,
    _array(types.float32, readonly=False),
    _array(types.float32, readonly=False),
)
def perturbed(weights, key0, key1, node, sample, agent, epsilon, start, plus, minus):  # type: ignore[no-untyped-def]
    """plus, minus = weights × 2^−28 ± ε z[start..], entry by entry only where a block is cut."""
    size = weights.shape[0]
    words = np.empty((4, LANES), np.uint32)
    skip, done = start & _BLOCK_MASK, 0
    block = start >> _BLOCK_SHIFT
    while done < size:
        _blocks(words, _u32(block), _u32(sample), _u32(node), _u32(agent), _u32(key0), _u32(key1))
        count = min(BITS_PER_BLOCK - skip if skip else TILE, size - done)
        whole = 0 if skip else count >> _BLOCK_SHIFT
        for at_block in range(whole):
            for lane in range(4):
                word = words[lane, at_block]
                low = done + (at_block * 4 + lane) * 32
                origin, up, down = weights[low : low + 32], plus[low : low + 32], minus[low : low + 32]
                for bit in range(32):
                    value = np.float32(origin[bit]) * UNIT
                    step = epsilon if word & _MASKS[bit] else -epsilon
                    up[bit], down[bit] = value + step, value - step
        for j in range(whole * BITS_PER_BLOCK, count):
            entry = skip + j
            word = words[(entry >> 5) & 3, entry >> _BLOCK_SHIFT]
            value = np.float32(weights[done + j]) * UNIT
            step = epsilon if word & _MASKS[entry & 31] else -epsilon
            plus[done + j], minus[done + j] = value + step, value - step
        done += count
        block += 1 if skip else LANES
        skip = 0


@kernel(
    *(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64),
    _array(types.int8, readonly=False),
)
def perturbation(key0, key1, node, sample, agent, start, out):  # type: ignore[no-untyped-def]
    """out = z[start..], int8."""
    size = out.shape[0]
    entries = np.empty(TILE, np.int8)
    words = np.empty((4, LANES), np.uint32)
    skip, done = start & _BLOCK_MASK, 0
    block = start >> _BLOCK_SHIFT
    while done < size:
        count = min(TILE - skip, size - done)
        num_blocks = (skip + count + _BLOCK_MASK) >> _BLOCK_SHIFT
        _blocks(words, _u32(block), _u32(sample), _u32(node), _u32(agent), _u32(key0), _u32(key1))
        _spread(entries, words, np.int8(1), np.int8(-1), num_blocks)
        target, source = out[done : done + count], entries[skip : skip + count]
        for j in range(count):
            target[j] = source[j]
        done += count
        block += LANES
        skip = 0


@inlined
def _sum_of_set(sums: Any, values: Any, words: Any, num_blocks: Any) -> None:
    """sums[bit] += values[j] where bit j & 31 of its word is set; words (4, 32), values (4096,), sums (32,) float32.

    Sums over 32 lanes of at most 128 values each: short ones, in float32.
    """
    zero = np.float32(0)
    for block in range(num_blocks):
        for lane in range(4):
            word = words[lane, block]
            at = (block * 4 + lane) * 32
            part = values[at : at + 32]
            for bit in range(32):
                sums[bit] = sums[bit] + (part[bit] if word & _MASKS[bit] else zero)


@kernel(
    _array(types.float32),
    *(types.int64, types.int64),
    _array(types.uint32, 2),
    types.int64,
    _array(types.float64, readonly=False),
)
def projections(vector, key0, key1, directions, start, out):  # type: ignore[no-untyped-def]
    """out[i] = Σ vector[j] z_i[start + j] = 2 Σ_{bit set} vector[j] − Σ vector[j]."""
    n, size = directions.shape[0], vector.shape[0]
    k0, k1 = _u32(key0), _u32(key1)
    values, sums = np.empty(TILE, np.float32), np.empty(32, np.float32)
    words = np.empty((4, LANES), np.uint32)
    skip, done = start & _BLOCK_MASK, 0
    block = start >> _BLOCK_SHIFT
    total = np.float64(0)
    for i in range(n):
        out[i] = 0
    while done < size:
        count = min(TILE - skip, size - done)
        num_blocks = (skip + count + _BLOCK_MASK) >> _BLOCK_SHIFT
        for j in range(num_blocks * BITS_PER_BLOCK):
            values[j] = 0
        for j in range(count):
            values[skip + j] = vector[done + j]
            total += np.float64(vector[done + j])
        for i in range(n):
            name = directions[i]
            _blocks(words, _u32(block), name[1], name[0], name[2], k0, k1)
            for bit in range(32):
                sums[bit] = 0
            _sum_of_set(sums, values, words, num_blocks)
            for bit in range(32):
                out[i] += np.float64(sums[bit])
        done += count
        block += LANES
        skip = 0
    for i in range(n):
        out[i] = 2 * out[i] - total


ALL: Final[tuple[Kernel, ...]] = (apply, follow, decay, perturbed, perturbation, projections)
