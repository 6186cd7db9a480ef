"""The two ends of the wire: a ROUTER for the coordinator, a DEALER for the node, both under CURVE.

One frame per message, never multipart (each extra frame costs 35 bytes). Neither end decides anything: bytes in, bytes
out, and what became of them. Facts about libzmq that shaped this file are in docs/protocol.md.
"""

import contextlib
import ctypes
import enum
import errno
import os
import random
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from transport.connections import Connections
from transport.gate import ZAP_DOMAIN, Gate
from transport.keys import KeyPair
from transport.messages import MAX_COORDINATOR_FRAME_BYTES, MAX_NODE_FRAME_BYTES
from transport.meter import CURVE_BOX_BYTES, NOTHING_COUNTED, SocketCount, read_socket_count, zmtp_bytes
from transport.ticket import Ticket

HEARTBEAT_INTERVAL_MS: Final = 80_000
"""346 bytes of Ethernet each, to and fro: 4.3 a second."""
HEARTBEAT_TIMEOUT_MS: Final = 60_000
# A time to live in the heartbeats would have the other side cut a silent node, but libzmq keeps it in 16 bits of
# milliseconds: it would have to be shorter than the interval. So the coordinator's kernel asks; a living node's
# heartbeats come sooner, and it need not.
_KEEPALIVE_AFTER_S: Final = 300
_KEEPALIVE_EVERY_S: Final = 60
_KEEPALIVE_TRIES: Final = 5
_HANDSHAKE_MS: Final = 20_000
_QUEUE_FRAMES: Final = 256
_RECEIVE_QUEUE_FRAMES: Final = 64
"""Of one node at the coordinator: half a megabyte. What it sends beyond that waits on its side of the connection."""
_REDIAL_S: Final = 1.0
_WEIGH_EVERY_S: Final = 1.0
_EVENTS_AT_ONCE: Final = 64
_REMEMBERED_CUTS: Final = 256
_TCP_QUICKACK: Final[int | None] = getattr(socket, "TCP_QUICKACK", None)
"""Of Linux alone."""
_LINGER_MS: Final = 500  # a last Leave, Finished or Refuse still gets out


class SocketError(RuntimeError):
    """A socket that cannot be opened; the message says where and why."""


class Sent(enum.Enum):
    """What became of a frame."""

    OK = "queued to a live connection"
    FULL = "the peer does not read: its queue is full"
    GONE = "the peer is no longer connected"


class Arrival(NamedTuple):
    """One frame at the coordinator."""

    session: bytes
    """The routing id of the connection. It names where an answer goes, and nobody: who it is, the key says."""
    key: bytes
    """(32,) bytes: the public key that the handshake proved."""
    frame: bytes


