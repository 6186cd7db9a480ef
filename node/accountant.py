"""What releases cost: epsilon at a delta, from Rényi differential privacy, by Google's dp-accounting.

Decides nothing but sums: how much was spent, how many releases a budget has room for, how much noise makes it last.

Each release is a Gaussian mechanism on a Poisson sample (Mironov, Talwar and Zhang 2019, arXiv 1908.10530); Rényi
divergences add up over releases (Mironov 2017, arXiv 1702.07476, proposition 1) and become an epsilon as in Canonne,
Kamath and Steinke 2020 (arXiv 2004.00010, proposition 12). Two sets of data are neighbours if one row of the one is
blank in the other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, NamedTuple

import dp_accounting as dp
import numpy as np
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from numpy.typing import NDArray

from node.privacy import MAX_NOISE

logging.getLogger("absl").setLevel(
    logging.ERROR
)  # it warns of orders that it leaves out, which costs, and is safe

MAX_RELEASES: Final = 10**9
"""More than any run has."""
_DIGITS: Final = 4
"""Of derived noise, so that the same demand has the same noise at every start."""


class Cost(NamedTuple):
    """What of a release decides its cost."""

    rate: float
    """Probability with which a row is in the batch."""
    noise: float
    """In units of the bound on a row."""


def epsilon(spent: Mapping[Cost, int], delta: float) -> float:
    """The epsilon of so many releases of each cost together, at a delta in (0, 1)."""
    each = [count * _divergences(cost) for cost, count in spent.items() if count]
    total = sum(each, np.zeros(len(_orders())))
    return float(compute_epsilon(_orders(), total, delta)[0])


def num_affordable(spent: Mapping[Cost, int], cost: Cost, budget: float, delta: float) -> int:
    """How many releases of one cost there may be, after what was spent, until epsilon exceeds the budget.

    Returns:
        at most `MAX_RELEASES`.
    """

    def fits(more: int) -> bool:
        return epsilon({**spent, cost: spent.get(cost, 0) + more}, delta) <= budget

    if not fits(1):
        return 0
    few, many = 1, 2
    while many <= MAX_RELEASES and fits(many):
        few, many = many, 2 * many
    if many > MAX_RELEASES:
        return MAX_RELEASES
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle) else (few, middle)
    return few


def noise_for(rate: float, num_releases: int, budget: float, delta: float) -> float:
    """The least noise with which so many releases cost no more than the budget, rounded up.

    Raises:
        ValueError: no noise that a mechanism may have suffices.
    """

    def event(noise: float) -> Any:
        return dp.SelfComposedDpEvent(_event(Cost(rate, noise)), num_releases)

    try:
        found = dp.calibrate_dp_mechanism(
            _accountant, event, budget, delta, dp.LowerEndpointAndGuess(0.01, 1.0), tol=10**-_DIGITS / 2
        )
    except dp.mechanism_calibration.NoBracketIntervalFoundError:
        found = math.inf
    if found > MAX_NOISE:
        raise ValueError(
            f"an epsilon of {budget:g} at delta = {delta:g} for {num_releases:,} releases needs more than "
            f"{MAX_NOISE:.0f} times as much noise as a row may say: allow more, or spread it over fewer rounds"
        )
    return float(math.ceil(found * 10**_DIGITS) / 10**_DIGITS)


def _event(cost: Cost) -> Any:
    gaussian = dp.GaussianDpEvent(cost.noise)
    return gaussian if cost.rate == 1 else dp.PoissonSampledDpEvent(cost.rate, gaussian)


def _accountant() -> RdpAccountant:
    return RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_SPECIAL)


@cache
def _orders() -> NDArray[np.float64]:
    orders: NDArray[np.float64] = _accountant().orders
    return orders


@cache
def _divergences(cost: Cost) -> NDArray[np.float64]:
    """Rényi divergences of one release, at `_orders`."""
    found: NDArray[np.float64] = _accountant().compose(_event(cost)).rdp
    return found
