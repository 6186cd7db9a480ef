"""A coordinator without sockets, files or clock: the real conductor over a ledger in memory."""

from collections.abc import Callable
from functools import partial

import pytest

from coordinator.conductor import Conductor, history_slice
from coordinator.config import ServiceConfig
from coordinator.effects import (
    Audited,
    Effect,
    Enrol,
    Note,
    Persist,
    PersistCheckpoint,
    Quarantine,
    Send,
    SendPiece,
)
from coordinator.membership import Member
from coordinator.roster import Enrolment, Roster
from transport.messages import Commit, History, Offer, Sealed, Welcome, decode_from_coordinator
from transport.seals import Signer
from zo.commit import chain_digest, decode_entry
from zo.manifest import Manifest
from zo.packing import by_class
from zo.replica import Replica
from zo.steps import step_rule
from zo.weights import zeros

SIGNER = Signer(bytes(range(32)))
"""Of a run whose manifest names it."""


class VirtualCoordinator:
    """Carries out a conductor's effects in memory, and checks law 4 with every one of them.

    `stop_before` makes it die like a process: the effect with that number, and all after it, never happen.
    """

    def __init__(self, manifest: Manifest, config: ServiceConfig | None = None) -> None:
        self.manifest = manifest
        self.config = config or ServiceConfig()
        self.frames: list[bytes] = []
        self.seals: list[bytes] = []
        self.audits: list[dict[int, tuple[float, float] | None]] = []
        self.checkpoints = {}
        self.enrolled = {}
        self.quarantined: set[int] = set()
        self.pieces: list[SendPiece] = []
        self.notes: list[Note] = []
        self.outbox: list[tuple[bytes, object]] = []
        self.now = 0.0
        self.start()

    def start(self) -> None:
        """Start, or start again, from what is durable."""
        replica, rule = self.replay(), step_rule(self.manifest)
        scale = rule.start()
        for number, frame in enumerate(self.frames):
            _, scale = rule.of_round(scale, number, *by_class(decode_entry(frame), self.manifest))
        self.conductor = Conductor(
            self.manifest,
            self.config,
            replica,
            scale,
            [
                Member(node=node, key=key, name=name, has_left=self.visits(node)[-1:] == ["left"])
                for node, (key, name) in self.enrolled.items()
            ],
            Roster(
                Enrolment(node, key, name, node in self.quarantined)
                for node, (key, name) in self.enrolled.items()
            ),
            lambda n: chain_digest(self.frames[n - 1]) if n else self.manifest.run_id,
            lambda n: self.checkpoints.get(n, (None,))[0],
            lambda first, last: history_slice(self.frames[first:last]),
            self.offer_for,
            self.digests_between,
            self.now,
            partial(SIGNER.seal, self.manifest.run_id) if self.manifest.run.signer else None,
            self.audit_sample,
        )
        self.settle()

    def audit_sample(self, round: int) -> int | None:
        """The sample of a public audit; tests may replace it."""
        return None

    def offer_for(self, round: int) -> Offer | None:
        """What a node at this round is offered; tests may replace it."""
        return None

    def digests_between(self, first: int, last: int) -> list[bytes]:
        """The digests after first..last commits, replayed."""
        replica, digests = self.replay(first), []
        for frame in self.frames[first:last]:
            digests.append(replica.digest())
            replica.apply(decode_entry(frame), frame)
        return [*digests, replica.digest()]

    def replay(self, rounds: int | None = None) -> Replica:
        """A fault-free replay of the ledger."""
        replica = Replica(self.manifest, zeros(self.manifest.adapter.size))
        for frame in self.frames[:rounds]:
            replica.apply(decode_entry(frame), frame)
        return replica

    def message(self, session: bytes, key: bytes, message: object) -> list[object]:
        """What that session is sent in answer."""
        return self.carry_out(self.conductor.on_message(session, key, message, self.now), session)

    def tick(self, now: float | None = None) -> None:
        self.now = self.now if now is None else now
        self.carry_out(self.conductor.on_tick(self.now))

    def unsent(self, session: bytes) -> None:
        self.carry_out(self.conductor.on_unsent(session, self.now))

    def settle(self) -> None:
        for effect in self.conductor.settle():
            self.do(effect)

    def carry_out(self, effects: list[Effect], session: bytes = b"") -> list[object]:
        before = len(self.outbox)
        for effect in effects:
            self.do(effect)
        self.settle()
        return [message for to, message in self.outbox[before:] if to == session]

    def do(self, effect: Effect) -> None:
        match effect:
            case Send(session, kind, frame):
                message = decode_from_coordinator(frame)
                assert kind == type(message).__name__
                self.check_durable(message)
                self.outbox.append((session, message))
            case Persist(commit, frame, seal):
                self.seals.append(seal)
                assert commit.round == len(self.frames)
                assert frame == commit.encode()
                self.frames.append(frame)
            case PersistCheckpoint(round, digest, scale):
                assert round <= len(self.frames)
                self.checkpoints[round] = (digest, scale)
            case Enrol(node, key, name):
                assert node not in self.enrolled
                self.enrolled[node] = (key, name)
            case Audited(losses_by_node):
                self.audits.append(losses_by_node)
            case Quarantine(node):
                self.quarantined.add(node)
            case SendPiece():
                self.pieces.append(effect)
            case Note():
                self.notes.append(effect)

    def check_durable(self, message: object) -> None:
        """Law 4: nothing is visible before it is durable."""
        match message:
            case Commit():
                assert self.frames[message.round] == message.encode()
            case Sealed(round, head):
                assert chain_digest(self.frames[round - 1]) == head
            case History(frames):
                first = decode_entry(frames[0]).round
                assert tuple(self.frames[first : first + len(frames)]) == frames
            case Welcome():
                assert message.node in self.enrolled
                assert message.round == len(self.frames)

    def visits(self, node: int) -> list[str]:
        """What was noted of a node's coming and going, as the ledger keeps it."""
        return [note.kind for note in self.notes if note.node == node and note.kind in ("joined", "left")]

    def noted(self, kind: str) -> list[str]:
        return [note.text for note in self.notes if note.kind == kind]

    @property
    def commits(self) -> list[Commit]:
        return [decode_entry(frame) for frame in self.frames]


@pytest.fixture(scope="session")
def virtual_coordinator() -> Callable[..., VirtualCoordinator]:
    return VirtualCoordinator
