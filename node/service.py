"""The node's service: one loop that receives, hands to the sessions, does what they say, and probes when there is time.

What a probe is, it does not know: the `Trainer` it is given does. So the same service runs with a language model on a
gateway and with a small NumPy loss in a test of a thousand faults.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from node.credentials import NOT_ADMITTED, redeem
from node.state import StateDirectory
from transport.exits import Exit
from transport.messages import (
    REPORT_ROUND_MODULUS,
    Report,
    WireError,
    address,
    addressed,
    decode_from_coordinator,
    encode,
)
from transport.meter import Meter, SocketCount
from transport.session import Applied, End, Jumped, Keep, Open, Session, Stage, StartOver, Transmit
from transport.sessions import AgentEffect, AssignmentError, Sessions
from transport.sockets import Link, NodeSocket
from transport.ticket import Ticket
from zo import kernels
from zo.manifest import Manifest
from zo.replica import Replica

SAVE_EVERY_S: Final = 10.0
_POLL_S: Final = 0.5
_WRONG_KEY_TRIES: Final = 3
_TRIED_DIRECTIONS: Final = 16


class ProbeResult(Protocol):
    """What a probe gives."""

    @property
    def codes(self) -> NDArray[np.int8]:
        """(directions,) int8."""

    @property
    def loss(self) -> float:
        """Mean loss in nats, NaN if none was finite."""

    @property
    def num_no_votes(self) -> int:
        """Directions without a finite loss."""


class Trainer(Protocol):
    """What can measure a loss at given weights: a model with private data, or a stand-in for it."""

    @property
    def estimator(self) -> str:
        """How it measures slopes, where that is not as the manifest's `probe.sides` says; else empty."""

    def initial_weights(self) -> NDArray[np.int32]:
        """The weights of round 0."""

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
        """The codes of an agent's round; `weights` are left as they are. `walk_step` is for local
        steps (`zo.walk`), `importances` for a pool that is drawn by them (`zo.pool`).

        Raises:
            BudgetSpentError: it may say no more.
        """

    def audit(self, weights: NDArray[np.int32], sample: int, agent: int = 0) -> tuple[float, float]:
        """The losses on the manifest's public rows at the weights plus and minus a direction of audits."""

    def evaluate(self, weights: NDArray[np.int32]) -> float | None:
        """Held-out loss in nats; None if there is nothing held out."""


