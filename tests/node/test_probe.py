"""Probing: the slope is the gradient's, and what leaves is exact from there on."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from node import embedded, probe
from node.adapter import Adapter
from node.base import load_base
from node.data import Windows, batch
from node.losses import RowLosses, mean_loss
from node.probe import Probe
from zo import reference
from zo.codes import NO_VOTE, coefficients, encode
from zo.directions import Direction, stack
from zo.manifest import Directions
from zo.naming import Naming
from zo.spsa import one_sided, two_sided
from zo.weights import to_float

KEY = (17, 4)
EPSILON = 2.0**-7
NODE = 3
EXPONENT = -6


@pytest.fixture(scope="module")
def adapter():
    base = load_base(embedded.path(), threads=1)
    return Adapter(base, key=KEY, targets=("q_proj", "up_proj"), rank=2, alpha=4, train="B")


@pytest.fixture(scope="module")
def windows():
    tokens = np.random.default_rng(0).integers(2, 500, (11, 24)).astype(np.int32)
    return Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0)


@pytest.fixture(scope="module")
def weights(adapter):
    entries = np.random.default_rng(1).integers(-(2**24), 2**24, adapter.size).astype(np.int32)
    entries.flags.writeable = False
    return entries


def make_probe(adapter, windows, directions=3, **changes):
    settings = {
        "key": KEY,
        "epsilon": EPSILON,
        "directions": directions,
        "batch_size": 4,
        "seed": 9,
    } | changes
    return Probe(adapter, windows, **settings)


def test_the_projected_gradient_is_the_directional_derivative_of_autograd(adapter, windows, weights):
    drawn = batch(windows, 4, 9, 0)
    adapter.load(to_float(weights))
    parameters = {
        p.name: adapter.model.get_submodule(p.name.removesuffix(".lora_B")).lora_B["default"].weight
        for p in adapter.layout.parameters
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        ids = torch.from_numpy(drawn.tokens)
        logits = adapter.model(input_ids=ids[:, :-1], use_cache=False).logits
        cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradient = np.concatenate([parameters[p.name].grad.ravel() for p in adapter.layout.parameters])
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    directions = [Direction(NODE, sample) for sample in range(8)]
    expected = [float(gradient @ reference.perturbation(KEY, d, adapter.size)) for d in directions]

    def slope(direction):
        plus, minus = reference.perturbed(weights, KEY, direction, EPSILON)
        adapter.load(plus)
        above = mean_loss(adapter.model, drawn)
        adapter.load(minus)
        return (above - mean_loss(adapter.model, drawn)) / (2 * EPSILON)

    measured = [slope(direction) for direction in directions]
    assert np.allclose(measured, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())


def test_a_code_is_the_encoded_slope_between_both_views_on_one_batch(adapter, windows, weights):
    result = make_probe(adapter, windows).probe(weights, 5, NODE, EXPONENT, agent=1)
    gradients, losses = [], []
    for sample in (15, 16, 17):
        drawn = batch(windows, 4, 9 + 2**64, sample)  # agent 1 sees batches of its own
        pair = []
        for view in reference.perturbed(weights, KEY, Direction(NODE, sample, 1), EPSILON):
            adapter.load(view)
            pair.append(mean_loss(adapter.model, drawn))
        gradients.append((pair[0] - pair[1]) / (2 * EPSILON))
        losses.append(sum(pair) / 2)
    rng = np.random.default_rng([9 + 2**64, 5, probe.ROUNDING_STREAM])
    assert np.array_equal(result.codes, encode(np.array(gradients), EXPONENT, rng))
    assert result.codes.any()
    assert result.loss == pytest.approx(
        np.mean(losses), rel=1e-14
    )  # of a mean of means the last digit may differ
    assert result.num_no_votes == 0
    assert 0 < result.forward_seconds <= result.seconds


@pytest.mark.parametrize("sides", [1, 2])
def test_with_local_steps_every_part_is_measured_where_the_codes_before_it_lead(
    adapter, windows, weights, sides
):
    step, settings = 2**15, {"directions": 4, "sides": sides}
    probed = make_probe(adapter, windows, local_steps=2, **settings).probe(
        weights, 5, NODE, EXPONENT, walk_step=step
    )
    names = [Direction(NODE, sample) for sample in range(20, 24)]
    plain, rng = (
        make_probe(adapter, windows, **settings),
        np.random.default_rng([9, 5, probe.ROUNDING_STREAM]),
    )

    def codes_of(at, part):
        losses = plain.losses(at, part, sides)
        return encode(
            one_sided(losses[:, 0], EPSILON) if sides == 1 else two_sided(losses, EPSILON), EXPONENT, rng
        )

    first = codes_of(weights, names[:2])
    moved = reference.apply(weights, KEY, stack(names[:2]), coefficients(first, step))
    assert not np.array_equal(moved, weights)
    assert np.array_equal(probed.codes, np.concatenate([first, codes_of(moved, names[2:])]))


def test_one_sided_all_directions_of_a_round_meet_one_batch(adapter, windows, weights):
    probed = make_probe(adapter, windows, sides=1).probe(weights, 5, NODE, EXPONENT, agent=1)
    drawn = batch(windows, 4, 9 + 2**64, 15)
    losses = []
    for sample in (15, 16, 17):
        adapter.load(reference.perturbed(weights, KEY, Direction(NODE, sample, 1), EPSILON)[0])
        losses.append(mean_loss(adapter.model, drawn))
    gradients = (np.array(losses) - np.mean(losses)) / EPSILON * 1.5
    rng = np.random.default_rng([9 + 2**64, 5, probe.ROUNDING_STREAM])
    assert np.array_equal(probed.codes, encode(gradients, EXPONENT, rng))
    assert probed.codes.any()
    assert probed.loss == float(np.mean(losses))


def test_a_round_probed_again_gives_the_same_codes(adapter, windows, weights):
    first = make_probe(adapter, windows).probe(weights, 5, NODE, EXPONENT)
    after_others = make_probe(adapter, windows)
    for number in range(3):
        after_others.probe(weights, number, NODE, EXPONENT)
    assert np.array_equal(after_others.probe(weights, 5, NODE, EXPONENT).codes, first.codes)


@pytest.mark.parametrize(
    ("number", "node", "agent", "seed"), [(6, 3, 0, 9), (5, 4, 0, 9), (5, 3, 1, 9), (5, 3, 0, 10)]
)
def test_round_node_agent_and_seed_all_count(adapter, windows, weights, number, node, agent, seed):
    one = make_probe(adapter, windows, directions=6).probe(weights, 5, NODE, -10)
    other = make_probe(adapter, windows, directions=6, seed=seed).probe(weights, number, node, -10, agent)
    assert not np.array_equal(one.codes, other.codes)


def test_the_exponent_scales_the_codes(adapter, windows, weights):
    fine = make_probe(adapter, windows).probe(weights, 0, NODE, -6).codes.astype(int)
    coarse = make_probe(adapter, windows).probe(weights, 0, NODE, -4).codes.astype(int)
    assert np.abs(fine - 4 * coarse).max() <= 4


def said(*losses):
    """An objective that says these, one after the other, instead of asking the model."""
    each = iter(losses)
    return lambda *_: RowLosses(np.array([next(each)]), np.array([1]))


def test_a_loss_that_is_not_finite_is_no_vote_and_is_counted(adapter, windows, weights):
    objective = said(3.0, 2.5, math.nan, 2.0, 1.0, math.inf)
    result = make_probe(adapter, windows, objective=objective).probe(weights, 0, NODE, 0)
    assert list(result.codes == NO_VOTE) == [False, True, True]
    assert result.num_no_votes == 2
    assert result.loss == 2.125


def test_a_round_without_any_finite_loss_is_all_no_votes(adapter, windows, weights):
    result = make_probe(adapter, windows, objective=said(*[math.nan] * 6)).probe(weights, 0, NODE, 0)
    assert list(result.codes) == [NO_VOTE] * 3
    assert math.isnan(result.loss)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_views_side_by_side_have_the_losses_they_have_one_by_one(adapter, windows, weights, at_once, sides):
    names = [Direction(NODE, sample) for sample in range(3)]

    def losses(at_once):
        return make_probe(adapter, windows, at_once=at_once).losses(weights, names, sides)

    assert np.allclose(losses(at_once), losses(0), rtol=1e-6, atol=0)
    one_by_one, together = (
        make_probe(adapter, windows, at_once=each, sides=sides).probe(weights, 5, NODE, EXPONENT)
        for each in (0, at_once)
    )
    assert (
        np.abs(one_by_one.codes.astype(int) - together.codes).max() <= 1
    )  # where the last digit turns the rounding
    assert together.loss == pytest.approx(one_by_one.loss, rel=1e-6)


def most_bytes(work):
    """How much memory torch holds at most while this is done, beyond what it held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(np.cumsum([event.nbytes() for event in events]))


