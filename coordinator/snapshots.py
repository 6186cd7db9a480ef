"""Snapshots: when to make one, which to keep, and where they lie.

They are made from the coordinator's replica, compressed without loss, and named by their content. None of them is
needed for the truth, which is the ledger: they save newcomers bytes and a restarted coordinator time.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from coordinator.ledger import StorageError
from transport.durable import write_atomically
from transport.messages import HISTORY_BYTES, PIECE_BYTES, Offer
from zo.commit import DIGEST_BYTES
from zo.snapshot import content_address

KEPT_NEWEST: Final = 3
"""A newcomer on a slow link may still be fetching the one before the last."""
MAX_REPLAY_WORK: Final = 2**32
"""Parameter·directions to replay past a snapshot, by a restart or a newcomer: at most a second on a slow core."""
MIN_TAIL_BYTES: Final = 4096


class Stored(NamedTuple):
    """A snapshot on disk."""

    round: int
    content: bytes
    """BLAKE2b-128 of its bytes."""
    num_bytes: int


def is_due(num_bytes: int, tail_bytes: int, tail_codes: int, size: int) -> bool:
    """Whether a new snapshot is worth making.

    When the entries since the last one cost a newcomer as many bytes as the snapshot itself: so joining never costs
    more than about twice the cheaper way. Or when replaying them takes long.

    Args:
        num_bytes: of the last snapshot.
        tail_bytes: of the entries since.
        tail_codes: directions in the entries since.
        size: parameters.
    """
    return tail_bytes > max(num_bytes, MIN_TAIL_BYTES) or tail_codes * size > MAX_REPLAY_WORK


def kept(rounds: Sequence[int]) -> set[int]:
    """Which snapshots to keep: the newest few, and one for every power of two of age, so that old states stay near.

    Args:
        rounds: of all snapshots.
    """
    if not rounds:
        return set()
    ordered = sorted(rounds, reverse=True)
    keep = set(ordered[:KEPT_NEWEST])
    oldest_by_age: dict[int, int] = {}
    for round in ordered:
        # Within a class of ages the oldest stays: it then moves on into the next class instead of leaving a gap.
        oldest_by_age[(ordered[0] - round).bit_length()] = round
    return keep | set(oldest_by_age.values())


def offer(
    snapshot: Stored | None,
    round: int,
    last_revert: int | None,
    cost_since: Callable[[int], tuple[int, int]],
) -> Offer | None:
    """What a node is offered to catch up with; None if the ledger's entries are certainly cheaper.

    Args:
        snapshot: the newest, if there is one.
        round: commits that the node has.
        last_revert: round of the newest entry that takes back others, if there is one.
        cost_since: bytes and codes of all entries from a round on.
    """
    if snapshot is None or snapshot.round <= round:
        return None
    replay_bytes, replay_codes = cost_since(round)
    can_replay = last_revert is None or last_revert < round
    if can_replay and replay_bytes <= HISTORY_BYTES:
        return None  # one or two frames: not worth a choice
    tail_bytes, tail_codes = cost_since(snapshot.round)
    return Offer(
        snapshot.content,
        snapshot.round,
        snapshot.num_bytes,
        tail_bytes,
        tail_codes,
        replay_bytes,
        replay_codes,
        can_replay,
    )


class SnapshotStore:
    """The snapshots of one agent, in a directory of their own, named ROUND-CONTENT.zo."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._intact: dict[bytes, tuple[int, int]] = {}
        """Size and time of change, in ns, of files whose bytes were found to be those that their names say."""

    def stored(self) -> list[Stored]:
        """All snapshots, oldest first. Files that are none are passed over; what is in them is not looked at."""
        found = []
        for path in self.directory.glob("*.zo"):
            round, _, content = path.stem.partition("-")
            # Whoever lists a run that is being served may find that a file has been removed meanwhile.
            with contextlib.suppress(ValueError, OSError):
                address = bytes.fromhex(content)
                if round.isdecimal() and len(address) == DIGEST_BYTES:
                    found.append(Stored(int(round), address, path.stat().st_size))
        return sorted(found)

    def save(self, round: int, data: bytes) -> Stored:
        """Write a snapshot, and remove those that need not be kept.

        One of a later round is no part of the ledger (which was restored from a copy, say), or this would not be the
        newest: it is removed as well.

        Raises:
            StorageError: it cannot be written.
        """
        snapshot = Stored(round, content_address(data), len(data))
        path = self._path(snapshot)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for torn in self.directory.glob("*.new"):
                torn.unlink(missing_ok=True)
            write_atomically(path, data)
            stored = self.stored()
            keep = kept([each.round for each in stored if each.round <= round])
            for each in stored:
                if each.round not in keep:
                    self._path(each).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write the snapshot {path}: {error}") from error
        return snapshot

    def read(self, snapshot: Stored) -> bytes:
        """The bytes of a snapshot, whatever they are. Raises OSError."""
        return self._path(snapshot).read_bytes()

    def piece(self, content: bytes, offset: int) -> tuple[int, bytes]:
        """(bytes in all, the piece at `offset`) of the snapshot with this content; (0, nothing) if there is none.

        A file whose bytes are not those that its name says is none.
        """
        found = next((each for each in self.stored() if each.content == content), None)
        try:
            if found is None or not self._is_intact(found):
                return 0, b""
            with self._path(found).open("rb") as file:
                file.seek(offset)
                return found.num_bytes, file.read(PIECE_BYTES)
        except OSError:
            return 0, b""

    def _is_intact(self, snapshot: Stored) -> bool:
        """Whether the file holds what its name says; read once, and again only if it was changed. Raises OSError."""
        facts = self._path(snapshot).stat()
        seen = facts.st_size, facts.st_mtime_ns
        if self._intact.get(snapshot.content) != seen:
            if content_address(self.read(snapshot)) != snapshot.content:
                return False
            self._intact[snapshot.content] = seen
        return True

    def _path(self, snapshot: Stored) -> Path:
        return self.directory / f"{snapshot.round}-{snapshot.content.hex()}.zo"
