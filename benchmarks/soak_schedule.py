"""When the soak does what to whom: a schedule that follows from its seed alone, so that a failure can be had again."""

import enum
import random
from collections.abc import Iterator
from typing import NamedTuple

_STOPPED_S = (0.5, 8.0)
_JOIN_WEIGHTS = (80, 15, 5)
_FAULT_WEIGHTS = (70, 15, 15)


class Kind(enum.Enum):
    """What happens."""

    KILL = "SIGKILL of a node"
    LEAVE = "SIGTERM to a node"
    STOP = "SIGSTOP of a node"
    WAKE = "SIGCONT to a node"
    JOIN = "a node joins"
    JOIN_TORN = "a node joins whose saved weights are cut off"
    JOIN_NEW = "a node joins that was never there"
    KILL_COORDINATOR = "SIGKILL of the coordinator"


class Happening(NamedTuple):
    """One entry of the schedule."""

    at_s: float
    """Since the faults began."""
    kind: Kind
    node: int
    """Which of the nodes' places; -1 for the coordinator."""


def num_places(num_nodes: int) -> int:
    """How many nodes take turns so that `num_nodes` are there at any time."""
    return num_nodes + max(1, num_nodes // 4)


def schedule(
    seed: int, num_nodes: int, seconds: float, node_every_s: float, coordinator_every_s: float
) -> Iterator[Happening]:
    """Everything that happens, in order.

    All of `num_places` run at the beginning. There are never fewer than `num_nodes` processes, some of them stopped.
    Who stops wakes up again, unless it is killed while it sleeps.

    Args:
        seed: of all that is drawn.
        num_nodes: least number of nodes at any time.
        seconds: how long it goes on.
        node_every_s: mean time between two happenings to nodes; they come at random (exponential).
        coordinator_every_s: time between two kills of the coordinator, give or take a quarter.
    """
    rng = random.Random(seed)
    places = range(num_places(num_nodes))
    running, stopped = set(places), dict[int, float]()
    at = rng.expovariate(1 / node_every_s)
    coordinator_at = coordinator_every_s * rng.uniform(0.75, 1.25)
    while True:
        wake_at, sleeper = min(((when, node) for node, when in stopped.items()), default=(float("inf"), -1))
        now = min(at, coordinator_at, wake_at)
        if now >= seconds:
            return
        if now == wake_at:
            del stopped[sleeper]
            yield Happening(now, Kind.WAKE, sleeper)
        elif now == coordinator_at:
            coordinator_at += coordinator_every_s * rng.uniform(0.75, 1.25)
            yield Happening(now, Kind.KILL_COORDINATOR, -1)
        else:
            at += rng.expovariate(1 / node_every_s)
            away = sorted(set(places) - running)
            may_leave = len(running) > num_nodes
            if away and (not may_leave or rng.random() < 0.5):
                node = rng.choice(away)
                running.add(node)
                kinds = (Kind.JOIN, Kind.JOIN_TORN, Kind.JOIN_NEW)
                yield Happening(now, rng.choices(kinds, _JOIN_WEIGHTS)[0], node)
                continue
            node = rng.choice(sorted(running))
            (kind,) = rng.choices((Kind.KILL, Kind.LEAVE, Kind.STOP), _FAULT_WEIGHTS)
            if node in stopped:
                kind = Kind.KILL
            if kind is Kind.STOP:
                stopped[node] = now + rng.uniform(*_STOPPED_S)
            else:
                stopped.pop(node, None)
                running.discard(node)
            yield Happening(now, kind, node)
