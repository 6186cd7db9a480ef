"""Snapshots: when one is due, which are kept, and that nothing but whole ones is ever served."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.ledger import StorageError
from coordinator.snapshots import KEPT_NEWEST, MAX_REPLAY_WORK, MIN_TAIL_BYTES, SnapshotStore, is_due, kept
from transport.messages import PIECE_BYTES
from zo.snapshot import content_address

DATA = bytes(i % 251 for i in range(2 * PIECE_BYTES + 100))


@pytest.fixture
def store(tmp_path):
    return SnapshotStore(tmp_path / "snapshots")


# ---- when ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bytes", "tail_bytes", "tail_codes", "due"),
    [
        (0, 0, 0, False),
        (0, MIN_TAIL_BYTES, 0, False),
        (0, MIN_TAIL_BYTES + 1, 0, True),
        (100_000, 100_000, 0, False),
        (100_000, 100_001, 0, True),
        (10**9, 10, MAX_REPLAY_WORK // 1000, False),
        (10**9, 10, MAX_REPLAY_WORK // 1000 + 1, True),
    ],
)
def test_a_snapshot_is_due_when_the_tail_costs_as_much(num_bytes, tail_bytes, tail_codes, due):
    assert is_due(num_bytes, tail_bytes, tail_codes, 1000) is due


# ---- which --------------------------------------------------------------------------------------------------------


def grown(steps):
    """Which snapshots are kept if one is made after each step, and old ones are removed each time."""
    rounds, now = [], 0
    for step in steps:
        now += step
        rounds = sorted(kept([*rounds, now]))
        yield now, rounds


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_the_newest_are_always_kept_and_there_are_few(steps):
    made = []
    for now, rounds in grown(steps):
        made.append(now)
        assert set(made[-KEPT_NEWEST:]) <= set(rounds) <= set(made)
        assert len(rounds) <= KEPT_NEWEST + (now - made[0]).bit_length() + 1


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_the_first_is_kept_and_no_state_is_much_older_than_it_must_be(steps):
    """Whatever round one goes back to, a snapshot before it is at most four times as old (and a step) as that round."""
    made = []
    for now, rounds in grown(steps):
        made.append(now)
        assert rounds[0] == made[0]
        for wanted in made:
            nearest = max(each for each in rounds if each <= wanted)
            assert now - nearest <= 4 * (now - wanted) + 3 * max(steps)


def test_nothing_to_keep():
    assert kept([]) == set()


def test_a_million_rounds_keep_a_handful():
    *_, (_, rounds) = grown([3000] * 333)
    assert len(rounds) <= 12


# ---- the store ----------------------------------------------------------------------------------------------------


def test_what_was_saved_is_there(store):
    assert store.stored() == []
    stored = store.save(7, DATA)
    assert stored == (7, content_address(DATA), len(DATA))
    assert store.stored() == [stored]
    assert store.read(stored) == DATA


def test_a_snapshot_is_synced_before_it_has_its_name(store, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("fsync") or sync(descriptor))
    monkeypatch.setattr(os, "replace", lambda old, new: events.append("replace") or replace(old, new))
    store.save(7, DATA)
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, the directory


def test_old_ones_go_by_the_policy(store):
    for round in range(100, 4100, 100):
        store.save(round, b"%d" % round)
    rounds = [each.round for each in store.stored()]
    assert set(rounds) == kept(rounds)
    assert rounds[-3:] == [3800, 3900, 4000]
    assert len(rounds) <= 12


def test_one_of_a_later_round_is_no_part_of_the_ledger_and_goes(store):
    """A ledger restored from a copy: what came after must not crowd out the snapshots made since."""
    for round in (100, 200, 300, 400):
        store.save(round, b"%d" % round)
    for round in (150, 160, 170):
        stored = store.save(round, b"again %d" % round)
        assert stored in store.stored()
    assert max(each.round for each in store.stored()) == 170


def test_what_a_stop_left_half_written_goes_with_the_next(store):
    store.save(7, DATA)
    torn = store.directory / "8-00.zo.new"
    torn.write_bytes(b"half")
    store.save(9, DATA)
    assert not torn.exists()


@pytest.mark.parametrize(
    "name",
    ["notes.zo", "7-beef.zo", "x-" + "00" * 16 + ".zo", "7-" + "zz" * 16 + ".zo", "²-" + "00" * 16 + ".zo"],
)
def test_files_that_are_none_are_passed_over(store, name):
    stored = store.save(7, DATA)
    (store.directory / name).write_bytes(b"")
    assert store.stored() == [stored]


def test_pieces_make_up_the_whole(store):
    stored = store.save(7, DATA)
    pieces = [store.piece(stored.content, offset) for offset in range(0, len(DATA), PIECE_BYTES)]
    assert {num_bytes for num_bytes, _ in pieces} == {len(DATA)}
    assert b"".join(data for _, data in pieces) == DATA
    assert store.piece(stored.content, len(DATA)) == (len(DATA), b"")
    assert store.piece(stored.content, 2**40) == (len(DATA), b"")


def test_there_is_no_piece_of_what_is_not_there(store):
    assert store.piece(bytes(16), 0) == (0, b"")
    stored = store.save(7, DATA)
    store._path(stored).unlink()
    assert store.piece(stored.content, 0) == (0, b"")


def test_a_torn_file_is_never_served(store):
    stored = store.save(7, DATA)
    store._path(stored).write_bytes(DATA[: PIECE_BYTES + 5])
    assert store.piece(stored.content, 0) == (0, b"")
    # nor one that is damaged after it was found to be whole
    store._path(stored).write_bytes(DATA)
    assert store.piece(stored.content, 0)[0] == len(DATA)
    store._path(stored).write_bytes(b"x" + DATA[1:])
    os.utime(store._path(stored), ns=(1, 1))
    assert store.piece(stored.content, 0) == (0, b"")


def test_a_file_is_read_whole_once_for_all_its_pieces(store, monkeypatch):
    stored = store.save(7, DATA)
    reads = []
    read = store.read
    monkeypatch.setattr(store, "read", lambda snapshot: reads.append(snapshot) or read(snapshot))
    for offset in range(0, len(DATA), PIECE_BYTES):
        store.piece(stored.content, offset)
    assert reads == [stored]


def test_what_cannot_be_written_is_a_storage_error(store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    store.save(7, DATA)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write the snapshot .*No space left"):
        store.save(8, DATA)
    assert [each.round for each in store.stored()] == [7]
