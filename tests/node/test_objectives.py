"""Objectives: each is what it says it is, alone and with both signs in one pass, and votes by what is said alone."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from node import cli, embedded
from node.adapter import Adapter
from node.base import load_base
from node.completions import arrange, completion_ids, prompt_ids
from node.data import Batch, Pair, pack, stacked
from node.generation import complete, continuations
from node.losses import measure, row_losses, row_misses
from node.objectives import objective
from node.probe import Probe
from node.records import DataError
from node.scores import ScoreError, token_f1
from node.stacked import side_by_side
from zo.codes import NO_VOTE
from zo.manifest import Task

PAIRS = [
    Pair("Return the", " number of items in the list"),
    Pair("This function returns the absolute value of a", " number"),
    Pair("Raise an", " error if the file is not found"),
]


@pytest.fixture(scope="module")
def base():
    return load_base(embedded.path(), threads=1)


@pytest.fixture(scope="module")
def adapter(base):
    adapter = Adapter(base, key=(3, 4), targets=("v_proj", "up_proj"), rank=2, alpha=8, train="AB")
    adapter.hold(4)
    return adapter


@pytest.fixture(autouse=True)
def views(adapter):
    adapter.host[:] = np.random.default_rng(5).normal(scale=0.15, size=adapter.host.shape)
    adapter.push()


@pytest.fixture(scope="module")
def rows(base):
    tokens = [
        (prompt_ids(base.tokenizer, pair.prompt), completion_ids(base.tokenizer, pair)) for pair in PAIRS
    ]
    return arrange(PAIRS, tokens, 64)


def generated(kind="token-f1", **more):
    return Task(kind="completion", objective=kind, max_new_tokens=6, **more)


def every(rows):
    return rows.take(np.arange(rows.num_windows))


def test_accuracy_is_the_share_of_scored_tokens_that_are_the_likeliest(base, adapter, rows):
    batch = every(rows)
    first = int(rows.begins[0])
    with torch.inference_mode():  # one token that it does say
        likeliest = adapter.model(input_ids=torch.from_numpy(batch.tokens)).logits.argmax(-1)
    batch.tokens[0, first] = likeliest[0, first - 1]
    losses = objective(Task(kind="completion", objective="accuracy"), base, rows)(adapter.model, batch)
    with torch.inference_mode():
        likeliest = adapter.model(input_ids=torch.from_numpy(batch.tokens)).logits.argmax(-1).numpy()
    wrong = (likeliest[:, :-1] != batch.tokens[:, 1:]) & batch.scored[:, 1:]
    assert losses.sums.tolist() == wrong.sum(1).tolist()
    assert losses.counts.tolist() == batch.scored[:, 1:].sum(1).tolist()
    assert 0 < losses.mean < 1
    parts = [row_misses(adapter.model, rows.take(np.array(part))).sums.sum() for part in ([0, 1], [2])]
    whole = measure(adapter.model, rows, batch_size=2, objective=row_misses).loss
    assert whole == pytest.approx(sum(parts) / rows.num_scored)


def test_accuracy_of_plain_text(base, adapter):
    windows = pack(["Return the number of items in the list. " * 20], base.tokenizer, 16)
    loss = objective(Task(objective="accuracy"), base, windows)
    assert loss is row_misses
    losses = loss(adapter.model, windows.take(np.arange(3)))
    assert losses.counts.tolist() == [15] * 3


def test_rows_say_together_what_they_say_alone(base, adapter, rows):
    prompts = [prompt_ids(base.tokenizer, pair.prompt) for pair in PAIRS]
    assert len({len(prompt) for prompt in prompts}) == 3, "some are padded"
    together = continuations(adapter.model, base, prompts, 6)
    assert together == [continuations(adapter.model, base, [prompt], 6)[0] for prompt in prompts]
    assert base.tokenizer.decode(together[1], skip_special_tokens=True) == complete(
        base, adapter.model, PAIRS[1].prompt, 6
    )


def test_generated_text_is_judged_against_the_completion(base, adapter, rows):
    losses = objective(generated(), base, rows)(adapter.model, every(rows))
    said = [complete(base, adapter.model, pair.prompt, 6) for pair in PAIRS]
    scores = [token_f1(text, pair.completion) for text, pair in zip(said, PAIRS, strict=True)]
    assert losses.sums.tolist() == [1 - score for score in scores]
    assert losses.counts.tolist() == [1, 1, 1]
    exact = objective(generated("exact-match"), base, rows)(adapter.model, every(rows))
    assert set(exact.sums) <= {0.0, 1.0}


def count_vowels(prompts, completions):
    assert list(prompts) == [pair.prompt for pair in PAIRS][: len(prompts)] or len(prompts) > 3
    return [sum(letter in "aeiou" for letter in completion) / 10 for completion in completions]


def test_both_signs_in_one_pass_say_what_they_say_one_by_one(base, adapter, rows):
    loss = objective(generated("callable", score="count_vowels"), base, rows, count_vowels)
    batch = every(rows)
    with side_by_side(adapter, 2):
        together = loss(adapter.model, stacked([batch, batch]))
    first = loss(adapter.model, batch)
    adapter.views[0].copy_(adapter.views[1])
    second = loss(adapter.model, batch)
    assert together.sums.tolist() == [*first.sums, *second.sums]
    assert not np.array_equal(first.sums, second.sums), "the views say different things"


def probe_with(adapter, rows, loss, **more):
    return Probe(
        adapter, rows, key=(3, 4), epsilon=0.1, directions=4, batch_size=3, seed=1, objective=loss, **more
    )


def test_a_probe_votes_by_what_is_said_alone(base, adapter, rows, monkeypatch):
    """No cross-entropy is taken on the way: the model's logits are seen by its own greedy choice only."""
    loss = objective(generated("callable", score="vowels"), base, rows, count_vowels)
    monkeypatch.setattr("node.losses.cross_entropy", None)
    weights = np.random.default_rng(2).integers(-(2**25), 2**25, adapter.size).astype(np.int32)
    found = [
        probe_with(adapter, rows, loss, at_once=at_once).probe(weights, 0, 1, -3) for at_once in (0, 1, 4)
    ]
    assert found[0].codes.any()
    for each in found[1:]:
        assert np.array_equal(each.codes, found[0].codes)
        assert each.loss == found[0].loss


