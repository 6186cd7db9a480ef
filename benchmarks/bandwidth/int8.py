"""Moves of an adapter in int8: a code a parameter and a scale a tensor, as FedAvg over thin links sends them.

Decides how they are rounded: to either neighbour, as likely as it is near, so that nothing is lost in the mean.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

LIMIT: Final = 127


def quantised(
    move: NDArray[np.float32], sizes: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A move as codes, (size,) int8, and scales, (num_tensors,) float32: the largest entry of a tensor is ±127.

    Args:
        move: (size,).
        sizes: (num_tensors,): parameters of each tensor, in order.
        rng: decides the rounding.
    """
    begins = np.cumsum(sizes) - sizes
    scales = (np.maximum.reduceat(np.abs(move), begins) / LIMIT).astype(np.float32)
    each = np.repeat(scales, sizes)
    exact = np.divide(move, each, out=np.zeros_like(move), where=each > 0)
    codes = np.floor(exact + rng.random(move.size, np.float32))
    return np.clip(codes, -LIMIT, LIMIT).astype(np.int8), scales


def restored(
    codes: NDArray[np.int8], scales: NDArray[np.float32], sizes: NDArray[np.int64]
) -> NDArray[np.float32]:
    """What codes and scales stand for, (size,) float32."""
    return (codes * np.repeat(scales, sizes)).astype(np.float32)
