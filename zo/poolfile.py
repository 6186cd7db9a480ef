"""Pool files: a whole fine-tuned model as K integers, in one file that a base alone turns into weights again.

A file is a mark, the run's manifest and the run's pool, as a snapshot without weights has it. The manifest says all
the rest: which base and tokenizer by their digests, which adapter on it by the digest of its layout, and by its hash
the run id, from which directions and start follow.
"""

from typing import Final, NamedTuple

import msgspec

from zo.manifest import Manifest, ManifestError, decode_manifest
from zo.replica import Replica
from zo.snapshot import Snapshot, SnapshotError, decode_snapshot, encode_snapshot

MARK: Final = b"zo-pool1"


class PoolFileError(ValueError):
    """A file that is no pool file, is damaged, or does not fit; the message says which."""


class PoolFile(NamedTuple):
    """What a pool file holds."""

    manifest: Manifest
    snapshot: bytes
    """As `snapshot.decode_snapshot` takes it, with the start of the run to go on from."""
    agent: int

    def rebuilt(self, start: Replica) -> Replica:
        """The replica from which the file was made, with its digest.

        Args:
            start: of the run and agent, at round 0.

        Raises:
            PoolFileError: the file is damaged, or this is not the run's start.
        """
        try:
            return decode_snapshot(self.snapshot, self.manifest, self.agent, start)
        except SnapshotError as error:
            raise PoolFileError(f"the pool cannot be used: {error}") from error


def encode_pool_file(replica: Replica, manifest: Manifest) -> bytes:
    """A replica of a pool run as a pool file.

    Raises:
        PoolFileError: the run has no pool.
    """
    if replica.pool is None:
        raise PoolFileError(
            f"a run with policy = {manifest.directions.policy!r} has no pool; only `init --policy pool` makes one"
        )
    parts = manifest.encode(), encode_snapshot(replica, manifest, with_weights=False)
    return MARK + msgspec.msgpack.encode(parts)


def decode_pool_file(data: bytes) -> PoolFile:
    """What a pool file holds.

    Raises:
        PoolFileError: it is none, or it is damaged.
    """
    if not data.startswith(MARK):
        raise PoolFileError("not a pool file: it does not begin as one")
    try:
        encoded, snapshot = msgspec.msgpack.decode(data[len(MARK) :], type=tuple[bytes, bytes])
        manifest = decode_manifest(encoded)
        head = msgspec.msgpack.decode(snapshot, type=Snapshot)
    except (msgspec.DecodeError, UnicodeDecodeError, ManifestError) as error:
        raise PoolFileError(f"the pool file is cut off or damaged: {error}") from error
    if head.run_id != manifest.run_id:
        raise PoolFileError(
            f"the pool file is damaged: its pool is of run {head.run_id.hex()}, its manifest of {manifest.run_id.hex()}"
        )
    if manifest.directions.policy != "pool" or not head.agent < manifest.agents.count:
        raise PoolFileError("the pool file is damaged: its manifest has no such pool")
    return PoolFile(manifest, snapshot, head.agent)
