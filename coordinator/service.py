"""The service: one loop that receives, hands to the conductors, and does what they say, in its order."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import msgspec
import numpy as np

from coordinator.archive import Archive, Restored
from coordinator.conductor import Conductor
from coordinator.conductors import AgentEffect, Conductors
from coordinator.config import ServiceConfig
from coordinator.consensus import Consensus, audit_sample, tolerance
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
from coordinator.influence import Finding, Influence
from coordinator.invitations import REVOKED, Standing, admittance, redemption, rotation
from coordinator.keyring import Keyring
from coordinator.ledger import Checkpoint, Ledger, StorageError
from coordinator.limits import Limits
from coordinator.membership import Event, Member, Presence
from coordinator.pace import Latency
from coordinator.roster import Enrolment, Roster
from coordinator.rundir import RunDirectory
from coordinator.status import AgentStatus, MemberStatus, Status, status_of, stored_status
from transport.brevity import Abbreviator
from transport.messages import (
    Admitted,
    Hello,
    Redeem,
    Refuse,
    Rotate,
    WireError,
    address,
    addressed,
    decode_from_node,
    encode,
)
from transport.meter import Count
from transport.seals import Signer
from transport.sockets import CoordinatorSocket, Sent
from transport.squeezing import squeezed
from zo.commit import genesis
from zo.manifest import Manifest, usual_estimator

_LAST_WORD_S: Final = 1.0
STATUS_EVERY_S: Final = 1.0
SNAPSHOT_CHECK_S: Final = 5.0
SPEED_MEMORY_S: Final = 20.0
SPEED_MEMORY_ROUNDS: Final = 8
_SQUEEZED: Final = frozenset(("Commit", "History"))
"""What may be worth squeezing: pieces of snapshots are compressed already, and the rest is short."""
_NOTED_ONE_BY_ONE: Final = {"malformed": 16, "misfit": 16, "refused": 16, "flooded": 16}
"""How many events of a kind are noted in the ledger after a start, for each agent: a peer must not be able to fill the
disk. Kinds that are not named here are bounded by the number of rounds, or as below."""
_NOTED_OF_A_NODE: Final = {
    "joined": 1024,
    "left": 1024,
    "lost": 1024,
    "replaced": 1024,
    "started-over": 1024,
    "capped": 8,
}
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


@dataclass
class _Track:
    """One agent's part of the service."""

    conductor: Conductor
    archive: Archive
    speed: Speed
    influence: Influence
    consensus: Consensus
    last_loss: float | None
    """The mean of those who were here last."""
    abbreviator: Abbreviator = field(default_factory=Abbreviator)
    digest: tuple[int, str] = field(init=False)
    """For the status: the digest taken last, and after how many commits. Hashing all weights every second would cost
    more than the rounds."""

    def __post_init__(self) -> None:
        """Begin with the digest of now."""
        self.take_digest()

    def take_digest(self) -> None:
        """Renew what the status shows."""
        replica = self.conductor.replica
        self.digest = replica.round, replica.digest().hex()

    def mean_loss(self) -> float | None:
        """Of those who are here; while nobody is, what it was when somebody was."""
        losses = [member.loss for member in self.conductor.present if member.loss is not None]
        if losses:
            self.last_loss = sum(losses) / len(losses)
        return self.last_loss

    def observe_speed(self, now: float) -> None:
        """Take note of how far it is."""
        if self.conductor.present:
            self.speed.observe(self.conductor.round, now)
        else:  # the time without nodes is no measure of their speed
            self.speed = Speed(self.conductor.round, now)


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
        restored: Sequence[Restored],
        end: CoordinatorSocket,
        keyring: Keyring,
        signer: Signer | None = None,
        audit_secret: bytes = b"",
    ) -> None:
        """Go on where the ledger ends.

        Args:
            directory: of the run, locked by the caller.
            manifest: of the run.
            config: how it is operated.
            ledger: of the run.
            restored: each agent's replica and step rule, in their order.
            end: where nodes connect.
            keyring: which keys may join.
            signer: who signs the ledger; None if nothing is signed.
            audit_secret: decides when nodes are audited, and along what; they must not know it.
        """
        self._manifest = manifest
        self._ledger = ledger
        self._end = end
        before = stored_status(ledger)
        self._num_malformed = before.malformed_frames if before else 0
        self._gone: list[bytes] = []
        self._keyring = keyring
        self._capacity = config.capacity
        self._may_quarantine = config.quarantine_out_of_line
        self._findings: deque[tuple[int, Finding]] = deque()
        self._to_cut: deque[tuple[float, bytes]] = deque()
        """When connections end of sessions that have been told to go, if they do not go by themselves."""
        self._limits = Limits(manifest.agents.count)
        self._squeezed_last = b"", b""
        self._noted: Counter[tuple[int, str, int | None]] = Counter()
        self._roster = Roster(ledger.nodes())
        now = time.monotonic()
        self._tracks = []
        for agent, (replica, scale, _) in enumerate(restored):
            archive = Archive(directory, manifest, ledger.track(agent))
            conductor = Conductor(
                manifest,
                config,
                replica,
                scale,
                _known_members(archive.ledger, before),
                self._roster,
                archive.ledger.head_after,
                archive.ledger.digest_at,
                archive.history,
                archive.offer_for,
                archive.digests_between,
                now,
                None if signer is None else partial(signer.seal, genesis(manifest.run_id, agent)),
                partial(audit_sample, audit_secret, agent, config.audit_every if manifest.audit.rows else 0),
            )
            influence = Influence(
                manifest.probe.sides, manifest.codes.bits, comes_back=manifest.directions.policy == "pool"
            )
            consensus = Consensus(tolerance(manifest))
            last_loss = before.loss_of(agent) if before else None
            self._tracks.append(
                _Track(conductor, archive, Speed(replica.round, now), influence, consensus, last_loss)
            )
        self.conductors = Conductors([track.conductor for track in self._tracks])
        self.status = self._make_status()

    def run(self, should_stop: Callable[[], bool], stay: bool, show: Callable[[Status, str], None]) -> None:
        """Serve until the run is over and nobody is owed its end any more, or `should_stop`.

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
            self.close()
            raise
        self._stop(show)

    def _loop(self, should_stop: Callable[[], bool], stay: bool, show: Callable[[Status, str], None]) -> None:
        self._save_snapshots_if_due()
        status_at = snapshot_at = time.monotonic()
        while not should_stop():
            now = time.monotonic()
            wake_at = self.conductors.wake_at()
            wait = 0.25 if wake_at is None else min(max(wake_at - now, 0.0), 0.25)
            arrivals = list(self._end.receive(wait))
            self._enforce()
            for arrival in arrivals:
                self._handle(arrival.session, arrival.key, arrival.frame)
            now = time.monotonic()
            self._carry_out(self.conductors.on_tick(now))
            if now - status_at >= STATUS_EVERY_S:
                status_at = now
                self._save_status()
                show(self.status, self.conductors.reason(time.monotonic()))
            if now - snapshot_at >= SNAPSHOT_CHECK_S:
                snapshot_at = now
                self._save_snapshots_if_due()
            if self.conductors.is_over and not stay and not self.conductors.owe_the_end(now):
                return

    def _stop(self, show: Callable[[Status, str], None]) -> None:
        """Leave a fresh snapshot and status behind."""
        self._save_snapshots()
        self._save_status()
        show(self.status, self.conductors.reason(time.monotonic()))

    def _handle(self, session: bytes, key: bytes, frame: bytes) -> None:
        now = time.monotonic()
        standing = self._keyring.standing(key)
        who = standing.identity or key
        if not self._limits.may_speak(who, now):
            self._cut(session, "sends more than it is asked for")
            return
        try:
            agent, bare = addressed(frame)
            message = decode_from_node(bare)
        except WireError as error:
            self._num_malformed += 1
            member = self.conductors.member_of(session)
            self._note(0, "malformed", None if member is None else member.node, str(error)[:500])
            return
        if isinstance(message, Hello) and not self._limits.may_greet(who, now):
            self._cut(session, "says hello without end")
            return
        if isinstance(message, Redeem | Rotate):
            self._answer(session, self._on_key(standing, message, key))
            return
        refusal = admittance(standing, agent)
        if refusal is not None:
            self._answer(session, refusal, agent)
            self._to_cut.append((now + _LAST_WORD_S, session))
            return
        member = self._member(agent, session)
        effects = self.conductors.on_message(session, who, agent, message, now)
        member = self._member(agent, session) or member
        if member is not None:
            member.up.add(len(frame), curve=True)
        self._carry_out(effects)

    def _on_key(self, standing: Standing, message: Redeem | Rotate, key: bytes) -> Admitted | Refuse:
        """What becomes of a node's wish to have a key admitted; durable, if it was granted."""
        new = self._keyring.standing(message.key)
        if isinstance(message, Redeem):
            refusal = redemption(
                standing,
                message.run_id,
                self._manifest.run_id,
                new,
                self._keyring.num_admitted(),
                self._capacity,
                time.time(),
            )
            if refusal is None and new.state is None and standing.invitation is not None:
                if not self._keyring.redeem(standing.invitation, message.key):
                    return self._on_key(self._keyring.standing(key), message, key)  # as it is by now
                how = f"invitation {standing.invitation.number}"
                self._note(0, "admitted", None, f"{how} let the key {message.key.hex()} in")
        else:
            refusal = rotation(standing, new, self._keyring.num_keys_of(standing.identity))
            if refusal is None and new.state is None:
                if not self._keyring.rotate(key, message.key):
                    return self._on_key(self._keyring.standing(key), message, key)
                node = self._roster.node_of(standing.identity)
                self._note(0, "rotated", node, f"the key {key.hex()} was replaced by {message.key.hex()}")
        return Admitted(message.key) if refusal is None else refusal

    def _answer(self, session: bytes, answer: Admitted | Refuse, agent: int = 0) -> None:
        """Say something to a session that need not be a member's. It may be gone by now."""
        self._end.send(session, address(encode(answer), agent))

    def _enforce(self) -> None:
        """Shut out whoever was revoked since the last look, and cut the connections of those who have been told."""
        now = time.monotonic()
        if self._keyring.refresh():
            session_by_identity: dict[bytes, bytes | None] = {}
            for conductor in self.conductors:
                for member in conductor.concerned:
                    session_by_identity[member.key] = member.session or session_by_identity.get(member.key)
            for identity, session in session_by_identity.items():
                if self._keyring.is_revoked(identity):
                    self._carry_out(self.conductors.on_shut_out(identity, REVOKED, now))
                    if session is not None:
                        self._to_cut.append((now + _LAST_WORD_S, session))
        while self._findings:
            self._judge(*self._findings.popleft(), now)
        while self._to_cut and self._to_cut[0][0] <= now:
            self._end.cut(self._to_cut.popleft()[1])

    def _judge(self, agent: int, finding: Finding, now: float) -> None:
        """Say that a node's codes or answers are out of line, and shut it out if that is the policy."""
        node, reason = finding
        member = self.conductors[agent].members[node]
        self._note(agent, "out-of-line", node, f"node {node} ({member.name}): {reason}")
        if not self._may_quarantine or self._roster.is_quarantined(node):
            return
        self._roster.quarantine(node)
        self._tracks[agent].archive.ledger.set_quarantined(node, True)
        refusal = Refuse("quarantined", f"node {node} is out of line: {reason}")
        if member.session is not None:
            self._to_cut.append((now + _LAST_WORD_S, member.session))
        self._carry_out(self.conductors.on_shut_out(member.key, refusal, now))

    def _member(self, agent: int, session: bytes) -> Member | None:
        """Whose session this is in an agent's track."""
        return self.conductors[agent].session_member(session) if agent < len(self.conductors) else None

    def _cut(self, session: bytes, why: str) -> None:
        """End a connection over which comes more than a node that keeps to the protocol would send."""
        member = self.conductors.member_of(session)
        name = "a node" if member is None else f"node {member.node} ({member.name})"
        self._note(
            0, "flooded", None if member is None else member.node, f"{name} {why}: its connection is cut"
        )
        self._end.cut(session)
        self._carry_out(self.conductors.on_unsent(session, time.monotonic()))

    def _carry_out(self, effects: Iterable[AgentEffect]) -> None:
        for agent, effect in effects:
            self._do(agent, effect)
        for agent, effect in self.conductors.settle():
            self._do(agent, effect)
        while self._gone:
            self._carry_out(self.conductors.on_unsent(self._gone.pop(), time.monotonic()))

    def _do(self, agent: int, effect: Effect) -> None:
        match effect:
            case Send(session, kind, frame):
                self._send(agent, session, kind, frame)
                return
        track = self._tracks[agent]
        ledger = track.archive.ledger
        match effect:
            case SendPiece(session, content, offset):
                piece = track.archive.piece(content, offset, track.conductor.replica)
                self._send(agent, session, "Piece", encode(piece))
            case Persist(commit, frame, seal, nodes, reported, moved):
                ledger.append(commit, frame, seal)
                one_sided = {
                    node for node, each in track.conductor.members.items() if each.estimator == "one-sided"
                }
                findings = track.influence.observe(nodes, np.frombuffer(reported, np.int8), one_sided)
                findings += track.influence.observe(commit.movers, np.frombuffer(moved, np.int8))
                self._findings += [(agent, finding) for finding in findings]
            case Audited(losses_by_node):
                findings = track.consensus.observe(losses_by_node)
                self._findings += [(agent, finding) for finding in findings]
            case Quarantine(node):
                ledger.set_quarantined(node, True)
                self.conductors.withdraw(node)
            case PersistCheckpoint(round, digest, scale):
                ledger.checkpoint(Checkpoint(round, digest, scale))
                track.digest = round, digest.hex()
            case Enrol(node, key, name):
                ledger.enrol(Enrolment(node, key, name))
            case Note(kind, node, text):
                self._note(agent, kind, node, text)

    def _send(self, agent: int, session: bytes, kind: str, frame: bytes) -> None:
        abbreviator = self._tracks[agent].abbreviator if agent < len(self._tracks) else None
        if abbreviator is not None and kind == "Commit":
            frame = abbreviator.shortened(session, frame)
        if kind in _SQUEEZED:
            frame = self._squeezed(frame)
        frame = address(frame, agent)
        # Whoever is still known under this session pays for the frame; a refused stranger is not counted.
        member = self._member(agent, session)
        if member is not None:
            member.down.add(len(frame), curve=True)
            self._limits.was_sent(member.key, kind, len(frame))
        if self._end.send(session, frame) is not Sent.OK:
            if abbreviator is not None:
                abbreviator.forget(session)
            self._gone.append(session)

    def _squeezed(self, frame: bytes) -> bytes:
        """A frame as it travels; that of a commit is worked out once for all nodes."""
        if frame != self._squeezed_last[0]:
            self._squeezed_last = frame, squeezed(frame)
        return self._squeezed_last[1]

    def _note(self, agent: int, kind: str, node: int | None, text: str) -> None:
        """Note an event, unless there have been very many of its kind since the start."""
        key = (agent, kind, node if kind in _NOTED_OF_A_NODE else None)
        limit = _NOTED_ONE_BY_ONE.get(kind) or _NOTED_OF_A_NODE.get(kind)
        if limit is not None:
            self._noted[key] += 1
            if self._noted[key] > limit:
                return
            if self._noted[key] == limit:
                text += " (further ones are not noted until the next start)"
        track = self._tracks[agent]
        track.archive.ledger.note(track.conductor.round, kind, node, text)

    # ---- what others may read ---------------------------------------------------------------------------------------

    def _make_status(self) -> Status:
        return status_of(
            self._manifest,
            [self._agent_status(agent, track) for agent, track in enumerate(self._tracks)],
            serving=True,
            malformed_frames=self._num_malformed,
            updated_at=time.time(),
        )

    def _agent_status(self, agent: int, track: _Track) -> AgentStatus:
        conductor = track.conductor
        return AgentStatus(
            agent=agent,
            round=conductor.round,
            digest=track.digest[1],
            digest_round=track.digest[0],
            live=sum(m.presence is Presence.LIVE for m in conductor.present),
            members=[
                _member_status(
                    member,
                    self._roster.is_quarantined(member.node),
                    usual_estimator(conductor.manifest),
                )
                for member in conductor.members.values()
            ],
            loss=track.mean_loss(),
            rounds_per_s=track.speed.rounds_per_s,
        )

    def _save_status(self) -> None:
        for track in self._tracks:
            track.observe_speed(time.monotonic())
        self.status = self._make_status()
        self._ledger.set_status(msgspec.json.encode(self.status))

    # ---- snapshots --------------------------------------------------------------------------------------------------

    def _save_snapshots(self) -> None:
        for track in self._tracks:
            track.archive.save_snapshot(track.conductor.replica)

    def _save_snapshots_if_due(self) -> None:
        for track in self._tracks:
            track.archive.save_snapshot_if_due(track.conductor.replica)

    def close(self) -> None:
        """Say in the status that nobody serves any more."""
        for conductor in self.conductors:
            for member in conductor.present:
                member.note(Event.LOST)
        for track in self._tracks:
            track.take_digest()
        self.status = msgspec.structs.replace(self._make_status(), serving=False)
        self._ledger.set_status(msgspec.json.encode(self.status))


