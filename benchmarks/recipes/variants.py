"""What the benchmark of directions compares: policies, widths, numbers of nodes and of local steps, estimators.

Decides which runs there are for a recipe. All of them make about as many forward passes, and have as many steps tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from benchmarks.recipes import assets
from benchmarks.recipes.baselines import FirstOrder
from benchmarks.recipes.catalogue import (
    instructions_problem,
    sentiment_problem,
    shakespeare_text,
    text_problem,
)
from benchmarks.recipes.problem import Form, Problem
from benchmarks.recipes.swarm import Swarm
from node.data import Windows
from zo.manifest import MOVES, Directions, Moves

ALL_VOTES: Final = 65536
"""Every vote adds a whole step."""
FIELD_SHARE: Final = 2.0
"""As a coordinator caps a node's share unless told otherwise."""
SHARED_SCALE: Final = 3.0
"""Of a step along a direction that all nodes measure."""
BACKWARD_SCALE: Final = 0.2
"""Of a step along one of many directions that one gradient is projected on: they say less than as many measurements."""
MIXED_SCALE: Final = 0.1
"""Of a step of those that probe beside others that move."""
LONGER: Final = 1.7
"""How many times as long one bit may take."""
DIRECTIONS, CODES, NODES, LOCAL_STEPS, ESTIMATORS, FIRST_ORDER = (
    "directions",
    "codes",
    "nodes",
    "local steps",
    "estimators",
    "first order",
)
INT8, ONE_BIT, ONE_BIT_LONGER, POOL = (
    "private, 8 bits",
    "private, 1 bit",
    "private, 1 bit, 1.7 times as long",
    "pool",
)
LOCAL: Final = "{} local steps"
ALL_MOVE, HALF_MOVE, HALF_ALONE = "all move", "half move, half probe", "the half that moves, alone"
ADAM: Final = "Adam, all data"
POLICIES: Final = {
    POOL: Directions(policy="pool"),
    "pool, by importance": Directions(policy="pool", pool_draw="importance"),
    "shared, mean": Directions(policy="shared"),
    "shared, median": Directions(policy="shared", combine="median"),
    "shared, majority, 1 bit": Directions(policy="shared", combine="majority"),
    "4 groups, median": Directions(policy="groups", groups=4, combine="median"),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to train, with the settings that are tried: the best of them counts."""

    group: str
    name: str
    nodes: int
    tried: Sequence[Swarm | FirstOrder]
    every: int = 1
    """Only every so many of the nodes take part, with their own data."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A recipe's problem, and how much everybody gets of it."""

    title: str
    metric: str
    problem: Callable[[int], Problem]
    """With the data of so many nodes."""
    nodes: int
    """Of all runs that are not about their number."""
    passes: int
    """Forward passes of all nodes."""
    step: float
    """Of one vote on a private direction."""
    epsilon: float
    directions: int
    """Of a node in a round."""
    adam: Sequence[FirstOrder]
    other_nodes: Sequence[int] = ()
    local_steps: Sequence[int] = ()
    few: int = 0
    """Nodes of the runs with local steps, and of those that move."""
    factors: Sequence[float] = (1.0,)
    """Of the step, as tried."""
    averaged: Sequence[float] = ()
    """Of the step, as tried also where the weights move by the mean of all walks instead of their sum."""
    moves: Moves | None = None
    move_rounds: int = 0
    estimators: Sequence[float] = ()
    """Factors of the step, as tried with one-sided, forward and backward slopes, and with fleets that mix moves and
    slopes; none: these are not compared. A pass of forward mode takes several times as long as others."""

    def swarm(self, nodes: int, factor: float, **settings: Any) -> Swarm:
        """As many rounds as give the passes, two-sided, under the cap that a coordinator has unless told otherwise."""
        plain = {"directions": self.directions, "sides": 2, "epsilon": self.epsilon, "full_votes": ALL_VOTES}
        made = Swarm(
            **(plain | {"rounds": 1, "step": self.step * factor, "max_share": FIELD_SHARE} | settings)
        )
        a_round = sum(map(made.passes, range(nodes)))
        return replace(made, rounds=max(1, round(self.passes / a_round)))


def variants(of: Subject) -> Iterator[Variant]:
    """All runs of a subject."""

    def tried(
        group: str,
        name: str,
        nodes: int = of.nodes,
        scale: float = 1.0,
        factors: Sequence[float] = of.factors,
        **settings: Any,
    ) -> Variant:
        swarms = [of.swarm(nodes, scale * factor, **settings) for factor in factors]
        return Variant(group=group, name=name, nodes=nodes, tried=swarms)

    yield tried(DIRECTIONS, INT8)
    for name, policy in POLICIES.items():
        # What several nodes measure is known better, and there are fewer of them: a step along it may be larger.
        scale = {"shared": SHARED_SCALE, "groups": 2.0}.get(policy.policy, 1.0)
        bits = 1 if policy.combine == "majority" else 8
        yield tried(DIRECTIONS, name, scale=scale, policy=policy, bits=bits)
    yield tried(CODES, "private, 4 bits", bits=4)
    yield tried(CODES, ONE_BIT, bits=1)
    longer = replace(of, passes=round(LONGER * of.passes))
    swarms = [longer.swarm(of.nodes, factor, bits=1) for factor in of.factors]
    yield Variant(group=CODES, name=ONE_BIT_LONGER, nodes=of.nodes, tried=swarms)
    for nodes in of.other_nodes:
        yield tried(NODES, f"private, {nodes} nodes", nodes=nodes)
        if nodes > 1:
            shared = POLICIES["shared, mean"]
            yield tried(NODES, f"shared, {nodes} nodes", nodes=nodes, scale=SHARED_SCALE, policy=shared)
    for steps in of.local_steps:
        walks: dict[str, Any] = {"nodes": of.few, "directions": steps, "local_steps": steps}
        name, factors = LOCAL.format(steps), of.averaged if steps > 1 else ()
        summed = tried(LOCAL_STEPS, name, **walks)
        # As many whole votes as one node has: the mean of the walks.
        averaged = tried(LOCAL_STEPS, name, factors=factors, full_votes=steps, **walks)
        yield replace(summed, tried=[*summed.tried, *averaged.tried])
    if of.estimators:
        one_sided: dict[str, Any] = {"sides": 1, "directions": 4, "epsilon": of.epsilon / 3}
        yield tried(ESTIMATORS, "one-sided, of 4", factors=of.estimators, **one_sided)
        yield tried(ESTIMATORS, "forward", factors=of.estimators, estimators=("forward",))
        fewer = replace(of, passes=of.passes // 2)
        swarms = [
            fewer.swarm(of.nodes, BACKWARD_SCALE * factor, directions=64, estimators=("backward",))
            for factor in of.estimators
        ]
        yield Variant(group=ESTIMATORS, name="backward, 64 slopes", nodes=of.nodes, tried=swarms)
    if of.moves is not None:
        moving = of.swarm(of.few, 1.0, moves=of.moves, estimators=(MOVES,))
        moving = replace(moving, rounds=of.move_rounds)
        yield Variant(group=ESTIMATORS, name=ALL_MOVE, nodes=of.few, tried=[moving])
        if of.estimators:
            yield Variant(group=ESTIMATORS, name=HALF_ALONE, nodes=of.few, tried=[moving], every=2)
            # Moves soon come to where slopes want a smaller step (docs/recipes.md, the law).
            step = MIXED_SCALE * of.step
            mixed = replace(moving, estimators=(MOVES, "two-sided"), directions=16, step=step)
            yield Variant(group=ESTIMATORS, name=HALF_MOVE, nodes=of.few, tried=[mixed])
    # One worker with everybody's data: what all nodes have, however many there are.
    yield Variant(group=FIRST_ORDER, name=ADAM, nodes=of.nodes, tried=of.adam)


def subject(recipe: int, quick: bool) -> Subject:
    """What of a recipe is compared.

    Args:
        recipe: 1, 2 or 3.
        quick: much less of everything, to see that it works.

    Raises:
        AssetMissing: its base or data are not there.
    """
    found = {1: _shakespeare, 2: _instructions, 3: _sentiment}[recipe](quick)
    if not quick:
        return found
    moves = None if found.moves is None else Moves(projections=32, updates=2, rate=0.01)
    return replace(
        found,
        nodes=4,
        other_nodes=(2,) if found.other_nodes else (),
        local_steps=found.local_steps[:2],
        few=2 if found.few else 0,
        passes=16,
        factors=(1.0,),
        estimators=found.estimators[:1],
        averaged=found.averaged[:1],
        moves=moves,
        move_rounds=2,
        adam=[replace(found.adam[0], steps=4)],
    )


def _shakespeare(quick: bool) -> Subject:
    model = assets.model("stories260K")
    text = shakespeare_text(32 if quick else 1)
    form = Form(batch_size=2, sequence_length=32) if quick else Form(batch_size=4)
    return Subject(
        title="recipe 1: stories260K in float32 on tinyshakespeare, rank 4, batches of 4 × 128",
        metric="held-out loss, nats per token",
        problem=lambda nodes: _fewer_held_out(text_problem(model, text, form, nodes)),
        nodes=16,
        other_nodes=(1, 4, 64),
        local_steps=(1, 8, 16, 64),
        few=8,
        passes=1920,
        step=0.001,
        epsilon=0.01,
        directions=1,
        adam=[FirstOrder(steps=1500, rate=0.01)],
        moves=Moves(projections=4096, updates=80, rate=0.006),
        move_rounds=7,
        estimators=(1.0,),
    )


def _fewer_held_out(problem: Problem) -> Problem:
    """Every fourth of the windows that are held out: there are many runs, and each looks at them often."""
    windows = problem.held_out[0]
    assert isinstance(windows, Windows)
    return replace(problem, held_out=[replace(windows, tokens=windows.tokens[::4])])


def _instructions(quick: bool) -> Subject:
    form = Form(batch_size=4, sequence_length=256)
    return Subject(
        title="recipe 2: babyllama in float32 on 16 tasks of natural-instructions, rank 4, batches of 4 × 256",
        metric="held-out loss of completions, nats per token",
        problem=lambda nodes: instructions_problem(form, 4 if quick else 16, nodes),
        nodes=16,
        other_nodes=(1, 4, 64),
        local_steps=(1, 8, 64),
        few=4,
        passes=480,
        step=0.002,
        epsilon=0.01,
        directions=1,
        adam=[FirstOrder(steps=100, rate=0.003)],
        moves=Moves(projections=1024, updates=16, rate=0.003),
        move_rounds=6,
        estimators=(1.0,),
    )


def _sentiment(quick: bool) -> Subject:
    return Subject(
        title="recipe 3: a linear head on a frozen MiniLM on SST-2, batches of all rows of a node",
        metric="held-out error, share of labels",
        problem=lambda nodes: sentiment_problem(quick, nodes),
        nodes=16,
        other_nodes=(1, 4, 64),
        local_steps=(1, 8, 16, 64),
        few=8,
        passes=16_000,
        step=0.005,
        epsilon=0.01,
        directions=4,
        factors=(0.25, 0.5, 1.0, 2.0),
        averaged=(4.0, 8.0, 16.0),
        estimators=(0.5, 1.0),
        moves=Moves(projections=256, updates=16, rate=0.03),
        move_rounds=60,
        adam=[FirstOrder(steps=1000, rate=0.1, on_all=True)],
    )
