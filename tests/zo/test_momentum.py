"""Momentum and weight decay: the replica against numbers worked out one by one, and what must survive a snapshot."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo import reference
from zo.codes import coefficients
from zo.commit import Commit
from zo.directions import Direction, run_key
from zo.replica import ChainError, Replica
from zo.snapshot import SnapshotError, decode_snapshot, encode_snapshot
from zo.weights import INT32_MAX, Bound, WeightsOverflow, digest, zeros

SIZE = 60
RULES = [(0, 0), (3, 0), (0, 4), (2, 5)]


def initial():
    return np.random.default_rng(5).integers(-(2**24), 2**24, SIZE).astype(np.int32)


def commits(replica, num, step=400_000):
    rng = np.random.default_rng(replica.round)
    for _ in range(num):
        codes = rng.integers(-128, 128, 4).astype(np.int8).tobytes()
        commit = Commit(replica.round, (step,), (-4,), (0, 7), codes, replica.head)
        yield commit
        replica.apply(commit)


def rounded(way, shift):
    """way / 2^shift to the nearest integer, halves away from zero: in Python's own integers."""
    whole, rest = divmod(abs(way), 1 << shift)
    whole += 2 * rest >= 1 << shift
    return whole if way > 0 else -whole


@pytest.mark.parametrize(("momentum", "weight_decay"), RULES)
def test_a_replica_moves_as_the_definition_says(make_manifest, momentum, weight_decay):
    manifest = make_manifest(size=SIZE, momentum=momentum, weight_decay=weight_decay)
    start = initial()
    replica = Replica(manifest, start)
    weights, velocity = start.astype(object), np.zeros(SIZE, object)
    for commit in commits(replica, 12):
        names = [Direction(node, 2 * commit.round + i) for node in (0, 7) for i in range(2)]
        update = np.zeros(SIZE, object)
        for name, factor in zip(
            names, coefficients(np.frombuffer(commit.codes, np.int8), commit.steps[0]), strict=True
        ):
            update -= int(factor) * reference.perturbation(run_key(manifest.run_id), name, SIZE).astype(
                object
            )
        velocity += update
        if weight_decay:
            ways = weights + velocity - start
            velocity -= np.array([rounded(way, weight_decay) for way in ways], object)
        moved = np.array([v >> momentum for v in velocity], object)
        weights, velocity = weights + moved, velocity - moved
    assert replica.weights.tolist() == weights.tolist()


@pytest.mark.parametrize("momentum", [1, 4])
def test_a_step_has_moved_the_weights_by_all_of_it_in_the_end(make_manifest, momentum):
    late = Replica(make_manifest(size=SIZE, rounds=500, momentum=momentum), initial())
    for _ in commits(late, 3):
        pass
    aim = late.state[0].copy()
    assert not np.array_equal(aim, late.weights)
    for _ in commits(late, 400, step=0):
        pass
    assert np.array_equal(late.state[0], aim)
    left = aim - late.weights
    assert left.min() >= 0
    assert left.max() < 2**momentum


def test_without_steps_decay_leads_back_to_the_start(make_manifest):
    replica = Replica(make_manifest(size=SIZE, rounds=500, weight_decay=3), initial())
    for _ in commits(replica, 3):
        pass
    assert not np.array_equal(replica.weights, initial())
    for _ in commits(replica, 300, step=0):
        pass
    assert np.abs(replica.weights - initial()).max() <= 2**2 - 1, "what 2^-3 of rounds to nothing stays"


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(1, 31))
def test_neither_gets_past_what_it_moves_to_and_decay_is_the_same_in_both_directions(a, b, shift):
    here, there = np.array([a], np.int32), np.array([b], np.int32)
    low, high = min(a, b), max(a, b)
    assert low <= reference.follow(here, there, shift)[0] <= high
    assert low <= reference.decay(here, there, shift)[0] <= high
    if min(a, b) > -(2**31):
        assert reference.decay(-here, -there, shift)[0] == -reference.decay(here, there, shift)[0]


@pytest.mark.parametrize(("momentum", "weight_decay"), RULES)
def test_a_replica_from_a_snapshot_goes_on_alike(make_manifest, momentum, weight_decay):
    manifest = make_manifest(size=SIZE, momentum=momentum, weight_decay=weight_decay)
    replica = Replica(manifest, initial())
    for _ in commits(replica, 4):
        pass
    restored = decode_snapshot(encode_snapshot(replica, manifest), manifest)
    assert restored.digest() == replica.digest()
    for commit in commits(replica, 4):
        restored.apply(commit)
    assert restored.digest() == replica.digest()
    assert np.array_equal(restored.weights, replica.weights)


def test_the_digest_covers_what_the_weights_to_come_depend_on(make_manifest):
    manifest = make_manifest(size=SIZE, momentum=2, weight_decay=5)
    replica = Replica(manifest, initial())
    before = {replica.digest(), digest(0, replica.weights)}
    for vector in replica.state:
        vector[3] += 1
        before.add(replica.digest())
    assert len(before) == 4


def test_a_snapshot_of_another_rule_is_refused(make_manifest):
    manifest = make_manifest(size=SIZE, momentum=2)
    replica = Replica(make_manifest(size=SIZE), initial())
    with pytest.raises(SnapshotError):
        decode_snapshot(encode_snapshot(replica, manifest), manifest)
    with pytest.raises(ValueError, match="has 1 vectors beside its weights, got 0"):
        Replica(manifest, initial(), 3, bytes(16))


def test_a_run_without_them_holds_and_hashes_nothing_more(make_manifest):
    replica = Replica(make_manifest(size=SIZE), initial())
    assert replica.state == []
    assert replica.digest() == digest(0, initial())


def test_taking_back_with_momentum_brings_the_weights_to_rest_at_the_aim_of_then(make_manifest):
    replica = Replica(make_manifest(size=SIZE, momentum=3), initial())
    entries = list(commits(replica, 3))
    aim = replica.state[0].copy()
    entries += commits(replica, 4)
    entry = replica.revert(3, 7, (), lambda first, last: entries[first:last])
    other = decode_snapshot(
        encode_snapshot(replica, manifest := make_manifest(size=SIZE, momentum=3)), manifest
    )
    for each in (replica, other):
        each.apply(entry, history=lambda first, last: entries[first:last])
        assert np.array_equal(each.weights, aim)
        assert np.array_equal(each.state[0], aim)
        assert each.digest() == entry.digest
    for commit in commits(replica, 2):
        other.apply(commit)
    assert replica.digest() == other.digest()
    assert not np.array_equal(replica.state[0], aim)


def test_with_weight_decay_nothing_can_be_taken_back(make_manifest):
    replica = Replica(make_manifest(size=SIZE, weight_decay=4), initial())
    entries = list(commits(replica, 3))
    with pytest.raises(ChainError, match="nothing can be taken back in a run with weight decay"):
        replica.revert(1, 3, (), lambda first, last: entries[first:last])
    assert replica.round == 3


def test_a_bound_knows_where_weights_are_drawn_to():
    anchor = np.array([INT32_MAX - 10], np.int32)
    bound = Bound(zeros(1), anchor)
    with pytest.raises(WeightsOverflow):
        bound.check(zeros(1), np.array([11], np.int32))
    bound.check(zeros(1), np.array([10], np.int32))
