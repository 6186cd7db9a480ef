"""The fast paths, equal to `reference` bit for bit at every size, start and thread count.

One core regenerates and adds tens of billions of parameter·directions per second. What makes it so:

- Philox keeps a block's ten rounds in registers, 32 blocks side by side (one SIMD lane each);
- four directions are added in one pass over a tile of 4,096 sums that stays in the L1 cache until every direction is in;
- a bit becomes a sign by a test against a constant vector of masks, and the −1 half is one subtraction at the end:
  Σ c z = 2 Σ_{bit set} c − Σ c.

Threads work on separate ranges; as sums are integers and directions are named, no split can change a bit.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numba import types
from numpy.typing import NDArray

from zo.compiled import Kernel, inlined, kernel
from zo.directions import Direction, RunKey
from zo.reference import (
    BITS_PER_BLOCK,
    KEY_INCREMENTS,
    MULTIPLIERS,
    NUM_ROUNDS,
    UNIT,
    check_name,
    check_range,
)

LANES: Final = 32
TILE: Final = LANES * BITS_PER_BLOCK
GROUP: Final = 4
"""Directions added in one pass; measured best of 1, 2, 4, 8, 16."""
WORK_PER_THREAD: Final = 2**23
"""A thread is worth starting (0.1 ms) for this many parameter·directions; a perturbed view counts 32 per parameter."""

# Inside kernels every integer must have its width: Numba would widen a Python constant to int64.
_u32, _u64, _i32 = np.uint32, np.uint64, np.int32
_MASKS = np.uint32(1) << np.arange(32, dtype=np.uint32)
_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_K0, _K1 = np.uint32(KEY_INCREMENTS[0]), np.uint32(KEY_INCREMENTS[1])
_HALF = np.uint64(32)
_BLOCK_SHIFT: Final = 7
_BLOCK_MASK: Final = BITS_PER_BLOCK - 1

_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    """sums[j] += Σ twice[g] over the four directions g whose bit j is set; words (4, 4, 32), sums (4096,) int32."""
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
def _apply(weights, key0, key1, directions, coefficients, start):  # type: ignore[no-untyped-def]
    """weights[j] −= Σ coefficients[i] z_i[start + j], tile by tile; tiles begin at the block that `start` lies in."""
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
        sums[: num_blocks * BITS_PER_BLOCK] = 0
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


@kernel(
    _array(types.int32),
    *(types.int64, types.int64, types.int64, types.int64, types.int64),
    types.float32,
    types.int64,
    _array(types.float32, readonly=False),
    _array(types.float32, readonly=False),
)
def _perturbed(weights, key0, key1, node, sample, agent, epsilon, start, plus, minus):  # type: ignore[no-untyped-def]
    """plus, minus = weights × 2^−28 ± ε z[start..]."""
    size = weights.shape[0]
    steps = np.empty(TILE, np.float32)
    words = np.empty((4, LANES), np.uint32)
    skip, done = start & _BLOCK_MASK, 0
    block = start >> _BLOCK_SHIFT
    while done < size:
        count = min(TILE - skip, size - done)
        num_blocks = (skip + count + _BLOCK_MASK) >> _BLOCK_SHIFT
        _blocks(words, _u32(block), _u32(sample), _u32(node), _u32(agent), _u32(key0), _u32(key1))
        _spread(steps, words, epsilon, -epsilon, num_blocks)
        past = done + count
        origin, up, down, step = (
            weights[done:past],
            plus[done:past],
            minus[done:past],
            steps[skip : skip + count],
        )
        for j in range(count):
            value = np.float32(origin[j]) * UNIT
            up[j] = value + step[j]
            down[j] = value - step[j]
        done = past
        block += LANES
        skip = 0


@kernel(
    *(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64),
    _array(types.int8, readonly=False),
)
def _perturbation(key0, key1, node, sample, agent, start, out):  # type: ignore[no-untyped-def]
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
        out[done : done + count] = entries[skip : skip + count]
        done += count
        block += LANES
        skip = 0


_KERNELS: Final[tuple[Kernel, ...]] = (_apply, _perturbed, _perturbation)


def is_compiled() -> bool:
    """Whether the first call of each function here runs at once, without a compile pause of some seconds.

    True when this process has compiled or loaded them, or when the on-disk cache holds them for this source and this
    processor. Where no cache can be written (see `compiled.Kernel`) it is True only after `compile_kernels`.
    """
    return all(each.is_compiled() for each in _KERNELS)


def compile_kernels() -> None:
    """Compile and cache every kernel, or load it from the cache; the calls that follow never pause."""
    for each in _KERNELS:
        each.load()


def set_threads(num_threads: int) -> None:
    """Use at most this many threads per call. The default is the number of cores this process may use.

    Raises:
        ValueError: fewer than one.
    """
    global _num_threads
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    _num_threads = num_threads


def apply(
    weights: NDArray[np.int32],
    key: RunKey,
    directions: NDArray[np.uint32],
    coefficients: NDArray[np.int32],
    start: int = 0,
) -> None:
    """weights[j] −= Σ_i coefficients[i] × z_i[start + j], in place.

    In place because a new vector would double the memory traffic of what is, for a few directions, a memory-bound
    pass, and because a replica has no use for the old one. Sums that leave int32 wrap: see `weights.Bound`.

    Args:
        weights: (size,) int32, contiguous and writable: entries start..start + size of the flat vector.
        key: of the run.
        directions: (n, 3) uint32 of node, sample, agent (`directions.stack`).
        coefficients: (n,) int32. Directions with a coefficient of 0 cost as much as others: leave them out.
        start: where in the vector `weights` begins.

    Raises:
        ValueError: a wrong shape, dtype or range. Nothing has changed then.
    """
    _check_vector("weights", weights, np.int32, writable=True)
    check_range(start, weights.size)
    n = coefficients.shape[0] if coefficients.ndim == 1 else -1
    if directions.shape != (n, 3) or directions.dtype != np.uint32 or coefficients.dtype != np.int32:
        raise ValueError(
            "directions must be uint32 of (n, 3) and coefficients int32 of (n,), "
            f"got {directions.dtype} of {directions.shape} and {coefficients.dtype} of {coefficients.shape}"
        )
    if n == 0:
        return
    names, amounts = np.ascontiguousarray(directions), np.ascontiguousarray(coefficients)
    k0, k1 = key
    _in_ranges(
        lambda low, high: _apply(weights[low:high], k0, k1, names, amounts, start + low),
        weights.size,
        work_each=n,
    )


def perturbed(
    weights: NDArray[np.int32],
    key: RunKey,
    direction: Direction,
    epsilon: float,
    start: int = 0,
    out: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The float views weights + εz and weights − εz, each (size,) float32, in one pass.

    Args:
        weights: (size,) int32, contiguous: entries start..start + size of the flat vector.
        key: of the run.
        direction: the name of z.
        epsilon: in value units; used as float32.
        start: where in the vector `weights` begins.
        out: two (size,) float32 arrays to fill and return instead of new ones.

    Raises:
        ValueError: a wrong shape, dtype or range, or a name that is not uint32.
    """
    _check_vector("weights", weights, np.int32)
    check_range(start, weights.size)
    check_name(key, direction)
    if out is None:
        out = np.empty(weights.size, np.float32), np.empty(weights.size, np.float32)
    plus, minus = out
    for view in out:
        _check_vector("out", view, np.float32, writable=True)
        if view.size != weights.size:
            raise ValueError(f"out must have the {weights.size} entries of weights, got {view.size}")
    single = np.float32(epsilon)
    _in_ranges(
        lambda low, high: _perturbed(
            weights[low:high], *key, *direction, single, start + low, plus[low:high], minus[low:high]
        ),
        weights.size,
        work_each=32,
    )
    return out


