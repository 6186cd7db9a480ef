"""The learning benchmark measures what it says, and the same run twice is the same run."""

from dataclasses import replace
from pydoc_data.topics import topics

import numpy as np
import pytest

from benchmarks.learning import Settings, fold, make_manifest, run, split
from node import embedded
from node.base import load_base
from node.probe import mean_loss

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
        mean_loss(base.model, held_out.tokens.astype(np.int64)), abs=1e-4
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
    manifest = make_manifest(base, replace(SETTINGS, train="AB"), seed=1)
    assert manifest.base.digest == base.digest
    assert (manifest.adapter.train, manifest.adapter.rank, manifest.probe.directions) == ("AB", 2, 2)
    assert manifest.run_id != make_manifest(base, SETTINGS, seed=2).run_id