class NodeError(RuntimeError):
    """The node cannot go on; carries the exit code."""

    def __init__(self, code: Exit, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class BudgetSpentError(NodeError):
    """A trainer may say no more of its data: the node leaves in good order."""

    def __init__(self, reason: str) -> None:
        super().__init__(Exit.BUDGET, reason)


class Leaving(BaseException):
    """Ctrl-C or SIGTERM in a place that may be interrupted."""


@dataclass
class View:
    """What a display may show."""

    stage: Stage = Stage.CONNECTING
    node: int | None = None
    agents: int = 1
    """How many this node trains. Stage and round are those of the one that is least far, losses are means."""
    round: int = 0
    rounds: int = 0
    behind: int = 0
    fetched_bytes: int = 0
    to_fetch_bytes: int = 0
    """Of the snapshot being fetched; 0 if none is."""
    catch_up_left_s: float | None = None
    """Estimated from how it went so far."""
    members: int = 0
    loss: float | None = None
    held_out: float | None = None
    lag_s: float | None = None
    """From the last report to its commit."""
    num_directions: int = 0
    """Directions reported by this process."""
    num_no_votes: int = 0
    num_late: int = 0
    meter: Meter = field(default_factory=Meter)
    socket: SocketCount | None = None
    privacy: str = ""
    """What of the privacy budget is spent; empty if there is none."""
    notice: str = ""


def _measured_work(size: int) -> float:
    """Parameter·directions that this machine applies in a second, tried on a vector of this size."""
    weights, directions = np.zeros(size, np.int32), np.zeros((_TRIED_DIRECTIONS, 3), np.uint32)
    coefficients = np.zeros(_TRIED_DIRECTIONS, np.int32)
    kernels.apply(weights, (0, 0), directions, coefficients)  # the first call may load the kernel
    begin = time.perf_counter()
    kernels.apply(weights, (0, 0), directions, coefficients)
    return size * _TRIED_DIRECTIONS / max(time.perf_counter() - begin, 1e-9)


class NodeService:
    """One node's part in a run, from connecting to its end."""

    def __init__(
        self,
        ticket: Ticket,
        state: StateDirectory,
        base_digest: str,
        tokenizer_digest: str,
        open_trainer: Callable[[Manifest], Trainer],
        *,
        name: str,
        connect_timeout_s: float,
        evaluate_every: int,
        agents: Sequence[int] | None = None,
        shares_loss: bool = True,
        show: Callable[[View], None],
        log: Callable[[dict[str, object]], None],
        on_sent: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        """Prepare; `run` does the work.

        Args:
            ticket: of the run.
            state: locked by the caller.
            base_digest: hexadecimal, of the base this node will load.
            tokenizer_digest: hexadecimal.
            open_trainer: loads model and data once the manifest is known.
            name: for people.
            connect_timeout_s: how long to try for a first contact.
            evaluate_every: measure the held-out loss every so many rounds; 0 for never.
            agents: those to train, where the run has each node name its own; None where it does not.
            shares_loss: whether the mean loss is sent if the run asks for it.
            show: called when there is something new to see.
            log: called with one record for every round.
            on_sent: called with every frame that leaves.
        """
        self._ticket = ticket
        self._state = state
        self._open_trainer = open_trainer
        self._connect_timeout_s = connect_timeout_s
        self._evaluate_every = evaluate_every
        self._show = show
        self._log = log
        self._name = name
        self._shares_loss = shares_loss
        self._base, self._tokenizer = bytes.fromhex(base_digest), bytes.fromhex(tokenizer_digest)
        self._saved_heads: dict[int, bytes] = {}
        """What is saved of each agent, by its head."""
        self._trainer: Trainer | None = None
        self._sessions = Sessions(agents, self._new_session)
        self._on_sent = on_sent
        self._keys = state.keys()
        self._has_tried_next = self._has_redeemed = False
        self._socket = NodeSocket(ticket, self._keys, on_sent)
        self._manifest: Manifest | None = None
        self._may_interrupt = False
        self._wants_to_leave = False
        self._was_up = False
        self._wrong_key_tries = 0
        self._saved_at = time.monotonic()
        self._reported_at: dict[tuple[int, int], float] = {}
        """By agent and round, as a report names it."""
        self._evaluated_at: dict[int, int] = {}
        self._held_out: dict[int, float | None] = {}
        self._work_per_s: float | None = None
        self._end: End | None = None
        self._catch_up_began: tuple[str, float, int] | None = None
        self.view = View()

    def run(self) -> str:
        """Take part until the run is over, or until Ctrl-C or SIGTERM; why it ended.

        Raises:
            NodeError: the node cannot go on.
            StateError: its state cannot be written.
            Whatever `open_trainer` and its trainer raise; the coordinator is told that this node leaves.
        """
        previous = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            try:
                self._loop()
            except Leaving:
                pass
            except BudgetSpentError:
                self._carry_out(self._sessions.leave())
                self._save()
                raise
            except Exception:
                # Who cannot go on says so too: else the end of the run would wait for its return.
                self._carry_out(self._sessions.leave())
                raise
            if self._end is None:
                self._carry_out(self._sessions.leave())
                self._save()
                return f"left at round {self.view.round}; join again to go on"
            self._save()
            if self._end.code is not Exit.OK:
                raise NodeError(self._end.code, self._end.reason)
            return self._end.reason
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.view.socket = self._socket.socket_count()
            self._socket.close()
            self._log({"ended": self.view.round, **self._bytes(), **self._wire_bytes()})

    def _loop(self) -> None:
        started = time.monotonic()
        while self._end is None and not self._wants_to_leave:
            with self._interruptible():
                is_idle = not (self._sessions.next_probe() or self._sessions.next_audit())
                links, frames = self._socket.poll(_POLL_S if is_idle else 0.0)
            end = self._socket
            for link in links:
                if self._socket is end:  # else these are of one that was given up
                    self._on_link(link)
            for frame in frames:
                self._on_frame(frame)
                self._answer_if_asked()  # the next commit would take the weights away that it asks about
            if self._end is not None:
                return
            now = time.monotonic()
            if not self._was_up and now - started > self._connect_timeout_s:
                raise NodeError(
                    Exit.UNREACHABLE,
                    f"nobody answers at {self._ticket.host}:{self._ticket.port} for {self._connect_timeout_s:.0f} s. "
                    "Is the coordinator running, and is the port open between here and there?",
                )
            self._carry_out(self._sessions.on_tick(now))
            self._answer_if_asked()
            # Frames that wait come first: a commit among them may have closed the round already.
            wanted = self._sessions.next_probe() if not frames else None
            if wanted is not None:
                self._probe(*wanted)
            if now - self._saved_at > SAVE_EVERY_S:
                self._save()
            self._refresh()

    def _on_link(self, link: Link) -> None:
        if link is Link.UP:
            self._was_up = True
            if self._state.has_next_keys() and self._keys == self._state.next_keys():
                self._state.adopt_next_keys()
            self.view.notice = ""
            self._carry_out(self._sessions.on_link_up())
        elif link is Link.DOWN:
            self.view.notice = "connection lost, reconnecting"
            self._sessions.on_link_down()
        elif link is Link.NOBODY:
            self._wrong_key_tries = 0
        elif link is Link.REFUSED:
            self._sessions.on_link_down()
            self._come_otherwise()
        else:
            self._wrong_key_tries += 1
            # Once may be a coordinator that is just going down; but then nobody listens there for a while.
            if not self._was_up and self._wrong_key_tries >= _WRONG_KEY_TRIES:
                raise NodeError(
                    Exit.WRONG_KEY,
                    f"what answers at {self._ticket.host}:{self._ticket.port} does not have the ticket's key. "
                    "Is the ticket of this coordinator, and of this run?",
                )

    def _come_otherwise(self) -> None:
        """This node's key is not admitted: come with the one to replace it, or have it let in by the ticket."""
        if self._state.has_next_keys() and not self._has_tried_next:
            self._has_tried_next = True
            self._keys = self._state.next_keys()
        elif self._ticket.token and not self._has_redeemed:
            self._has_redeemed = True
            self._keys = self._state.keys()
            with self._interruptible():
                failure = redeem(self._ticket, self._keys.public, self._connect_timeout_s, self._on_sent)
            if failure is not None:
                raise NodeError(failure.code, failure.reason)
        else:
            raise NodeError(Exit.REFUSED, NOT_ADMITTED)
        self._socket.close()
        self._socket = NodeSocket(self._ticket, self._keys, self._on_sent)

    def _on_frame(self, frame: bytes) -> None:
        try:
            agent, bare = addressed(frame)
            message = decode_from_coordinator(bare)
        except WireError as error:
            raise NodeError(
                Exit.REFUSED, f"the coordinator sent what this version does not understand: {error}"
            ) from error
        self.view.meter.count_down(type(message).__name__, len(frame))
        self._carry_out(self._sessions.on_message(agent, message, time.monotonic()))

    def _carry_out(self, effects: list[AgentEffect]) -> None:
        for agent, effect in effects:
            kept = self._state.agent(agent)
            match effect:
                case Transmit(message):
                    frame = address(encode(message), agent)
                    if self._socket.send(frame):
                        self.view.meter.count_up(type(message).__name__, len(frame))
                        if isinstance(message, Report):
                            self._reported_at[agent, message.round] = time.monotonic()
                case Open(manifest):
                    self._open(agent, manifest)
                case StartOver(reason):
                    self.view.notice = f"starting over: {reason}"
                    kept.drop_weights()  # or a kill from here on would bring them back
                    self._saved_heads.pop(agent, None)
                    self._begin(agent)
                case Keep(content, data):
                    kept.keep_piece(content, data)
                case Jumped(round):
                    kept.drop_download()
                    if round:
                        self._save()
                case Applied():
                    self._applied(agent, effect)
                case End():
                    self._end = effect

    def _new_session(self, agent: int) -> Session:
        """A session that goes on from what was saved."""
        kept = self._state.agent(agent)
        saved = kept.load(self._ticket.run_id)
        if saved is not None:
            self._saved_heads[agent] = saved[1].head
        return Session(
            self._ticket.run_id,
            self._base,
            self._tokenizer,
            self._name,
            saved,
            kept.load_download(),
            agent=agent,
            shares_loss=self._shares_loss,
            estimator="" if self._trainer is None else self._trainer.estimator,
        )

    def _open(self, agent: int, manifest: Manifest) -> None:
        """An agent's first contact: go on from its saved weights or its first. The first of all brings the manifest."""
        is_first = self._manifest is None
        if is_first:
            self._load(manifest)
        session = self._sessions.by_agent[agent]
        if session.replica is None:
            self._begin(agent)
        assert self._work_per_s is not None
        assert self._trainer is not None
        session.work_per_s = self._work_per_s
        session.loaded(time.monotonic())
        self._carry_out([(agent, effect) for effect in session.declare(self._trainer.estimator)])
        if is_first:
            self._carry_out(self._sessions.on_manifest(manifest))

    def _load(self, manifest: Manifest) -> None:
        """Load base and data as the manifest says."""
        try:
            self.view.agents = len(self._sessions.check(manifest))
        except AssignmentError as error:
            raise NodeError(Exit.INPUT, str(error)) from error
        self._manifest = manifest
        self._state.save_manifest(manifest)
        self.view.rounds = manifest.run.rounds
        self.view.notice = "loading the base"
        self._show(self.view)
        with self._interruptible():
            self._trainer = self._open_trainer(manifest)
        self.view.notice = ""
        self._work_per_s = _measured_work(manifest.adapter.size)

    def _begin(self, agent: int) -> None:
        """Start an agent from the weights of round 0."""
        assert self._manifest is not None
        assert self._trainer is not None
        replica = Replica(self._manifest, self._trainer.initial_weights(), agent=agent)
        self._carry_out(self._sessions.opened(agent, replica, time.monotonic()))

    def _probe(self, agent: int, round: int, exponent: int) -> None:
        session, trainer = self._sessions.by_agent[agent], self._trainer
        assert session.replica is not None
        assert session.node is not None
        assert trainer is not None
        self._refresh()
        with self._interruptible():
            at = session.replica.round
            is_due = self._evaluate_every and at % self._evaluate_every == 0
            if is_due and self._evaluated_at.get(agent) != at:
                self._evaluated_at[agent] = at
                held_out = self._held_out[agent] = trainer.evaluate(session.replica.weights)
                self._log({"agent": agent, "round": at, "held_out": held_out, **self._bytes()})
            walk_step = session.walk_step(round, exponent)
            replica = session.replica
            importances = replica.pool.importances if replica.pool else None
            probed = trainer.probe(
                replica.weights, round, session.node, exponent, agent, walk_step, importances
            )
        self.view.num_directions += probed.codes.size
        self.view.num_no_votes += probed.num_no_votes
        self._carry_out(self._sessions.on_probed(agent, round, probed.codes, probed.loss, time.monotonic()))

    def _answer_if_asked(self) -> None:
        """Take the losses of a public audit, and tell them."""
        asked = self._sessions.next_audit()
        if asked is None:
            return
        agent, round, sample = asked
        session, trainer = self._sessions.by_agent[agent], self._trainer
        assert session.replica is not None
        assert trainer is not None
        self._refresh()
        with self._interruptible():
            losses = trainer.audit(session.replica.weights, sample, agent)
        self._carry_out(self._sessions.on_audited(agent, round, losses))

    def _applied(self, agent: int, applied: Applied) -> None:
        reported_at = self._reported_at.pop((agent, applied.commit.round % REPORT_ROUND_MODULUS), None)
        if applied.own_codes and reported_at is not None:
            self.view.lag_s = time.monotonic() - reported_at
        self.view.num_late += applied.was_late
        assert self._manifest is not None
        tells = not self._manifest.directions.are_combined
        self.view.members = len(applied.commit.participants) if tells else 0
        self._log(
            {
                "agent": agent,
                "round": applied.commit.round,
                "loss": self._sessions.by_agent[agent].loss,
                "members": self.view.members if tells else None,
                "counted": applied.own_codes,
                **self._bytes(),
            }
        )

    def _bytes(self) -> dict[str, int]:
        up, down = self.view.meter.total_up, self.view.meter.total_down
        return {
            "payload_up": up.payload_bytes,
            "payload_down": down.payload_bytes,
            "zmtp_up": up.zmtp_bytes,
            "zmtp_down": down.zmtp_bytes,
        }

    def _wire_bytes(self) -> dict[str, int]:
        count = self.view.socket
        if count is None:
            return {}
        return {"wire_up": count.wire_bytes_sent, "wire_down": count.wire_bytes_received}

    def _refresh(self) -> None:
        sessions, view = self._sessions, self.view
        view.stage, view.node, view.loss = sessions.stage, sessions.node, sessions.loss
        view.round, view.behind = sessions.round, sessions.behind
        held_out = [loss for loss in self._held_out.values() if loss is not None]
        view.held_out = sum(held_out) / len(held_out) if held_out else None
        self._estimate_catch_up()
        view.socket = self._socket.socket_count()
        self._show(view)

    def _estimate_catch_up(self) -> None:
        """What is left of downloads or of a replay, and how long that takes at the pace so far."""
        sessions, view = self._sessions, self.view
        downloads = sessions.downloads
        view.fetched_bytes = sum(len(download.data) for download in downloads)
        view.to_fetch_bytes = sum(download.num_bytes or 0 for download in downloads)
        left = view.to_fetch_bytes - view.fetched_bytes if downloads else sessions.behind
        kind = "fetch" if downloads else "replay"
        now = time.monotonic()
        if left <= 0:
            self._catch_up_began = None
            view.catch_up_left_s = None
        elif self._catch_up_began is None or self._catch_up_began[0] != kind:
            self._catch_up_began = kind, now, left
        else:
            _, began, at_first = self._catch_up_began
            done = at_first - left
            view.catch_up_left_s = left * (now - began) / done if done > 0 else None

    def _save(self) -> None:
        """Keep the weights of every agent that has moved since they were kept."""
        self._saved_at = time.monotonic()
        for agent, session in self._sessions.by_agent.items():
            replica = session.replica
            if self._manifest is None or replica is None or self._saved_heads.get(agent) == replica.head:
                continue
            self._state.agent(agent).save(replica, self._manifest)
            self._saved_heads[agent] = replica.head

    # ---- leaving --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Where a signal may strike at once: waiting, loading, measuring; never sending, applying or saving."""
        if self._wants_to_leave:
            raise Leaving
        self._may_interrupt = True
        try:
            yield
        finally:
            self._may_interrupt = False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._wants_to_leave = True
        if self._may_interrupt:
            self._may_interrupt = False
            raise Leaving
