"""Pool files: a run's weights from K integers and a start, with the digest that the run had."""

import msgspec
import numpy as np
import pytest

from zo.commit import Commit
from zo.pool import Pool
from zo.poolfile import MARK, PoolFileError, decode_pool_file, encode_pool_file
from zo.replica import Replica

SIZE = 500


def trained(manifest, rounds=30, origin=None, agent=0):
    rng = np.random.default_rng(0)
    origin = np.zeros(manifest.adapter.size, np.int32) if origin is None else origin
    replica = Replica(manifest, origin, agent=agent)
    for _ in range(rounds):
        codes = np.rint(32 * rng.standard_normal(128)).clip(-127, 127).astype(np.int8).tobytes()
        step = int(rng.integers(2**20, 2**21))
        replica.apply(Commit(replica.round, (step,), (-4,), tuple(range(64)), codes, replica.head))
    return replica


@pytest.mark.parametrize("fields", [{}, {"pool_draw": "importance"}, {"momentum": 2}, {"count": 2}])
def test_a_file_and_the_start_give_the_digest_of_the_run(make_manifest, fields):
    manifest = make_manifest(policy="pool", rounds=100, **fields)
    agent = manifest.agents.count - 1
    origin = np.arange(SIZE, dtype=np.int32)
    replica = trained(manifest, origin=origin, agent=agent)
    found = decode_pool_file(encode_pool_file(replica, manifest))
    assert found.manifest == manifest
    assert found.agent == agent
    rebuilt = found.rebuilt(Replica(found.manifest, origin, agent=agent))
    assert rebuilt.digest() == replica.digest()
    assert (rebuilt.round, rebuilt.head) == (replica.round, replica.head)


def test_a_file_of_4096_directions_has_18_kilobytes_at_most_whatever_was_learnt(make_manifest):
    manifest = make_manifest(policy="pool", rounds=1000)
    assert len(encode_pool_file(trained(manifest, 300), manifest)) < 17_000
    replica = Replica(manifest, np.zeros(SIZE, np.int32))
    worst = np.random.default_rng(0).integers(-(2**31), 2**31, 4096).astype(np.int32)
    replica.pool = Pool(worst, None, None)  # which cannot be compressed at all
    assert len(encode_pool_file(replica, manifest)) <= 18_000


def test_what_cannot_be_used_says_why(make_manifest):
    manifest = make_manifest(policy="pool", rounds=100)
    replica = trained(manifest, 3)
    data = encode_pool_file(replica, manifest)
    for cut in (b"", b"zo", data[: len(MARK) - 1], b"PK" + data):
        with pytest.raises(PoolFileError, match="not a pool file"):
            decode_pool_file(cut)
    for cut in (data[:-1], data[: len(data) // 2], data + b"\x00", MARK, MARK + b"\x92\x01\x02"):
        with pytest.raises(PoolFileError, match="cut off or damaged"):
            decode_pool_file(cut)
    with pytest.raises(PoolFileError, match="has no pool; only `init --policy pool` makes one"):
        encode_pool_file(Replica(make_manifest(), np.zeros(SIZE, np.int32)), make_manifest())
    with pytest.raises(PoolFileError, match="its weights do not match its digest"):
        decode_pool_file(data).rebuilt(Replica(manifest, np.ones(SIZE, np.int32)))


def test_a_pool_of_another_run_or_size_is_refused(make_manifest):
    manifest, other = (make_manifest(policy="pool", rounds=100, pool_size=size) for size in (4096, 512))
    _, snapshot = msgspec.msgpack.decode(encode_pool_file(trained(manifest, 3), manifest)[len(MARK) :])
    mixed = MARK + msgspec.msgpack.encode((other.encode(), snapshot))
    with pytest.raises(
        PoolFileError,
        match=f"its pool is of run {manifest.run_id.hex()}, its manifest of {other.run_id.hex()}",
    ):
        decode_pool_file(mixed)
    renamed = msgspec.msgpack.decode(snapshot)
    renamed[1] = other.run_id
    found = decode_pool_file(MARK + msgspec.msgpack.encode((other.encode(), msgspec.msgpack.encode(renamed))))
    with pytest.raises(PoolFileError, match="snapshot does not hold a pool of 512"):
        found.rebuilt(Replica(other, np.zeros(SIZE, np.int32)))


@pytest.mark.parametrize("seed", range(60))
def test_a_changed_byte_is_noticed_or_changes_nothing(make_manifest, seed):
    manifest = make_manifest(policy="pool", rounds=100, pool_size=16)
    replica = trained(manifest, 3)
    data = bytearray(encode_pool_file(replica, manifest))
    rng = np.random.default_rng(seed)
    data[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))
    try:
        found = decode_pool_file(bytes(data))
        rebuilt = found.rebuilt(Replica(found.manifest, np.zeros(SIZE, np.int32), agent=found.agent))
    except (PoolFileError, ValueError):
        return
    assert rebuilt.digest() == replica.digest()
