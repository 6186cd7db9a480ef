"""Snapshots: weights at a round as one self-describing, lossless blob, checked against its own digest when read."""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
import numpy as np
import zstandard
from msgspec import Meta
from numpy.typing import NDArray

from zo import pool as pools
from zo.commit import DIGEST_BYTES
from zo.manifest import RUN_ID_BYTES, Manifest
from zo.replica import Replica
from zo.weights import WeightsOverflow

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
    and of what each vector of the replica's `state` differs from them by. Empty in a snapshot of the pool alone."""
    agent: Annotated[int, Meta(ge=0)] = 0
    """Whose weights they are."""
    pool: bytes = b""
    """Of a pool run, in the same form: the vectors of the pool, from which and the start its weights can be had."""


def encode_snapshot(replica: Replica, manifest: Manifest, *, with_weights: bool = True) -> bytes:
    """The replica as a snapshot.

    Args:
        replica: any.
        manifest: of the run.
        with_weights: false leaves a pool run's weights out, for those who can have them from the pool.
    """
    weights, pool = b"", b""
    if with_weights or replica.pool is None:
        vectors = [
            replica.weights,
            *(each - replica.weights for each in replica.state),
        ]  # wrapping: and back again
        weights = _compress(vectors)
    if replica.pool is not None:
        pool = _compress(replica.pool.vectors)
    weights_digest = replica.digest()
    return msgspec.msgpack.encode(
        Snapshot(
            format=_FORMAT,
            run_id=manifest.run_id,
            round=replica.round,
            head=replica.head,
            digest=weights_digest,
            seal=_seal(replica.head, weights_digest),
            weights=weights,
            agent=replica.agent,
            pool=pool,
        )
    )


def decode_snapshot(data: bytes, manifest: Manifest, agent: int = 0, near: Replica | None = None) -> Replica:
    """The replica in a snapshot.

    Args:
        data: what `encode_snapshot` made.
        manifest: of the run.
        agent: whose weights they must be.
        near: a replica of the run and agent, at any round: what a snapshot without weights starts from.

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
    replica = _replica(snapshot, manifest, near)
    if replica.digest() != snapshot.digest:
        raise SnapshotError(
            f"snapshot of round {snapshot.round} is damaged: its weights do not match its digest"
        )
    if _seal(snapshot.head, snapshot.digest) != snapshot.seal:
        raise SnapshotError(
            f"snapshot of round {snapshot.round} is damaged: its head does not match its seal"
        )
    return replica


def _replica(snapshot: Snapshot, manifest: Manifest, near: Replica | None) -> Replica:
    pool, place = None, (snapshot.round, snapshot.head)
    if (own := pools.start(manifest)) is not None:
        size = own.accumulators.size
        vectors = [
            np.ascontiguousarray(each)
            for each in _decompress(snapshot.pool, size, len(own.vectors), f"a pool of {size}")
        ]
        pool = own.filled(vectors)
        if not snapshot.weights:
            if near is None:
                raise SnapshotError(
                    f"snapshot of round {snapshot.round} has no weights, and no start is known"
                )
            try:
                return near.moved_to(pool, *place)
            except WeightsOverflow as error:
                raise SnapshotError(f"snapshot is damaged: {error}") from error
    elif snapshot.pool:
        raise SnapshotError("snapshot of a pool run, and this run has no pool")
    more = " and as much state" if manifest.num_vectors > 1 else ""
    what = f"{manifest.adapter.size} weights{more}"
    found = _decompress(snapshot.weights, manifest.adapter.size, manifest.num_vectors, what)
    weights, state = found[0], found[1:] + found[0]
    return Replica(manifest, weights, *place, snapshot.agent, list(state), pool)


def content_address(data: bytes) -> bytes:
    """The name of a snapshot's bytes: BLAKE2b-128, (16,) bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, person=b"zo-content").digest()


def _seal(head: bytes, weights_digest: bytes) -> bytes:
    return hashlib.blake2b(head + weights_digest, digest_size=DIGEST_BYTES, person=_SEAL_PERSON).digest()


def _compress(vectors: Sequence[NDArray[np.int32]]) -> bytes:
    planes = np.concatenate(vectors).astype("<i4").view(np.uint8).reshape(-1, 4).T
    return zstandard.ZstdCompressor(level=3).compress(np.ascontiguousarray(planes).tobytes())


def _decompress(data: bytes, size: int, num_vectors: int, what: str) -> NDArray[np.int32]:
    """(num_vectors, size) int32."""
    num_bytes = 4 * size * num_vectors
    try:
        if zstandard.frame_content_size(data) != num_bytes:
            raise SnapshotError(f"snapshot does not hold {what}")
        planes = zstandard.ZstdDecompressor().decompress(data, max_output_size=num_bytes)
    except zstandard.ZstdError as error:
        raise SnapshotError(f"snapshot is damaged: {error}") from error
    return (
        np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(4, num_vectors * size).T)
        .view("<i4")
        .reshape(num_vectors, size)
        .astype(np.int32)
    )
