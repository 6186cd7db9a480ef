"""The seals of a ledger: who shows them, who checks them, and what becomes of a copy that was tampered with."""

import shutil
import sqlite3

import pytest

from coordinator.archive import restore
from coordinator.audit import AuditError, audit
from coordinator.config import ServiceConfig
from coordinator.history import back_up, export_state, take_back
from coordinator.ledger import LedgerError
from coordinator.rundir import RunDirectory
from transport.keys import KeyFileError
from transport.messages import PROTOCOL_VERSION, Commit, Finished, Hello, History, Report, Sealed, Welcome
from transport.seals import Signer, is_sealed
from zo.commit import decode_entry
from zo.replica import Replica
from zo.weights import zeros

SECRET = bytes(range(32))
SIGNER = Signer(SECRET)
KEY = bytes(32)
EVERY = 4
ROUNDS = 10


@pytest.fixture
def manifest(make_manifest):
    return make_manifest(signer=SIGNER.public, digest_every=EVERY, rounds=ROUNDS)


def hello(coordinator, session=b"a", round=0):
    manifest = coordinator.manifest
    base, tokenizer = bytes.fromhex(manifest.base.digest), bytes.fromhex(manifest.base.tokenizer_digest)
    head = coordinator.replay(round).head
    return coordinator.message(
        session, KEY, Hello(PROTOCOL_VERSION, manifest.run_id, base, tokenizer, round, head, "n")
    )


@pytest.fixture
def played(manifest, virtual_coordinator):
    coordinator = virtual_coordinator(manifest)
    hello(coordinator)
    for number in range(ROUNDS):
        coordinator.message(b"a", KEY, Report(number, bytes([number + 1, 200 + number])))
    return coordinator


def kinds(messages):
    return [type(message) for message in messages]


def test_every_entry_has_a_seal_and_nodes_see_those_of_digest_rounds_and_of_the_end(manifest, played):
    origin = manifest.run_id
    for number, seal in enumerate(played.seals, 1):
        assert is_sealed(SIGNER.public, origin, number, played.replay(number).head, seal)
    shown = [message for _, message in played.outbox if isinstance(message, Sealed)]
    assert [each.round for each in shown] == [4, 8, 10]
    assert [each.signature for each in shown] == [played.seals[each.round - 1] for each in shown]


def test_a_seal_follows_its_commit_and_comes_before_the_end(played):
    assert kinds(message for _, message in played.outbox)[-3:] == [Commit, Sealed, Finished]


def test_a_node_is_shown_the_seal_of_what_it_has_then_of_what_it_lacks(played):
    assert kinds(hello(played, b"b", 3)) == [Welcome, Sealed, History, Sealed, Finished]
    seals = [message.round for to, message in played.outbox if to == b"b" and isinstance(message, Sealed)]
    assert seals == [3, 10]
    assert kinds(hello(played, b"c")) == [Welcome, History, Sealed, Finished]


def test_a_run_without_a_signer_shows_none(make_manifest, virtual_coordinator):
    coordinator = virtual_coordinator(make_manifest(digest_every=1))
    assert kinds(hello(coordinator)) == [Welcome]
    assert kinds(coordinator.message(b"a", KEY, Report(0, b"\x01\x02"))) == [Commit]
    assert coordinator.seals == [b""]


@pytest.fixture
def directory(tmp_path, manifest, played):
    directory = RunDirectory(tmp_path / "run")
    directory.create(manifest, ServiceConfig(), Replica(manifest, zeros(500)), signing_key=SECRET)
    with directory.ledger(manifest) as ledger:
        for frame, seal in zip(played.frames, played.seals, strict=True):
            ledger.append(decode_entry(frame), frame, seal)
    return directory


def verify(directory, manifest):
    with directory.ledger(manifest, read_only=True) as ledger:
        return audit(manifest, directory.initial(manifest), ledger, lambda done, total: None)


def resume(directory, manifest):
    with directory.ledger(manifest) as ledger:
        return restore(directory, manifest, ledger, lambda done, total: None)


