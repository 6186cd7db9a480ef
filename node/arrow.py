"""Rows of a dataset that Hugging Face `datasets` saved on disk, read with pyarrow alone.

`Dataset.save_to_disk` writes a directory: state.json names the files of the rows, streams of Arrow record batches, and
dataset_info.json says which columns hold numbers that stand for the names of classes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from node.records import LABEL, DataError, Record

_STATE: Final = "state.json"
_INFO: Final = "dataset_info.json"
_SPLITS: Final = "dataset_dict.json"


def dataset_records(
    folder: Path, named: Mapping[str, str], labels: Collection[str] | None = None
) -> Iterator[Record]:
    """The rows of a saved dataset; the place of a row is its index, as in `dataset[3]`.

    Args:
        folder: what `save_to_disk` wrote.
        named: the column of each field.
        labels: those of the task, which say whether classes go by their names or by their numbers, all of them alike.
            None: by their names.

    Raises:
        DataError: it is no such directory, or holds several splits; a column is missing; a value is no text.
    """
    state = _json(folder, _STATE)
    if state is None:
        splits = (_json(folder, _SPLITS) or {}).get("splits")
        if splits:
            raise DataError(
                f"{folder}: holds the splits {', '.join(map(str, splits))}; name one, as {folder / str(splits[0])}"
            )
        raise DataError(
            f"{folder}: is a directory, but no dataset as `save_to_disk` of Hugging Face datasets writes it"
        )
    if state.get("_indices_files"):
        raise DataError(
            f"{folder}: its rows are chosen by a table of indices; save it again with a newer version of datasets"
        )
    features = (_json(folder, _INFO) or {}).get("features") or {}
    feature = features.get(named.get(LABEL, ""), {})
    classes = (feature.get("names") or []) if feature.get("_type") == "ClassLabel" else []
    if _go_by_number(classes, labels):
        classes = []
    index = 0
    for entry in state.get("_data_files") or []:
        for batch in _batches(folder / str(entry["filename"])):
            for row in zip(
                *(_column(folder, batch, field, name) for field, name in named.items()), strict=True
            ):
                place = f"{folder}[{index}]"
                yield Record(
                    place,
                    tuple(
                        _text(value, field, name, place, classes)
                        for value, (field, name) in zip(row, named.items(), strict=True)
                    ),
                )
                index += 1
    if not index:
        raise DataError(f"{folder}: the dataset is empty")


def _go_by_number(classes: Sequence[str], labels: Collection[str] | None) -> bool:
    """Whether a task means the numbers of classes: its labels are numbers, and not all of them are names of classes.

    It is never decided value by value: of classes named "1" and "2", the task's "1" would be the first by its name, and
    the second by its number.
    """
    return labels is not None and not set(labels) <= set(classes) and all(map(str.isdecimal, labels))


def _text(value: Any, field: str, name: str, place: str, classes: Sequence[str]) -> str:
    if isinstance(value, str):
        return value
    if field == LABEL and type(value) is int:
        return classes[value] if 0 <= value < len(classes) else str(value)
    raise DataError(f"{place}: {name!r} is {value!r}, not text")


def _batches(file: Path) -> Iterator[Any]:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{file.parent}: datasets on disk are read with pyarrow; install it: pip install 'zo-swarm[datasets]'"
        ) from None
    try:
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
            yield from reader
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _column(folder: Path, batch: Any, field: str, name: str) -> list[Any]:
    names = batch.schema.names
    if name not in names:
        raise DataError(
            f"{folder}: no column {name!r}; the columns there are {', '.join(map(repr, names))}. Name the right one "
            f"with --column {field}=NAME"
        )
    values: list[Any] = batch.column(name).to_pylist()
    return values


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    """What a small file of the directory holds; None if there is none."""
    try:
        read = json.loads((folder / name).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder / name}: cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise DataError(f"{folder / name}: is no JSON object")
    return read
