"""Private data of prompts and completions: rows of text in, rows of tokens out, the completion's are predicted.

Decides how a row becomes tokens and what happens to one that is longer than the context: the front of its prompt is
cut; if its completion alone is too long it is left out. Both are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node.data import Batch, Pair, count
from node.reading import read_records
from node.records import DataError


@dataclass(frozen=True, kw_only=True)
class Completions:
    """Rows of prompt, completion and padding."""

    tokens: NDArray[np.int32]
    """(num_windows, longest row)."""
    begins: NDArray[np.int64]
    """(num_windows,): where the completion begins, at least 1."""
    ends: NDArray[np.int64]
    """(num_windows,): where it ends, and padding begins."""
    pairs: tuple[Pair, ...]
    """(num_windows,): prompt and completion as they stand in the data."""
    sequence_length: int
    """Most tokens in a row."""
    num_cut: int
    """Rows whose prompts were cut."""
    num_tokens_cut: int
    """Tokens cut from them."""
    num_dropped: int
    """Rows left out, since their completions do not fit."""

    @property
    def num_windows(self) -> int:
        """How many rows there are, at least one."""
        return len(self.tokens)

    @property
    def num_scored(self) -> int:
        """Tokens of all completions."""
        return int((self.ends - self.begins).sum())

    def take(self, rows: NDArray[np.int64]) -> Batch:
        """The batch of the rows with these numbers, as wide as the longest of them."""
        width = int(self.ends[rows].max())
        positions = np.arange(width)
        scored = (positions >= self.begins[rows, None]) & (positions < self.ends[rows, None])
        return Batch(
            self.tokens[rows, :width].astype(np.int64), scored, tuple(self.pairs[row] for row in rows)
        )

    def __str__(self) -> str:
        """One line that says what was read and what was left out."""
        said = f"{count(self.num_windows, 'row')}, {count(self.num_scored, 'token')} in completions"
        if self.num_cut:
            said += (
                f"; {count(self.num_cut, 'prompt')} cut at the front by {count(self.num_tokens_cut, 'token')} "
                f"to fit {self.sequence_length}"
            )
        if self.num_dropped:
            said += f"; {count(self.num_dropped, 'row')} left out, too long a completion for {self.sequence_length}"
        return said


def read_completions(
    paths: Sequence[str | Path],
    tokenizer: Any,
    sequence_length: int,
    columns: Mapping[str, str] | None = None,
) -> Completions:
    """The rows of some files with prompts and completions, in the order given.

    Args:
        paths: files as `node.reading` reads them.
        tokenizer: a transformers tokenizer.
        sequence_length: most tokens in a row, at least 2.
        columns: what the fields "prompt" and "completion" are called in the files.

    Raises:
        DataError: a file or a row of it cannot be read; a completion is empty; or no completion fits.
    """
    pairs: list[Pair] = []
    rows: list[tuple[list[int], list[int]]] = []
    for place, values in read_records(paths, Pair._fields, columns):
        pair = Pair(*values)
        if not pair.completion.strip():
            raise DataError(f"{place}: the completion is empty; remove the row")
        prompt = prompt_ids(tokenizer, pair.prompt)
        if not prompt:
            raise DataError(
                f"{place}: the prompt is empty, and the tokenizer has no token to begin with; give the row a prompt"
            )
        pairs.append(pair)
        rows.append((prompt, completion_ids(tokenizer, pair)))
    try:
        return arrange(pairs, rows, sequence_length)
    except DataError as error:
        raise DataError(f"{', '.join(map(str, paths))}: {error}") from None


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt: by the tokenizer's chat template, as a user's turn, if it has one.

    Otherwise its token for the beginning of a text, if it has one, and the prompt.
    """
    if tokenizer.chat_template:
        return token_ids(tokenizer, _turns(tokenizer, prompt))
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return begin + token_ids(tokenizer, prompt)


def completion_ids(tokenizer: Any, pair: Pair) -> list[int]:
    """The tokens of a completion and its end, as they follow `prompt_ids`.

    Apart from the prompt, not joined to it first: that is what a model meets when it goes on from a prompt.
    """
    if tokenizer.chat_template:
        before, whole = _turns(tokenizer, pair.prompt), _turns(tokenizer, pair.prompt, pair.completion)
        if whole.startswith(before):
            return token_ids(tokenizer, whole[len(before) :])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return token_ids(tokenizer, pair.completion) + end


def arrange(
    pairs: Sequence[Pair], rows: Sequence[tuple[list[int], list[int]]], sequence_length: int
) -> Completions:
    """Rows of prompt and completion, cut to fit and padded to equal length.

    Args:
        pairs: as they stand in the data.
        rows: the same as tokens.
        sequence_length: most tokens in a row, at least 2.

    Raises:
        DataError: no completion fits beside one token of its prompt.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, got {sequence_length}")
    kept, kept_pairs, cuts = [], [], []
    for pair, (prompt, completion) in zip(pairs, rows, strict=True):
        room = sequence_length - len(completion)
        if room < 1:
            continue
        # The first token stays: models are trained with it at the beginning of every text.
        begin = prompt if len(prompt) <= room else [prompt[0], *prompt[len(prompt) - room + 1 :]]
        kept.append((begin, completion))
        kept_pairs.append(pair)
        cuts.append(len(prompt) - len(begin))
    if not kept:
        raise DataError(
            f"no completion of {count(len(rows), 'row')} fits into {sequence_length} tokens with a token of its "
            "prompt; the run needs longer sequences, or this node shorter completions"
        )
    begins = np.array([len(prompt) for prompt, _ in kept], np.int64)
    ends = np.array([len(prompt) + len(completion) for prompt, completion in kept], np.int64)
    tokens = np.zeros((len(kept), ends.max()), np.int32)  # what pads is never seen by what is scored
    for row, (prompt, completion) in zip(tokens, kept, strict=True):
        row[: len(prompt) + len(completion)] = prompt + completion
    return Completions(
        tokens=tokens,
        begins=begins,
        ends=ends,
        pairs=tuple(kept_pairs),
        sequence_length=sequence_length,
        num_cut=sum(cut > 0 for cut in cuts),
        num_tokens_cut=sum(cuts),
        num_dropped=len(rows) - len(kept),
    )


def _turns(tokenizer: Any, prompt: str, completion: str | None = None) -> str:
    """A chat of one or two turns, as text."""
    chat = [{"role": "user", "content": prompt}]
    if completion is not None:
        chat.append({"role": "assistant", "content": completion})
    from jinja2 import TemplateError  # as late as transformers does

    try:
        text: str = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=completion is None
        )
    except TemplateError as error:
        raise DataError(
            f"the tokenizer's chat template refuses a user's turn{' and its answer' if completion else ''}: {error}"
        ) from error
    return text


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without any mark around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
