"""How a node's key comes to be admitted: by redeeming a ticket's token, or in the place of the key before it.

Each is one question over a connection of its own, and one answer.
"""

import time
from collections.abc import Callable
from typing import Final

from node.state import StateDirectory
from transport.exits import Exit
from transport.keys import KeyPair, invitation_keys
from transport.messages import (
    Admitted,
    Redeem,
    Refuse,
    Rotate,
    WireError,
    decode_from_coordinator,
    encode,
)
from transport.session import End
from transport.sockets import Link, NodeSocket
from transport.ticket import Ticket

_LOOK_S: Final = 0.2
_WRONG_KEY_TRIES: Final = 3
"""Once may be a coordinator that is just going down."""
NOT_ADMITTED: Final = (
    "the coordinator does not admit this node's key: it was revoked, or never invited. "
    "Ask for a ticket that `zo-coordinator invite` made"
)
_UNKNOWN_TOKEN: Final = (
    "the coordinator does not know the ticket's token: it is of another run, was made up, or was mistyped"
)


def redeem(ticket: Ticket, public: bytes, timeout_s: float, on_sent: Callable[[bytes], None]) -> End | None:
    """Have a key admitted by the ticket's token; why it is not, or None.

    Args:
        ticket: one with a token.
        public: the node's key, (32,) bytes.
        timeout_s: how long to wait for an answer.
        on_sent: called with every frame that leaves.
    """
    answer = _ask(ticket, invitation_keys(ticket.token), Redeem(ticket.run_id, public), timeout_s, on_sent)
    if answer is Link.REFUSED:
        return End(Exit.REFUSED, _UNKNOWN_TOKEN)
    return _failure(ticket, answer, timeout_s)


def rotate(
    state: StateDirectory, ticket: Ticket, timeout_s: float, on_sent: Callable[[bytes], None]
) -> End | None:
    """Give the node a new key, which keeps its number and history; why it has none, or None.

    The new key is on disk before the coordinator hears of it. If the answer is lost, both keys are, and whichever is
    admitted is found out at the next join or the next try.

    Raises:
        KeyFileError: a key file cannot be used.
        StateError: the state directory cannot be written.
    """
    new = state.next_keys()
    question = Rotate(new.public)
    answer = _ask(ticket, state.keys(), question, timeout_s, on_sent)
    if answer is Link.REFUSED:  # by an earlier try, whose answer was lost?
        answer = _ask(ticket, new, question, timeout_s, on_sent)
    if answer is Link.REFUSED:
        return End(Exit.REFUSED, NOT_ADMITTED)
    failure = _failure(ticket, answer, timeout_s)
    if failure is None:
        state.adopt_next_keys()
    return failure


def _ask(
    ticket: Ticket,
    keys: KeyPair,
    question: Redeem | Rotate,
    timeout_s: float,
    on_sent: Callable[[bytes], None],
) -> Admitted | Refuse | Link | None:
    """The answer to one question; why there was no connection for it; None if nobody answered in time."""
    until = time.monotonic() + timeout_s
    num_wrong = 0
    end = NodeSocket(ticket, keys, on_sent)
    try:
        while time.monotonic() < until:
            links, frames = end.poll(_LOOK_S)
            for link in links:
                # In a row: a coordinator that is killed in a handshake is followed by nobody for a while.
                num_wrong = num_wrong + 1 if link is Link.WRONG_KEY else 0
                if link is Link.UP:
                    end.send(encode(question))
                elif link is Link.REFUSED or num_wrong == _WRONG_KEY_TRIES:
                    return link
            for frame in frames:
                try:
                    answer = decode_from_coordinator(frame)
                except WireError:
                    continue
                if isinstance(answer, Admitted | Refuse):
                    return answer
        return None
    finally:
        end.close()


def _failure(ticket: Ticket, answer: Admitted | Refuse | Link | None, timeout_s: float) -> End | None:
    place = f"{ticket.host}:{ticket.port}"
    match answer:
        case Admitted():
            return None
        case Refuse(_, reason):
            return End(Exit.REFUSED, reason)
        case Link():
            return End(Exit.WRONG_KEY, f"what answers at {place} does not have the ticket's key")
        case None:
            return End(Exit.UNREACHABLE, f"nobody answered at {place} for {timeout_s:.0f} s")
