"""Which connections a coordinator keeps open. Decides which one has to go; whoever owns the socket cuts it.

libzmq bounds the size of a frame, the queue of a connection and the time of a handshake. It does not bound how many
connections there are, neither of strangers who say nothing nor of one key; nor how many frames make one message, which
it keeps until the last has come. Those are bounded here. Pure: events in, numbers of connections out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MOST_SILENT: Final = 2048
"""Connections that nothing authentic has come over yet. Nodes that come back while they compute are among them."""
MOST_OF_A_KEY: Final = 4
"""A node has one; the one before may not have been noticed to be dead, and a probe of the way (`doctor`) is another."""
MOST_UNREAD_BYTES: Final = 2**20
"""What a connection may have sent beyond what was taken from it: twice its queue of frames."""
_BESIDE_BYTES: Final = 4096
_BESIDE_BYTES_PER_S: Final = 10.0
"""Handshake and heartbeats, which are no frames: 600 bytes, and 42 every 80 seconds."""


_MOST_ENDED: Final = 4096
"""Sessions that are remembered after their end, longer than a frame of theirs can lie in a queue."""


@dataclass
class _Connection:
    address: str
    since: float
    session: bytes | None = None
    key: bytes = b""
    taken_bytes: int = 0


class Connections:
    """The open connections, by a number that names each while it is open (its file descriptor)."""

    def __init__(self, most_silent: int = MOST_SILENT, most_of_a_key: int = MOST_OF_A_KEY) -> None:
        self._most_silent = most_silent
        self._most_of_a_key = most_of_a_key
        self._open: dict[int, _Connection] = {}
        self._silent: dict[str, dict[int, None]] = {}
        """By address, the silent ones in the order of their arrival."""
        self._num_silent = 0
        self._by_session: dict[bytes, int] = {}
        self._by_key: dict[bytes, list[int]] = {}
        self._ended: dict[bytes, None] = {}
        """Sessions that were, the oldest first: frames of theirs may still come, when their number is another's."""

    def __len__(self) -> int:
        return len(self._open)

    def accepted(self, number: int, address: str, now: float) -> int | None:
        """A connection has been accepted; the one to cut, if there are too many that say nothing.

        That is the oldest of the address that has most of them, so that one peer cannot drive out the others.
        """
        self.ended(number)
        self._open[number] = _Connection(address, now)
        self._silent.setdefault(address, {})[number] = None
        self._num_silent += 1
        if self._num_silent <= self._most_silent:
            return None
        busiest = max(self._silent.values(), key=len)
        cut = next(iter(busiest))
        self.ended(cut)
        return cut

    def spoke(self, number: int, session: bytes, key: bytes) -> int | None:
        """The first frame of a session came over a connection; the one to cut, if its key has too many.

        That is the key's oldest: the newest session of a node is the one that counts. A connection has one session; but
        the last frames of one that has ended may be read when its number is another's already. So it is the session's
        that spoke last: who is gone soon speaks no more.
        """
        connection = self._open.get(number)
        if connection is None or session in self._ended:
            return None  # it has ended meanwhile, and its number may be another's
        if connection.session is None:
            self._no_longer_silent(number, connection)
        else:
            self._part(number, connection.session, connection.key)
        connection.session, connection.key = session, key
        self._by_session[session] = number
        of_key = self._by_key.setdefault(key, [])
        of_key.append(number)
        if len(of_key) <= self._most_of_a_key:
            return None
        cut = of_key[0]
        self.ended(cut)
        return cut

    def took(self, session: bytes, num_bytes: int) -> bool:
        """Bytes of a frame were taken from a session's connection; False if it has none that is known."""
        number = self._by_session.get(session)
        if number is None:
            return False
        self._open[number].taken_bytes += num_bytes
        return True

    def overfull(self, received_bytes: Callable[[int], int | None], now: float) -> list[int]:
        """The connections that have sent far more than was taken from them: they fill memory, or do not listen.

        Args:
            received_bytes: what the kernel has received over a connection; None if nobody knows.
            now: in seconds.
        """
        cut = []
        for number, connection in self._open.items():
            received = received_bytes(number)
            beside = _BESIDE_BYTES + _BESIDE_BYTES_PER_S * (now - connection.since)
            if received is not None and received - connection.taken_bytes > MOST_UNREAD_BYTES + beside:
                cut.append(number)
        for number in cut:
            self.ended(number)
        return cut

    def ended(self, number: int) -> None:
        """A connection is no more."""
        connection = self._open.pop(number, None)
        if connection is None:
            return
        if connection.session is None:
            self._no_longer_silent(number, connection)
            return
        self._part(number, connection.session, connection.key)
        self._ended[connection.session] = None
        if len(self._ended) > _MOST_ENDED:
            del self._ended[next(iter(self._ended))]

    def of_session(self, session: bytes) -> int | None:
        """The connection of a session; None if it has none (any more)."""
        return self._by_session.get(session)

    def _part(self, number: int, session: bytes, key: bytes) -> None:
        """A connection is no longer that of a session."""
        del self._by_session[session]
        of_key = self._by_key[key]
        of_key.remove(number)
        if not of_key:
            del self._by_key[key]

    def _no_longer_silent(self, number: int, connection: _Connection) -> None:
        self._num_silent -= 1
        of_address = self._silent[connection.address]
        del of_address[number]
        if not of_address:
            del self._silent[connection.address]
