"""Moves: a node walks some first-order steps on its own copy, and says where they led by projections of the move.

Decides how the node walks and what of it leaves: codes of −m·z for every direction z, where m is the move in units of
the weights (as the projected updates of Ferret, arXiv 2409.06277). How they become a step is `zo.steps`' business.
"""

from __future__ import annotations

from time import perf_counter
from typing import Final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from node.adapter import Adapter
from node.data import Sequences, batch
from node.gradients import Gradients
from node.probe import ROUNDING_STREAM, Probed
from zo import kernels
from zo.codes import encode
from zo.directions import Direction, RunKey, stack
from zo.manifest import Manifest
from zo.replica import samples
from zo.spsa import finite_mean
from zo.steps import step_rule
from zo.weights import to_float

_ONE: Final = 2**32


class Mover:
    """What a node needs to walk."""

    def __init__(
        self, adapter: Adapter, windows: Sequences, manifest: Manifest, key: RunKey, seed: int
    ) -> None:
        """Fix what stays the same from round to round.

        Args:
            adapter: base and adapter; the base is held in floats from now on (`node.gradients`).
            windows: the node's private data.
            manifest: of the run; it allows moves.
            key: of the run.
            seed: the node's own secret: decides batches and rounding.
        """
        assert manifest.moves.projections
        self._windows, self._manifest, self._key, self._seed = windows, manifest, key, seed
        self._gradients = Gradients(adapter)

    def probe(
        self, weights: NDArray[np.int32], round: int, node: int, exponent: int, agent: int = 0
    ) -> Probed:
        """The codes of one round: (projections,).

        Args:
            weights: of this round, int32 (size,); left as they are.
            round: from 0.
            node: the index of this node in the run.
            exponent: of this round's codes of moves.
            agent: which adapter the weights are.
        """
        started = perf_counter()
        seed = self._seed + (agent << 64)
        moved, losses = self.move(to_float(weights), round, seed)
        forward_seconds = perf_counter() - started
        drawn = samples(round, self._manifest.moves.projections, self._manifest.samples_per_round)
        names = [Direction(node, sample, agent) for sample in drawn]
        rng = np.random.default_rng([seed, round, ROUNDING_STREAM])
        projected = -kernels.projections(moved, self._key, stack(names))
        return Probed(
            codes=encode(projected, exponent, rng, self._manifest.codes.bits),
            loss=finite_mean(np.array(losses)),
            seconds=perf_counter() - started,
            forward_seconds=forward_seconds,
        )

    def move(
        self, values: NDArray[np.float32], round: int, seed: int
    ) -> tuple[NDArray[np.float32], list[float]]:
        """Where some first-order steps lead from `values`, less these, (size,); and the loss at each step.

        The optimizer starts anew every round: its state would be that of a walk that the commit did not follow. Its
        rate is that of `rate_of`.
        """
        settings = self._manifest.moves
        rate = rate_of(self._manifest, round)
        walked = torch.from_numpy(values.copy()).requires_grad_()
        optimizer: torch.optim.Optimizer
        if settings.optimizer == "adamw":
            optimizer = torch.optim.AdamW([walked], rate)
        else:
            optimizer = torch.optim.SGD([walked], rate)
        losses = []
        for update in range(settings.updates):
            rows = batch(
                self._windows, self._manifest.probe.batch_size, seed, round * settings.updates + update
            )
            loss, gradient = self._gradients.gradient(walked.detach().numpy(), rows)
            losses.append(loss)
            walked.grad = torch.from_numpy(gradient)
            optimizer.step()
        moved: NDArray[np.float32] = walked.detach().numpy() - values
        return moved, losses


def rate_of(manifest: Manifest, round: int) -> float:
    """The learning rate of a round's moves: as the run's schedule has it, by the share that a step has then.

    What is unknown of a move stays in the weights as noise. Long moves are worth it as long as there is far to go.
    """
    rule = msgspec.structs.replace(step_rule(manifest), step=_ONE)
    return manifest.moves.rate * rule.scheduled(round) / _ONE
