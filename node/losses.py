"""The loss of a batch: what a forward pass of the model says about rows of private data.

Decides what is measured on each kind of batch, one row at a time, so that several copies of a batch under several
adapters can go through one forward pass. When it is measured, and at which weights, is the caller's business.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from node.adapter import Adapter
from node.data import AnyBatch, Batch, LabelledBatch, Sequences
from node.mixture import asked_together


class RowLosses(NamedTuple):
    """The loss of each row of a batch, as a sum over what is predicted in it and how much that is.

    The mean over any choice of rows is the sum of their sums over the sum of their counts.
    """

    sums: NDArray[np.float64]
    """(num_rows,) nats, or other units of a loss."""
    counts: NDArray[np.int64]
    """(num_rows,) tokens, labels, or texts that are judged."""
    hits: NDArray[np.bool_] | None = None
    """(num_rows,): whether the label was the likeliest; None if rows have none."""

    @property
    def mean(self) -> float:
        """Nats per token or label, over all rows."""
        return float(self.means(1)[0])

    def means(self, num_parts: int) -> NDArray[np.float64]:
        """The mean of each of so many equal parts of the batch, which follow each other: (num_parts,)."""
        sums: NDArray[np.float64] = self.sums.reshape(num_parts, -1).sum(1)
        counts: NDArray[np.int64] = self.counts.reshape(num_parts, -1).sum(1)
        return sums / counts


class Measured(NamedTuple):
    """What was measured on all rows."""

    loss: float
    """Mean over everything that is judged: nats per token or label, for cross-entropy."""
    accuracy: float | None
    """Share of the rows whose label was the likeliest; None if rows have none."""


Objective = Callable[[torch.nn.Module, AnyBatch], RowLosses]
"""What says the loss of every row of a batch under the model as it is."""


def row_losses(model: torch.nn.Module, batch: AnyBatch) -> RowLosses:
    """Cross-entropy of every row, of its tokens or of its label."""
    if isinstance(batch, LabelledBatch):
        logits = label_logits(model, batch)
        labels = torch.from_numpy(batch.labels).to(logits.device)
        each = cross_entropy(logits, labels, reduction="none").double().cpu().numpy()
        hits = (logits.argmax(1) == labels).cpu().numpy()
        return RowLosses(each, np.ones(len(each), np.int64), hits)
    logits, targets, counts = _token_logits(model, batch)
    return _by_row(cross_entropy(logits, targets, reduction="none"), counts)


def row_misses(model: torch.nn.Module, batch: AnyBatch) -> RowLosses:
    """One less the accuracy of every row: what is not the likeliest, of its tokens or its label."""
    if isinstance(batch, LabelledBatch):
        hits = row_losses(model, batch).hits
        assert hits is not None
        return RowLosses((~hits).astype(np.float64), np.ones(len(hits), np.int64), hits)
    logits, targets, counts = _token_logits(model, batch)
    return _by_row((logits.argmax(1) != targets).float(), counts)


def loss_with_graph(model: torch.nn.Module, batch: AnyBatch) -> torch.Tensor:
    """Mean cross-entropy of a batch, of its tokens or labels, as a tensor that can be differentiated: ()."""
    if isinstance(batch, LabelledBatch):
        device = next(model.parameters()).device
        ids, labels = (torch.from_numpy(each).to(device) for each in (batch.tokens, batch.labels))
        return cross_entropy(_label_logits(model, batch, ids).float(), labels)
    logits, targets, _ = _predicted(model, batch)
    return cross_entropy(logits, targets)


def label_logits(model: torch.nn.Module, batch: LabelledBatch) -> torch.Tensor:
    """(num_rows, num_labels) float32: what the head says of each row, or how likely each word is after it.

    Padding has no influence.
    """
    device = next(model.parameters()).device
    ids = torch.from_numpy(batch.tokens).to(device)
    with torch.inference_mode():
        return asked_together(model, lambda each, _: _label_logits(each, batch, ids)).float()


def _label_logits(model: torch.nn.Module, batch: LabelledBatch, ids: torch.Tensor) -> torch.Tensor:
    """As `label_logits`, of one agent."""
    if batch.words is not None:
        ends, position = np.unique(batch.lengths - 1, return_inverse=True)
        return _logits_at(model, ids, ends)[np.arange(len(ids)), position][:, batch.words]
    mask = (np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]).astype(np.int64)
    found: torch.Tensor = model(input_ids=ids, attention_mask=torch.from_numpy(mask).to(ids.device)).logits
    return found


def _logits_at(model: torch.nn.Module, ids: torch.Tensor, positions: NDArray[np.int64]) -> torch.Tensor:
    """(num_rows, num_positions, vocabulary): of a causal model after each of these positions.

    Vocabularies are large: the logits of all positions may take more memory than the base, so that a model which can
    leave some out is asked to.
    """
    if len(positions) == ids.shape[1]:
        every: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return every
    chosen = torch.from_numpy(positions).to(ids.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        found: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=chosen).logits
        return found
    found = model(input_ids=ids, use_cache=False).logits
    return found[:, chosen]


def _token_logits(
    model: torch.nn.Module, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """As `_predicted`, without a graph."""
    with torch.inference_mode():
        return _predicted(model, batch)


def _predicted(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """What the model says of the predicted tokens of all rows, one after the other.

    Every token is predicted from those before it in its row. What is predicted are the tokens marked in `batch.scored`,
    never the first of a row; all but the first if it is None. What follows the last one marked (padding) has no
    influence: a causal model does not see the future.

    Returns:
        logits (n, vocabulary) float32, the right tokens (n,), and how many of them each row has (num_rows,).
    """
    device = next(model.parameters()).device
    ids = torch.from_numpy(batch.tokens).to(device)
    read, predicted = (
        ids[:, :-1],
        ids[:, 1:],
    )  # the last token predicts nothing: its logits would be for nothing
    if batch.scored is None:  # no choice, and so no copy of what may be the largest of all activations
        every = np.arange(read.shape[1])
        logits = asked_together(model, lambda each, _: _logits_at(each, read, every).flatten(0, 1))
        return logits.float(), predicted.flatten(), np.full(len(read), len(every))
    scored = batch.scored[:, 1:]
    columns = np.flatnonzero(scored.any(0))
    chosen = torch.from_numpy(scored[:, columns]).to(device)
    logits = asked_together(model, lambda each, _: _logits_at(each, read, columns)[chosen])
    return logits.float(), predicted[:, torch.from_numpy(columns).to(device)][chosen], scored.sum(1)


def _by_row(each: torch.Tensor, counts: NDArray[np.int64]) -> RowLosses:
    """Losses of tokens, (n,), added up for each row: `counts` says how many of them follow each other in one."""
    # In float64: two losses whose difference is the slope shall not differ by how they were summed.
    sums = np.zeros(len(counts), np.float64)
    np.add.at(sums, np.repeat(np.arange(len(counts)), counts), each.cpu().numpy())
    return RowLosses(sums, counts)


def mean_loss(model: torch.nn.Module, batch: AnyBatch) -> float:
    """Mean loss of a batch, nats per token or label."""
    return row_losses(model, batch).mean


def measure(
    model: torch.nn.Module,
    rows: Sequences,
    *,
    batch_size: int,
    objective: Objective = row_losses,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Loss, and accuracy where there are labels, over all rows, of the model as it is.

    Args:
        model: base, with or without an adapter.
        rows: held-out data.
        batch_size: rows in one forward pass.
        objective: what the loss is.
        progress: called with (rows done, rows in all) after every forward pass.
    """
    total, count, hits = 0.0, 0, []
    for start in range(0, rows.num_windows, batch_size):
        numbers = np.arange(start, min(start + batch_size, rows.num_windows))
        losses = objective(model, rows.take(numbers))
        total += float(losses.sums.sum())
        count += int(losses.counts.sum())
        if losses.hits is not None:
            hits.append(losses.hits)
        if progress is not None:
            progress(start + len(numbers), rows.num_windows)
    return Measured(total / count, float(np.concatenate(hits).mean()) if hits else None)


def mean_loss_over(
    model: torch.nn.Module,
    rows: Sequences,
    *,
    batch_size: int,
    objective: Objective = row_losses,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Mean loss over all rows, of the model as it is. Arguments as `measure`."""
    return measure(model, rows, batch_size=batch_size, objective=objective, progress=progress).loss


def evaluate(
    adapter: Adapter,
    weights: NDArray[np.int32],
    rows: Sequences,
    *,
    batch_size: int,
    objective: Objective = row_losses,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Mean loss over all rows at the given weights, int32 (adapter.size,), which the adapter holds afterwards.

    The other arguments are those of `measure`.
    """
    adapter.load_weights(weights)
    return mean_loss_over(adapter.model, rows, batch_size=batch_size, objective=objective, progress=progress)
