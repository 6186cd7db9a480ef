"""What a node tries before its first round: how noisy its losses are, and how its forward passes are fastest.

Decides, from a few passes over its own batches, how many directions share a pass, and whether the run's epsilon can be
heard on this machine. The first is acted upon, the second is for people.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from node.estimators import FIRST_ORDER, EstimatorError, Trial
from node.objectives import Judged
from node.probe import Probe
from node.stacked import frozen_layers
from zo.directions import Direction
from zo.manifest import Estimator

MAX_DIRECTIONS: Final = 4
"""Tried for signal and noise."""
BUDGET_S: Final = 8.0
"""Fewer are tried if a pair of passes over so many would take longer than this."""
DROWNED: Final = 0.3
"""Of the signal: with more noise than this, a node's votes lose weight."""
WIDE: Final = 0.05
"""An epsilon at which views differ far beyond rounding: there a pass that mixes them up is found out."""
MOST_DIFFERENCE: Final = 0.2
"""Of losses there, as a share of what moving the views changes; LLM.int8() has some: a pass shares its outliers."""
LEAST_GAIN: Final = 1.05
"""Of speed: less is within what such a short measurement can tell."""
MAX_TOKENS: Final = 4096
"""In one stacked pass. Beyond it arithmetic is the limit, and activations would grow for nothing."""
MAX_VIEWS_BYTES: Final = 64 << 20
"""Of all views, where they are more than the two of one direction."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What was found."""

    epsilon: float
    """At which it was measured."""
    sides: int
    """Views of a direction."""
    num_directions: int
    """Over which it was averaged."""
    signal: float
    """RMS of L+ − L−, in units of the loss; not finite if a loss was not."""
    repeat: float
    """Standard deviation of the loss of one batch at one view."""
    unevenness: float
    """What L+ − L− is off, by how far half of epsilon is from giving half of it (RMS): what few bits or few tokens make
    of a smooth loss, or curvature where epsilon is far too large."""
    at_once: int
    """Directions that share a forward pass; 0: every view has a pass of its own."""
    seconds: float
    """A direction takes, as chosen."""
    ratio: float
    """How many times as fast that is as one view at a time."""
    why_not: str
    """Why views cannot share a pass; empty if they can, or if it was not tried."""

    @property
    def noise(self) -> float:
        """RMS of what is wrong in L+ − L−."""
        return max(math.sqrt(2) * self.repeat, self.unevenness)

    @property
    def warning(self) -> str:
        """What is wrong with epsilon on this machine, with the figures; empty if nothing is."""
        asks = "; `zo-node calibrate` measures which epsilon suits"
        over = f"{self.num_directions} direction{'s' * (self.num_directions > 1)}"
        if not math.isfinite(self.signal):
            return (
                f"not every loss is finite at weights ± epsilon z with epsilon = {self.epsilon:g} ({over} tried); "
                "such a direction is no vote" + asks
            )
        if self.signal == 0:
            return f"epsilon = {self.epsilon:g} is too small here: L+ = L- in each of {over} tried" + asks
        if self.noise <= DROWNED * self.signal:
            return ""
        return (
            f"epsilon = {self.epsilon:g} drowns in noise here: L+ - L- is {self.signal:.2g} (RMS of {over}), and "
            f"off by {self.noise:.2g}" + asks
        )

    @property
    def how(self) -> str:
        """How this node's views go through the model."""
        how = "one view in a forward pass"
        if self.at_once:
            of_one = "both views" if self.sides == 2 else "the view"
            views = of_one if self.at_once == 1 else f"{of_one} of {self.at_once} directions"
            how = f"{views} in one forward pass, {self.ratio:.2f} times as fast as one by one"
        return f"{how} ({self.why_not})" if self.why_not else how

    def __str__(self) -> str:
        """How this node probes, in one line."""
        seconds = f"{self.seconds:.2g} s" if self.seconds >= 1 else f"{1000 * self.seconds:.3g} ms"
        return f"{self.how}, {seconds} a direction; L+ - L- is {self.signal:.2g}, off by {self.noise:.2g}"


