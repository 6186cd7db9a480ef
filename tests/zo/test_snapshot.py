"""Snapshots: exactly the replica, or an error that says what is wrong."""

import msgspec
import numpy as np
import pytest
import zstandard

from zo.commit import Commit
from zo.replica import Replica
from zo.snapshot import Snapshot, SnapshotError, decode_snapshot, encode_snapshot
from zo.weights import INT32_MAX, digest


@pytest.fixture
def manifest(make_manifest):
    return make_manifest(size=40)


@pytest.fixture
def replica(manifest):
    rng = np.random.default_rng(3)
    weights = rng.integers(-INT32_MAX // 2, INT32_MAX // 2, 40).astype(np.int32)
    replica = Replica(manifest, weights)
    replica.apply(Commit(0, (1000,), (-4,), (0,), b"\x05\x06", manifest.run_id))
    return replica


def tampered(replica: Replica, manifest, **change) -> bytes:
    snapshot = msgspec.msgpack.decode(encode_snapshot(replica, manifest), type=Snapshot)
    return msgspec.msgpack.encode(msgspec.structs.replace(snapshot, **change))


def test_a_snapshot_is_the_replica(replica, manifest):
    restored = decode_snapshot(encode_snapshot(replica, manifest), manifest)
    assert np.array_equal(restored.weights, replica.weights)
    assert (restored.round, restored.head, restored.digest()) == (1, replica.head, replica.digest())
    following = Commit(1, (1000,), (-4,), (1,), b"\x07\x08", replica.head)
    replica.apply(following)
    restored.apply(following)
    assert restored.digest() == replica.digest()


def test_a_snapshot_is_one_agents(make_manifest):
    manifest = make_manifest(size=40, count=2)
    data = encode_snapshot(Replica(manifest, np.arange(40, dtype=np.int32), 3, bytes(16), agent=1), manifest)
    restored = decode_snapshot(data, manifest, agent=1)
    assert (restored.agent, restored.round) == (1, 3)
    assert encode_snapshot(restored, manifest) == data
    with pytest.raises(SnapshotError, match="of agent 1, wanted is that of agent 0"):
        decode_snapshot(data, manifest)


def test_weights_of_zero_take_next_to_nothing(make_manifest):
    manifest = make_manifest(size=100_000)
    assert len(encode_snapshot(Replica(manifest, np.zeros(100_000, np.int32)), manifest)) < 300


def test_the_layout_of_the_bytes_is_pinned(manifest):
    # files of earlier versions must stay readable, or be refused by their format
    replica = Replica(manifest, np.arange(40, dtype=np.int32) - 20)
    fields = msgspec.msgpack.decode(encode_snapshot(replica, manifest))
    assert fields[:5] == ["zo-snapshot-1", manifest.run_id, 0, manifest.run_id, replica.digest()]
    planes = zstandard.ZstdDecompressor().decompress(fields[6])
    assert planes[:3] == bytes([0xEC, 0xED, 0xEE])
    assert planes[-40:] == b"\xff" * 20 + b"\x00" * 20


def test_every_cut_is_noticed(replica, manifest):
    data = encode_snapshot(replica, manifest)
    for length in range(len(data)):
        with pytest.raises(SnapshotError):
            decode_snapshot(data[:length], manifest)


def test_every_changed_byte_is_noticed_or_changes_nothing(replica, manifest):
    data = encode_snapshot(replica, manifest)
    for index in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = data[:index] + bytes([data[index] ^ flip]) + data[index + 1 :]
            try:
                restored = decode_snapshot(changed, manifest)
            except SnapshotError:
                continue
            assert (restored.round, restored.head) == (replica.round, replica.head)
            assert np.array_equal(restored.weights, replica.weights)


def test_another_run_is_named(replica, manifest, make_manifest):
    other = make_manifest(size=40, nonce="0" * 32)
    with pytest.raises(
        SnapshotError, match=f"of run {manifest.run_id.hex()}, this is run {other.run_id.hex()}"
    ):
        decode_snapshot(encode_snapshot(replica, manifest), other)


def test_another_format_is_named(replica, manifest):
    with pytest.raises(SnapshotError, match="format 'zo-snapshot-9' is not 'zo-snapshot-1'"):
        decode_snapshot(tampered(replica, manifest, format="zo-snapshot-9"), manifest)


def test_weights_that_are_not_those_of_the_digest(replica, manifest):
    with pytest.raises(SnapshotError, match="round 2 is damaged: its weights do not match its digest"):
        decode_snapshot(tampered(replica, manifest, round=2), manifest)
    with pytest.raises(SnapshotError, match="its head does not match its seal"):
        decode_snapshot(tampered(replica, manifest, head=bytes(16)), manifest)


def test_weights_of_another_size(replica, manifest):
    for size in (39, 41, 0):
        weights = zstandard.ZstdCompressor().compress(bytes(4 * size))
        with pytest.raises(SnapshotError, match="does not hold 40 weights"):
            decode_snapshot(tampered(replica, manifest, weights=weights), manifest)


def test_a_decompression_bomb_is_refused_before_it_is_opened(replica, manifest):
    bomb = zstandard.ZstdCompressor().compress(bytes(200_000_000))
    assert len(bomb) < 20_000
    with pytest.raises(SnapshotError, match="does not hold 40 weights"):
        decode_snapshot(tampered(replica, manifest, weights=bomb), manifest)
    # and one that does not say how large it is
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    with pytest.raises(SnapshotError, match="does not hold 40 weights"):
        decode_snapshot(tampered(replica, manifest, weights=compressor.compress(bytes(160))), manifest)
    # and one that lies: the header of a small frame before the body of a large one
    small = zstandard.ZstdCompressor().compress(np.random.default_rng(0).bytes(160))
    liar = small[: zstandard.frame_header_size(small)] + bomb[zstandard.frame_header_size(bomb) :]
    with pytest.raises(SnapshotError):
        decode_snapshot(tampered(replica, manifest, weights=liar), manifest)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"hello", b"\x90", b"\x97\xa1\xff", b"\x00" * 100])
def test_what_is_no_snapshot(manifest, data):
    with pytest.raises(SnapshotError, match="not a snapshot"):
        decode_snapshot(data, manifest)


def test_a_round_and_weights_with_their_own_digest_are_believed(replica, manifest):
    # what a snapshot cannot prove, the ledger must: see the head
    assert digest(1, replica.weights) == replica.digest()
