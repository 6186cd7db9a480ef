"""The accountant agrees with closed forms that need no library."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from node.accountant import Cost, epsilon, noise_for, num_affordable

DELTA = 1e-5


def converted(divergences, delta):
    """Canonne, Kamath and Steinke 2020, proposition 12, over {order: divergence}."""
    return min(
        divergence + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a, divergence in divergences.items()
    )


@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (5.0, 10), (40.0, 1000), (80.0, 16_000)])
def test_without_sampling_epsilon_is_that_of_the_gaussian_mechanism(noise, count):
    """Mironov 2017, corollary 3: α / 2σ² for one release."""
    fine = converted({a: count * a / (2 * noise**2) for a in np.arange(1.02, 400, 0.01)}, DELTA)
    found = epsilon({Cost(1.0, noise): count}, DELTA)
    assert fine <= found * (1 + 1e-9)
    assert found <= 1.02 * fine


@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (5.0, 10), (40.0, 1000)])
def test_without_sampling_epsilon_is_never_below_the_exact_one(noise, count):
    """Balle and Wang 2018 (arXiv 1805.06530), theorem 8: the exact delta of the Gaussian mechanism."""
    mu = math.sqrt(count) / noise
    found = epsilon({Cost(1.0, noise): count}, DELTA)
    exact = norm.cdf(mu / 2 - found / mu) - math.exp(found) * norm.cdf(-mu / 2 - found / mu)
    assert exact <= DELTA
    assert exact > DELTA / 100, "nor is it far above"


@pytest.mark.parametrize(("rate", "noise", "count"), [(0.01, 1.0, 1000), (0.1, 3.0, 500), (0.004, 0.8, 8000)])
def test_with_sampling_epsilon_is_that_of_the_integral(rate, noise, count):
    """Mironov, Talwar and Zhang 2019, section 3: the divergence of a mixture of two Gaussians from one, integrated."""

    def divergence(order):
        def inside(x):
            ratio = math.log1p(rate * math.expm1((2 * x - 1) / (2 * noise**2)))
            return math.exp(norm.logpdf(x, 0, noise) + order * ratio)

        high = order + 12 * noise
        return math.log(quad(inside, -12 * noise, high, limit=400, points=[0, order])[0]) / (order - 1)

    integrated = converted(
        {a: count * divergence(a) for a in (2.5, 3, 4, 5, 6, 8, 12, 16, 20, 24, 32)}, DELTA
    )
    found = epsilon({Cost(rate, noise): count}, DELTA)
    assert found <= integrated * (1 + 1e-6), "the library tries more orders"
    assert found >= 0.95 * integrated


def test_epsilon_grows_with_every_release_and_falls_with_noise():
    spent = [epsilon({Cost(0.05, 1.0): count}, DELTA) for count in (0, 1, 10, 100, 1000)]
    assert spent[0] == 0
    assert spent == sorted(spent)
    assert len(set(spent)) == len(spent)
    assert epsilon({Cost(0.05, 2.0): 100}, DELTA) < epsilon({Cost(0.05, 1.0): 100}, DELTA)
    assert epsilon({Cost(0.04, 1.0): 100}, DELTA) < epsilon({Cost(0.05, 1.0): 100}, DELTA)


def test_releases_of_several_kinds_add_up():
    both = {Cost(1.0, 30.0): 100, Cost(0.1, 2.0): 100}
    assert epsilon(both, DELTA) > max(epsilon({cost: count}, DELTA) for cost, count in both.items())
    assert epsilon({Cost(1.0, 30.0): 50, Cost(1.0, 30.0 * math.sqrt(2)): 100}, DELTA) == pytest.approx(
        epsilon({Cost(1.0, 30.0): 100}, DELTA), rel=1e-9
    )


@pytest.mark.parametrize("spent", [{}, {Cost(1.0, 9.0): 20}])
def test_one_release_more_than_affordable_exceeds_the_budget(spent):
    cost = Cost(0.05, 1.1)
    count = num_affordable(spent, cost, 3.0, DELTA)
    assert count > 1
    assert epsilon({**spent, cost: count}, DELTA) <= 3.0 < epsilon({**spent, cost: count + 1}, DELTA)


def test_nothing_is_affordable_beyond_the_budget():
    assert num_affordable({Cost(1.0, 1.0): 100}, Cost(1.0, 1.0), 3.0, DELTA) == 0


@pytest.mark.parametrize(("rate", "count", "budget"), [(1.0, 500, 8.0), (0.01, 4000, 2.0), (0.2, 10, 0.5)])
def test_derived_noise_makes_a_budget_last_and_no_longer(rate, count, budget):
    noise = noise_for(rate, count, budget, DELTA)
    assert epsilon({Cost(rate, noise): count}, DELTA) <= budget
    assert epsilon({Cost(rate, noise - 3e-4): count}, DELTA) > budget
    assert num_affordable({}, Cost(rate, noise), budget, DELTA) >= count
    assert noise_for(rate, count, budget, DELTA) == noise


def test_a_budget_that_no_noise_keeps_is_an_error():
    with pytest.raises(ValueError, match="needs more than 1048576 times as much noise as a row may say"):
        noise_for(1.0, 10**8, 1e-4, 1e-30)
