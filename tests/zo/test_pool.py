"""The seed pool: draws that follow from names, and weights that are the start less K integers times K directions."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo import reference
from zo.commit import Commit
from zo.directions import SEED_POOL, Direction, Drawn, run_key, stack
from zo.naming import naming
from zo.packing import pack
from zo.pool import draw, start
from zo.replica import HistoryNeeded, Replica
from zo.snapshot import SnapshotError, decode_snapshot, encode_snapshot

KEY = (0x0123_4567, 0x89AB_CDEF)
SIZE, POOL = 500, 8


def plainly_drawn(key, node, sample, agent, size, importances=None):
    """One index, as the words of the module say."""
    (word,) = reference.words(key, Direction(node, sample, agent), 1, start=4 * 0xFFFF_FFFF)
    chances = [1] * size if importances is None else [max(int(each), 2048) for each in importances]
    point = int(word) * sum(chances) >> 32
    for index, chance in enumerate(chances):
        point -= chance
        if point < 0:
            return index
    raise AssertionError


@given(st.integers(0, 2**32 - 258), st.integers(0, 2**32 - 1), st.integers(0, 127), st.integers(2, 65_536))
def test_an_index_follows_from_the_name_of_the_sample(node, sample, agent, size):
    found = draw(KEY, np.array([node]), np.array([sample]), agent, size)
    assert found.tolist() == [plainly_drawn(KEY, node, sample, agent, size)]


@given(st.lists(st.integers(0, 127 << 8), min_size=2, max_size=9), st.integers(0, 2**32 - 1))
def test_an_index_by_importance_follows_from_the_name_and_the_importances(importances, sample):
    weights = np.array(importances, np.int32)
    found = draw(KEY, np.array([5]), np.array([sample]), 0, weights.size, weights)
    assert found.tolist() == [plainly_drawn(KEY, 5, sample, 0, weights.size, weights)]


def test_draws_are_pinned():  # changing this changes every pool run
    nodes, samples = np.repeat([0, 3], 4), np.tile(np.arange(4), 2)
    assert draw(KEY, nodes, samples, 1, 4096).tolist() == [1702, 3583, 1949, 1485, 913, 3749, 998, 1747]


def test_draws_are_even_and_by_importance_in_proportion():
    samples = np.arange(40_000)
    even = np.bincount(draw(KEY, np.zeros_like(samples), samples, 0, 16), minlength=16)
    assert np.abs(even - 2500).max() < 200
    importances = np.array([8192, 8192, 32512, 0], np.int32)  # the last counts a quarter of what is usual
    odds = (
        np.bincount(draw(KEY, np.zeros_like(samples), samples, 0, 4, importances), minlength=4) / samples.size
    )
    assert np.allclose(odds, np.array([8192, 8192, 32512, 2048]) / 50944, atol=0.01)


def test_names_of_a_pool_are_its_indices_and_remember_their_samples(make_manifest):
    manifest = make_manifest(policy="pool", pool_size=16)
    names = naming(manifest).of_round(3, range(10, 14), 0)
    assert [name.node for name in names] == [SEED_POOL] * 4
    assert all(isinstance(name, Drawn) and 0 <= name.sample < 16 for name in names)
    assert [name.by for name in names] == [10, 11, 12, 13]
    assert stack(names).shape == (4, 3)
    with pytest.raises(ValueError, match="importances do not go with pool_draw = 'uniform'"):
        naming(manifest).of_round(3, range(2), 0, np.zeros(16, np.int32))


# ---- the identity ---------------------------------------------------------------------------------------------------


def rebuilt(replica, origin, manifest):
    """start − Σ accumulators[k] × z_k, one direction after the other."""
    names = np.array(
        [(SEED_POOL, index, replica.agent) for index in range(manifest.directions.pool_size)], np.uint32
    )
    return reference.apply(origin, run_key(manifest.run_id), names, replica.pool.accumulators)


FIELDS = {
    "uniform": {},
    "importance": {"pool_draw": "importance"},
    "momentum": {"momentum": 2},
    "late": {"staleness": 1},
    "agents": {"count": 2},
    "4 bits": {"bits": 4},
}


def played(manifest, plan, agent=0, seed=0):
    """A replica after such rounds, where it started, and its history. A plan has numbers of nodes, or reverts."""
    rng = np.random.default_rng(seed)
    origin = rng.integers(-(2**20), 2**20, SIZE).astype(np.int32)
    replica, history = Replica(manifest, origin, agent=agent), []
    for step in plan:
        if isinstance(step, int):
            nodes = tuple(sorted(rng.choice(9, step, replace=False).tolist()))
            codes = 12 * rng.integers(-7, 8, 2 * step).astype(np.int8)
            late = nodes[:1] if manifest.run.staleness and history else ()
            packed = pack(codes, manifest.codes.bits)
            entry = Commit(replica.round, (40_000,), (-4,), nodes, packed, replica.head, late)
        else:
            first, whose = step
            first = min(first, len(history) - 1)
            entry = replica.revert(first, len(history), whose, lambda a, b: history[a:b])
        replica.apply(entry, history=lambda a, b: history[a:b])
        history.append(entry)
    return replica, origin, history


steps = st.one_of(st.integers(0, 5), st.tuples(st.integers(0, 9), st.sampled_from([(), (0,), (2, 5)])))


@pytest.mark.parametrize("kind", FIELDS)
@settings(max_examples=12)
@given(plan=st.lists(steps, max_size=9), seed=st.integers(0, 9))
def test_the_weights_are_the_start_less_the_accumulated_directions(make_manifest, kind, plan, seed):
    manifest = make_manifest(policy="pool", pool_size=POOL, **FIELDS[kind])
    replica, origin, _ = played(manifest, [3, *plan], manifest.agents.count - 1, seed)
    assert np.array_equal(replica.weights, rebuilt(replica, origin, manifest))


def test_with_weight_decay_as_well(make_manifest):
    manifest = make_manifest(policy="pool", pool_size=POOL, weight_decay=4, momentum=1)
    replica, origin, _ = played(manifest, [3] * 12)
    assert np.array_equal(replica.weights, rebuilt(replica, origin, manifest))
    before = np.abs(replica.pool.aim).sum()  # decay acts on it alone; the rest follows, also upwards at first
    for _ in range(8):
        replica.apply(Commit(replica.round, (0,), (-4,), (1,), b"\x05\x05", replica.head))
    assert np.abs(replica.pool.aim).sum() == pytest.approx(before * (15 / 16) ** 8, rel=0.01)


def test_without_momentum_a_pool_run_moves_as_any_other(make_manifest):
    """The directions' names are another's, and nothing else."""
    manifest = make_manifest(policy="pool", pool_size=POOL)
    replica, origin, history = played(manifest, [4, 2, 5])
    expected = origin
    for commit in history:
        names = [
            Direction(SEED_POOL, plainly_drawn(run_key(manifest.run_id), node, 2 * commit.round + i, 0, POOL))
            for node in commit.participants
            for i in range(2)
        ]
        amounts = np.frombuffer(commit.codes, np.int8).astype(np.int64) * commit.steps[0] >> 8
        expected = reference.apply(expected, run_key(manifest.run_id), stack(names), amounts.astype(np.int32))
    assert np.array_equal(replica.weights, expected)


@pytest.mark.parametrize("kind", ["uniform", "importance", "momentum"])
def test_what_is_taken_back_is_gone(make_manifest, kind):
    manifest = make_manifest(policy="pool", pool_size=POOL, **FIELDS[kind])
    replica, origin, _ = played(manifest, [3, 4, 5, (0, ())])
    assert not replica.pool.accumulators.any()
    assert np.array_equal(replica.weights, origin)
    part, _, history = played(manifest, [3, 4, 5, (1, (0, 2, 5))])
    kept = {node for commit in history[:3] for node in commit.participants} - {0, 2, 5}
    assert kept
    assert part.pool.accumulators.any()


def test_importances_are_means_of_the_magnitudes_of_codes(make_manifest):
    manifest = make_manifest(policy="pool", pool_size=POOL, pool_draw="importance", directions=1)
    replica = Replica(manifest, np.zeros(SIZE, np.int32))
    (index,) = (name.sample for name in naming(manifest).of_round(4, range(1), 0, replica.pool.importances))
    replica.apply(Commit(0, (100,), (-4,), (4,), b"\x81", replica.head))  # −127
    expected = np.full(POOL, 32 << 8)
    expected[index] += ((127 << 8) - (32 << 8)) >> 3
    assert replica.pool.importances.tolist() == expected.tolist()
    replica.apply(Commit(1, (0,), (-4,), (4,), b"\x80", replica.head))  # no vote
    assert replica.pool.importances.tolist() == expected.tolist()


# ---- snapshots ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIELDS)
def test_a_snapshot_of_a_pool_needs_no_weights(make_manifest, kind):
    manifest = make_manifest(policy="pool", pool_size=POOL, **FIELDS[kind])
    agent = manifest.agents.count - 1
    replica, origin, _ = played(manifest, [3, 4, 5], agent)
    small = encode_snapshot(replica, manifest, with_weights=False)
    fresh = Replica(manifest, origin, agent=agent)
    elsewhere, _, _ = played(manifest, [2, 1], agent)
    for near in (fresh, elsewhere):
        found = decode_snapshot(small, manifest, agent, near)
        assert found.digest() == replica.digest()
        assert (found.round, found.head) == (replica.round, replica.head)
    whole = decode_snapshot(encode_snapshot(replica, manifest), manifest, agent)
    assert whole.digest() == replica.digest()
    following = Commit(
        3, (7_000,), (-4,), (1,), pack(np.array([24, -36], np.int8), manifest.codes.bits), replica.head
    )
    for each in (replica, found, whole):
        each.apply(following)
    assert found.digest() == whole.digest() == replica.digest()


def test_a_snapshot_is_as_large_as_the_pool_whatever_the_weights(make_manifest):
    sizes = []
    for size in (500, 400_000):
        manifest = make_manifest(policy="pool", size=size)
        replica = Replica(manifest, np.zeros(size, np.int32))
        rng = np.random.default_rng(0)
        for _ in range(20):
            codes = rng.integers(-127, 128, 128).astype(np.int8).tobytes()
            replica.apply(Commit(replica.round, (9_999,), (-4,), tuple(range(64)), codes, replica.head))
        sizes.append(len(encode_snapshot(replica, manifest, with_weights=False)))
    assert max(sizes) < 18_000
    assert abs(sizes[0] - sizes[1]) < 200


def test_snapshots_that_cannot_be_used_say_why(make_manifest):
    manifest = make_manifest(policy="pool", pool_size=POOL)
    replica, origin, _ = played(manifest, [3, 4])
    small = encode_snapshot(replica, manifest, with_weights=False)
    with pytest.raises(SnapshotError, match="snapshot of round 2 has no weights, and no start is known"):
        decode_snapshot(small, manifest)
    with pytest.raises(SnapshotError, match="its weights do not match its digest"):
        decode_snapshot(small, manifest, 0, Replica(manifest, origin + np.int32(1)))
    fields = msgspec.msgpack.decode(small)
    for cut in (fields[8][:-3], b""):
        with pytest.raises(SnapshotError):
            decode_snapshot(
                msgspec.msgpack.encode([*fields[:8], cut]), manifest, 0, Replica(manifest, origin)
            )


def test_a_revert_needs_its_history_here_too(make_manifest):
    manifest = make_manifest(policy="pool", pool_size=POOL, pool_draw="importance")
    replica, _, history = played(manifest, [3, 4])
    revert = replica.revert(0, 2, (), lambda a, b: history[a:b])
    with pytest.raises(HistoryNeeded):
        replica.apply(revert)


def test_a_pool_before_round_0(make_manifest):
    assert start(make_manifest()) is None
    manifest = make_manifest(policy="pool")
    assert start(manifest).accumulators.size == 4096
    with pytest.raises(ValueError, match="goes on from a pool, got none"):
        Replica(manifest, np.zeros(500, np.int32), round=3, head=bytes(16))
