"""The archive: what one track keeps on disk. Its entries in the ledger, its snapshots, and what is offered of them.

A conductor decides; an archive remembers, and answers what only the past can tell: the state to go on from after a
restart, what a newcomer may be offered, the digests of earlier rounds.
"""

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import msgspec

from coordinator.conductor import history_slice
from coordinator.ledger import Ledger, LedgerError
from coordinator.membership import FLOW_WINDOW
from coordinator.rundir import RunDirectory
from coordinator.snapshots import MAX_REPLAY_WORK, is_due, offer
from transport.messages import Offer, Piece
from zo.commit import Commit, decode_entry
from zo.manifest import Manifest
from zo.packing import by_class
from zo.replica import Replica
from zo.snapshot import encode_snapshot
from zo.steps import Scale, step_rule
from zo.weights import WeightsOverflow


class Restored(NamedTuple):
    """A track as its ledger leaves it."""

    replica: Replica
    scale: Scale
    """The step rule's memory."""
    origin: str
    """In words, where the replay began."""


def restore(
    directory: RunDirectory, manifest: Manifest, ledger: Ledger, progress: Callable[[int, int], None]
) -> Restored:
    """Replica and step rule of an agent, by a replay from its newest snapshot.

    Args:
        directory: of the run.
        manifest: of the run.
        ledger: the agent's.
        progress: called with (commits replayed, commits in all).

    Raises:
        LedgerError: the ledger is damaged, or its end is not signed by the run's coordinator.
        SnapshotError, RunDirectoryError: the weights of round 0 cannot be had.
    """
    total = ledger.num_commits()
    replica, origin = directory.newest(manifest, ledger)
    for frame in ledger.frames(replica.round, total):
        try:
            replica.apply(decode_entry(frame), frame, ledger.entries)
        except (ValueError, WeightsOverflow) as error:
            raise LedgerError(f"{ledger.path} is damaged at round {replica.round}: {error}") from error
        progress(replica.round, total)
    ledger.check_seal(manifest.run.signer, total)
    return Restored(replica, scale_of(manifest, ledger), origin)


def scale_of(manifest: Manifest, ledger: Ledger) -> Scale:
    """What the step rule remembers at the end of an agent's ledger. Raises LedgerError."""
    rule = step_rule(manifest)
    checkpoint = ledger.last_checkpoint()
    if checkpoint is None:
        start, scale = 0, rule.start()
    else:
        start, scale = checkpoint.round, checkpoint.scale
        last = ledger.last_commit(start) if rule.pipeline else None
        if last is not None:  # what it said is recorded there and nowhere else
            scale = msgspec.structs.replace(scale, ahead=last.exponents)
    for entry in ledger.entries(start):
        if isinstance(entry, Commit):
            try:
                classes = by_class(entry, manifest)
            except ValueError as error:
                raise LedgerError(f"{ledger.path} is damaged at round {entry.round}: {error}") from error
            _, scale = rule.of_round(scale, entry.round, *classes)
    return scale


class Archive:
    """One agent's ledger and snapshots.

    Attributes:
        ledger: the agent's.
    """

    def __init__(self, directory: RunDirectory, manifest: Manifest, ledger: Ledger) -> None:
        self.ledger = ledger
        self._directory = directory
        self._manifest = manifest
        self._snapshots = directory.snapshots(ledger.agent)
        # A snapshot that is no part of the ledger (one restored from a backup, say) must not be offered.
        newest, _ = directory.newest_snapshot(manifest, ledger)
        self._newest = None if newest is None else newest[0]

    def history(self, first: int, last: int) -> list[bytes]:
        """The encoded entries first..last-1, as many of them as fit one message."""
        return history_slice(islice(self.ledger.frames(first, last), FLOW_WINDOW))

    def save_snapshot(self, replica: Replica) -> None:
        """Make a snapshot of the replica, unless there is one. Raises StorageError."""
        if replica.round and (self._newest is None or self._newest.round < replica.round):
            self._newest = self._snapshots.save(
                replica.round, encode_snapshot(replica, self._manifest, with_weights=False)
            )

    def save_snapshot_if_due(self, replica: Replica) -> None:
        """Make one if it is worth it. Raises StorageError."""
        first, num_bytes = (self._newest.round, self._newest.num_bytes) if self._newest else (0, 0)
        tail_bytes, tail_codes = self.ledger.cost_since(first)
        last_revert = self.ledger.last_revert()
        is_bridge = last_revert is not None and last_revert >= first
        if is_bridge or is_due(num_bytes, tail_bytes, tail_codes, self._manifest.adapter.size):
            self.save_snapshot(replica)

    def piece(self, content: bytes, offset: int, replica: Replica) -> Piece:
        """A piece of a snapshot for a node. One that turns out damaged is replaced by one of the replica."""
        num_bytes, data = self._snapshots.piece(content, offset)
        if num_bytes == 0 and self._newest is not None and content == self._newest.content:
            self._newest = None  # the next offer must be another
            self.save_snapshot(replica)
        return Piece(content, offset, num_bytes, data)

    def offer_for(self, round: int) -> Offer | None:
        """What a node at a round is offered to catch up with; None if replaying is certainly cheaper."""
        return offer(self._newest, round, self.ledger.last_revert(), self.ledger.cost_since)

    def digests_between(self, first: int, last: int) -> list[bytes]:
        """The digests after first..last commits, replayed from a snapshot; none if that would take long."""
        if not 0 <= first <= last <= self.ledger.num_commits():
            return []
        replica, _ = self._directory.newest(self._manifest, self.ledger, before=first)
        before, codes = self.ledger.cost_since(replica.round)[1], self.ledger.cost_since(last)[1]
        if (before - codes) * self._manifest.adapter.size > 8 * MAX_REPLAY_WORK:
            return []
        digests = [replica.digest()] if replica.round == first else []
        for entry in self.ledger.entries(replica.round, last):
            replica.apply(entry, history=self.ledger.entries)
            if replica.round >= first:
                digests.append(replica.digest())
        return digests
