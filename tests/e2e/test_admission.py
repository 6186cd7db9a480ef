"""Who gets in, who is shut out, and what is kept secret: real processes, real sockets."""

import json
import sqlite3
import stat

import pytest

from coordinator.keyring import Keyring
from coordinator.rundir import RunDirectory
from node.state import StateDirectory
from transport.exits import Exit
from transport.keys import invitation_keys, load_key, load_secret
from transport.ticket import parse_ticket

pytestmark = [pytest.mark.e2e, pytest.mark.attack]


def invite(swarm, *options):
    """A ticket that lets one node in."""
    made = swarm.command("coordinator.cli", "invite", swarm.run, *options)
    assert made.wait() == 0, made
    return made.out.strip()


def assert_refused(process, reason):
    """It ended by itself, and said why in one line."""
    assert process.wait() == Exit.REFUSED, process
    assert len(process.err.splitlines()) == 1, process
    assert reason in process.err


def test_without_an_invitation_nobody_gets_in(swarm):
    swarm.init("--invite-only", rounds=6).serve()
    assert parse_ticket(swarm.ticket).token == b""
    assert "by invitation only" in swarm.coordinator.err
    assert_refused(swarm.join("stranger"), "does not admit this node's key")
    plain, good = swarm.ticket, invite(swarm)
    forged = str(parse_ticket(good)).rpartition(".")[0] + ".AAAAAAAAAAAAAAAAAAAAAA"
    expired = invite(swarm, "--uses", "3", "--expires", "1h")
    with sqlite3.connect(RunDirectory(swarm.run).keyring_path) as keyring:
        public = invitation_keys(parse_ticket(expired).token).public
        keyring.execute("UPDATE invitations SET expires_at = 1 WHERE key = ?", (public,))
    for name, ticket, reason in (
        ("forger", forged, "does not know the ticket's token"),
        ("late", expired, "invitation has expired"),
    ):
        swarm.ticket = ticket
        assert_refused(swarm.join(name), reason)
    swarm.ticket = good
    swarm.join("ada")
    swarm.poll_members("ada")
    assert_refused(swarm.join("second"), "used up or was withdrawn")
    swarm.ticket = plain  # whose key is known needs no token
    swarm.nodes["ada"].kill()
    swarm.join("ada")
    key = StateDirectory(swarm.state("ben"))
    key.path.mkdir(parents=True)
    allowed = swarm.command("coordinator.cli", "allow", swarm.run, key.keys().public.hex())
    assert allowed.wait() == 0, allowed
    swarm.join("ben")
    swarm.poll_members("ada", "ben")
    swarm.open_until(99)
    swarm.assert_finished("ada", "ben")
    listed = swarm.command("coordinator.cli", "members", swarm.run, "--json")
    members = json.loads(listed.out)
    assert [(each["node"], each["name"], each["state"]) for each in members["keys"]] == [
        (0, "ada", "admitted"),
        (1, "ben", "admitted"),
    ]
    assert members["invitations"] == []


def test_a_node_that_is_revoked_while_it_trains_is_out_within_a_round(swarm):
    swarm.init("--quorum", "2", rounds=12).serve()
    for name in ("ada", "ben", "mallory"):
        swarm.join(name)
    swarm.poll_members("ada", "ben", "mallory")
    swarm.run_until(4)
    number = swarm.member("mallory").node
    revoked = swarm.command("coordinator.cli", "revoke", swarm.run, str(number))
    assert revoked.wait() == 0, revoked
    assert "may come with a new key" in revoked.err
    swarm.run_until(6)
    assert_refused(swarm.nodes["mallory"], "this node's key was revoked")
    assert_refused(swarm.join("mallory"), "this node's key was revoked")
    closed = swarm.command("coordinator.cli", "revoke", swarm.run, "--invitation", "1")
    assert closed.wait() == 0, closed
    assert_refused(swarm.join("mallory-again"), "used up or was withdrawn")
    swarm.open_until(99)
    swarm.assert_finished("ada", "ben")
    directory = RunDirectory(swarm.run)
    with directory.ledger(directory.manifest(), read_only=True) as ledger:
        assert all(number not in entry.participants for entry in ledger.entries(4))


def test_a_node_with_a_new_key_is_the_same_node(swarm):
    swarm.init(rounds=8).serve()
    swarm.join("ada")
    swarm.poll_members("ada")
    swarm.run_until(3)
    swarm.nodes["ada"].kill()
    old = load_key(swarm.state("ada") / "node.key")
    rotated = swarm.command("node.cli", "rotate-key", swarm.ticket, "--state", swarm.state("ada"))
    assert rotated.wait() == 0, rotated
    new = load_key(swarm.state("ada") / "node.key")
    assert new != old
    assert rotated.out == f"new key {new.public.hex()}\n"
    # As if the answer had been lost: which key is admitted, the node finds out.
    (swarm.state("ada") / "node.key").rename(swarm.state("ada") / "node.key.new")
    (swarm.state("ada") / "node.key").write_text(old.secret.hex() + "\n")
    (swarm.state("ada") / "node.key").chmod(0o600)
    swarm.join("ada")
    swarm.open_until(99)
    swarm.assert_finished("ada")
    assert load_key(swarm.state("ada") / "node.key") == new
    assert not (swarm.state("ada") / "node.key.new").exists()
    assert [member.node for member in swarm.status().members] == [0]
    with Keyring(RunDirectory(swarm.run).keyring_path) as keyring:
        assert sorted(record.state.value for record in keyring.records()) == ["admitted", "replaced"]


def test_no_secret_is_in_any_file_but_the_key_files(swarm):
    swarm.init(rounds=4).serve()
    ticket = invite(swarm, "--expires", "2d")
    standing, swarm.ticket = swarm.ticket, ticket
    swarm.join("ada")
    swarm.poll_members("ada")
    assert_refused(swarm.join("second"), "used up or was withdrawn")
    swarm.open_until(99)
    swarm.assert_finished("ada")
    status = swarm.command("coordinator.cli", "status", swarm.run, "--json")
    assert status.wait() == 0
    tokens = [parse_ticket(each).token for each in (standing, ticket)]
    key_files = [swarm.run / "coordinator.key", swarm.run / "signing.key"]
    key_files += [swarm.state(name) / "node.key" for name in ("ada", "second")]
    secrets = [load_secret(path) for path in key_files]
    secrets += [*tokens, *(invitation_keys(token).secret for token in tokens)]
    printed = {swarm.coordinator.stdout_path: standing, swarm.processes[1].stdout_path: ticket}
    looked_at = 0
    for path in swarm.directory.rglob("*"):
        if not path.is_file() or path in key_files:
            continue
        content = path.read_bytes()
        for secret in secrets:
            assert secret not in content, path
            assert secret.hex().encode() not in content, path
        for each in (standing, ticket):
            word = each.rpartition(".")[2].encode()
            assert content.count(word) == (printed.get(path) == each), path
        looked_at += 1
    assert looked_at > 8
    for path in (*key_files, swarm.run / "keys.sqlite"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
