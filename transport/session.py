"""A node's session for one agent: messages, finished probes and the time in, effects out. Decisions, no I/O.

    CONNECTING --link up--> GREETING --Welcome--> FOLLOWING --caught up, probed--> REPORTED --commit--> FOLLOWING
    GREETING --Welcome with an offer--> FETCHING --snapshot complete, or replay is quicker--> FOLLOWING
    any state --link down--> CONNECTING          any state --Finished, Refuse--> ENDED

A frame that does not fit the state changes nothing. What was reported is kept until a commit of that round shows that
it counted or came too late, and is sent again on every new connection and after `RESEND_S` of silence. Where it is the
coordinator's turn, `Hello` is said again after `GREET_S` of silence: it may have taken this node for gone.

In a pipelined run a node has two reports to make at its weights, for the round in progress and for the next, and is
REPORTED when both are out; the first commit brings it back to FOLLOWING.
"""

import enum
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from transport.brevity import expanded
from transport.catchup import Download, Way, choose
from transport.exits import Exit
from transport.messages import (
    PROTOCOL_VERSION,
    REPORT_ROUND_MODULUS,
    Admitted,
    Answer,
    Audit,
    Brief,
    Fetch,
    Finished,
    Follow,
    FromCoordinator,
    FromMember,
    Hello,
    History,
    Identify,
    Leave,
    Offer,
    Piece,
    Progress,
    Refuse,
    Report,
    Resync,
    Sealed,
    Trace,
    Welcome,
)
from transport.seals import is_sealed
from zo import pool as pools
from zo.commit import Commit, Entry, decode_entry, genesis
from zo.manifest import MOVES, Manifest, ManifestError, decode_manifest, run_id
from zo.naming import naming
from zo.packing import by_class, pack
from zo.replica import ChainError, HistoryNeeded, Replica
from zo.snapshot import SnapshotError, decode_snapshot
from zo.steps import step_rule
from zo.walk import first_step, next_step
from zo.weights import WeightsOverflow

RESEND_S: Final = 10.0
_RESEND_MAX_S: Final = 60.0
GREET_S: Final = 30.0
"""Longer than a `History` frame takes on a slow link, since a needless `Hello` makes the ledger come twice."""
_GREET_MAX_S: Final = 480.0
_LOSS_MEMORY: Final = 0.9
_FETCH_PATIENCE_S: Final = 600.0
"""A piece of 32 kB takes 220 s at 1.2 kbit/s."""
_EXIT_BY_CAUSE: Final = {
    "base": Exit.BASE,
    "tokenizer": Exit.BASE,
    "agent": Exit.INPUT,
    "estimator": Exit.INPUT,
}
_TRACE_ROUNDS: Final = 64
_TRACE_SIZE: Final = 2**18
"""Up to this many weights, a digest every round costs little: 1 ms."""


class Stage(enum.Enum):
    """Where a session stands."""

    CONNECTING = "connecting"
    GREETING = "greeting"
    FOLLOWING = "following"
    REPORTED = "reported"
    FETCHING = "fetching a snapshot"
    ENDED = "ended"


class Transmit(msgspec.Struct, frozen=True):
    """Send a message; if there is no connection, forget it: the next one starts with `Hello` again."""

    message: FromMember


class Open(msgspec.Struct, frozen=True):
    """First contact: load what the manifest asks for, then call `opened` with the replica to go on from."""

    manifest: Manifest


class StartOver(msgspec.Struct, frozen=True):
    """The weights are wrong: call `opened` with the replica of round 0."""

    reason: str


class Keep(msgspec.Struct, frozen=True):
    """Keep a piece of a snapshot, so that an interrupted download goes on after it."""

    content: bytes
    data: bytes


class Jumped(msgspec.Struct, frozen=True):
    """The replica was replaced by a snapshot; the pieces need not be kept any more."""

    round: int
    """Of the snapshot; 0 if it could not be used: only the pieces go."""


class Applied(msgspec.Struct, frozen=True):
    """A commit has become part of the weights."""

    commit: Commit
    own_codes: bool
    """Whether this node's codes are in it, as far as it can tell: where codes are combined, that it reported some."""
    was_late: bool
    """Whether this node had reported for it, in vain."""


