"""Probing: what a node's own batch says about the round's directions, as one byte each.

Decides at which views and on which batch losses are taken, and what leaves the node; what a loss is, `node.losses`
decides. Which directions, epsilon and exponent are the run's; the batch and the generator that rounds are the node's
own.
"""

from __future__ import annotations

import math
from functools import partial
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from node.adapter import Adapter
from node.data import Batch, Sequences, batch
from node.losses import mean_loss
from zo.codes import NO_VOTE, encode
from zo.directions import Direction, RunKey
from zo.replica import samples
from zo.spsa import centred_gradients, projected_gradient

ROUNDING_STREAM = 1  # keeps the generator that rounds codes apart from the one that draws batches


class Probed(NamedTuple):
    """What a node found in one round."""

    codes: NDArray[np.int8]
    """(directions,) projected gradients in units of 2^exponent; NO_VOTE where a loss was not finite."""
    loss: float
    """Mean cross-entropy of the finite pairs, nats per token; NaN if there is none."""
    seconds: float
    """Wall time of the whole probe."""
    forward_seconds: float
    """The part of it spent in forward passes and losses."""

    @property
    def num_no_votes(self) -> int:
        """Directions whose loss was not finite."""
        return int(np.count_nonzero(self.codes == NO_VOTE))


class Probe:
    """A node's probe: its adapter, its windows, and what the run says about measuring."""

    def __init__(
        self,
        adapter: Adapter,
        windows: Sequences,
        *,
        key: RunKey,
        epsilon: float,
        directions: int,
        batch_size: int,
        seed: int,
        sides: int = 2,
    ) -> None:
        """Fix what stays the same from round to round.

        Args:
            adapter: base and adapter; its tensors are overwritten by every probe.
            windows: the node's private data.
            key: the run's.
            epsilon: half the distance between the two views, in weight units.
            directions: how many the node probes in a round.
            batch_size: windows in a batch.
            seed: the node's own secret: decides batches and rounding, so that a round probed again after a
                restart gives the same codes.
            sides: 2: two losses and a batch for each direction; 1: one loss for each, all on one batch.
        """
        self.adapter = adapter
        self.windows = windows
        self.key = key
        self.epsilon = epsilon
        self.directions = directions
        self.batch_size = batch_size
        self.seed = seed
        self.sides = sides
        self._forward_seconds = 0.0

    def probe(
        self, weights: NDArray[np.int32], round: int, node: int, exponent: int, agent: int = 0
    ) -> Probed:
        """The codes of one round: direction i of a round is the sample round × directions + i of the node.

        Args:
            weights: of this round, int32 (adapter.size,); left as they are.
            round: from 0.
            node: the index of this node in the run.
            exponent: of this round's codes.
            agent: which adapter the weights are. Each sees batches of its own: on the same ones, the agents would
                learn the same.
        """
        started = perf_counter()
        self._forward_seconds = 0.0
        gradients, loss = self.slopes(weights, round, node, agent)
        rng = np.random.default_rng([self._seed_of(agent), round, ROUNDING_STREAM])
        return Probed(
            codes=encode(gradients, exponent, rng),
            loss=loss,
            seconds=perf_counter() - started,
            forward_seconds=self._forward_seconds,
        )

    def slopes(
        self, weights: NDArray[np.int32], round: int, node: int, agent: int = 0
    ) -> tuple[NDArray[np.float64], float]:
        """The projected gradients of a round before they are encoded, (directions,), and the mean of finite losses.

        Two-sided, g = (L(w + εz) − L(w − εz)) / 2ε on one batch per direction (Spall 1992, eq. 2.1, for a Rademacher
        z); one-sided, `zo.spsa.centred_gradients` on the batch of the round's first sample.

        Args as those of `probe`.
        """
        names = [Direction(node, sample, agent) for sample in samples(round, self.directions)]
        if self.sides == 1:
            loss = partial(self._loss, self._batch(names[0]))
            return centred_gradients(loss, weights, self.key, names, self.epsilon)
        gradients = np.empty(self.directions, np.float64)
        losses = np.empty(self.directions, np.float64)
        for i, name in enumerate(names):
            loss = partial(self._loss, self._batch(name))
            gradients[i], losses[i] = projected_gradient(loss, weights, self.key, name, self.epsilon)
        finite = losses[np.isfinite(gradients)]
        return gradients, float(finite.mean()) if finite.size else math.nan

    def _batch(self, name: Direction) -> Batch:
        return batch(self.windows, self.batch_size, self._seed_of(name.agent), name.sample)

    def _seed_of(self, agent: int) -> int:
        return self.seed + (agent << 64)

    def _loss(self, drawn: Batch, view: NDArray[np.float32]) -> float:
        self.adapter.load(view)
        started = perf_counter()
        loss = mean_loss(self.adapter.model, drawn)
        self._forward_seconds += perf_counter() - started
        return loss
