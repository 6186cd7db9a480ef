"""The course of one run: what the held-out metric was after how many forward passes and bytes.

Decides when a run is measured; `show` is told how far it is, for people.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

MARKS: Final = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of a run after which it is measured: densest where most happens."""

Show = Callable[[int, int, float], None]
"""Is told forward passes done, to be done, and the last metric."""


class Point(NamedTuple):
    """One measurement."""

    forwards: int
    """Forward passes so far, of all nodes together; evaluation is not counted."""
    up_bytes: int
    """Sent up by all nodes so far, without the transport's frames; computed, not measured."""
    metric: float
    """On everything that is held out."""


def passes_to(points: Sequence[tuple[int, float]], metric: float) -> float | None:
    """After how many forward passes a run came down to a metric, between two points linearly; None if it never did.

    Args:
        points: forward passes and the metric after them, in order.
        metric: to come down to.
    """
    for (before, above), (after, below) in pairwise(points):
        if below <= metric:
            share = (above - metric) / (above - below) if above > metric else 0.0
            return before + share * (after - before)
    return None


class Course:
    """Collects the points of a run of known length, the first before anything is trained."""

    def __init__(
        self,
        num_forwards: int,
        measure: Callable[[], float],
        show: Show = lambda *_: None,
        marks: Sequence[float] = MARKS,
    ) -> None:
        """Measure for the first time.

        Args:
            num_forwards: at the end of the run.
            measure: the held-out metric at the weights of this moment.
            show: called whenever something is reached.
            marks: shares of the run after which it is measured.
        """
        self.points: list[Point] = []
        self._ahead = [share * num_forwards for share in marks]
        self._num_forwards = num_forwards
        self._measure = measure
        self._show = show
        self.reached(0, 0)

    def reached(self, forwards: int, up_bytes: int) -> None:
        """Take a point if a mark has been reached."""
        behind = len(self._ahead)
        self._ahead = [mark for mark in self._ahead if mark > forwards]
        if len(self._ahead) < behind:
            self.points.append(Point(forwards, up_bytes, round(self._measure(), 5)))
        self._show(forwards, self._num_forwards, self.points[-1].metric)
