"""`zo-coordinator`: what it says to a person, and with which exit code it ends."""

import json
import re
import socket
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from coordinator.cli import app
from coordinator.rundir import RunDirectory
from transport.exits import Exit
from zo.layout import base_digest
from zo.manifest import parse_manifest
from zo.weights import to_float


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


@pytest.fixture
def made(base, tmp_path):
    """A run directory."""
    result = run("init", tmp_path / "run", "--model", base, "--host", "127.0.0.1", "--port", 0)
    assert result.exit_code == 0, result.output
    return tmp_path / "run"


def run(*arguments, width=80):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=width)


def fails(result, code, *words):
    """One line on stderr, the documented exit code, no trace."""
    assert result.exit_code == code, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("zo-coordinator: error: ")
    for word in words:
        assert word in lines[0]


def edit(path, old, new):
    text = path.read_text()
    assert re.search(old, text), old
    path.write_text(re.sub(old, new, text, count=1))


def test_init_says_what_it_made_and_what_comes_next(base, tmp_path):
    result = run("init", tmp_path / "run", "--model", base, "--rounds", 7, "--directions", 2)
    assert result.exit_code == 0
    run_id = RunDirectory(tmp_path / "run").manifest().run_id.hex()
    assert f"run {run_id}" in result.stdout
    assert "7 rounds of 2 directions" in result.stdout
    assert "Next: zo-coordinator serve" in result.stdout