class CoordinatorSocket:
    """The coordinator's end: many sessions, each bound to the key its handshake proved."""

    def __init__(
        self, host: str, port: int, keys: KeyPair, admits: Callable[[bytes], bool] = lambda _: True
    ) -> None:
        """Bind. Handshakes are seen to by `receive` and `attend`.

        Args:
            host: address or interface to bind; "*" for all.
            port: TCP port; 0 lets the system choose (see `port`).
            keys: the coordinator's key pair.
            admits: whether a client's public key may complete the handshake.

        Raises:
            SocketError: the address cannot be bound.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = Gate(self._context, admits)
        _make_routing_ids_unpredictable()
        self._router = router = self._context.socket(zmq.ROUTER)
        router.set(zmq.ROUTER_MANDATORY, 1)  # a frame for a gone or stalled peer is an error, not silence
        router.set(zmq.SNDHWM, _QUEUE_FRAMES)
        router.set(zmq.RCVHWM, _RECEIVE_QUEUE_FRAMES)
        router.set(zmq.MAXMSGSIZE, MAX_NODE_FRAME_BYTES + CURVE_BOX_BYTES)  # libzmq counts the box
        router.set(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        router.set(zmq.BACKLOG, 1024)
        router.set(zmq.TCP_KEEPALIVE, 1)
        router.set(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_AFTER_S)
        router.set(zmq.TCP_KEEPALIVE_INTVL, _KEEPALIVE_EVERY_S)
        router.set(zmq.TCP_KEEPALIVE_CNT, _KEEPALIVE_TRIES)
        router.set(zmq.IPV6, 1)
        router.set(zmq.CURVE_SERVER, 1)
        router.set(zmq.CURVE_SECRETKEY, z85.encode(keys.secret))
        router.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        router.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._connections = Connections()
        self._weigh_at = 0.0
        self._was_cut: dict[bytes, None] = {}
        """The last sessions that were cut, in that order."""
        self._monitor = router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        shown = f"[{host}]" if ":" in host else host
        try:
            router.bind(f"tcp://{shown}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            if error.errno == errno.EADDRINUSE:
                raise SocketError(
                    f"{host}:{port} is in use. Stop what listens there, or choose another --port"
                ) from error
            raise SocketError(f"cannot bind {host}:{port}: {error.strerror}") from error
        endpoint = bytes(router.get(zmq.LAST_ENDPOINT))
        self.port = int(endpoint.rstrip(b"\0").rsplit(b":", 1)[1])
        self._poller, self._gate_poller = zmq.Poller(), zmq.Poller()
        self._poller.register(router, zmq.POLLIN)
        for poller in (self._poller, self._gate_poller):
            poller.register(self._gate.socket, zmq.POLLIN)
            poller.register(self._monitor, zmq.POLLIN)

    def receive(self, timeout_s: float, limit: int = 256) -> Iterator[Arrival]:
        """Up to `limit` frames: waits up to `timeout_s` for the first, then takes what is there.

        Frames of a session that was cut, which were on their way already, are dropped.
        """
        ready = self._attend(self._poller, timeout_s)
        now = time.monotonic()
        if now >= self._weigh_at:
            self._weigh_at = now + _WEIGH_EVERY_S
            for descriptor in self._connections.overfull(_received_bytes, now):
                self._cut(descriptor)
        if self._router not in ready:
            return
        for _ in range(limit):
            try:
                parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            session, frame = parts[0].bytes, parts[1]
            key = bytes.fromhex(str(frame.get("User-Id")))
            num_bytes = zmtp_bytes(len(frame))
            if not self._connections.took(session, num_bytes):
                self._watch()  # what there is to know of its beginning lies there by now
                descriptor = frame.get(zmq.SRCFD)
                assert isinstance(descriptor, int)
                self._cut(self._connections.spoke(descriptor, session, key))
                self._connections.took(session, num_bytes)
            if len(parts) > 2:  # no message of this protocol has several frames
                self.cut(session)
            elif session not in self._was_cut:
                yield Arrival(session, key, frame.bytes)

    def attend(self, timeout_s: float) -> None:
        """See to handshakes alone, for up to `timeout_s`; frames wait for `receive`."""
        self._attend(self._gate_poller, timeout_s)

    def send(self, session: bytes, frame: bytes) -> Sent:
        """Queue one frame for one session, without waiting."""
        try:
            self._router.send_multipart([session, frame], zmq.NOBLOCK)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        return Sent.OK

    def cut(self, session: bytes) -> None:
        """End a session's connection, whatever its other end wants; what is queued for it may be lost."""
        self._cut(self._connections.of_session(session))
        self._was_cut[session] = None
        if len(self._was_cut) > _REMEMBERED_CUTS:
            del self._was_cut[next(iter(self._was_cut))]

    def close(self) -> None:
        """Close; queued frames have half a second to leave. Once closed, it stays so."""
        if self._router.closed:
            return
        self._router.disable_monitor()
        self._monitor.close()
        self._context.destroy(linger=_LINGER_MS)

    def _attend(self, poller: zmq.Poller, timeout_s: float) -> dict[Any, int]:
        ready = dict(poller.poll(max(0, int(timeout_s * 1000))))
        if self._gate.socket in ready:
            self._gate.answer()
        if self._monitor in ready:
            self._watch()
        return ready

    def _watch(self) -> None:
        """Take note of connections that began or ended: of some at a time, so that a flood of them holds nothing up."""
        for _ in range(_EVENTS_AT_ONCE):
            try:
                (fields, _) = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event, descriptor = struct.unpack(
                "=hi", fields
            )  # zmq_socket_monitor(3); pyzmq makes enumerations of it
            if event == zmq.EVENT_DISCONNECTED:
                self._connections.ended(descriptor)
                continue
            address = ""
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                address = connection.getpeername()[0]
            self._cut(self._connections.accepted(descriptor, address, time.monotonic()))

    def _cut(self, descriptor: int | None) -> None:
        """End a connection. libzmq sees it end as if the peer had gone, and closes its own descriptor."""
        if descriptor is None:
            return
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.shutdown(socket.SHUT_RDWR)


