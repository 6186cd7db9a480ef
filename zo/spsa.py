"""SPSA: the slope of a loss along a direction from two evaluations, or along several from one each.

How a loss is computed is the caller's.

Spall 1992, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation",
eq. 2.2; for language models MeZO (arXiv 2305.17333), definition 1. Unlike there, nothing is perturbed and
restored in place: both views are computed from the integer weights, which stay as they are.
"""

from collections.abc import Callable, Sequence
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from zo import kernels
from zo.directions import Direction, RunKey


def projected_gradients(
    loss: Callable[[NDArray[np.float32]], float],
    weights: NDArray[np.int32],
    key: RunKey,
    directions: Sequence[Direction],
    epsilon: float,
) -> tuple[NDArray[np.float64], float]:
    """The two-sided projected gradient along each direction, (n,) float64, and the mean of all finite losses.

    Args:
        loss: of (size,) float32 values. The array is reused: valid during the call only.
        weights: (size,) int32.
        key: of the run.
        directions: the names of n directions z.
        epsilon: in value units, greater than 0.

    Raises:
        ValueError: epsilon is not a positive number.
    """
    views = np.empty(weights.size, np.float32), np.empty(weights.size, np.float32)
    losses = np.empty((len(directions), 2), np.float64)
    for row, direction in zip(losses, directions, strict=True):
        kernels.perturbed(weights, key, direction, epsilon, out=views)
        row[:] = loss(views[0]), loss(views[1])
    return two_sided(losses, epsilon), finite_mean(losses)


def two_sided(losses: NDArray[np.float64], epsilon: float) -> NDArray[np.float64]:
    """The projected gradients (L₊ − L₋) / 2ε, (n,) float64.

    A loss that is not finite makes its gradient not finite, which `codes.encode` turns into NO_VOTE.

    Args:
        losses: (n, 2): loss(weights + εz) and loss(weights − εz) of every direction.
        epsilon: in value units, greater than 0.

    Raises:
        ValueError: epsilon is not a positive number.
    """
    _check_epsilon(epsilon)
    with np.errstate(invalid="ignore"):  # inf − inf is NaN, which is what it should be
        return (losses[:, 0] - losses[:, 1]) / (2 * epsilon)


def one_sided(losses: NDArray[np.float64], epsilon: float) -> NDArray[np.float64]:
    """The projected gradients from one loss each, (n,) float64.

    g_i = (L_i − mean(L)) / ε · n / (n − 1), where L_i = loss(weights + εz_i), all on the same batch. The mean stands
    for loss(weights), as in FZOO (arXiv 2506.09034, eq. 4), and takes out what all L_i share: the loss itself and the
    curvature ε²/2 · tr H, which is equal for all Rademacher z but for the off-diagonal part of H. The factor makes
    E[g_i z_i] the gradient although L_i is a part of its own baseline.

    A loss that is not finite makes its gradient not finite and counts in no mean; if fewer than two are finite, no
    gradient is.

    Args:
        losses: (n,), at least two.
        epsilon: in value units, greater than 0.

    Raises:
        ValueError: epsilon is not a positive number, or there are fewer than two directions.
    """
    _check_epsilon(epsilon)
    if len(losses) < 2:
        raise ValueError(f"the mean of one loss says nothing: at least 2 directions, got {len(losses)}")
    num_finite = np.count_nonzero(np.isfinite(losses))
    if num_finite < 2:
        return np.full(len(losses), np.nan)
    return (losses - finite_mean(losses)) / epsilon * (num_finite / (num_finite - 1))


def finite_mean(losses: NDArray[np.float64]) -> float:
    """The mean of those losses that are finite; NaN if none is."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if finite.size else float("nan")


def _check_epsilon(epsilon: float) -> None:
    if not (isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon must be a positive number, got {epsilon}")
