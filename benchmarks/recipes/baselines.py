"""What the swarm is compared with: first-order training of the same adapter on pooled data, and MeZO as published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import torch

from benchmarks.recipes.course import Course, Show
from benchmarks.recipes.problem import HeldOut, Problem, start
from node.adapter import Adapter
from node.data import batch
from node.frozen import frozen_backbone, once_per_batch
from node.gradients import hold_as_floats
from node.losses import loss_with_graph

FLOAT_BYTES: Final = 4


@dataclass(frozen=True, kw_only=True)
class FirstOrder:
    """LoRA by backpropagation with Adam (Kingma and Ba 2014, arXiv 1412.6980), the rate falling linearly to 0."""

    steps: int
    rate: float
    batch_size: int | None = None
    """Another than the form's."""
    method: ClassVar[str] = "first order, Adam"


@dataclass(frozen=True, kw_only=True)
class Mezo:
    """MeZO (arXiv 2305.17333, algorithm 1): one worker, Gaussian z, float scalars, constant learning rate."""

    steps: int
    rate: float
    epsilon: float = 1e-3
    batch_size: int | None = None
    """Another than the form's."""
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
    size = settings.batch_size or problem.form.batch_size
    course = Course(settings.steps, HeldOut(problem, adapter), show)
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.rate * (1 - step / settings.steps)
        optimizer.zero_grad()
        loss = loss_with_graph(adapter.model, batch(problem.pooled, size, seed, step))
        torch.autograd.backward(loss)
        optimizer.step()
        course.reached(step + 1, num_bytes * (step + 1))
    return course


def mezo(problem: Problem, settings: Mezo, seed: int, show: Show) -> Course:
    """Train once, measured on the way. Bytes are those of its scalars, had another worker to follow them."""
    adapter, weights, objective = start(problem, seed)
    generator = np.random.default_rng(seed)
    size = settings.batch_size or problem.form.batch_size

    held_out, backbone = HeldOut(problem, adapter), frozen_backbone(adapter)

    def measure() -> float:
        adapter.load(weights)
        return held_out()

    course = Course(2 * settings.steps, measure, show)
    for step in range(settings.steps):
        z = generator.standard_normal(weights.size, np.float32)
        drawn = batch(problem.pooled, size, seed, step)
        losses = []
        with once_per_batch(backbone):
            for sign in (1, -1):
                adapter.load(weights + np.float32(sign * settings.epsilon) * z)
                losses.append(objective(adapter.model, drawn).mean)
        slope = (losses[0] - losses[1]) / (2 * settings.epsilon)
        weights = weights - np.float32(settings.rate * slope) * z
        course.reached(2 * (step + 1), FLOAT_BYTES * (step + 1))
    return course


def trained_parameters(adapter: Adapter) -> list[torch.nn.Parameter]:
    """The parameters of the model that the flat vector holds, wanting gradients."""
    hold_as_floats(adapter.model)
    parameters = [
        adapter.model.get_parameter(adapter.path_of(each.name)) for each in adapter.layout.parameters
    ]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters
