"""Rows of results on disk: one JSON object with a list `rows`, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from transport.durable import write_atomically

T = TypeVar("T")


class ResultsError(ValueError):
    """A file of results that is none; the message says which and what to do."""


def read(path: Path, make: Callable[[dict[str, Any]], T]) -> list[T]:
    """The rows of a file; none if there is no file.

    Args:
        path: the file.
        make: what a row is made of what JSON has of it; its ValueError, KeyError or TypeError says that it is no row.

    Raises:
        ResultsError: it is no file of such rows.
    """
    if not path.exists():
        return []
    try:
        return [make(row) for row in json.loads(path.read_text("utf-8"))["rows"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ResultsError(
            f"{path} holds no results ({type(error).__name__}: {error}); remove it, or name another --out"
        ) from error


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Keep rows, in the place of what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps({"rows": list(rows)}, indent=1) + "\n").encode())