def rehearse(
    probe: Probe,
    weights: NDArray[np.int32],
    at_once: int | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Rehearsal:
    """Measure signal, noise and speed; set `probe.at_once` to what is fastest.

    Views share a pass only if they have the losses there that they have one by one.

    Args:
        probe: of the node, on whose batches it is tried. Nothing of this is sent, so the directions' names (node 0, the
            samples of round 0) are of no consequence.
        weights: int32 (size,): where the losses are taken.
        at_once: directions that shall share a pass, whether that is faster or not; None to choose.
        clock: in seconds.
    """

    def seconds(at_once: int, names: Sequence[Direction]) -> float:
        probe.at_once = at_once
        started = clock()
        probe.losses(weights, names, probe.sides)
        return (clock() - started) / len(names)

    first_s = seconds(0, [Direction(0, 0)])
    names = [Direction(0, i) for i in range(max(1, min(MAX_DIRECTIONS, int(BUDGET_S / max(first_s, 1e-9)))))]
    losses, again = probe.losses(weights, names, 2), probe.losses(weights, names, 2)
    half = probe.losses(weights, names, 2, probe.epsilon / 2)
    difference = losses[:, 0] - losses[:, 1]
    signal, repeat = _rms(difference), _rms(losses - again) / math.sqrt(2)
    # Of equal and independent errors e in both, e / 2 and e are in what is left: together √(5/4) e.
    unevenness = _rms(difference / 2 - (half[:, 0] - half[:, 1])) / math.sqrt(1.25)

    best, best_s, why_not = 0, math.inf, ""
    plain_s = seconds(0, names)
    for candidate in _candidates(probe) if at_once is None else [at_once] if at_once else []:
        tried = [*names, *(Direction(0, i) for i in range(len(names), candidate))]
        try:
            if not best and (why_not := _why_apart(probe, weights)):
                break
            stacked_s = min(seconds(candidate, tried), seconds(candidate, tried))
        except (RuntimeError, MemoryError) as error:
            why_not = f"several fail: {str(error).partition(chr(10))[0]}"
            break
        plain_s = min(plain_s, seconds(0, names))  # again: others may have used the machine the first time
        if at_once is None and stacked_s * LEAST_GAIN > min(plain_s, best_s):
            break
        best, best_s = candidate, stacked_s
    probe.at_once = best
    probe.hold()  # more may have been tried than are needed
    return Rehearsal(
        epsilon=probe.epsilon,
        sides=probe.sides,
        num_directions=len(names),
        signal=signal,
        repeat=repeat,
        unevenness=unevenness,
        at_once=best,
        seconds=best_s if best else plain_s,
        ratio=plain_s / best_s if best else 1.0,
        why_not=why_not,
    )


def try_out(
    probe: Probe,
    weights: NDArray[np.int32],
    estimator: Estimator,
    clock: Callable[[], float] = perf_counter,
) -> Trial:
    """Measure a few slopes exactly and by differences, on the same batches.

    Args:
        probe: of the node; it is as before afterwards. Nothing of this is sent.
        weights: int32 (size,): where.
        estimator: forward or backward.
        clock: in seconds.
    """
    assert estimator in FIRST_ORDER
    steps = probe.local_steps
    names = [Direction(0, sample) for sample in range(min(MAX_DIRECTIONS, probe.directions // steps))]
    before, probe.estimator = probe.estimator, estimator
    try:
        probe.slopes_along(
            weights, names[:1]
        )  # the first time, memory is found and the base made differentiable
        started = clock()
        exact, _ = probe.slopes_along(weights, names)
        took = clock() - started
    except (EstimatorError, MemoryError) as error:
        return Trial(seconds=float("inf"), error=float("inf"), why_not=str(error))
    finally:
        probe.estimator = before
    losses = probe.losses(weights, names, 2, is_shared=estimator == "backward")
    off = 2 * probe.epsilon * exact - (losses[:, 0] - losses[:, 1])
    passes = probe.directions / len(names) if estimator == "forward" else steps
    return Trial(seconds=took * passes, error=float(np.sqrt(np.mean(off**2))))


def _why_apart(probe: Probe, weights: NDArray[np.int32]) -> str:
    """Why views cannot share a pass, from how far losses are from those one by one; empty if they can."""
    names = [Direction(0, 0)]
    probe.at_once = 0
    apart, unmoved = probe.losses(weights, names, 2, WIDE), probe.losses(weights, names, 2)
    probe.at_once = 1
    error = np.abs(probe.losses(weights, names, 2, WIDE) - apart).max()
    change = max(np.ptp(apart), np.abs(apart - unmoved).max())
    if not change and isinstance(probe.objective, Judged):
        # Others may have been said and scored the same: equal losses prove nothing here.
        return "all that is said scores the same, so nothing tells whether several would too"
    off = float(error / max(change, math.ulp(0.0))) if error else 0.0
    if off <= MOST_DIFFERENCE:  # not if it is NaN
        return ""
    return f"several have other losses, by {off:.0%}: this model mixes the rows of a batch"


def _candidates(probe: Probe) -> Iterator[int]:
    """Directions that make 2, 4, 8 … views: as many as a local step has and as fit into a pass."""
    num_tokens = probe.draw(Direction(0, 0)).tokens.size
    _, frozen = frozen_layers(probe.adapter)
    num_views = 2
    while num_views <= probe.sides * probe.directions // probe.local_steps:
        num_batches = num_views // 2 if probe.sides == 2 else 1  # which is what the frozen layers see
        if num_tokens * (frozen * num_batches + (1 - frozen) * num_views) > MAX_TOKENS:
            return
        if num_views > 2 and 4 * num_views * probe.adapter.size > MAX_VIEWS_BYTES:
            return
        yield num_views // probe.sides
        num_views *= 2


def _rms(values: NDArray[np.float64]) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.sqrt(np.mean(np.square(values))))
