"""Rows of text files: named fields out of .jsonl and .tsv files, and whole texts.

Decides where the fields of a row are, and in which words a bad row is refused. Which files hold which rows is decided
in `node.reading`. Nothing in here leaves the node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

LABEL: Final = "label"
"""The one field that may be a number."""
EXAMPLES: Final = {"text": '"..."', "prompt": '"..."', "completion": '"..."', LABEL: '"..."'}
"""The fields that tasks ask for, with what they hold."""


class DataError(ValueError):
    """The data cannot be used: the file, the line where there is one, and what would be right."""


class Record(NamedTuple):
    """One row."""

    place: str
    """The file and the line, for messages."""
    values: tuple[str, ...]
    """What was asked for, in that order."""


def read_text(file: Path) -> str:
    """What a file holds, without a byte order mark.

    Raises:
        DataError: it is missing, empty, unreadable or not UTF-8; the message names it.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    text = _decode(content, file)
    if not text.strip():
        raise DataError(f"{file}: the file is empty")
    return text


def json_records(file: Path, named: Mapping[str, str]) -> Iterator[Record]:
    """The rows of a .jsonl file: an object in every line.

    Args:
        file: UTF-8.
        named: what each field is called in the objects.

    Raises:
        DataError: the file cannot be read, a line is something else, or it lacks a field.
    """
    like = ", ".join(f'"{name}": {EXAMPLES.get(field, "...")}' for field, name in named.items())
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for the end of a line.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = msgspec.json.decode(line, type=dict[str, object])
        except msgspec.DecodeError as error:
            raise DataError(f"{place}: {error}; every line is an object like {{{like}}}") from None
        yield Record(place, tuple(_value(row, field, name, place) for field, name in named.items()))


def _value(row: Mapping[str, object], field: str, name: str, place: str) -> str:
    if name not in row:
        raise DataError(
            f"{place}: no field {name!r}; the fields there are {', '.join(map(repr, row)) or 'none'}. Name the right "
            f"one with --column {field}=NAME"
        )
    value = row[name]
    if field == LABEL and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{place}: {name!r} is {msgspec.json.encode(value).decode()}, not text")
    return value


def table_records(file: Path, named: Mapping[str, str]) -> Iterator[Record]:
    """The rows of a .tsv file: cells parted by tabs, nothing quoted.

    Args:
        file: UTF-8; its first line names the columns, unless all of them are given by number.
        named: what the column of each field is called, or its number from 1.

    Raises:
        DataError: the file cannot be read, has no such column, or a row has fewer or more cells than the first line:
            of a text that holds a tab, what follows would be lost.
    """
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(read_text(file).split("\n"), start=1)]
    rows = [(number, line.split("\t")) for number, line in lines if line.strip()]
    numbered = [name.isdecimal() for name in named.values()]
    width = len(rows[0][1]) if rows else 0
    if all(numbered):
        places = [int(name) - 1 for name in named.values()]
    else:
        header = rows.pop(0)[1]
        places = [_column(file, header, field, name) for field, name in named.items()]
    if not rows:
        raise DataError(f"{file}: no row follows the names of the columns")
    for number, cells in rows:
        place = f"{file}, line {number}"
        if len(cells) != width:
            raise DataError(f"{place}: {len(cells)} cells, the first line has {width}")
        if missing := [i + 1 for i in places if not 0 <= i < len(cells)]:
            raise DataError(f"{place}: no column {missing[0]}; there are {len(cells)}, counted from 1")
        yield Record(place, tuple(cells[i] for i in places))


def _column(file: Path, header: Sequence[str], field: str, name: str) -> int:
    if name not in header:
        shown = ", ".join(repr(each if len(each) <= 40 else each[:39] + "…") for each in header)
        raise DataError(
            f"{file}: no column {name!r}; the first line names {shown}. Name the right one with --column "
            f"{field}=NAME, or give all columns by number (--column {field}=1 …) if that line is data already"
        )
    return header.index(name)


def _decode(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}, line {line_number}: byte 0x{content[error.start]:02x} at offset {error.start} is not "
            "UTF-8; convert the file to UTF-8"
        ) from None
