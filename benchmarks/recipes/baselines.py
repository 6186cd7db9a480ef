"""What the swarm is compared with: first-order training of the same adapter on pooled data, and MeZO as published."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import torch

from benchmarks.recipes.course import Course, Show
from benchmarks.recipes.problem import HeldOut, Problem, start
from node.adapter import Adapter
from node.data import AnyBatch, batch
from node.frozen import frozen_backbone, once_per_batch
from node.gradients import hold_as_floats
from node.losses import loss_with_graph

FLOAT_BYTES: Final = 4


@dataclass(frozen=True, kw_only=True)
class FirstOrder:
    """LoRA by backpropagation with Adam (Kingma and Ba 2014, arXiv 1412.6980), the rate falling linearly to 0."""

    steps: int
    rate: float
    on_all: bool = False
    """Every step on all rows of all nodes, a forward pass for each node, instead of a batch of the pooled data."""
    method: ClassVar[str] = "first order, Adam"


@dataclass(frozen=True, kw_only=True)
class Mezo:
    """MeZO (arXiv 2305.17333, algorithm 1): one worker, Gaussian z, float scalars, constant learning rate."""

    steps: int
    rate: float
    epsilon: float = 1e-3
    on_all: bool = False
    """Every step on all rows of all nodes, a forward pass for each node, instead of a batch of the pooled data."""
    method: ClassVar[str] = "MeZO"


def first_order(problem: Problem, settings: FirstOrder, seed: int, show: Show) -> Course:
    """Train once, measured on the way.

    A step counts as one forward pass, and as the bytes of one float32 gradient, which a worker elsewhere would send.
    """
    adapter, values, _ = start(problem, seed)
    adapter.load(values)
    parameters = trained_parameters(adapter)
    optimizer = torch.optim.Adam(parameters, settings.rate)
    num_bytes = FLOAT_BYTES * adapter.size
    passes = len(problem.private) if settings.on_all else 1
    course = Course(passes * settings.steps, HeldOut(problem, adapter), show)
    with _known(problem, adapter, settings.on_all):
        for step in range(settings.steps):
            optimizer.param_groups[0]["lr"] = settings.rate * (1 - step / settings.steps)
            optimizer.zero_grad()
            for drawn in _drawn(problem, settings.on_all, seed, step):
                torch.autograd.backward(loss_with_graph(adapter.model, drawn) / passes)
            optimizer.step()
            course.reached(passes * (step + 1), num_bytes * (step + 1))
    return course


def mezo(problem: Problem, settings: Mezo, seed: int, show: Show) -> Course:
    """Train once, measured on the way. Bytes are those of its scalars, had another worker to follow them."""
    adapter, weights, objective = start(problem, seed)
    generator = np.random.default_rng(seed)
    held_out = HeldOut(problem, adapter)
    passes = 2 * (len(problem.private) if settings.on_all else 1)

    def measure() -> float:
        adapter.load(weights)
        return held_out()

    course = Course(passes * settings.steps, measure, show)
    with _known(problem, adapter, settings.on_all):
        for step in range(settings.steps):
            z = generator.standard_normal(weights.size, np.float32)
            parts = _drawn(problem, settings.on_all, seed, step)
            losses = []
            for sign in (1, -1):
                adapter.load(weights + np.float32(sign * settings.epsilon) * z)
                losses.append(float(np.mean([objective(adapter.model, drawn).mean for drawn in parts])))
            slope = (losses[0] - losses[1]) / (2 * settings.epsilon)
            weights = weights - np.float32(settings.rate * slope) * z
            course.reached(passes * (step + 1), FLOAT_BYTES * (step + 1))
    return course


def _drawn(problem: Problem, on_all: bool, seed: int, step: int) -> list[AnyBatch]:
    """What a step is measured on, in as many forward passes; what counts is the mean over them."""
    if on_all:
        return [rows.take(np.arange(rows.num_windows)) for rows in problem.private]
    return [batch(problem.pooled, problem.form.batch_size, seed, step)]


def _known(problem: Problem, adapter: Adapter, on_all: bool) -> AbstractContextManager[None]:
    """Keeps what a frozen backbone answers: for good if the batches are always the same, else the last one."""
    return once_per_batch(frozen_backbone(adapter), problem.known if on_all else None)


def trained_parameters(adapter: Adapter) -> list[torch.nn.Parameter]:
    """The parameters of the model that the flat vector holds, wanting gradients."""
    hold_as_floats(adapter.model)
    parameters = [
        adapter.model.get_parameter(adapter.path_of(each.name)) for each in adapter.layout.parameters
    ]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters
