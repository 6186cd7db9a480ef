"""Ours: virtual nodes in one process over the code path of real ones; only sockets and files are left out.

Every round is probe, codes, cap, step rule, commit, replica. The same with scalars in floats, for comparison, leaves
out codes and commits as well.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.recipes import problem as problems
from benchmarks.recipes.course import MARKS, Course, Show
from benchmarks.recipes.problem import Form, HeldOut, Problem
from benchmarks.recipes.traffic import Traffic
from coordinator.share import capped
from node.adapter import Adapter
from node.base import Base
from node.data import Sequences
from node.language import adapt
from node.mixture import Mixture
from node.moves import Mover
from node.objectives import objective
from node.probe import Probe, Probed
from zo import kernels
from zo import manifest as manifests
from zo.codes import UNIT_BY_BITS
from zo.combine import combined
from zo.commit import Commit
from zo.directions import run_key
from zo.initial import initial_weights
from zo.layout import lora_layout
from zo.naming import naming
from zo.packing import bits_of_commits, of_classes, pack
from zo.replica import Replica, samples
from zo.steps import StepRule, step_rule
from zo.walk import first_step, next_step
from zo.weights import digest

FLOAT_BYTES: Final = 4
TEXT: Final = manifests.Task()
PRIVATE: Final = manifests.Directions()
NO_MOVES: Final = manifests.Moves()


@dataclass(frozen=True, kw_only=True)
class Swarm:
    """How the swarm trains."""

    rounds: int
    directions: int
    sides: int
    step: float
    decay: Literal["linear", "constant"] = "linear"
    smoothing: int = 2
    epsilon: float = 0.01
    scalars: Literal["int8", "float"] = "int8"
    local_steps: int = 1
    """In which a node measures its directions of a round."""
    full_votes: int = 1
    """Up to so many votes of a round add a whole step each."""
    policy: manifests.Directions = PRIVATE
    """Which directions nodes measure, and how codes for the same one are combined; not with scalars in floats."""
    bits: Literal[8, 4, 1] = 8
    """Of a code."""
    agents: int = 1
    """Adapters, each probed by every node; they predict by the mean of their probabilities."""
    at_once: int = 0
    """Directions whose views share a forward pass; see `node.probe.Probe`."""
    estimators: tuple[str, ...] = ()
    """How nodes measure, in turn, as `zo-node join --estimator` names it; none: all as `sides` says."""
    moves: manifests.Moves = NO_MOVES
    """What nodes do whose estimator is `moves`."""
    max_share: float = 0.0
    """Of a node in a round, as `coordinator.share` caps it; 0: it is not capped."""

    @property
    def method(self) -> str:
        """What the tables call it."""
        of_agents = f", {self.agents} agents" if self.agents > 1 else ""
        return f"swarm, {self.scalars}{of_agents}"

    def estimator(self, node: int) -> str:
        """How a node measures."""
        usual = "one-sided" if self.sides == 1 else "two-sided"
        return self.estimators[node % len(self.estimators)] if self.estimators else usual

    def passes(self, node: int) -> int:
        """Forward passes of a node for one agent's round; by `backward` and `moves` there is a backward one to each."""
        match self.estimator(node):
            case "two-sided":
                return 2 * self.directions
            case "backward":
                return self.local_steps
            case "moves":
                return self.moves.updates
            case _:
                return self.directions


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run of the swarm came to."""

    course: Course
    digest: str
    """Of the first agent's weights after the last round."""
    ledger_bytes: int
    """All commits as encoded: what one node receives, without the transport's frames."""
    traffic: Traffic
    """What a node sent and received, with everything; of the first agent."""
    num_no_votes: int
    weights: NDArray[np.int32]
    """Of the first agent after the last round, (size,)."""
    losses: tuple[float, ...]
    """Mean loss of the nodes' own batches in each round."""


