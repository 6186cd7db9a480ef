"""The conductor: messages and the time in, effects out. All of the coordinator's decisions on one track of a run.

The service carries out the effects in their order. `Persist` comes before every `Send` that shows its commit (law 4); a
service that cannot persist must stop, and then nobody has seen anything.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator import pace
from coordinator.admission import refusal, shut_out
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
    send,
)
from coordinator.membership import Event, Member, Presence
from coordinator.roster import Roster
from coordinator.rounds import Outcome, Round, Verdict, decide, following, receive, withdraw
from coordinator.share import capped
from transport.messages import (
    HISTORY_BYTES,
    PROTOCOL_VERSION,
    Answer,
    Audit,
    Fetch,
    Finished,
    Follow,
    FromMember,
    Hello,
    History,
    Identify,
    Leave,
    Offer,
    Progress,
    Refuse,
    Report,
    Resync,
    Sealed,
    Trace,
    Welcome,
)
from zo.codes import UNIT_BY_BITS
from zo.combine import combined
from zo.commit import Commit, chain_digest
from zo.manifest import MOVES, Manifest
from zo.packing import bits_of_commits, of_classes, pack, unpack
from zo.replica import Replica
from zo.steps import Scale, step_rule

_REMEMBERED_ROUNDS: Final = 256
_SILENCE_EVERY_S: Final = 10.0
"""How often to look who has not been heard of."""
_NAMED_AT_THE_END: Final = 3
_DIVERGENCES_ALLOWED: Final = 2
"""The second wrong digest of a node is no accident any more."""


@dataclass
class _Waiting:
    """Whom the round in progress waits for, and how long. Kept up to date member by member: at a thousand members,
    making it anew at every report would be most of the work."""

    awaited: set[int]
    missing: set[int]
    """Those of them who have not reported."""
    typical_s: float | None
    wait_s: float


class Conductor:
    """One track's decisions: those on one agent's chain. `Conductors` has one for each agent.

    Attributes:
        members: by node number, everyone ever admitted to this track.
        replica: the coordinator's own copy of the weights.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: ServiceConfig,
        replica: Replica,
        scale: Scale,
        members: Iterable[Member],
        roster: Roster,
        head_after: Callable[[int], bytes],
        digest_at: Callable[[int], bytes | None],
        read_history: Callable[[int, int], list[bytes]],
        offer_for: Callable[[int], Offer | None],
        digests_between: Callable[[int, int], list[bytes]],
        now: float,
        seal: Callable[[int, bytes], bytes] | None = None,
        audit_sample: Callable[[int], int | None] = lambda _: None,
    ) -> None:
        """Go on where the ledger ends.

        Args:
            manifest: of the run.
            config: of this service.
            replica: at the end of the ledger.
            scale: what the step rule left there.
            members: everyone ever admitted to this track, all gone; who did not leave is heard of now, as it were.
            roster: everyone ever admitted to the run; shared by its tracks.
            head_after: the chain's head after so many commits, all of them durable.
            digest_at: the digest of the weights after so many commits, if it was recorded.
            read_history: (first, last) -> encoded commits first..last-1, as many of them as fit one message.
            offer_for: what a node at a round is offered to catch up with; None if replaying is certainly cheaper.
            digests_between: (first, last) -> the digests after first..last commits, replayed; empty if not at hand.
            now: in seconds, on any clock that only moves forward.
            seal: (round, head) -> the signature under the chain's head after so many commits; None if the run is not
                signed.
            audit_sample: the sample of the public audit at a round; None if there is none then.
        """
        self.manifest = manifest
        self.config = config
        self.replica = replica
        self.members = {member.node: member for member in members}
        for member in self.members.values():
            member.heard_at = now
        self._rule = step_rule(manifest)
        self._scale = scale
        self._exponents_before: tuple[int, ...] = ()
        """Exponent of the codes of the round before; None after a restart, when late codes are dropped."""
        self._head_after = head_after
        self._digest_at = digest_at
        self._read_history = read_history
        self._offer_for = offer_for
        self._digests_between = digests_between
        self._seal = seal
        self._audit_sample = audit_sample
        self._ahead = manifest.run.pipeline
        self._losses_by_asked: dict[int, dict[int, tuple[float, float] | None]] = {}
        """By round: whom its audit asked, and what they answered. A node answers before the next report that it can
        make, which in a pipelined run is for the round after: then they are judged when that one closes."""
        self._roster = roster
        self._node_by_session: dict[bytes, int] = {}
        self._opened_at: dict[int, float] = {}
        self._waiting: _Waiting | None = None
        self._silence_at = now
        self._round = Round(replica.round, now)
        self._open_round(self._round)
        self._unsettled: tuple[Commit, bytes] | None = None
        # A stop between a commit and its checkpoint leaves a digest out: it is made up for at the first `settle`.
        self._owes_checkpoint = self._wants_checkpoint() and digest_at(replica.round) is None

    # ---- what the service may ask ---------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """The round in progress: the number of commits made."""
        return self._round.number

    @property
    def exponent(self) -> int:
        """Exponent of the codes of slopes of the round in progress."""
        return self._scale.exponent

    @property
    def is_over(self) -> bool:
        """Whether all rounds of the manifest are done."""
        return self.round >= self.manifest.run.rounds

    @property
    def present(self) -> list[Member]:
        """Members that are not gone."""
        return [m for m in self.members.values() if m.presence is not Presence.GONE]

    @property
    def concerned(self) -> list[Member]:
        """Members that are not gone, or whose codes are in the round in progress: those whom a revocation reaches."""
        reported = self._round.codes_by_node, self._round.late_by_node, self._round.early_by_node
        heard = frozenset().union(*reported)
        return [m for m in self.members.values() if m.presence is not Presence.GONE or m.node in heard]

    def owed_the_end(self, now: float) -> list[Member]:
        """For whom a run that is over is still to be served."""
        shut_out = self._roster.is_quarantined
        return [m for m in self.members.values() if m.is_owed_the_end(now) and not shut_out(m.node)]

    def session_member(self, session: bytes) -> Member | None:
        """Whose session this is; None if it is nobody's."""
        node = self._node_by_session.get(session)
        return None if node is None else self.members[node]

    def wake_at(self) -> float | None:
        """When the next tick is due, on the clock of `now`; None if only messages can change anything."""
        if self.is_over or len(self._round.codes_by_node) < self.config.quorum:
            return None
        waiting = self._wait()
        return self._round.opened_at_s + (waiting.wait_s if waiting.missing else 0.0)

    def reason(self, now: float) -> str:
        """What the round in progress waits for, in words; what the end of the run waits for."""
        if self.is_over:
            names = ", ".join(f"{m.node} ({m.name})" for m in self.owed_the_end(now)[:_NAMED_AT_THE_END])
            return f"all rounds are done: waiting for {names} to fetch the end" if names else ""
        waiting = self._wait()
        return decide(self._round, frozenset(waiting.awaited), self.config.quorum, waiting.wait_s, now)[1]

    # ---- events ---------------------------------------------------------------------------------------------------

    def on_message(
        self, session: bytes, key: bytes, message: FromMember, now: float, *, has_manifest: bool = False
    ) -> list[Effect]:
        """A message of a session whose handshake proved `key`.

        Args:
            session: of the connection.
            key: who it is.
            message: what it says.
            now: in seconds.
            has_manifest: whether it was sent the manifest in this session already, by another track.
        """
        if isinstance(message, Hello):
            effects = list(self._hello(session, key, message, has_manifest))
            self.heard(session, now)
            return [*effects, *self._pass_on(now)]
        member = self.session_member(session)
        if member is None or member.key != key:
            return [] if isinstance(message, Leave) else [send(session, Identify())]
        self.heard(session, now)
        self._note(member, Event.HEARD)
        match message:
            case Report():
                effects = self._report(member, message, now)
            case Progress():
                effects = self._progress(member, message)
            case Fetch(content, offset):
                effects = [SendPiece(session, content, offset)]
            case Follow():
                effects = self._follow(member, message)
            case Trace():
                effects = self._trace(member, message)
            case Answer():
                effects = self._answer(member, message)
            case Leave():
                effects = self._lose(member, Event.LEFT, "left")
        return [*effects, *self._pass_on(now)]

    def on_tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        effects: list[Effect] = []
        if now >= self._silence_at:
            self._silence_at = now + _SILENCE_EVERY_S
            for member in self.present:
                event = member.silence(now)
                if event is Event.LOST:
                    effects += self._lose(
                        member, event, f"was not heard of for {now - member.heard_at:.0f} s"
                    )
                elif event is not None:
                    self._note(member, event)
        return [*effects, *self._pass_on(now)]

    def on_unsent(self, session: bytes, now: float) -> list[Effect]:
        """A frame could not be queued: the session is gone, or its reader is stuck. It may say `Hello` again."""
        member = self.session_member(session)
        if member is None:
            return []
        return [*self._lose(member, Event.LOST, "lost its connection"), *self._pass_on(now)]

    def heard(self, session: bytes, now: float) -> None:
        """Something came from a session, if to another track: nobody who speaks there is gone here."""
        member = self.session_member(session)
        if member is not None:
            member.heard_at = now

    def on_moved(self, key: bytes, session: bytes, now: float) -> list[Effect]:
        """The node with this key has a new session, for another track so far: an older one is closed here as well."""
        node = self._roster.node_of(key)
        member = None if node is None else self.members.get(node)
        if member is None or member.session in (None, session):
            return []
        effects = list(self._replace(member, session))
        self._note(member, Event.LOST)
        return [*effects, *self._pass_on(now)]

    def on_shut_out(self, key: bytes, refusal: Refuse, now: float) -> list[Effect]:
        """The node with this key may take part no more: it is told, and what it reported for this round is dropped."""
        node = self._roster.node_of(key)
        member = None if node is None else self.members.get(node)
        if member is None:
            return []
        self._round = withdraw(self._round, member.node)
        effects: list[Effect] = []
        if member.session is not None:
            effects.append(send(member.session, refusal))
            effects += self._lose(member, Event.LEFT, f"was shut out: {refusal.reason}")
        return [*effects, *self._pass_on(now)]

    def withdraw(self, node: int) -> None:
        """A node was found out in another track: what it reported for this round is dropped, and nobody waits for it.

        It is told when it speaks here next.
        """
        self._round = withdraw(self._round, node)
        self._waiting = None

    def settle(self) -> list[Effect]:
        """Bring the coordinator's own replica up to the last commit.

        Called after the effects are carried out: nodes have their commit and compute while this does.
        """
        if self._unsettled is not None:
            commit, frame = self._unsettled
            self._unsettled = None
            self.replica.apply(commit, frame)
            self._owes_checkpoint = self._wants_checkpoint()
        if not self._owes_checkpoint:
            return []
        self._owes_checkpoint = False
        digest = self.replica.digest()
        effects: list[Effect] = [PersistCheckpoint(self.replica.round, digest, self._scale)]
        if self.is_over:
            effects.append(Note("finished", None, f"all {self.round} rounds are done, digest {digest.hex()}"))
            for member in self.present:
                effects.extend(self._feed(member))
        return effects

    def _wants_checkpoint(self) -> bool:
        """Whether the digest of the replica's round is one that the ledger records."""
        return self._shows_digest(self.replica.round)

    def _shows_digest(self, round: int) -> bool:
        """Whether nodes report their digest after so many commits, and are shown a seal."""
        return round > 0 and (round % self.manifest.parity.digest_every == 0 or self.is_over)

    # ---- sessions -------------------------------------------------------------------------------------------------

    def _hello(self, session: bytes, key: bytes, hello: Hello, has_manifest: bool) -> Iterator[Effect]:
        node = self._roster.node_of(key)
        refused = refusal(
            hello,
            self.manifest,
            node,
            self._roster,
            self.config.capacity,
            self.round,
            self._head_after,
        )
        if refused is not None:
            yield Note("refused", node, f"{hello.name or 'a node'}: {refused.reason}")
            yield send(session, refused)
            return
        node = self._roster.admit(key)
        if node not in self.members:
            self.members[node] = Member(node=node, key=key, name=hello.name)
            yield Enrol(node, key, hello.name)
        member = self.members[node]
        yield from self._replace(member, session)
        member.name, member.estimator = hello.name, hello.estimator
        for asked in self._losses_by_asked.values():
            asked.pop(node, None)  # it may not know any more what it was asked
        member.session = session
        member.acknowledged = member.cursor = hello.round
        member.is_finished = False
        member.latency = None
        self._node_by_session[session] = node
        was = member.presence
        self._note(member, Event.HELLO)
        if was is Presence.GONE:
            behind = self.round - hello.round
            yield Note(
                "joined", node, f"node {node} ({member.name}) joined at round {self.round}, {behind} behind"
            )
        if member.must_start_over and hello.round == 0:
            member.must_start_over = False
            yield Note("started-over", node, f"node {node} ({member.name}) starts over")
        offer = self._offer_for(hello.round) if hello.round < self.round else None
        member.is_choosing = member.has_offer = offer is not None
        manifest = b"" if hello.round or has_manifest else self.manifest.encode()
        yield send(
            session,
            Welcome(PROTOCOL_VERSION, node, manifest, self.round, self._exponent_for(member), offer),
        )
        if offer is None:
            yield from self._sealed(session, hello.round, hello.head)
        yield from self._feed(member)

    def _exponent_for(self, member: Member) -> int | tuple[int, ...]:
        """The exponent of a member's codes of the round in progress; in a pipelined run with that of the next one's."""
        moves, scale = member.estimator == MOVES, self._scale
        exponent = scale.moves_exponent if moves else scale.exponent
        return (exponent, scale.ahead[int(moves)]) if scale.ahead else exponent

    def _replace(self, member: Member, session: bytes) -> Iterator[Effect]:
        """Close a session of the member that is older than this one, if there is one."""
        if member.session is None or member.session == session:
            return
        del self._node_by_session[member.session]
        yield Note("replaced", member.node, f"node {member.node} opened a new session; the old one is closed")
        reason = f"another process joined with the key of node {member.node}; the newest session stays"
        yield send(member.session, Refuse("replaced", reason))

    def _follow(self, member: Member, follow: Follow) -> list[Effect]:
        """A node that was made an offer has chosen."""
        assert member.session is not None
        if not member.is_choosing or not member.has_offer:
            return []  # who is to start over says `Hello`, and may be refused
        if follow.round > self.round or self._head_after(follow.round) != follow.head:
            reason = (
                f"the state at round {follow.round}, which this node would go on from, is not in the ledger; join with "
                "--start-over"
            )
            return [
                send(member.session, Refuse("fork", reason)),
                *self._lose(member, Event.LEFT, "was refused"),
            ]
        member.is_choosing = member.has_offer = False
        member.acknowledged = member.cursor = follow.round
        return [*self._sealed(member.session, follow.round, follow.head), *self._feed(member)]

    def _trace(self, member: Member, trace: Trace) -> list[Effect]:
        """Find the first round after which a diverged node was wrong, by bisection: once wrong, it stays wrong."""
        if not member.owes_trace:
            return []  # finding a round takes a replay: one for each divergence
        member.owes_trace = False
        own = self._digests_between(trace.first, trace.first + len(trace.digests) - 1)
        if not own or len(own) != len(trace.digests):
            return []
        index = bisect_left(range(len(own)), True, key=lambda i: own[i] != trace.digests[i])
        if index == len(own):
            return []
        first = trace.first + index
        before = "or earlier" if index == 0 else f"equal until {first - 1}"
        text = f"node {member.node} ({member.name}): first different after {first} commits ({before})"
        return [Note("first-difference", member.node, text)]

    def _lose(self, member: Member, event: Event, what: str) -> list[Effect]:
        if member.session is not None:
            self._node_by_session.pop(member.session, None)
        self._note(member, event)
        return [Note(event.name.lower(), member.node, f"node {member.node} ({member.name}) {what}")]

    # ---- what nodes say -------------------------------------------------------------------------------------------

    def _report(self, member: Member, report: Report, now: float) -> list[Effect]:
        number = None if member.is_choosing else member.resolve(report.round, self._ahead)
        if number is None:
            return []  # from weights that are being replaced, long acknowledged, or never asked for
        if self._roster.is_quarantined(
            member.node
        ):  # found out in another track: there it waits for a `Hello`
            assert member.session is not None
            return [
                send(member.session, shut_out(member.node)),
                *self._lose(member, Event.LEFT, "was shut out"),
            ]
        member.acknowledge(number - self._ahead)
        manifest = self.manifest
        num = manifest.moves.projections if member.estimator == MOVES else manifest.probe.directions
        try:
            codes = unpack(report.codes, num, manifest.codes.bits)
        except ValueError as error:
            return [Note("misfit", member.node, f"round {number}: report of node {member.node}: {error}")]
        self._round, verdict, _ = receive(self._round, member.node, number, codes.tobytes())
        if verdict is not Verdict.DUPLICATE:
            self._learn_latency(member, number, now)
            self._note(member, Event.REPORTED)
        if verdict is Verdict.COUNTED and self._waiting is not None:
            self._waiting.missing.discard(member.node)
        return self._feed(member)

    def _answer(self, member: Member, answer: Answer) -> list[Effect]:
        """The first answer to an audit that is not judged yet stands; anything else is nothing."""
        asked = self._losses_by_asked.get(answer.round, {})
        if asked.get(member.node, ()) is None:
            plus, minus = np.frombuffer(answer.losses, "<f4")
            asked[member.node] = float(plus), float(minus)
        return []

    def _progress(self, member: Member, progress: Progress) -> list[Effect]:
        if member.is_choosing:
            return []  # on its way when the node was told to start over: one fault is one divergence
        member.acknowledge(progress.round)
        if progress.loss_milli is not None:
            member.loss = progress.loss_milli / 1000
        expected = self._digest_at(progress.round)
        if expected is not None:
            member.digest_round, member.digest = progress.round, progress.digest
            if expected != progress.digest:
                effects: list[Effect] = []
                if not member.must_start_over:  # else it was told, and the word did not reach it: one fault
                    member.must_start_over = member.owes_trace = True
                    member.num_divergences += 1
                    text = (
                        f"node {member.node} ({member.name}) differs at round {progress.round}: it has digest "
                        f"{progress.digest.hex()}, the ledger gives {expected.hex()}; told to start over"
                    )
                    effects.append(Note("diverged", member.node, text))
                    if member.num_divergences >= _DIVERGENCES_ALLOWED:
                        self._roster.quarantine(member.node)
                        self._round = withdraw(self._round, member.node)
                        effects.append(Quarantine(member.node))
                if member.session is not None:
                    effects.append(send(member.session, Resync(progress.round, expected)))
                # It answers with its trace and a `Hello`; until then no round waits for it and it is sent nothing.
                self._note(member, Event.HELLO)
                member.is_choosing, member.has_offer = True, False
                return effects
        return self._feed(member)

    def _learn_latency(self, member: Member, number: int, now: float) -> None:
        # A node can begin with a round when that many rounds before it opens: then its weights are made.
        asked_at = self._opened_at.get(max(number - self._ahead, 0))
        if asked_at is None:
            return
        sample = now - asked_at
        typical = self._wait().typical_s
        if typical is None:
            self._waiting = None  # from now on there is something typical
        else:
            # One long silence (a suspended laptop) is no measure of speed: not to be held against a member.
            sample = min(sample, 2 * max(self.config.patience * typical, pace.MIN_WAIT_S))
        member.latency = pace.observe(member.latency, sample)

    def _note(self, member: Member, event: Event) -> None:
        before = member.presence
        member.note(event)
        if member.presence is before or self._waiting is None:
            return
        waiting = self._waiting
        waiting.awaited.discard(member.node)
        waiting.missing.discard(member.node)
        if self._is_awaited(member, waiting.typical_s):
            waiting.awaited.add(member.node)
            if member.node not in self._round.codes_by_node:
                waiting.missing.add(member.node)
            waiting.wait_s = max(
                waiting.wait_s, self._wait_for({member.node: member.latency}, waiting.typical_s)
            )

    # ---- rounds ---------------------------------------------------------------------------------------------------

    def _open_round(self, round: Round) -> None:
        self._round = round
        self._waiting = None
        self._opened_at[round.number] = round.opened_at_s
        self._opened_at.pop(round.number - _REMEMBERED_ROUNDS, None)

    def _wait(self) -> _Waiting:
        """Whom the round waits for and how long, from what is known of the members' pace."""
        if self._waiting is None:
            live = [m for m in self.members.values() if self._is_following(m)]
            typical = pace.typical_s({m.node: m.latency for m in live if m.latency is not None})
            awaited = {m.node: m.latency for m in live if self._is_awaited(m, typical)}
            missing = awaited.keys() - self._round.codes_by_node.keys()
            self._waiting = _Waiting(set(awaited), missing, typical, self._wait_for(awaited, typical))
        return self._waiting

    def _is_following(self, member: Member) -> bool:
        return member.presence is Presence.LIVE and member.cursor == self.round and not member.is_choosing

    def _is_awaited(self, member: Member, typical_s: float | None) -> bool:
        patience = self.config.patience
        if self._roster.is_quarantined(member.node):
            return False
        return self._is_following(member) and pace.is_worth_waiting_for(member.latency, typical_s, patience)

    def _wait_for(self, awaited: Mapping[int, pace.Latency | None], typical_s: float | None) -> float:
        return pace.wait_s(awaited, typical_s, self.config.patience, self.config.max_wait_s)

    def _pass_on(self, now: float) -> list[Effect]:
        """Close the round if it is over, and send its commit to everyone who has all before it.

        The next round is left to the next tick, also where all its reports are here already: first this one's commit is
        to leave.
        """
        if self.is_over or len(self._round.codes_by_node) < self.config.quorum:
            return []
        waiting = self._wait()
        if waiting.missing and now < self._round.opened_at_s + waiting.wait_s:
            return []
        awaited = frozenset(waiting.awaited)
        outcome, reason = decide(self._round, awaited, self.config.quorum, waiting.wait_s, now)
        if outcome is Outcome.WAIT:
            return []
        effects = self.settle()
        closed = self._round
        late = {node: codes for node, codes in closed.late_by_node.items() if self._is_current(codes)}
        codes_by_node = {**late, **closed.codes_by_node}
        movers = tuple(sorted(node for node, codes in codes_by_node.items() if self._is_of_moves(codes)))
        nodes = tuple(sorted(codes_by_node.keys() - set(movers)))
        reported, moved = (b"".join(codes_by_node[each] for each in group) for group in (nodes, movers))
        counted, notes = self._capped(nodes, reported)
        moves, notes_of_movers = self._capped(movers, moved)
        participants, slopes = combined(nodes, counted, self.manifest)
        steps, scale = self._rule.of_round(self._scale, closed.number, slopes, moves)
        if movers:  # then nothing is combined, and participants are nodes
            participants = tuple(sorted(codes_by_node))
        codes = of_classes(participants, movers, slopes, moves, self.manifest)
        commit = Commit(
            closed.number,
            steps,
            self._rule.exponents(scale),
            participants,
            pack(codes, bits_of_commits(self.manifest)),
            self.replica.head,
            tuple(sorted(late)),
            movers,
        )
        self.replica.check(commit)  # before anything has changed: a commit that overflows is never made
        # Late codes are in units of the round before: they count only where those are this round's too.
        self._exponents_before, self._scale = self._rule.exponents(self._scale), scale
        frame = commit.encode()
        head = chain_digest(frame)
        seal = b"" if self._seal is None else self._seal(closed.number + 1, head)
        effects.append(Persist(commit, frame, seal, nodes, reported, moved))
        effects.extend([*notes, *notes_of_movers])
        asked = self._losses_by_asked.pop(closed.number - self._ahead, {})
        answered = {node: each for node, each in asked.items() if node in closed.codes_by_node}
        if answered:
            effects.append(Audited(answered))
        self._unsettled = commit, frame
        missing = awaited - closed.codes_by_node.keys()
        for node in sorted(missing):
            self.members[node].note(Event.MISSED)
            effects.append(Note("missed", node, reason))
        unheard = self.members.keys() - closed.codes_by_node.keys() if self.manifest.run.staleness else ()
        self._open_round(following(closed, now, frozenset(unheard)))
        is_judged = self.round + self._ahead < self.manifest.run.rounds
        sample = self._audit_sample(self.round) if is_judged else None
        for member in self.present:
            is_next = member.cursor == closed.number and not member.is_choosing
            if member.session is not None and is_next and member.room():
                member.cursor += 1
                if sample is not None:
                    self._losses_by_asked.setdefault(self.round, {})[member.node] = None
                    effects.append(send(member.session, Audit(self.round, sample)))
                effects.append(Send(member.session, "Commit", frame))
                if seal and self._shows_digest(self.round):
                    effects.append(send(member.session, Sealed(self.round, head, seal)))
        return effects

    def _is_of_moves(self, codes: bytes) -> bool:
        """Whether the codes of a report are of moves: there are as many as the manifest says of these."""
        return len(codes) == self.manifest.moves.projections

    def _is_current(self, codes: bytes) -> bool:
        """Whether codes for the round before are in the units of this round's."""
        exponents, place = self._rule.exponents(self._scale), int(self._is_of_moves(codes))
        return bool(self._exponents_before) and self._exponents_before[place] == exponents[place]

    def _capped(self, nodes: Sequence[int], reported: bytes) -> tuple[NDArray[np.int8], list[Note]]:
        """The codes that a round counts, of these nodes in their order, and whose were cut to their share."""
        codes = np.frombuffer(reported, np.int8)
        bits = self.manifest.codes.bits
        if not codes.size or bits == 1:
            return codes, []  # signs are all of one length
        share = self.config.max_share
        rows, is_cut = capped(codes.reshape(len(nodes), -1), share, UNIT_BY_BITS[bits])
        notes = []
        for index in np.flatnonzero(is_cut):
            member = self.members[nodes[int(index)]]
            member.num_capped += 1
            text = f"round {self.round}: the codes of node {member.node} ({member.name}) were scaled down to {share:g} "
            notes.append(Note("capped", member.node, text + "times the median participant's"))
        return rows.ravel(), notes

    def _sealed(self, session: bytes, round: int, head: bytes) -> list[Effect]:
        """The seal of a round that is durable, for a session whose chain has this head by then."""
        if self._seal is None or round == 0:
            return []
        return [send(session, Sealed(round, head, self._seal(round, head)))]

    def _feed(self, member: Member) -> list[Effect]:
        """What a member that is behind may be sent now, and the word that the run is over."""
        effects: list[Effect] = []
        if member.session is None or member.is_choosing:
            return effects
        # Commits that are being persisted in this very batch of effects reach it through `_pass_on`.
        while member.cursor < self.round and member.room():
            last = min(self.round, member.cursor + member.room())
            frames = self._read_history(member.cursor, last)
            if not frames:
                break
            member.cursor += len(frames)
            effects.append(send(member.session, History(tuple(frames))))
            effects.extend(self._sealed(member.session, member.cursor, self._head_after(member.cursor)))
        settled = self._unsettled is None and self.is_over
        if settled and member.cursor == self.round and not member.is_finished:
            member.is_finished = True
            effects.append(send(member.session, Finished(self.round, self.replica.digest())))
        return effects


def history_slice(frames: Iterable[bytes]) -> list[bytes]:
    """As many leading frames as fit into one `History` message, at least one if there is one."""
    taken: list[bytes] = []
    size = 0
    for frame in frames:
        if taken and size + len(frame) > HISTORY_BYTES:
            break
        taken.append(frame)
        size += len(frame)
    return taken
