"""Objectives: what the loss of a row is. Cross-entropy, or one less a score, of which no gradient is needed.

Decides which of them a task asks for, and what goes through the model. How text is judged, `node.scores` decides; what
a model says after a prompt is `node.generation`'s business, how tokens and labels are predicted that of `node.losses`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from node.base import Base
from node.completions import Completions
from node.data import AnyBatch, Batch, Sequences
from node.generation import continuations
from node.losses import Objective, RowLosses, row_losses, row_misses
from node.records import DataError
from node.scores import Judge, Score, ScoreError, by_callable, by_words, exact_match, token_f1
from zo.manifest import GENERATED, Task


def objective(
    task: Task,
    base: Base,
    rows: Sequences,
    score: Score | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Objective:
    """What a task takes as the loss of a row.

    Args:
        task: of the run.
        base: whose tokenizer and limits apply.
        rows: what it will be asked of.
        score: the node's callable, if it has one.
        warn: called once if a score is not finite, with which.

    Raises:
        ScoreError: the task has a callable and the node has none, or the other way round.
        DataError: what the model may say after the longest prompt does not fit into its context.
    """
    if (task.objective == "callable") != (score is not None):
        raise ScoreError(
            f"this run's objective is a callable that every node has of its own, {task.score!r}: name yours with "
            "--score MODULE:FUNCTION"
            if score is None
            else f"this run's objective is {task.objective}; --score is for runs whose objective is a callable"
        )
    if task.objective not in GENERATED:
        return row_misses if task.objective == "accuracy" else row_losses
    assert isinstance(rows, Completions)  # the manifest says so
    limit, longest = base.max_sequence_length, int(rows.begins.max())
    if limit is not None and longest + task.max_new_tokens > limit:
        raise DataError(
            f"a prompt of {longest} tokens and {task.max_new_tokens} more do not fit into the {limit} of the base; the "
            "run needs fewer new tokens or a smaller sequence length, or this node shorter prompts"
        )
    if score is not None:
        judge = by_callable(score, warn)
    else:
        judge = by_words(token_f1 if task.objective == "token-f1" else exact_match)
    return Judged(base, task.max_new_tokens, judge)


class Judged:
    """The loss of prompts: one less the score of what the model says after each, the likeliest token each time."""

    def __init__(self, base: Base, max_new_tokens: int, judge: Judge) -> None:
        """Fix what is judged, and how.

        Args:
            base: whose tokenizer applies, and what ends a text.
            max_new_tokens: most tokens said after a prompt.
            judge: of what is said.
        """
        self._base = base
        self._max_new_tokens = max_new_tokens
        self._judge = judge

    def __call__(self, model: torch.nn.Module, batch: AnyBatch) -> RowLosses:
        """1 − score of every row; the batch is of prompts and completions."""
        assert isinstance(batch, Batch)
        assert batch.scored is not None
        begins = batch.scored.argmax(1)  # where the completion begins, the prompt ends
        prompts = [row[:begin].tolist() for row, begin in zip(batch.tokens, begins, strict=True)]
        made = continuations(model, self._base, prompts, self._max_new_tokens)
        said = self._base.tokenizer.batch_decode(made, skip_special_tokens=True)
        scores = np.array(self._judge(batch.pairs, said), np.float64)
        return RowLosses(1.0 - scores, np.ones(len(scores), np.int64))
