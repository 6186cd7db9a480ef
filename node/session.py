"""A node's session: messages, finished probes and the time in, effects out. All decisions of a node, none of its I/O.

    CONNECTING --link up--> GREETING --Welcome--> FOLLOWING --caught up, probed--> REPORTED --commit--> FOLLOWING
    any state --link down--> CONNECTING          any state --Finished, Refuse--> ENDED

A frame that does not fit the state changes nothing. What was reported is kept until a commit of that round shows that
it counted or came too late, and is sent again on every new connection and after `RESEND_S` of silence. Where it is the
coordinator's turn, `Hello` is said again after `GREET_S` of silence: it may have taken this node for gone.
"""

import enum
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from transport.exits import Exit
from transport.messages import (
    PROTOCOL_VERSION,
    REPORT_ROUND_MODULUS,
    Finished,
    FromCoordinator,
    FromNode,
    Hello,
    History,
    Identify,
    Leave,
    Progress,
    Refuse,
    Report,
    Resync,
    Welcome,
)
from zo.commit import Commit, decode_entry
from zo.manifest import Manifest, ManifestError, decode_manifest, run_id
from zo.replica import ChainError, Replica
from zo.weights import WeightsOverflow

RESEND_S: Final = 10.0
_RESEND_MAX_S: Final = 60.0
GREET_S: Final = 30.0
"""Longer than a `History` frame takes on a slow link, since a needless `Hello` makes the ledger come twice."""
_GREET_MAX_S: Final = 480.0
_LOSS_MEMORY: Final = 0.9


class Stage(enum.Enum):
    """Where a session stands."""

    CONNECTING = "connecting"
    GREETING = "greeting"
    FOLLOWING = "following"
    REPORTED = "reported"
    ENDED = "ended"


class Transmit(msgspec.Struct, frozen=True):
    """Send a message; if there is no connection, forget it: the next one starts with `Hello` again."""

    message: FromNode


class Open(msgspec.Struct, frozen=True):
    """First contact: load what the manifest asks for, then call `opened` with the replica to go on from."""

    manifest: Manifest


class StartOver(msgspec.Struct, frozen=True):
    """The weights are wrong: call `opened` with the replica of round 0."""

    reason: str


class Applied(msgspec.Struct, frozen=True):
    """A commit has become part of the weights."""

    commit: Commit
    own_codes: bool
    """Whether this node's codes are in it."""
    was_late: bool
    """Whether this node had reported for it, in vain."""


class End(msgspec.Struct, frozen=True):
    """Stop, with this exit code and reason."""

    code: Exit
    reason: str


Effect = Transmit | Open | StartOver | Applied | End


