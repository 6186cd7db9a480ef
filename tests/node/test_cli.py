"""`zo-node`: what it says to a person, and with which exit code it ends."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from node import cli
from node.state import StateDirectory, load_result
from transport.exits import Exit
from transport.keys import new_key_pair
from transport.ticket import Ticket
from zo.replica import Replica
from zo.weights import zeros

TICKET = str(Ticket("127.0.0.1", 9, bytes(16), bytes(range(32))))
COMMANDS = ("join", "export", "evaluate", "demo", "calibrate", "doctor", "predict")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("once upon a time\n")
    return path


def run(*arguments, width=80):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], terminal_width=width)


def fails(result, code, *words):
    """One line on stderr, the documented exit code, no trace."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("zo-node: error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("ticket", "words"),
    [
        ("hello", "not a ticket: 'hello'. A ticket looks like zo://HOST:PORT/RUN#KEY"),
        (TICKET.partition("#")[0], "no key after '#'. If it was typed into a shell, put it in quotes"),
        (TICKET[:-5], "must be 43 characters after '#', got 38: was it cut off?"),
        (TICKET.replace("/00", "/", 1), "the ticket's run must be 32 hexadecimal digits"),
        (TICKET.replace(":9/", ":99999/"), "port must be between 1 and 65535, got 99999"),
    ],
)
def test_a_wrong_ticket_is_said_at_once(ticket, words, text, tmp_path):
    fails(run("join", ticket, "--data", text, "--state", tmp_path / "state"), Exit.INPUT, words)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dp-clip", 1), "--dp-delta, --dp-clip and --dp-noise need --dp-epsilon, the budget"),
        (("--dp-epsilon", 8), "--dp-epsilon needs --dp-clip, most that one row may say"),
        (("--dp-epsilon", -1, "--dp-clip", 1), "--dp-epsilon takes a number above 0, got -1"),
    ],
)
def test_a_budget_that_cannot_be_is_said_at_once(options, words, text, tmp_path):
    fails(run("join", TICKET, "--data", text, "--state", tmp_path / "state", *options), Exit.INPUT, words)


