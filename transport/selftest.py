"""What a coordinator proves before it serves: that its own socket, as it stands, lets no stranger in."""

import contextlib
import ipaddress
import time
from collections.abc import Callable
from typing import Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from transport.keys import new_key_pair
from transport.sockets import CoordinatorSocket, Link, NodeSocket, SocketError
from transport.ticket import Ticket

_PATIENCE_S: Final = 10.0
_LOOK_S: Final = 0.02


def prove_closed(end: CoordinatorSocket, host: str, public: bytes) -> None:
    """Try to get in as strangers do: with a key drawn for it, and without any. Both have to be turned away.

    What honest nodes send meanwhile waits for the first `receive`.

    Args:
        end: the socket, bound.
        host: where it is bound; "*" for all addresses.
        public: the coordinator's public key, (32,) bytes.

    Raises:
        SocketError: a stranger was let in, or nobody answered.
    """
    place = Ticket(_own_address(host), end.port, bytes(16), public)
    stranger = NodeSocket(place, new_key_pair())
    try:
        _expect(end, "a random key", lambda: _outcome_of_handshake(stranger))
    finally:
        stranger.close()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        plain = context.socket(zmq.DEALER)
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED
        monitor = plain.get_monitor_socket(events)
        plain.set(zmq.IPV6, 1)
        plain.connect(place.endpoint)
        _expect(end, "a client without encryption", lambda: _outcome_without_encryption(monitor))
    finally:
        context.destroy(linger=0)


def _expect(end: CoordinatorSocket, who: str, outcome: Callable[[], bool | None]) -> None:
    """Wait until it is known whether a stranger is in (True) or out (False)."""
    until = time.monotonic() + _PATIENCE_S
    while (is_in := outcome()) is None:
        if time.monotonic() > until:
            raise SocketError(
                f"self-test: {who} got no answer on the coordinator's own port; it is not served"
            )
        end.attend(_LOOK_S)
    if is_in:
        raise SocketError(f"self-test: {who} was let in; the run is not served. Please report this")


def _outcome_of_handshake(stranger: NodeSocket) -> bool | None:
    links, _ = stranger.poll(0.0)
    if Link.UP in links:
        return True
    return False if Link.REFUSED in links or Link.WRONG_KEY in links else None


def _outcome_without_encryption(monitor: "zmq.Socket[bytes]") -> bool | None:
    if not monitor.poll(0):
        return None
    return bool(recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)


def _own_address(host: str) -> str:
    """Where a socket that is bound to `host` is reached from this machine."""
    host = host.strip("[]")
    if host == "*":
        return "127.0.0.1"
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            return "127.0.0.1" if address.version == 4 else "::1"
    return host