def _known_members(ledger: Ledger, before: Status | None) -> list[Member]:
    """Everyone enrolled in a track, with the byte counts that the last status carried."""
    counts = {m.node: m for m in before.of_agent(ledger.agent)} if before else {}
    divergences = ledger.divergences()
    members = []
    for node, key, name, _, has_left in ledger.members():
        member = Member(node=node, key=key, name=name, has_left=has_left)
        if node in divergences:
            member.num_divergences, member.must_start_over = divergences[node]
        if node in counts:
            known = counts[node]
            member.name = known.name
            if known.latency_s is not None:
                member.latency = Latency(known.latency_s, 0.0)
            member.up = Count(known.messages_up, known.payload_bytes_up, known.zmtp_bytes_up)
            member.down = Count(known.messages_down, known.payload_bytes_down, known.zmtp_bytes_down)
        members.append(member)
    return members


def _member_status(member: Member, is_quarantined: bool, usual: str) -> MemberStatus:
    return MemberStatus(
        node=member.node,
        name=member.name,
        key=member.key.hex(),
        estimator=member.estimator or usual,
        presence=member.presence.value,
        round=member.acknowledged,
        digest_round=member.digest_round,
        digest=None if member.digest is None else member.digest.hex(),
        loss=member.loss,
        latency_s=None if member.latency is None else member.latency.mean_s,
        quarantined=is_quarantined,
        divergences=member.num_divergences,
        capped_rounds=member.num_capped,
        messages_up=member.up.messages,
        payload_bytes_up=member.up.payload_bytes,
        zmtp_bytes_up=member.up.zmtp_bytes,
        messages_down=member.down.messages,
        payload_bytes_down=member.down.payload_bytes,
        zmtp_bytes_down=member.down.zmtp_bytes,
    )
