"""History as a tool: log records, differences, rollback and retraction in a real run directory, export and backup."""

import msgspec
import numpy as np
import pytest

from coordinator.archive import restore
from coordinator.audit import audit
from coordinator.config import ServiceConfig
from coordinator.history import HistoryError, back_up, compare, export_state, records, take_back
from coordinator.ledger import Checkpoint, Enrolment, Ledger, StorageError
from coordinator.rundir import RunDirectory, RunDirectoryError
from node.state import load_result
from transport.messages import PROTOCOL_VERSION, Hello, Report
from zo.commit import Commit, Revert, decode_entry
from zo.replica import Replica
from zo.snapshot import encode_snapshot
from zo.weights import WeightsOverflow, zeros

ROUNDS = 10


@pytest.fixture(params=[0, 1], ids=["", "pipelined"])
def manifest(make_manifest, request):
    return make_manifest(pipeline=request.param)


@pytest.fixture
def played(manifest, virtual_coordinator):
    """Ten rounds of two nodes, in memory."""
    coordinator = virtual_coordinator(manifest, ServiceConfig(quorum=2))
    base, tokenizer = bytes.fromhex(manifest.base.digest), bytes.fromhex(manifest.base.tokenizer_digest)
    for node in range(2):
        hello = Hello(PROTOCOL_VERSION, manifest.run_id, base, tokenizer, 0, manifest.run_id, f"n{node}")
        coordinator.message(b"%d" % node, bytes([node] * 32), hello)
    for number in range(ROUNDS):
        for node in range(2):
            codes = bytes([number + 1 + node, 200 + number])
            coordinator.message(b"%d" % node, bytes([node] * 32), Report(number, codes))
    assert len(coordinator.frames) == ROUNDS
    return coordinator


def make(path, manifest, played, rounds=ROUNDS):
    directory = RunDirectory(path)
    directory.create(manifest, ServiceConfig(), Replica(manifest, zeros(500)))
    with directory.ledger(manifest) as ledger:
        for node, (key, name) in played.enrolled.items():
            ledger.enrol(Enrolment(node, key, name))
        for frame in played.frames[:rounds]:
            ledger.append(decode_entry(frame), frame)
        for number, (digest, scale) in played.checkpoints.items():
            if number <= rounds:
                ledger.checkpoint(Checkpoint(number, digest, scale))
    return directory


@pytest.fixture
def directory(tmp_path, manifest, played):
    return make(tmp_path / "run", manifest, played)


@pytest.fixture
def ledger(directory, manifest):
    with directory.ledger(manifest) as ledger:
        yield ledger


def verify(directory, manifest, ledger):
    return audit(manifest, directory.initial(manifest), ledger, lambda done, total: None)


# ---- taking back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [0, 4, 9])
def test_a_rollback_is_an_entry_after_which_the_weights_are_those_of_that_round(
    directory, manifest, ledger, played, to
):
    entry, replica = take_back(directory, manifest, ledger, to, [])
    assert entry == list(ledger.entries())[-1]
    assert (entry.round, entry.first, entry.last, entry.nodes) == (10, to, 10, ())
    assert np.array_equal(replica.weights, played.replay(to).weights)
    assert ledger.num_commits() == 11
    assert ledger.digest_at(11) == replica.digest()
    assert [each.round for each in directory.snapshots().stored()] == [11]
    proof = verify(directory, manifest, ledger)
    assert proof.digest == replica.digest().hex()
    assert proof.rounds == 11


def test_after_a_rollback_the_run_goes_on(directory, manifest, ledger, played):
    _, scale_before, _ = restore(directory, manifest, ledger, lambda done, total: None)
    _, replica = take_back(directory, manifest, ledger, 6, [])
    found, scale, origin = restore(directory, manifest, ledger, lambda done, total: None)
    assert found.digest() == replica.digest()
    assert origin == "snapshot of round 11"
    assert scale == scale_before  # what the step rule remembers is not taken back
    # a run that lost its snapshots is replayed, reverts and all
    for path in directory.snapshots().directory.iterdir():
        path.unlink()
    found, scale, origin = restore(directory, manifest, ledger, lambda done, total: None)
    assert (found.digest(), scale) == (replica.digest(), scale_before)
    assert origin.startswith("start of the run")


