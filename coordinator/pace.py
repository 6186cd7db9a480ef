"""How long to wait for whom: deadlines learned from the arrival of reports, as TCP learns its time-out.

Every member's time to report is estimated by its smoothed mean and mean deviation (Jacobson 1988; RFC 6298 §2). A round
waits for a member as long as that estimate says, but never longer than `patience` times what is typical: who is slower
than that is not waited for, and whose reports come in time all the same still counts.
"""

from collections.abc import Mapping
from statistics import median_low
from typing import Final

import msgspec

MIN_WAIT_S: Final = 0.2
"""Below the scheduling hiccups of a busy machine, losing a member's codes costs more than waiting."""


class Latency(msgspec.Struct, frozen=True):
    """A member's time from being asked to having reported, in seconds."""

    mean_s: float
    deviation_s: float

    @property
    def timeout_s(self) -> float:
        """After this long, a report that has not come is not just late by chance.

        The slack has a lower bound, as the clock's granularity is one in RFC 6298 §2: a member as regular as a
        clock has no deviation, and its first hiccup would be taken for its end.
        """
        return self.mean_s + max(4 * self.deviation_s, MIN_WAIT_S)


def observe(latency: Latency | None, sample_s: float) -> Latency:
    """The estimate after one more sample: gains 1/8 for the mean and 1/4 for the deviation (RFC 6298 §2.3)."""
    if latency is None:
        return Latency(sample_s, sample_s / 2)
    deviation = latency.deviation_s + (abs(sample_s - latency.mean_s) - latency.deviation_s) / 4
    return Latency(latency.mean_s + (sample_s - latency.mean_s) / 8, deviation)


def typical_s(latency_by_node: Mapping[int, Latency]) -> float | None:
    """The median member's mean time to report, of two the faster one's; None while nobody has reported.

    The faster one's, because of two nodes the slow one would otherwise raise what counts as typical to its own pace.
    """
    return median_low(latency.mean_s for latency in latency_by_node.values()) if latency_by_node else None


def is_worth_waiting_for(latency: Latency | None, typical: float | None, patience: float) -> bool:
    """Whether rounds wait for a member: it is new, or at most `patience` times as slow as the typical one."""
    return latency is None or typical is None or latency.mean_s <= max(patience * typical, MIN_WAIT_S)


def wait_s(
    awaited: Mapping[int, Latency | None], typical: float | None, patience: float, max_wait_s: float
) -> float:
    """How long after its opening a round may close without those of `awaited` who have not reported.

    Args:
        awaited: estimates by node; None for a member that has not reported yet.
        typical: `typical_s` of the run; None at its beginning, which gives everyone `max_wait_s`.
        patience: multiple of what is typical that is ever waited.
        max_wait_s: upper bound in seconds.
    """
    if typical is None:
        return max_wait_s
    limit = patience * typical
    longest = max((limit if each is None else each.timeout_s for each in awaited.values()), default=0.0)
    return min(max(min(longest, limit), MIN_WAIT_S), max_wait_s)
