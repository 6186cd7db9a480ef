"""The keyring on disk, and what another process changes in it."""

import os
import sqlite3
import stat

import pytest

from coordinator.invitations import NOBODY, KeyState, Standing, redemption
from coordinator.keyring import Keyring, KeyringError

ADA, BEN, DOOR = b"a" * 32, b"b" * 32, b"d" * 32


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.sqlite"


@pytest.fixture
def keyring(path):
    with Keyring(path, create=True) as keyring:
        yield keyring


def test_a_new_keyring_lets_nobody_pass_and_is_its_owners_alone(keyring, path):
    assert not keyring.passes(ADA)
    assert keyring.standing(ADA) == NOBODY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert all(stat.S_IMODE(each.stat().st_mode) == 0o600 for each in path.parent.iterdir())


def test_key_and_use_are_one(keyring, path):
    invitation = keyring.invite(DOOR, uses=2)
    assert keyring.passes(DOOR)
    keyring.redeem(invitation, ADA)
    assert keyring.passes(ADA)
    assert keyring.standing(DOOR).invitation.uses_left == 1
    assert not keyring.redeem(invitation, ADA)  # the key is there already: the use must not count either
    assert keyring.standing(DOOR).invitation.uses_left == 1
    with Keyring(path) as again:
        assert again.records() == keyring.records()
        assert again.invitations() == keyring.invitations()
        assert [record.invitation for record in again.records()] == [1]


def test_what_another_process_took_back_meanwhile_lets_nobody_in(keyring, path):
    invitation = keyring.invite(DOOR)
    keyring.allow(ADA)
    with Keyring(path) as other:
        other.withdraw(invitation.number)
        other.revoke(ADA)
    assert keyring.passes(ADA)  # as it knows yet
    assert not keyring.redeem(invitation, BEN)
    assert keyring.standing(DOOR).invitation.uses_left == 0
    assert not keyring.rotate(ADA, BEN)
    assert keyring.is_revoked(ADA)
    assert keyring.standing(BEN) == NOBODY


def test_a_key_that_another_process_let_in_meanwhile_takes_no_use_and_no_other_node(keyring, path):
    invitation = keyring.invite(DOOR, uses=1)
    keyring.allow(ADA)
    with Keyring(path) as other:
        other.allow(BEN)
    assert not keyring.redeem(invitation, BEN)
    assert not keyring.rotate(ADA, BEN)
    assert keyring.passes(ADA)
    assert keyring.standing(BEN)[:2] == (KeyState.ADMITTED, BEN)
    assert keyring.standing(DOOR).invitation.uses_left == 1


def test_an_invitation_that_was_counted_below_nothing_stays_closed(keyring, path):
    keyring.invite(DOOR)
    keyring.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE invitations SET uses_left = -1")
    with Keyring(path) as again:
        invitation = again.standing(DOOR).invitation
        assert not invitation.is_open(0.0)
        assert redemption(Standing(invitation=invitation), b"", b"", NOBODY, 0, 1, 0.0).cause == "invitation"
        assert not again.redeem(invitation, ADA)


def test_an_invitation_without_limits_stays_so(keyring):
    invitation = keyring.invite(DOOR)
    keyring.redeem(invitation, ADA)
    assert keyring.standing(DOOR).invitation == invitation
    assert keyring.withdraw(invitation.number)
    assert not keyring.standing(DOOR).invitation.is_open(0.0)
    assert keyring.passes(DOOR)  # to be told so
    assert not keyring.withdraw(99)


def test_agents_go_with_the_key(keyring):
    keyring.redeem(keyring.invite(DOOR, agents=frozenset({0, 2})), ADA)
    assert keyring.standing(ADA).agents == {0, 2}
    keyring.rotate(ADA, BEN)
    assert keyring.standing(BEN).agents == {0, 2}
    keyring.allow(BEN)
    assert keyring.standing(BEN).agents is None


def test_a_rotated_key_keeps_the_identity(keyring):
    keyring.allow(ADA)
    keyring.rotate(ADA, BEN)
    assert keyring.standing(ADA).state is KeyState.REPLACED
    assert keyring.standing(BEN)[:2] == (KeyState.ADMITTED, ADA)
    assert (keyring.passes(ADA), keyring.passes(BEN)) == (False, True)
    assert keyring.num_admitted() == 1
    keyring.rotate(BEN, DOOR)
    assert keyring.standing(DOOR).identity == ADA
    assert not keyring.is_revoked(ADA)


def test_revoking_a_node_revokes_the_key_that_it_has_now(keyring):
    keyring.allow(ADA)
    keyring.rotate(ADA, BEN)
    keyring.revoke(ADA)
    assert not keyring.passes(BEN)
    assert keyring.is_revoked(ADA)
    assert keyring.standing(BEN).state is KeyState.REVOKED
    assert keyring.standing(ADA).state is KeyState.REPLACED
    keyring.allow(BEN)
    assert keyring.standing(BEN)[:2] == (KeyState.ADMITTED, ADA)


def test_what_another_process_writes_is_seen_at_the_next_look(keyring, path):
    assert not keyring.refresh()
    with Keyring(path) as other:
        other.allow(ADA)
        assert not keyring.passes(ADA)
        assert keyring.refresh()
        assert keyring.passes(ADA)
        other.revoke(ADA)
        assert keyring.refresh()
    assert not keyring.passes(ADA)
    assert not keyring.refresh()
    keyring.allow(BEN)
    assert not keyring.refresh()  # one's own changes are there already


def test_a_change_of_one_key_leaves_the_others_and_what_another_process_wrote_to_the_next_look(keyring, path):
    keyring.allow(ADA)
    with Keyring(path) as other:
        other.allow(BEN)
    keyring.allow(DOOR)
    assert keyring.passes(ADA)
    assert keyring.passes(DOOR)
    assert keyring.num_admitted() == 2
    assert keyring.refresh()
    assert keyring.passes(BEN)
    assert keyring.num_admitted() == 3


def test_the_address_is_remembered(keyring, path):
    assert keyring.address() is None
    keyring.set_address("hub.example", 7411)
    with Keyring(path) as again:
        assert again.address() == ("hub.example", 7411)


def test_what_is_no_keyring_is_said(path, tmp_path):
    with pytest.raises(KeyringError, match="does not exist: restore it"):
        Keyring(path)
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(KeyringError, match="is not a keyring, or is damaged"):
        Keyring(path)
    with pytest.raises(KeyringError, match="exists already"):
        Keyring(path, create=True)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE meta (key TEXT, value TEXT)")
        db.execute("INSERT INTO meta VALUES ('format', 'zo-keyring-9')")
    with pytest.raises(KeyringError, match="has format 'zo-keyring-9'"):
        Keyring(other)


def test_no_token_is_in_the_file(keyring, path):
    from transport.keys import invitation_keys

    token = os.urandom(16)
    keyring.invite(invitation_keys(token).public, uses=1)
    keyring.close()
    for each in path.parent.iterdir():
        content = each.read_bytes()
        assert token not in content
        assert invitation_keys(token).secret not in content
