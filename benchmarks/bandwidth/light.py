"""A light node: the real session over a real socket, with codes out of thin air. No model, no torch, no thread.

Decides nothing but when a report leaves: `Pace` says so. `fleet` turns many of them in one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import zmq

from benchmarks.bandwidth.chain import Chain
from benchmarks.light_node import Onlooker
from node.credentials import redeem
from transport.keys import KeyPair
from transport.messages import Brief, FromCoordinator, WireError, decode_from_coordinator, encode
from transport.meter import Meter, SocketCount
from transport.session import Applied, Effect, End, Open, Session, Stage, StartOver, Transmit
from transport.sockets import Link, NodeSocket
from transport.ticket import Ticket
from zo.codes import NO_VOTE
from zo.commit import Commit
from zo.manifest import Manifest
from zo.packing import expressible
from zo.replica import Replica

_LOSS: Final = 4.77
LOOK_S: Final = 2.0
"""How often the session is told that time has passed."""
_CONNECT_S: Final = 600.0
"""How long to ask for admission: over the slowest link it takes half a minute."""

Pace = Callable[[int], float | None]
"""The moment (monotonic, in seconds) at which the report of a round may leave; None: not known yet, turn the node again
once it is."""


class LightNode:
    """One node, until `leave` or the end of the run. One thread turns it; others may read it.

    Attributes:
        round: commits applied.
        disconnects: how often the connection was lost.
        reached: when it first followed the ledger with nothing left to catch up on (monotonic), or None.
        ended: why it ended; None while it goes on.
        descriptors: what to wait for; another object where the socket is another.
    """

    def __init__(
        self,
        ticket: Ticket,
        keys: KeyPair,
        digests: tuple[bytes, bytes],
        base: Path,
        pace: Pace,
        context: zmq.Context[zmq.Socket[bytes]],
        chain: Chain | None = None,
    ) -> None:
        """Connect, in the background.

        Args:
            ticket: of the run; its token is used if the key is not admitted.
            keys: of the node.
            digests: of base and tokenizer.
            base: directory of the base, for the shapes of the weights.
            pace: when reports leave.
            context: of libzmq, for all nodes.
            chain: what the nodes of a process work out once for all; None: each for itself.
        """
        self.round = 0
        self.disconnects = 0
        self.reached: float | None = None
        self.ended: str | None = None
        self.meter = Meter()
        self.frames: dict[str, bytes] = {}
        """The last frame of every type, for `plain`."""
        self._ticket, self._keys, self._base, self._pace = ticket, keys, base, pace
        self._context, self._chain = context, chain
        self._session = Session(ticket.run_id, *digests, "a-node", None)
        self._seen: Commit | None = None
        self._votes = np.zeros(0, np.int8)
        self._has_sent = False
        self._rng = np.random.default_rng(int.from_bytes(keys.public[:4], "little"))
        self._socket = NodeSocket(ticket, keys, context=context)
        self._counted: SocketCount | None = None
        self.descriptors = self._socket.descriptors

    @property
    def is_up(self) -> bool:
        """Whether it follows the ledger."""
        return self._session.stage in (Stage.FOLLOWING, Stage.REPORTED)

    def socket_count(self) -> SocketCount | None:
        """What the kernel counted over the node's own connections."""
        return self._socket.socket_count() if self.ended is None else self._counted

    def turn(self) -> float:
        """See to what has come and to what is due; when to turn it again (monotonic) unless something comes before.

        Infinity where its pace is not known yet, or it has ended.
        """
        try:
            due = self._turned()
        except Exception as error:
            self.ended = f"{type(error).__name__}: {error}"
        if self.ended is None:
            return due
        self._close()
        return float("inf")

    def leave(self) -> None:
        """Say goodbye and end."""
        if self.ended is None:
            self._carry_out(self._session.leave())
            self.ended = "left"
            self._close()

    def _turned(self) -> float:
        while True:
            self._has_sent = False
            links, frames = self._socket.poll(0.0)
            for link in links:
                if link is Link.UP:
                    self._carry_out(self._session.on_link_up())
                elif link is Link.DOWN:
                    self.disconnects += 1
                    self._session.on_link_down()
                elif link is Link.REFUSED:
                    self._redeem()
                    frames = []
                    break
            for frame in frames:
                self._on_frame(frame)
            due = self._report_if_due(time.monotonic())
            if not links and not self._has_sent:  # a send may have taken the sign of what came
                return due

    def _report_if_due(self, now: float) -> float:
        """When to look again."""
        wanted = self._session.next_probe()
        if wanted is None:
            self._carry_out(self._session.on_tick(now))
            return now + LOOK_S
        self.reached = self.reached or now
        due = self._pace(wanted[0])
        if due is None or due > now:
            return float("inf") if due is None else due
        manifest = self._session.manifest
        assert manifest is not None
        if not self._votes.size:
            votes = [code for code in expressible(manifest.codes.bits) if code != NO_VOTE]
            self._votes = np.array(votes, np.int8)
        codes = self._votes[self._rng.integers(self._votes.size, size=manifest.probe.directions)]
        self._carry_out(self._session.on_probed(wanted[0], codes, _LOSS, now))
        # A pipelined node has two rounds to report at once.
        return now if self._session.next_probe() else now + LOOK_S

    def _redeem(self) -> None:
        """Have the key admitted. All other nodes wait for it."""
        self._socket.close()
        failure = (
            redeem(self._ticket, self._keys.public, _CONNECT_S, lambda _: None)
            if self._ticket.token
            else None
        )
        if failure is not None or not self._ticket.token:
            self.ended = "not admitted" if failure is None else failure.reason
        self._socket = NodeSocket(self._ticket, self._keys, context=self._context)
        self.descriptors = self._socket.descriptors

    def _on_frame(self, frame: bytes) -> None:
        try:
            message = decode_from_coordinator(frame) if self._chain is None else self._chain.decoded(frame)
        except WireError as error:
            self.ended = str(error)
            return
        kind = type(message).__name__
        self.meter.count_down(kind, len(frame))
        self.frames[kind] = frame
        if self._chain is not None:
            message = self._whole(message, self._chain)
        self._carry_out(self._session.on_message(message, time.monotonic()))

    def _whole(self, message: FromCoordinator, chain: Chain) -> FromCoordinator:
        """A commit as the session would expand it, which is the same for every node that had the same one before."""
        if isinstance(message, Brief) and self._seen is not None:
            message = chain.expanded(message, self._seen)
        if isinstance(message, Commit):
            self._seen = message
        return message

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Transmit(message):
                    frame = encode(message)
                    if self._socket.send(frame):
                        self._has_sent = True
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
            self._carry_out(self._session.opened(self._first(manifest), time.monotonic()))

    def _first(self, manifest: Manifest) -> Replica:
        if self._chain is None:
            return Replica(manifest, Onlooker(manifest, self._base).initial_weights())
        return self._chain.replica(manifest)

    def _close(self) -> None:
        self._counted = self._socket.socket_count()
        self._socket.close()
