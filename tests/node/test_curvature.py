"""When one-sided slopes are watched: what is curvature in them, and when the second side is worth its pass."""

import numpy as np
import pytest

from node.curvature import Curvature, observed


def losses(n, slope, bend, seed):
    """Of n directions on one batch, with a slope and a curvature of these standard deviations."""
    rng = np.random.default_rng(seed)
    odd, even = slope * rng.standard_normal(n), bend * rng.standard_normal(n)
    return 3.0 + np.stack([even + odd, even - odd], axis=1)


def after(n, slope, bend, steps=40, before=None):
    known = Curvature() if before is None else before
    for seed in range(steps):
        known = observed(known, losses(n, slope, bend, seed))
    return known


@pytest.mark.parametrize(
    ("n", "slope", "bend", "both"),
    [
        (8, 1.0, 0.1, False),
        (8, 1.0, 0.8, False),  # a share of 39 %: half of it is what a second pass costs
        (8, 1.0, 2.0, True),
        (4, 0.0, 1.0, True),
        (4, 1.0, 0.0, False),
    ],
)
def test_both_sides_are_measured_where_one_is_mostly_curvature(n, slope, bend, both):
    known = after(n, slope, bend)
    assert known.needs_both_sides is both
    assert known.share == pytest.approx(bend**2 / (slope**2 + bend**2), abs=0.15)


def test_between_the_two_it_stays_as_it_was():
    one, both = after(16, 1.0, 0.1), after(16, 1.0, 2.0)
    in_between = 1.0  # half of the variance
    assert not after(16, 1.0, in_between, before=one).needs_both_sides
    assert after(16, 1.0, in_between, before=both).needs_both_sides


def test_it_goes_back_to_one_side_when_curvature_has_gone():
    assert not after(8, 1.0, 0.1, before=after(8, 1.0, 2.0)).needs_both_sides


def test_nothing_is_decided_on_a_few_directions_and_what_is_not_finite_says_nothing():
    known = observed(Curvature(), losses(8, 0.0, 1.0, 0))
    assert not known.needs_both_sides
    broken = np.full((8, 2), np.nan)
    broken[0] = 1.0
    assert observed(known, broken) is known
    assert Curvature().share == 0.0
