"""What all methods of a comparison share: a base, an adapter, data of several nodes, and what is held out."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from node import base as bases
from node.adapter import Adapter
from node.data import Sequences
from node.frozen import Answers, frozen_backbone, once_per_batch
from node.losses import Objective, measure, row_losses
from node.objectives import objective
from zo.directions import run_key
from zo.initial import initial_weights
from zo.manifest import Task
from zo.quantization import Kind
from zo.weights import to_float

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Form:
    """What is trained, and on how much data at a time."""

    quantize: Kind = "none"
    targets: tuple[str, ...] = PROJECTIONS
    rank: int = 4
    alpha: float = 8.0
    train: Literal["B", "AB"] = "AB"
    batch_size: int = 8
    sequence_length: int = 128


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A base, what is trained on it, and everybody's data."""

    model: str
    """Directory of the base."""
    form: Form
    task: Task
    private: Sequence[Sequences]
    """Of each node."""
    pooled: Sequences
    """All of it together, for methods with one worker."""
    held_out: Sequence[Sequences]
    """Parts that count alike: the metric is the mean of their means."""
    metric: Objective = row_losses
    """Taken on what is held out; the less the better. What is trained on, the task says."""
    device: str = "cpu"
    """Where the base computes, as `node.device` names it."""
    known: Answers = field(default_factory=deque, init=False, compare=False, repr=False)
    """What the base's frozen backbone, if it has one, answered to batches that every run meets again."""

    @property
    def digest(self) -> str:
        """Stands for the base and all data as tokens: hex, 32 characters."""
        state = hashlib.blake2b(bases.read_digest(self.model).encode(), digest_size=16)
        for rows in (*self.private, *self.held_out):
            for part in rows.take(np.arange(rows.num_windows)):
                if isinstance(part, np.ndarray):
                    state.update(np.ascontiguousarray(part).tobytes())
        return state.hexdigest()

    def judged_by(self, metric: Objective) -> Problem:
        """The same with another metric, and with the same answers known."""
        return self._but(metric=metric)

    def on(self, device: str) -> Problem:
        """The same elsewhere; a call of a benchmark has one device, so that answers known stay where they are."""
        return self._but(device=device)

    def _but(self, **changes: Any) -> Problem:
        other = replace(self, **changes)
        object.__setattr__(other, "known", self.known)
        return other

    def measure(self, model: torch.nn.Module) -> float:
        """The held-out metric of a model."""
        size = 4 * self.form.batch_size
        found = [measure(model, part, batch_size=size, objective=self.metric) for part in self.held_out]
        return float(np.mean([each.loss for each in found]))


class HeldOut:
    """Measures an adapter on what a problem holds out; what is frozen of the model is computed once."""

    def __init__(self, problem: Problem, adapter: Adapter) -> None:
        self._problem = problem
        self._model = adapter.model
        self._backbone = frozen_backbone(adapter)

    def __call__(self) -> float:
        """The metric at what the adapter holds."""
        with once_per_batch(self._backbone, self._problem.known):
            return self._problem.measure(self._model)


def load(problem: Problem) -> bases.Base:
    """The base of a problem, for one thread."""
    return bases.load_base(
        problem.model,
        threads=1,
        quantize=problem.form.quantize,
        device=problem.device,
        labels=problem.task.head_labels,
    )


def start(problem: Problem, seed: int) -> tuple[Adapter, NDArray[np.float32], Objective]:
    """What methods without a manifest begin with.

    Returns:
        The adapter in a freshly loaded base, the values it begins with, and the task's objective.
    """
    form, base = problem.form, load(problem)
    key = run_key(hashlib.blake2b(str(seed).encode(), digest_size=16).digest())
    adapter = Adapter(
        base,
        key=key,
        targets=form.targets,
        rank=form.rank,
        alpha=form.alpha,
        train=form.train,
    )
    weights = to_float(initial_weights(adapter.layout, key, form.train))
    return adapter, weights, objective(problem.task, base, problem.pooled)
