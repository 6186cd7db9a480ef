"""The commands about who may join: what they print, and what they say to bad input."""

import json
import sqlite3
import struct

import pytest
from typer.testing import CliRunner

from coordinator.cli import app
from coordinator.rundir import RunDirectory
from transport.keys import invitation_keys, standing_token
from transport.ticket import parse_ticket

KEY = "0f" * 32


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fails(*arguments, reason):
    result = run(*arguments)
    assert result.exit_code == 3, (result.output, result.exception)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("zo-coordinator: error: ")
    assert reason in line


@pytest.fixture
def new_run(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "tokenizer.json").write_text("{}")
    header = {"layers.0.q_proj.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}}
    encoded = json.dumps(header).encode()
    (base / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(256))

    def make(*options, name="run"):
        path = tmp_path / name
        succeeds("init", path, "--model", base, "--host", "127.0.0.1", *options)
        return path

    return make


def listed(path):
    return json.loads(succeeds("members", path, "--json").stdout)


def test_an_invitation_is_a_ticket_with_a_token_of_its_own(new_run):
    path = new_run()
    made = succeeds("invite", path, "--uses", 3, "--expires", "2d")
    ticket = parse_ticket(made.stdout)
    keys = RunDirectory(path).keys()
    assert (ticket.host, ticket.port, ticket.key) == ("127.0.0.1", 7411, keys.public)
    assert ticket.token != standing_token(keys.secret)
    assert made.stderr == "invitation 2: lets 3 nodes in, for 48 h 0 min\n"
    assert parse_ticket(succeeds("invite", path).stdout).token != ticket.token
    with RunDirectory(path).keyring() as keyring:
        assert keyring.passes(invitation_keys(ticket.token).public)
    one, three, single = listed(path)["invitations"]
    assert (one["uses_left"], one["expires_at"]) == (None, None)
    assert (three["uses_left"], single["uses_left"]) == (3, 1)
    shown = succeeds("members", path).stdout
    assert "nobody may join yet" in shown
    assert "invitation 1: lets any number of nodes in" in shown


def test_a_closed_run_has_no_invitation(new_run):
    assert listed(new_run("--invite-only"))["invitations"] == []


def test_an_invitation_goes_where_the_run_was_served(new_run):
    path = new_run("--port", 0)
    fails("invite", path, reason="serve the run once")
    with RunDirectory(path).keyring() as keyring:
        keyring.set_address("hub.example", 1234)
    ticket = parse_ticket(succeeds("invite", path).stdout)
    assert (ticket.host, ticket.port) == ("hub.example", 1234)


def test_a_key_is_allowed_revoked_and_allowed_again(new_run):
    path = new_run("--invite-only")
    succeeds("allow", path, KEY)
    succeeds("revoke", path, KEY)
    assert [each["state"] for each in listed(path)["keys"]] == ["revoked"]
    fails("revoke", path, KEY, reason="may not join as it is")
    succeeds("allow", path, KEY)
    (record,) = listed(path)["keys"]
    assert (record["state"], record["key"], record["node"], record["invitation"]) == (
        "admitted",
        KEY,
        None,
        None,
    )
    assert "a person" in succeeds("members", path).stdout


def test_agents_are_named_only_where_nodes_name_theirs(new_run):
    fails("invite", new_run(), "--agents", "0", reason="every node trains every agent")
    path = new_run("--agents", 3, "--assignment", "by-node", name="several")
    fails("allow", path, KEY, "--agents", "3", reason="numbers from 0 to 2 with commas between, got '3'")
    succeeds("allow", path, KEY, "--agents", "2, 0")
    assert listed(path)["keys"][0]["agents"] == [0, 2]
    succeeds("invite", path, "--agents", "1")
    assert "for the agents 1" in succeeds("members", path).stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("invite", "RUN", "--expires", "soon"), "a duration looks like 90s"),
        (("allow", "RUN", "0f"), "64 hexadecimal digits, got 2 characters"),
        (("allow", "RUN", "xy" * 32), "64 hexadecimal digits"),
        (("revoke", "RUN"), "name a NODE, or an invitation"),
        (("revoke", "RUN", "1", "--invitation", 1), "name a NODE, or an invitation"),
        (("revoke", "RUN", "7"), "there is no node 7"),
        (("revoke", "RUN", KEY), "was never let in"),
        (("revoke", "RUN", "--invitation", 9), "there is no invitation 9"),
    ],
)
def test_what_is_wrong_is_said(new_run, arguments, reason):
    path = new_run()
    fails(*(path if each == "RUN" else each for each in arguments), reason=reason)


@pytest.mark.parametrize("command", [("invite", "--uses"), ("revoke", "--invitation")])
def test_a_number_that_sqlite_cannot_count_is_a_usage_error(new_run, command):
    name, option = command
    assert run(name, new_run(), option, 10**20).exit_code == 2


def test_a_keyring_that_cannot_be_written_is_the_disks_fault(new_run, monkeypatch):
    class ReadOnlyMedium(sqlite3.Connection):
        def execute(self, *arguments):
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise error

    path, connect = new_run(), sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *given, **named: connect(*given, **named, factory=ReadOnlyMedium)
    )
    result = run("allow", path, KEY)
    assert result.exit_code == 7, (result.output, result.exception)
    assert "for writing: unable to open database file" in result.stderr


def test_the_key_of_an_invitation_is_nobodys(new_run):
    path = new_run()
    public = invitation_keys(standing_token(RunDirectory(path).keys().secret)).public
    fails("allow", path, public.hex(), reason="not of a node")


def test_a_rotated_key_does_not_come_back(new_run):
    path = new_run()
    with RunDirectory(path).keyring() as keyring:
        keyring.allow(bytes.fromhex(KEY))
        keyring.rotate(bytes.fromhex(KEY), b"n" * 32)
    fails("allow", path, KEY, reason="was rotated out")


def test_a_backup_has_the_keyring(new_run, tmp_path):
    path = new_run()
    succeeds("allow", path, KEY)
    succeeds("backup", path, tmp_path / "copy")
    assert listed(tmp_path / "copy") == listed(path)
    assert (tmp_path / "copy" / "keys.sqlite").stat().st_mode & 0o077 == 0