def train(
    problem: Problem,
    settings: Swarm,
    seed: int,
    show: Show = lambda *_: None,
    marks: Sequence[float] = MARKS,
) -> Trained:
    """Train once, measured on the way."""
    form = problem.form
    base = problems.load(problem)
    manifest = make_manifest(base, form, settings, seed, problem.task)
    adapter = adapt(base, manifest)

    def measuring(node: int, windows: Sequences) -> Probe | Mover:
        key, private_seed, estimator = run_key(manifest.run_id), seed * 1000 + node, settings.estimator(node)
        if estimator == manifests.MOVES:
            return Mover(adapter, windows, manifest, key, private_seed)
        probe = Probe(
            adapter,
            windows,
            key=key,
            epsilon=settings.epsilon,
            directions=settings.directions,
            batch_size=form.batch_size,
            seed=private_seed,
            sides=settings.sides,
            local_steps=settings.local_steps,
            bits=settings.bits,
            naming=naming(manifest),
            samples_per_round=manifest.samples_per_round,
            objective=objective(problem.task, base, windows),
            at_once=settings.at_once,
        )
        probe.estimator = msgspec.convert(estimator, manifests.Estimator)
        if form.batch_size >= windows.num_windows:
            probe.answers = problem.known  # all its batches are the same, in every run
        return probe

    probes = [measuring(node, windows) for node, windows in enumerate(problem.private)]
    weights = initial_weights(adapter.layout, run_key(manifest.run_id), form.train)
    trainers: list[Exact | InFloats] = [
        Exact(manifest, weights, agent, settings.max_share)
        if settings.scalars == "int8"
        else InFloats(manifest, weights, agent)
        for agent in range(settings.agents)
    ]
    held_out = HeldOut(problem, adapter)

    def measure() -> float:
        if len(trainers) > 1:
            return together(problem, adapter, [each.weights for each in trainers])
        adapter.load_weights(trainers[0].weights)
        return held_out()

    nodes = range(len(probes))
    passes = settings.agents * sum(map(settings.passes, nodes))
    a_round = settings.agents * sum(
        settings.moves.projections if settings.estimator(node) == manifests.MOVES else settings.directions
        for node in nodes
    )
    course = Course(settings.rounds * passes, measure, show, marks)
    losses = []
    for number in range(settings.rounds):
        losses.append(float(np.nanmean([each.round(number, probes) for each in trainers])))
        done = number + 1
        course.reached(done * passes, trainers[0].bytes_each * done * a_round * settings.bits // 8)
    return Trained(
        course=course,
        digest=digest(settings.rounds, trainers[0].weights).hex(),
        ledger_bytes=sum(each.ledger_bytes for each in trainers),
        traffic=trainers[0].traffic,
        num_no_votes=sum(each.num_no_votes for each in trainers),
        weights=trainers[0].weights.copy(),
        losses=tuple(losses),
    )


def make_manifest(
    base: Base, form: Form, settings: Swarm, seed: int, task: manifests.Task = TEXT
) -> manifests.Manifest:
    """The manifest of one run; the seed decides the run id, and with it the adapter's start and every direction."""
    head = None if base.head is None else base.head.shape
    layout = lora_layout(base.linear_shapes, form.targets, form.rank, form.train, head)
    return manifests.validate(
        manifests.Manifest(
            protocol=1,
            run=manifests.Run(
                name="learning",
                rounds=settings.rounds,
                nonce=hashlib.blake2b(str(seed).encode(), digest_size=16).hexdigest(),
            ),
            base=manifests.BaseModel(
                name=Path(base.path).name,
                digest=base.digest,
                tokenizer_digest=base.tokenizer_digest,
                quantize=form.quantize,
            ),
            task=task,
            adapter=manifests.Adapter(
                targets=form.targets,
                rank=form.rank,
                alpha=form.alpha,
                train=form.train,
                size=layout.size,
                layout_digest=layout.digest().hex(),
            ),
            probe=manifests.Probing(
                epsilon=settings.epsilon,
                directions=settings.directions,
                batch_size=form.batch_size,
                sequence_length=form.sequence_length,
                sides=settings.sides,
                local_steps=settings.local_steps,
            ),
            schedule=manifests.Schedule(
                step=settings.step,
                decay=settings.decay,
                smoothing=settings.smoothing,
                first_exponent=-4,
                full_votes=settings.full_votes,
            ),
            agents=manifests.Agents(count=settings.agents),
            directions=settings.policy,
            moves=settings.moves,
            codes=manifests.Coding(bits=settings.bits),
            parity=manifests.Parity(digest_every=16, share_loss=True),
        )
    )


def together(problem: Problem, adapter: Adapter, weights: Sequence[NDArray[np.int32]]) -> float:
    """The held-out metric of several agents, exported and loaded as one model by the mean of their probabilities."""
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(agent) for agent in range(len(weights))]
        for folder, each in zip(folders, weights, strict=True):
            adapter.export(folder, each, problem.model)
        return problem.measure(Mixture(problems.load(problem).model, folders, "mean"))


