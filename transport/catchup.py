"""How a node that is behind catches up: by replaying the ledger, or from a snapshot and the ledger's tail.

Only the node knows its link and how fast its kernel is, so the node decides; `choose` is pure. A download is named by
its content, so an interrupted one goes on where it stopped, whatever coordinator or connection serves the rest.
"""

import enum
from typing import Final

from transport.messages import PIECE_BYTES, Offer
from zo.snapshot import content_address

PIECES_AHEAD: Final = 4
"""Requests on their way: 128 kB in flight fill a link of 1.7 Mbit/s at 600 ms."""


class Way(enum.Enum):
    """How to catch up."""

    REPLAY = "replay"
    SNAPSHOT = "snapshot"


def choose(
    offer: Offer, num_fetched: int, size: int, link_bytes_per_s: float, work_per_s: float
) -> tuple[Way, str]:
    """The quicker way, and the reason in words.

    Args:
        offer: what the coordinator says both ways cost.
        num_fetched: bytes of the snapshot that are here already.
        size: parameters.
        link_bytes_per_s: as measured on this connection.
        work_per_s: parameter·directions that this machine's kernel applies in a second.
    """
    if not offer.can_replay:
        return Way.SNAPSHOT, "the ledger takes rounds back, which takes a snapshot"
    replay_s = offer.replay_bytes / link_bytes_per_s + offer.replay_codes * size / work_per_s
    fetch_bytes = offer.num_bytes - num_fetched + offer.tail_bytes
    snapshot_s = fetch_bytes / link_bytes_per_s + offer.tail_codes * size / work_per_s
    costs = (
        f"replay {offer.replay_bytes:,} B, {replay_s:.1f} s; "
        f"snapshot and tail {fetch_bytes:,} B, {snapshot_s:.1f} s; link {link_bytes_per_s:,.0f} B/s"
    )
    return (Way.REPLAY if replay_s <= snapshot_s else Way.SNAPSHOT), costs


class Download:
    """A snapshot on its way: which bytes are here, which to ask for next.

    Attributes:
        content: its content address.
        data: what is here, without gaps.
        num_bytes: of the whole; None until the first piece has come.
    """

    def __init__(self, content: bytes, data: bytes = b"") -> None:
        self.content = content
        self.data = bytearray(data)
        self.num_bytes: int | None = None
        self._asked_until = len(data)

    def wanted(self) -> list[int]:
        """Offsets to ask for now. Before the size is known, only the first."""
        ahead = 1 if self.num_bytes is None else PIECES_AHEAD
        limit = min(len(self.data) + ahead * PIECE_BYTES, self.num_bytes or 2**62)
        offsets = list(range(self._asked_until, limit, PIECE_BYTES))
        if offsets:
            self._asked_until = offsets[-1] + PIECE_BYTES
        return offsets

    def add(self, offset: int, num_bytes: int, piece: bytes) -> bytes:
        """Take a piece in; what was new in it. One that would leave a gap is not taken: pieces come in order."""
        self.num_bytes = num_bytes
        if offset > len(self.data):
            return b""
        new = piece[len(self.data) - offset : max(0, num_bytes - offset)]
        self.data += new
        if new and len(piece) != PIECE_BYTES:
            self.rewind()  # pieces of another size than ours: what was asked for does not follow on this one
        return new

    def rewind(self) -> None:
        """Forget what was asked for: the connection that carried the requests is gone."""
        self._asked_until = len(self.data)

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are here."""
        return self.num_bytes is not None and len(self.data) >= self.num_bytes

    @property
    def is_intact(self) -> bool:
        """Whether the bytes are those that the content address names."""
        return content_address(bytes(self.data)) == self.content
