"""What a revert takes back: which entries, and how often the part of each node counts.

A revert may take back other reverts, and those others again. Followed entry by entry that doubles with every one of
them; but every update is a sum, so each commit counts with one factor a node, and most factors are 0.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zo.commit import Entry, Revert

History = Callable[[int, int], Iterable[Entry]]
"""(first, last) -> the ledger's entries first..last-1, in order."""


class Part(NamedTuple):
    """Commits first..last-1, with the factor that each node's coefficients have in the inverse."""

    first: int
    last: int
    nodes: NDArray[np.int64]
    """(k,) ascending: nodes with a factor of their own."""
    factors: NDArray[np.int64]
    """(k + 1,): theirs, and at the end everyone else's."""

    def factors_of(self, participants: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) the factors of (n,) nodes."""
        index = np.searchsorted(self.nodes, participants)
        known = index < self.nodes.size
        known[known] = self.nodes[index[known]] == participants[known]
        return self.factors[np.where(known, index, self.nodes.size)]


def inverse(revert: Revert, history: History) -> list[Part]:
    """The commits that a revert takes back, in order, without those that it leaves as they are.

    An entry's factor is the negated sum of the factors of all reverts that cover it; the revert's own is 1.

    Args:
        revert: may be one that is not in the ledger yet.
        history: (first, last) -> the entries first..last-1.
    """
    reverts = _reverts_below(revert, history)  # newest first
    nodes = np.unique(np.asarray([node for each in reverts for node in each.nodes], np.int64))
    masks = [np.append(np.isin(nodes, each.nodes), False) | (not each.nodes) for each in reverts]
    factors = [np.ones(nodes.size + 1, np.int64)]

    def factor(entry: int) -> NDArray[np.int64]:
        total = np.zeros(nodes.size + 1, np.int64)
        for each, mask, own in zip(reverts, masks, factors, strict=False):
            if each.first <= entry < each.last:
                total -= own * mask
        return total

    for each in reverts[1:]:  # whatever covers one of them is newer, and so done before
        factors.append(factor(each.round))  # noqa: PERF401 — each needs those before it
    edges = sorted({edge for each in reverts for edge in (each.first, each.last)})
    parts = []
    for first, last in pairwise(edges):
        found = factor(first)
        if found.any():
            parts.append(Part(first, last, nodes, found))
    return parts


def _reverts_below(revert: Revert, history: History) -> list[Revert]:
    """The revert, and all those that it takes back at first or second hand, newest first."""
    found = [revert]
    low, high = revert.first, revert.last
    while low < high:
        new = [entry for entry in history(low, high) if isinstance(entry, Revert)]
        found += reversed(new)
        low, high = min((each.first for each in new), default=low), low
    return found
