"""The commands that look back: what they print for people and for programs, and with which exit code they end."""

import json
import os
import shutil
import sqlite3
import struct

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from coordinator.cli import app
from coordinator.ledger import Checkpoint, Enrolment, StorageError
from coordinator.rundir import RunDirectory
from coordinator.status import MemberStatus, read_status
from node.state import load_result
from transport.exits import Exit
from zo.combine import combined
from zo.commit import Commit, decode_entry, genesis
from zo.steps import step_rule

ROUNDS = 12


def run(*arguments, width=80):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=width)


def succeeds(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(result, code, *words):
    assert result.exit_code == code, (result.output, result.exception)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("zo-coordinator: error: ")
    for word in words:
        assert word in line


@pytest.fixture
def base(tmp_path):
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    header = {"layers.0.q_proj.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}}
    encoded = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(256))
    return directory


def make(path, base, rounds=ROUNDS, seed=1):
    """A run of three nodes, by the rule, with a digest every four rounds."""
    options = ("--host", "127.0.0.1", "--port", 0, "--digest-every", 4, "--directions", 1)
    succeeds("init", path, "--model", base, *options)
    directory = RunDirectory(path)
    extend(directory, rounds, seed)
    return directory


def sealing(directory):
    """Signs what a replica holds, as the run's coordinator does."""
    manifest = directory.manifest()
    signer = directory.signer(manifest)
    return lambda replica: signer.seal(genesis(manifest.run_id, 0), replica.round, replica.head)


def extend(directory, rounds, seed=1):
    manifest = directory.manifest()
    rule, rng = step_rule(manifest), np.random.default_rng(seed)
    sealed = sealing(directory)
    with directory.ledger(manifest) as ledger:
        for node in range(3):
            ledger.enrol(Enrolment(node, bytes([node] * 32), f"n{node}"))
        replica, scale = directory.initial(manifest), rule.start()
        for number in range(rounds):
            codes = rng.integers(-60, 60, 3).astype(np.int8)
            step, scale = rule.advance(scale, number, codes)
            commit = Commit(number, (step,), (scale.exponent,), (0, 1, 2), codes.tobytes(), replica.head)
            replica.apply(commit)
            ledger.append(commit, seal=sealed(replica))
            if replica.round % 4 == 0:
                ledger.checkpoint(Checkpoint(replica.round, replica.digest(), scale))


@pytest.fixture
def made(base, tmp_path):
    return make(tmp_path / "run", base)


@pytest.fixture
def path(made):
    return made.path


# ---- log ----------------------------------------------------------------------------------------------------------


def test_log_shows_rounds_and_events(made, path):
    manifest = made.manifest()
    with made.ledger(manifest) as ledger:
        ledger.note(10, "missed", 2, "round 10: closed without [2]")
    lines = succeeds("log", path, "--last", 3).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("       9  nodes 0 1 2: 3 codes, RMS ")
    assert lines[1] == "      10  missed: round 10: closed without [2]"
    assert lines[3].startswith("      11  nodes 0 1 2")
    assert lines[3].endswith("…")  # its digest is recorded
    assert len(succeeds("log", path).splitlines()) == 13
    assert len(succeeds("log", path, "--from", 11).splitlines()) == 1
    assert succeeds("log", path, "--last", 0) == ""


def test_log_in_json_is_one_object_a_line(path):
    found = [json.loads(line) for line in succeeds("log", path, "--from", 7, "--json").splitlines()]
    assert [each["round"] for each in found] == [7, 8, 9, 10, 11]
    assert found[0]["kind"] == "commit"
    assert found[0]["participants"] == [0, 1, 2]
    assert isinstance(found[0]["rms"], float)
    assert len(found[0]["digest"]) == 32
    assert "digest" not in found[1]


def test_a_round_of_many_nodes_is_one_line(made, path):
    manifest = made.manifest()
    with made.ledger(manifest) as ledger:
        many = tuple(range(200))
        ledger.append(Commit(12, (1,), (-4,), many, bytes(200), ledger.head_after(12)))
    (line,) = succeeds("log", path, "--last", 1).splitlines()
    assert " 198 199: 200 codes" in line


def test_what_peers_wrote_is_shown_and_never_obeyed(made, path):
    with made.ledger(made.manifest()) as ledger:
        ledger.note(12, "joined", 0, "node 0 (\x1b[2J[red]evil) joined\nround 99")
    output = succeeds("log", path, "--last", 1)
    assert "\x1b" not in output
    assert "[red]evil" in output
    assert len(output.splitlines()) == 2


@pytest.mark.parametrize("option", [("--from", 13), ("--from", -1)])
def test_log_of_rounds_that_are_not_there(path, option):
    fails(run("log", path, *option), Exit.INPUT, "the ledger has 12 rounds")


@pytest.mark.parametrize("command", [("log", "--last", -1), ("retract", 0, "--from", -3)])
def test_no_round_is_below_0(path, command):
    name, *rest = command
    result = run(name, path, *rest)
    assert result.exit_code == 2
    assert f"Invalid value for '{rest[-2]}'" in result.stderr


@pytest.mark.parametrize("spoilt", ["bit", "length"])
def test_what_is_damaged_in_the_ledger_is_said_and_no_bug(path, tmp_path, spoilt):
    with sqlite3.connect(path / "ledger.sqlite") as db:
        (frame,) = db.execute("SELECT frame FROM commits WHERE round = 7").fetchone()
        entry = decode_entry(frame)
        codes = bytes([entry.codes[0] ^ 1, *entry.codes[1:]]) if spoilt == "bit" else entry.codes[:-1]
        spoilt_frame = msgspec.structs.replace(entry, codes=codes).encode()
        db.execute("UPDATE commits SET frame = ? WHERE round = 7", (spoilt_frame,))
    for command in (("export", "-o", tmp_path / "out"), ("rollback", "--to", 3), ("retract", 0)):
        name, *rest = command
        fails(run(name, path, *rest), Exit.DAMAGED, "is damaged")
    if spoilt == "length":
        fails(run("log", path), Exit.DAMAGED, "is damaged at round 7")


# ---- diff ---------------------------------------------------------------------------------------------------------


def test_diff_of_equal_runs(path, tmp_path):
    succeeds("backup", path, tmp_path / "copy")
    assert succeeds("diff", path, tmp_path / "copy") == "equal: 12 rounds\n"
    assert json.loads(succeeds("diff", path, tmp_path / "copy", "--json")) == {
        "same_run": True,
        "agent": 0,
        "fields": {},
        "rounds": [12, 12],
        "common_rounds": 12,
    }


def test_diff_of_a_run_and_its_beginning(path, tmp_path):
    succeeds("backup", path, tmp_path / "copy")
    succeeds("rollback", path, "--to", 5)
    result = run("diff", path, tmp_path / "copy")
    assert result.exit_code == Exit.MISMATCH
    assert result.stdout == "equal up to round 12; A has 1 more\n"
    assert "B has 1 more" in run("diff", tmp_path / "copy", path).stdout


def test_diff_of_a_fork(path, tmp_path):
    succeeds("backup", path, tmp_path / "copy")
    succeeds("rollback", path, "--to", 5)
    succeeds("rollback", tmp_path / "copy", "--to", 6)
    succeeds("rollback", tmp_path / "copy", "--to", 6)
    result = run("diff", path, tmp_path / "copy")
    assert result.exit_code == Exit.MISMATCH
    assert result.stdout == "a fork: equal up to round 12, then 1 in A alone and 2 in B\n"


def test_diff_of_runs_of_their_own(path, base, tmp_path):
    succeeds("init", tmp_path / "other", "--model", base, "--step", 0.5)
    result = run("diff", path, tmp_path / "other")
    assert result.exit_code == Exit.MISMATCH
    assert "schedule.step" in result.stdout
    assert result.stdout.endswith("two runs of their own: no round in common\n")
    found = json.loads(run("diff", path, tmp_path / "other", "--json").stdout)
    assert found["fields"]["schedule.step"] == [0.001, 0.5]


# ---- export -------------------------------------------------------------------------------------------------------


def test_an_exported_round_can_be_loaded(made, path, tmp_path):
    output = succeeds("export", path, "--round", 7, "-o", tmp_path / "state")
    manifest, replica = load_result(tmp_path / "state")
    assert manifest == made.manifest()
    assert replica.round == 7
    assert output.splitlines()[0] == f"round 7, digest {replica.digest().hex()}"
    assert "zo-node export" in output.splitlines()[1]
    succeeds("export", path, "-o", tmp_path / "newest")
    assert load_result(tmp_path / "newest")[1].round == 12
    fails(run("export", path, "--round", 13, "-o", tmp_path / "no"), Exit.INPUT, "got --round 13")
    fails(run("export", path, "-o", tmp_path / "state"), Exit.INPUT, "exists already")


def test_what_manifests_say_is_not_read_as_markup(base, tmp_path):
    for number in (1, 2):
        template = f"{{text}} [/INST] Answer{number}:"
        labels = ("--task", "verbalizer", "--label", "x=yes", "--label", "y=no", "--template", template)
        succeeds("init", tmp_path / f"r{number}", "--model", base, *labels)
    result = run("diff", tmp_path / "r1", tmp_path / "r2", width=200)
    assert result.exit_code == Exit.MISMATCH, result.exception
    assert "[/INST] Answer1:" in result.output.replace("\n", "")


# ---- rollback, retract, release -----------------------------------------------------------------------------------


def test_rollback_says_what_it_did_and_verify_agrees(made, path, tmp_path):
    succeeds("export", path, "--round", 5, "-o", tmp_path / "before")
    output = succeeds("rollback", path, "--to", 5)
    assert output.splitlines()[0] == "round 12: took back rounds 5 to 11"
    succeeds("export", path, "-o", tmp_path / "after")
    (_, before), (_, after) = load_result(tmp_path / "before"), load_result(tmp_path / "after")
    assert np.array_equal(before.weights, after.weights)
    assert after.digest().hex() in output
    assert "13 commits in one chain" in succeeds("verify", path)
    assert json.loads(succeeds("log", path, "--last", 1, "--json").splitlines()[-1])["kind"] == "revert"
    assert "revert: takes back rounds 5 to 11 of everyone" in succeeds("log", path)
    assert json.loads(succeeds("status", path, "--json"))["round"] == 13


def test_retract_says_what_it_did_and_verify_agrees(path):
    output = succeeds("retract", path, 2, 0, "--from", 3)
    assert output.splitlines()[0] == "round 12: took back rounds 3 to 11 of node 0, 2"
    assert "13 commits in one chain" in succeeds("verify", path)
    assert "retracted: took back rounds 3 to 11 of node 0, 2" in succeeds("log", path)


def test_a_group_is_taken_back_as_a_whole(tmp_path, base):
    path = tmp_path / "grouped"
    options = ("--policy", "groups", "--groups", 2, "--combine", "median", "--directions", 1, "--sides", 2)
    succeeds("init", path, "--model", base, "--digest-every", 4, *options)
    directory = RunDirectory(path)
    manifest = directory.manifest()
    assert (manifest.directions.policy, manifest.directions.groups) == ("groups", 2)
    rule, sealed = step_rule(manifest), sealing(directory)
    with directory.ledger(manifest) as ledger:
        for node in range(3):
            ledger.enrol(Enrolment(node, bytes([node] * 32), f"n{node}"))
        replica, scale = directory.initial(manifest), rule.start()
        alone = directory.initial(manifest)
        for number in range(5):
            codes = np.array([10 * node + number + 1 for node in range(3)], np.int8)
            voices, row = combined(range(3), codes, manifest)
            step, scale = rule.advance(scale, number, row)
            commit = Commit(number, (step,), (scale.exponent,), voices, row.tobytes(), replica.head)
            replica.apply(commit)
            ledger.append(commit, seal=sealed(replica))
            kept = Commit(number, (step,), (scale.exponent,), voices[:1], row.tobytes()[:1], alone.head)
            alone.apply(kept)
    assert "group 0, group 1: 2 codes, RMS" in succeeds("log", path)
    fails(run("retract", path, 1), Exit.INPUT, "the codes of node 1 are combined", "--group 1")
    fails(run("retract", path, "--group", 2), Exit.INPUT, "group 2 is no participant")
    output = succeeds("retract", path, "--group", 1)
    assert output.splitlines()[0] == "round 5: took back rounds 0 to 4 of group 1"
    assert "6 commits in one chain" in succeeds("verify", path)
    succeeds("export", path, "-o", tmp_path / "after")
    assert np.array_equal(load_result(tmp_path / "after")[1].weights, alone.weights)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("retract",), "name at least one node, or --group"),
        (("retract", "--group", 1), "this run has no groups: name nodes"),
        (("rollback", "--to", 12), "from round 12 on there is nothing to take back"),
        (("rollback", "--to", -1), "nothing to take back"),
        (("retract", 5), "no node 5 has ever joined"),
        (("retract", 1, "--from", 12), "nothing to take back"),
        (("release", 1), "node 1 is not in quarantine"),
        (("release", 9), "node 9 is not in quarantine"),
    ],
)
def test_what_cannot_be_done_changes_nothing(path, arguments, words):
    command, *rest = arguments
    fails(run(command, path, *rest), Exit.INPUT, words)
    assert json.loads(succeeds("status", path, "--json"))["round"] == 12