class End(msgspec.Struct, frozen=True):
    """Stop, with this exit code and reason."""

    code: Exit
    reason: str


Effect = Transmit | Open | StartOver | Keep | Jumped | Applied | End


class Session:
    """One node's side of one track of a run. `Sessions` has one for each agent that the node trains.

    Attributes:
        stage: where it stands.
        replica: the node's weights; None before first contact.
        node: its number; None before first contact.
    """

    def __init__(
        self,
        run: bytes,
        base: bytes,
        tokenizer: bytes,
        name: str,
        saved: tuple[Manifest, Replica] | None,
        download: Download | None = None,
        decode: Callable[[bytes], Entry] = decode_entry,
        agent: int = 0,
        shares_loss: bool = True,
        estimator: str = "",
    ) -> None:
        """Start, or go on from what was saved.

        Args:
            run: the run id of the ticket.
            base: digest of the base this node holds, (16,) bytes.
            tokenizer: digest of its tokenizer, (16,) bytes.
            name: for people.
            saved: manifest and replica, if there were any.
            download: a snapshot that was not fetched to its end, if any.
            decode: reads an entry of the ledger; a simulation of many nodes reads each only once.
            agent: whose track it is.
            shares_loss: whether the node's loss is sent if the run asks for it.
            estimator: what this node has chosen; empty if nothing yet, or the run's.
        """
        self.agent = agent
        self._shares_loss = shares_loss
        self._estimator = estimator
        self.stage = Stage.CONNECTING
        self.replica = saved[1] if saved else None
        self.download = download
        self._decode = decode
        self.work_per_s = 1e9
        """Parameter·directions that this machine applies in a second; measured by the service."""
        self.way = ""
        """Why it catches up as it does, in words."""
        self._saved_manifest = saved[0] if saved else None
        self._offer: Offer | None = None
        self._fetch_began: tuple[float, int] | None = None
        """When the first piece of this connection was asked for, and how many bytes were here then."""
        self._is_weighing = False
        """Whether the next piece decides if it is worth going on with the snapshot."""
        self._must_leap = False
        """Whether only a snapshot leads on: the ledger takes back entries that this node does not have."""
        self._audit: Audit | None = None
        """What the coordinator asks for; answered once this node is at that round."""
        self._sealed = 0
        """Rounds of the own chain that the coordinator's signature has proved in this process."""
        self._is_unproven = False
        """Whether the weights are a snapshot's whose chain no seal has proved yet."""
        self._proven = 0
        """The most that `_sealed` ever was: codes of earlier rounds have been given, and the coordinator is further."""
        self._started_over_at = 0
        """What `_proven` was when the weights were last wrong."""
        self._seen: Commit | None = None
        """The last commit that came by itself, whatever became of it: the next one may refer to it."""
        self._trace: deque[tuple[int, bytes]] = deque(maxlen=_TRACE_ROUNDS)
        self.node: int | None = None
        self.manifest: Manifest | None = None
        self.loss: float | None = None
        self._run = run
        self._base = base
        self._tokenizer = tokenizer
        self._name = name
        self._must_reach = 0
        """Round up to which the coordinator said there are commits."""
        self._exponents: dict[int, int] = {}
        """Of the codes of rounds, the one in progress and later, as far as they were said."""
        self._walk_steps: dict[int, int] = {}
        """Of the walks of the same rounds, where a commit tells."""
        self._reports: dict[int, bytes] = {}
        """What was reported and is not settled, by round, in their order: at most one, in a pipelined run two."""
        self._owes_reports = False
        """Whether they are to be sent once this node has caught up."""
        self._resend_at = 0.0
        self._resend_s = RESEND_S
        self._greet_at: float | None = None
        """When to say `Hello` again; None until the next tick sets it."""
        self._greet_by: float | None = None
        """When to say it at the latest, whatever of the session before still comes; likewise."""
        self._greet_s = GREET_S

    def know(self, manifest: Manifest) -> None:
        """The manifest has come in another agent's session: the coordinator sends it once a connection."""
        self._saved_manifest = manifest

    # ---- events ---------------------------------------------------------------------------------------------------

    def on_link_up(self) -> list[Effect]:
        """A connection to the ticket's coordinator stands."""
        return [] if self.stage is Stage.ENDED else self._greet()

    def on_link_down(self) -> None:
        """The connection is gone; the socket tries again by itself."""
        if self.stage is not Stage.ENDED:
            self.stage = Stage.CONNECTING
            if self.download is not None:
                self.download.rewind()

    def on_message(self, message: FromCoordinator, now: float) -> list[Effect]:
        """A message of the coordinator."""
        if self.stage is Stage.ENDED or isinstance(message, Admitted):
            return []
        self._greet_at, self._greet_s = None, GREET_S
        if isinstance(message, Brief):
            try:
                if self._seen is None:
                    raise ValueError("no commit was seen before")
                message = expanded(message, self._seen)
            except ValueError:
                # Never from a coordinator that keeps to the protocol. Saying where we are is always safe.
                return [] if self.stage in (Stage.CONNECTING, Stage.GREETING) else self._greet()
        if isinstance(message, Commit):
            self._seen = message
        if isinstance(message, Refuse):
            self.stage = Stage.ENDED
            return [End(_EXIT_BY_CAUSE.get(message.cause, Exit.REFUSED), message.reason)]
        if self.stage is Stage.CONNECTING:
            return []  # of the connection that broke
        if isinstance(message, Welcome):
            return self._welcome(message, now)
        if self.replica is None or self.stage is Stage.GREETING:
            return []  # what belongs to the session before; an `Identify` has its answer on the way
        match message:
            case Identify():
                return self._greet()
            case Piece():
                return self._piece(message, now)
            case Commit():
                return self._follow([message], now)
            case History(frames):
                return self._history(frames, now)
            case Sealed():
                return self._seal(message)
            case Audit():
                self._audit = message
                return []
            case Resync(round, digest):
                return self._resync(round, digest)
            case Finished(round, digest):
                return self._finished(round, digest)

    def opened(self, replica: Replica, now: float) -> list[Effect]:
        """The replica that `Open` or `StartOver` asked for.

        After `StartOver`, or where the saved state turned out not to be this run's, the coordinator thinks we are
        further than we are: greet again.
        """
        announced = self.replica
        self.replica = replica
        self._sealed = min(self._sealed, replica.round)
        self._is_unproven = False
        self.loaded(now)
        if self.stage in (Stage.CONNECTING, Stage.ENDED) or (announced is None and replica.round == 0):
            return []
        return self._greet()

    def loaded(self, now: float) -> None:
        """What `Open` asked for is loaded: what was to be fetched is asked for only now."""
        if self.stage is Stage.FETCHING and self.download is not None:
            self._fetch_began = now, len(self.download.data)

    def declare(self, estimator: str) -> list[Effect]:
        """The node has chosen how it measures: the coordinator is told, if it has not been.

        Args:
            estimator: empty for the run's.
        """
        if estimator == self._estimator:
            return []
        self._estimator = estimator
        return [] if self.stage in (Stage.CONNECTING, Stage.ENDED) else self._greet()

    def on_probed(self, round: int, codes: NDArray[np.int8], loss: float, now: float) -> list[Effect]:
        """A probe that `next_probe` asked for is done.

        Args:
            round: the round it is for.
            codes: (directions,) int8.
            loss: mean of the losses seen, in nats; NaN if none was finite.
            now: in seconds, on any clock that only moves forward.
        """
        if np.isfinite(loss):
            self.loss = loss if self.loss is None else _LOSS_MEMORY * self.loss + (1 - _LOSS_MEMORY) * loss
        if self.manifest is None or self._next_round() != round:
            return []
        self._reports[round] = pack(codes, self.manifest.codes.bits)
        self._resend_s = RESEND_S
        return self._send_reports([round], now) if self.stage is Stage.FOLLOWING else []

    def on_audited(self, round: int, losses: tuple[float, float]) -> list[Effect]:
        """The audit that `next_audit` asked for is done.

        Args:
            round: the round it is for.
            losses: plus and minus the direction; the coordinator is told them as float32.
        """
        audit, self._audit = self._audit, None
        if audit is None or audit.round != round or self.stage is not Stage.FOLLOWING:
            return []
        with np.errstate(over="ignore"):
            return [Transmit(Answer(round, np.array(losses, "<f4").tobytes()))]

    def on_tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        if self.stage is Stage.REPORTED:
            if now < self._resend_at:
                return []
            self._resend_s = min(2 * self._resend_s, _RESEND_MAX_S)
            return self._send_reports(self._reports, now)
        if self.stage in (Stage.CONNECTING, Stage.ENDED) or self.next_probe() or self.next_audit():
            return []
        if self.stage is Stage.FETCHING and self._greet_at is None:
            self._greet_at = now + _FETCH_PATIENCE_S
        if self._greet_at is None:
            self._greet_at = now + self._greet_s
        if self.stage is Stage.GREETING and self._greet_by is None:
            self._greet_by = now + _GREET_MAX_S
        if now < min(self._greet_at, self._greet_by or self._greet_at):
            return []
        self._greet_s = min(2 * self._greet_s, _GREET_MAX_S)
        return self._greet()

    def leave(self) -> list[Effect]:
        """The person at the node wants to stop, or it cannot go on."""
        connected = self.stage in (Stage.FOLLOWING, Stage.REPORTED, Stage.FETCHING)
        self.stage = Stage.ENDED
        return [Transmit(Leave())] if connected else []

    # ---- what the service may ask ---------------------------------------------------------------------------------

    def next_probe(self) -> tuple[int, int] | None:
        """(round, exponent) to probe now; None while there is something to catch up on or to wait for."""
        if self.stage is not Stage.FOLLOWING or self.replica is None:
            return None
        if self.next_audit() is not None:
            return None  # its answer goes before the report, so that a round that has the one has the other
        round = self._next_round()
        is_behind = self.replica.round < max(self._must_reach, self._proven)
        if self._lacks_seal or is_behind or round is None:
            return None
        exponent = self._exponents.get(round)
        return None if exponent is None else (round, exponent)

    def walk_step(self, round: int, exponent: int) -> int:
        """What a code of this exponent is multiplied with between the local steps of a round that is to be probed."""
        assert self.manifest is not None
        step = self._walk_steps.get(round)
        return first_step(step_rule(self.manifest), round, exponent) if step is None else step

    def next_audit(self) -> tuple[int, int] | None:
        """(round, sample) to take the losses of a public audit for now; None if none is asked for."""
        audit, manifest = self._audit, self.manifest
        if audit is None or manifest is None or self.replica is None or not manifest.audit.rows:
            return None
        if self.stage is not Stage.FOLLOWING or self._lacks_seal or audit.round != self.replica.round:
            return None
        return audit.round, audit.sample

    @property
    def behind(self) -> int:
        """Commits that are known to be missing here."""
        return max(0, self._must_reach - self.replica.round) if self.replica else 0

    # ---- the coordinator's messages -------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        round, head = 0, genesis(self._run, self.agent)
        if self.replica is not None:
            round, head = self.replica.round, self.replica.head
        return Hello(
            PROTOCOL_VERSION,
            self._run,
            self._base,
            self._tokenizer,
            round,
            head,
            self._name,
            self._estimator,
        )

    def _welcome(self, welcome: Welcome, now: float) -> list[Effect]:
        manifest = self.manifest or self._saved_manifest
        if welcome.manifest:
            if run_id(welcome.manifest) != self._run:
                return self._fail(
                    Exit.WRONG_KEY, "the coordinator's manifest is not that of the ticket's run"
                )
            try:
                manifest = decode_manifest(welcome.manifest)
            except ManifestError as error:
                return self._fail(Exit.REFUSED, f"this version cannot read the run's manifest: {error}")
        if manifest is None:
            return self._fail(Exit.REFUSED, "the coordinator sent no manifest")
        self._audit = None  # who greets anew is not expected to answer
        self.stage = Stage.FOLLOWING
        self.node = welcome.node
        self._must_reach = welcome.round
        said = welcome.exponent if isinstance(welcome.exponent, tuple) else (welcome.exponent,)
        self._exponents = dict(enumerate(said, welcome.round))
        effects: list[Effect] = []
        if self.manifest is None:
            self.manifest = manifest
            effects.append(Open(manifest))
        if welcome.offer is not None:
            self._forget_reports()
            return [*effects, *self._consider(welcome.offer, now)]
        if self._must_leap:
            return self._fail(
                Exit.DAMAGED, "the ledger takes rounds back, and the coordinator has no snapshot"
            )
        self._owes_reports = bool(self._reports)
        return [*effects, *self._send_owed(now)]

    def _consider(self, offer: Offer, now: float) -> list[Effect]:
        """Ask for the snapshot's next piece; how long it takes to come decides whether it is worth going on."""
        assert self.manifest is not None
        size, pool = self.manifest.adapter.size, pools.start(self.manifest)
        num_bytes = 4 * size * self.manifest.num_vectors if pool is None else pool.num_bytes
        if offer.num_bytes > num_bytes * 5 // 4 + 4096:
            return self._fail(
                Exit.DAMAGED,
                f"the coordinator offers a snapshot of {offer.num_bytes:,} bytes for "
                + (f"{size:,} weights" if pool is None else f"a pool of {pool.num_bytes:,}"),
            )
        self.stage = Stage.FETCHING
        self._offer = offer
        self._is_weighing = True
        if self.download is None or self.download.content != offer.content:
            self.download = Download(offer.content)
        self.download.rewind()
        self._fetch_began = now, len(self.download.data)
        return self._ask()

    def _ask(self) -> list[Effect]:
        assert self.download is not None
        return [Transmit(Fetch(self.download.content, offset)) for offset in self.download.wanted()]

    def _piece(self, piece: Piece, now: float) -> list[Effect]:
        download, offer, manifest = self.download, self._offer, self.manifest
        if self.stage is not Stage.FETCHING or download is None or offer is None or manifest is None:
            return []
        if piece.content != download.content:
            return []
        if piece.num_bytes != offer.num_bytes:
            self.download = None
            return [Jumped(0), *self._greet()]  # it was removed meanwhile: there is a newer one
        new = download.add(piece.offset, piece.num_bytes, piece.data)
        effects: list[Effect] = [Keep(download.content, new)] if new else []
        if self._is_weighing and not download.is_complete and self._fetch_began is not None:
            self._is_weighing = False
            began, num_before = self._fetch_began
            link = max(len(download.data) - num_before, 1) / max(now - began, 1e-6)
            way, self.way = choose(offer, len(download.data), manifest.adapter.size, link, self.work_per_s)
            if way is Way.REPLAY and not self._must_leap:
                return [*effects, *self._follow_from_here()]
        if not download.is_complete:
            return [*effects, *self._ask()]
        return [*effects, *self._leap(download, manifest)]

    def _leap(self, download: Download, manifest: Manifest) -> list[Effect]:
        """Go on from a snapshot that is complete."""
        self.download = None
        if not download.is_intact:
            return [Jumped(0), *self._greet()]
        own = self.replica
        assert own is not None
        try:
            replica = decode_snapshot(bytes(download.data), manifest, self.agent, own)
        except SnapshotError as error:
            if own.round and pools.start(manifest) is not None:  # its weights are made from this node's
                self._forget_reports()
                return [Jumped(0), StartOver(f"these weights and the coordinator's snapshot differ: {error}")]
            return self._fail(Exit.DAMAGED, f"the coordinator's snapshot cannot be used: {error}")
        if replica.round <= own.round:
            return [Jumped(0), *self._follow_from_here()]  # nothing leads back; commits have come meanwhile
        self.replica = replica
        self._is_unproven = bool(manifest.run.signer)
        self._must_leap = False
        self._walk_steps.clear()  # of commits that may have been taken back
        self._trace.clear()
        self.way = f"snapshot of round {replica.round}"
        return [Jumped(replica.round), *self._follow_from_here()]

    def _follow_from_here(self) -> list[Effect]:
        assert self.replica is not None
        self.stage = Stage.FOLLOWING
        return [Transmit(Follow(self.replica.round, self.replica.head))]

    def _own_trace(self) -> list[Effect]:
        """The digests of the last rounds in a row, for the coordinator to find the first wrong one."""
        trace = list(self._trace)
        self._trace.clear()
        if not trace:
            return []
        return [Transmit(Trace(trace[0][0], tuple(digest for _, digest in trace)))]

    def _remember_digest(self, replica: Replica) -> None:
        # Far behind, what differs was wrong before; and a digest takes longer than the commit it follows.
        if replica.weights.size <= _TRACE_SIZE and self._must_reach - replica.round < _TRACE_ROUNDS:
            self._trace.append((replica.round, replica.digest()))
        else:
            self._trace.clear()  # it has no gaps

    def _seal(self, seal: Sealed) -> list[Effect]:
        """A signature under the chain as it is here, or it is not the run's chain."""
        replica, manifest = self.replica, self.manifest
        assert replica is not None
        assert manifest is not None
        if seal.round > replica.round:
            return self._greet()  # entries are missing: say where we are
        if seal.round < replica.round:
            return []  # it came before, in the answer to an earlier `Hello`
        since = f"between round {self._sealed} and {seal.round}"
        origin = genesis(self._run, self.agent)
        if not is_sealed(manifest.run.signer, origin, seal.round, seal.head, seal.signature):
            return self._fail(
                Exit.FORGED,
                f"the seal of round {seal.round} was not made by this run's coordinator: what came {since} may be "
                "forged. Somebody else has the coordinator's connection key, or this is another's seal",
            )
        if seal.head != replica.head:
            return self._fail(
                Exit.FORGED,
                f"the coordinator signed {seal.head.hex()} as the head of round {seal.round}, this node is at "
                f"{replica.head.hex()}: there are two ledgers of this run, which part {since}. To go on from the "
                "coordinator's, join with --start-over",
            )
        self._sealed, self._is_unproven = seal.round, False
        self._proven = max(self._proven, seal.round)
        return []

    @property
    def _lacks_seal(self) -> bool:
        """Whether a seal is due: one comes with every digest, and at each start and snapshot for what a node has."""
        if self.manifest is None or not self.manifest.run.signer or self.replica is None:
            return False
        if self._is_unproven:
            return True
        every = self.manifest.parity.digest_every
        return self.replica.round // every > self._sealed // every

    def _resync(self, round: int, digest: bytes) -> list[Effect]:
        """Drop the weights, if it is the coordinator who says so.

        Nobody signs that. But each seal after the last such word shows that the run's coordinator is there; without it
        whoever has the connection could ask for the codes of the same rounds again and again.
        """
        assert self.manifest is not None
        if self.manifest.run.signer and self._proven <= self._started_over_at:
            return self._greet()
        if round == 0:
            return self._fail(Exit.MISMATCH, f"the weights of round 0 differ from the run's, {digest.hex()}")
        self._started_over_at = self._proven
        self._forget_reports()
        reason = f"the weights of round {round} differ from the ledger's digest {digest.hex()}"
        return [*self._own_trace(), StartOver(reason)]

    def _history(self, frames: tuple[bytes, ...], now: float) -> list[Effect]:
        try:
            entries = [self._decode(frame) for frame in frames]
        except ValueError as error:
            return self._fail(Exit.DAMAGED, f"the coordinator sent a history that is none: {error}")
        return self._follow(entries, now)

    def _follow(self, commits: Sequence[Entry], now: float) -> list[Effect]:
        replica, manifest = self.replica, self.manifest
        assert replica is not None
        assert manifest is not None
        if self._lacks_seal:
            return self._greet()  # nothing is built on what nobody has signed
        effects: list[Effect] = []
        for commit in commits:
            if commit.round < replica.round:
                continue  # seen before a reconnection
            if commit.round > replica.round:
                return [*effects, *self._greet()]  # commits are missing in between: say where we are
            try:
                replica.apply(commit)
            except HistoryNeeded:
                self._must_leap = True
                return [*effects, *self._greet()]
            except (ChainError, WeightsOverflow) as error:
                return [*effects, *self._fail(Exit.DAMAGED, str(error))]
            assert isinstance(commit, Commit)  # a revert needs a history, and there is none here
            self._remember_digest(replica)
            effects.append(self._applied(commit))
            self._remember_scale(commit, manifest)
            if replica.round % manifest.parity.digest_every == 0:
                effects.append(Transmit(self._progress(replica, manifest)))
        self._must_reach = max(self._must_reach, replica.round)
        return [*effects, *self._send_owed(now)]

    def _remember_scale(self, commit: Commit, manifest: Manifest) -> None:
        """What the codes of a round to come are in units of, and how far they lead on a walk."""
        moves = self._estimator == MOVES and len(commit.exponents) > 1
        before, round = self._exponents.pop(commit.round, None), commit.round + 1 + manifest.run.pipeline
        self._walk_steps.pop(commit.round, None)
        # A `Revert` in between would put it off by a round; but past that one leads only a snapshot, after a `Welcome`.
        exponent = self._exponents[round] = commit.exponents[int(moves)]
        if manifest.probe.local_steps > 1 and not moves and before is not None:
            slopes, _ = by_class(commit, manifest)
            self._walk_steps[round] = next_step(step_rule(manifest), commit, slopes, exponent - before)

    def _applied(self, commit: Commit) -> Applied:
        settled = [round for round in self._reports if round <= commit.round]
        own = self._is_in(commit)
        for round in settled:
            del self._reports[round]
        self._settle_stage()
        return Applied(commit, own, bool(settled) and not own)

    def _is_in(self, commit: Commit) -> bool:
        """Whether the commit has this node's codes."""
        if self.node is None or self.manifest is None or self.node in commit.late:
            return False
        policy = self.manifest.directions
        voice, voices = naming(self.manifest).voice(self.node), commit.participants
        place = bisect_left(voices, voice)
        is_heard = place < len(voices) and voices[place] == voice
        return is_heard and (commit.round in self._reports or not policy.are_combined)

    def _finished(self, round: int, digest: bytes) -> list[Effect]:
        replica, manifest = self.replica, self.manifest
        assert replica is not None
        assert manifest is not None
        is_proven = not manifest.run.signer or (self._sealed == round and not self._is_unproven)
        if not replica.round == round >= manifest.run.rounds or not is_proven:
            return self._greet()
        progress = Transmit(self._progress(replica, manifest))
        if replica.digest() != digest:
            return [progress]  # the coordinator answers with Resync
        self.stage = Stage.ENDED
        reason = f"all {round} rounds are done, digest {digest.hex()}, equal to the coordinator's"
        return [progress, Transmit(Leave()), End(Exit.OK, reason)]

    # ---- small steps ----------------------------------------------------------------------------------------------

    def _progress(self, replica: Replica, manifest: Manifest) -> Progress:
        shared = None
        if manifest.parity.share_loss and self._shares_loss and self.loss is not None:
            shared = min(round(max(self.loss, 0.0) * 1000), 2**32)
        return Progress(replica.round, replica.digest(), shared)

    def _greet(self) -> list[Effect]:
        self.stage = Stage.GREETING
        self._greet_at = self._greet_by = None
        return [Transmit(self._hello())]

    def _next_round(self) -> int | None:
        """The first round that these weights may be measured for and that was not reported; None if there is none."""
        if self.replica is None or self.manifest is None:
            return None
        run, first = self.manifest.run, self.replica.round
        due = range(first, min(first + 1 + run.pipeline, run.rounds))
        return next((round for round in due if round not in self._reports), None)

    def _send_owed(self, now: float) -> list[Effect]:
        """The reports that a connection before may have lost, once this node stands where the coordinator does."""
        if not self._owes_reports or self.replica is None or self.replica.round < self._must_reach:
            return []
        self._owes_reports = False
        return self._send_reports(self._reports, now)

    def _send_reports(self, rounds: Iterable[int], now: float) -> list[Effect]:
        self._resend_at = now + self._resend_s
        self._settle_stage()
        return [
            Transmit(Report(round % REPORT_ROUND_MODULUS, self._reports[round])) for round in sorted(rounds)
        ]

    def _settle_stage(self) -> None:
        """Of FOLLOWING and REPORTED the one that fits: whether all reports that may be made are out."""
        if self.stage in (Stage.FOLLOWING, Stage.REPORTED):
            is_waiting = bool(self._reports) and self._next_round() is None
            self.stage = Stage.REPORTED if is_waiting else Stage.FOLLOWING

    def _forget_reports(self) -> None:
        self._reports.clear()
        self._owes_reports = False
        self._settle_stage()

    def _fail(self, code: Exit, reason: str) -> list[Effect]:
        self.stage = Stage.ENDED
        return [End(code, reason)]
