"""A node's private data: text files in, windows of tokens out. Nothing in here ever leaves the node.

Decides which rows are read, how they are packed and which windows make the batch of a sample. What is left
out is counted, never silent. Rows of prompt and completion are read in `node.completions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray


class DataError(ValueError):
    """The data cannot be used: the file, the line where there is one, and what would be right."""


class Row(msgspec.Struct, frozen=True):
    """One line of a .jsonl file; other fields are ignored."""

    text: str


TEXT_LIKE: Final = '{"text": "..."}'
COMPLETION_LIKE: Final = '{"prompt": "...", "completion": "..."}'
_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_Entry = TypeVar("_Entry", bound=np.generic)


class Batch(NamedTuple):
    """What one forward pass sees."""

    tokens: NDArray[np.int64]
    """(batch_size, length)."""
    scored: NDArray[np.bool_] | None = None
    """(batch_size, length): the tokens whose prediction is the loss; None: all but the first of each row."""


def stacked(batches: Sequence[Batch]) -> Batch:
    """Several batches as one, row after row; shorter rows are padded at their end, and nothing there is scored."""
    width = max(batch.tokens.shape[1] for batch in batches)

    def padded(rows: NDArray[_Entry]) -> NDArray[_Entry]:
        return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))

    tokens = np.concatenate([padded(batch.tokens) for batch in batches])
    scored = [padded(batch.scored) for batch in batches if batch.scored is not None]
    return Batch(tokens, np.concatenate(scored) if scored else None)


class Sequences(Protocol):
    """Data as a probe and an evaluation see it: rows of tokens, of which some are predicted."""

    @property
    def num_windows(self) -> int:
        """How many rows there are, at least one."""

    @property
    def num_scored(self) -> int:
        """Tokens in all rows whose prediction is the loss."""

    def take(self, rows: NDArray[np.int64]) -> Batch:
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


def read_windows(paths: Sequence[str | Path], tokenizer: Any, sequence_length: int) -> Windows:
    """The windows of some files, in the order given.

    A .txt file is one text; every line of a .jsonl file is an object whose field "text" is one text. Texts
    are tokenised without special tokens and joined, the tokenizer's end-of-text token between two of them.

    Args:
        paths: .txt and .jsonl files, UTF-8.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens in a window, at least 2.

    Raises:
        DataError: a file is missing, empty, not UTF-8 or of another kind; a row is malformed (with its line);
            or all the text together does not fill one window.
    """
    if not paths:
        raise DataError("no data file was named; name at least one .txt or .jsonl file")
    files = [Path(path).expanduser() for path in paths]
    texts = [text for file in files for text in _texts(file)]
    try:
        return pack(texts, tokenizer, sequence_length)
    except DataError as error:
        raise DataError(f"{', '.join(map(str, files))}: {error}") from None


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


def batch(windows: Sequences, batch_size: int, seed: int, sample: int) -> Batch:
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


def _texts(file: Path) -> Iterator[str]:
    kind = file.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise DataError(f"{file}: data files end in .txt or .jsonl")
    text = read_text(file)
    return iter([text]) if kind == ".txt" else _row_texts(text, file)


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


def _row_texts(text: str, file: Path) -> Iterator[str]:
    for line_number, row in json_rows(text, file, Row, TEXT_LIKE):
        if not row.text.strip():
            raise DataError(f"{file}, line {line_number}: the text is empty; remove the row")
        yield row.text


def json_rows(text: str, file: Path, kind: type[_Struct], like: str) -> Iterator[tuple[int, _Struct]]:
    """The rows of a .jsonl file with their line numbers, from 1; blank lines are passed over.

    Args:
        text: what the file holds.
        file: for messages.
        kind: what every line is.
        like: an example of such a line, for messages.

    Raises:
        DataError: a line is something else.
    """
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for the end of a line.
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=kind)
        except msgspec.DecodeError as error:
            raise DataError(
                f"{file}, line {line_number}: {error}; every line is an object like {like}"
            ) from None
        yield line_number, row


def _decode(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}, line {line_number}: byte 0x{content[error.start]:02x} at offset {error.start} is not "
            "UTF-8; convert the file to UTF-8"
        ) from None


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 row", "1,200 rows"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