@pytest.mark.parametrize(
    ("options", "sides", "step"),
    [
        ([], 1, 0.001),
        (["--directions", 4, "--train", "B"], 1, 0.002),
        (["--directions", 3], 2, 0.001),
        (["--estimators", "two-sided,backward"], 2, 0.001),
        (["--directions", 8, "--local-steps", 4], 2, 0.001),
        (["--directions", 2, "--sides", 1, "--step", 0.5], 1, 0.5),
    ],
)
def test_what_init_takes_unless_told_otherwise(base, tmp_path, options, sides, step):
    assert run("init", tmp_path / "run", "--model", base, *options).exit_code == 0
    manifest = RunDirectory(tmp_path / "run").manifest()
    assert (manifest.probe.sides, manifest.schedule.step) == (sides, step)
    assert manifest.schedule.full_votes == 64 * manifest.probe.local_steps
    assert not manifest.moves.projections


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ("linear", 0, 0, True)),
        (["--decay", "cosine", "--warm-up", 3], ("cosine", 3, 0, True)),
        (["--decay", "halving", "--rounds", 10], ("halving", 0, 3, True)),
        (["--decay", "halving", "--half-life", 5], ("halving", 0, 5, True)),
        (["--decay", "constant", "--raw", "--step", "1e-6"], ("constant", 0, 0, False)),
    ],
)
def test_a_schedule_is_written_into_the_manifest(base, tmp_path, options, expected):
    assert run("init", tmp_path / "run", "--model", base, *options).exit_code == 0
    made = RunDirectory(tmp_path / "run").manifest().schedule
    assert (made.decay, made.warm_up, made.half_life, made.normalised) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sides", "3"], ("probe.sides = 3",)),
        (["--sides", "0"], ("probe.sides = 0",)),
        (["--full-votes", "0"], ("schedule.full_votes = 0",)),
        (["--estimators", "magic"], ("probe.estimators",)),
        (
            ["--sides", "2", "--estimators", "forward"],
            ("probe.estimators = ['forward'] must name 'two-sided'",),
        ),
        (["--rate", "0.1"], ("--rate is for moves, and without --moves no node may report any",)),
        (["--moves", "4"], ("moves.projections = 4 must differ from probe.directions",)),
        (["--pipeline", "--staleness", "1"], ("run.pipeline = 1 needs run.staleness = 0",)),
        (["--moves", "8", "--optimizer", "sgd", "--updates", "0"], ("moves.updates = 0",)),
        (["--local-steps", "3"], ("probe.local_steps = 3 must divide probe.directions = 4",)),
        (["--sides", "1", "--directions", "1"], ("probe.sides = 1 needs probe.directions to be at least 2",)),
        (["--epsilon", "0"], ("probe.epsilon = 0.0",)),
        (["--rounds", "0"], ("run.rounds = 0",)),
        (["--directions", "5000"], ("probe.directions = 5000", "4096")),
        (["--step", "nan"], ("schedule.step",)),
        (["--port", "70000"], ("port = 70000",)),
        (["--quorum", "0"], ("quorum = 0",)),
        (["--name", "a b"], ("run.name",)),
        (["--target", "q_prj"], ("q_prj", "q_proj")),
        (["--rounds", "100000000", "--directions", "4096"], ("uint32",)),
        (
            ["--quantize", "nf4"],
            (
                "layer layers.0.q_proj has 8 outputs; 4-bit on CPU needs a multiple of 32. Use --quantize int8",
            ),
        ),
        (["--quantize", "nf4", "--skip-quantize", "q_prj"], ("q_prj", "did you mean q_proj")),
        (["--skip-quantize", "q_proj"], ("base.skip_quantize = ['q_proj'] needs base.quantize",)),
        (["--task", "head"], ("a task with labels must name at least two, got []",)),
        (["--task", "head", "--label", "a", "--label", "a"], ("labels names 'a' more than once",)),
        (["--label", "a", "--label", "b"], ("labels = ['a', 'b'] needs kind = 'verbalizer' or 'head'",)),
        (["--task", "verbalizer", "--label", "a"], ("the label 'a' has no word", "LABEL=WORD, as a=yes")),
        (["--template", "{text}"], ("words and template need kind = 'verbalizer', got 'text'",)),
        (["--target", "none"], ("targets must name at least one module, got none",)),
        (["--rounds", "7", "--warm-up", "7"], ("schedule.warm_up = 7 must be less than run.rounds = 7",)),
        (["--half-life", "7"], ("decay = 'linear' and half_life = 7 do not go together",)),
        (["--decay", "halving", "--half-life", "0"], ("half_life = 0 do not go together",)),
        (["--raw"], ("--raw needs --step",)),
    ],
)
def test_a_value_out_of_range_is_named_and_nothing_is_made(base, tmp_path, options, words):
    fails(run("init", tmp_path / "run", "--model", base, *options), Exit.INPUT, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ("none", (), False)),
        (["--quantize", "int8"], ("int8", (), False)),
        (["--quantize", "fp4", "--skip-quantize", "q_proj"], ("fp4", ("q_proj",), False)),
    ],
)
def test_quantisation_is_written_into_the_manifest(base, tmp_path, options, expected):
    assert run("init", tmp_path / "run", "--model", base, *options).exit_code == 0
    written = RunDirectory(tmp_path / "run").manifest().base
    assert (written.quantize, written.skip_quantize, written.any_quantization) == expected


def test_a_run_that_leaves_quantisation_to_its_nodes_only_warns_of_shapes(base, tmp_path):
    result = run("init", tmp_path / "run", "--model", base, "--quantize", "nf4", "--any-quantization")
    assert result.exit_code == 0
    assert "note, for nodes without a GPU: layer layers.0.q_proj has 8 outputs" in " ".join(
        result.stderr.split()
    )
    assert RunDirectory(tmp_path / "run").manifest().base.any_quantization


def test_a_head_is_trained_beside_the_adapter_or_alone(base, tmp_path):
    (base / "config.json").write_text('{"hidden_size": 8, "architectures": ["BertModel"]}')
    task = ("--task", "head", "--label", "bad", "--label", "good")
    for name, options, size in (("both", (), 2 * 4 * 8 + 2 * 8 + 2), ("alone", ("--target", "none"), 18)):
        made = run("init", tmp_path / name, "--model", base, *task, *options)
        assert made.exit_code == 0, made.output
        directory = RunDirectory(tmp_path / name)
        manifest = directory.manifest()
        assert (manifest.task.kind, manifest.task.labels) == ("head", ("bad", "good"))
        assert manifest.adapter.size == size
        assert directory.initial(manifest).weights.any()


