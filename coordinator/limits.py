"""How much a node may send: what answers the coordinator's own frames, and a little more with time. Pure.

A node that keeps to the protocol speaks when it is spoken to: a report and a progress for a commit, a progress for each
entry of a history at most, a fetch for a piece. So its allowance grows with what it is sent, and a polite node on the
fastest link never meets the limit. `Hello` asks for much and is asked by nobody: it has a bucket of its own.
"""

from typing import Final

from coordinator.membership import FLOW_WINDOW
from transport.bucket import TokenBucket

_MESSAGES_PER_S: Final = 50.0
_MESSAGES_AT_ONCE: Final = 1024
_HELLOS_PER_S: Final = 5.0
_HELLOS_AT_ONCE: Final = 100
"""A link that breaks after every handshake brings a `Hello` every 0.2 s or so."""
_ANSWERS: Final = {"Commit": 2, "History": FLOW_WINDOW, "Piece": 1, "Audit": 1}
"""Most messages that a node answers a frame with, where it may be sent many of them."""
_EMPTY_PIECE_BYTES: Final = 64


class Limits:
    """The allowance of every key that has spoken since the start."""

    def __init__(self, num_agents: int = 1) -> None:
        """Begin; a node says for each of the run's agents what it says for one."""
        self._num_agents = num_agents
        self._messages: dict[bytes, TokenBucket] = {}
        self._hellos: dict[bytes, TokenBucket] = {}

    def may_speak(self, key: bytes, now: float) -> bool:
        """Whether one more message of this key is within its limit, which it counts for."""
        bucket = self._messages.get(key)
        if bucket is None:
            rate, burst = _MESSAGES_PER_S * self._num_agents, _MESSAGES_AT_ONCE * self._num_agents
            bucket = self._messages[key] = TokenBucket(rate, burst, now)
        return bucket.take(now)

    def may_greet(self, key: bytes, now: float) -> bool:
        """Whether one more `Hello` of this key is."""
        bucket = self._hellos.get(key)
        if bucket is None:
            rate, burst = _HELLOS_PER_S * self._num_agents, _HELLOS_AT_ONCE * self._num_agents
            bucket = self._hellos[key] = TokenBucket(rate, burst, now)
        return bucket.take(now)

    def was_sent(self, key: bytes, kind: str, num_bytes: int) -> None:
        """A message of this type and size was sent to a key, and may be answered."""
        is_empty = kind == "Piece" and num_bytes < _EMPTY_PIECE_BYTES  # asked for at random
        bucket = self._messages.get(key)
        if bucket is not None and not is_empty:
            bucket.grant(_ANSWERS.get(kind, 0))
