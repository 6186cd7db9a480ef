"""Whose codes are statistically out of line. Pure: reports in, findings with their reasons out.

A two-sided slope changes its sign with its direction, and a direction is as likely as its opposite, so an honest node's
codes are positive as often as negative, whatever its data. That they are at the limit, or no votes at all, may happen;
that they mostly are, while the others' are not, does not. Each of these is a count of yes and no whose rate under
honesty is at most known. It is out of line once it crosses a boundary that an honest node crosses at any time, however
often one looks, with a probability of at most `FALSE_ALARM`: Robbins, "Statistical methods related to the law of the
iterated logarithm", Ann. Math. Statist. 41 (1970); here as in Howard et al., arXiv 1810.08240, section 3.

What this cannot see: codes of the right size with the wrong sign. Nobody but the node knows its loss.
"""

from collections.abc import Container, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zo.codes import CUT_OFF_BY_BITS, NO_VOTE

FALSE_ALARM: Final = 1e-6
"""For one node and one kind of finding, over the whole life of a coordinator's process."""
SATURATED_BY_BITS: Final = {8: 0.25, 4: 0.45, 1: 1.0}
"""Largest share of codes at the limit that is in line: a node whose slopes are 3.4 times as large as usual has that."""
NO_VOTES: Final = 0.1
"""Largest share of directions without a finite loss that is in line."""
_UNUSUAL_ROUND: Final = 0.05
"""A round in which the median participant saturates more says something of the exponent, not of a node."""
_MIXTURE: Final = 16.0
"""Where the boundary is tightest: at a variance of this order, 64 codes."""


class Finding(NamedTuple):
    """A node whose codes are out of line."""

    node: int
    reason: str


def boundary(num: NDArray[np.float64], false_alarm: float = FALSE_ALARM) -> NDArray[np.float64]:
    """What a sum of centred yes-and-no's, of variance at most 1/4 each, reaches with a small probability at any time.

    sqrt((V + ρ) (ln((V + ρ) / ρ) + 2 ln(1 / α))) with V = num / 4.

    Args:
        num: (n,) how many there are.
        false_alarm: that probability, α.
    """
    spread = num / 4 + _MIXTURE
    return np.asarray(np.sqrt(spread * (np.log(spread / _MIXTURE) + 2 * np.log(1 / false_alarm))))


class _Count:
    """Of each node, how often something was the case, of how many times."""

    def __init__(self) -> None:
        self.yes = np.zeros(0)
        self.num = np.zeros(0)

    def add(self, nodes: NDArray[np.int64], yes: NDArray[np.int64], num: NDArray[np.int64]) -> None:
        short = int(nodes.max()) + 1 - self.num.size
        if short > 0:
            self.yes, self.num = np.pad(self.yes, (0, short)), np.pad(self.num, (0, short))
        self.yes[nodes] += yes
        self.num[nodes] += num

    def excess(self, nodes: NDArray[np.int64], rate: float) -> NDArray[np.float64]:
        """How many more than expected at this rate, in units of the boundary; (n,)."""
        num = self.num[nodes]
        return (self.yes[nodes] - rate * num) / boundary(num)


class Influence:
    """The tallies of one track, since its coordinator started."""

    def __init__(self, sides: int, bits: int = 8, *, comes_back: bool = False) -> None:
        """Nothing counted yet.

        Args:
            sides: of the manifest's probes. One-sided slopes have no symmetry to test.
            bits: of its codes; signs have no limit to be at.
            comes_back: whether directions do, from a pool: then slopes along one mostly keep their sign.
        """
        self._is_symmetric = sides == 2 and not comes_back
        self._limit, self._share_at_limit = CUT_OFF_BY_BITS[bits], SATURATED_BY_BITS[bits]
        self._positive, self._saturated, self._no_votes = _Count(), _Count(), _Count()
        self._found: set[tuple[int, str]] = set()

    def observe(
        self, participants: Sequence[int], codes: NDArray[np.int8], one_sided: Container[int] = ()
    ) -> list[Finding]:
        """Take a round in; what is out of line with it for the first time.

        Args:
            participants: node numbers, ascending.
            codes: (participants × directions,) int8, as they were reported.
            one_sided: nodes that said that they measure so, whatever the manifest's sides.
        """
        if not participants:
            return []
        nodes = np.asarray(participants, np.int64)
        rows = codes.reshape(len(nodes), -1)
        votes = rows != NO_VOTE
        num_votes = votes.sum(1)
        self._no_votes.add(nodes, rows.shape[1] - num_votes, np.full(len(nodes), rows.shape[1]))
        if self._is_symmetric:
            fair = np.array([node not in one_sided for node in participants])
            signs = (rows != 0) & votes & fair[:, None]
            self._positive.add(nodes, ((rows > 0) & signs).sum(1), signs.sum(1))
        saturated = (np.abs(rows, dtype=np.int16) == self._limit).sum(1)
        if np.median(saturated / np.maximum(num_votes, 1)) <= _UNUSUAL_ROUND:
            self._saturated.add(nodes, saturated, num_votes)
        return [*self._lopsided(nodes), *self._at_the_limit(nodes), *self._without_votes(nodes)]

    def _lopsided(self, nodes: NDArray[np.int64]) -> list[Finding]:
        if not self._is_symmetric:
            return []
        excess = np.abs(self._positive.excess(nodes, 0.5))
        return self._new("sign", self._positive, nodes[excess >= 1], "positive, where half of them should be")

    def _at_the_limit(self, nodes: NDArray[np.int64]) -> list[Finding]:
        known = nodes[nodes < self._saturated.num.size]
        excess = self._saturated.excess(known, self._share_at_limit)
        return self._new(
            "limit", self._saturated, known[excess >= 1], f"at ±{self._limit}, and others' are not"
        )

    def _without_votes(self, nodes: NDArray[np.int64]) -> list[Finding]:
        excess = self._no_votes.excess(nodes, NO_VOTES)
        return self._new("votes", self._no_votes, nodes[excess >= 1], "no vote: their losses were not finite")

    def _new(self, kind: str, count: _Count, nodes: NDArray[np.int64], what: str) -> list[Finding]:
        findings = []
        for node in map(int, nodes):
            if (node, kind) not in self._found:
                self._found.add((node, kind))
                reason = f"{count.yes[node]:,.0f} of {count.num[node]:,.0f} codes are {what}"
                findings.append(Finding(node, reason))
        return findings
