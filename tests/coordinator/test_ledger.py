"""The ledger: what was written stays, whatever happens next, and what is damaged is named."""

import sqlite3

import msgspec
import pytest

from coordinator.ledger import Checkpoint, Enrolment, Ledger, LedgerError, StorageError
from zo.commit import Commit, Revert, chain_digest
from zo.steps import Scale

RUN = bytes(range(16))
OTHER = bytes(16)
COMMITS = [Commit(number, (5,), (-4,), (0,), bytes([number + 1]), RUN) for number in range(4)]
FRAMES = [commit.encode() for commit in COMMITS[:3]]
FOURTH = COMMITS[3].encode()
LARGE = msgspec.structs.replace(COMMITS[3], codes=bytes(100_000))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger(path, RUN, create=True) as ledger:
        yield ledger


def fill(ledger: Ledger) -> None:
    for commit in COMMITS[:3]:
        ledger.append(commit)


def test_a_new_ledger_is_empty(ledger):
    assert ledger.num_commits() == 0
    assert list(ledger.frames()) == []
    assert ledger.head_after(0) == RUN
    assert ledger.last_checkpoint() is None
    assert ledger.digest_at(0) is None
    assert ledger.members() == []
    assert ledger.events(10) == []
    assert ledger.status() is None


def test_commits_come_back_in_order_and_chain(ledger):
    fill(ledger)
    assert ledger.num_commits() == 3
    assert list(ledger.frames()) == FRAMES
    assert list(ledger.frames(1, 2)) == FRAMES[1:2]
    assert list(ledger.frames(3)) == []
    assert ledger.head_after(0) == RUN
    assert ledger.head_after(2) == chain_digest(FRAMES[1])


def test_everything_is_there_after_opening_it_again(path):
    with Ledger(path, RUN, create=True) as ledger:
        fill(ledger)
        ledger.checkpoint(Checkpoint(2, b"d" * 16, Scale(123, -5)))
        ledger.checkpoint(Checkpoint(3, b"e" * 16, Scale(456, -6)))
        ledger.enrol(Enrolment(0, b"k" * 32, "gateway"))
        ledger.note(2, "joined", 0, "node 0 joined")
        ledger.note(3, "finished", None, "all done")
        ledger.set_status(b'{"round": 3}')
    with Ledger(path, RUN) as ledger:
        assert list(ledger.frames()) == FRAMES
        assert ledger.last_checkpoint() == Checkpoint(3, b"e" * 16, Scale(456, -6))
        assert [each.round for each in ledger.checkpoints()] == [2, 3]
        assert ledger.digest_at(2) == b"d" * 16
        assert ledger.digest_at(1) is None
        assert ledger.members() == [Enrolment(0, b"k" * 32, "gateway")]
        assert [(event.round, event.kind, event.node) for event in ledger.events(10)] == [
            (2, "joined", 0),
            (3, "finished", None),
        ]
        assert [event.kind for event in ledger.events(1)] == ["finished"]
        assert ledger.status() == b'{"round": 3}'


def test_a_commit_is_never_replaced(ledger):
    fill(ledger)
    with pytest.raises(StorageError, match="UNIQUE constraint failed"):
        ledger.append(COMMITS[1])
    assert list(ledger.frames()) == FRAMES


def test_each_commit_is_synced_before_append_returns(ledger):
    assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# ---- interrupted --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("boundary", ["BEGIN", "INSERT", "COMMIT"])
def test_a_stop_before_any_statement_leaves_the_ledger_as_it_was(path, boundary):
    with Ledger(path, RUN, create=True) as ledger:
        ledger.append(COMMITS[0])
        inner = ledger._db

        class Dying:
            def execute(self, statement, *values):
                if statement.startswith(boundary):
                    raise Killed
                return inner.execute(statement, *values)

        ledger._db = Dying()
        with pytest.raises(Killed):
            ledger.append(COMMITS[1])
        ledger._db = inner
        assert list(ledger.frames()) == FRAMES[:1]
        ledger.append(COMMITS[1])
    with Ledger(path, RUN) as ledger:
        assert list(ledger.frames()) == FRAMES[:2]


