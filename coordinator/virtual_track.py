"""One agent's track in a simulation: its ledger and snapshots in memory, the truth that a fault-free replay gives, and
replicas that look this truth up instead of computing it.
"""

from collections.abc import Callable
from typing import Final

from coordinator.conductor import Conductor, history_slice
from coordinator.config import ServiceConfig
from coordinator.membership import FLOW_WINDOW, Member
from coordinator.roster import Enrolment, Roster
from coordinator.snapshots import KEPT_NEWEST, Stored, offer
from transport.messages import PIECE_BYTES, Piece
from zo.commit import Commit, chain_digest, decode_entry
from zo.manifest import Manifest
from zo.packing import by_class, codes_of
from zo.pool import Pool
from zo.replica import Replica
from zo.snapshot import content_address, encode_snapshot
from zo.steps import Scale, step_rule
from zo.weights import zeros

_SNAPSHOT_ROUNDS: Final = 16


class VirtualTrack:
    """What is durable of one agent, and what must hold of it.

    Attributes:
        frames: the encoded commits.
        truth: the replica of a fault-free replay of them.
        origin: that of round 0.
        enrolled: everyone admitted.
        left: members whose last noted word is that they leave.
        round_times: how long each round took, in virtual seconds.
        opened_at: when the round in progress began, in virtual seconds.
    """

    def __init__(self, manifest: Manifest, agent: int, fail: Callable[[str], None]) -> None:
        """Begin.

        Args:
            manifest: of the run.
            agent: whose track it is.
            fail: called with what does not hold; does not return.
        """
        self.agent = agent
        self._manifest = manifest
        self._fail = fail
        self.truth = self.fresh()
        self.origin = self.fresh()
        self.frames: list[bytes] = []
        self.enrolled: list[Enrolment] = []
        self.left: set[int] = set()
        self.round_times: list[float] = []
        self.opened_at = 0.0
        self._heads = [self.truth.head]
        self._digests = {0: self.truth.digest()}
        self._checkpoints: dict[int, tuple[bytes, Scale]] = {}
        self._bytes_before = [0]
        self._codes_before = [0]
        self._newest: Stored | None = None
        self._snapshots: dict[bytes, bytes] = {}
        """By content, the newest few."""
        self._head_by_round: dict[int, tuple[Commit, bytes]] = {}

    # ---- replicas ---------------------------------------------------------------------------------------------------

    def fresh(self) -> Replica:
        """The weights of round 0."""
        return Replica(self._manifest, zeros(self._manifest.adapter.size), agent=self.agent)

    def shared(self, round: int = 0, head: bytes | None = None) -> "SharedReplica":
        """A replica at this point of the chain that takes its weights from the truth."""
        return SharedReplica(self, round, self._heads[0] if head is None else head)

    def head_of(self, commit: Commit) -> bytes:
        """The digest of a commit, computed once for all nodes that share the object."""
        known = self._head_by_round.get(commit.round)
        if known is None or known[0] is not commit:
            known = commit, chain_digest(commit.encode())
            self._head_by_round[commit.round] = known
        return known[1]

    def digest_at_head(self, round: int, head: bytes) -> bytes:
        """The digest of a replica at this point of the chain; that it is on another chain is a failure."""
        if self._heads[round] != head:
            self._fail(f"a node at round {round}{self._whose} is on another chain")
        return self._digests.get(round, bytes(16))

    # ---- what a service keeps ---------------------------------------------------------------------------------------

    def start_conductor(self, config: ServiceConfig, roster: Roster, now: float) -> Conductor:
        """A conductor that goes on where this ledger ends."""
        rule = step_rule(self._manifest)
        known = max(self._checkpoints, default=0)
        scale = self._checkpoints[known][1] if known else rule.start()
        for number in range(known, len(self.frames)):
            entry = decode_entry(self.frames[number])
            assert isinstance(entry, Commit)
            _, scale = rule.of_round(scale, number, *by_class(entry, self._manifest))
        truth = self.truth
        return Conductor(
            self._manifest,
            config,
            Replica(
                self._manifest, truth.weights, truth.round, truth.head, self.agent, truth.state, truth.pool
            ),
            scale,
            [
                Member(node=each.node, key=each.key, name=each.name, has_left=each.node in self.left)
                for each in self.enrolled
            ],
            roster,
            self._heads.__getitem__,
            lambda round: self._checkpoints[round][0] if round in self._checkpoints else None,
            lambda first, last: history_slice(self.frames[first : min(last, first + FLOW_WINDOW)]),
            lambda round: offer(self._newest, round, None, self._cost_since),
            lambda first, last: [],
            now,
        )

    def persist(self, commit: Commit, frame: bytes, now: float) -> None:
        """Keep a commit, and move the truth on."""
        truth, run = self.truth, self._manifest.run
        self.frames.append(frame)
        truth.apply(commit, frame)
        self._heads.append(truth.head)
        if truth.round % self._manifest.parity.digest_every == 0 or truth.round == run.rounds:
            self._digests[truth.round] = truth.digest()
        self._bytes_before.append(self._bytes_before[-1] + len(frame))
        self._codes_before.append(self._codes_before[-1] + codes_of(commit, self._manifest).size)
        if truth.round % _SNAPSHOT_ROUNDS == 0:
            self._save_snapshot()
        self.round_times.append(now - self.opened_at)
        self.opened_at = now

    def checkpoint(self, round: int, digest: bytes, scale: Scale) -> None:
        """Keep a digest of the coordinator's replica, which must be that of the truth."""
        self._checkpoints[round] = digest, scale
        if digest != self._digests[round]:
            self._fail(f"the coordinator's replica differs from a replay at round {round}{self._whose}")

    def piece(self, content: bytes, offset: int) -> Piece:
        """A piece of a snapshot."""
        data = self._snapshots.get(content, b"")
        return Piece(content, offset, len(data), data[offset : offset + PIECE_BYTES])

    def note(self, kind: str, node: int) -> None:
        """Keep what a service reads from its events after a restart: who left."""
        if kind == "left":
            self.left.add(node)
        elif kind == "joined":
            self.left.discard(node)

    # ---- what must hold ---------------------------------------------------------------------------------------------

    def is_final(self, replica: Replica) -> bool:
        """Whether a node's replica is that of the end."""
        return replica.digest() == self._digests.get(self._manifest.run.rounds)

    def check(self, final: Replica) -> None:
        """No (node, sample) may have been applied twice, and a fault-free replay must give the same weights."""
        replay = self.fresh()
        seen: set[tuple[int, int]] = set()
        for frame in self.frames:
            entry = decode_entry(frame)
            assert isinstance(entry, Commit)
            for node in entry.participants:
                name = node, entry.round - (node in entry.late)
                if name in seen:
                    self._fail(
                        f"the report of node {node} for round {name[1]}{self._whose} was applied twice"
                    )
                seen.add(name)
            replay.apply(entry, frame)
        if replay.digest() != final.digest():
            self._fail(f"a replay of the ledger{self._whose} differs from the coordinator's replica")

    @property
    def _whose(self) -> str:
        return f" of agent {self.agent}" if self._manifest.agents.count > 1 else ""

    def _cost_since(self, first: int) -> tuple[int, int]:
        return (
            self._bytes_before[-1] - self._bytes_before[first],
            self._codes_before[-1] - self._codes_before[first],
        )

    def _save_snapshot(self) -> None:
        data = encode_snapshot(self.truth, self._manifest, with_weights=False)
        self._newest = Stored(self.truth.round, content_address(data), len(data))
        self._snapshots[self._newest.content] = data
        if len(self._snapshots) > KEPT_NEWEST:
            del self._snapshots[next(iter(self._snapshots))]


class SharedReplica(Replica):
    """A replica that looks the next state up instead of computing it; equal chains have equal weights (law 1)."""

    def __init__(self, track: VirtualTrack, round: int, head: bytes) -> None:
        self._track = track
        self.agent = track.agent
        self.round = round
        self.head = head
        self.weights, self.pool = track.origin.weights, track.origin.pool  # where a snapshot of a pool starts

    def apply(self, entry: object, frame: bytes | None = None, history: object = None) -> None:
        """Step along the chain; a commit that does not follow is refused as by a real replica."""
        assert isinstance(entry, Commit)
        self._check_follows(entry)
        self.head = self._track.head_of(entry)
        self.round += 1

    def moved_to(self, pool: Pool, round: int, head: bytes) -> Replica:
        """As a real replica."""
        return self._track.origin.moved_to(pool, round, head)

    def digest(self) -> bytes:
        """What a real replica at this point of the chain has."""
        return self._track.digest_at_head(self.round, self.head)