class Session:
    """One node's side of a run.

    Attributes:
        stage: where it stands.
        replica: the node's weights; None before first contact.
        node: its number; None before first contact.
    """

    def __init__(self, run: bytes, base: bytes, tokenizer: bytes, name: str, replica: Replica | None) -> None:
        """Start, or go on from a saved replica.

        Args:
            run: the run id of the ticket.
            base: digest of the base this node holds, (16,) bytes.
            tokenizer: digest of its tokenizer, (16,) bytes.
            name: for people.
            replica: what was saved, if anything.
        """
        self.stage = Stage.CONNECTING
        self.replica = replica
        self.node: int | None = None
        self.manifest: Manifest | None = None
        self.loss: float | None = None
        self._run = run
        self._base = base
        self._tokenizer = tokenizer
        self._name = name
        self._must_reach = 0
        """Round up to which the coordinator said there are commits."""
        self._exponent: tuple[int, int] | None = None
        """(round, exponent of its codes)."""
        self._report: tuple[int, bytes] | None = None
        self._resend_at = 0.0
        self._resend_s = RESEND_S
        self._greet_at: float | None = None
        """When to say `Hello` again; None until the next tick sets it."""
        self._greet_s = GREET_S

    # ---- events ---------------------------------------------------------------------------------------------------

    def on_link_up(self) -> list[Effect]:
        """A connection to the ticket's coordinator stands."""
        return [] if self.stage is Stage.ENDED else self._greet()

    def on_link_down(self) -> None:
        """The connection is gone; the socket tries again by itself."""
        if self.stage is not Stage.ENDED:
            self.stage = Stage.CONNECTING

    def on_message(self, message: FromCoordinator, now: float) -> list[Effect]:
        """A message of the coordinator."""
        if self.stage is Stage.ENDED:
            return []
        self._greet_at, self._greet_s = None, GREET_S
        if isinstance(message, Refuse):
            self.stage = Stage.ENDED
            code = Exit.BASE if message.cause in ("base", "tokenizer") else Exit.REFUSED
            return [End(code, message.reason)]
        if self.stage is Stage.CONNECTING:
            return []  # of the connection that broke
        if isinstance(message, Welcome):
            return self._welcome(message, now)
        if self.replica is None or self.stage is Stage.GREETING:
            return []  # what belongs to the session before; an `Identify` has its answer on the way
        match message:
            case Identify():
                return self._greet()
            case Commit():
                return self._follow([message], now)
            case History(frames):
                return self._history(frames, now)
            case Resync(round, digest):
                if round == 0:
                    self.stage = Stage.ENDED
                    return [
                        End(Exit.MISMATCH, f"the weights of round 0 differ from the run's, {digest.hex()}")
                    ]
                reason = f"the weights of round {round} differ from the ledger's digest {digest.hex()}"
                self._forget_report()
                return [StartOver(reason)]
            case Finished(round, digest):
                return self._finished(round, digest)

    def opened(self, replica: Replica) -> list[Effect]:
        """The replica that `Open` or `StartOver` asked for.

        After `StartOver`, or where the saved state turned out not to be this run's, the coordinator thinks we are
        further than we are: greet again.
        """
        announced = self.replica
        self.replica = replica
        if self.stage in (Stage.CONNECTING, Stage.ENDED) or (announced is None and replica.round == 0):
            return []
        return self._greet()

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
        if self.replica is None or self.replica.round != round:
            return []
        self._report = round, codes.tobytes()
        self._resend_s = RESEND_S
        return self._send_report(now) if self.stage is Stage.FOLLOWING else []

    def on_tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        if self.stage is Stage.REPORTED:
            if now < self._resend_at:
                return []
            self._resend_s = min(2 * self._resend_s, _RESEND_MAX_S)
            return self._send_report(now)
        if self.stage in (Stage.CONNECTING, Stage.ENDED) or self.next_probe() is not None:
            return []
        if self._greet_at is None:
            self._greet_at = now + self._greet_s
        if now < self._greet_at:
            return []
        self._greet_s = min(2 * self._greet_s, _GREET_MAX_S)
        return self._greet()

    def leave(self) -> list[Effect]:
        """The person at the node wants to stop."""
        connected = self.stage in (Stage.FOLLOWING, Stage.REPORTED)
        self.stage = Stage.ENDED
        return [Transmit(Leave())] if connected else []

    # ---- what the service may ask ---------------------------------------------------------------------------------

    def next_probe(self) -> tuple[int, int] | None:
        """(round, exponent) to probe now; None while there is something to catch up on or to wait for."""
        if self.stage is not Stage.FOLLOWING or self.replica is None or self._report is not None:
            return None
        round = self.replica.round
        if round < self._must_reach or self.manifest is None or round >= self.manifest.run.rounds:
            return None
        if self._exponent is None or self._exponent[0] != round:
            return None
        return self._exponent

    @property
    def behind(self) -> int:
        """Commits that are known to be missing here."""
        return max(0, self._must_reach - self.replica.round) if self.replica else 0

    # ---- the coordinator's messages -------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        round, head = (0, self._run) if self.replica is None else (self.replica.round, self.replica.head)
        return Hello(PROTOCOL_VERSION, self._run, self._base, self._tokenizer, round, head, self._name)

    def _welcome(self, welcome: Welcome, now: float) -> list[Effect]:
        if run_id(welcome.manifest) != self._run:
            return self._fail(Exit.WRONG_KEY, "the coordinator's manifest is not that of the ticket's run")
        try:
            manifest = decode_manifest(welcome.manifest)
        except ManifestError as error:
            return self._fail(Exit.REFUSED, f"this version cannot read the run's manifest: {error}")
        self.stage = Stage.FOLLOWING
        self.node = welcome.node
        self._must_reach = welcome.round
        self._exponent = welcome.round, welcome.exponent
        effects: list[Effect] = []
        if self.manifest is None:
            self.manifest = manifest
            effects.append(Open(manifest))
        if self._report is not None and self.replica is not None:
            if self._report[0] == welcome.round == self.replica.round:
                return [*effects, *self._send_report(now)]
            if self._report[0] != self.replica.round:
                self._forget_report()
        return effects

    def _history(self, frames: tuple[bytes, ...], now: float) -> list[Effect]:
        try:
            commits = [decode_entry(frame) for frame in frames]
        except ValueError as error:
            return self._fail(Exit.DAMAGED, f"the coordinator sent a history that is none: {error}")
        return self._follow(commits, now)

    def _follow(self, commits: list[Commit], now: float) -> list[Effect]:
        replica, manifest = self.replica, self.manifest
        assert replica is not None
        assert manifest is not None
        effects: list[Effect] = []
        for commit in commits:
            if commit.round < replica.round:
                continue  # seen before a reconnection
            if commit.round > replica.round:
                return [*effects, *self._greet()]  # commits are missing in between: say where we are
            try:
                replica.apply(commit)
            except (ChainError, WeightsOverflow) as error:
                return [*effects, *self._fail(Exit.DAMAGED, str(error))]
            effects.append(self._applied(commit))
            self._exponent = replica.round, commit.exponents[0]
            if replica.round % manifest.parity.digest_every == 0:
                effects.append(Transmit(self._progress(replica, manifest)))
        self._must_reach = max(self._must_reach, replica.round)
        return effects

    def _applied(self, commit: Commit) -> Applied:
        reported = self._report is not None and self._report[0] <= commit.round
        own = self.node in commit.participants
        if reported:
            self._forget_report()
        return Applied(commit, own, reported and not own)

    def _finished(self, round: int, digest: bytes) -> list[Effect]:
        replica, manifest = self.replica, self.manifest
        assert replica is not None
        assert manifest is not None
        if replica.round != round:
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
        if manifest.parity.share_loss and self.loss is not None:
            shared = min(round(max(self.loss, 0.0) * 1000), 2**32)
        return Progress(replica.round, replica.digest(), shared)

    def _greet(self) -> list[Effect]:
        self.stage = Stage.GREETING
        self._greet_at = None
        return [Transmit(self._hello())]

    def _send_report(self, now: float) -> list[Effect]:
        assert self._report is not None
        round, codes = self._report
        self.stage = Stage.REPORTED
        self._resend_at = now + self._resend_s
        return [Transmit(Report(round % REPORT_ROUND_MODULUS, codes))]

    def _forget_report(self) -> None:
        self._report = None
        if self.stage is Stage.REPORTED:
            self.stage = Stage.FOLLOWING

    def _fail(self, code: Exit, reason: str) -> list[Effect]:
        self.stage = Stage.ENDED
        return [End(code, reason)]
