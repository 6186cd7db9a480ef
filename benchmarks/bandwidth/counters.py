"""What an interface has carried, and what that comes to for a node and a round. Imports next to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

_COUNTERS: Final = Path("/proc/self/net/dev")


class StalledError(RuntimeError):
    """Nodes did not get where they should."""


def read_interface(name: str) -> dict[str, int]:
    """What an interface of this process's namespace has carried so far: bytes and frames, sent (up) and received."""
    for line in _COUNTERS.read_text().splitlines():
        found, _, fields = line.partition(":")
        if found.strip() == name:
            numbers = [int(field) for field in fields.split()]
            names = ("wire_up", "frames_up", "wire_down", "frames_down")
            return dict(zip(names, (*numbers[8:10], *numbers[:2]), strict=True))
    raise StalledError(f"there is no interface {name} here")


def differences(marks: Sequence[dict[str, int]], nodes: int) -> dict[str, float]:
    """Per node, the median over the stretches between marks: a heartbeat in one of them changes nothing."""
    return {
        key: median(after[key] - before[key] for before, after in pairwise(marks)) / nodes for key in marks[0]
    }