def perturbation(key: RunKey, direction: Direction, size: int, start: int = 0) -> NDArray[np.int8]:
    """Entries start..start + size of the Rademacher perturbation z: (size,) int8, each −1 or +1.

    Raises:
        ValueError: entries beyond the 2^39 of a direction, or a name that is not uint32.
    """
    check_range(start, size)
    check_name(key, direction)
    out = np.empty(size, np.int8)
    _perturbation(*key, *direction, start, out)
    return out


def _check_vector(name: str, vector: NDArray[Any], dtype: type[np.generic], writable: bool = False) -> None:
    flags = vector.flags
    if (
        vector.ndim != 1
        or vector.dtype != dtype
        or not flags.c_contiguous
        or (writable and not flags.writeable)
    ):
        kind = "contiguous and writable" if writable else "contiguous"
        raise ValueError(
            f"{name} must be a {kind} vector of {np.dtype(dtype)}, got {vector.dtype} of shape {vector.shape}"
        )


def _in_ranges(run: Callable[[int, int], None], size: int, work_each: int) -> None:
    """run(low, high) over 0..size, in one piece or in one per thread.

    Threads live for one call: no pool to outlive a fork, and no threading layer to share with torch. Kernels release
    the GIL.
    """
    num_threads = min(_num_threads, size * work_each // WORK_PER_THREAD, size // TILE)
    if num_threads <= 1:
        run(0, size)
        return
    tiles = -(-size // TILE)
    edges = [min(size, tiles * i // num_threads * TILE) for i in range(num_threads + 1)]
    with ThreadPoolExecutor(num_threads - 1) as pool:
        others = [pool.submit(run, low, high) for low, high in zip(edges[1:-1], edges[2:], strict=True)]
        run(edges[0], edges[1])
        for other in others:
            other.result()
