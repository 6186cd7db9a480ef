"""The learning benchmark measures what it says, and the same run twice is the same run."""

import json
import os
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from benchmarks.learning import Settings, main, run
from benchmarks.recipes.catalogue import fold, split
from benchmarks.recipes.problem import Form
from benchmarks.recipes.swarm import Swarm, make_manifest
from node import embedded
from node.base import load_base
from node.data import Batch
from node.losses import mean_loss

SETTINGS = Settings(
    nodes=2,
    rounds=3,
    directions=2,
    step=0.01,
    decay="linear",
    smoothing=2,
    train="B",
    rank=2,
    alpha=4,
    epsilon=0.01,
    batch_size=2,
    sequence_length=32,
)


@pytest.fixture(scope="module")
def text():
    return fold("".join(topics[name] for name in sorted(topics)))[:20_000]


@pytest.fixture(scope="module")
def row(text):
    return run(str(embedded.path()), text, SETTINGS, seed=1)


def test_folding_leaves_single_spaces():
    assert fold(" a\n\nb \t c\n") == "a b c"


def test_the_held_out_tenth_is_nobodys_training_text(text):
    base = load_base(embedded.path(), threads=1)
    private, held_out = split(text, base.tokenizer, 3, 32)
    told = [base.tokenizer.decode(windows.tokens.ravel()) for windows in (*private, held_out)]
    assert len(private) == 3
    for start, part in zip((0, 6_000, 12_000, 18_000), told, strict=True):
        assert text[start:].startswith(part)


def test_the_first_loss_is_that_of_the_bare_base(text, row):
    base = load_base(embedded.path(), threads=1)
    _, held_out = split(text, base.tokenizer, 2, 32)
    assert row.held_out_start == pytest.approx(
        mean_loss(base.model, Batch(held_out.tokens.astype(np.int64))), abs=1e-4
    )


def test_the_costs_are_counted(row):
    assert row.code_bytes == 2 * 3 * 2
    assert row.forwards == 2 * row.code_bytes
    assert row.ledger_bytes > row.code_bytes
    assert row.no_votes == 0
    assert len(row.curve) == 1


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(text, row):
    again = run(str(embedded.path()), text, SETTINGS, seed=1)
    assert again.digest == row.digest
    assert again.held_out_end == row.held_out_end
    assert run(str(embedded.path()), text, SETTINGS, seed=2).digest != row.digest


def test_the_manifest_says_what_the_settings_say():
    base = load_base(embedded.path(), threads=1)
    form, settings = Form(rank=2), Swarm(rounds=3, directions=2, sides=1, step=0.01)
    manifest = make_manifest(base, form, settings, seed=1)
    assert manifest.base.digest == base.digest
    assert (manifest.adapter.train, manifest.adapter.rank, manifest.probe.directions) == ("AB", 2, 2)
    assert (manifest.probe.sides, manifest.run.rounds) == (1, 3)
    assert manifest.run_id != make_manifest(base, form, settings, seed=2).run_id


def test_results_replace_those_of_the_same_text_and_name_no_place_on_disk(text, tmp_path, capsys):
    data = tmp_path / "topics.txt"
    data.write_text(text[:8_000].replace(" ", "\n", 3), "utf-8")
    results = tmp_path / "results"
    tiny = ["--seeds", "1", "--nodes", "1", "--rounds", "1", "--rank", "1"]
    tiny += ["--batch-size", "1", "--sequence-length", "32"]
    place = ["--model", str(embedded.path()), "--data", str(data), "--out", str(results)]
    for more in ([], ["--keep-line-breaks"], ["--quantize", "nf4"], ["--step", "0.02"]):
        assert main([*place, *tiny, *more]) == 0
    figures = json.loads((results / "learning.json").read_text())
    assert [each["text"] for each in figures] == [
        "topics.txt, line breaks folded",
        "topics.txt, line breaks kept",
        "topics.txt, line breaks folded",
    ]
    assert [each["settings"]["step"] for each in figures] == [0.02, 0.01, 0.01]
    assert [each["settings"]["quantize"] for each in figures] == ["none", "none", "nf4"]
    page = (results / "learning.md").read_text()
    assert page.count("| 1 |") == 3
    assert "## embedded in nf4 on topics.txt" in page
    assert figures[0]["rows"][0]["held_out_start"] != figures[2]["rows"][0]["held_out_start"]
    assert "python -m benchmarks.learning --model MODEL --data TEXT --out DIR --seeds 1" in page
    assert str(tmp_path) not in page + json.dumps(figures)
    assert "2 forwards" in capsys.readouterr().out


@pytest.mark.assets
@pytest.mark.skipif("ZO_TEST_ASSETS" not in os.environ, reason="ZO_TEST_ASSETS names no directory")
def test_a_foreign_model_learns_a_text_within_forty_rounds():
    assets = Path(os.environ["ZO_TEST_ASSETS"])
    shakespeare = (assets / "data" / "tinyshakespeare" / "input.txt").read_text("utf-8")[:40_000]
    settings = replace(
        SETTINGS, nodes=4, rounds=40, train="AB", rank=4, alpha=8, batch_size=4, sequence_length=64
    )
    row = run(str(assets / "models" / "stories260K"), fold(shakespeare), settings, seed=1)
    assert row.held_out_end < row.held_out_start - 0.1
