"""What a node tries first: views share a pass where that is faster and changes nothing; a drowned epsilon is said."""

import math

import numpy as np
import pytest

from node import embedded, rehearsal
from node.adapter import Adapter
from node.base import load_base
from node.completions import arrange, completion_ids, prompt_ids
from node.data import Pair, Windows
from node.losses import RowLosses, row_losses
from node.objectives import Judged
from node.probe import Probe
from node.rehearsal import rehearse

EPSILON = 0.01


@pytest.fixture(scope="module")
def adapter():
    base = load_base(embedded.path(), threads=1)
    return Adapter(base, key=(1, 2), targets=("q_proj", "up_proj"), rank=2, alpha=4, train="B")


class Clock:
    """Time that passes in forward passes alone: `cost` seconds for one, by the rows in it."""

    def __init__(self, cost):
        self.now = 0.0
        self.passes = []
        self.cost = cost

    def __call__(self):
        return self.now

    def measure(self, model, batch):
        self.now += self.cost(len(batch.tokens))
        self.passes.append(len(batch.tokens))
        return row_losses(model, batch)


def make_probe(adapter, objective=row_losses, directions=1, epsilon=EPSILON, length=16, sides=2):
    tokens = np.random.default_rng(0).integers(2, 500, (6, length)).astype(np.int32)
    windows = Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0)
    return Probe(
        adapter,
        windows,
        key=(1, 2),
        epsilon=epsilon,
        directions=directions,
        batch_size=1,
        seed=3,
        sides=sides,
        objective=objective,
    )


def at_start(adapter):
    return np.zeros(adapter.size, np.int32)


def rehearsed(adapter, cost, at_once=None, **settings):
    clock = Clock(cost)
    probe = make_probe(adapter, clock.measure, **settings)
    found = rehearse(probe, at_start(adapter), at_once, clock)
    assert probe.at_once == found.at_once
    # As many as a round needs and no more; the kernel always makes both of a direction, one-sided into one to spare.
    assert len(adapter.views) == probe.sides * max(found.at_once, 1) + (2 - probe.sides)
    return found, clock


@pytest.mark.parametrize(
    ("cost", "directions", "at_once", "ratio"),
    [
        (lambda rows: 1.0, 1, 1, 2),  # reading the weights is all that takes time
        (lambda rows: 1.0, 7, 4, 8),
        (lambda rows: 1.0, 8, 8, 16),
        (lambda rows: float(rows), 8, 0, 1),  # arithmetic is
        (lambda rows: 1.0 + max(0, rows - 2), 8, 1, 2),  # both signs are free, more is not
    ],
)
def test_what_is_fastest_is_chosen(adapter, cost, directions, at_once, ratio):
    found, _ = rehearsed(adapter, cost, directions=directions)
    assert (found.at_once, found.ratio) == (at_once, ratio)
    assert found.seconds == 2 / ratio
    how = {
        0: "one view in a forward pass, 2 s",
        1: "both views in one",
        8: "both views of 8 directions in one",
    }
    assert str(found).startswith(how.get(at_once, "both views of 4 directions in one"))


def test_one_sided_views_of_several_directions_share_a_pass(adapter):
    found, _ = rehearsed(adapter, lambda rows: 1.0, directions=4, sides=1)
    assert (found.at_once, found.ratio, found.seconds) == (4, 4, 0.25)
    assert str(found).startswith("the view of 4 directions in one forward pass, 4.00 times")


def test_what_was_asked_for_is_kept_though_it_is_slower(adapter):
    found, _ = rehearsed(adapter, float, at_once=2, directions=8)
    assert (found.at_once, found.ratio) == (2, 1)
    found, clock = rehearsed(adapter, lambda rows: 1.0, at_once=0, directions=8)
    assert (found.at_once, found.ratio) == (0, 1)
    assert set(clock.passes) == {1}


def test_a_pass_is_never_larger_than_it_may_be(adapter, monkeypatch):
    monkeypatch.setattr(rehearsal, "MAX_TOKENS", 4 * 16)
    found, clock = rehearsed(adapter, lambda rows: 1.0, directions=8)
    assert (found.at_once, max(clock.passes)) == (2, 4)
    monkeypatch.setattr(rehearsal, "MAX_TOKENS", 4096)
    monkeypatch.setattr(rehearsal, "MAX_VIEWS_BYTES", 8 * adapter.size)
    found, clock = rehearsed(adapter, lambda rows: 1.0, directions=8)
    assert (found.at_once, max(clock.passes)) == (1, 2)