def test_a_probe_needs_inference_and_twelve_bytes_per_parameter(windows):
    """The integer weights, held by the caller, are four of these, two views eight. Stacked: a batch for each view."""
    base = load_base(embedded.path(), threads=1)
    adapter = Adapter(base, key=KEY, targets=("q_proj", "up_proj", "down_proj"), rank=8, alpha=8, train="AB")
    weights = np.zeros(adapter.size, np.int32)
    drawn = batch(windows, 4, 9, 0)
    mean_loss(adapter.model, drawn)
    inference = most_bytes(lambda: mean_loss(adapter.model, drawn))
    names = [Direction(NODE, sample) for sample in range(4)]
    slack = 0.01 * inference
    for at_once in (0, 1, 2):
        adapter.hold(1)
        probe = make_probe(adapter, windows, at_once=at_once)
        found = most_bytes(lambda probe=probe: probe.losses(weights, names, 2))
        num_views, num_batches = 2 * max(at_once, 1), max(2 * at_once, 1)
        assert found <= num_batches * inference + 4 * num_views * adapter.size + slack
        assert found >= inference + 4 * num_views * adapter.size - slack, (
            "the measurement sees views and activations"
        )
    assert weights.nbytes + 4 * 2 * adapter.size == 12 * adapter.size
    assert np.shares_memory(adapter.views.numpy(), adapter.host), "a view is written where the model reads it"


