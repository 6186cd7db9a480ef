"""Differential privacy of what a node reports: the rows of a batch are drawn, bounded and drowned in noise.

Decides how one release comes about: Poisson sampling of rows, a bound on what one of them may say, and Gaussian noise
added once to the sum. What a release costs, `node.accountant` says; how many there may be, `node.budget`.

For two-sided slopes this is DP-ZO (Tang et al. 2024, arXiv 2401.04343): each row's difference of losses is
clipped, their sum gets Gaussian noise. Several directions on one batch are one release of a vector, clipped in L2 as
the gradients of Abadi et al. 2016 (arXiv 1607.00133, algorithm 1) are.

All randomness is the operating system's, drawn anew each time, so that nobody can guess it and no noise meets two
different sums. Sums are integers: a row counts in whole parts of `GRID`, and the noise is rounded to them, which is
post-processing of the Gaussian mechanism. Thus the low bits of a float cannot tell what it is the sum of (Mironov 2012,
"On significance of the least significant bits for differential privacy").
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from node.records import DataError

GRID: Final = 2**24
"""Parts that the largest share of a row is divided into. Far finer than the noise, and sums of 2^38 rows fit."""
MAX_NOISE: Final = 2.0**20
"""Larger noise would need more bits, and leave nothing of any slope."""
Entropy = Callable[[int], bytes]


@dataclass(frozen=True, kw_only=True)
class Release:
    """What one release is made with; two of equal figures cost the same."""

    rate: float
    """Probability with which each row is in a batch, independently of all others; 1: all rows, always."""
    noise: float
    """Standard deviation of the noise, in units of `clip`."""
    clip: float
    """Largest L2 norm of what one row adds to the sum, in units of a loss."""

    def __post_init__(self) -> None:
        """Check the ranges. Raises ValueError."""
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {self.rate}")
        if not 0 < self.noise <= MAX_NOISE:
            raise ValueError(f"noise must be above 0 and at most {MAX_NOISE:.0f}, got {self.noise}")
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be a positive number, got {self.clip}")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a node's owner demands, as `zo-node join` takes it."""

    epsilon: float
    """Most that may be spent, over all rounds and agents."""
    delta: float
    """At which epsilon is stated."""
    clip: float
    """Most that one row may say in a release, in units of the loss."""
    noise: float | None = None
    """In units of `clip`; None: as little as makes the budget last for the whole run."""

    def __post_init__(self) -> None:
        """Check the ranges. Raises DataError."""
        for name in ("epsilon", "clip"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise DataError(f"--dp-{name} takes a number above 0, got {value:g}")
        if not 0 < self.delta < 1:
            raise DataError(f"--dp-delta takes a number between 0 and 1, got {self.delta:g}")
        if self.noise is not None and not 0 < self.noise <= MAX_NOISE:
            raise DataError(
                f"--dp-noise takes a number above 0 and up to {MAX_NOISE:.0f}, got {self.noise:g}"
            )


class Mechanism:
    """Draws batches and sums up what their rows say, as a `Release` demands."""

    num_releases: int
    """Sums that were given out."""
    num_rows: int
    """Rows that were summed up so far."""
    num_clipped: int
    """How many of them said more than they may. For the node's own eyes: it is not private."""

    def __init__(self, release: Release, entropy: Entropy = secrets.token_bytes) -> None:
        """Fix how releases are made.

        Args:
            release: of every one.
            entropy: gives so many bytes that nobody can guess; another than the system's is for tests.
        """
        self.release = release
        self._entropy = entropy
        self.num_releases = self.num_rows = self.num_clipped = 0

    def rows(self, num_rows: int) -> NDArray[np.int64]:
        """The rows of a batch, ascending: each of 0 … num_rows − 1 with probability `rate`, independently."""
        if self.release.rate == 1:
            return np.arange(num_rows)
        return np.flatnonzero(self._uniform(num_rows) < self.release.rate)

    def noisy_sum(self, said: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of what the rows of a batch say, each clipped, plus noise: (m,).

        Args:
            said: (rows, m) losses, or differences of them. A row with an entry that is not finite says nothing.
        """
        clip = self.release.clip
        parts = in_parts(said, clip)
        self.num_releases += 1
        self.num_rows += len(said)
        with np.errstate(over="ignore"):
            self.num_clipped += int(np.count_nonzero(~(np.linalg.norm(said, axis=1) <= clip)))
        noise = np.rint(self.release.noise * GRID * self._gaussian(said.shape[1])).astype(np.int64)
        total: NDArray[np.float64] = (parts.sum(0) + noise).astype(np.float64)
        return total * (clip / GRID)

    def _uniform(self, count: int) -> NDArray[np.float64]:
        """(count,) multiples of 2^−53 in [0, 1)."""
        words = np.frombuffer(self._entropy(8 * count), np.dtype("<u8"))
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _gaussian(self, count: int) -> NDArray[np.float64]:
        """(count,) of mean 0 and variance 1 (Box and Muller 1958)."""
        radius: NDArray[np.float64] = np.sqrt(-2 * np.log(self._uniform(count) + 2.0**-54))
        return radius * np.cos(2 * np.pi * self._uniform(count))


def in_parts(said: NDArray[np.float64], clip: float) -> NDArray[np.int64]:
    """Each row scaled down to an L2 norm of at most `clip`, in whole parts of clip / GRID: (rows, m).

    min(1, clip / ‖row‖₂) × row, rounded towards zero, which makes no norm larger. One part in GRID less than would fit,
    so that no rounding of floats leads beyond it either.

    Args:
        said: (rows, m). A row with an entry that is not finite becomes zero.
        clip: greater than 0, in units of `said`.
    """
    finite = np.where(np.isfinite(said).all(1, keepdims=True), said, 0.0)
    largest = np.abs(finite).max(1, keepdims=True, initial=0.0)
    unit = finite / np.where(
        largest > 0, largest, 1.0
    )  # squares of large numbers overflow, of small ones vanish
    norms = np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1.0)
    with np.errstate(over="ignore"):
        scaled = unit * np.minimum(largest / clip, 1 / norms)
    parts: NDArray[np.int64] = np.trunc(scaled * (GRID - 1)).astype(np.int64)
    return parts
