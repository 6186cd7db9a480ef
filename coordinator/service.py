"""The service: one loop that receives, hands to the conductor, and does what it says, in its order."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

import msgspec
import numpy as np

from coordinator.conductor import Conductor, history_slice
from coordinator.config import ServiceConfig
from coordinator.effects import Effect, Enrol, Note, Persist, PersistCheckpoint, Quarantine, Send, SendPiece
from coordinator.ledger import Checkpoint, Enrolment, Ledger, LedgerError, StorageError
from coordinator.limits import Limits
from coordinator.membership import FLOW_WINDOW, Event, Member, Presence
from coordinator.rundir import RunDirectory
from coordinator.snapshots import MAX_REPLAY_WORK, is_due
from coordinator.status import MemberStatus, Status, stored_status
from transport.messages import HISTORY_BYTES, Hello, Offer, Piece, WireError, decode_from_node, encode
from transport.meter import Count
from transport.sockets import CoordinatorSocket, Sent
from zo.commit import Commit, decode_entry
from zo.manifest import Manifest
from zo.replica import Replica
from zo.snapshot import encode_snapshot
from zo.steps import Scale, step_rule
from zo.weights import WeightsOverflow

STATUS_EVERY_S: Final = 1.0
SNAPSHOT_CHECK_S: Final = 5.0
SPEED_MEMORY_S: Final = 20.0
SPEED_MEMORY_ROUNDS: Final = 8
_FAREWELL_S: Final = 30.0
"""How long a finished service waits for its last nodes to fetch the end and say that they leave."""
_NOTED_ONE_BY_ONE: Final = {"malformed": 16, "misfit": 16, "refused": 16, "flooded": 16}
"""How many events of a kind are noted in the ledger after a start: a peer must not be able to fill the disk. Kinds that
are not named here are bounded by the number of rounds, or as below."""
_NOTED_OF_A_NODE: Final = {"joined": 1024, "left": 1024, "lost": 1024, "replaced": 1024, "started-over": 1024}
"""The same for each node: what a node may do often, but not without bound."""


class Speed:
    """Rounds a second over the recent past: `SPEED_MEMORY_S` seconds or `SPEED_MEMORY_ROUNDS`, whichever is longer."""

    def __init__(self, round: int, now: float) -> None:
        self._marks = deque([(round, now)])
        self._now = now

    def observe(self, round: int, now: float) -> None:
        """There are `round` commits at the time `now`, in seconds."""
        self._now = now
        if round > self._marks[-1][0]:
            self._marks.append((round, now))
        while len(self._marks) > 2:
            next_round, next_at = self._marks[1]
            if now - next_at < SPEED_MEMORY_S or round - next_round < SPEED_MEMORY_ROUNDS:
                return
            self._marks.popleft()

    @property
    def rounds_per_s(self) -> float:
        """The mean; 0 before any time has passed."""
        first_round, first_at = self._marks[0]
        elapsed = self._now - first_at
        return (self._marks[-1][0] - first_round) / elapsed if elapsed > 0 else 0.0


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
        LedgerError: the ledger is damaged.
        SnapshotError, RunDirectoryError: the weights of round 0 cannot be had.
    """
    total = ledger.num_commits()
    replica, origin = directory.newest(manifest, ledger)
    for frame in ledger.frames(replica.round, total):
        try:
            replica.apply(decode_entry(frame), frame, ledger.entries)
        except (ValueError, WeightsOverflow) as error:
            raise LedgerError(f"{ledger.path} is damaged at round {replica.round}: {error}") from error
        progress(replica.round, total)
    rule = step_rule(manifest)
    checkpoint = ledger.last_checkpoint()
    start, scale = (checkpoint.round, checkpoint.scale) if checkpoint else (0, rule.start())
    for entry in ledger.entries(start, total):
        if isinstance(entry, Commit):
            _, scale = rule.advance(scale, entry.round, np.frombuffer(entry.codes, np.int8))
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
    ) -> None:
        self._directory = directory
        self._manifest = manifest
        self._config = config
        self._ledger = ledger
        self._end = end
        self._speed = Speed(replica.round, time.monotonic())
        before = stored_status(ledger)
        self._last_loss = before.loss if before else None
        self._num_malformed = before.malformed_frames if before else 0
        self._gone: list[bytes] = []
        self._limits = Limits()
        self._noted: Counter[tuple[str, int | None]] = Counter()
        # A snapshot that is no part of the ledger (one restored from a backup, say) must not be offered.
        newest, _ = directory.newest_snapshot(manifest, ledger)
        self._snapshot = None if newest is None else newest[0]
        self.conductor = Conductor(
            manifest,
            config,
            replica,
            scale,
            self._known_members(before),
            ledger.head_after,
            ledger.digest_at,
            lambda first, last: history_slice(islice(ledger.frames(first, last), FLOW_WINDOW)),
            self._offer_for,
            self._digests_between,
            time.monotonic(),
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
        try:
            self._loop(should_stop, stay, show)
        except StorageError:
            raise  # nothing more can be written, and why is in this error
        except BaseException:
            self._stop(show)
            raise
        self._stop(show)

    def _loop(self, should_stop: Callable[[], bool], stay: bool, show: Callable[[Status, str], None]) -> None:
        self._save_snapshot_if_due()
        status_at = snapshot_at = time.monotonic()
        over_since: float | None = None
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
                show(self.status, self.conductor.reason(time.monotonic()))
            if now - snapshot_at >= SNAPSHOT_CHECK_S:
                snapshot_at = now
                self._save_snapshot_if_due()
            if self.conductor.is_over and not stay:
                over_since = now if over_since is None else over_since
                if not self.conductor.present or now - over_since > _FAREWELL_S:
                    return

    def _stop(self, show: Callable[[Status, str], None]) -> None:
        """Leave a fresh snapshot and status behind."""
        self._save_snapshot()
        self._save_status()
        show(self.status, self.conductor.reason(time.monotonic()))

    def _handle(self, session: bytes, key: bytes, frame: bytes) -> None:
        member = self.conductor.session_member(session)
        now = time.monotonic()
        if not self._limits.may_speak(key, now):
            self._cut(session, "sends more than it is asked for")
            return
        try:
            message = decode_from_node(frame)
        except WireError as error:
            self._num_malformed += 1
            self._note("malformed", None if member is None else member.node, str(error)[:500])
            return
        if isinstance(message, Hello) and not self._limits.may_greet(key, now):
            self._cut(session, "says hello without end")
            return
        effects = self.conductor.on_message(session, key, message, now)
        member = self.conductor.session_member(session) or member
        if member is not None:
            member.up.add(len(frame), curve=True)
        self._carry_out(effects)

    def _cut(self, session: bytes, why: str) -> None:
        """End a connection over which comes more than a node that keeps to the protocol would send."""
        member = self.conductor.session_member(session)
        name = "a node" if member is None else f"node {member.node} ({member.name})"
        self._note("flooded", None if member is None else member.node, f"{name} {why}: its connection is cut")
        self._end.cut(session)
        self._carry_out(self.conductor.on_unsent(session, time.monotonic()))

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            self._do(effect)
        for effect in self.conductor.settle():
            self._do(effect)
        while self._gone:
            self._carry_out(self.conductor.on_unsent(self._gone.pop(), time.monotonic()))

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send(session, kind, frame):
                # Whoever is still known under this session pays for the frame; a refused stranger is not counted.
                member = self.conductor.session_member(session)
                if member is not None:
                    member.down.add(len(frame), curve=True)
                    self._limits.was_sent(member.key, kind, len(frame))
                if self._end.send(session, frame) is not Sent.OK:
                    self._gone.append(session)
            case SendPiece(session, content, offset):
                num_bytes, data = self._directory.snapshots.piece(content, offset)
                if num_bytes == 0 and self._snapshot is not None and content == self._snapshot.content:
                    self._snapshot = None  # it was damaged on disk: the next offer must be another
                    self._save_snapshot()
                frame = encode(Piece(content, offset, num_bytes, data))
                self._do(Send(session, "Piece", frame))
            case Persist(commit, frame):
                self._ledger.append(commit, frame)
            case Quarantine(node):
                self._ledger.set_quarantined(node, True)
            case PersistCheckpoint(round, digest, scale):
                self._ledger.checkpoint(Checkpoint(round, digest, scale))
            case Enrol(node, key, name):
                self._ledger.enrol(Enrolment(node, key, name))
            case Note(kind, node, text):
                self._note(kind, node, text)

    def _note(self, kind: str, node: int | None, text: str) -> None:
        """Note an event, unless there have been very many of its kind since the start."""
        key: tuple[str, int | None] = (kind, node if kind in _NOTED_OF_A_NODE else None)
        limit = _NOTED_ONE_BY_ONE.get(kind) or _NOTED_OF_A_NODE.get(kind)
        if limit is not None:
            self._noted[key] += 1
            if self._noted[key] > limit:
                return
            if self._noted[key] == limit:
                text += " (further ones are not noted until the next start)"
        self._ledger.note(self.conductor.round, kind, node, text)

    # ---- what others may read ---------------------------------------------------------------------------------------

    def _known_members(self, before: Status | None) -> list[Member]:
        """Everyone enrolled, with the byte counts that the last status carried."""
        counts = {m.node: m for m in before.members} if before else {}
        divergences = self._ledger.divergences()
        members = []
        for node, key, name, is_quarantined in self._ledger.members():
            member = Member(node=node, key=key, name=name, is_quarantined=is_quarantined)
            if node in divergences:
                member.num_divergences, member.must_start_over = divergences[node]
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
            loss=self._mean_loss(),
            rounds_per_s=self._speed.rounds_per_s,
            malformed_frames=self._num_malformed,
            updated_at=time.time(),
        )

    def _mean_loss(self) -> float | None:
        """Of those who are here; while nobody is, what it was when somebody was."""
        losses = [member.loss for member in self.conductor.present if member.loss is not None]
        if losses:
            self._last_loss = sum(losses) / len(losses)
        return self._last_loss

    def _save_status(self) -> None:
        if self.conductor.present:
            self._speed.observe(self.conductor.round, time.monotonic())
        else:  # the time without nodes is no measure of their speed
            self._speed = Speed(self.conductor.round, time.monotonic())
        self.status = self._make_status()
        self._ledger.set_status(msgspec.json.encode(self.status))

    # ---- snapshots --------------------------------------------------------------------------------------------------

    def _save_snapshot(self) -> None:
        """Make a snapshot of the replica as it stands, unless there is one."""
        replica = self.conductor.replica
        if replica.round and (self._snapshot is None or self._snapshot.round < replica.round):
            data = encode_snapshot(replica, self._manifest)
            self._snapshot = self._directory.snapshots.save(replica.round, data)

    def _save_snapshot_if_due(self) -> None:
        first, num_bytes = (self._snapshot.round, self._snapshot.num_bytes) if self._snapshot else (0, 0)
        tail_bytes, tail_codes = self._ledger.cost_since(first)
        last_revert = self._ledger.last_revert()
        is_bridge = last_revert is not None and last_revert >= first
        if is_bridge or is_due(num_bytes, tail_bytes, tail_codes, self._manifest.adapter.size):
            self._save_snapshot()

    def _offer_for(self, round: int) -> Offer | None:
        snapshot = self._snapshot
        if snapshot is None or snapshot.round <= round:
            return None
        replay_bytes, replay_codes = self._ledger.cost_since(round)
        tail_bytes, tail_codes = self._ledger.cost_since(snapshot.round)
        last_revert = self._ledger.last_revert()
        can_replay = last_revert is None or last_revert < round
        if can_replay and replay_bytes <= HISTORY_BYTES:
            return None  # one or two frames: not worth a choice
        return Offer(
            snapshot.content,
            snapshot.round,
            snapshot.num_bytes,
            tail_bytes,
            tail_codes,
            replay_bytes,
            replay_codes,
            can_replay,
        )

    def _digests_between(self, first: int, last: int) -> list[bytes]:
        """The digests after first..last commits, replayed from a snapshot; none if that would take long."""
        if not 0 <= first <= last <= self._ledger.num_commits():
            return []
        replica, _ = self._directory.newest(self._manifest, self._ledger, before=first)
        before, codes = self._ledger.cost_since(replica.round)[1], self._ledger.cost_since(last)[1]
        if (before - codes) * self._manifest.adapter.size > 8 * MAX_REPLAY_WORK:
            return []
        digests = [replica.digest()] if replica.round == first else []
        for entry in self._ledger.entries(replica.round, last):
            replica.apply(entry, history=self._ledger.entries)
            if replica.round >= first:
                digests.append(replica.digest())
        return digests

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
        quarantined=member.is_quarantined,
        divergences=member.num_divergences,
        messages_up=member.up.messages,
        payload_bytes_up=member.up.payload_bytes,
        zmtp_bytes_up=member.up.zmtp_bytes,
        messages_down=member.down.messages,
        payload_bytes_down=member.down.payload_bytes,
        zmtp_bytes_down=member.down.zmtp_bytes,
    )
