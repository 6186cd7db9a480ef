"""The service: one loop that receives, hands to the conductor, and does what it says, in its order."""

import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

import msgspec
import numpy as np

from coordinator.conductor import (
    Conductor,
    Effect,
    Enrol,
    Note,
    Persist,
    PersistCheckpoint,
    Send,
    history_slice,
)
from coordinator.config import ServiceConfig
from coordinator.ledger import Checkpoint, Enrolment, Ledger
from coordinator.membership import FLOW_WINDOW, Event, Member, Presence
from coordinator.rundir import RunDirectory
from coordinator.status import MemberStatus, Status
from transport.messages import WireError, decode_from_node
from transport.meter import Count
from transport.sockets import CoordinatorSocket, Sent
from zo.commit import decode_commit
from zo.manifest import Manifest
from zo.replica import Replica
from zo.steps import Scale, step_rule

STATUS_EVERY_S: Final = 1.0
SNAPSHOT_EVERY_S: Final = 30.0
_FAREWELL_S: Final = 30.0
"""How long a finished service waits for its last nodes to fetch the end and say that they leave."""
_MALFORMED_NOTED: Final = 16
"""Malformed frames that are noted one by one in the ledger; later ones are only counted."""


def restore(
    directory: RunDirectory, manifest: Manifest, ledger: Ledger, progress: Callable[[int, int], None]
) -> tuple[Replica, Scale, str]:
    """Replica and step rule as the ledger leaves them, and in words where the replay began.

    Args:
        directory: of the run.
        manifest: of the run.
        ledger: of the run.
        progress: called with (commits replayed, commits in all).

    Raises:
        LedgerError, ValueError: the ledger is damaged.
    """
    total = ledger.num_commits()
    replica, origin = directory.newest(manifest, ledger)
    for frame in ledger.frames(replica.round, total):
        replica.apply(decode_commit(frame), frame)
        progress(replica.round, total)
    rule = step_rule(manifest)
    checkpoint = ledger.last_checkpoint()
    start, scale = (checkpoint.round, checkpoint.scale) if checkpoint else (0, rule.start())
    for number, frame in enumerate(ledger.frames(start, total), start):
        _, scale = rule.advance(scale, number, np.frombuffer(decode_commit(frame).codes, np.int8))
    return replica, scale, origin


