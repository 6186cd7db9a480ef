"""Reverts: what they take back, to the last bit, however they are nested."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo.codes import coefficients
from zo.commit import Commit, Revert, decode_entry
from zo.directions import Direction, run_key, stack
from zo.inverse import inverse
from zo.reference import apply as reference_apply
from zo.replica import ChainError, HistoryNeeded, Replica, samples
from zo.weights import WeightsOverflow, zeros

SIZE = 60


class Line:
    """A replica and all its entries, with the weights after each."""

    def __init__(self, manifest, weights=None):
        self.manifest = manifest
        self.replica = Replica(manifest, zeros(SIZE) if weights is None else weights)
        self.entries = []
        self.states = [self.replica.weights.copy()]

    def history(self, first, last):
        return iter(self.entries[first:last])

    def commit(self, participants=(0, 1, 2), step=40_000, codes=None, late=()):
        replica = self.replica
        if codes is None:
            rng = np.random.default_rng(replica.round)
            codes = rng.integers(-128, 128, 2 * len(participants)).astype(np.int8).tobytes()
        self.push(Commit(replica.round, (step,), (-4,), participants, codes, replica.head, late))

    def take_back(self, first, last=None, nodes=()):
        last = self.replica.round if last is None else last
        self.push(self.replica.revert(first, last, tuple(nodes), self.history))

    def push(self, entry):
        self.replica.apply(entry, history=self.history)
        self.entries.append(entry)
        self.states.append(self.replica.weights.copy())

    @property
    def weights(self):
        return self.replica.weights


def replayed_without(line, is_dropped):
    """The weights from zero by the plain reference, without the codes that `is_dropped(round, node)` names."""
    weights = zeros(SIZE)
    key = run_key(line.manifest.run_id)
    for entry in line.entries:
        if not isinstance(entry, Commit):
            continue
        found = coefficients(np.frombuffer(entry.codes, np.int8), entry.steps[0])
        for index, node in enumerate(entry.participants):
            if is_dropped(entry.round, node):
                continue
            names = [Direction(node, s) for s in samples(entry.round - (node in entry.late), 2)]
            weights = reference_apply(weights, key, stack(names), found[2 * index : 2 * index + 2])
    return weights


@pytest.fixture
def line(make_manifest):
    return Line(make_manifest(size=SIZE, rounds=200, staleness=1))


@pytest.mark.parametrize("first", [0, 3, 6])
def test_a_rollback_gives_the_weights_of_that_round_bit_for_bit(line, first):
    for _ in range(7):
        line.commit()
    line.take_back(first)
    assert np.array_equal(line.weights, line.states[first])
    assert line.replica.round == 8
    assert line.entries[-1].digest == line.replica.digest()


def test_rollbacks_of_rollbacks(line):
    for _ in range(4):
        line.commit()
    line.take_back(2)  # round 4: as after 2
    line.commit()  # 5
    line.take_back(5)  # 6: without round 5 again
    assert np.array_equal(line.weights, line.states[2])
    line.take_back(4)  # 7: without the rollbacks: as after 4
    assert np.array_equal(line.weights, line.states[4])
    line.take_back(0)
    assert not line.weights.any()
    line.take_back(8)  # and without that one
    assert np.array_equal(line.weights, line.states[4])


@pytest.mark.parametrize("nodes", [(1,), (0, 2)])
def test_retracting_nodes_equals_a_replay_without_their_codes(line, nodes):
    for number in range(6):
        line.commit(late=(1,) if number in (2, 4) else ())
    line.take_back(0, nodes=nodes)
    assert np.array_equal(line.weights, replayed_without(line, lambda _, node: node in nodes))
    line.commit()  # what comes later counts again
    expected = replayed_without(line, lambda round, node: node in nodes and round < 6)
    assert np.array_equal(line.weights, expected)


def test_retracting_one_after_the_other_and_twice(line):
    for _ in range(5):
        line.commit()
    line.take_back(0, nodes=(1,))
    line.take_back(0, nodes=(1,))  # nothing is left to take back
    assert np.array_equal(line.states[-1], line.states[-2])
    line.take_back(2, nodes=(0,))
    expected = replayed_without(line, lambda round, node: node == 1 or (node == 0 and round >= 2))
    assert np.array_equal(line.weights, expected)
    line.take_back(0, nodes=(0, 1, 2))
    assert not line.weights.any()


def test_a_retraction_that_is_rolled_back(line):
    for _ in range(5):
        line.commit()
    line.take_back(0, nodes=(1,))
    line.commit()
    line.take_back(5)  # the retraction and the commit after it
    assert np.array_equal(line.weights, line.states[5])


operations = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.sets(st.integers(0, 3), max_size=4), st.booleans()),
        st.tuples(
            st.just("revert"),
            st.integers(0, 100),
            st.integers(0, 100),
            st.sets(st.integers(0, 4), max_size=2),
        ),
    ),
    max_size=14,
)


@settings(max_examples=120)
@given(operations)
def test_any_sequence_equals_the_definition(make_manifest, operations):
    """An entry's effect is a vector of integers, and a revert's is the negated sum of those it takes back."""
    line = Line(make_manifest(size=SIZE, rounds=200, staleness=1))
    effects: list[dict[int, np.ndarray]] = []  # node -> how it moved the weights
    key = run_key(line.manifest.run_id)
    for operation in operations:
        number = line.replica.round
        if operation[0] == "commit":
            participants = tuple(sorted(operation[1]))
            late = participants[:1] if operation[2] and number else ()
            line.commit(participants, step=3_000, late=late)
            commit = line.entries[-1]
            found = coefficients(np.frombuffer(commit.codes, np.int8), commit.steps[0])
            moved = {}
            for index, node in enumerate(participants):
                names = [Direction(node, s) for s in samples(number - (node in late), 2)]
                moved[node] = reference_apply(
                    zeros(SIZE), key, stack(names), found[2 * index : 2 * index + 2]
                )
            effects.append(moved)
        elif number:
            first = operation[1] % number
            last = first + 1 + operation[2] % (number - first)
            nodes = tuple(sorted(operation[3]))
            line.take_back(first, last, nodes)
            moved = {}
            for each in effects[first:last]:
                for node, vector in each.items():
                    if not nodes or node in nodes:
                        moved[node] = moved.get(node, zeros(SIZE)) - vector
            effects.append(moved)
        total = sum((vector for each in effects for vector in each.values()), zeros(SIZE))
        assert np.array_equal(line.weights, total)


def test_many_nested_rollbacks_read_the_ledger_a_few_times_only(line):
    for _ in range(20):
        line.commit()
    for _ in range(40):
        line.take_back(0)
    read = []

    def history(first, last):
        read.append(last - first)
        return line.history(first, last)

    line.replica.revert(0, line.replica.round, (), history)
    assert sum(read) < 200  # entry by entry, with everything that each takes back, it would be 2^40


def test_what_is_taken_back_of_what_was_taken_back_reaches_further_down(line):
    for _ in range(4):
        line.commit()
    line.take_back(1)
    part, *_ = inverse(line.replica.revert(4, 5, (), line.history), line.history)
    assert (part.first, part.last, part.factors.tolist()) == (1, 4, [1])


def test_a_revert_without_a_history_asks_for_one_and_changes_nothing(line):
    line.commit()
    entry = line.replica.revert(0, 1, (), line.history)
    before = line.replica.weights.copy(), line.replica.round, line.replica.head
    with pytest.raises(HistoryNeeded, match="round 1 takes back rounds from 0 on"):
        line.replica.apply(entry)
    assert np.array_equal(line.replica.weights, before[0])
    assert (line.replica.round, line.replica.head) == before[1:]


def test_a_revert_with_a_wrong_digest_changes_nothing(line):
    for _ in range(3):
        line.commit()
    right = line.replica.revert(1, 3, (), line.history)
    wrong = msgspec.structs.replace(right, digest=bytes(16))
    with pytest.raises(ChainError, match=r"taking back rounds 1 to 2 gives digest .* round 3 claims 0000"):
        line.replica.apply(wrong, history=line.history)
    line.push(right)
    assert np.array_equal(line.weights, line.states[1])


@pytest.mark.parametrize("change", [{"round": 2}, {"previous": bytes(16)}])
def test_a_revert_that_does_not_follow_changes_nothing(line, change):
    for _ in range(3):
        line.commit()
    entry = msgspec.structs.replace(line.replica.revert(0, 2, (), line.history), **change)
    with pytest.raises(ChainError):
        line.replica.apply(entry, history=line.history)
    assert np.array_equal(line.weights, line.states[3])


def test_a_revert_may_come_after_the_last_round(make_manifest):
    line = Line(make_manifest(size=SIZE, rounds=3))
    for _ in range(3):
        line.commit()
    line.take_back(2)
    assert np.array_equal(line.weights, line.states[2])


def test_taking_back_what_would_leave_the_range_is_an_overflow(line):
    line.commit((0,), step=2**21, codes=b"\x7f\x00")
    line.commit((0,), step=2**21, codes=b"\x7f\x00")
    near_the_edge = np.full(SIZE, 2**31 - 1 - 100, np.int32)
    line.replica.weights[:] = near_the_edge
    with pytest.raises(WeightsOverflow):
        line.replica.revert(0, 1, (), line.history)
    assert np.array_equal(line.replica.weights, near_the_edge)
    assert line.replica.round == 2


def test_a_factor_that_does_not_fit_is_an_overflow(line):
    line.commit((0,), step=2**31 - 1, codes=b"\x01\x00")
    for _ in range(3):
        line.commit((0,), step=0, codes=b"\x01\x00")
    # A ledger of somebody else's making: the same round taken back 300 times.
    copies = (Revert(number, 0, 1, (), bytes(16), bytes(16)) for number in range(4, 304))
    history = [*line.entries, *copies]
    entry = Revert(304, 0, 304, (), bytes(16), bytes(16))
    (part, *_) = inverse(entry, lambda first, last: history[first:last])
    assert part.factors.tolist() == [299]
    line.replica.round = 304
    with pytest.raises(WeightsOverflow):
        line.replica.revert(0, 304, (), lambda first, last: history[first:last])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((5, 3, 3), "cannot take back the rounds from 3 to before 3"),
        ((5, 3, 6), "cannot take back the rounds from 3 to before 6"),
        ((5, 3, 4, (2, 1)), "ascending and distinct"),
        ((5, 3, 4, (1, 1)), "ascending and distinct"),
        ((5, 3, 4, (-1,)), "nodes must be within 0"),
        ((5, 3, 4, (2**32 - 1,)), "nodes must be within 0"),
    ],
)
def test_an_impossible_revert_says_what_is_wrong(fields, message):
    round, first, last, *nodes = fields
    with pytest.raises(ValueError, match=message):
        Revert(round, first, last, nodes[0] if nodes else (), bytes(16), bytes(16))


def test_reverts_and_commits_are_told_apart_by_their_bytes(line):
    line.commit()
    line.take_back(0)
    for entry in line.entries:
        assert decode_entry(entry.encode()) == entry
    with pytest.raises(ValueError, match="not a ledger entry"):
        decode_entry(msgspec.msgpack.encode((25, 0)))
    loose = msgspec.msgpack.encode([24, 1, 0, 1, [], bytes(16), line.entries[1].previous])[:-1]
    with pytest.raises(ValueError, match="not a ledger entry"):
        decode_entry(loose)


def test_late_codes_are_those_of_the_round_before_and_count_only_if_allowed(make_manifest):
    manifest = make_manifest(size=SIZE, staleness=1)
    line = Line(manifest)
    line.commit((0,))
    line.commit((0, 1), late=(1,))
    assert np.array_equal(line.weights, replayed_without(line, lambda *_: False))
    strict = Replica(make_manifest(size=SIZE), zeros(SIZE))
    first = Commit(0, (5,), (-4,), (0,), b"\x01\x02", strict.head)
    strict.apply(first)
    with pytest.raises(ChainError, match="has late codes, which the manifest forbids"):
        strict.apply(Commit(1, (5,), (-4,), (0,), b"\x01\x02", strict.head, (0,)))
