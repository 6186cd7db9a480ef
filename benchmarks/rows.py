"""Rows of results on disk: one JSON object with a list `rows`, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transport.durable import write_atomically


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if there is no file.

    Raises:
        ValueError: it is no file of rows.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text("utf-8"))
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it has no list of rows")
    return rows


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Keep rows, in the place of what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps({"rows": list(rows)}, indent=1) + "\n").encode())
