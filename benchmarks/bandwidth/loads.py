"""What an exchange of a system weighs, and how long it takes over a link at best, by arithmetic.

A computed time has neither loss nor slow start nor anybody's computing in it: what is measured takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.bandwidth import target
from benchmarks.bandwidth.contest import FLOAT_BYTES
from benchmarks.bandwidth.results import Row

DAY_S: Final = 86_400.0
"""A system that takes longer to the target is of no use over a link."""
PARAMETERS: Final = 23_120
TENSORS: Final = 70
"""Of recipe 1's adapter of rank 4."""
_SEGMENT: Final = 1448
_HEADERS: Final = 66


@dataclass(frozen=True, kw_only=True)
class Load:
    """One exchange of one node."""

    up_bytes: float
    down_bytes: float
    """On Ethernet."""
    round_trips: float
    """That wait for one another."""
    both_ways: bool = False
    """Whether up and down go at the same time."""

    @property
    def busy_bytes(self) -> float:
        """For how many bytes the link is busy."""
        return (max if self.both_ways else sum)((self.up_bytes, self.down_bytes))

    def seconds(self, bits_per_s: float, round_trip_s: float) -> float:
        """How long an exchange takes over a link at best."""
        return 8 * self.busy_bytes / bits_per_s + self.round_trips * round_trip_s

    def slowest(self, exchanges: float, round_trip_s: float, within_s: float = DAY_S) -> float | None:
        """The rate in bits a second below which so many exchanges take too long; None if round trips alone do."""
        left_s = within_s - exchanges * self.round_trips * round_trip_s
        return 8 * exchanges * self.busy_bytes / left_s if left_s > 0 else None

    def __str__(self) -> str:
        """What a time is computed from."""
        return (
            f"{self.up_bytes:,.0f} B up, {self.down_bytes:,.0f} B down and {self.round_trips:g} round trips"
        )


def framed(payload: float) -> float:
    """Ethernet bytes of a payload over TCP in full segments."""
    return payload + _HEADERS * -(-payload // _SEGMENT)


def server_load(up_payload: float, down_payload: float) -> Load:
    """Of a node that gets something from a server, and sends something back."""
    return Load(up_bytes=framed(up_payload), down_bytes=framed(down_payload), round_trips=1)


def ring_load(payload: float, workers: int) -> Load:
    """Of a worker in a ring all-reduce, as gloo's: 2 (n − 1) steps of an nth each, every one after the one before.

    A step goes one way, which is half a round trip.
    """
    steps = 2 * (workers - 1)
    each = steps * framed(payload / workers)
    return Load(up_bytes=each, down_bytes=each, round_trips=steps / 2, both_ways=True)


LOADS: Final = {
    "FedAvg, Flower": server_load(FLOAT_BYTES * PARAMETERS, FLOAT_BYTES * PARAMETERS),
    "FedAvg int8, Flower": server_load(*2 * (PARAMETERS + FLOAT_BYTES * TENSORS,)),
    "gradients, gloo": ring_load(FLOAT_BYTES * PARAMETERS, 8),
    "DiLoCo, gloo": ring_load(FLOAT_BYTES * PARAMETERS, 8),
}
"""Payload and headers; what frameworks add is not in it."""


def exchanges_to_target(rows: Sequence[Row]) -> dict[str, float]:
    """Exchanges that each system takes to recipe 1's target with the small adapter, by name, of results of `target`."""
    whole = [row for row in rows if (row["recipe"], row["quick"], row["rank"]) == (1, False, 4)]
    return {
        row["system"]: row["reached"]["exchange"] for row in target.best(whole) if row["reached"] is not None
    }
