"""How much of a one-sided slope is curvature, and whether both sides are worth their second forward pass. Pure.

A one-sided slope is what L(w + εz) differs by from its mean over several z. That is ε gᵀz, which is wanted, and the
off-diagonal part of ε²/2 zᵀHz, which is noise. L(w − εz) tells them apart: half the difference of both sides is the
first, half their sum less its mean is the second. Directions with noise of a share s of their variance are worth 1 − s
of as many without; the mean takes away 1/n more of n; and one-sided there are twice as many for as many forward passes.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

EVERY: Final = 16
"""Steps from one measurement to the next: both sides of every direction, where one would do."""
_MEMORY: Final = 8
"""Measurements that are averaged over."""
_ENOUGH: Final = 16
"""Directions seen before anything is decided."""
_MARGIN: Final = 1.25
"""By so much one way must be better than the other for a change."""


class Curvature(NamedTuple):
    """What was found so far."""

    slope: float = 0.0
    """Mean square of half the difference of both sides, smoothed."""
    bend: float = 0.0
    """Variance of half their sum over the directions of a step, smoothed."""
    num_measured: int = 0
    num_directions: int = 0
    needs_both_sides: bool = False
    """Whether slopes are better measured from both sides."""

    @property
    def share(self) -> float:
        """Of curvature in the variance of one-sided slopes; 0 before anything is known."""
        return self.bend / (self.slope + self.bend) if self.bend else 0.0


def observed(before: Curvature, losses: NDArray[np.float64]) -> Curvature:
    """What is known after the losses of one more step.

    Args:
        before: what was known.
        losses: (n, 2): at weights + εz and weights − εz of every direction, all on one batch.
    """
    finite = losses[np.isfinite(losses).all(1)]
    n = len(finite)
    if n < 2:
        return before
    weight = 1 / min(before.num_measured + 1, _MEMORY)
    slope = before.slope + weight * (float(np.mean(((finite[:, 0] - finite[:, 1]) / 2) ** 2)) - before.slope)
    bend = before.bend + weight * (float(np.var(finite.mean(1), ddof=1)) - before.bend)
    after = Curvature(
        slope, bend, before.num_measured + 1, before.num_directions + n, before.needs_both_sides
    )
    if after.num_directions < _ENOUGH:
        return after
    worth = 2 * (1 - after.share) * (n - 1) / n  # of one side, for as many passes as both take
    if after.needs_both_sides:
        return after._replace(needs_both_sides=worth < _MARGIN)
    return after._replace(needs_both_sides=worth < 1 / _MARGIN)