class Service:
    """A run being served.

    Attributes:
        status: what `zo-coordinator status` shows, renewed every second.
    """

    def __init__(
        self,
        directory: RunDirectory,
        manifest: Manifest,
        config: ServiceConfig,
        ledger: Ledger,
        replica: Replica,
        scale: Scale,
        end: CoordinatorSocket,
        curve: bool = True,
    ) -> None:
        self._directory = directory
        self._manifest = manifest
        self._config = config
        self._ledger = ledger
        self._end = end
        self._curve = curve
        self._started_at = time.monotonic()
        self._first_round = replica.round
        self._num_malformed = 0
        self._gone: list[bytes] = []
        self.conductor = Conductor(
            manifest,
            config,
            replica,
            scale,
            self._known_members(),
            ledger.head_after,
            ledger.digest_at,
            lambda first, last: history_slice(islice(ledger.frames(first, last), FLOW_WINDOW)),
            self._started_at,
        )
        self.status = self._make_status()

    def run(self, should_stop: Callable[[], bool], stay: bool, show: Callable[[Status, str], None]) -> None:
        """Serve until the run is over and everyone has left, or `should_stop`.

        Args:
            should_stop: asked a few times a second.
            stay: go on serving the finished run to late nodes.
            show: called about once a second with the status and what the round waits for.

        Raises:
            StorageError: the ledger cannot be written; nothing unwritten was shown to anybody.
            WeightsOverflow: the next commit would move a weight out of range; it was not made.
        """
        status_at = snapshot_at = time.monotonic()
        over_since: float | None = None
        try:
            while not should_stop():
                now = time.monotonic()
                wake_at = self.conductor.wake_at()
                wait = 0.25 if wake_at is None else min(max(wake_at - now, 0.0), 0.25)
                for arrival in self._end.receive(wait):
                    self._handle(arrival.session, arrival.key, arrival.frame)
                now = time.monotonic()
                self._carry_out(self.conductor.on_tick(now))
                if now - status_at >= STATUS_EVERY_S:
                    status_at = now
                    self._save_status()
                    show(self.status, self.conductor.last_reason)
                if now - snapshot_at >= SNAPSHOT_EVERY_S:
                    snapshot_at = now
                    self._save_snapshot()
                if self.conductor.is_over and not stay:
                    over_since = now if over_since is None else over_since
                    if not self.conductor.present or now - over_since > _FAREWELL_S:
                        return
        finally:
            # A clean stop leaves a fresh status and snapshot; after a storage failure neither can be hoped for.
            self._save_snapshot()
            self._save_status()
            show(self.status, self.conductor.last_reason)

    def _handle(self, session: bytes, key: bytes, frame: bytes) -> None:
        member = self.conductor.session_member(session)
        try:
            message = decode_from_node(frame)
        except WireError as error:
            self._num_malformed += 1
            if self._num_malformed <= _MALFORMED_NOTED:
                node = None if member is None else member.node
                self._ledger.note(self.conductor.round, "malformed", node, str(error)[:500])
            return
        effects = self.conductor.on_message(session, key, message, time.monotonic())
        member = self.conductor.session_member(session) or member
        if member is not None:
            member.up.add(len(frame), self._curve)
        self._carry_out(effects)

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            self._do(effect)
        for effect in self.conductor.settle():
            self._do(effect)
        while self._gone:
            self._carry_out(self.conductor.on_unsent(self._gone.pop(), time.monotonic()))

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send(session, _, frame):
                # Whoever is still known under this session pays for the frame; a refused stranger is not counted.
                member = self.conductor.session_member(session)
                if member is not None:
                    member.down.add(len(frame), self._curve)
                if self._end.send(session, frame) is not Sent.OK:
                    self._gone.append(session)
            case Persist(commit, frame):
                self._ledger.append(commit.round, frame)
            case PersistCheckpoint(round, digest, scale):
                self._ledger.checkpoint(Checkpoint(round, digest, scale))
            case Enrol(node, key, name):
                self._ledger.enrol(Enrolment(node, key, name))
            case Note(kind, node, text):
                self._ledger.note(self.conductor.round, kind, node, text)

    # ---- what others may read ---------------------------------------------------------------------------------------

    def _known_members(self) -> list[Member]:
        """Everyone enrolled, with the byte counts that the last status carried."""
        stored = self._ledger.status()
        counts = {m.node: m for m in msgspec.json.decode(stored, type=Status).members} if stored else {}
        members = []
        for node, key, name in self._ledger.members():
            member = Member(node=node, key=key, name=name)
            if node in counts:
                known = counts[node]
                member.name = known.name
                member.up = Count(known.messages_up, known.payload_bytes_up, known.zmtp_bytes_up)
                member.down = Count(known.messages_down, known.payload_bytes_down, known.zmtp_bytes_down)
            members.append(member)
        return members

    def _make_status(self) -> Status:
        conductor = self.conductor
        members = [_member_status(member) for member in conductor.members.values()]
        losses = [m.loss for m in conductor.present if m.loss is not None]
        elapsed = time.monotonic() - self._started_at
        rate = (conductor.round - self._first_round) / elapsed if elapsed > 0 else 0.0
        return Status(
            run=self._manifest.run_id.hex(),
            name=self._manifest.run.name,
            serving=True,
            round=conductor.round,
            rounds=self._manifest.run.rounds,
            digest=conductor.replica.digest().hex(),
            digest_round=conductor.replica.round,
            live=sum(m.presence is Presence.LIVE for m in conductor.present),
            members=members,
            payload_bytes_up=sum(m.payload_bytes_up for m in members),
            payload_bytes_down=sum(m.payload_bytes_down for m in members),
            zmtp_bytes_up=sum(m.zmtp_bytes_up for m in members),
            zmtp_bytes_down=sum(m.zmtp_bytes_down for m in members),
            loss=sum(losses) / len(losses)
            if losses
            else (self.status.loss if hasattr(self, "status") else None),
            rounds_per_s=rate,
            malformed_frames=self._num_malformed,
            updated_at=time.time(),
        )

    def _save_status(self) -> None:
        self.status = self._make_status()
        self._ledger.set_status(msgspec.json.encode(self.status))

    def _save_snapshot(self) -> None:
        self._directory.save_snapshot(self.conductor.replica, self._manifest)

    def close(self) -> None:
        """Say in the status that nobody serves any more."""
        for member in self.conductor.present:
            member.note(Event.LOST)
        self.status = msgspec.structs.replace(self._make_status(), serving=False)
        self._ledger.set_status(msgspec.json.encode(self.status))


def _member_status(member: Member) -> MemberStatus:
    return MemberStatus(
        node=member.node,
        name=member.name,
        key=member.key.hex(),
        presence=member.presence.value,
        round=member.acknowledged,
        digest_round=member.digest_round,
        digest=None if member.digest is None else member.digest.hex(),
        loss=member.loss,
        latency_s=None if member.latency is None else member.latency.mean_s,
        divergences=member.num_divergences,
        messages_up=member.up.messages,
        payload_bytes_up=member.up.payload_bytes,
        zmtp_bytes_up=member.up.zmtp_bytes,
        messages_down=member.down.messages,
        payload_bytes_down=member.down.payload_bytes,
        zmtp_bytes_down=member.down.zmtp_bytes,
    )
