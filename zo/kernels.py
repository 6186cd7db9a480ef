"""The fast paths, equal to `reference` bit for bit at every size, start and thread count.

This module checks arguments, divides work among threads and answers for compilation; the arithmetic is in
`loops`. Threads work on separate ranges: sums are integers and directions are named, so no split changes a bit.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from zo import loops
from zo.compiled import Kernel
from zo.directions import Direction, RunKey
from zo.reference import check_range, check_uint32

WORK_PER_THREAD: Final = 2**26
"""A thread (0.1 ms to start) is worth it for this many parameter·directions, about 2 ms."""
PERTURBED_WORK: Final = 6
"""What both perturbed views of a parameter cost, in parameter·directions."""
PAIR_WORK: Final = 4
"""What following or decaying costs a parameter, in parameter·directions: reading and writing it."""
PIECES_PER_THREAD: Final = 4
"""Threads fetch pieces as they go, so that one on a busy core does not hold up the others."""

_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_compiled() -> bool:
    """Whether the first call of each function here runs at once, without a compile pause of some seconds.

    True when this process has compiled or loaded them, or when the on-disk cache holds them for this source
    and this processor. Where no cache can be written (see `compiled.Kernel`) it is True only after
    `compile_kernels`.
    """
    return all(each.is_compiled() for each in loops.ALL)


def compile_kernels() -> None:
    """Compile and cache every kernel, or load it from the cache; the calls that follow never pause."""
    for each in loops.ALL:
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

    In place because a new vector would double the memory traffic of what is, for a few directions, a
    memory-bound pass, and because a replica has no use for the old one. Sums that leave int32 wrap: see
    `weights.Bound`.

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
    check_uint32(*key)
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
        lambda low, high: loops.apply(weights[low:high], k0, k1, names, amounts, start + low),
        weights.size,
        work_each=n,
    )


def follow(weights: NDArray[np.int32], aim: NDArray[np.int32], shift: int) -> None:
    """weights += (aim − weights) >> shift, in place; `reference.follow` says what for.

    Args:
        weights: (size,) int32, contiguous and writable.
        aim: (size,) int32, contiguous.
        shift: 1 to 31.

    Raises:
        ValueError: a wrong shape, dtype or range. Nothing has changed then.
    """
    _in_pairs(loops.follow, weights, "aim", aim, shift)


def decay(weights: NDArray[np.int32], start: NDArray[np.int32], shift: int) -> None:
    """weights −= (weights − start) / 2^shift, rounded half away from zero, in place.

    Args:
        weights: (size,) int32, contiguous and writable.
        start: (size,) int32, contiguous.
        shift: 1 to 31.

    Raises:
        ValueError: a wrong shape, dtype or range. Nothing has changed then.
    """
    _in_pairs(loops.decay, weights, "start", start, shift)


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
    check_uint32(*key, *direction)
    if out is None:
        out = np.empty(weights.size, np.float32), np.empty(weights.size, np.float32)
    plus, minus = out
    for view in out:
        _check_vector("out", view, np.float32, writable=True)
        if view.size != weights.size:
            raise ValueError(f"out must have the {weights.size} entries of weights, got {view.size}")
    single = np.float32(epsilon)
    _in_ranges(
        lambda low, high: loops.perturbed(
            weights[low:high], *key, *direction, single, start + low, plus[low:high], minus[low:high]
        ),
        weights.size,
        work_each=PERTURBED_WORK,
    )
    return out


def perturbation(key: RunKey, direction: Direction, size: int, start: int = 0) -> NDArray[np.int8]:
    """Entries start..start + size of the Rademacher perturbation z: (size,) int8, each −1 or +1.

    Raises:
        ValueError: entries beyond the 2^39 of a direction, or a name that is not uint32.
    """
    check_range(start, size)
    check_uint32(*key, *direction)
    out = np.empty(size, np.int8)
    loops.perturbation(*key, *direction, start, out)
    return out


def projections(
    vector: NDArray[np.float32], key: RunKey, directions: NDArray[np.uint32], start: int = 0
) -> NDArray[np.float64]:
    """Σ_j vector[j] × z_i[start + j] for each direction i, (n,) float64; no float z is ever made.

    What comes of it is a node's own codes, not state: it is the reference's up to the rounding of float32 sums.

    Args:
        vector: (size,) float32, contiguous: a gradient, or a move.
        key: of the run.
        directions: (n, 3) uint32 of node, sample, agent (`directions.stack`).
        start: where in the flat vector `vector` begins.

    Raises:
        ValueError: a wrong shape, dtype or range.
    """
    _check_vector("vector", vector, np.float32)
    check_range(start, vector.size)
    check_uint32(*key)
    if directions.ndim != 2 or directions.shape[1] != 3 or directions.dtype != np.uint32:
        raise ValueError(f"directions must be uint32 of (n, 3), got {directions.dtype} of {directions.shape}")
    out = np.empty(len(directions), np.float64)
    names = np.ascontiguousarray(directions)
    _in_ranges(
        lambda low, high: loops.projections(vector, *key, names[low:high], start, out[low:high]),
        len(directions),
        work_each=vector.size,
        each=1,
    )
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


def _in_pairs(
    loop: Kernel, weights: NDArray[np.int32], name: str, other: NDArray[np.int32], shift: int
) -> None:
    """loop(weights, other, shift), entry by entry, on as many threads as it is worth."""
    _check_vector("weights", weights, np.int32, writable=True)
    _check_vector(name, other, np.int32)
    if other.size != weights.size:
        raise ValueError(f"{name} must have the {weights.size} entries of weights, got {other.size}")
    if not 1 <= shift <= 31:
        raise ValueError(f"shift must be within 1 and 31, got {shift}")
    _in_ranges(lambda low, high: loop(weights[low:high], other[low:high], shift), weights.size, PAIR_WORK)


def _in_ranges(run: Callable[[int, int], None], size: int, work_each: int, each: int = loops.TILE) -> None:
    """run(low, high) over 0..size, in one piece, or in several on as many threads as the work is worth.

    Pieces are multiples of `each`.

    Threads live for one call: no pool to outlive a fork, no threading layer to share with torch. The loops
    release the GIL.
    """
    num_threads = min(_num_threads, size * work_each // WORK_PER_THREAD)
    if num_threads <= 1:
        run(0, size)
        return
    num_tiles = -(-size // each)
    num_pieces = min(num_threads * PIECES_PER_THREAD, num_tiles)
    edges = [min(num_tiles * i // num_pieces * each, size) for i in range(num_pieces + 1)]
    pieces = deque(pairwise(edges))

    def work() -> None:
        while True:
            try:
                low, high = pieces.popleft()  # atomic; no piece may be applied twice
            except IndexError:
                return
            run(low, high)

    with ThreadPoolExecutor(num_threads - 1) as pool:
        others = [pool.submit(work) for _ in range(num_threads - 1)]
        work()
        for other in others:
            other.result()
