"""Rows of results on disk: what was run already is not run again.

Decides what makes two rows the same: recipe, data, base, settings and seed, but not the commit or the machine, which
every row names for itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.recipes.course import Point


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run of one method."""

    key: str
    subject: str
    """The problem, in words."""
    method: str
    form: dict[str, Any]
    """What was trained; see `benchmarks.recipes.problem.Form`."""
    settings: dict[str, Any]
    """How; see the method."""
    seed: int
    points: tuple[Point, ...]
    """The course of the run, from before to after it."""
    seconds: float
    """Of training and measuring."""
    date: str
    commit: str | None
    cpu: str
    """What computed it: a processor, or a GPU."""
    torch: str | None

    @property
    def start(self) -> float:
        """The held-out metric before the run."""
        return self.points[0].metric

    @property
    def end(self) -> float:
        """The held-out metric after it."""
        return self.points[-1].metric

    @property
    def forwards(self) -> int:
        """Forward passes in all."""
        return self.points[-1].forwards


def key_of(*parts: object) -> str:
    """Hex name of what a row was run with: 16 characters."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Results:
    """The rows of one recipe in one file."""

    def __init__(self, path: Path) -> None:
        """Read what is there. Raises ResultsError."""
        self.path = path
        self.rows = rows.read(path, _row)

    def find(self, key: str) -> Row | None:
        """The row of this key, if it was run already."""
        return next((row for row in self.rows if row.key == key), None)

    def add(self, row: Row) -> None:
        """Keep a row, in the place of an older one of its key, on disk at once."""
        self.rows = [each for each in self.rows if each.key != row.key] + [row]
        self.keep([each.key for each in self.rows])

    def keep(self, keys: Sequence[str]) -> None:
        """Put the rows into the order of these keys, and drop all others."""
        by_key = {row.key: row for row in self.rows}
        self.rows = [by_key[key] for key in dict.fromkeys(keys)]
        rows.write(self.path, map(asdict, self.rows))


def _row(each: dict[str, Any]) -> Row:
    points = tuple(Point(*point) for point in each.pop("points"))
    return Row(points=points, **each)