def test_words_stand_in_the_manifest(base, tmp_path):
    words = ("--task", "verbalizer", "--label", "0=bad", "--label", "1=good", "--template", "{text} It was")
    assert run("init", tmp_path / "run", "--model", base, *words).exit_code == 0
    task = RunDirectory(tmp_path / "run").manifest().task
    assert (task.labels, task.words, task.template) == (("0", "1"), ("bad", "good"), "{text} It was")


@pytest.fixture
def adapter(tmp_path):
    """A PEFT adapter of the base's only layer, of rank 2."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 6}')
    factors = {"A": np.full((2, 8), 0.5, np.float32), "B": np.full((8, 2), -0.25, np.float32)}
    name = "base_model.model.layers.0.q_proj.lora_{}.weight"
    save_file(
        {name.format(key): factor for key, factor in factors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


@pytest.mark.parametrize(("train", "expected"), [("AB", [0.5] * 16 + [-0.25] * 16), ("B", [-0.25] * 16)])
def test_a_run_may_start_from_an_adapter(base, adapter, tmp_path, train, expected):
    made = run("init", tmp_path / "run", "--model", base, "--adapter", adapter, "--train", train)
    assert made.exit_code == 0, made.output
    directory = RunDirectory(tmp_path / "run")
    manifest = directory.manifest()
    assert (manifest.adapter.rank, manifest.adapter.alpha, manifest.adapter.targets) == (2, 6.0, ("q_proj",))
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert manifest.adapter.start == base_digest((name, [(adapter / name).read_bytes()]) for name in files)
    assert to_float(directory.initial(manifest).weights).tolist() == expected


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_made(base, adapter, tmp_path):
    here = ("init", tmp_path / "run", "--model", base, "--adapter")
    for option in (("--rank", 2), ("--alpha", 6), ("--target", "q_proj")):
        fails(run(*here, adapter, *option), Exit.INPUT, "--adapter brings rank, alpha and modules: leave out")
    fails(run(*here, tmp_path / "no"), Exit.BASE, "has no adapter_config.json")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 1025}')
    fails(run(*here, adapter), Exit.INPUT, "adapter.alpha = 1025.0: expected `float` <= 1024.0")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 6}')
    tensors = load_file(adapter / "adapter_model.safetensors")
    large = {name: tensor * 20 for name, tensor in tensors.items()}
    save_file(large, adapter / "adapter_model.safetensors")
    fails(
        run(*here, adapter),
        Exit.BASE,
        "layers.0.q_proj.lora_A: weights must be finite and within ±8, got 10.0",
    )
    assert not (tmp_path / "run").exists()


def test_sequences_that_the_base_cannot_take_are_refused(base, tmp_path):
    (base / "config.json").write_text('{"max_position_embeddings": 64}')
    here = ("init", tmp_path / "run", "--model", base)
    fails(
        run(*here),
        Exit.INPUT,
        "probe.sequence_length = 128: the base takes at most 64 tokens; give --sequence-l",
    )
    assert run(*here, "--sequence-length", 64).exit_code == 0


def test_a_head_needs_to_know_how_wide_the_base_is(base, tmp_path):
    task = ("--task", "head", "--label", "bad", "--label", "good")
    fails(run("init", tmp_path / "run", "--model", base, *task), Exit.BASE, "how wide the base is", "n_embd")


def test_a_base_that_is_none(tmp_path):
    fails(
        run("init", tmp_path / "run", "--model", tmp_path / "no"),
        Exit.BASE,
        "does not exist; name a directory",
    )
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    fails(run("init", tmp_path / "run", "--model", tmp_path / "bad"), Exit.BASE, "is not a safetensors file")


def test_init_never_overwrites(base, made):
    before = (made / "manifest.toml").read_bytes()
    fails(run("init", made, "--model", base), Exit.INPUT, "exists already; choose another directory")
    assert (made / "manifest.toml").read_bytes() == before


@pytest.mark.parametrize("command", ["serve", "status", "verify"])
def test_what_is_no_run_directory(tmp_path, command):
    fails(run(command, tmp_path), Exit.INPUT, "is not a run directory", "zo-coordinator init")


@pytest.mark.parametrize("command", ["serve", "status", "verify"])
def test_a_manifest_field_out_of_range(made, command):
    edit(made / "manifest.toml", r"epsilon = .*", "epsilon = -1.0")
    fails(run(command, made), Exit.INPUT, "manifest.toml", "probe.epsilon = -1.0")


@pytest.mark.parametrize("command", ["serve", "status", "verify"])
def test_a_manifest_edited_after_the_run_was_made(made, command):
    edit(made / "manifest.toml", r"batch_size = .*", "batch_size = 9")
    fails(run(command, made), Exit.DAMAGED, "must not be edited: restore it, or `init` a new run")


@pytest.mark.parametrize("command", ["serve", "status", "verify"])
def test_a_run_directory_of_another_version(made, command):
    edit(made / "manifest.toml", r"protocol = \d+", "protocol = 99")
    result = run(command, made)
    assert "protocol version 99" in result.stderr
    assert "use the version that made it" in result.stderr
    assert result.exit_code in (Exit.INPUT, Exit.DAMAGED)


@pytest.mark.parametrize("command", ["serve", "status", "verify"])
def test_a_ledger_of_another_version(made, command):
    with sqlite3.connect(made / "ledger.sqlite") as database:
        database.execute("UPDATE meta SET value = ? WHERE key = 'format'", (b"zo-ledger-99",))
    fails(run(command, made), Exit.DAMAGED, "has format 'zo-ledger-99', this version reads")


@pytest.mark.parametrize("command", ["serve", "status", "verify"])
def test_a_ledger_that_is_none(made, command):
    for file in made.glob("ledger.sqlite*"):
        file.unlink()
    (made / "ledger.sqlite").write_bytes(b"not a database at all" * 100)
    fails(run(command, made), Exit.DAMAGED, "is not a ledger, or is damaged")


def test_an_address_that_cannot_be_bound(made):
    fails(run("serve", made, "--host", "192.0.2.1"), Exit.INPUT, "cannot bind 192.0.2.1:0")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        fails(run("serve", made, "--port", port), Exit.BUSY, f"127.0.0.1:{port} is in use")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--step", 1e-9), "is rounded to 0, and nothing would be learnt; the smallest is 3.73e-09"),
        (("--column", "text=body"), "--column is for the files of --calibrate"),
        (("--max-new-tokens", 5), "with --objective cross-entropy nothing is said after a prompt"),
    ],
)
def test_what_would_change_nothing_is_refused(base, tmp_path, options, reason):
    fails(run("init", tmp_path / "run", "--model", base, *options), Exit.INPUT, reason)
    assert not (tmp_path / "run").exists()


def test_a_key_that_others_could_read(made):
    (made / "coordinator.key").chmod(0o644)
    fails(run("serve", made), Exit.INPUT, "others could read it. Run: chmod 600")


def test_a_configuration_out_of_range(made):
    edit(made / "coordinator.toml", r"quorum = .*", "quorum = 0")
    fails(run("serve", made), Exit.INPUT, "coordinator.toml", "quorum = 0")
    edit(made / "coordinator.toml", r"quorum = .*", "quorun = 1")
    fails(run("serve", made), Exit.INPUT, "coordinator.toml", "quorun")


def test_status_and_proof_of_a_run_that_was_never_served(made):
    status = json.loads(run("status", made, "--json").stdout)
    assert (status["round"], status["members"], status["serving"]) == (0, [], False)
    proof = json.loads(run("verify", made, "--json").stdout)
    assert (proof["rounds"], proof["run"], proof["head"]) == (0, status["run"], status["run"])


def commands():
    shown = run("--help").stdout.partition("Commands:")[2].partition("Exit codes")[0]
    return re.findall(r"^  ([a-z]+)  ", shown, re.MULTILINE)


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("command", commands())
def test_help_has_an_example_and_exit_codes_and_fits(command, width):
    shown = run(command, "--help", width=width)
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= width
    example = lines[lines.index("  Example:") + 1].strip()
    assert example.startswith(f"zo-coordinator {command} ")
    assert "Exit codes: 0 done; 3 bad input" in shown.stdout


def test_the_list_of_commands_cuts_no_sentence():
    assert {"init", "serve", "status", "verify"} <= set(commands())
    assert "..." not in run("--help", width=60).stdout.partition("Commands:")[2]


def test_help_loads_no_torch():
    check = "import sys, coordinator.cli; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


class Measuring:
    """Stands for the process that measures: remembers what it was asked, and answers."""

    def __init__(self, epsilon, code=0):
        self.answer = json.dumps({"epsilon": epsilon}).encode()
        self.code = code
        self.asked = []

    def __call__(self, command, **_):
        manifest = Path(command[command.index("calibrate") + 1])
        self.asked.append((manifest.read_text("utf-8"), command))
        return subprocess.CompletedProcess(command, self.code, stdout=self.answer)


def test_a_calibrated_run_has_the_measured_epsilon(base, tmp_path, monkeypatch):
    measuring = Measuring(0.005)
    monkeypatch.setattr("coordinator.calibration.subprocess.run", measuring)
    data = [tmp_path / "one.txt", tmp_path / "two.txt"]
    files = [part for file in data for part in ("--calibrate", file)]
    result = run("init", tmp_path / "run", "--model", base, "--rank", 2, *files)
    assert result.exit_code == 0, result.output
    assert "epsilon 0.005, as measured" in result.stdout
    manifest = RunDirectory(tmp_path / "run").manifest()
    assert manifest.probe.epsilon == 0.005
    ((text, command),) = measuring.asked
    asked = parse_manifest(text)
    assert (asked.base, asked.adapter.rank) == (manifest.base, 2)
    assert command[5:] == ["--model", str(base), "--data", str(data[0]), "--data", str(data[1]), "--json"]


def test_a_calibration_reads_data_as_nodes_do(base, adapter, tmp_path, monkeypatch):
    measuring = Measuring(0.005)
    monkeypatch.setattr("coordinator.calibration.subprocess.run", measuring)
    options = (
        "--calibrate",
        tmp_path / "a.tsv",
        "--column",
        "text=1",
        "--column",
        "label=2",
        "--adapter",
        adapter,
    )
    task = ("--task", "verbalizer", "--label", "0=bad", "--label", "1=good")
    assert run("init", tmp_path / "run", "--model", base, *options, *task).exit_code == 0
    ((_, command),) = measuring.asked
    data = ["--data", str(tmp_path / "a.tsv"), "--adapter", str(adapter)]
    assert command[7:] == [*data, "--column", "text=1", "--column", "label=2", "--json"]


def test_a_calibration_that_fails_makes_no_run(base, tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.calibration.subprocess.run", Measuring(None, code=12))
    result = run("init", tmp_path / "run", "--model", base, "--calibrate", tmp_path / "notes.txt")
    fails(result, Exit.MISMATCH, "no epsilon was found", "exit code 12")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("coordinator.calibration.find_spec", lambda _: None)
    result = run("init", tmp_path / "run", "--model", base, "--calibrate", tmp_path / "notes.txt")
    fails(result, Exit.INPUT, "needs the node's extras", "zo-node calibrate")


def test_what_makes_a_calibration_vain_is_said_before_it(base, made, tmp_path, monkeypatch):
    measuring = Measuring(0.005)
    monkeypatch.setattr("coordinator.calibration.subprocess.run", measuring)
    options = ("--model", base, "--calibrate", tmp_path / "notes.txt")
    fails(run("init", made, *options), Exit.INPUT, "exists already")
    fails(
        run("init", tmp_path / "run", *options, "--epsilon", 0.1), Exit.INPUT, "give --epsilon or --calibrate"
    )
    assert not measuring.asked
