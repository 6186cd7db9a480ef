"""A replica of one agent's weights: the manifest plus the commits of its chain applied so far.

Node, coordinator, audit and simulation all hold one; it is the only code that turns commits into weights (law 1).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from zo import kernels
from zo import pool as pools
from zo.commit import Commit, Entry, Revert, chain_digest, genesis
from zo.directions import run_key
from zo.inverse import History, Part, inverse
from zo.manifest import Manifest
from zo.naming import naming, pool_names
from zo.packing import codes_of, coefficients_of, num_codes_each
from zo.pool import Pool
from zo.weights import Bound, WeightsOverflow, digest

_BATCH: Final = 4096
"""Directions to take back at a time: many short updates of many weights cost more than one long one."""
_INT32_MAX: Final = 2**31 - 1

Move = tuple[NDArray[np.uint32], NDArray[np.int32]]
"""Names of directions, (n, 3), and their coefficients, (n,)."""


class ChainError(ValueError):
    """An entry that does not follow the one before."""


class HistoryNeeded(Exception):  # noqa: N818 — not a fault: it says what is needed
    """An entry that takes back earlier ones, where they are not at hand; a snapshot after it serves as well."""


def samples(round: int, num: int, per_round: int | None = None) -> range:
    """The samples of a round: direction i of round r is sample r × per_round + i, for every node alike.

    Args:
        round: from 0.
        num: how many directions it has.
        per_round: how many a round may have; None for as many.
    """
    first = round * (num if per_round is None else per_round)
    return range(first, first + num)


class Replica:
    """Weights at a round, moved on by one commit at a time.

    Attributes:
        weights: (size,) int32, fixed point (zo.weights). Read it, never write it.
        round: number of commits applied.
        head: digest of the last commit applied, (16,) bytes; the chain's genesis before the first.
        agent: whose weights they are: one chain of commits, and directions of its own.
        pool: what the weights are made of in a pool run; None in others.
    """

    def __init__(
        self,
        manifest: Manifest,
        weights: NDArray[np.int32],
        round: int = 0,
        head: bytes | None = None,
        agent: int = 0,
        state: Sequence[NDArray[np.int32]] = (),
        pool: Pool | None = None,
    ):
        """Start, or go on from a snapshot.

        Args:
            manifest: of the run.
            weights: (size,) int32; copied.
            round: number of commits that they hold.
            head: digest of the last of them.
            agent: whose they are.
            state: that of the replica to go on from; none at the start of a run.
            pool: likewise, of a pool run.

        Raises:
            ValueError: a wrong shape, dtype or agent, or no state where the manifest's rule has one.
        """
        if weights.shape != (manifest.adapter.size,) or weights.dtype != np.int32:
            raise ValueError(
                f"weights must be int32 of {manifest.adapter.size} entries, got {weights.dtype} of {weights.shape}"
            )
        if not 0 <= agent < manifest.agents.count:
            raise ValueError(f"the run has the agents 0 to {manifest.agents.count - 1}, got {agent}")
        self.weights = weights.copy()
        self.round = round
        self.head = genesis(manifest.run_id, agent) if head is None else head
        self.agent = agent
        self._manifest = manifest
        self._key = run_key(manifest.run_id)
        self._naming = naming(manifest)
        self._rounds = manifest.run.rounds
        self._num_classes = 2 if manifest.moves.projections else 1
        self._staleness = manifest.run.staleness
        self.pool = pools.start(manifest) if pool is None else pool
        if pool is None and self.pool is not None and round:
            raise ValueError("a replica of this run goes on from a pool, got none")
        self._momentum = 0 if self.pool else manifest.schedule.momentum
        self._weight_decay = manifest.schedule.weight_decay
        num_more = manifest.num_vectors - 1
        if not round and not state:
            state = [weights] * num_more
        if len(state) != num_more:
            raise ValueError(
                f"a replica of this run has {num_more} vectors beside its weights, got {len(state)}"
            )
        vectors = [each.copy() for each in state]
        self._aim = vectors.pop(0) if self._momentum else None
        self._start = vectors.pop(0) if self._weight_decay and self.pool is None else None
        self._bound = Bound(self._moved, self._start)

    @property
    def state(self) -> list[NDArray[np.int32]]:
        """What the weights to come depend on beside the weights: with momentum their aim, with weight decay where they
        started; each (size,) int32. Read it, never write it."""
        return [each for each in (self._aim, self._start) if each is not None]

    @property
    def _moved(self) -> NDArray[np.int32]:
        """What coefficients are added to."""
        return self.weights if self._aim is None else self._aim

    def check(self, commit: Commit) -> None:
        """Check that a commit can be applied next.

        Raises:
            ChainError: another round is due, the run has no more rounds, the chain does not match, or participants or
                codes are not as the manifest says.
            WeightsOverflow: it would move a weight out of range. Nothing has changed then.
        """
        self._checked(commit)

    def _checked(self, commit: Commit) -> tuple[NDArray[np.int32], Pool | None]:
        """The (n,) coefficients of a commit that can be applied next, and the pool after it. Raises as `check`."""
        self._check_follows(commit)
        if commit.round >= self._rounds:
            raise ChainError(f"commit of round {commit.round}, but the run ends after {self._rounds} rounds")
        if commit.late and not self._staleness:
            raise ChainError(f"commit of round {commit.round} has late codes, which the manifest forbids")
        if len(commit.steps) != self._num_classes:
            raise ChainError(
                f"commit of round {commit.round} has {len(commit.steps)} classes of codes, the run {self._num_classes}"
            )
        try:
            self._naming.check(commit.participants)
            coefficients = coefficients_of(commit, self._manifest)
        except ValueError as error:
            raise ChainError(str(error)) from error
        if self.pool is None:
            self._bound.check(self._moved, coefficients)
            return coefficients, None
        pool = self._pool_after(self.pool, commit, coefficients)
        self._bound.check(self.weights, self.pool.way_to(pool)[1])
        return coefficients, pool

    def apply(self, entry: Entry, frame: bytes | None = None, history: History | None = None) -> None:
        """Move on by one entry of the ledger.

        Args:
            entry: the next one.
            frame: its encoded form, if at hand (saves encoding it again).
            history: (first, last) -> the entries first..last-1; what a `Revert` takes back.

        Raises:
            ChainError, WeightsOverflow: as `check`; nothing has changed then.
            HistoryNeeded: a `Revert`, and no history to look up what it takes back; nothing has changed then.
        """
        if isinstance(entry, Revert):
            self._check_follows(entry)
            self.weights, self.pool = self._reverted(entry, history)
            self._aim = None if self._aim is None else self.weights.copy()
            self._bound = Bound(self.weights)
        else:
            coefficients, pool = self._checked(entry)
            if self.pool is None or pool is None:
                _, names = self._names(entry, None)
                voting = coefficients != 0
                names, amounts = names[voting], coefficients[voting]
            else:
                changed, amounts = self.pool.way_to(pool)
                names = pool_names(changed, self.agent)
                self.pool = pool
            kernels.apply(self._moved, self._key, names, amounts)
            self._bound.grow(amounts)
            if self._start is not None:
                kernels.decay(self._moved, self._start, self._weight_decay)
            if self._aim is not None:
                kernels.follow(self.weights, self._aim, self._momentum)
        self.round += 1
        self.head = chain_digest(entry.encode() if frame is None else frame)

    def revert(self, first: int, last: int, nodes: tuple[int, ...], history: History) -> Revert:
        """The entry that takes back what first..last-1 did, to be applied next.

        Args:
            first: from this entry on.
            last: one past the last entry.
            nodes: whose part, ascending; empty for everyone's.
            history: (first, last) -> the entries first..last-1.

        Raises:
            ValueError: the range is not within the ledger, or the run has weight decay.
            WeightsOverflow: taking it back would move a weight out of range.
        """
        draft = Revert(self.round, first, last, nodes, bytes(16), self.head)
        found = self._digest_at_rest(*self._sum_taken_back(draft, history))
        return Revert(self.round, first, last, nodes, found, self.head)

    def digest(self) -> bytes:
        """(16,) bytes that stand for the round, the agent and every bit of the weights, of `state` and of the pool."""
        more = self.state if self.pool is None else self.pool.vectors
        return digest(self.round, self.weights, self.agent, more)

    def moved_to(self, pool: Pool, round: int, head: bytes) -> "Replica":
        """The replica of the same run with another state of the pool, for one pass over its directions.

        Args:
            pool: of a snapshot.
            round: of the snapshot.
            head: of the snapshot.

        Raises:
            WeightsOverflow: a weight would leave its range.
        """
        assert self.pool is not None
        weights = self._moved_with(self.pool, pool)
        return Replica(self._manifest, weights, round, head, self.agent, pool=pool)

    def _check_follows(self, entry: Entry) -> None:
        if entry.round != self.round:
            raise ChainError(f"commit of round {entry.round} where round {self.round} is due")
        if entry.previous != self.head:
            raise ChainError(
                f"commit of round {entry.round} follows {entry.previous.hex()}, this replica is at {self.head.hex()}"
            )

    def _names(
        self, commit: Commit, importances: NDArray[np.int32] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Whose each direction of a commit is, (n,), and its name, in the order of codes."""
        voices = np.asarray(commit.participants, np.int64)
        rounds = np.full(voices.size, commit.round, np.int64)
        rounds[np.isin(voices, commit.late)] -= 1
        num = num_codes_each(commit.participants, commit.movers, self._manifest)
        firsts = rounds * self._manifest.samples_per_round  # of `samples(round, num, samples_per_round)`
        in_order = np.repeat(firsts - np.cumsum(num) + num, num) + np.arange(num.sum())
        voices = np.repeat(voices, num)
        return voices, self._naming.names(voices, in_order, self.agent, importances)

    def _pool_after(self, pool: Pool, commit: Commit, coefficients: NDArray[np.int32]) -> Pool:
        """The pool after the next commit."""
        _, names = self._names(commit, pool.importances)
        schedule = self._manifest.schedule
        codes = codes_of(commit, self._manifest)
        return pool.after(names[:, 1], coefficients, codes, schedule.momentum, schedule.weight_decay)

    def _moved_with(self, pool: Pool, new: Pool) -> NDArray[np.int32]:
        """The weights of another state of the pool, (size,) int32, new. Raises WeightsOverflow."""
        weights = self.weights.copy()
        changed, amounts = pool.way_to(new)
        Bound(weights).check(weights, amounts)
        kernels.apply(weights, self._key, pool_names(changed, self.agent), amounts)
        return weights

    def _reverted(self, revert: Revert, history: History | None) -> tuple[NDArray[np.int32], Pool | None]:
        if history is None:
            raise HistoryNeeded(
                f"round {revert.round} takes back rounds from {revert.first} on; that needs their codes, or a snapshot"
            )
        weights, pool = self._sum_taken_back(revert, history)
        found = self._digest_at_rest(weights, pool)
        if found != revert.digest:
            raise ChainError(
                f"taking back rounds {revert.first} to {revert.last - 1} gives digest {found.hex()}, "
                f"round {revert.round} claims {revert.digest.hex()}"
            )
        return weights, pool

    def _sum_taken_back(self, revert: Revert, history: History) -> tuple[NDArray[np.int32], Pool | None]:
        """The weights without what a revert takes back, (size,) int32, new, and the pool.

        With momentum these are the aim without it: what rounds add to an aim is a sum, and the weights come to rest
        there. Weight decay has shrunk what a round did in every round since, so there is no exact inverse.
        """
        if self._weight_decay:
            raise ChainError(
                "nothing can be taken back in a run with weight decay: every round since has shrunk what is to go"
            )
        moves = _in_batches(self._taken_back(revert, history))
        if self.pool is not None:
            none = np.zeros(0, np.uint32), np.zeros(0, np.int32)
            pool = self.pool.at_rest(*none)
            for names, coefficients in moves:
                pool = pool.at_rest(names[:, 1], coefficients)
            return self._moved_with(self.pool, pool), pool
        weights = self._moved.copy()
        bound = Bound(weights)
        for names, coefficients in moves:
            bound.admit(weights, coefficients)
            kernels.apply(weights, self._key, names, coefficients)
        return weights, None

    def _digest_at_rest(self, weights: NDArray[np.int32], pool: Pool | None) -> bytes:
        """The digest after a revert."""
        state = [weights] if self._momentum else []
        return digest(self.round + 1, weights, self.agent, [*state, *(pool.vectors if pool else ())])

    def _taken_back(self, revert: Revert, history: History) -> Iterator[Move]:
        parts = inverse(revert, history)
        if self.pool is None or self.pool.importances is None:
            for part in parts:
                for entry in history(part.first, part.last):
                    if isinstance(entry, Commit):
                        yield self._move(entry, part, None)
            return
        # What a commit's samples drew follows from all codes before it.
        pool = pools.start(self._manifest)
        for entry in history(0, max((part.last for part in parts), default=0)):
            if not isinstance(entry, Commit):
                continue
            assert pool is not None
            for part in parts:
                if part.first <= entry.round < part.last:
                    yield self._move(entry, part, pool.importances)
            _, names = self._names(entry, pool.importances)
            pool = pool.seen(names[:, 1], codes_of(entry, self._manifest))

    def _move(self, commit: Commit, part: Part, importances: NDArray[np.int32] | None) -> Move:
        """A commit's directions and their coefficients times the factor of each participant, where that is not 0."""
        voices, names = self._names(commit, importances)
        coefficients = coefficients_of(commit, self._manifest)
        moves = coefficients.astype(np.int64) * part.factors_of(voices)
        if moves.size and np.abs(moves).max() > _INT32_MAX:
            raise WeightsOverflow(
                f"round {commit.round} would be taken back too often to be counted in 32 bits"
            )
        chosen = moves != 0
        return names[chosen], moves[chosen].astype(np.int32)


def _in_batches(moves: Iterable[Move]) -> Iterator[Move]:
    """The same moves, several joined into one."""
    batch: list[Move] = []
    size = 0
    for move in moves:
        batch.append(move)
        size += move[1].size
        if size >= _BATCH:
            yield _joined(batch)
            batch, size = [], 0
    if batch:
        yield _joined(batch)


def _joined(moves: list[Move]) -> Move:
    return np.concatenate([names for names, _ in moves]), np.concatenate([each for _, each in moves])