def test_a_node_that_was_private_does_not_join_without_being_so(text, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    (state / "privacy.json").write_text("{}")
    fails(
        run("join", TICKET, "--data", text, "--state", state),
        Exit.INPUT,
        "join with --dp-epsilon, or as another",
    )


def test_the_state_of_another_run_is_not_overwritten(text, tmp_path, make_manifest):
    state = StateDirectory(tmp_path / "state")
    state.path.mkdir()
    manifest = make_manifest()
    state.save_manifest(manifest)
    state.agent(0).save(Replica(manifest, zeros(manifest.adapter.size)), manifest)
    fails(run("join", TICKET, "--data", text, "--state", state.path), Exit.DAMAGED, "of another run, test")
    assert state.agent(0).load(manifest.run_id)[1].round == 0
    options = ("--start-over", "--connect-timeout", 0.2)
    result = run("join", TICKET, "--data", text, "--state", state.path, *options)
    assert result.exit_code == Exit.UNREACHABLE
    assert load_result(state.path / "set-aside-1")[1].round == 0


def test_without_its_library_privacy_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    options = ("--dp-epsilon", 8, "--dp-clip", 1)
    result = run("join", TICKET, "--data", text, "--state", tmp_path / "state", *options)
    fails(result, Exit.INPUT, "pip install -c constraints.txt '.[privacy]'")


def test_data_that_is_missing_or_empty_is_said_before_anything_is_loaded(tmp_path):
    state = tmp_path / "state"
    fails(run("join", TICKET, "--data", tmp_path / "no.txt", "--state", state), 3, "no.txt: no such file")
    (tmp_path / "empty.txt").touch()
    fails(run("join", TICKET, "--data", tmp_path / "empty.txt", "--state", state), 3, "the file is empty")
    assert not state.exists()


def test_a_held_out_file_is_checked_as_well(text, tmp_path):
    options = ("--data", text, "--eval", tmp_path / "no.txt", "--state", tmp_path / "state")
    fails(run("join", TICKET, *options), Exit.INPUT, "no.txt: no such file")


def test_nobody_answers(text, tmp_path):
    options = ("--data", text, "--state", tmp_path / "state", "--connect-timeout", 0.2)
    fails(
        run("join", TICKET, *options), Exit.UNREACHABLE, "nobody answers at 127.0.0.1:9", "Is the coordinator"
    )


def test_starting_over_sets_the_weights_aside(text, tmp_path, make_manifest):
    manifest = make_manifest()
    state = StateDirectory(tmp_path / "state")
    with state.lock():
        state.save_manifest(manifest)
        state.agent(0).save(Replica(manifest, zeros(500), 7, bytes(16)), manifest)
    options = ("--data", text, "--state", state.path, "--connect-timeout", 0.1, "--start-over")
    result = run("join", TICKET, *options)
    assert result.exit_code == Exit.UNREACHABLE
    assert f"set the saved weights aside in {state.path / 'set-aside-1'}" in result.stderr
    assert load_result(state.path / "set-aside-1")[1].round == 7
    assert state.agent(0).load(manifest.run_id) is None
    assert "set the saved weights" not in run("join", TICKET, *options).stderr, "there was nothing any more"


def test_a_base_that_is_none(text, tmp_path):
    options = ("--data", text, "--state", tmp_path / "state", "--model", tmp_path)
    fails(run("join", TICKET, *options), Exit.BASE, "has no config.json")


def test_a_base_that_has_changed_since_this_node_took_part(text, tmp_path, make_manifest):
    from node import embedded
    from node.base import read_digest, read_tokenizer_digest
    from node.state import StateDirectory

    digests = {
        "digest": read_digest(str(embedded.path())),
        "tokenizer_digest": read_tokenizer_digest(str(embedded.path())),
    }
    options = ("--data", text, "--state", tmp_path / "state", "--connect-timeout", 0.2)
    for what, changed in (("base", "digest"), ("tokenizer", "tokenizer_digest")):
        manifest = make_manifest(**digests | {changed: "ab" * 16})
        ticket = Ticket("127.0.0.1", 9, manifest.run_id, new_key_pair().public)
        (tmp_path / "state").mkdir(exist_ok=True)
        StateDirectory(tmp_path / "state").save_manifest(manifest)
        said = f"has changed since this node last took part in the run: its digest is {digests[changed]}, it was abab"
        fails(run("join", ticket, *options), Exit.BASE, f"the {what} in ", said, "Fetch the files again")
    # Another run is another matter.
    fails(run("join", TICKET, *options), Exit.UNREACHABLE, "nobody answers")


def test_a_state_that_another_node_uses(text, tmp_path):
    with StateDirectory(tmp_path / "state").lock():
        result = run("join", TICKET, "--data", text, "--state", tmp_path / "state")
    fails(result, Exit.BUSY, "another node uses the state directory", "give it its own --name")


def test_a_state_that_cannot_be_written(text, tmp_path):
    (tmp_path / "file").touch()
    result = run("join", TICKET, "--data", text, "--state", tmp_path / "file" / "state")
    fails(result, Exit.STORAGE, "cannot write the state directory", "Not a directory")


def test_export_of_what_is_no_run(tmp_path):
    fails(run("export", tmp_path, "-o", tmp_path / "out"), Exit.INPUT, "holds no weights yet")


def test_usage_errors_leave_with_2():
    assert run("join").exit_code == 2
    assert run("no-such-command").exit_code == 2


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_exit_codes_and_fits(command, width):
    shown = run(command, "--help", width=width)
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= width
    example = lines[lines.index("  Example:") + 1].strip()
    assert example.startswith(f"zo-node {command} ")
    assert "Exit codes: 0 done; 3 bad input" in shown.stdout
    assert "…" not in shown.stdout.replace("/…", "").replace("#…", ""), "something was cut off"


def test_the_list_of_commands_cuts_no_sentence():
    shown = run("--help", width=60).stdout
    assert "..." not in shown.partition("Commands:")[2]
    assert all(f"\n  {command} " in shown for command in COMMANDS)


def test_help_loads_no_torch():
    check = "import sys, node.cli; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
