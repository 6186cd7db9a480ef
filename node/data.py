"""A node's private data: texts in, windows of tokens out. Nothing in here ever leaves the node.

Decides how texts are packed and which rows make the batch of a sample. What is left out is counted, never silent. Rows
of prompt and completion are arranged in `node.completions`, rows with labels in `node.labelled`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from node.reading import read_records
from node.records import DataError

_Entry = TypeVar("_Entry", bound=np.generic)


class Pair(NamedTuple):
    """A prompt and what follows it."""

    prompt: str
    completion: str


class Batch(NamedTuple):
    """What one forward pass sees of rows whose tokens are predicted."""

    tokens: NDArray[np.int64]
    """(batch_size, length)."""
    scored: NDArray[np.bool_] | None = None
    """(batch_size, length): the tokens whose prediction is the loss; None: all but the first of each row."""
    pairs: tuple[Pair, ...] = ()
    """Of each row, prompt and completion as they stand in the data; none for plain text."""


class LabelledBatch(NamedTuple):
    """What one forward pass sees of rows whose labels are predicted."""

    tokens: NDArray[np.int64]
    """(batch_size, length)."""
    lengths: NDArray[np.int64]
    """(batch_size,): where each row ends, and padding begins."""
    labels: NDArray[np.int64]
    """(batch_size,): which label is right."""
    padding: int
    """The token after the end of a row; some models find the end by it."""
    words: NDArray[np.int64] | None = None
    """(num_labels,): the token by which the model says each label after the row; None if its head says it."""


AnyBatch = Batch | LabelledBatch


def stacked(batches: Sequence[AnyBatch]) -> AnyBatch:
    """Several batches of one kind as one, row after row; rows are padded at their ends, and nothing there counts."""
    width = max(batch.tokens.shape[1] for batch in batches)

    def padded(rows: NDArray[_Entry], value: int = 0) -> NDArray[_Entry]:
        return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=value)

    labelled = [batch for batch in batches if isinstance(batch, LabelledBatch)]
    if labelled:
        return LabelledBatch(
            np.concatenate([padded(batch.tokens, batch.padding) for batch in labelled]),
            np.concatenate([batch.lengths for batch in labelled]),
            np.concatenate([batch.labels for batch in labelled]),
            labelled[0].padding,
            labelled[0].words,
        )
    plain = [batch for batch in batches if isinstance(batch, Batch)]
    scored = [padded(batch.scored) for batch in plain if batch.scored is not None]
    return Batch(
        np.concatenate([padded(batch.tokens) for batch in plain]),
        np.concatenate(scored) if scored else None,
        tuple(pair for batch in plain for pair in batch.pairs),
    )


class Sequences(Protocol):
    """Data as a probe and an evaluation see it: rows of tokens, and what of them is predicted."""

    @property
    def num_windows(self) -> int:
        """How many rows there are, at least one."""

    @property
    def num_scored(self) -> int:
        """Tokens, or labels, in all rows whose prediction is the loss."""

    def take(self, rows: NDArray[np.int64]) -> AnyBatch:
        """The batch of the rows with these numbers."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Tokenised text, packed without gaps into windows of one length."""

    tokens: NDArray[np.int32]
    """(num_windows, sequence_length)."""
    num_texts: int
    """Rows of .jsonl files and whole .txt files."""
    num_tokens: int
    """Everything that was read, separators included."""
    num_dropped: int
    """Tokens at the end that did not fill a window."""

    @property
    def num_windows(self) -> int:
        """How many windows there are, at least one."""
        return len(self.tokens)

    @property
    def sequence_length(self) -> int:
        """Tokens in a window."""
        return int(self.tokens.shape[1])

    @property
    def num_scored(self) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return self.tokens.size - self.num_windows

    def take(self, rows: NDArray[np.int64]) -> Batch:
        """The batch of the windows with these numbers."""
        return Batch(self.tokens[rows].astype(np.int64))

    def __str__(self) -> str:
        """One line that says what was read and what was left out."""
        return (
            f"{count(self.num_texts, 'text')}, "
            f"{count(self.num_tokens, 'token')}: {count(self.num_windows, 'window')} "
            f"of {self.sequence_length}, {count(self.num_dropped, 'token')} at the end left out"
        )


def read_windows(
    paths: Sequence[str | Path],
    tokenizer: Any,
    sequence_length: int,
    columns: Mapping[str, str] | None = None,
) -> Windows:
    """The windows of some files with texts, in the order given.

    Texts are tokenised without special tokens and joined, the tokenizer's end-of-text token between two of them.

    Args:
        paths: files as `node.reading` reads them; a .txt file is one text.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens in a window, at least 2.
        columns: what the field "text" is called in the files.

    Raises:
        DataError: a file or a row of it cannot be read, or is empty; or all the text together does not fill one window.
    """
    texts = []
    for place, (text,) in read_records(paths, ("text",), columns):
        if not text.strip():
            raise DataError(f"{place}: the text is empty; remove the row")
        texts.append(text)
    try:
        return pack(texts, tokenizer, sequence_length)
    except DataError as error:
        raise DataError(f"{', '.join(map(str, paths))}: {error}") from None


def pack(texts: Sequence[str], tokenizer: Any, sequence_length: int) -> Windows:
    """The windows of some texts, in the order given, as `read_windows` makes them.

    Raises:
        DataError: all the text together does not fill one window, or there are several texts and the
            tokenizer has no end-of-text token to tell them apart.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, got {sequence_length}")
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    separator: list[int] = []
    if len(rows) > 1:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{len(rows)} texts need an end-of-text token between them, which the tokenizer lacks; "
                "give one .txt file"
            )
        separator = [tokenizer.eos_token_id]
    joined = chain.from_iterable(chain(row, separator) for row in rows)
    stream = np.fromiter(joined, np.int32)[: -1 if separator else None]  # not after the last text

    num_windows, num_dropped = divmod(stream.size, sequence_length)
    if num_windows == 0:
        raise DataError(
            f"{count(stream.size, 'token')} do not fill one window of {sequence_length}; "
            "give this node more text"
        )
    return Windows(
        tokens=stream[: num_windows * sequence_length].reshape(num_windows, sequence_length),
        num_texts=len(texts),
        num_tokens=stream.size,
        num_dropped=num_dropped,
    )


def batch(windows: Sequences, batch_size: int, seed: int, sample: int) -> AnyBatch:
    """The batch of a sample, always the same for the same arguments.

    Different windows, unless there are fewer than `batch_size`: then all of them, as often as it takes.

    Args:
        windows: the node's own.
        batch_size: at least 1.
        seed: the node's own secret, not negative. Which rows met which direction is nobody else's business.
        sample: the index of the sample, not negative.
    """
    rng = np.random.default_rng([seed, sample])
    repeats, rest = divmod(batch_size, windows.num_windows)
    whole = np.tile(np.arange(windows.num_windows), repeats)
    chosen = np.concatenate([whole, rng.choice(windows.num_windows, size=rest, replace=False)])
    return windows.take(chosen)


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 row", "1,200 rows"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