@pytest.mark.parametrize("command", [("rollback", "--to", 3), ("retract", 1), ("release", 1)])
def test_not_while_the_run_is_served(made, path, command):
    name, *rest = command
    with made.lock():
        fails(run(name, path, *rest), Exit.BUSY, "served by another process")


def test_a_quarantined_node_is_released_with_a_clean_slate(made, path):
    manifest = made.manifest()
    with made.ledger(manifest) as ledger:
        for _ in range(2):
            ledger.note(8, "diverged", 1, "node 1 differs")
            ledger.note(8, "started-over", 1, "node 1 starts over")
        ledger.set_quarantined(1, True)
    assert succeeds("release", path, 1) == "node 1 may join again\n"
    with made.ledger(manifest) as ledger:
        assert not any(each.is_quarantined for each in ledger.members())
        assert ledger.divergences()[1].number == 0
        assert ledger.events()[-1].kind == "released"
    fails(run("release", path, 1), Exit.INPUT, "not in quarantine")


def test_a_release_is_seen_in_the_status_before_the_run_is_served_again(made, path):
    manifest = made.manifest()
    with made.ledger(manifest) as ledger:
        status = read_status(manifest, ledger)
        names = MemberStatus.__struct_fields__
        shut_out = dict.fromkeys(names, 0) | {"node": 1, "name": "n1", "key": "", "quarantined": True}
        shut_out |= {"estimator": "two-sided", "presence": "gone", "digest": None}
        member = msgspec.convert(shut_out, MemberStatus, strict=False)
        ledger.set_status(msgspec.json.encode(msgspec.structs.replace(status, members=[member])))
        ledger.set_quarantined(1, True)
    assert json.loads(succeeds("status", path, "--json"))["members"][0]["quarantined"]
    succeeds("release", path, 1)
    assert not json.loads(succeeds("status", path, "--json"))["members"][0]["quarantined"]