def test_a_stop_right_after_the_entry_loses_only_the_short_cuts(directory, manifest, ledger, monkeypatch):
    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(Ledger, "checkpoint", stop)
    with pytest.raises(Stop):
        take_back(directory, manifest, ledger, 6, [])
    monkeypatch.undo()
    assert ledger.num_commits() == 11
    verify(directory, manifest, ledger)
    assert restore(directory, manifest, ledger, lambda done, total: None)[0].round == 11


def test_a_retraction_takes_back_one_nodes_part(directory, manifest, ledger, played):
    entry, replica = take_back(directory, manifest, ledger, 3, [1])
    assert entry.nodes == (1,)
    expected = Replica(manifest, zeros(500))
    for commit in played.commits:
        if commit.round >= 3:  # as if node 1 had not voted, and nothing else had been otherwise
            silent = commit.codes[:2] + b"\x80\x80"
            commit = msgspec.structs.replace(commit, codes=silent, previous=expected.head)
        expected.apply(commit)
    assert np.array_equal(replica.weights, expected.weights)
    verify(directory, manifest, ledger)


def test_a_rollback_of_a_retraction_and_of_a_rollback(directory, manifest, ledger, played):
    take_back(directory, manifest, ledger, 0, [1])
    take_back(directory, manifest, ledger, 10, [])
    _, replica = take_back(directory, manifest, ledger, 4, [])
    assert np.array_equal(replica.weights, played.replay(4).weights)
    _, replica = take_back(directory, manifest, ledger, 12, [])
    assert np.array_equal(replica.weights, played.replay(10).weights)
    assert verify(directory, manifest, ledger).rounds == 14


@pytest.mark.parametrize(
    ("first", "nodes", "message"),
    [
        (10, [], "the ledger has 10 rounds: from round 10 on there is nothing to take back"),
        (-1, [], "from round -1 on there is nothing to take back"),
        (0, [7], "no node 7 has ever joined"),
        (0, [0, 7], "no node 7 has ever joined"),
        (0, [2], "node 2 took part in no round from 0 on"),
    ],
)
def test_what_cannot_be_taken_back_changes_nothing(directory, manifest, ledger, first, nodes, message):
    ledger.enrol(Enrolment(2, b"k" * 32, "late"))
    with pytest.raises(HistoryError, match=message):
        take_back(directory, manifest, ledger, first, nodes)
    assert ledger.num_commits() == 10
    assert directory.snapshots().stored() == []


def test_with_weight_decay_nothing_is_taken_back_and_it_is_said_what_to_do(directory, manifest, ledger):
    schedule = msgspec.structs.replace(manifest.schedule, weight_decay=8)
    manifest = msgspec.structs.replace(manifest, schedule=schedule)
    with pytest.raises(
        HistoryError, match=r"this run has weight decay: .* `export --round N` .* `init --adapter`"
    ):
        take_back(directory, manifest, ledger, 3, [])
    assert ledger.num_commits() == 10


def test_a_revert_that_would_overflow_is_not_made(directory, manifest, ledger, monkeypatch):
    def edge(*_, **__):
        raise WeightsOverflow("too far")

    monkeypatch.setattr(Replica, "revert", edge)
    with pytest.raises(WeightsOverflow):
        take_back(directory, manifest, ledger, 3, [])
    assert ledger.num_commits() == 10


def test_a_node_follows_a_rollback_by_snapshot_only(directory, manifest, ledger, played):
    take_back(directory, manifest, ledger, 6, [])
    assert ledger.last_revert() == 10
    (newest, replica), _ = directory.newest_snapshot(manifest, ledger)
    assert newest.round == 11
    assert replica.head == ledger.head_after(11)


# ---- the log ------------------------------------------------------------------------------------------------------


