"""What the conductor wants done. The service does it in this order: nothing is shown before it is durable (law 4)."""

import msgspec

from transport.messages import FromCoordinator, encode
from zo.commit import Commit
from zo.steps import Scale


class Send(msgspec.Struct, frozen=True):
    """Queue a frame for a session."""

    session: bytes
    kind: str
    """The message's type, for the meter."""
    frame: bytes


class Persist(msgspec.Struct, frozen=True):
    """Make a commit durable. If that fails, stop."""

    commit: Commit
    frame: bytes
    seal: bytes
    """Signature under the chain's head with it; empty if the run is not signed."""
    nodes: tuple[int, ...]
    """Who reported slopes, ascending."""
    reported: bytes
    """Their codes as they came, int8 in the order of nodes and of their samples."""
    moved: bytes = b""
    """The codes of the commit's movers as they came, likewise."""


class PersistCheckpoint(msgspec.Struct, frozen=True):
    """Record the digest of the weights after `round` commits, and the step rule's memory there."""

    round: int
    digest: bytes
    scale: Scale


class Audited(msgspec.Struct, frozen=True):
    """A round with a public audit is over."""

    losses_by_node: dict[int, tuple[float, float] | None]
    """Of those who were asked and reported; None for who did not answer."""


class SendPiece(msgspec.Struct, frozen=True):
    """Send the piece of a snapshot at an offset."""

    session: bytes
    content: bytes
    offset: int


class Quarantine(msgspec.Struct, frozen=True):
    """Make it durable that a node is shut out."""

    node: int


class Enrol(msgspec.Struct, frozen=True):
    """Make a new node's number durable, before it learns it."""

    node: int
    key: bytes
    name: str


class Note(msgspec.Struct, frozen=True):
    """Something that a person may want to read later."""

    kind: str
    node: int | None
    text: str


Effect = Send | SendPiece | Persist | PersistCheckpoint | Enrol | Quarantine | Audited | Note


def send(session: bytes, message: FromCoordinator) -> Send:
    """The effect that queues a message for a session."""
    return Send(session, type(message).__name__, encode(message))