def test_a_release_that_cannot_be_noted_lets_nobody_in(made):
    with made.ledger(made.manifest()) as ledger:
        ledger.set_quarantined(1, True)
        ledger._db.execute("DROP TABLE events")
        with pytest.raises(StorageError):
            ledger.release(1)
        assert next(each for each in ledger.nodes() if each.node == 1).is_quarantined


def test_a_rollback_whose_snapshot_cannot_be_kept_has_happened_all_the_same(path):
    shutil.rmtree(path / "snapshots", ignore_errors=True)
    (path / "snapshots").write_text("")
    result = run("rollback", path, "--to", 5)
    assert result.exit_code == 0, result.output
    assert "it is taken back, but" in result.stderr
    assert "rolled-back: took back rounds 5 to 11" in succeeds("log", path)
    (path / "snapshots").unlink()
    assert "13 commits in one chain" in succeeds("verify", path)


# ---- backup -------------------------------------------------------------------------------------------------------


def test_backup_while_the_run_is_served(made, path, tmp_path):
    with made.lock():
        result = run("backup", path, tmp_path / "copy")
    assert result.exit_code == 0
    assert result.stderr == f"copied 12 rounds to {tmp_path / 'copy'}\n"
    assert "12 commits in one chain" in succeeds("verify", tmp_path / "copy")
    fails(run("backup", path, tmp_path / "copy"), Exit.INPUT, "exists already")
    (tmp_path / "copy[").mkdir()
    assert "copy[/x]" in run("backup", path, tmp_path / "copy[/x]").stderr