def test_records_are_entries_and_events_in_order(directory, manifest, ledger):
    ledger.note(0, "joined", 0, "node 0 joined")
    ledger.note(3, "missed", 1, "node 1 missed")
    ledger.note(10, "left", 1, "node 1 left")
    take_back(directory, manifest, ledger, 6, [1])
    found = list(records(ledger, manifest, 0, 11))
    assert [(each.round, each.kind) for each in found] == [
        (0, "joined"),
        *((number, "commit") for number in range(3)),
        (3, "missed"),
        *((number, "commit") for number in range(3, 10)),
        (10, "left"),
        (10, "revert"),
    ]
    commit = found[1]
    assert commit.participants == (0, 1)
    assert commit.text.startswith("nodes 0 1: 4 codes, RMS ")
    assert commit.no_votes == 0
    assert commit.digest is None
    assert found[5].digest is not None  # round 3: the digest after four commits is recorded
    assert found[-1].text == "takes back rounds 6 to 9 of node 1"
    assert found[-1].digest == ledger.digest_at(11).hex()


def test_records_of_a_part(manifest, ledger):
    ledger.note(0, "joined", 0, "node 0 joined")
    ledger.note(5, "missed", 1, "node 1 missed")
    ledger.note(9, "left", 1, "node 1 left")
    assert [(each.round, each.kind) for each in records(ledger, manifest, 4, 6)] == [
        (4, "commit"),
        (5, "missed"),
        (5, "commit"),
    ]
    assert list(records(ledger, manifest, 3, 3)) == []


def test_a_record_of_a_round_of_no_votes_and_of_late_ones(manifest, tmp_path):
    with Ledger(tmp_path / "l", bytes(16), create=True) as ledger:
        ledger.append(Commit(0, (0,), (-4,), (3,), b"\x80\x80", bytes(16)))
        ledger.append(Commit(1, (9,), (-4,), (3, 4), b"\x10\x80\x10\xf0", bytes(16), (4,)))
        silent, late = records(ledger, manifest, 0, 2)
    assert (silent.rms, silent.no_votes, silent.text) == (None, 2, "nodes 3: 2 codes, step 0")
    assert late.text == "nodes 3 4*: 4 codes, RMS 16.0, step 9"
    assert (late.late, late.no_votes) == ((4,), 1)


# ---- two runs -----------------------------------------------------------------------------------------------------


def difference(a, b):
    manifests = a.manifest(), b.manifest()
    with a.ledger(manifests[0], read_only=True) as one, b.ledger(manifests[1], read_only=True) as other:
        return compare(manifests, (one, other))


@pytest.mark.parametrize("rounds", [0, 1, 4, 9, 10])
def test_a_run_and_its_beginning(tmp_path, directory, manifest, played, rounds):
    shorter = make(tmp_path / "shorter", manifest, played, rounds)
    found = difference(directory, shorter)
    assert found.same_run
    assert found.fields == {}
    assert (found.rounds, found.common_rounds) == ((10, rounds), rounds)
    assert found.are_equal is (rounds == 10)


@pytest.mark.parametrize("fork", range(10))
def test_a_fork_is_found_at_its_round(tmp_path, directory, manifest, played, fork):
    other = make(tmp_path / "other", manifest, played, fork)
    with other.ledger(manifest) as ledger:
        for number in range(fork, 8):
            ledger.append(Commit(number, (1,), (-4,), (0,), b"\x01\x01", ledger.head_after(number)))
    found = difference(directory, other)
    assert found.common_rounds == min(fork, 10)
    assert not found.are_equal


def test_runs_of_their_own_differ_in_their_manifests(tmp_path, directory, manifest, make_manifest, played):
    other = RunDirectory(tmp_path / "other")
    another = make_manifest(step=0.03, name="b", pipeline=manifest.run.pipeline)
    other.create(another, ServiceConfig(), Replica(another, zeros(500)))
    found = difference(directory, other)
    assert not found.same_run
    assert found.fields == {"schedule.step": (0.02, 0.03), "run.name": ("test", "b")}
    assert found.common_rounds == 0


# ---- export -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round", [0, 5, 10])
def test_an_exported_round_is_what_a_node_would_have(directory, manifest, ledger, played, tmp_path, round):
    export_state(directory, manifest, [ledger], round, tmp_path / "state")
    found_manifest, replica = load_result(tmp_path / "state")
    assert found_manifest == manifest
    assert (replica.round, replica.digest()) == (round, played.replay(round).digest())