def _make_routing_ids_unpredictable() -> None:
    """Let the next socket count its routing ids from a number that nobody can guess.

    libzmq counts from `rand()`, which it does not seed, and aborts (4.3.5) when an id that it makes is taken already. A
    client of somebody's own making could claim the next one, and so end the process at the next honest connection.
    """
    with contextlib.suppress(OSError, AttributeError):  # where there is no such C library, it is as before
        ctypes.CDLL(None).srand(secrets.randbits(31))


def _received_bytes(descriptor: int) -> int | None:
    count = read_socket_count(descriptor)
    return None if count is None else count.bytes_received


class Link(enum.Enum):
    """What happened to a node's connection."""

    UP = "connected, and the coordinator's key is the ticket's"
    DOWN = "disconnected; reconnecting by itself"
    WRONG_KEY = "reached something that is not this ticket's coordinator"
    REFUSED = "the coordinator does not admit this node's key"
    NOBODY = "nobody listens there, or nobody can be reached"


class NodeSocket:
    """The node's end: one connection that is re-established by itself, with growing, jittered delays.

    libzmq does so, with one exception (seen with 4.3.5): after bytes that cannot be authentic it gives the endpoint up
    for ever, or stops reading it. One flipped bit on the way must not end a node, so then it is connected anew here.
    """

    def __init__(
        self,
        ticket: Ticket,
        keys: KeyPair,
        on_sent: Callable[[bytes], None] = lambda _: None,
        context: "zmq.Context[zmq.Socket[bytes]] | None" = None,
    ) -> None:
        """Connect, in the background.

        Args:
            ticket: of the run.
            keys: of this node.
            on_sent: told of every frame that leaves. There is no other way out than `send`.
            context: of libzmq, which stays open; one of its own, with its own threads, if None.

        Raises:
            SocketError: the ticket's address is none.
        """
        self._on_sent = on_sent
        self._owns_context = context is None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context() if context is None else context
        self._dealer = dealer = self._context.socket(zmq.DEALER)
        dealer.set(zmq.IMMEDIATE, 1)  # no queue while disconnected: what was not sent is decided anew
        dealer.set(zmq.SNDHWM, _QUEUE_FRAMES)
        dealer.set(zmq.RCVHWM, _QUEUE_FRAMES)
        dealer.set(zmq.MAXMSGSIZE, MAX_COORDINATOR_FRAME_BYTES + CURVE_BOX_BYTES)
        dealer.set(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        # Only this side sends heartbeats.
        dealer.set(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        dealer.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        dealer.set(zmq.RECONNECT_IVL, 100)
        dealer.set(zmq.RECONNECT_IVL_MAX, 5_000)
        dealer.set(zmq.IPV6, 1)
        dealer.set(zmq.CURVE_SERVERKEY, z85.encode(ticket.key))
        dealer.set(zmq.CURVE_PUBLICKEY, z85.encode(keys.public))
        dealer.set(zmq.CURVE_SECRETKEY, z85.encode(keys.secret))
        self._monitor = dealer.get_monitor_socket(
            zmq.EVENT_CONNECTED
            | zmq.EVENT_CONNECT_RETRIED
            | zmq.EVENT_CLOSED
            | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        self._connection: socket.socket | None = None
        """A duplicate: it keeps the kernel's counters readable until this side has seen the connection end."""
        self._stands: bool | None = None
        """Whether the handshake is done; None while there is no connection."""
        self._closed_count = NOTHING_COUNTED
        self._endpoint = ticket.endpoint
        self._redial_at: float | None = None
        try:
            dealer.connect(ticket.endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise SocketError(f"cannot connect to {ticket.endpoint}: {error.strerror}") from error
        self._poller = zmq.Poller()
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def poll(self, timeout_s: float) -> tuple[list[Link], list[bytes]]:
        """What happened to the connection, and the frames that arrived; waits up to `timeout_s` for either."""
        ready = dict(self._poller.poll(max(0, int(timeout_s * 1000))))
        links = list(self._link_events()) if self._monitor in ready else []
        if self._redial_at is not None and time.monotonic() >= self._redial_at:
            self._redial()
        frames: list[bytes] = []
        while self._dealer in ready and len(frames) < _QUEUE_FRAMES:
            try:
                parts = self._dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(parts) == 1:
                frames.append(parts[0])
        return links, frames

    def send(self, frame: bytes) -> bool:
        """Queue one frame without waiting; False if there is no connection or its queue is full."""
        for _ in range(2):
            try:
                self._dealer.send(frame, zmq.NOBLOCK)
            except zmq.Again:
                # A send looks only once a millisecond for a connection that is new; a poll does at any time.
                if not self._dealer.poll(0, zmq.POLLOUT):
                    break
            else:
                self._delay_acknowledgements()
                self._on_sent(frame)
                return True
        return False

    def socket_count(self) -> SocketCount | None:
        """What the kernel counted over all connections so far; None where it cannot be asked."""
        if self._connection is None:
            return self._closed_count if self._closed_count != NOTHING_COUNTED else None
        count = read_socket_count(self._connection.fileno())
        return None if count is None else self._closed_count + count

    @property
    def descriptors(self) -> tuple[int, int]:
        """What an event loop of many sockets can wait for: once one is readable, `poll` until there is nothing more.

        A `send` may take the sign of a frame that has come; so `poll` after it, too.
        """
        return int(self._dealer.get(zmq.FD)), int(self._monitor.get(zmq.FD))

    def close(self) -> None:
        """Close; queued frames have half a second to leave. Once closed, it stays so."""
        if self._dealer.closed:
            return
        self._forget_connection()
        self._dealer.disable_monitor()
        self._monitor.close()
        if self._owns_context:
            self._context.destroy(linger=_LINGER_MS)
        else:
            self._dealer.close(linger=_LINGER_MS)

    def _link_events(self) -> Iterator[Link]:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            kind = event["event"]
            if kind == zmq.EVENT_CONNECT_RETRIED:
                self._redial_at = None
            elif kind == zmq.EVENT_CONNECTED:
                self._redial_at = None
                self._forget_connection()
                self._stands = False
                with contextlib.suppress(OSError):
                    self._connection = socket.socket(fileno=os.dup(event["value"]))
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._stands = True
                yield Link.UP
            elif kind == zmq.EVENT_CLOSED:
                yield Link.NOBODY
            elif kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._stands = None
                yield Link.REFUSED
            else:
                # Disconnected, or a failed handshake: which also tells of a frame that is not authentic, long after the
                # handshake. One end of a connection may bring two of these events, and is one end all the same.
                stood, self._stands = self._stands, None
                self._redial_soon()
                self._forget_connection()
                if stood is not None:
                    # A server with another key cannot read our hello and hangs up without a word.
                    yield Link.DOWN if stood else Link.WRONG_KEY

    def _redial_soon(self) -> None:
        """Connect again if libzmq does not say that it does so itself."""
        self._redial_at = time.monotonic() + random.uniform(_REDIAL_S, 2 * _REDIAL_S)

    def _redial(self) -> None:
        self._redial_at = None
        with contextlib.suppress(zmq.ZMQError):  # it may have forgotten the endpoint, or not
            self._dealer.disconnect(self._endpoint)
        self._dealer.connect(self._endpoint)

    def _delay_acknowledgements(self) -> None:
        """Have what comes next acknowledged as a whole, not its first segments one by one.

        Linux acknowledges at once when a connection is young, and again after every silence that was longer than its
        retransmission timeout, 0.2 s: so before each commit, if it is not told otherwise each time.
        """
        if self._connection is not None and _TCP_QUICKACK is not None:
            with contextlib.suppress(OSError):
                self._connection.setsockopt(socket.IPPROTO_TCP, _TCP_QUICKACK, 0)

    def _forget_connection(self) -> None:
        if self._connection is not None:
            count = read_socket_count(self._connection.fileno())
            self._closed_count = self._closed_count + (count or NOTHING_COUNTED)
            self._connection.close()
            self._connection = None
