"""Who takes part in a comparison, with which settings, and how each may look for its step.

Everyone has three candidates for the one figure that decides most, a step or a rate. Where a run is long, they are
compared on short ones, and the best goes the whole way; what everyone else would set is as it was published, as far as
that carries over to a base a thousandth of the size and directions of ±1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

Kind = Literal["ours", "flower", "gradients", "diloco"]
Settings = dict[str, Any]
NODES: Final = {1: 8, 2: 16, 3: 8}
"""Of each recipe."""
LOCAL_STEPS: Final = 10
"""Of every first-order system that takes any: FedAvg, DiLoCo, moves."""
_EVERY_VOTE: Final = 64
"""As init's `--full-votes`: so many votes of a round add a whole step each, for each local step."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A system, and what it is run with."""

    name: str
    kind: Kind
    exchanges: int
    candidates: tuple[Settings, ...]
    """Settings that it may choose from."""
    search: int = 0
    """Exchanges of the short runs that choose; 0: every candidate is run as a whole."""
    alone: bool = False
    """One worker with everybody's data, as it was published."""
    good_at: str
    carried: str = ""
    """Of a published system: what was taken over, and what was not."""

    @property
    def num_runs(self) -> int:
        """How many runs it takes."""
        return len(self.candidates) + bool(self.search)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What a recipe asks for: how long runs are, and three candidates around what suits it."""

    walks: tuple[int, int]
    """Rounds of 16 local steps each: of a run, of a short one."""
    long_walks: tuple[int, int]
    """Rounds of 64 local steps each."""
    rounds: tuple[int, int]
    """Rounds of four one-sided directions."""
    single: tuple[int, int]
    """Rounds of one two-sided direction."""
    moves: int
    fedavg: int
    gradients: int
    diloco: int
    walk_steps: tuple[float, ...] = (0.00125, 0.0025, 0.005)
    """Of a vote; docs/recipes.md: 0.001 for each direction of a round."""
    walk_votes: int = _EVERY_VOTE
    """Of a round, for each local step, that add a whole step each; 1: weights move by the mean of all walks."""
    steps: tuple[float, ...] = (0.0005, 0.001, 0.002)
    epsilon: float = 0.003
    walk_epsilon: float = 0.01
    """Where both sides are measured."""
    raw: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Rates that multiply slopes as they are: those of MeZO on bases as small as these."""
    rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Of Adam."""

    def at_rank(self, rank: int) -> Lengths:
        """For an adapter of another rank than 4.

        |g|² and tr H grow in proportion to the rank, so the best step of a vote, |g| / tr H, and what epsilon may be
        fall with its root, a raw rate, 1 / tr H, with the rank itself (docs/recipes.md, the law). Adam moves each entry
        by its rate, whatever the slope: so many more entries want a rate that falls with the root as well.
        """
        ratio = rank / 4

        def divided(values: tuple[float, ...], by: float) -> tuple[float, ...]:
            return tuple(float(f"{value / by:.3g}") for value in values)

        (epsilon, walk_epsilon) = divided((self.epsilon, self.walk_epsilon), ratio**0.5)
        return replace(
            self,
            walk_steps=divided(self.walk_steps, ratio**0.5),
            steps=divided(self.steps, ratio**0.5),
            epsilon=epsilon,
            walk_epsilon=walk_epsilon,
            raw=divided(self.raw, ratio),
            rates=divided(self.rates, ratio**0.5),
        )


LENGTHS: Final = {
    1: Lengths(
        walks=(20, 2),
        long_walks=(7, 1),
        rounds=(150, 15),
        single=(300, 30),
        moves=12,
        fedavg=2,
        gradients=40,
        diloco=4,
    ),
    2: Lengths(
        walks=(6, 1),
        long_walks=(2, 1),
        rounds=(50, 6),
        single=(100, 15),
        moves=6,
        fedavg=2,
        gradients=40,
        diloco=4,
    ),
    3: Lengths(
        walks=(80, 8),
        long_walks=(20, 4),
        rounds=(1000, 60),
        single=(1000, 60),
        moves=20,
        fedavg=2,
        gradients=40,
        diloco=4,
        # Batches that are always the same send all walks the same way (docs/directions.md): their mean, longer steps.
        walk_steps=(0.02, 0.04, 0.08),
        walk_votes=1,
        steps=(0.0025, 0.005, 0.01),
        epsilon=0.01,
        raw=(0.1, 0.3, 1.0),
        rates=(0.03, 0.1, 0.3),
    ),
}
_ONE: Final = {"directions": 1, "sides": 2, "epsilon": 0.001}
_RAW: Final = {"decay": "constant", "normalised": False}


def systems(recipe: int, quick: bool, rank: int = 4) -> list[System]:
    """Everyone who takes part in a recipe.

    Args:
        recipe: 1, 2 or 3.
        quick: a few exchanges of one candidate each, of the main systems.
        rank: of the adapter; the head of recipe 3 has none.

    Raises:
        ValueError: systems are not compared on a recipe of that number.
    """
    if recipe not in NODES:
        raise ValueError(f"recipe must be 1, 2 or 3, those that systems are compared on; got {recipe}")
    lengths = LENGTHS[recipe] if recipe == 3 else LENGTHS[recipe].at_rank(rank)
    found = [*_ours(lengths), *_first_order(lengths), *_published(lengths, NODES[recipe])]
    if not quick:
        return found
    return [_shortened(each) for each in found if each.name in QUICK]


def chosen(found: Sequence[System], wanted: Sequence[str]) -> list[System]:
    """Those whose names contain one of these texts; all, if there are none.

    Raises:
        ValueError: a text is in nobody's name.
    """
    names = named([each.name for each in found], wanted)
    return [each for each in found if each.name in names]


def named(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The names that contain one of these texts, in whatever case; all, if there are none.

    Raises:
        ValueError: a text is in none of them.
    """
    for text in wanted:
        if not any(text.lower() in name.lower() for name in names):
            raise ValueError(f"no system is called {text!r}; there are: {'; '.join(names)}")
    return [name for name in names if not wanted or any(text.lower() in name.lower() for text in wanted)]


