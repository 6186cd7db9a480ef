"""The run directory: made whole or not at all, served by one process, and a start that trusts only what is proven."""

import os
import stat
import subprocess
import sys

import pytest

from coordinator.archive import restore
from coordinator.config import ConfigError, ServiceConfig
from coordinator.ledger import Checkpoint, LedgerError, StorageError
from coordinator.rundir import BusyError, RunDirectory, RunDirectoryError
from transport.messages import PROTOCOL_VERSION, Hello, Report
from zo.commit import decode_entry
from zo.manifest import ManifestError
from zo.replica import Replica
from zo.snapshot import SnapshotError, encode_snapshot
from zo.weights import zeros


@pytest.fixture
def manifest(make_manifest):
    return make_manifest()


@pytest.fixture
def directory(tmp_path, manifest):
    directory = RunDirectory(tmp_path / "runs" / "one")
    directory.create(manifest, ServiceConfig(quorum=3), Replica(manifest, zeros(500)))
    return directory


@pytest.fixture
def played(manifest, virtual_coordinator):
    """Ten rounds of one node, in memory."""
    coordinator = virtual_coordinator(manifest)
    base, tokenizer = bytes.fromhex(manifest.base.digest), bytes.fromhex(manifest.base.tokenizer_digest)
    hello = Hello(PROTOCOL_VERSION, manifest.run_id, base, tokenizer, 0, manifest.run_id, "n")
    coordinator.message(b"s", bytes(32), hello)
    for number in range(10):
        coordinator.message(b"s", bytes(32), Report(number, bytes([number + 1, 200 + number])))
    return coordinator


def write(directory, manifest, played, rounds=10):
    """Put the first rounds into the ledger, with the digests recorded meanwhile."""
    with directory.ledger(manifest) as ledger:
        for frame in played.frames[:rounds]:
            ledger.append(decode_entry(frame), frame)
        for number, (digest, scale) in played.checkpoints.items():
            if number <= rounds:
                ledger.checkpoint(Checkpoint(number, digest, scale))


def save(directory, replica, manifest):
    return directory.snapshots().save(replica.round, encode_snapshot(replica, manifest))


def replica_at(manifest, played, round):
    replica = Replica(manifest, zeros(500))
    for frame in played.frames[:round]:
        replica.apply(decode_entry(frame))
    return replica


# ---- making -------------------------------------------------------------------------------------------------------


def test_a_new_run_directory_has_everything(directory, manifest):
    assert directory.manifest() == manifest
    assert directory.config() == ServiceConfig(quorum=3)
    assert stat.S_IMODE(directory.key_path.stat().st_mode) == 0o600
    assert len(directory.keys().public) == 32
    with directory.ledger(manifest) as ledger:
        assert ledger.num_commits() == 0
    assert directory.initial(manifest).digest() == Replica(manifest, zeros(500)).digest()
    assert not list(directory.path.glob("*.new"))


def test_what_exists_is_never_overwritten(directory, manifest, tmp_path):
    before = directory.key_path.read_text()
    with pytest.raises(RunDirectoryError, match="exists already; choose another directory"):
        directory.create(manifest, ServiceConfig(), Replica(manifest, zeros(500)))
    assert directory.key_path.read_text() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirectoryError, match="exists already"):
        RunDirectory(tmp_path / "file").create(manifest, ServiceConfig(), Replica(manifest, zeros(500)))
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_directory_may_become_one(tmp_path, manifest):
    RunDirectory(tmp_path).create(manifest, ServiceConfig(), Replica(manifest, zeros(500)))
    assert RunDirectory(tmp_path).manifest() == manifest


def test_half_a_directory_is_none(tmp_path, manifest, monkeypatch):
    directory = RunDirectory(tmp_path / "half")
    replace, done = os.replace, []

    def full_at_last(source, target):
        done.append(target)
        if str(target).endswith("manifest.toml"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_at_last)
    with pytest.raises(StorageError, match=r"cannot write the run directory .* No space left on device"):
        directory.create(manifest, ServiceConfig(), Replica(manifest, zeros(500)))
    assert len(done) > 1, "the manifest is not the last file"
    with pytest.raises(RunDirectoryError, match=r"is not a run directory: cannot read manifest\.toml"):
        directory.manifest()


