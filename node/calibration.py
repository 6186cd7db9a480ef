"""Calibration: which epsilon suits a model, data and machine, from the losses at many of them.

A difference of losses L+ − L− is right if it is proportional to epsilon. It is not where it is so small that rounding
is most of it, nor where epsilon is so large that the loss bends away. Decides how much of it is wrong at each epsilon,
and which to propose. How losses are had is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import hypot, inf, isfinite, sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

EPSILONS: Final = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2)
"""Tried, ascending. The first only serves the second as something to be compared with."""
GOOD_ERROR: Final = 0.1
"""Codes round by more than this share: less is no gain."""
CLEAR: Final = 3.0
"""Times the noise: an RMS over few directions varies by less."""
WORST_ERROR: Final = 0.7
"""With more, most of what is measured is wrong: of noise alone it is 1."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One epsilon. All but the first two are in units of the loss."""

    epsilon: float
    error: float
    """What is wrong with a slope, as a share of it: noise and curvature together; infinite if there is no slope."""
    signal: float
    """RMS of L+ − L− over the directions."""
    noise: float
    """RMS of what is wrong in it because of few bits, or because few tokens make the loss a staircase."""
    curvature: float
    """RMS of what is wrong in it because the loss is no straight line over such a distance."""


def calibrate(
    differences: Callable[[float], NDArray[np.float64]],
    sides: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """What is wrong at each of EPSILONS but the first.

    With s(ε) = L+ − L− = 2ε(g + cε^p) + noise, s(ε)/r − s(ε/r) holds no g: noise makes it √(1/r² + 1) times that of s,
    and curvature (1 − r^−p)/r times that of s. p is 2 for the difference of two sides and 1 for one side, where even
    terms do not cancel. What there is at the smaller half of the epsilons is noise, what there is more of is curvature;
    where that is not clear, it is no more than what the next larger epsilon has, shrunk by the power law.

    Args:
        differences: gives s of the same directions for an epsilon: (n,), in units of the loss.
        sides: 2 if s is L(w + εz) − L(w − εz), 1 if it is twice L(w + εz) less the mean of these.
        progress: called with (epsilons done, epsilons in all).
    """
    found = []
    for epsilon in EPSILONS:
        found.append((epsilon, differences(epsilon)))
        if progress is not None:
            progress(len(found), len(EPSILONS))
    steps = list(pairwise(found))
    # Where losses overflow, the rest is NaN, and no epsilon there is proposed.
    with np.errstate(invalid="ignore"):
        rests = [
            _rms(s * less / epsilon - s_less) / hypot(less / epsilon, 1)
            for (less, s_less), (epsilon, s) in steps
        ]
    noise = float(np.median(rests[: len(rests) // 2]))
    rows: list[Row] = []
    for rest, ((less, _), (epsilon, s)) in reversed(list(zip(rests, steps, strict=True))):
        ratio = epsilon / less
        bent = sqrt(max(0.0, rest * rest - noise * noise)) if isfinite(rest) else inf
        curvature = bent * hypot(1 / ratio, 1) * ratio / (1 - ratio**-sides)
        if rest < CLEAR * noise and rows:
            curvature = min(curvature, rows[-1].curvature * (epsilon / rows[-1].epsilon) ** (sides + 1))
        signal = _rms(s)
        wrong = hypot(noise, curvature)
        error = wrong / signal if signal > 0 and isfinite(wrong) and isfinite(signal) else inf
        rows.append(Row(epsilon=epsilon, error=error, signal=signal, noise=noise, curvature=curvature))
    return rows[::-1]


def proposed(rows: Sequence[Row]) -> Row | None:
    """The epsilon to use; None if a slope is nowhere more right than wrong.

    The largest whose error is good: slopes shrink as a run goes on, noise does not. If none is good, the best.
    """
    good = [row for row in rows if row.error <= GOOD_ERROR]
    if good:
        return max(good, key=lambda row: row.epsilon)
    best = min(rows, key=lambda row: row.error)
    return best if best.error <= WORST_ERROR else None


def _rms(values: NDArray[np.float64]) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.sqrt(np.mean(np.square(values))))