QUICK: Final = ("ours, 16 local steps", "FedAvg int8, Flower", "DiLoCo, gloo")


def _shortened(system: System) -> System:
    middle = system.candidates[len(system.candidates) // 2]
    return replace(system, candidates=(middle,), search=0, exchanges=2)


def _ours(lengths: Lengths) -> list[System]:
    few = {"directions": 4, "sides": 1, "epsilon": lengths.epsilon}
    return [
        _walking(16, lengths.walks, lengths),
        _walking(64, lengths.long_walks, lengths),
        System(
            name="ours, 4 directions a round",
            kind="ours",
            exchanges=lengths.rounds[0],
            search=lengths.rounds[1],
            candidates=tuple(
                {"probe": few, "schedule": {"step": step, "full_votes": _EVERY_VOTE, "decay": "linear"}}
                for step in lengths.steps
            ),
            good_at="as before, with a quick start; what init does",
        ),
        System(
            name="ours, moves",
            kind="ours",
            exchanges=lengths.moves,
            candidates=tuple(
                {
                    "moves": {"projections": 256, "updates": LOCAL_STEPS, "rate": rate},
                    "schedule": {"step": 0.001, "decay": "linear"},
                }
                for rate in lengths.rates
            ),
            good_at="few bytes and few passes, whatever the size of the adapter, where nodes can train; slopes of "
            "those that cannot count in the same rounds",
        ),
    ]


def _walking(local_steps: int, rounds: tuple[int, int], lengths: Lengths) -> System:
    """Ours with so many local steps, a two-sided direction in each."""
    walk = {
        "directions": local_steps,
        "local_steps": local_steps,
        "sides": 2,
        "epsilon": lengths.walk_epsilon,
    }
    return System(
        name=f"ours, {local_steps} local steps",
        kind="ours",
        exchanges=rounds[0],
        search=rounds[1],
        candidates=tuple(
            {
                "probe": walk,
                "schedule": {"step": step, "full_votes": local_steps * lengths.walk_votes, "decay": "linear"},
            }
            for step in lengths.walk_steps
        ),
        good_at="few bytes without a gradient; memory of inference; nodes come and go; weights equal to the bit",
    )


def _first_order(lengths: Lengths) -> list[System]:
    def each(**more: Any) -> tuple[Settings, ...]:
        return tuple({"rate": rate, **more} for rate in lengths.rates)

    return [
        System(
            name="FedAvg, Flower",
            kind="flower",
            exchanges=lengths.fedavg,
            candidates=each(local_steps=LOCAL_STEPS),
            good_at="few rounds and few passes; a framework for any model, strategy and device",
        ),
        System(
            name="FedAvg int8, Flower",
            kind="flower",
            exchanges=lengths.fedavg,
            candidates=each(local_steps=LOCAL_STEPS, int8=True),
            good_at="the same in a quarter of the bytes, at the price of state at the clients",
        ),
        System(
            name="gradients, gloo",
            kind="gradients",
            exchanges=lengths.gradients,
            candidates=each(),
            good_at="the least wall time on a fast link; equals one large batch",
        ),
        System(
            name="DiLoCo, gloo",
            kind="diloco",
            exchanges=lengths.diloco,
            candidates=each(local_steps=LOCAL_STEPS, outer_rate=0.7),
            good_at="as gradients, with a fraction of the exchanges; no server",
            carried="Nesterov 0.7 and 0.9 outside, AdamW inside as published; 10 local steps as the others, not 500",
        ),
    ]


def _published(lengths: Lengths, nodes: int) -> list[System]:
    """Published systems as settings of our manifest, all with as many forward passes: one worker takes all nodes'."""
    rounds, short = lengths.single

    def raw(probe: Settings, full_votes: int, **more: Any) -> tuple[Settings, ...]:
        return tuple(
            {"probe": probe, "schedule": {**_RAW, "step": rate, "full_votes": full_votes}, **more}
            for rate in lengths.raw
        )

    return [
        System(
            name="MeZO's rule, one worker",
            kind="ours",
            exchanges=nodes * rounds,
            search=nodes * short,
            alone=True,
            candidates=raw(_ONE, 1),
            good_at="memory of inference, nothing to set up; it does not need a network, and none is needed here",
            carried="both sides, ε 0.001, constant raw rate; rates for small bases, ±1 instead of Gaussian, one byte a "
            "scalar",
        ),
        System(
            name="Just One Byte's rule",
            kind="ours",
            exchanges=rounds,
            search=short,
            candidates=raw(_ONE, _EVERY_VOTE),
            good_at="no state, no schedule; a byte up a step",
            carried="a byte and a direction a step from each worker, raw rate; ±1 instead of Gaussian",
        ),
        System(
            name="FedKSeed's rule, a pool of 4,096",
            kind="ours",
            exchanges=rounds // 15,
            search=max(short // 15, 1),
            candidates=raw(
                {**_ONE, "directions": 16, "local_steps": 16},
                16,
                directions={"policy": "pool", "pool_size": 4096},
            ),
            good_at="a newcomer loads a number a seed, whatever came before",
            carried="4,096 seeds, local steps at a raw rate, the mean of the walks; 16 steps a round, not 200; a byte "
            "a scalar; an adapter, not all weights",
        ),
        System(
            name="DeComFL's rule, shared directions",
            kind="ours",
            exchanges=rounds // 10,
            search=max(short // 10, 1),
            candidates=raw(
                {**_ONE, "directions": 10}, _EVERY_VOTE, directions={"policy": "shared", "combine": "mean"}
            ),
            good_at="traffic that grows with neither model nor nodes; a commit says one scalar a direction",
            carried="10 perturbations a round, ε 0.001, mean over clients; all clients in every round, ±1 instead of "
            "Gaussian, both sides",
        ),
        System(
            name="FeedSign's rule, majority of signs",
            kind="ours",
            exchanges=rounds,
            search=short,
            candidates=tuple(
                {
                    "probe": _ONE,
                    "codes": {"bits": 1},
                    "directions": {"policy": "shared", "combine": "majority"},
                    "schedule": {"decay": "constant", "step": step, "full_votes": 1},
                }
                for step in lengths.steps
            ),
            good_at="one bit up and down; withstands liars",
            carried="one shared direction a round, one bit, majority, constant step; ±1 instead of Gaussian",
        ),
    ]