def test_a_score_that_is_not_finite_is_no_vote(base, adapter, rows):
    answers = iter([[1.0] * 3] * 3 + [[1.0, math.nan, 1.0]] + [[1.0] * 3] * 3 + [[-math.inf] * 3])
    warnings = []
    loss = objective(generated("callable", score="s"), base, rows, lambda *_: next(answers), warnings.append)
    weights = np.zeros(adapter.size, np.int32)
    probed = probe_with(adapter, rows, loss).probe(weights, 0, 1, 0)
    assert list(probed.codes == NO_VOTE) == [False, True, False, True]
    assert probed.num_no_votes == 2
    assert probed.loss == 0.0
    assert len(warnings) == 1


def test_a_callable_belongs_to_a_run_that_asks_for_one(base, rows):
    with pytest.raises(
        ScoreError, match=r"a callable that every node has of its own, 'rouge': name yours with --score"
    ):
        objective(generated("callable", score="rouge"), base, rows)
    with pytest.raises(ScoreError, match="objective is token-f1; --score is for runs"):
        objective(generated(), base, rows, count_vowels)
    assert objective(Task(), base, rows) is row_losses


def test_prompts_that_leave_no_room_are_said(base, rows):
    limit = base.max_sequence_length
    task = Task(kind="completion", objective="exact-match", max_new_tokens=limit - 2)
    with pytest.raises(DataError, match=rf"and {limit - 2} more do not fit into the {limit} of the base"):
        objective(task, base, rows)


def test_a_batch_keeps_its_texts_in_the_order_of_its_rows(rows):
    batch = stacked([rows.take(np.array([2, 0])), rows.take(np.array([1]))])
    assert batch.pairs == (PAIRS[2], PAIRS[0], PAIRS[1])
    assert Batch(batch.tokens).pairs == ()


def test_evaluate_says_the_score_beside_the_loss(base, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in PAIRS))

    def evaluated(*options):
        command = ["evaluate", "--data", str(file), "--task", "completion", "--threads", "1", *options]
        return CliRunner().invoke(cli.app, command)

    shown = json.loads(evaluated("--objective", "exact-match", "--max-new-tokens", "2", "--json").stdout)
    assert shown["objective"] == "exact-match"
    assert shown["score"] == 0.0
    assert shown["loss"] > 0
    assert ", accuracy 0." in evaluated("--objective", "accuracy").stdout
    assert ", builtins:print" not in evaluated().stdout
    wrong = evaluated("--score", "builtins:print")
    assert (wrong.exit_code, "the score failed on the prompt" in wrong.stderr) == (3, True)
    wrong = evaluated("--objective", "callable")
    assert (wrong.exit_code, "do not go together" in wrong.stderr) == (3, True)
