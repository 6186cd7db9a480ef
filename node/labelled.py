"""Private data of texts and labels: rows of text in, rows of tokens out, of which the label is predicted by the head.

Decides how a text becomes tokens (as the tokenizer makes them, with its marks of beginning and end) and what happens to
one that is longer than the context: the tokenizer cuts it, and that is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node.data import LabelledBatch, count
from node.records import LABEL, DataError, read_records


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Rows of tokens and padding, each with its label."""

    tokens: NDArray[np.int32]
    """(num_windows, longest row)."""
    lengths: NDArray[np.int64]
    """(num_windows,): where each row ends, and padding begins."""
    labels: NDArray[np.int64]
    """(num_windows,): which of the names is right."""
    names: tuple[str, ...]
    """The labels as they stand in the data."""
    padding: int
    """The token that fills up rows."""
    sequence_length: int
    """Most tokens in a row."""
    num_cut: int
    """Rows that were cut."""
    num_tokens_cut: int
    """Tokens cut from them."""

    @property
    def num_windows(self) -> int:
        """How many rows there are, at least one."""
        return len(self.tokens)

    @property
    def num_scored(self) -> int:
        """Labels: one in each row."""
        return len(self.tokens)

    def take(self, rows: NDArray[np.int64]) -> LabelledBatch:
        """The batch of the rows with these numbers, as wide as the longest of them."""
        lengths = self.lengths[rows]
        tokens = self.tokens[rows, : int(lengths.max())].astype(np.int64)
        return LabelledBatch(tokens, lengths, self.labels[rows], self.padding)

    def __str__(self) -> str:
        """One line that says what was read and what was cut."""
        counts = np.bincount(self.labels, minlength=len(self.names))
        each = ", ".join(f"{number:,} {name}" for name, number in zip(self.names, counts, strict=True))
        said = f"{count(self.num_windows, 'row')} ({each}), {count(int(self.lengths.sum()), 'token')}"
        if self.num_cut:
            said += (
                f"; {count(self.num_cut, 'row')} cut by {count(self.num_tokens_cut, 'token')} to fit "
                f"{self.sequence_length}"
            )
        return said


def read_labelled(
    paths: Sequence[str | Path],
    tokenizer: Any,
    sequence_length: int,
    labels: Sequence[str],
    padding: int,
    columns: Mapping[str, str] | None = None,
) -> Labelled:
    """The rows of some files with texts and labels, in the order given.

    Args:
        paths: files as `node.records` reads them.
        tokenizer: a transformers tokenizer.
        sequence_length: most tokens in a row, at least 2.
        labels: as they stand in the data.
        padding: the token that fills up rows.
        columns: what the fields "text" and "label" are called in the files.

    Raises:
        DataError: a file or a row of it cannot be read, a text is empty, or a label is none of the run's.
    """
    number_by_label = {label: number for number, label in enumerate(labels)}
    texts, numbers = [], []
    for place, (text, label) in read_records(paths, ("text", LABEL), columns):
        if not text.strip():
            raise DataError(f"{place}: the text is empty; remove the row")
        if label not in number_by_label:
            known = ", ".join(map(repr, labels))
            raise DataError(f"{place}: the label {label!r} is none of this run's, which are {known}")
        texts.append(text)
        numbers.append(number_by_label[label])
    return arrange(texts, numbers, tokenizer, sequence_length, labels, padding)


def arrange(
    texts: Sequence[str],
    numbers: Sequence[int],
    tokenizer: Any,
    sequence_length: int,
    labels: Sequence[str],
    padding: int,
) -> Labelled:
    """Texts, each with the number of its label, as tokens, cut to fit and padded to equal length."""
    whole: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    kept: list[list[int]] = tokenizer(texts, truncation=True, max_length=sequence_length)["input_ids"]
    cuts = np.array([len(row) for row in whole]) - np.array([len(row) for row in kept])
    lengths = np.array([len(row) for row in kept], np.int64)
    tokens = np.full((len(kept), lengths.max()), padding, np.int32)
    for row, ids in zip(tokens, kept, strict=True):
        row[: len(ids)] = ids
    return Labelled(
        tokens=tokens,
        lengths=lengths,
        labels=np.array(numbers, np.int64),
        names=tuple(labels),
        padding=padding,
        sequence_length=sequence_length,
        num_cut=int(np.count_nonzero(cuts)),
        num_tokens_cut=int(cuts.sum()),
    )
