"""The projected gradient against losses whose slope is known."""

import numpy as np
import pytest

from zo import reference
from zo.codes import NO_VOTE, encode
from zo.directions import Direction
from zo.spsa import finite_mean, one_sided, projected_gradients, two_sided
from zo.weights import from_float, to_float

KEY = (5, 6)
DIRECTION = Direction(1, 2)


def test_a_linear_loss_has_its_exact_slope():
    rng = np.random.default_rng(0)
    slope = rng.normal(size=500)
    weights = from_float(rng.normal(size=500))
    (g,), mean_loss = projected_gradients(lambda v: float(slope @ v), weights, KEY, [DIRECTION], 1e-2)
    z = reference.perturbation(KEY, DIRECTION, 500)
    assert g == pytest.approx(float(slope @ z), rel=1e-4)
    assert mean_loss == pytest.approx(float(slope @ to_float(weights)), rel=1e-4)


def test_a_quadratic_loss_has_no_bias_from_its_curvature():
    rng = np.random.default_rng(1)
    weights = from_float(rng.normal(size=300))
    z = reference.perturbation(KEY, DIRECTION, 300)
    (g,), _ = projected_gradients(
        lambda v: float(np.sum(v.astype(np.float64) ** 2)), weights, KEY, [DIRECTION], 0.1
    )
    assert g == pytest.approx(float(2 * to_float(weights).astype(np.float64) @ z), rel=1e-4)


def test_the_loss_sees_both_views_and_the_weights_are_never_touched():
    weights = from_float(np.linspace(-1, 1, 50))
    before = weights.copy()
    weights.flags.writeable = False
    seen = []
    projected_gradients(lambda v: seen.append(v.copy()) or 0.0, weights, KEY, [DIRECTION], 0.25)
    plus, minus = reference.perturbed(before, KEY, DIRECTION, 0.25)
    assert np.array_equal(seen[0], plus)
    assert np.array_equal(seen[1], minus)
    assert np.array_equal(weights, before)


def test_a_loss_that_writes_to_its_view_changes_nothing_but_the_view():
    weights = from_float(np.linspace(-1, 1, 50))

    def greedy(values):
        loss = float(values.sum())
        values[:] = 1e9
        return loss

    once = projected_gradients(greedy, weights, KEY, [DIRECTION], 0.25)
    assert once == projected_gradients(lambda v: float(v.sum()), weights, KEY, [DIRECTION], 0.25)


def test_several_directions_equal_one_at_a_time():
    weights = from_float(np.random.default_rng(2).normal(size=200))
    names = [Direction(3, sample) for sample in range(5)]
    loss = lambda v: float(np.cos(v).sum())  # noqa: E731
    gradients, mean_loss = projected_gradients(loss, weights, KEY, names, 1e-2)
    single = [projected_gradients(loss, weights, KEY, [name], 1e-2) for name in names]
    assert gradients.tolist() == [g for (g,), _ in single]
    assert mean_loss == pytest.approx(np.mean([mean for _, mean in single]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_becomes_no_vote(value):
    weights = from_float(np.zeros(10))
    losses = iter([1.0, 3.0, value, 2.0, value, value])
    names = [Direction(0, sample) for sample in range(3)]
    gradients, mean_loss = projected_gradients(lambda _: next(losses), weights, KEY, names, 0.5)
    assert gradients[0] == -2.0
    assert encode(gradients, 0, np.random.default_rng(0)).tolist() == [-2, NO_VOTE, NO_VOTE]
    assert mean_loss == 2.0


def test_no_finite_loss_has_no_mean():
    weights = from_float(np.zeros(3))
    _, mean_loss = projected_gradients(lambda _: float("nan"), weights, KEY, [DIRECTION], 0.5)
    assert np.isnan(mean_loss)


FOUR = [Direction(3, sample) for sample in range(4)]


def above(loss, weights, names, epsilon):
    """loss(weights + εz) of every direction."""
    return np.array([loss(reference.perturbed(weights, KEY, name, epsilon)[0]) for name in names])


def test_one_sided_slopes_of_a_linear_loss_differ_by_its_slopes_and_add_up_to_nothing():
    rng = np.random.default_rng(0)
    slope = rng.normal(size=500)
    weights = from_float(rng.normal(size=500))
    losses = above(lambda values: float(slope @ values), weights, FOUR, 2.0**-7)
    gradients = one_sided(losses, 2.0**-7)
    exact = np.array([slope @ reference.perturbation(KEY, each, 500) for each in FOUR])
    assert gradients == pytest.approx((exact - exact.mean()) * 4 / 3, rel=1e-3)
    assert gradients.sum() == pytest.approx(0, abs=1e-9)


def test_one_sided_slopes_are_unbiased_and_free_of_what_every_direction_shares():
    """Their product with z averages to the gradient, although curvature adds more to each loss than the slope does."""
    rng = np.random.default_rng(1)
    slope, curvature = rng.normal(size=8), 100 * rng.random(8)
    weights = from_float(np.zeros(8))
    total, rounds = np.zeros(8), 4000
    for number in range(rounds):
        names = [Direction(0, 3 * number + i) for i in range(3)]
        losses = above(lambda v: float(slope @ v + curvature @ v**2), weights, names, 0.25)
        gradients = one_sided(losses, 0.25)
        for gradient, name in zip(gradients, names, strict=True):
            total += gradient * reference.perturbation(KEY, name, 8)
    assert total / (3 * rounds) == pytest.approx(slope, abs=0.15)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_sided_a_loss_that_is_not_finite_counts_in_no_mean(value):
    losses = np.array([1.0, value, 3.0, 2.0])
    gradients = one_sided(losses, 0.5)
    assert encode(gradients, 0, np.random.default_rng(0)).tolist() == [-3, NO_VOTE, 3, 0]
    assert finite_mean(losses) == 2.0
    assert not np.isfinite(one_sided(np.array([value, value, 3.0, value]), 0.5)).any()


def test_one_direction_has_no_mean_to_be_compared_with():
    with pytest.raises(ValueError, match="at least 2 directions, got 1"):
        one_sided(np.zeros(1), 0.5)


@pytest.mark.parametrize(("slopes", "shape"), [(two_sided, (4, 2)), (one_sided, (4,))])
@pytest.mark.parametrize("epsilon", [0.0, -1e-3, float("nan"), float("inf")])
def test_epsilon_must_be_positive(slopes, shape, epsilon):
    with pytest.raises(ValueError, match="epsilon must be a positive number"):
        slopes(np.zeros(shape), epsilon)
