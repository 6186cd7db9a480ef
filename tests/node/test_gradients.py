"""Exact slopes: what differences of losses come to as ε gets small, in every form of a base."""

import numpy as np
import pytest

from node import embedded
from node.adapter import Adapter
from node.base import load_base
from node.data import LabelledBatch, Windows, batch
from node.estimators import EstimatorError
from node.gradients import Gradients
from node.losses import mean_loss
from zo import reference
from zo.directions import Direction
from zo.weights import to_float

KEY = (17, 4)
EPSILON = 2.0**-8
NAMES = [Direction(3, sample) for sample in range(4)]


def adapted(quantize="none", targets=("q_proj", "v_proj", "down_proj"), labels=None):
    base = load_base(embedded.path(), threads=1, quantize=quantize, labels=labels)
    return Adapter(base, key=KEY, targets=targets, rank=2, alpha=4, train="AB")


def drawn(size=4):
    tokens = np.random.default_rng(0).integers(2, 500, (11, 24)).astype(np.int32)
    return batch(Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0), size, 9, 0)


def by_differences(adapter, weights, rows):
    slopes = []
    for name in NAMES:
        losses = []
        for view in reference.perturbed(weights, KEY, name, EPSILON):
            adapter.load(view)
            losses.append(mean_loss(adapter.model, rows))
        slopes.append((losses[0] - losses[1]) / (2 * EPSILON))
    return np.array(slopes)


def weights_of(adapter):
    return np.random.default_rng(1).integers(-(2**23), 2**23, adapter.size).astype(np.int32)


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_both_are_what_differences_come_to_in_every_form_of_a_base(quantize):
    adapter, rows = adapted(quantize), drawn()
    weights = weights_of(adapter)
    before = mean_loss_at(adapter, weights, rows)
    gradients = Gradients(adapter)
    assert mean_loss_at(adapter, weights, rows) == pytest.approx(before, rel=0.01)
    expected = by_differences(adapter, weights, rows)
    values = to_float(weights)
    loss, gradient = gradients.gradient(values, rows)
    assert loss == pytest.approx(mean_loss_at(adapter, weights, rows), rel=1e-5)
    assert gradient.dtype == np.float32
    exact = [gradient @ reference.perturbation(KEY, name, adapter.size) for name in NAMES]
    assert np.allclose(exact, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())
    for name, slope in zip(NAMES, exact, strict=True):
        found = gradients.slope(values, reference.perturbation(KEY, name, adapter.size), rows)
        assert found == pytest.approx((loss, slope), rel=1e-3, abs=1e-3)


def mean_loss_at(adapter, weights, rows):
    adapter.load(to_float(weights))
    return mean_loss(adapter.model, rows)


def test_the_gradient_of_a_head_and_what_is_below():
    adapter = adapted(targets=("q_proj",), labels=("a", "b", "c"))
    plain = drawn()
    rows = LabelledBatch(
        tokens=plain.tokens,
        lengths=np.array([24, 20, 9, 24]),
        labels=np.array([0, 2, 1, 1]),
        words=None,
        padding=0,
    )
    weights = weights_of(adapter)
    expected = by_differences(adapter, weights, rows)
    _, gradient = Gradients(adapter).gradient(to_float(weights), rows)
    exact = [gradient @ reference.perturbation(KEY, name, adapter.size) for name in NAMES]
    assert np.allclose(exact, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())


def test_what_has_no_derivative_is_named(monkeypatch):
    adapter = adapted()
    gradients = Gradients(adapter)

    def without(*_, **__):
        raise NotImplementedError(
            "Trying to use forward AD with _fused that does not support it\nPlease file"
        )

    monkeypatch.setattr(adapter.model, "forward", without)
    values = to_float(weights_of(adapter))
    with pytest.raises(
        EstimatorError, match=r"no forward derivative here: Trying .* support it\. Join with --est"
    ):
        gradients.slope(values, np.ones(adapter.size, np.int8), drawn())
    with pytest.raises(EstimatorError, match=r"no gradient here: "):
        gradients.gradient(values, drawn())