class Exact:
    """Rounds of one agent as they are in the field."""

    bytes_each: Final = 1

    def __init__(
        self, manifest: manifests.Manifest, weights: NDArray[np.int32], agent: int, max_share: float = 0.0
    ) -> None:
        self._agent = agent
        self._manifest = manifest
        self._max_share = max_share
        self._rule = step_rule(manifest)
        self._scale = self._rule.start()
        self._walk_step = first_step(self._rule, 0, self._scale.exponent)
        self._replica = Replica(manifest, weights, agent=agent)
        self.ledger_bytes = self.num_no_votes = 0
        self.traffic = Traffic()

    @property
    def weights(self) -> NDArray[np.int32]:
        """Of this moment."""
        return self._replica.weights

    def round(self, number: int, probes: Sequence[Probe | Mover]) -> float:
        """One round of all nodes; their mean loss."""
        probed = [self._probed(number, node, each) for node, each in enumerate(probes)]
        movers = tuple(node for node, each in enumerate(probes) if isinstance(each, Mover))
        others = tuple(node for node in range(len(probes)) if node not in movers)
        moves = self._counted([probed[node].codes for node in movers])
        participants, slopes = combined(
            others, self._counted([probed[node].codes for node in others]), self._manifest
        )
        if movers:
            participants = tuple(range(len(probes)))
        exponent = self._scale.exponent
        steps, self._scale = self._rule.of_round(self._scale, number, slopes, moves)
        codes = of_classes(participants, movers, slopes, moves, self._manifest)
        commit = Commit(
            round=number,
            steps=steps,
            exponents=self._rule.exponents(self._scale),
            participants=participants,
            codes=pack(codes, bits_of_commits(self._manifest)),
            previous=self._replica.head,
            movers=movers,
        )
        self._replica.apply(commit)
        self._walk_step = next_step(self._rule, commit, slopes, self._scale.exponent - exponent)
        self.ledger_bytes += len(commit.encode())
        self.num_no_votes += sum(each.num_no_votes for each in probed)
        self.traffic.count([pack(each.codes, self._manifest.codes.bits) for each in probed], commit)
        return float(np.nanmean([each.loss for each in probed]))

    def _probed(self, number: int, node: int, by: Probe | Mover) -> Probed:
        if isinstance(by, Mover):
            return by.probe(self.weights, number, node, self._scale.moves_exponent, self._agent)
        importances = None if self._replica.pool is None else self._replica.pool.importances
        exponent = self._scale.exponent
        return by.probe(self.weights, number, node, exponent, self._agent, self._walk_step, importances)

    def _counted(self, codes: Sequence[NDArray[np.int8]]) -> NDArray[np.int8]:
        """What a round counts of the codes of some nodes, one after the other."""
        if not codes:
            return np.empty(0, np.int8)
        bits = self._manifest.codes.bits
        if not self._max_share or bits == 1:
            return np.concatenate(codes)
        return capped(np.stack(codes), self._max_share, UNIT_BY_BITS[bits])[0].ravel()


class InFloats:
    """The same rounds with the scalars as they were measured: the step rule of `zo.steps` without its integers."""

    bytes_each: Final = FLOAT_BYTES

    def __init__(self, manifest: manifests.Manifest, weights: NDArray[np.int32], agent: int) -> None:
        self._agent = agent
        self._key = run_key(manifest.run_id)
        self._rule: StepRule = step_rule(manifest)
        self._mean_square = 0.0
        self.weights = weights.copy()
        self.ledger_bytes = self.num_no_votes = 0
        self.traffic = Traffic()

    def round(self, number: int, measuring: Sequence[Probe | Mover]) -> float:
        """One round of all nodes; their mean loss."""
        probes = [each for each in measuring if isinstance(each, Probe)]
        probed = [probe.slopes(self.weights, number, node, self._agent) for node, probe in enumerate(probes)]
        slopes = np.concatenate([each for each, _ in probed])
        mean_square = float(np.mean(slopes**2))
        self._mean_square += (mean_square - self._mean_square) / (1 << self._rule.smoothing if number else 1)
        coefficients = np.rint(
            self._rule.scheduled(number) * slopes / (slopes.size * np.sqrt(self._mean_square))
        ).astype(np.int32)
        names = np.array(
            [
                (node, sample, self._agent)
                for node, probe in enumerate(probes)
                for sample in samples(number, probe.directions)
            ],
            np.uint32,
        )
        kernels.apply(self.weights, self._key, names, coefficients)
        return float(np.nanmean([loss for _, loss in probed]))
