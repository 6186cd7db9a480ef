"""Calibration: what is noise and what is curvature is told apart, and the proposal lies between the two."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from node import cli, embedded
from node.calibration import EPSILONS, calibrate, proposed
from node.state import StateDirectory
from transport.base_files import digest, linear_shapes, tensor_shapes, tokenizer_digest
from transport.exits import Exit
from zo.layout import lora_layout

NUM = 64


def losses_like(slope=1.0, noise=0.0, curvature=0.0, power=3, seed=0):
    """L+ − L− of a loss with such slopes (RMS), third or second derivatives, and noise."""
    rng = np.random.default_rng(seed)
    slopes, bends = slope * rng.normal(size=NUM), curvature * rng.normal(size=NUM)

    def differences(epsilon):
        return 2 * epsilon * slopes + 2 * epsilon**power * bends + noise * rng.normal(size=NUM)

    return differences


@pytest.mark.parametrize(("sides", "power"), [(2, 3), (1, 2)])
def test_noise_and_curvature_are_what_they_are(sides, power):
    rows = calibrate(losses_like(noise=1e-4, curvature=20.0, power=power), sides)
    assert [row.epsilon for row in rows] == list(EPSILONS[1:])
    for row in rows:
        assert row.noise == pytest.approx(1e-4, rel=0.4)
        bent = 2 * row.epsilon**power * 20
        if bent > 10 * row.noise:
            assert row.curvature == pytest.approx(bent, rel=0.5)
        else:
            assert row.curvature < 12 * row.noise
        if bent < row.epsilon / 10:
            assert row.signal == pytest.approx(2 * row.epsilon, rel=0.4)
        assert row.error == pytest.approx(np.hypot(row.noise, row.curvature) / row.signal)


@pytest.mark.parametrize(
    ("loss", "epsilon"),
    [
        ({}, 0.2),  # a straight line without noise: the further the better
        ({"curvature": 600.0}, 0.01),  # 6 % wrong there, and 24 % at 0.02
        ({"noise": 1e-5, "curvature": 600.0}, 0.01),
        ({"noise": 3e-3, "curvature": 600.0}, 0.01),  # 15 % of the signal there, and more below
        ({"noise": 3e-3, "curvature": 30.0}, 0.05),
    ],
)
def test_the_proposal_is_the_largest_that_is_right(loss, epsilon):
    assert proposed(calibrate(losses_like(**loss), 2)).epsilon == epsilon


def test_a_staircase_wants_an_epsilon_that_crosses_many_steps():
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=NUM)

    def differences(epsilon):
        return np.round(2000 * 2 * epsilon * slopes) / 2000  # accuracies over 2,000 tokens

    best = proposed(calibrate(differences, 2))
    assert best.epsilon == 0.2
    assert next(row for row in calibrate(differences, 2) if row.epsilon == 1e-4).error > 0.5


def test_no_proposal_where_nothing_is_heard():
    assert proposed(calibrate(losses_like(slope=0.0, noise=1.0), 2)) is None
    assert proposed(calibrate(lambda epsilon: np.zeros(NUM), 2)) is None
    assert proposed(calibrate(lambda epsilon: np.full(NUM, np.nan), 2)) is None


def test_losses_that_overflow_further_up_spoil_only_those():
    smooth = losses_like(curvature=1.0)
    rows = calibrate(lambda epsilon: smooth(epsilon) if epsilon < 0.1 else np.full(NUM, np.inf), 2)
    assert [row.epsilon for row in rows if not np.isfinite(row.error)] == [0.1, 0.2]
    assert proposed(rows).epsilon == 0.05


@pytest.fixture
def run(tmp_path, make_manifest):
    """A state directory of a run on the embedded base."""
    path = embedded.path()
    layout = lora_layout(linear_shapes(tensor_shapes(path)), ("v_proj", "up_proj"), 2, "B", None)
    manifest = make_manifest(
        digest=digest(path),
        tokenizer_digest=tokenizer_digest(path),
        targets=("v_proj", "up_proj"),
        rank=2,
        size=layout.size,
        layout_digest=layout.digest().hex(),
        batch_size=2,
        sequence_length=16,
    )
    state = StateDirectory(tmp_path / "state")
    state.path.mkdir()
    state.save_manifest(manifest)
    return state.path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("the words that a model knows, once upon a time\n" * 20)
    return path


def command(*arguments):
    return CliRunner().invoke(cli.app, ["calibrate", *map(str, arguments)], terminal_width=80)


def test_the_command_proposes_what_its_table_says(run, text):
    shown = command(run, "--data", text, "--directions", 4)
    assert shown.exit_code == 0, shown.output
    *_, last = lines = shown.stdout.splitlines()
    marked = [line.split()[0] for line in lines if line.endswith("←")]
    assert last.startswith(f"use --epsilon {marked[0]}: its slopes are off by ")
    said = json.loads(command(run / "manifest.toml", "--data", text, "--directions", 4, "--json").stdout)
    assert f"{said['epsilon']:g}" == marked[0]
    assert [row["epsilon"] for row in said["rows"]] == list(EPSILONS[1:])


def test_another_base_of_the_same_shapes_is_refused(run, text, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(embedded.path(), other)
    weights = load_file(other / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, other / "model.safetensors")
    result = command(run, "--data", text, "--model", other)
    assert result.exit_code == Exit.BASE
    assert "the base" in result.stderr
    assert "has digest" in result.stderr


def test_another_tokenizer_is_refused(run, text, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(embedded.path(), other)
    with (other / "tokenizer.json").open("a") as file:
        file.write(" ")
    result = command(run, "--data", text, "--model", other)
    assert result.exit_code == Exit.BASE
    assert f"the tokenizer in {other} has digest" in result.stderr


def test_figures_that_are_not_finite_are_null_in_json(run, text, monkeypatch):
    def losses(_trainer, _num_directions, progress=None):
        return calibrate(lambda epsilon: np.full(4, np.inf if epsilon > 0.01 else 2 * epsilon), 2, progress)

    monkeypatch.setattr("node.language.LanguageTrainer.calibrate", losses)

    def no_json(constant):
        raise AssertionError(f"{constant} is not JSON")

    shown = command(run, "--data", text, "--json")
    rows = json.loads(shown.stdout, parse_constant=no_json)["rows"]
    assert rows[0]["signal"] == pytest.approx(2 * EPSILONS[1])
    assert [rows[-1][name] for name in ("error", "signal", "curvature")] == [None] * 3


def test_a_run_that_is_none(text, tmp_path):
    result = command(tmp_path, "--data", text)
    assert result.exit_code == Exit.INPUT
    assert "Name a run directory as `zo-coordinator init` makes it" in result.stderr
    (tmp_path / "manifest.toml").write_text("[run]\n")
    result = command(tmp_path, "--data", text)
    assert (result.exit_code, "manifest.toml: " in result.stderr) == (Exit.INPUT, True)


def test_the_command_fails_if_nothing_is_heard(run, text, monkeypatch):
    monkeypatch.setattr(
        "node.language.LanguageTrainer.calibrate", lambda *_: calibrate(lambda _: np.zeros(3), 2)
    )
    result = command(run, "--data", text)
    assert result.exit_code == Exit.MISMATCH
    assert "no epsilon is heard" in result.stderr
    assert json.loads(command(run, "--data", text, "--json").stdout)["epsilon"] is None