def test_a_process_that_never_closed_its_ledger_loses_nothing(path, tmp_path):
    with Ledger(path, RUN, create=True) as ledger:
        fill(ledger)
        copy = (
            tmp_path / "copy.sqlite"
        )  # what a power cut would leave: the file and its log, as they are on disk
        for suffix in ("", "-wal"):
            copy.with_name(copy.name + suffix).write_bytes(path.with_name(path.name + suffix).read_bytes())
    with Ledger(copy, RUN) as ledger:
        assert list(ledger.frames()) == FRAMES


def test_a_torn_write_at_the_end_of_the_log_costs_only_that_commit(path, tmp_path):
    with Ledger(path, RUN, create=True) as ledger:
        ledger.append(COMMITS[0])
        before = path.with_name(path.name + "-wal").stat().st_size
        ledger.append(COMMITS[1])
        log = path.with_name(path.name + "-wal").read_bytes()
        copy = tmp_path / "copy.sqlite"
        copy.write_bytes(path.read_bytes())
    for cut in (before + 1, (before + len(log)) // 2, len(log) - 1):
        copy.with_name(copy.name + "-wal").write_bytes(log[:cut])
        with sqlite3.connect(copy) as check:
            assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert check.execute("SELECT frame FROM commits").fetchall() == [(FRAMES[0],)]
        check.close()


# ---- cannot write -------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_storage_error_and_the_ledger_is_intact(path):
    with Ledger(path, RUN, create=True) as ledger:
        fill(ledger)
        (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
        ledger._db.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(StorageError, match=r"database or disk is full\. What was acknowledged is safe"):
            ledger.append(LARGE)
        assert list(ledger.frames()) == FRAMES
        assert not ledger._db.in_transaction
        ledger._db.execute("PRAGMA max_page_count=100000")
        ledger.append(LARGE)
    with Ledger(path, RUN) as ledger:
        assert ledger.num_commits() == 4


@pytest.mark.parametrize(
    "write",
    [
        lambda ledger: ledger.append(COMMITS[0]),
        lambda ledger: ledger.checkpoint(Checkpoint(1, b"x" * 16, Scale(1, 1))),
        lambda ledger: ledger.enrol(Enrolment(0, b"k" * 32, "n")),
        lambda ledger: ledger.note(0, "kind", None, "text"),
        lambda ledger: ledger.set_status(b"{}"),
    ],
)
def test_a_read_only_ledger_says_so_at_every_write(path, write):
    Ledger(path, RUN, create=True).close()
    with Ledger(path, RUN, read_only=True) as ledger, pytest.raises(StorageError, match="readonly database"):
        write(ledger)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match="unable to open database file"):
        Ledger(tmp_path / "nowhere" / "ledger.sqlite", RUN, create=True)


# ---- cannot be right ----------------------------------------------------------------------------------------------


def test_there_must_be_one_or_none(path):
    with pytest.raises(LedgerError, match="does not exist"):
        Ledger(path, RUN)
    assert not path.exists()
    Ledger(path, RUN, create=True).close()
    with pytest.raises(LedgerError, match="exists already"):
        Ledger(path, RUN, create=True)


def test_another_run_is_named(path):
    Ledger(path, RUN, create=True).close()
    with pytest.raises(
        LedgerError, match=f"belongs to run {RUN.hex()}, the manifest beside it says {OTHER.hex()}"
    ):
        Ledger(path, OTHER)


def test_another_format_is_named(path):
    Ledger(path, RUN, create=True).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = ? WHERE key = 'format'", (b"zo-ledger-9",))
    db.close()
    expected = "has format 'zo-ledger-9', this version reads 'zo-ledger-3'; use the version that made it"
    with pytest.raises(LedgerError, match=expected):
        Ledger(path, RUN)


@pytest.mark.parametrize(
    "content", [b"", b"not a database at all, not at all", b"SQLite format 3\x00" + bytes(5000)]
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_is_no_ledger(path, content, read_only):
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"is not a ledger, or is damaged|has format 'none'"):
        Ledger(path, RUN, read_only=read_only)


def test_a_database_of_something_else(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE meta (key TEXT, value BLOB)")
    db.close()
    with pytest.raises(LedgerError, match="has format 'none'"):
        Ledger(path, RUN)


def test_a_damaged_page_is_a_ledger_error(path):
    with Ledger(path, RUN, create=True) as ledger:
        for number in range(200):
            ledger.append(Commit(number, (5,), (0,), (0,), bytes([number]) * 500, RUN))
    data = bytearray(path.read_bytes())
    data[3 * 4096 :] = b"\xa5" * (len(data) - 3 * 4096)
    path.write_bytes(data)
    with pytest.raises(LedgerError, match=r"damaged|missing"), Ledger(path, RUN) as ledger:
        list(ledger.frames())


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_commit_is_named(path, missing):
    with Ledger(path, RUN, create=True) as ledger:
        fill(ledger)
        ledger._db.execute("DELETE FROM commits WHERE round = ?", (missing,))
        with pytest.raises(LedgerError, match=f"commit {missing} is missing"):
            list(ledger.frames())
        assert list(ledger.frames(missing + 1)) == FRAMES[missing + 1 :]


# ---- together -----------------------------------------------------------------------------------------------------


def test_readers_see_whole_commits_and_block_nobody(path, ledger):
    fill(ledger)
    with Ledger(path, RUN, read_only=True) as reader:
        reading = reader.frames()
        assert next(reading) == FRAMES[0]
        ledger.append(COMMITS[3])
        ledger.set_status(b"{}")
        assert list(reading) == FRAMES[1:]
        assert list(reader.frames()) == [*FRAMES, FOURTH]
        assert reader.status() == b"{}"


def test_a_second_writer_cannot_slip_in_between(path, ledger):
    with Ledger(path, RUN) as other:
        other._db.execute("PRAGMA busy_timeout=0")
        ledger._db.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="locked"):
            other.append(COMMITS[0])
        ledger._db.execute("ROLLBACK")
        other.append(COMMITS[0])
    assert list(ledger.frames()) == FRAMES[:1]


def test_a_history_that_is_read_only_in_part_does_not_hold_up_the_writer(ledger):
    fill(ledger)
    reading = ledger.frames()
    next(reading)
    ledger.append(COMMITS[3])
    assert list(reading) == FRAMES[1:]


# ---- costs, reverts, members ----------------------------------------------------------------------------------------


def test_costs_count_bytes_and_codes_from_any_round_on(path):
    frames = [commit.encode() for commit in COMMITS]
    with Ledger(path, RUN, create=True) as ledger:
        assert ledger.cost_since(0) == (0, 0)
        fill(ledger)
        ledger.append(msgspec.structs.replace(COMMITS[3], participants=(0, 1), codes=b"\x01\x02\x03\x04"))
        frames[3] = list(ledger.frames())[3]
        for first in range(5):
            assert ledger.cost_since(first) == (
                sum(map(len, frames[first:])),
                (3 - first) * (first < 3) + 4 * (first < 4),
            )
        assert ledger.cost_since(99) == (0, 0)
        found = [ledger.cost_since(first) for first in range(5)]
    with Ledger(path, RUN) as ledger:  # the sums are found again
        assert [ledger.cost_since(first) for first in range(5)] == found
        ledger.append(msgspec.structs.replace(COMMITS[3], round=4))
        assert ledger.cost_since(4) == (len(FOURTH), 1)


def test_a_revert_is_found_and_holds_no_codes(path):
    with Ledger(path, RUN, create=True) as ledger:
        fill(ledger)
        assert ledger.last_revert() is None
        revert = Revert(3, 1, 3, (), bytes(16), bytes(16))
        ledger.append(revert)
        assert ledger.last_revert() == 3
        assert list(ledger.entries(2)) == [COMMITS[2], revert]
        assert ledger.cost_since(3) == (len(revert.encode()), 0)
    with Ledger(path, RUN) as ledger:
        assert ledger.last_revert() == 3
        assert ledger.cost_since(3) == (len(revert.encode()), 0)


def test_costs_are_those_of_what_is_there_after_a_write_that_failed(path):
    with Ledger(path, RUN, create=True) as ledger:
        fill(ledger)
        before = ledger.cost_since(0)
        with pytest.raises(StorageError):
            ledger.append(COMMITS[0])
        assert ledger.cost_since(0) == before


def test_an_entry_that_is_damaged_is_named(path):
    with Ledger(path, RUN, create=True) as ledger:
        fill(ledger)
        ledger._write("UPDATE commits SET frame = ? WHERE round = 1", b"\x00")
        with pytest.raises(LedgerError, match="round 1: not a ledger entry"):
            list(ledger.entries())


def test_quarantine_is_kept(path):
    with Ledger(path, RUN, create=True) as ledger:
        ledger.enrol(Enrolment(0, b"k" * 32, "a"))
        ledger.enrol(Enrolment(1, b"l" * 32, "b"))
        ledger.set_quarantined(1, True)
    with Ledger(path, RUN) as ledger:
        assert [each.is_quarantined for each in ledger.members()] == [False, True]
        ledger.set_quarantined(1, False)
        assert [each.is_quarantined for each in ledger.members()] == [False, False]


def test_who_left_and_has_not_come_back_is_known(path):
    with Ledger(path, RUN, create=True) as ledger:
        for node in range(5):
            ledger.enrol(Enrolment(node, bytes([node]) * 32, "n"))
        visits = {0: "joined left", 1: "joined left joined", 2: "joined", 3: "joined left joined lost left"}
        for node, kinds in visits.items():
            for kind in kinds.split():
                ledger.note(4, kind, node, "")
    with Ledger(path, RUN, read_only=True) as ledger:
        assert [each.has_left for each in ledger.members()] == [True, False, False, True, False]


def test_divergences_are_counted_since_the_last_release(ledger):
    assert ledger.divergences() == {}
    ledger.note(4, "diverged", 1, "")
    assert ledger.divergences() == {1: (1, True)}
    ledger.note(4, "started-over", 1, "")
    ledger.note(4, "missed", 1, "")
    assert ledger.divergences() == {1: (1, False)}
    ledger.note(8, "diverged", 1, "")
    ledger.note(8, "diverged", 2, "")
    assert ledger.divergences() == {1: (2, True), 2: (1, True)}
    ledger.note(9, "released", 1, "")
    assert ledger.divergences() == {1: (0, True), 2: (1, True)}


def test_divergences_are_found_without_reading_all_events(ledger):
    (plan,) = ledger._db.execute(
        "EXPLAIN QUERY PLAN SELECT node, kind FROM events "
        "WHERE kind IN ('diverged', 'released', 'started-over') ORDER BY id"
    )
    assert "USING INDEX divergences" in plan[3]


def test_events_and_checkpoints_of_some_rounds(ledger):
    for round in range(6):
        ledger.note(round, "joined", round, f"round {round}")
        ledger.checkpoint(Checkpoint(round, bytes(16), Scale(round, -4)))
    assert [event.round for event in ledger.events()] == [0, 1, 2, 3, 4, 5]
    assert [event.round for event in ledger.events(2)] == [4, 5]
    assert [event.round for event in ledger.events(first=1, last=3)] == [1, 2, 3]
    assert [event.round for event in ledger.events(2, first=1, last=3)] == [2, 3]
    assert [each.round for each in ledger.checkpoints(2, 4)] == [2, 3, 4]
    assert len(list(ledger.checkpoints())) == 6