def test_slow_machines_try_fewer_directions(adapter):
    counts = {
        cost: len(rehearsed(adapter, lambda _, cost=cost: cost)[1].passes) for cost in (0.1, 2.0, 100.0)
    }
    assert counts[0.1] > counts[2.0] > counts[100.0]
    assert rehearsed(adapter, lambda _: 100.0)[0].num_directions == 1


def test_a_model_whose_rows_depend_on_each_other_is_not_stacked(adapter):
    def mixed(model, batch):
        losses = row_losses(model, batch)
        return RowLosses(losses.sums[::-1].copy(), losses.counts)

    found = rehearse(make_probe(adapter, mixed), at_start(adapter))
    assert found.at_once == 0
    assert "this model mixes the rows of a batch" in str(found)


@pytest.mark.parametrize("at_once", [None, 1])
def test_where_all_that_is_said_scores_the_same_views_have_passes_of_their_own(at_once):
    """Equal scores do not prove that the same was said."""
    base = load_base(embedded.path(), threads=1)
    tuned = Adapter(base, key=(1, 2), targets=("up_proj",), rank=2, alpha=64, train="B")
    pair = Pair("Return the", " number")
    ids = prompt_ids(base.tokenizer, pair.prompt), completion_ids(base.tokenizer, pair)
    judged = {
        "never right": lambda pairs, said: [0.0] * len(said),
        "as is said": lambda pairs, said: [sum(map(ord, text)) / 1000 for text in said],
    }
    found = {}
    for name, judge in judged.items():
        probe = Probe(
            tuned,
            arrange([pair], [ids], 32),
            key=(1, 2),
            epsilon=EPSILON,
            directions=1,
            batch_size=1,
            seed=3,
            objective=Judged(base, 8, judge),
        )
        found[name] = rehearse(probe, at_start(tuned), at_once)
    assert found["never right"].at_once == 0
    assert "all that is said scores the same" in str(found["never right"])
    assert found["as is said"].why_not == ""


def test_a_pass_that_fails_only_when_stacked_is_not_stacked(adapter):
    def narrow(model, batch):
        if len(batch.tokens) > 1:
            raise RuntimeError("shape '[2, -1, 16]' is invalid\nmore")
        return row_losses(model, batch)

    found = rehearse(make_probe(adapter, narrow), at_start(adapter))
    assert found.at_once == 0
    assert "several fail: shape '[2, -1, 16]' is invalid)" in str(found)


def test_float32_has_next_to_no_noise_and_a_good_epsilon_no_warning(adapter):
    found = rehearse(make_probe(adapter), at_start(adapter))
    assert found.repeat == 0
    assert 0 < found.unevenness < 0.01 * found.signal
    assert found.warning == ""


def test_an_epsilon_that_drowns_is_said_with_figures(adapter):
    found = rehearse(make_probe(adapter, epsilon=1e-7), at_start(adapter))
    assert "epsilon = 1e-07 drowns in noise here: L+ - L- is" in found.warning
    assert f"(RMS of 4 directions), and off by {found.noise:.2g}" in found.warning


def test_noise_between_equal_passes_counts(adapter):
    rng = np.random.default_rng(5)

    def noisy(model, batch):
        losses = row_losses(model, batch)
        return RowLosses(losses.sums + rng.normal(size=len(losses.sums)), losses.counts)

    found = rehearse(make_probe(adapter, noisy), at_start(adapter))
    assert found.repeat > 0.01
    assert "drowns" in found.warning


@pytest.mark.parametrize(
    ("sums", "words"),
    [(1.0, "is too small here: L+ = L- in each of 4"), (math.nan, "not every loss is finite")],
)
def test_a_loss_that_says_nothing_is_said(adapter, sums, words):
    def flat(model, batch):
        return RowLosses(np.full(len(batch.tokens), sums), np.ones(len(batch.tokens), np.int64))

    assert words in rehearse(make_probe(adapter, flat), at_start(adapter)).warning
