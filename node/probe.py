"""Probing: what a node's own batch says about the round's directions, as one byte each.

Decides at which views and on which batch losses are taken, and what leaves the node; what a loss is, `node.losses`
decides. Which directions, epsilon and exponent are the run's; the batch and the generator that rounds are the node's
own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from node.adapter import Adapter
from node.curvature import EVERY, Curvature, observed
from node.data import AnyBatch, Sequences, batch, stacked
from node.frozen import Answers, frozen_backbone, once_per_batch
from node.gradients import Gradients
from node.losses import Objective, RowLosses, row_losses
from node.objectives import Judged
from node.privacy import Mechanism
from node.stacked import side_by_side
from zo import kernels
from zo.codes import NO_VOTE, encode
from zo.directions import Direction, Drawn, RunKey, stack
from zo.manifest import Estimator
from zo.naming import PRIVATE, Naming
from zo.replica import samples
from zo.spsa import finite_mean, one_sided, two_sided
from zo.walk import walk
from zo.weights import to_float

ROUNDING_STREAM = 1  # keeps the generator that rounds codes apart from the one that draws batches


class Probed(NamedTuple):
    """What a node found in one round."""

    codes: NDArray[np.int8]
    """(directions,) projected gradients in units of 2^exponent; NO_VOTE where a loss was not finite."""
    loss: float
    """Mean of the finite losses; NaN if there is none."""
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

    at_once: int
    """Directions whose views share one forward pass; 0: every view has a pass of its own. It decides how fast a probe
    is, and nothing else but the last digits of its losses."""
    estimator: Estimator
    """How slopes are measured. `sides` tells it at first; a node may choose another (`node.estimators`)."""
    answers: Answers
    """What the base's frozen backbone, if it has one, said of batches. Who probes the same ones again may keep more."""
    curvature: Curvature | None
    """What is known of it, where one-sided slopes are watched for it and may become two-sided; None: they are not."""

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
        local_steps: int = 1,
        bits: int = 8,
        naming: Naming = PRIVATE,
        samples_per_round: int | None = None,
        objective: Objective = row_losses,
        at_once: int = 0,
        mechanism: Mechanism | None = None,
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
                restart gives the same codes, as long as `at_once` is the same and no curvature is watched for.
            sides: 2: two losses and a batch for each direction; 1: one loss for each, all on one batch.
            local_steps: in which a round's directions are measured, each where the codes of those before lead
                (`zo.walk`); divides `directions`.
            bits: of a code.
            naming: of the run's directions.
            samples_per_round: as of the manifest; None for as many as directions.
            objective: what the loss is; `node.objectives.objective` gives that of a task.
            at_once: see the attribute.
            mechanism: makes slopes differentially private; None: they are as measured. With it batches and noise are
                drawn anew each time, and a round probed again gives other codes.
        """
        self.adapter = adapter
        self.windows = windows
        self.key = key
        self.epsilon = epsilon
        self.directions = directions
        self.batch_size = batch_size
        self.seed = seed
        self.estimator: Estimator = "one-sided" if sides == 1 else "two-sided"
        self._usual_sides = sides
        self.curvature: Curvature | None = None
        self.local_steps = local_steps
        self.bits = bits
        self.naming = naming
        self.samples_per_round = samples_per_round
        self.objective = objective
        self.at_once = at_once
        self.mechanism = mechanism
        self._gradients: Gradients | None = None
        self._num_steps = 0
        self._forward_seconds = 0.0
        self.answers = deque(maxlen=1)  # a node with no more rows than a batch has only ever one

    @property
    def sides(self) -> int:
        """Views of a direction, where slopes come from differences of losses."""
        return 1 if self.estimator == "one-sided" else 2

    def probe(
        self,
        weights: NDArray[np.int32],
        round: int,
        node: int,
        exponent: int,
        agent: int = 0,
        walk_step: int = 0,
        importances: NDArray[np.int32] | None = None,
    ) -> Probed:
        """The codes of one round: direction i of a round is the sample round × samples_per_round + i of the node.

        Args:
            weights: of this round, int32 (adapter.size,); left as they are.
            round: from 0.
            node: the index of this node in the run.
            exponent: of this round's codes.
            agent: which adapter the weights are. Each sees batches of its own: on the same ones, the agents would
                learn the same.
            walk_step: what a code is multiplied with between two local steps.
            importances: of the run's pool, if it is drawn by them.
        """
        started = perf_counter()
        self._forward_seconds = 0.0
        rng = np.random.default_rng([self._seed_of(agent), round, ROUNDING_STREAM])
        losses = []

        def measured(at: NDArray[np.int32], names: Sequence[Direction]) -> NDArray[np.int8]:
            gradients, found = self.slopes_along(at, names)
            losses.append(found)
            return encode(gradients, exponent, rng, self.bits)

        names = self._names(round, node, agent, importances)
        codes = walk(measured, weights, self.key, names, self.local_steps, walk_step)
        return Probed(
            codes=codes,
            loss=finite_mean(np.concatenate(losses)),
            seconds=perf_counter() - started,
            forward_seconds=self._forward_seconds,
        )

    def slopes(
        self, weights: NDArray[np.int32], round: int, node: int, agent: int = 0
    ) -> tuple[NDArray[np.float64], float]:
        """The projected gradients of a round before they are encoded, (directions,), and the mean of finite losses.

        All of them at the same weights. Args as those of `probe`.
        """
        slopes, losses = self.slopes_along(weights, self._names(round, node, agent))
        return slopes, finite_mean(losses)

    def _names(
        self, round: int, node: int, agent: int, importances: NDArray[np.int32] | None = None
    ) -> list[Direction]:
        drawn = samples(round, self.directions, self.samples_per_round)
        return self.naming.of_round(node, drawn, agent, importances)

    def slopes_along(
        self, weights: NDArray[np.int32], names: Sequence[Direction]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The projected gradients along some directions, (n,), and the losses that they come from.

        Two-sided, g = (L(w + εz) − L(w − εz)) / 2ε on one batch per direction (Spall 1992, eq. 2.1, for a Rademacher
        z); one-sided, `zo.spsa.one_sided` on the batch of the first; forward, gᵀz on one batch per direction; backward,
        gᵀz for the gradient g on the batch of the first.
        """
        if self.mechanism is not None:
            return self._private_slopes(self.mechanism, weights, names)
        if self.estimator in ("forward", "backward"):
            begin = perf_counter()
            slopes, losses = self._exact_slopes(to_float(weights), names)
            self._forward_seconds += perf_counter() - begin
            return slopes, losses
        if self.estimator == "one-sided" and self.curvature is not None:
            self._num_steps += 1
            if self.curvature.needs_both_sides or self._num_steps % EVERY == 1:
                losses = self.losses(weights, names, 2, is_shared=True)
                self.curvature = observed(self.curvature, losses)
                return two_sided(losses, self.epsilon), losses.ravel()
        losses = self.losses(weights, names, self.sides)
        slopes = one_sided(losses[:, 0], self.epsilon) if self.sides == 1 else two_sided(losses, self.epsilon)
        return slopes, losses.ravel()

    def _exact_slopes(
        self, values: NDArray[np.float32], names: Sequence[Direction]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if self._gradients is None:
            self._gradients = Gradients(self.adapter)
        if self.estimator == "backward":
            loss, gradient = self._gradients.gradient(values, self.draw(names[0]))
            return kernels.projections(gradient, self.key, stack(names)), np.array([loss])
        found = [
            self._gradients.slope(values, kernels.perturbation(self.key, name, values.size), self.draw(name))
            for name in names
        ]
        return np.array([slope for _, slope in found]), np.array([loss for loss, _ in found])

    def losses(
        self,
        weights: NDArray[np.int32],
        directions: Sequence[Direction],
        sides: int,
        epsilon: float | None = None,
        *,
        is_shared: bool | None = None,
    ) -> NDArray[np.float64]:
        """The losses at weights + εz and, if there are two sides, weights − εz of every direction: (n, sides).

        Args:
            weights: int32 (adapter.size,).
            directions: the names of n directions z.
            sides: 2: each direction has a batch of its own; 1: all have the first one's.
            epsilon: another than the probe's.
            is_shared: whether all have the first one's batch, whatever the sides.
        """
        is_shared = sides == 1 if is_shared is None else is_shared
        found = []
        with once_per_batch(frozen_backbone(self.adapter), self.answers):
            for chunk in self._in_view(weights, directions, sides, epsilon):
                batches = [self.draw(directions[0] if is_shared else name) for name in chunk]
                found.append(self._measured(batches, sides).means(sides * len(chunk)).reshape(-1, sides))
        return np.concatenate(found)

    def _private_slopes(
        self, mechanism: Mechanism, weights: NDArray[np.int32], names: Sequence[Direction]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """As `slopes_along`, with sums over rows that the mechanism draws, bounds and makes noisy.

        Each row has one loss, the mean over what is predicted in it. A sum is divided by how many rows are expected in
        a batch, not by how many there were. One-sided, a row's own mean over the directions is taken out of its losses
        before they are bounded: the mean that all L_i have in common never is on its own.
        """
        shared = [[name] for name in names] if self.sides == 2 else [names]
        slopes, seen = [], []
        for together in shared:
            rows = mechanism.rows(self.windows.num_windows)
            losses = self.row_losses(weights, together, rows, self.sides)
            with np.errstate(invalid="ignore"):  # inf − inf: such a row says nothing
                if self.sides == 2:
                    said, width = losses[..., 0] - losses[..., 1], 2 * self.epsilon
                else:
                    said = losses[..., 0] - losses[..., 0].mean(1, keepdims=True)
                    width = self.epsilon * (len(together) - 1) / len(together)
            expected = mechanism.release.rate * self.windows.num_windows
            slopes.append(mechanism.noisy_sum(said) / (expected * width))
            seen.append(losses.ravel())
        return np.concatenate(slopes), np.concatenate(seen)

    def row_losses(
        self, weights: NDArray[np.int32], directions: Sequence[Direction], rows: NDArray[np.int64], sides: int
    ) -> NDArray[np.float64]:
        """The loss of each of some rows at the views of every direction, by at most `batch_size` of them in a pass.

        Args:
            weights: int32 (adapter.size,).
            directions: the names of n directions z.
            rows: their numbers; there may be none.
            sides: 2: at weights + εz and weights − εz; 1: at weights + εz.

        Returns:
            (rows, n, sides).
        """
        losses = np.empty((len(rows), len(directions), sides))
        with once_per_batch(frozen_backbone(self.adapter), self.answers):
            for start in range(0, len(rows), self.batch_size):
                part = slice(start, start + self.batch_size)
                drawn, done = self.windows.take(rows[part]), 0
                for chunk in self._in_view(weights, directions, sides):
                    found = self._measured([drawn] * len(chunk), sides)
                    each = (found.sums / found.counts).reshape(len(chunk), sides, -1)
                    losses[part, done : done + len(chunk)] = np.moveaxis(each, 2, 0)
                    done += len(chunk)
        return losses

    def hold(self) -> None:
        """Make the adapter hold as many views as a round needs, and no more."""
        if len(self.adapter.views) != (num_views := self._num_views(self.sides)):
            self.adapter.hold(num_views)

    def _num_views(self, sides: int) -> int:
        """In a forward pass; the kernel always makes both of a direction, and a second one may go unused."""
        return sides * self._per_pass(sides) + (2 - sides)

    def _per_pass(self, sides: int) -> int:
        """Directions that share a forward pass: no more views than those of `at_once` on the run's usual sides."""
        return max(min(self.at_once, self.at_once * self._usual_sides // sides), 1)

    def _in_view(
        self,
        weights: NDArray[np.int32],
        directions: Sequence[Direction],
        sides: int,
        epsilon: float | None = None,
    ) -> Iterator[Sequence[Direction]]:
        """The directions by as many as share a forward pass, each time with their views in the adapter."""
        epsilon = self.epsilon if epsilon is None else epsilon
        per_pass = self._per_pass(sides)
        if len(self.adapter.views) < (num_views := self._num_views(sides)):
            self.adapter.hold(num_views)
        for start in range(0, len(directions), per_pass):
            chunk = directions[start : start + per_pass]
            for i, name in enumerate(chunk):
                views = self.adapter.host[sides * i], self.adapter.host[sides * i + 1]
                kernels.perturbed(weights, self.key, name, epsilon, out=views)
            self.adapter.push()
            yield chunk

    def _measured(self, batches: Sequence[AnyBatch], sides: int) -> RowLosses:
        """The losses of all rows of n batches, each under `sides` views, which follow each other."""
        begin = perf_counter()
        found = self._together(batches, sides) if self.at_once else self._apart(batches[0], sides)
        self._forward_seconds += perf_counter() - begin
        return found

    def _apart(self, drawn: AnyBatch, sides: int) -> RowLosses:
        """The losses of one batch under the adapter's first `sides` views, each with a pass of its own."""
        found = []
        for side in range(sides):
            if side:
                self.adapter.views[0].copy_(self.adapter.views[side])
            found.append(self.objective(self.adapter.model, drawn))
        return RowLosses(
            np.concatenate([each.sums for each in found]), np.concatenate([each.counts for each in found])
        )

    def _together(self, batches: Sequence[AnyBatch], sides: int) -> RowLosses:
        """The losses of n batches, each under `sides` views, from one forward pass."""
        num_views = sides * len(batches)
        together = stacked([drawn for drawn in batches for _ in range(sides)])
        num_copies = sides if sides == 2 else num_views
        if isinstance(self.objective, Judged):
            num_copies = 1  # after the first token that is said, copies differ
        with side_by_side(self.adapter, num_views, num_copies):
            return self.objective(self.adapter.model, together)

    def draw(self, direction: Direction) -> AnyBatch:
        """The batch that a direction is measured on."""
        sample = direction.by if isinstance(direction, Drawn) else direction.sample
        return batch(self.windows, self.batch_size, self._seed_of(direction.agent), sample)

    def _seed_of(self, agent: int) -> int:
        return self.seed + (agent << 64)
