"""The replica: the one place where commits become weights."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo import reference
from zo.codes import coefficients
from zo.commit import Commit, genesis
from zo.directions import Direction, run_key, stack
from zo.replica import ChainError, Replica, samples
from zo.weights import WeightsOverflow, zeros


def following(
    replica: Replica, participants=(0, 2), step=50_000, codes=b"\x05\xfb\x80\x7f", **change
) -> Commit:
    """A commit that fits a replica."""
    commit = Commit(replica.round, (step,), (-4,), participants, codes, replica.head)
    return msgspec.structs.replace(commit, **change)


def test_a_replica_starts_at_the_run_id(make_manifest):
    manifest = make_manifest()
    replica = Replica(manifest, zeros(500))
    assert (replica.round, replica.head) == (0, manifest.run_id)


def test_the_caller_keeps_its_own_weights(make_manifest):
    weights = zeros(500)
    replica = Replica(make_manifest(), weights)
    replica.apply(following(replica))
    assert not weights.any()
    assert replica.weights.any()


@pytest.mark.parametrize(
    "weights", [np.zeros(499, np.int32), np.zeros(500, np.int64), np.zeros((500, 1), np.int32)]
)
def test_weights_of_another_shape_are_refused(make_manifest, weights):
    with pytest.raises(ValueError, match="weights must be int32 of 500 entries"):
        Replica(make_manifest(), weights)


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sets(st.integers(0, 2**32 - 258), min_size=1, max_size=5),
            st.integers(0, 10**6),
            st.binary(min_size=10),
        ),
        max_size=4,
    )
)
def test_commits_move_the_weights_as_the_reference_says(make_manifest, rounds):
    manifest = make_manifest()
    replica = Replica(manifest, zeros(500))
    expected = zeros(500)
    for number, (nodes, step, raw) in enumerate(rounds):
        participants = tuple(sorted(nodes))
        codes = raw[: 2 * len(participants)]
        names = [Direction(node, 2 * number + i) for node in participants for i in range(2)]
        expected = reference.apply(
            expected,
            run_key(manifest.run_id),
            stack(names),
            coefficients(np.frombuffer(codes, np.int8), step),
        )
        commit = following(replica, participants, step, codes)
        replica.apply(commit)
        assert replica.head == commit.digest()
    assert replica.round == len(rounds)
    assert np.array_equal(replica.weights, expected)


def test_the_digest_after_three_rounds_is_pinned(make_manifest):  # law 1: changing this changes every model
    replica = Replica(make_manifest(), zeros(500))
    for _ in range(3):
        replica.apply(following(replica))
    assert replica.head.hex() == "f37d82aee7e2b66206dda099d220a813"
    assert replica.digest().hex() == "3ab8763f89a9ef8f49b6d0f5f48d57b1"


def test_agents_start_alike_and_have_chains_digests_and_directions_of_their_own(make_manifest):
    manifest = make_manifest(count=3)
    replicas = [Replica(manifest, zeros(500), agent=agent) for agent in range(3)]
    assert replicas[0].head == genesis(manifest.run_id, 0) == manifest.run_id
    assert len({replica.head for replica in replicas}) == len({replica.digest() for replica in replicas}) == 3
    for replica in replicas:
        replica.apply(following(replica))
        names = [Direction(node, sample, replica.agent) for node in (0, 2) for sample in (0, 1)]
        expected = reference.apply(
            zeros(500),
            run_key(manifest.run_id),
            stack(names),
            coefficients(np.frombuffer(b"\x05\xfb\x80\x7f", np.int8), 50_000),
        )
        assert np.array_equal(replica.weights, expected)
    with pytest.raises(ChainError, match="follows"):
        replicas[1].apply(following(replicas[2], round=1))


def test_the_genesis_of_another_agent_is_pinned():
    assert genesis(bytes(range(16)), 0) == bytes(range(16))
    assert genesis(bytes(range(16)), 1).hex() == "41311813e6c366ab11999d7956102b23"


def test_an_agent_that_the_run_does_not_have_is_refused(make_manifest):
    with pytest.raises(ValueError, match="the agents 0 to 1, got 2"):
        Replica(make_manifest(count=2), zeros(500), agent=2)


def test_what_an_agents_revert_takes_back_is_that_agents(make_manifest):
    replica = Replica(make_manifest(count=2), zeros(500), agent=1)
    history = []
    for _ in range(3):
        history.append(following(replica))
        replica.apply(history[-1])
    entry = replica.revert(0, 3, (), lambda first, last: history[first:last])
    replica.apply(entry, history=lambda first, last: history[first:last])
    assert not replica.weights.any()
    assert replica.digest() == entry.digest


def test_samples_of_a_round_follow_those_of_the_round_before():
    assert list(samples(0, 3)) == [0, 1, 2]
    assert list(samples(7, 3)) == [21, 22, 23]


def test_the_encoded_form_at_hand_gives_the_same_head(make_manifest):
    one, other = Replica(make_manifest(), zeros(500)), Replica(make_manifest(), zeros(500))
    commit = following(one)
    one.apply(commit)
    other.apply(commit, commit.encode())
    assert one.head == other.head


def test_a_round_without_votes_moves_only_the_chain(make_manifest):
    replica = Replica(make_manifest(), zeros(500))
    replica.apply(following(replica, (), 0, b""))
    replica.apply(following(replica, (1,), 0, b"\x80\x80"))
    assert not replica.weights.any()
    assert replica.round == 2


def unchanged_by(replica: Replica, commit: Commit, error: type[Exception], match: str) -> None:
    before = (replica.round, replica.head, replica.weights.copy())
    for attempt in (replica.check, replica.apply):
        with pytest.raises(error, match=match):
            attempt(commit)
    assert (replica.round, replica.head) == before[:2]
    assert np.array_equal(replica.weights, before[2])


def test_a_commit_that_does_not_follow_changes_nothing(make_manifest):
    replica = Replica(make_manifest(), zeros(500))
    first = following(replica)
    replica.apply(first)
    unchanged_by(replica, first, ChainError, "commit of round 0 where round 1 is due")
    unchanged_by(replica, following(replica, round=3), ChainError, "commit of round 3 where round 1 is due")
    unchanged_by(
        replica, following(replica, previous=bytes(16)), ChainError, f"follows {'00' * 16}, this replica"
    )
    unchanged_by(
        replica,
        following(replica, codes=b"\x01\x02"),
        ChainError,
        "round 1: 4 codes of 8 bits take 4 bytes, got 2",
    )
    replica.apply(following(replica))
    assert replica.round == 2


def test_a_commit_past_the_end_of_the_run_is_refused(make_manifest):
    replica = Replica(make_manifest(rounds=2), zeros(500))
    replica.apply(following(replica))
    replica.apply(following(replica))
    unchanged_by(
        replica, following(replica), ChainError, "commit of round 2, but the run ends after 2 rounds"
    )


def test_the_last_sample_of_the_longest_run_has_a_name(make_manifest):
    manifest = make_manifest(rounds=2**20, directions=4096)
    replica = Replica(manifest, zeros(500), round=2**20 - 1, head=bytes(16))
    replica.apply(following(replica, (0,), 10, bytes(4095) + b"\x7f"))
    assert replica.weights.any()


def test_a_commit_that_might_wrap_is_refused_and_smaller_ones_go_on(make_manifest):
    weights = np.full(500, 2**31 - 1 - 1000, np.int32)
    replica = Replica(make_manifest(), weights)
    unchanged_by(replica, following(replica, (0,), 2**20, b"\x01\x01"), WeightsOverflow, "leave ±8")
    replica.apply(following(replica, (0,), 256, b"\x01\x02"))
    assert replica.round == 1
    assert replica.weights.max() <= 2**31 - 1


def test_an_edge_that_is_approached_and_left_is_no_overflow(make_manifest):
    # the running bound grows by every commit; the rescan must see that the weights themselves hardly moved
    replica = Replica(make_manifest(rounds=1000), zeros(500))
    for number in range(300):
        replica.apply(following(replica, (0,), 2**23, b"\x7f\x81" if number % 2 else b"\x81\x7f"))
    assert replica.round == 300
    assert np.abs(replica.weights.astype(np.int64)).max() < 2**31


def two_classes(replica, movers, manifest, round=None):
    """The next commit, of nodes 0 to 2, some of whom move."""
    rng = np.random.default_rng(replica.round)
    num = sum(5 if node in movers else 2 for node in (0, 1, 2))
    codes = rng.integers(-127, 128, num).astype(np.int8).tobytes()
    late = (1,) if replica.round else ()
    return Commit(replica.round, (30_000, 7_000), (-4, -3), (0, 1, 2), codes, replica.head, late, movers)


@pytest.mark.parametrize("movers", [(), (1,), (0, 2), (0, 1, 2)])
def test_moves_and_slopes_are_applied_with_the_step_of_their_class(make_manifest, movers):
    manifest = make_manifest(projections=5, staleness=1)
    replica = Replica(manifest, zeros(500))
    expected = zeros(500)
    for round in range(2):
        commit = two_classes(replica, movers, manifest)
        codes, place = np.frombuffer(commit.codes, np.int8), 0
        for node in (0, 1, 2):
            num, step = (5, 7_000) if node in movers else (2, 30_000)
            first = 5 * (round - (node in commit.late))  # the larger class says how many samples a round has
            names = [Direction(node, first + i) for i in range(num)]
            amounts = coefficients(codes[place : place + num], step)
            expected = reference.apply(expected, run_key(manifest.run_id), stack(names), amounts)
            place += num
        replica.apply(commit)
    assert np.array_equal(replica.weights, expected)


def test_a_movers_part_can_be_taken_back_alone(make_manifest):
    manifest = make_manifest(projections=5, staleness=1)
    replica, without = Replica(manifest, zeros(500)), Replica(manifest, zeros(500))
    entries = []
    for _ in range(3):
        entries.append(two_classes(replica, (1,), manifest))
        replica.apply(entries[-1])
        codes = bytearray(entries[-1].codes)
        codes[2:7] = b"\x80" * 5  # no votes
        again = msgspec.structs.replace(entries[-1], codes=bytes(codes), previous=without.head)
        without.apply(again)
    revert = replica.revert(0, 3, (1,), lambda first, last: entries[first:last])
    replica.apply(revert, history=lambda first, last: entries[first:last])
    assert np.array_equal(replica.weights, without.weights)


@pytest.mark.parametrize(
    ("projections", "change", "words"),
    [
        (0, {}, "has 2 classes of codes, the run 1"),
        (5, {"steps": (1,), "exponents": (0,), "movers": ()}, "has 1 classes of codes, the run 2"),
        (5, {"movers": ()}, "take 6 bytes, got 9"),
        (5, {"codes": bytes(8)}, "take 9 bytes, got 8"),
    ],
)
def test_codes_that_are_not_of_the_runs_classes_are_refused(make_manifest, projections, change, words):
    replica = Replica(make_manifest(projections=projections), zeros(500))
    commit = msgspec.structs.replace(two_classes(replica, (1,), None), **change)
    with pytest.raises(ChainError, match=words):
        replica.apply(commit)
    assert replica.round == 0