def test_an_export_of_a_round_before_a_rollback(directory, manifest, ledger, played, tmp_path):
    take_back(directory, manifest, ledger, 2, [])
    export_state(directory, manifest, [ledger], 10, tmp_path / "state")
    assert load_result(tmp_path / "state")[1].digest() == played.replay(10).digest()
    export_state(directory, manifest, [ledger], 11, tmp_path / "after")
    after = load_result(tmp_path / "after")[1]
    assert np.array_equal(after.weights, played.replay(2).weights)


@pytest.mark.parametrize("round", [-1, 11])
def test_a_round_that_is_not_there_cannot_be_exported(directory, manifest, ledger, tmp_path, round):
    with pytest.raises(HistoryError, match=f"the ledger has 10 rounds, got --round {round}"):
        export_state(directory, manifest, [ledger], round, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_an_export_overwrites_nothing(directory, manifest, ledger, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "precious").write_text("")
    with pytest.raises(HistoryError, match="exists already"):
        export_state(directory, manifest, [ledger], 5, tmp_path / "state")


# ---- backup -------------------------------------------------------------------------------------------------------


def test_a_backup_is_the_same_run(directory, manifest, ledger, played, tmp_path):
    directory.snapshots().save(8, encode_snapshot(played.replay(8), manifest))
    back_up(directory, tmp_path / "copy")
    copy = RunDirectory(tmp_path / "copy")
    assert difference(directory, copy).are_equal
    assert copy.keys() == directory.keys()
    assert copy.key_path.stat().st_mode & 0o777 == 0o600
    assert copy.config() == directory.config()
    assert copy.snapshots().stored() == directory.snapshots().stored()
    with copy.ledger(manifest) as copied:
        assert restore(copy, manifest, copied, lambda done, total: None)[2] == "snapshot of round 8"
        verify(copy, manifest, copied)


def test_a_backup_while_a_writer_appends_is_consistent_each_time(
    tmp_path, directory, manifest, ledger, played
):
    """Between any two transactions of a writer that has the ledger open."""
    writer = make(tmp_path / "written", manifest, played, 0)
    with writer.ledger(manifest) as open_ledger:
        for number, frame in enumerate(played.frames):
            open_ledger.append(decode_entry(frame), frame)
            back_up(writer, tmp_path / f"copy-{number}")
            copy = RunDirectory(tmp_path / f"copy-{number}")
            with copy.ledger(manifest) as copied:
                assert list(copied.frames()) == played.frames[: number + 1]
        # a transaction that is open is not in the copy, and is not disturbed
        open_ledger._db.execute("BEGIN IMMEDIATE")
        open_ledger._db.execute("DELETE FROM commits")
        back_up(writer, tmp_path / "during")
        open_ledger._db.execute("ROLLBACK")
        assert open_ledger.num_commits() == 10
    with RunDirectory(tmp_path / "during").ledger(manifest) as copied:
        assert copied.num_commits() == 10


def test_a_backup_overwrites_nothing(directory, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "precious").write_text("")
    with pytest.raises(RunDirectoryError, match="exists already"):
        back_up(directory, tmp_path / "copy")


def test_a_backup_of_a_snapshot_that_is_removed_meanwhile(directory, manifest, played, tmp_path, monkeypatch):
    stored = directory.snapshots().save(8, encode_snapshot(played.replay(8), manifest))
    listed = directory.snapshots().stored()
    directory.snapshots()._path(stored).unlink()
    monkeypatch.setattr(directory.snapshots(), "stored", lambda: listed)
    back_up(directory, tmp_path / "copy")
    assert RunDirectory(tmp_path / "copy").snapshots().stored() == []


def test_a_backup_that_cannot_be_written_says_so(directory, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copy2", full)
    with pytest.raises(StorageError, match=r"cannot back up to .*No space left"):
        back_up(directory, tmp_path / "copy")


def test_reverts_survive_a_backup(directory, manifest, ledger, tmp_path):
    entry, _ = take_back(directory, manifest, ledger, 6, [])
    back_up(directory, tmp_path / "copy")
    with RunDirectory(tmp_path / "copy").ledger(manifest) as copied:
        assert list(copied.entries())[-1] == entry
        assert isinstance(entry, Revert)
        assert copied.last_revert() == 10
