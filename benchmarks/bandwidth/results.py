"""Results of the suite on disk: one JSON file a part, rows by their key, each with where and how it was measured.

A row that is there is not measured again, unless it is of another commit: then it is, and until then a report says so.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks import machine, rows

PACKAGES: Final = ("pyzmq", "msgspec", "numpy", "numba", "torch", "transformers", "peft")
DIRECTORY: Final = Path("docs/results/bandwidth")
Row = dict[str, Any]


def key_of(settings: Mapping[str, Any]) -> str:
    """Hex name of what a row was measured with: 16 characters."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def provenance() -> Row:
    """The machine, commit, versions, command and date of a row that is measured now."""
    return {
        "cpu": machine.cpu(),
        "num_cores": machine.num_cores(),
        "load": round(os.getloadavg()[0], 1),
        "commit": machine.commit(),
        "versions": machine.versions(PACKAGES),
        "command": machine.command("zo-bench"),
        "date": datetime.now(UTC).date().isoformat(),
    }


class Results:
    """The rows of one part of the suite, in a file or, without a directory, in memory alone."""

    def __init__(self, part: str, directory: Path | None) -> None:
        """Read what is there.

        Raises:
            ResultsError: the file is not one of results.
        """
        self.path = None if directory is None else directory / f"{part}.json"
        self.rows: dict[str, Row] = {}
        if self.path is not None:
            self.rows = dict(rows.read(self.path, lambda row: (row["key"], row)))

    def find(self, settings: Mapping[str, Any]) -> Row | None:
        """The row of these settings, if it was measured at this commit already."""
        row = self.rows.get(key_of(settings))
        return None if row is None or row["measured"]["commit"] != machine.commit() else row

    def add(self, settings: Mapping[str, Any], measured: Mapping[str, Any]) -> Row:
        """Keep a row, in the place of an older one, on disk at once."""
        row = {"key": key_of(settings), **settings, **measured, "measured": provenance()}
        self.rows[row["key"]] = row
        if self.path is not None:
            rows.write(self.path, self.rows.values())
        return row

    def foreign(self) -> list[str]:
        """Commits other than this tree's that rows are of."""
        here = machine.commit()
        return sorted({str(row["measured"]["commit"]) for row in self.rows.values()} - {str(here)})


def bare(row: Row) -> Row:
    """A row without what names it on disk."""
    return {name: value for name, value in row.items() if name not in ("key", "measured")}