def test_what_is_no_run_directory_says_what_to_do(tmp_path):
    with pytest.raises(RunDirectoryError, match="Make one with `zo-coordinator init`"):
        RunDirectory(tmp_path / "nowhere").manifest()
    (tmp_path / "manifest.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        RunDirectory(tmp_path).manifest()


# ---- edited -------------------------------------------------------------------------------------------------------


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_an_edited_manifest_is_not_that_of_the_ledger(directory):
    edit(directory.manifest_path, "rounds = 20", "rounds = 21")
    edited = directory.manifest()
    with pytest.raises(
        LedgerError, match=r"The manifest of a run must not be edited: restore it, or `init` a new run"
    ):
        directory.ledger(edited)
    with pytest.raises(SnapshotError, match="snapshot of run"):
        directory.initial(edited)


def test_a_comment_may_be_edited(directory, manifest):
    edit(directory.manifest_path, "# LoRA rank r.", "# The rank that we found best.")
    directory.ledger(directory.manifest()).close()
    assert directory.manifest() == manifest


def test_a_manifest_of_another_version_is_named_before_its_fields_are_judged(directory):
    edit(directory.manifest_path, "protocol = 1", "protocol = 2\nsomething_new = true")
    with pytest.raises(
        ManifestError, match=r"manifest\.toml is of protocol version 2, this program speaks 1; use the"
    ):
        directory.manifest()


def test_a_wrong_field_is_named_with_its_file(directory):
    edit(directory.manifest_path, "rank = 4", "rank = 0")
    with pytest.raises(ManifestError, match=r"manifest\.toml: adapter\.rank = 0: expected `int` >= 1"):
        directory.manifest()
    edit(directory.config_path, "quorum = 3", "quorum = 0")
    with pytest.raises(ConfigError, match=r"coordinator\.toml: quorum = 0: expected `int` >= 1"):
        directory.config()


# ---- locked -------------------------------------------------------------------------------------------------------


def test_two_processes_cannot_serve_one_directory(directory):
    program = (
        "import sys, pathlib, coordinator.rundir\n"
        f"with coordinator.rundir.RunDirectory(pathlib.Path({str(directory.path)!r})).lock():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match="is being served by another process; stop that one first"):
            directory.lock().__enter__()
        process.kill()  # and the lock ends with its process, however it ends
        process.wait(30)
    with directory.lock():
        pass


def test_the_lock_can_be_taken_again(directory):
    for _ in range(2):
        with directory.lock():
            pass


# ---- what a start goes on from ------------------------------------------------------------------------------------


def test_without_a_snapshot_a_start_replays_everything(directory, manifest, played):
    write(directory, manifest, played)
    with directory.ledger(manifest) as ledger:
        seen = []
        replica, scale, origin = restore(directory, manifest, ledger, lambda *progress: seen.append(progress))
    assert replica.digest() == played.replay().digest()
    assert scale == played.conductor._scale
    assert "start of the run" in origin
    assert seen == [(done, 10) for done in range(1, 11)]


@pytest.mark.parametrize("round", [0, 3, 7, 10])
def test_a_snapshot_saves_the_rounds_before_it(directory, manifest, played, round):
    write(directory, manifest, played)
    save(directory, replica_at(manifest, played, round), manifest)
    with directory.ledger(manifest) as ledger:
        seen = []
        replica, scale, origin = restore(directory, manifest, ledger, lambda done, _: seen.append(done))
    assert origin == f"snapshot of round {round}"
    assert seen == list(range(round + 1, 11))
    assert replica.digest() == played.replay().digest()
    assert replica.head == played.replay().head
    assert scale == played.conductor._scale


def test_a_scale_without_any_checkpoint_is_replayed(directory, manifest, played):
    write(directory, manifest, played, rounds=3)
    with directory.ledger(manifest) as ledger:
        assert ledger.last_checkpoint() is None
        _, scale, _ = restore(directory, manifest, ledger, lambda *_: None)
    assert scale.exponent == played.commits[2].exponents[0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"hello"),
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_snapshot_is_passed_over(directory, manifest, played, spoil):
    write(directory, manifest, played)
    save(directory, replica_at(manifest, played, 7), manifest)
    (path,) = directory.snapshots().directory.glob("*.zo")
    spoil(path)
    with directory.ledger(manifest) as ledger:
        replica, _, origin = restore(directory, manifest, ledger, lambda *_: None)
    assert origin.startswith("start of the run (")
    assert replica.digest() == played.replay().digest()


def test_a_snapshot_that_the_ledger_does_not_lead_to_is_passed_over(directory, manifest, played):
    write(directory, manifest, played, rounds=6)
    save(directory, replica_at(manifest, played, 8), manifest)
    with directory.ledger(manifest) as ledger:
        replica, origin = directory.newest(manifest, ledger)
        assert (replica.round, origin) == (
            0,
            "start of the run (snapshot of round 8 is not part of the ledger)",
        )
    other = Replica(manifest, zeros(500), round=5, head=bytes(16))
    save(directory, other, manifest)
    with directory.ledger(manifest) as ledger:
        assert directory.newest(manifest, ledger)[0].round == 0


def test_a_damaged_start_is_an_error(directory, manifest):
    directory.initial_path.write_bytes(b"hello")
    with pytest.raises(SnapshotError, match="not a snapshot"):
        directory.initial(manifest)
    directory.initial_path.unlink()
    with pytest.raises(RunDirectoryError, match=r"cannot read .*initial\.zo"):
        directory.initial(manifest)


def test_a_snapshot_that_cannot_be_written_leaves_the_old_one(directory, manifest, played, monkeypatch):
    write(directory, manifest, played)
    save(directory, replica_at(manifest, played, 7), manifest)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"cannot write the snapshot .*\.zo: .*No space left"):
        save(directory, replica_at(manifest, played, 9), manifest)
    monkeypatch.undo()
    with directory.ledger(manifest) as ledger:
        assert directory.newest(manifest, ledger)[0].round == 7


def test_the_newest_snapshot_is_the_very_file_that_can_be_trusted(directory, manifest, played):
    """Two of one round: after a ledger was restored and went on otherwise, only one of them is of this ledger."""
    write(directory, manifest, played)
    other = replica_at(manifest, played, 6)
    other.apply(decode_entry(played.frames[6]))
    other.head = bytes(16)
    right = save(directory, replica_at(manifest, played, 7), manifest)
    wrong = save(directory, other, manifest)
    assert right.round == wrong.round == 7
    with directory.ledger(manifest) as ledger:
        (found, replica), _ = directory.newest_snapshot(manifest, ledger)
        assert found == right
        assert replica.head == ledger.head_after(7)
        assert directory.newest_snapshot(manifest, ledger, before=6)[0] is None


@pytest.mark.parametrize("round", range(11))
def test_the_state_at_any_round(directory, manifest, played, round):
    write(directory, manifest, played)
    for at in (3, 7, 9):
        save(directory, replica_at(manifest, played, at), manifest)
    with directory.ledger(manifest) as ledger:
        found = directory.state_at(round, manifest, ledger)
    assert (found.round, found.digest()) == (round, played.replay(round).digest())
