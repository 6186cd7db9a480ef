"""A light node: the real session over a real socket, with codes out of thin air. No model, no torch, a thread each.

Decides nothing but when a report leaves: `Pace` says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.light_node import Onlooker
from node.credentials import redeem
from transport.keys import KeyPair
from transport.messages import WireError, decode_from_coordinator, encode
from transport.meter import Meter, SocketCount
from transport.session import Applied, Effect, End, Open, Session, Stage, StartOver, Transmit
from transport.sockets import Link, NodeSocket
from transport.ticket import Ticket
from zo.codes import NO_VOTE
from zo.manifest import Manifest
from zo.packing import expressible
from zo.replica import Replica

_LOSS: Final = 4.77
_POLL_S: Final = 1.0
_CONNECT_S: Final = 600.0
"""How long to ask for admission: over the slowest link it takes half a minute."""

Pace = Callable[[int], float | None]
"""The moment (monotonic, in seconds) at which the report of a round may leave; None: not known yet, ask again."""


class LightNode(threading.Thread):
    """One node, until `leave` or the end of the run.

    Attributes:
        round: commits applied.
        disconnects: how often the connection was lost.
        reached: when it first followed the ledger with nothing left to catch up on (monotonic), or None.
        ended: why it ended; None while it goes on.
    """

    def __init__(
        self, ticket: Ticket, keys: KeyPair, digests: tuple[bytes, bytes], base: Path, pace: Pace
    ) -> None:
        """Prepare; `start` connects.

        Args:
            ticket: of the run; its token is used if the key is not admitted.
            keys: of the node.
            digests: of base and tokenizer.
            base: directory of the base, for the shapes of the weights.
            pace: when reports leave.
        """
        super().__init__(daemon=True)
        self.round = 0
        self.disconnects = 0
        self.reached: float | None = None
        self.ended: str | None = None
        self.meter = Meter()
        self.frames: dict[str, bytes] = {}
        """The last frame of every type, for `plain`."""
        self._ticket, self._keys, self._base, self._pace = ticket, keys, base, pace
        self._session = Session(ticket.run_id, *digests, "a-node", None)
        self._leaving = threading.Event()
        self._rng = np.random.default_rng(int.from_bytes(keys.public[:4], "little"))
        self._socket: NodeSocket | None = None
        self._counted: SocketCount | None = None

    @property
    def is_up(self) -> bool:
        """Whether it follows the ledger."""
        return self._session.stage in (Stage.FOLLOWING, Stage.REPORTED)

    def leave(self) -> None:
        """Say goodbye and end, soon."""
        self._leaving.set()

    def socket_count(self) -> SocketCount | None:
        """What the kernel counted over the node's own connections."""
        socket = self._socket
        return self._counted if socket is None else socket.socket_count()

    def run(self) -> None:
        """Take part."""
        self._socket = NodeSocket(self._ticket, self._keys)
        try:
            timeout_s = 0.0
            while self.ended is None and not self._leaving.is_set():
                timeout_s = self._turn(timeout_s)
            if self.ended is None:
                self._carry_out(self._session.leave())
                self.ended = "left"
        except Exception as error:
            self.ended = f"{type(error).__name__}: {error}"
        finally:
            socket, self._socket = self._socket, None
            self._counted = socket.socket_count()
            socket.close()

    def _turn(self, timeout_s: float) -> float:
        """One look at socket and clock; how long the next may wait."""
        assert self._socket is not None
        links, frames = self._socket.poll(timeout_s)
        for link in links:
            if link is Link.UP:
                self._carry_out(self._session.on_link_up())
            elif link is Link.DOWN:
                self.disconnects += 1
                self._session.on_link_down()
            elif link is Link.REFUSED:
                return self._redeem()
        for frame in frames:
            self._on_frame(frame)
        now = time.monotonic()
        self._carry_out(self._session.on_tick(now))
        if self._session.replica is not None:
            self.round = self._session.replica.round
        wanted = self._session.next_probe()
        if wanted is None:
            return min(_POLL_S, 0.05) if self._leaving.is_set() else _POLL_S
        self.reached = self.reached or now
        due = self._pace(wanted[0])
        if due is None or due > now:
            return 0.005 if due is None else min(due - now, _POLL_S)
        manifest = self._session.manifest
        assert manifest is not None
        votes = [code for code in expressible(manifest.codes.bits) if code != NO_VOTE]
        codes = self._rng.choice(np.array(votes, np.int8), manifest.probe.directions)
        self._carry_out(self._session.on_probed(wanted[0], codes, _LOSS, now))
        return 0.0 if self._session.next_probe() else _POLL_S

    def _redeem(self) -> float:
        assert self._socket is not None
        self._socket.close()
        failure = (
            redeem(self._ticket, self._keys.public, _CONNECT_S, lambda _: None)
            if self._ticket.token
            else None
        )
        if failure is not None or not self._ticket.token:
            self.ended = "not admitted" if failure is None else failure.reason
        self._socket = NodeSocket(self._ticket, self._keys)
        return 0.0

    def _on_frame(self, frame: bytes) -> None:
        try:
            message = decode_from_coordinator(frame)
        except WireError as error:
            self.ended = str(error)
            return
        kind = type(message).__name__
        self.meter.count_down(kind, len(frame))
        self.frames[kind] = frame
        self._carry_out(self._session.on_message(message, time.monotonic()))

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Transmit(message):
                    frame = encode(message)
                    assert self._socket is not None
                    if self._socket.send(frame):
                        kind = type(message).__name__
                        self.meter.count_up(kind, len(frame))
                        self.frames[kind] = frame
                case Open() | StartOver():
                    self._begin()
                case Applied():
                    self.round = effect.commit.round + 1
                case End():
                    self.ended = effect.reason

    def _begin(self) -> None:
        manifest = self._session.manifest
        assert manifest is not None
        if self._session.replica is None:
            replica = Replica(manifest, first_weights(manifest, self._base))
            self._carry_out(self._session.opened(replica, time.monotonic()))


_first: dict[bytes, NDArray[np.int32]] = {}
_lock = threading.Lock()


def first_weights(manifest: Manifest, base: Path) -> NDArray[np.int32]:
    """The weights of round 0, computed once for all nodes of a run: (size,) int32."""
    with _lock:
        if manifest.run_id not in _first:
            _first.clear()
            _first[manifest.run_id] = Onlooker(manifest, base).initial_weights()
        return _first[manifest.run_id]
