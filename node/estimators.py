"""Which estimator a node uses: what the run allows, what this machine can do, and what is best of that.

Decides from figures that were measured; measuring them is `node.rehearsal`'s business. All estimators give codes of one
meaning, the derivative of the node's loss along z, so each node may choose for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from zo.manifest import Estimator, Manifest

if TYPE_CHECKING:
    from node.rehearsal import Rehearsal

Choice = Literal[Estimator, "moves"]
"""An estimator of slopes, or moves instead of them."""
SPSA: Final = "spsa"
"""From losses, on as many sides as the run says."""
Wanted = Literal["auto", "spsa", Choice]
FIRST_ORDER: Final[frozenset[Estimator]] = frozenset({"forward", "backward"})
"""Those that need a derivative of the loss."""
SLOWEST: Final = 4.0
"""Times the usual round: slower than this an estimator is not chosen by itself, since others would wait for it."""
_WRONG: Final = 0.3
"""Of the RMS of L+ − L−: by more than this, and what differences are off by themselves, exact slopes are wrong."""


class EstimatorError(ValueError):
    """An estimator that the run forbids or that cannot be had here; the message says why and what is."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How an estimator did on this machine."""

    seconds: float
    """For all slopes of a round."""
    error: float
    """RMS of its slopes less those by differences, in units of L+ − L−."""
    why_not: str = ""
    """Why it cannot be had; empty if it can."""


def allowed(manifest: Manifest) -> tuple[Choice, ...]:
    """What nodes of a run may measure by."""
    return (*manifest.probe.estimators, "moves") if manifest.moves.projections else manifest.probe.estimators


def check(wanted: Wanted, manifest: Manifest) -> None:
    """Check that the run allows an estimator, and that it can work there at all.

    Raises:
        EstimatorError: it does not, or it cannot.
    """
    if wanted == "auto":
        return
    if wanted not in allowed(manifest):
        names = ", ".join(allowed(manifest))
        raise EstimatorError(f"this run allows the estimators {names}; got --estimator {wanted}")
    if wanted in FIRST_ORDER and manifest.task.objective != "cross-entropy":
        raise EstimatorError(
            f"--estimator {wanted} needs a derivative, and this run's objective, {manifest.task.objective}, has none"
        )
    if wanted == "one-sided" and manifest.probe.directions < 2 * manifest.probe.local_steps:
        raise EstimatorError(
            "--estimator one-sided compares two directions at least, and this run has one "
            f"{'in a round' if manifest.probe.local_steps == 1 else 'in a local step'}"
        )


def is_right(trial: Trial, rehearsal: Rehearsal) -> bool:
    """Whether exact slopes agree with differences as well as these can tell."""
    return trial.error <= _WRONG * rehearsal.signal + 3 * rehearsal.noise


def choose(
    usual: Estimator,
    allowed: Sequence[Choice],
    trials: Mapping[Choice, Trial],
    rehearsal: Rehearsal,
    num_directions: int,
) -> tuple[Choice, str]:
    """The best estimator that works here, and why, in words.

    Moves learn most. A gradient gives all slopes of a step at the price of about three forward passes and more memory.
    Forward mode costs more than differences, and is worth it only where these drown in noise.

    Args:
        usual: the run's.
        allowed: by the run.
        trials: what was tried.
        rehearsal: of the usual one.
        num_directions: of a round.
    """
    usual_s = rehearsal.seconds * num_directions
    reasons = []
    order: tuple[Choice, ...] = ("moves", "backward", "forward")
    for estimator in order:
        if estimator not in allowed or (trial := trials.get(estimator)) is None:
            continue
        if trial.why_not:
            reasons.append(f"{estimator}: {trial.why_not}")
        elif not is_right(trial, rehearsal):
            reasons.append(
                f"{estimator}: its slopes are off by {trial.error:.2g} where L+ - L- is {rehearsal.signal:.2g}"
            )
        elif trial.seconds > SLOWEST * usual_s:
            reasons.append(f"{estimator}: {trial.seconds:.2g} s a round, {usual} takes {usual_s:.2g} s")
        elif estimator == "forward" and not rehearsal.warning:
            continue
        else:
            return estimator, f"{trial.seconds:.2g} s a round, {usual} takes {usual_s:.2g} s"
    return usual if usual in allowed else allowed[0], "; ".join(reasons)
