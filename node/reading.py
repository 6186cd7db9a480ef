"""A node's data files as rows: which kinds of files there are, and which of them hold what a task asks for.

What becomes of the rows is the task's business (`node.data`, `node.completions`, `node.labelled`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from node.arrow import dataset_records
from node.records import DataError, Record, json_records, read_text, table_records


def read_records(
    paths: Sequence[str | Path],
    fields: Sequence[str],
    columns: Mapping[str, str] | None = None,
    labels: Collection[str] | None = None,
) -> Iterator[Record]:
    """The rows of some files, in the order given; blank lines are passed over.

    A .jsonl file has an object with the fields in every line. A .tsv file has cells parted by tabs, and the names of
    its columns in the first line; if `columns` gives numbers, there is no such line. A directory is a dataset that
    Hugging Face `datasets` saved. A .txt file is one text, where that is all that is asked for.

    Args:
        paths: the files, UTF-8.
        fields: names of the values of a row.
        columns: what a field is called in the files, or the number of its column from 1; a field's own name if it is
            not in here.
        labels: those of the task; a dataset has both names and numbers for its classes, and these tell which are meant.

    Raises:
        DataError: a file is missing, empty, not UTF-8 or of another kind; a column is missing; a row is malformed.
    """
    if not paths:
        raise DataError("no data file was named")
    named = {field: (columns or {}).get(field, field) for field in fields}
    only_text = tuple(fields) == ("text",)
    for path in paths:
        file = Path(path).expanduser()
        kind = file.suffix.lower()
        if file.is_dir():
            yield from dataset_records(file, named, labels)
        elif kind == ".txt" and only_text:
            yield Record(str(file), (read_text(file),))
        elif kind == ".jsonl":
            yield from json_records(file, named)
        elif kind == ".tsv":
            yield from table_records(file, named)
        else:
            texts = ", .txt" if only_text else ""
            raise DataError(
                f"{file}: rows of {' and '.join(fields)} are expected, as .jsonl, .tsv{texts} or a saved dataset"
            )
