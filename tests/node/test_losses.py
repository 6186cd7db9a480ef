"""Losses: the standard ones, of each row by itself, and over everything scored alike."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from node import embedded
from node.adapter import Adapter
from node.base import load_base
from node.data import Batch, Windows
from node.losses import evaluate, mean_loss, row_losses


@pytest.fixture(scope="module")
def adapter():
    base = load_base(embedded.path(), threads=1)
    return Adapter(base, key=(17, 4), targets=("q_proj", "up_proj"), rank=2, alpha=4, train="B")


@pytest.fixture(scope="module")
def windows():
    tokens = np.random.default_rng(0).integers(2, 500, (11, 24)).astype(np.int32)
    return Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0)


@pytest.fixture(scope="module")
def weights(adapter):
    return np.random.default_rng(1).integers(-(2**24), 2**24, adapter.size).astype(np.int32)


def test_the_loss_is_that_of_the_library(adapter, windows):
    ids = torch.from_numpy(windows.tokens.astype(np.int64))
    with torch.inference_mode():
        expected = float(adapter.model(input_ids=ids, labels=ids).loss)
    assert mean_loss(adapter.model, Batch(ids.numpy())) == pytest.approx(expected, rel=1e-6)


def test_the_last_token_counts_and_the_future_is_not_seen(adapter, windows):
    tokens = windows.tokens[:1].astype(np.int64)
    changed = tokens.copy()
    changed[0, -1] = 1 + tokens[0, -1]
    ids = torch.from_numpy(tokens)
    with torch.inference_mode():
        logits = adapter.model(input_ids=ids).logits[0]
    losses = [float(cross_entropy(logits[:-1], torch.from_numpy(each[0, 1:]))) for each in (tokens, changed)]
    assert losses[0] != losses[1]
    assert mean_loss(adapter.model, Batch(tokens)) == pytest.approx(losses[0], rel=1e-6)
    assert mean_loss(adapter.model, Batch(changed)) == pytest.approx(losses[1], rel=1e-6)


def test_evaluation_weighs_every_window_alike(adapter, windows, weights):
    seen = []
    loss = evaluate(adapter, weights, windows, batch_size=4, progress=lambda *done: seen.append(done))
    each = [mean_loss(adapter.model, windows.take(np.array([i]))) for i in range(11)]
    assert loss == pytest.approx(float(np.mean(each)), rel=1e-6)
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_evaluation_is_at_the_given_weights(adapter, windows, weights):
    first = evaluate(adapter, weights, windows, batch_size=4)
    assert evaluate(adapter, np.zeros_like(weights), windows, batch_size=4) != first
    assert evaluate(adapter, weights, windows, batch_size=4) == first


def test_a_row_has_its_own_loss_whatever_is_beside_it(adapter, windows):
    tokens = windows.tokens.astype(np.int64)
    scored = np.random.default_rng(2).random(tokens.shape) < 0.3
    scored[:, 1] = True
    together = row_losses(adapter.model, Batch(tokens, scored))
    assert np.array_equal(together.counts, scored[:, 1:].sum(1))
    for i in range(len(tokens)):
        alone = row_losses(adapter.model, Batch(tokens[i : i + 1], scored[i : i + 1]))
        assert together.sums[i] == pytest.approx(alone.sums[0], rel=1e-5)
        assert together.counts[i] == alone.counts[0]
    assert together.mean == pytest.approx(together.sums.sum() / scored[:, 1:].sum())