def test_a_model_that_overflows_gives_no_votes(adapter, windows, weights):
    embedding = adapter.model.get_input_embeddings().weight
    before = embedding[2:].clone()
    embedding[2:] = math.nan
    try:
        result = make_probe(adapter, windows).probe(weights, 0, NODE, EXPONENT)
    finally:
        embedding[2:] = before
    assert result.num_no_votes == 3


def test_a_direction_of_a_pool_meets_another_batch_each_time(adapter, windows, weights, monkeypatch):
    """By the index it would always meet the same rows: the batch follows from the sample that drew it."""
    policy = Directions(policy="pool", pool_size=2)
    probe = make_probe(adapter, windows, directions=8, naming=Naming(policy, KEY))
    drawn = []
    monkeypatch.setattr(
        "node.probe.batch", lambda *arguments: drawn.append(arguments[-1]) or batch(*arguments)
    )
    probed = probe.probe(weights, 2, NODE, EXPONENT)
    assert drawn == list(range(16, 24))
    names = probe.naming.of_round(NODE, range(16, 24))
    assert {name.sample for name in names} == {0, 1}
    losses = probe.losses(weights, names, 2)
    slopes = (losses[:, 0] - losses[:, 1]) / (2 * EPSILON)
    rng = np.random.default_rng([9, 2, 1])
    assert np.array_equal(probed.codes, encode(slopes, EXPONENT, rng))


def test_a_second_side_makes_no_pass_larger_than_was_tried(adapter, windows, weights):
    """One-sided slopes are watched for curvature on both sides: half as many directions share such a pass."""
    probe = make_probe(adapter, windows, directions=4, sides=1, at_once=4)
    adapter.hold(1)
    names = [Direction(NODE, sample) for sample in range(4)]
    one = probe.losses(weights, names, 1)
    views = len(adapter.views)
    both = probe.losses(weights, names, 2, is_shared=True)
    assert len(adapter.views) == views
    assert both[:, 0] == pytest.approx(one[:, 0], rel=1e-5)
