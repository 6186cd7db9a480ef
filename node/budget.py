"""A node's privacy budget: what was spent is on disk before anything is said, and when it is spent, nothing is.

Decides which releases a node makes, whether the next one fits, and that a round asked for again is answered as before.
How a release comes about is `node.privacy`'s business, what it costs `node.accountant`'s.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from node.accountant import Cost, epsilon, noise_for, num_affordable
from node.privacy import Budget, Mechanism, Release
from node.records import DataError
from node.service import BudgetSpentError, NodeError, ProbeResult, Trainer
from node.state import StateError
from transport.durable import write_atomically
from transport.exits import Exit
from zo.manifest import Manifest
from zo.weights import digest


class Plan(NamedTuple):
    """How a node takes part in a run under a budget."""

    release: Release
    """Every one that it makes."""
    releases_per_probe: int
    """Of one agent in one round."""
    num_probes: int
    """In the whole run, of all agents that the node trains."""
    unit: str
    """What is protected: one "row" of the data, or one "window" of text."""

    @property
    def cost(self) -> Cost:
        """Of one release."""
        return Cost(self.release.rate, self.release.noise)

    @property
    def num_releases(self) -> int:
        """In the whole run."""
        return self.releases_per_probe * self.num_probes


def plan(budget: Budget, manifest: Manifest, num_rows: int, num_agents: int, quantize: str) -> Plan:
    """The releases that a node makes in a run.

    Args:
        budget: what is demanded.
        manifest: of the run.
        num_rows: of the node's data; taken as no secret.
        num_agents: that the node trains.
        quantize: how it holds the base.

    Raises:
        DataError: the run, or the way this node would take part, cannot be private.
    """
    if manifest.task.objective == "callable":
        raise DataError(
            "a callable may judge a text by others beside it, so that nothing bounds what one row says: this run "
            "cannot be joined with --dp-epsilon"
        )
    if quantize == "int8":
        raise DataError(
            "with int8 the rows of a forward pass change each other's losses, so that nothing bounds what one row "
            "says: join with --quantize none or nf4 if the run allows that, or without --dp-epsilon"
        )
    if budget.delta >= 1 / num_rows:
        raise DataError(
            f"--dp-delta {budget.delta:g} allows one of {num_rows:,} rows to be told outright: it must be below "
            f"{1 / num_rows:.2g}, better far below"
        )
    probing = manifest.probe
    rate = min(1.0, probing.batch_size / num_rows)
    # Two-sided, each direction has a batch of its own; one-sided, those of a local step share one.
    per_probe = probing.directions if probing.sides == 2 else probing.local_steps
    num_probes = manifest.run.rounds * num_agents
    unit = "window" if manifest.task.kind == "text" else "row"
    try:
        noise = budget.noise or noise_for(rate, num_probes * per_probe, budget.epsilon, budget.delta)
    except ValueError as error:
        raise DataError(f"--dp-epsilon {budget.epsilon:g}: {error}") from error
    return Plan(Release(rate=rate, noise=noise, clip=budget.clip), per_probe, num_probes, unit)


# ---- on disk -------------------------------------------------------------------------------------------------------


class _Spent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rate: float
    noise: float
    releases: int


class _Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    agent: int
    query: bytes
    codes: bytes


class _Account(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    spent: tuple[_Spent, ...] = ()
    answers: tuple[_Answer, ...] = ()


class Account:
    """All releases that a node ever made in a run, and its last answers for each agent, in one file."""

    def __init__(self, path: Path, num_answers: int = 1) -> None:
        """Read it; there is none before the first release.

        Args:
            path: of the file.
            num_answers: how many answers for an agent are kept: as many as it may have reported before a commit comes.

        Raises:
            NodeError: it is damaged. It is never begun anew: that would forget what was said.
        """
        self._path = path
        self._num_answers = num_answers
        self.spent: dict[Cost, int] = {}
        self._answers: dict[int, list[tuple[bytes, bytes]]] = {}
        try:
            found = msgspec.json.decode(path.read_bytes(), type=_Account)
            for each in found.spent:
                Release(rate=each.rate, noise=each.noise, clip=1.0)
                self.spent[Cost(each.rate, each.noise)] = each.releases
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise NodeError(
                Exit.DAMAGED,
                f"{path} says how much of the privacy budget is spent, and cannot be read: {error}. Restore it, or "
                "join as another node with --name",
            ) from error
        for answer in found.answers:
            self._answers.setdefault(answer.agent, []).append((answer.query, answer.codes))

    def answer(self, agent: int, query: bytes) -> NDArray[np.int8] | None:
        """The codes that an agent's query was answered with, if it is one of the last; None if not."""
        codes = dict(self._answers.get(agent, ())).get(query)
        return None if codes is None else np.frombuffer(codes, np.int8)

    def spend(self, cost: Cost, releases: int, agent: int, query: bytes, codes: NDArray[np.int8]) -> None:
        """Make durable that so many releases answer a query. Until it returns, nobody may see them.

        Raises:
            StateError: it cannot be written.
        """
        self.spent[cost] = self.spent.get(cost, 0) + releases
        last = [*self._answers.get(agent, ()), (query, codes.tobytes())]
        self._answers[agent] = last[-self._num_answers :]
        spent = tuple(_Spent(rate, noise, count) for (rate, noise), count in self.spent.items())
        answers = tuple(
            _Answer(each, *known) for each, last in sorted(self._answers.items()) for known in last
        )
        try:
            write_atomically(self._path, msgspec.json.encode(_Account(spent, answers)))
        except OSError as error:
            raise StateError(f"cannot write {self._path}: {error.strerror}") from error


