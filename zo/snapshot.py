"""Snapshots: weights at a round as one self-describing, lossless blob, checked against its own digest when read."""

import hashlib
from typing import Annotated, Final

import msgspec
import numpy as np
import zstandard
from msgspec import Meta
from numpy.typing import NDArray

from zo.commit import DIGEST_BYTES
from zo.manifest import RUN_ID_BYTES, Manifest
from zo.replica import Replica
from zo.weights import digest

_FORMAT: Final = "zo-snapshot-1"
_SEAL_PERSON: Final = b"zo-snapshot"
Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class SnapshotError(ValueError):
    """A blob that is no snapshot, is damaged, or belongs to another run."""


class Snapshot(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Weights at a round."""

    format: str
    run_id: Annotated[bytes, Meta(min_length=RUN_ID_BYTES, max_length=RUN_ID_BYTES)]
    round: Annotated[int, Meta(ge=0)]
    head: Digest
    digest: Digest
    seal: Digest
    """BLAKE2b-128 of `head` and `digest`: the weights do not prove the head."""
    weights: bytes
    """zstd over the little-endian int32 bytes, transposed so that bytes of equal weight lie together: of the weights,
    and of what each vector of the replica's `state` differs from them by."""
    agent: Annotated[int, Meta(ge=0)] = 0
    """Whose weights they are."""


def encode_snapshot(replica: Replica, manifest: Manifest) -> bytes:
    """The replica as a snapshot."""
    vectors = [
        replica.weights,
        *(each - replica.weights for each in replica.state),
    ]  # wrapping: and back again
    planes = np.concatenate(vectors).astype("<i4").view(np.uint8).reshape(-1, 4).T
    weights_digest = replica.digest()
    return msgspec.msgpack.encode(
        Snapshot(
            format=_FORMAT,
            run_id=manifest.run_id,
            round=replica.round,
            head=replica.head,
            digest=weights_digest,
            seal=_seal(replica.head, weights_digest),
            weights=zstandard.ZstdCompressor(level=3).compress(np.ascontiguousarray(planes).tobytes()),
            agent=replica.agent,
        )
    )


def decode_snapshot(data: bytes, manifest: Manifest, agent: int = 0) -> Replica:
    """The replica in a snapshot.

    Args:
        data: what `encode_snapshot` made.
        manifest: of the run.
        agent: whose weights they must be.

    Raises:
        SnapshotError: not a snapshot, damaged, or of another run or agent; the message says which.
    """
    try:
        snapshot = msgspec.msgpack.decode(data, type=Snapshot)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SnapshotError(f"not a snapshot: {error}") from error
    if snapshot.format != _FORMAT:
        raise SnapshotError(f"snapshot format {snapshot.format!r} is not {_FORMAT!r}")
    if snapshot.run_id != manifest.run_id:
        raise SnapshotError(f"snapshot of run {snapshot.run_id.hex()}, this is run {manifest.run_id.hex()}")
    if snapshot.agent != agent:
        raise SnapshotError(f"snapshot of agent {snapshot.agent}, wanted is that of agent {agent}")
    vectors = _decompress(snapshot.weights, manifest.adapter.size, manifest.schedule.num_vectors)
    weights, state = vectors[0], vectors[1:] + vectors[0]
    if digest(snapshot.round, weights, agent, list(state)) != snapshot.digest:
        raise SnapshotError(
            f"snapshot of round {snapshot.round} is damaged: its weights do not match its digest"
        )
    if _seal(snapshot.head, snapshot.digest) != snapshot.seal:
        raise SnapshotError(
            f"snapshot of round {snapshot.round} is damaged: its head does not match its seal"
        )
    return Replica(manifest, weights, snapshot.round, snapshot.head, agent, list(state))


def content_address(data: bytes) -> bytes:
    """The name of a snapshot's bytes: BLAKE2b-128, (16,) bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, person=b"zo-content").digest()


def _seal(head: bytes, weights_digest: bytes) -> bytes:
    return hashlib.blake2b(head + weights_digest, digest_size=DIGEST_BYTES, person=_SEAL_PERSON).digest()


def _decompress(data: bytes, size: int, num_vectors: int) -> NDArray[np.int32]:
    """(num_vectors, size) int32."""
    num_bytes = 4 * size * num_vectors
    try:
        if zstandard.frame_content_size(data) != num_bytes:
            what = "weights and as much state" if num_vectors > 1 else "weights"
            raise SnapshotError(f"snapshot does not hold {size} {what}")
        planes = zstandard.ZstdDecompressor().decompress(data, max_output_size=num_bytes)
    except zstandard.ZstdError as error:
        raise SnapshotError(f"snapshot is damaged: {error}") from error
    return (
        np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(4, num_vectors * size).T)
        .view("<i4")
        .reshape(num_vectors, size)
        .astype(np.int32)
    )
