"""The course of one run: what the held-out metric was after how many forward passes and bytes.

Decides when a run is measured; `show` is told how far it is, for people.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