# ---- within it -----------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What was said before, said again."""

    codes: NDArray[np.int8]
    loss: float = math.nan
    num_no_votes: int = 0


class Spending(NamedTuple):
    """Where a node stands after a probe."""

    agent: int
    round: int
    epsilon: float
    """Spent so far."""
    clipped: float
    """Share of the rows that said more than they may, in this process."""


class Guard:
    """What stands between a node's data and its reports: a budget, what is spent of it, and the mechanism."""

    def __init__(self, budget: Budget, plan: Plan, account: Account) -> None:
        """Put together what belongs to one node.

        Args:
            budget: what is demanded.
            plan: as `plan` made it of the budget.
            account: of the node.
        """
        self.budget = budget
        self.plan = plan
        self.account = account
        self.mechanism = Mechanism(plan.release)

    @property
    def epsilon(self) -> float:
        """What is spent so far."""
        return epsilon(self.account.spent, self.budget.delta)

    @property
    def epsilon_after(self) -> float:
        """What will be spent after one more probe."""
        spent, cost = self.account.spent, self.plan.cost
        more = {**spent, cost: spent.get(cost, 0) + self.plan.releases_per_probe}
        return epsilon(more, self.budget.delta)

    def __str__(self) -> str:
        """What the budget means in this run, in one line."""
        budget, plan, release = self.budget, self.plan, self.plan.release
        most = num_affordable(self.account.spent, plan.cost, budget.epsilon, budget.delta)
        probes = (
            f"all {plan.num_probes:,}"
            if most >= plan.num_releases
            else f"{most // plan.releases_per_probe:,}"
        )
        chance = "in every batch" if release.rate == 1 else f"in a batch with probability {release.rate:.2g}"
        return (
            f"privacy: each {plan.unit} is {chance}, says at most {release.clip:g} and meets noise of "
            f"{release.noise * release.clip:.4g} ({release.noise:g} times that); epsilon is {self.epsilon:.3g} of "
            f"{budget.epsilon:g} at delta = {budget.delta:g}, which lasts for {probes} of {plan.num_probes:,} probes; "
            "no loss is sent"
        )


class PrivateTrainer:
    """A trainer that keeps within a budget: what it measures is counted, and kept on disk, before anybody sees it."""

    def __init__(
        self, trainer: Trainer, guard: Guard, tell: Callable[[Spending], None] = lambda _: None
    ) -> None:
        """Put a guard around a trainer.

        Args:
            trainer: whose probe measures by means of the guard's mechanism, and of nothing else.
            guard: of the node.
            tell: called after every probe.
        """
        self._trainer = trainer
        self._guard = guard
        self._tell = tell

    @property
    def estimator(self) -> str:
        """As the run says: no other goes past the mechanism."""
        return self._trainer.estimator

    def initial_weights(self) -> NDArray[np.int32]:
        """The weights of round 0."""
        return self._trainer.initial_weights()

    def audit(self, weights: NDArray[np.int32], sample: int, agent: int = 0) -> tuple[float, float]:
        """Losses on the manifest's public rows: they say nothing of this node's own, and cost nothing."""
        return self._trainer.audit(weights, sample, agent)

    def evaluate(self, weights: NDArray[np.int32]) -> float | None:
        """Held-out loss, for this node alone."""
        return self._trainer.evaluate(weights)

    def probe(
        self,
        weights: NDArray[np.int32],
        round: int,
        node: int,
        exponent: int,
        agent: int = 0,
        walk_step: int = 0,
        importances: NDArray[np.int32] | None = None,
    ) -> ProbeResult:
        """The codes of an agent's round; for a query that was answered last, the same ones without a new release.

        Raises:
            BudgetSpentError: what they would cost is no more there.
            StateError: what is spent cannot be written.
        """
        pool = b"" if importances is None else importances.tobytes()
        query = _query(weights, pool, round, node, exponent, agent)
        guard = self._guard
        known = guard.account.answer(agent, query)
        if known is not None:
            return Answer(known)
        after, budget, plan, mechanism = guard.epsilon_after, guard.budget, guard.plan, guard.mechanism
        if after > budget.epsilon:
            raise BudgetSpentError(
                f"the privacy budget is spent: epsilon is {guard.epsilon:.4g} at delta = {budget.delta:g}, and round "
                f"{round} would make it {after:.4g} of {budget.epsilon:g}. To say more of this data, join with a "
                "larger --dp-epsilon"
            )
        before = mechanism.num_releases
        probed = self._trainer.probe(weights, round, node, exponent, agent, walk_step, importances)
        made = mechanism.num_releases - before
        if (
            made != plan.releases_per_probe
        ):  # a way of measuring that goes past the mechanism must never be sent
            raise AssertionError(
                f"a probe made {made} releases, and {plan.releases_per_probe} are accounted for"
            )
        guard.account.spend(plan.cost, made, agent, query, probed.codes)
        clipped = mechanism.num_clipped / max(mechanism.num_rows, 1)
        self._tell(Spending(agent, round, after, clipped))
        return probed


def _query(weights: NDArray[np.int32], pool: bytes, *asked: int) -> bytes:
    """What is asked for, the weights and some numbers: (16,) bytes.

    The step of a walk is not in it: a node that was started again may not know it any more, and its answer stands.
    """
    text = ",".join(map(str, asked)).encode() + digest(0, weights) + pool
    return hashlib.blake2b(text, digest_size=16, person=b"zo-query").digest()