def test_a_run_that_can_only_be_read_is_read(path, monkeypatch):
    """As on a read-only medium, where SQLite cannot note beside the file who reads it."""
    connect = sqlite3.connect

    class ReadOnlyMedium(sqlite3.Connection):
        def execute(self, *arguments):
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise error

    def connected(address, **options):
        is_immutable = "immutable=1" in str(address)
        return connect(address, **options, **({} if is_immutable else {"factory": ReadOnlyMedium}))

    monkeypatch.setattr(sqlite3, "connect", connected)
    assert "12 commits in one chain" in succeeds("verify", path)
    succeeds("members", path)
    (path / "ledger.sqlite-wal").write_bytes(b"")  # as a reader leaves it
    succeeds("verify", path)
    (path / "ledger.sqlite-wal").write_bytes(b"log")
    fails(run("verify", path), Exit.STORAGE, "a log lies beside it")


def test_a_backup_is_on_disk_when_it_is_done(path, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def noted(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    copy = tmp_path / "copy"
    succeeds("backup", path, copy)
    names = ("coordinator.key", "signing.key", "coordinator.toml", "initial.zo", "manifest.toml", ".")
    assert {(copy / name).stat().st_ino for name in names} <= synced


# ---- too large ----------------------------------------------------------------------------------------------------


def test_commits_that_nodes_would_not_accept_are_refused_before_the_run_begins(base, tmp_path):
    big = tmp_path / "big"
    succeeds("init", big, "--model", base, "--directions", 4096, "--rounds", 10)
    text = (big / "coordinator.toml").read_text()
    (big / "coordinator.toml").write_text(text.replace("capacity = 1024", "capacity = 4096"))
    fails(run("serve", big, "--port", 0), Exit.INPUT, "capacity = 4096", "choose at most 4085")
