"""Private data of texts and labels: rows of text in, rows of tokens out, of which the label is predicted.

Decides how a text becomes tokens (before a head as the tokenizer makes them, with its marks; before a verbalizer's word
in the template) and what happens to one that is longer than the context: its end is cut, and that is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node.data import LabelledBatch, count
from node.reading import read_records
from node.records import LABEL, DataError
from node.verbalizer import fitting, verbalizer
from zo.manifest import Task


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Rows of tokens and padding, each with its label."""

    tokens: NDArray[np.int32]
    """(num_windows, longest row)."""
    lengths: NDArray[np.int64]
    """(num_windows,): where each row ends, and padding begins."""
    labels: NDArray[np.int64]
    """(num_windows,): which of the names is right."""
    words: NDArray[np.int64] | None
    """(num_labels,): the token that stands for each label; None if a head predicts them."""
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
        return LabelledBatch(tokens, lengths, self.labels[rows], self.padding, self.words)

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
    task: Task,
    padding: int | None,
    columns: Mapping[str, str] | None = None,
) -> Labelled:
    """The rows of some files with texts and labels, in the order given.

    Args:
        paths: files as `node.reading` reads them.
        tokenizer: a transformers tokenizer.
        sequence_length: most tokens in a row, at least 2.
        task: with the labels as they stand in the data.
        padding: the token that fills up rows before a head; None for a verbalizer.
        columns: what the fields "text" and "label" are called in the files.

    Raises:
        DataError: a file or a row of it cannot be read, a text is empty or has no place beside the template, or a label
            is none of the task's; or its words are none that the tokenizer tells apart.
    """
    number_by_label = {label: number for number, label in enumerate(task.labels)}
    places, texts, numbers = [], [], []
    for place, (text, label) in read_records(paths, ("text", LABEL), columns, number_by_label):
        if not text.strip():
            raise DataError(f"{place}: the text is empty; remove the row")
        if label not in number_by_label:
            known = ", ".join(map(repr, task.labels))
            raise DataError(f"{place}: the label {label!r} is none of this run's, which are {known}")
        places.append(place)
        texts.append(text)
        numbers.append(number_by_label[label])
    return arrange(texts, numbers, tokenizer, sequence_length, task, padding, places)


def arrange(
    texts: Sequence[str],
    numbers: Sequence[int],
    tokenizer: Any,
    sequence_length: int,
    task: Task,
    padding: int | None,
    places: Sequence[str] = (),
) -> Labelled:
    """Texts, each with the number of its label, as tokens, cut to fit and padded to equal length.

    Args are those of `read_labelled`, and:
        texts: none of them empty.
        numbers: of their labels.
        places: where each is from, for messages.

    Raises:
        DataError: see there.
    """
    words = None
    if task.kind == "head":
        whole: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
        kept: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=sequence_length)[
            "input_ids"
        ]
        cuts = [len(all_of_it) - len(part) for all_of_it, part in zip(whole, kept, strict=True)]
    else:
        said = verbalizer(tokenizer, task)
        words = np.array(said.words, np.int64)
        kept, cuts = [], []
        for i, text in enumerate(texts):
            found = fitting(said.encode, text, sequence_length)
            if found is None:
                where = f"{places[i]}: " if places else ""
                raise DataError(
                    f"{where}no part of the text fits into {sequence_length} tokens beside the template, which takes "
                    f"{len(said.encode(''))}; the run needs longer sequences or a shorter template"
                )
            kept.append(found[0])
            cuts.append(found[1])
    lengths = np.array([len(row) for row in kept], np.int64)
    tokens = np.full((len(kept), lengths.max()), padding or 0, np.int32)
    for row, ids in zip(tokens, kept, strict=True):
        row[: len(ids)] = ids
    return Labelled(
        tokens=tokens,
        lengths=lengths,
        labels=np.array(numbers, np.int64),
        words=words,
        names=task.labels,
        padding=padding or 0,
        sequence_length=sequence_length,
        num_cut=sum(cut > 0 for cut in cuts),
        num_tokens_cut=sum(cuts),
    )