def tamper(directory, statement, *values):
    with sqlite3.connect(directory.ledger_path) as database:
        assert database.execute(statement, values).rowcount == 1


def test_a_ledger_that_was_not_touched_is_proved(directory, manifest):
    assert verify(directory, manifest).rounds == ROUNDS
    assert resume(directory, manifest).replica.round == ROUNDS


@pytest.mark.attack
@pytest.mark.parametrize("round", [0, 5, ROUNDS - 1])
def test_a_flipped_byte_of_a_mirror_is_found_by_whoever_reads_it(
    directory, manifest, played, round, tmp_path
):
    entry = decode_entry(played.frames[round])
    flipped = bytes([entry.codes[0] ^ 1]) + entry.codes[1:]
    changed = Commit(
        entry.round, entry.steps, entry.exponents, entry.participants, flipped, entry.previous
    ).encode()
    tamper(directory, "UPDATE commits SET frame = ? WHERE round = ?", changed, round)
    with pytest.raises(AuditError, match=f"round {round}: .* is not signed by the run's coordinator"):
        verify(directory, manifest)
    with pytest.raises(LedgerError, match=f"round {round + (round < ROUNDS - 1)}"):
        resume(directory, manifest)
    with directory.ledger(manifest, read_only=True) as ledger, pytest.raises(LedgerError, match="not signed"):
        export_state(directory, manifest, [ledger], round + 1, tmp_path / "out")


@pytest.mark.attack
def test_a_whole_chain_that_somebody_else_made_is_refused(directory, manifest, played):
    """Its rounds follow each other, its steps are the rule's, and its seals are another's."""
    forger = Signer(bytes(32))
    with sqlite3.connect(directory.ledger_path) as database:
        for number in range(ROUNDS):
            seal = forger.seal(manifest.run_id, number + 1, played.replay(number + 1).head)
            database.execute("UPDATE commits SET seal = ? WHERE round = ?", (seal, number))
    with pytest.raises(AuditError, match=r"round 0: .* is not signed"):
        verify(directory, manifest)
    with pytest.raises(LedgerError, match=f"the entry of round {ROUNDS - 1} is not signed"):
        resume(directory, manifest)


@pytest.mark.attack
def test_a_seal_of_another_round_is_none(directory, manifest, played):
    tamper(directory, "UPDATE commits SET seal = ? WHERE round = 6", played.seals[5])
    with pytest.raises(AuditError, match="round 6: "):
        verify(directory, manifest)


def test_taking_back_is_signed_as_every_other_entry(directory, manifest):
    with directory.ledger(manifest) as ledger:
        take_back(directory, manifest, ledger, 7, [])
    assert verify(directory, manifest).rounds == ROUNDS + 1


def test_the_signing_key_is_its_owners_alone_and_goes_with_a_backup(directory, manifest, tmp_path):
    copy = tmp_path / "copy"
    back_up(directory, copy)
    for each in (directory, RunDirectory(copy)):
        assert each.signing_key_path.stat().st_mode & 0o777 == 0o600
        assert each.signer(manifest).public == SIGNER.public


@pytest.mark.attack
def test_who_has_a_mirror_without_the_key_can_prove_it_and_not_go_on(directory, manifest):
    directory.signing_key_path.unlink()
    assert verify(directory, manifest).rounds == ROUNDS
    with pytest.raises(KeyFileError, match=r"cannot read the key file .*signing\.key"):
        directory.signer(manifest)
    with directory.ledger(manifest) as ledger, pytest.raises(KeyFileError):
        take_back(directory, manifest, ledger, 7, [])
    with directory.ledger(manifest) as ledger:
        assert ledger.num_commits() == ROUNDS


def test_a_key_of_another_run_signs_nothing(directory, manifest, tmp_path):
    other = tmp_path / "other.key"
    other.write_text(bytes(32).hex() + "\n")
    other.chmod(0o600)
    shutil.copy2(other, directory.signing_key_path)
    with pytest.raises(KeyFileError, match="is not the key that this run is signed with"):
        directory.signer(manifest)
