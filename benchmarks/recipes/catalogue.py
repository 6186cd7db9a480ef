"""The recipes: which problem, which methods, at which settings. What is best among several is found by running them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from benchmarks.recipes import assets
from benchmarks.recipes.baselines import FirstOrder, Mezo
from benchmarks.recipes.problem import PROJECTIONS, Form, Problem
from benchmarks.recipes.results import Row
from benchmarks.recipes.runner import Runner
from benchmarks.recipes.swarm import Swarm
from node import base as bases
from node.completions import Completions, read_completions
from node.data import Windows, pack
from node.labelled import Labelled, read_labelled
from node.losses import row_misses
from zo.manifest import Task
from zo.quantization import Kind

HELD_OUT: Final = 0.1
FIRST_ORDER_RATES: Final = (0.003, 0.01, 0.03)
MEZO_RATES: Final = (1e-4, 3e-4, 1e-3, 3e-3)
SCALARS: Final = ("int8", "float")
BABYLLAMA: Final = "babyllama-tok361-pad64"
Rows = TypeVar("Rows", Completions, Labelled)
_OF_EACH_ROW: Final[dict[type, tuple[str, ...]]] = {
    Completions: ("tokens", "begins", "ends", "pairs"),
    Labelled: ("tokens", "lengths", "labels"),
}
"""Fields that have an entry for each row."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe, as its page introduces it."""

    number: int
    title: str
    metric: str
    run: Callable[[Runner, bool], None]


def fold(text: str) -> str:
    """The text with every run of white space replaced by one space.

    The small story models never saw a line break: kept, it would be most of what there is to learn.
    """
    return " ".join(text.split())


def shakespeare_text(divisor: int = 1) -> str:
    """Tinyshakespeare, folded; the first part of so many. Raises AssetMissing."""
    text = fold(assets.data("tinyshakespeare", "input.txt").read_text("utf-8"))
    return text[: len(text) // divisor]


def split(text: str, tokenizer: object, nodes: int, sequence_length: int) -> tuple[list[Windows], Windows]:
    """Every node's own windows, and the held-out ones, from the last tenth of the text."""
    cut = round(len(text) * (1 - HELD_OUT))
    edges = np.linspace(0, cut, nodes + 1).astype(int)
    private = [pack([text[start:end]], tokenizer, sequence_length) for start, end in pairwise(edges)]
    return private, pack([text[cut:]], tokenizer, sequence_length)


def text_problem(model: Path, text: str, form: Form, nodes: int) -> Problem:
    """Next-token prediction on a text that is split among the nodes."""
    tokenizer = bases.load_base(model, threads=1).tokenizer
    private, held_out = split(text, tokenizer, nodes, form.sequence_length)
    pooled = replace(private[0], tokens=np.concatenate([each.tokens for each in private]))
    return Problem(
        model=str(model), form=form, task=Task(), private=private, pooled=pooled, held_out=[held_out]
    )


def best(rows: Sequence[Row]) -> Row:
    """The row that ends lowest."""
    return min(rows, key=lambda row: row.end)


def _best_rate(rows: Sequence[Row]) -> float:
    return float(best(rows).settings["rate"])


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What a language model is trained with; an adapter of more parameters wants smaller rates and steps."""

    model: str
    adapted: str = ""
    """What of it, in words, if it is not all projections."""
    targets: tuple[str, ...] = PROJECTIONS
    adam: tuple[float, ...] = FIRST_ORDER_RATES
    adam_steps: int
    """More than were tried."""
    mezo: tuple[float, ...]
    mezo_steps: int
    """More than were tried, at the two best rates: a constant one that is best at first may be too large later on."""
    short: float
    """The swarm's step for 125 rounds."""
    whole: float
    """The swarm's step for 625 rounds."""
    at_once: int
    """Directions in a forward pass, by what `benchmarks.probing` measures."""


TRIED: Final = (
    Tried(
        model="stories260K-pad64",
        adam_steps=1500,
        mezo=MEZO_RATES,
        mezo_steps=10_000,
        short=0.03,
        whole=0.02,
        at_once=0,
    ),
    Tried(
        model=BABYLLAMA,
        adam_steps=900,
        mezo=(3e-5, 1e-4, 3e-4, 1e-3),
        mezo_steps=2000,
        short=0.03,
        whole=0.01,
        at_once=2,
    ),
    # The backbone is frozen, and computed once for all directions of a batch: not with several in a forward pass.
    Tried(
        model=BABYLLAMA,
        adapted="output layer",
        targets=("lm_head",),
        adam_steps=900,
        mezo=(1e-3, 3e-3, 1e-2, 3e-2),
        mezo_steps=2000,
        short=0.15,
        whole=0.07,
        at_once=0,
    ),
)


def shakespeare(run: Runner, quick: bool) -> None:
    """Two story models in NF4 and int8, eight nodes, a text whose kind they never saw; the output layer alone of one.

    Rates are chosen on short runs. All methods are compared over a fifth of the length in NF4, where a forward pass
    takes half as long; the swarm's whole run is in NF4 as well. The runs in int8 are about the scalars.
    """
    text = shakespeare_text(8 if quick else 1)
    kinds: tuple[Kind, ...] = ("nf4",) if quick else ("nf4", "int8")
    few = 60 if quick else 300
    for kind, tried in product(kinds, TRIED[:1] if quick else TRIED):
        subject = f"{tried.model} in {kind}" + f", {tried.adapted}" * bool(tried.adapted)
        form = Form(quantize=kind, targets=tried.targets)
        problem = text_problem(assets.model(tried.model), text, form, nodes=8)
        if kind == kinds[0]:
            first = [run(subject, problem, FirstOrder(steps=few, rate=rate)) for rate in tried.adam]
            mezo = [run(subject, problem, Mezo(steps=few, rate=rate)) for rate in tried.mezo]
        swarm = Swarm(
            rounds=20 if quick else 125,
            directions=4,
            sides=1,
            step=tried.short,
            epsilon=0.003,
            at_once=tried.at_once,
        )
        for scalars in SCALARS:
            run(subject, problem, replace(swarm, scalars=scalars))
        if quick or kind != kinds[0]:
            continue
        run(subject, problem, FirstOrder(steps=tried.adam_steps, rate=_best_rate(first)))
        run(subject, problem, replace(swarm, rounds=625, step=tried.whole))
        for rate in [each for each in tried.mezo if each <= _best_rate(mezo)][-2:]:
            run(subject, problem, Mezo(steps=tried.mezo_steps, rate=rate))


@dataclass(frozen=True, kw_only=True)
class Larger:
    """What babyllama is trained with where a larger batch costs little: on a GPU."""

    batch_size: int
    targets: tuple[str, ...] = (*PROJECTIONS, "lm_head")
    adam: tuple[float, ...] = (0.003, 0.01)
    adam_few: tuple[float, ...] = ()
    """Rates tried on 300 steps first."""
    mezo: tuple[float, ...] = ()
    """Likewise; the best goes on to 2,000 steps."""
    swarms: tuple[tuple[int, int, float], ...]
    """Directions of a node and round, rounds, and the step, each on some 20,000 forward passes."""
    short: tuple[int, int, float] | None = None
    """The same on a fifth of them, in codes and in floats."""


LARGER: Final = (
    Larger(batch_size=32, targets=PROJECTIONS, swarms=((4, 625, 0.012),)),
    Larger(batch_size=32, swarms=((4, 625, 0.01), (4, 625, 0.014))),
    Larger(batch_size=64, swarms=((4, 625, 0.012), (4, 625, 0.017), (16, 156, 0.036))),
    Larger(
        batch_size=192,
        adam=(0.01,),
        adam_few=(0.003, 0.01, 0.03),
        mezo=(1e-4, 3e-4, 1e-3),
        swarms=((8, 312, 0.02),),
        short=(8, 62, 0.05),
    ),
)


def larger_batches(run: Runner, quick: bool) -> None:
    """Babyllama in NF4 with the text of recipe 1, on batches of 32, 64 and 192 rows instead of 8."""
    text = shakespeare_text(8 if quick else 1)
    for tried in LARGER[:1] if quick else LARGER:
        also = ", also the output layer" if "lm_head" in tried.targets else ""
        size = 16 if quick else tried.batch_size
        subject = f"{BABYLLAMA} in nf4{also}, batches of {size}"
        form = Form(quantize="nf4", targets=tried.targets, batch_size=size)
        problem = text_problem(assets.model(BABYLLAMA), text, form, nodes=8)

        def swarm(way: tuple[int, int, float]) -> Swarm:
            directions, rounds, step = way
            return Swarm(
                rounds=rounds, directions=directions, sides=1, step=step, epsilon=0.003, at_once=directions
            )

        if quick:
            run(subject, problem, swarm((4, 4, 0.05)))
            run(subject, problem, FirstOrder(steps=10, rate=0.01))
            continue
        for rate in tried.adam_few:
            run(subject, problem, FirstOrder(steps=300, rate=rate))
        for rate in tried.adam:
            run(subject, problem, FirstOrder(steps=900, rate=rate))
        mezo = [run(subject, problem, Mezo(steps=300, rate=rate)) for rate in tried.mezo]
        if mezo:
            run(subject, problem, Mezo(steps=2000, rate=_best_rate(mezo)))
        if tried.short is not None:
            for scalars in SCALARS:
                run(subject, problem, replace(swarm(tried.short), scalars=scalars))
        for way in tried.swarms:
            run(subject, problem, swarm(way))


def instructions_problem(form: Form, num_clients: int, nodes: int = 0) -> Problem:
    """Completions of clients of natural-instructions; every client's held-out ones count alike.

    Args:
        form: what is trained, and on how much at a time.
        num_clients: whose data there are.
        nodes: as many as there are clients if 0; else a multiple of that, which share a client's rows, or a divisor, so
            that each has those of several clients.
    """
    model = assets.model(BABYLLAMA)
    tokenizer = bases.load_base(model, threads=1).tokenizer
    folder = assets.data("natural-instructions")

    def rows(*names: str) -> Completions:
        return read_completions([folder / name for name in names], tokenizer, form.sequence_length)

    clients = [f"client{number:02}" for number in range(num_clients)]
    nodes = nodes or num_clients
    together, apart = max(num_clients // nodes, 1), max(nodes // num_clients, 1)
    assert nodes * together == num_clients * apart
    groups = [clients[first : first + together] for first in range(0, num_clients, together)]
    return Problem(
        model=str(model),
        form=form,
        task=Task(kind="completion"),
        private=[
            _every(rows(*(f"{client}.train.jsonl" for client in group)), apart, first)
            for group in groups
            for first in range(apart)
        ],
        pooled=rows(*(f"{client}.train.jsonl" for client in clients)),
        held_out=[rows(f"{client}.test.jsonl") for client in clients],
    )


def instructions(run: Runner, quick: bool) -> None:
    """Sixteen nodes, each with one client's task of its own; every client's held-out completions count alike."""
    clients = 4 if quick else 16
    problem = instructions_problem(Form(quantize="nf4", batch_size=4, sequence_length=256), clients)
    swarm = Swarm(rounds=10 if quick else 80, directions=4, sides=1, step=0.05, epsilon=0.003, at_once=2)
    subject = f"{BABYLLAMA} in nf4, {clients} tasks"
    few, many = (30, None) if quick else (100, 500)
    _compare(run, subject, problem, swarm, few, many, adam_rates=(0.003, 0.01), mezo_rates=(1e-4, 3e-4))
    run(subject, problem, replace(swarm, rounds=max(swarm.rounds // 4, 1), agents=4))


def sentiment_problem(quick: bool, nodes: int = 16) -> Problem:
    """Films praised or not: a linear head on a frozen sentence encoder, some nodes of 432 rows each, or fewer.

    A node's batch is all of its rows: the encoder reads them once, and what a round costs is the head.

    Args:
        quick: nodes of 32 rows, and an eighth of what is held out.
        nodes: 16 share all rows, and more of them too; with fewer, the other rows are nobody's.
    """
    model = assets.encoder()
    num_rows = 32 if quick else 432 * 16 // max(nodes, 16)
    form = Form(targets=(), batch_size=num_rows, sequence_length=64)
    task = Task(kind="head", labels=("0", "1"))
    base = bases.load_base(model, threads=1, labels=task.labels)
    columns = {"text": "1", "label": "2"}

    def rows(*names: str) -> Labelled:
        paths = [assets.data("sst2", f"{name}.tsv") for name in names]
        return read_labelled(paths, base.tokenizer, form.sequence_length, task, base.padding, columns)

    pooled, held_out = rows("train"), rows("dev", "test")
    return Problem(
        model=str(model),
        form=form,
        task=task,
        private=[_every(pooled, max(nodes, 16), node, num_rows) for node in range(nodes)],
        pooled=pooled,
        held_out=[_every(held_out, 8, 0) if quick else held_out],
        metric=row_misses,
    )


def sentiment(run: Runner, quick: bool) -> None:
    """The methods on films praised or not."""
    problem = sentiment_problem(quick, nodes=4 if quick else 16)
    swarm = Swarm(rounds=100 if quick else 8000, directions=4, sides=1, step=0.3, epsilon=0.01)
    few = 20 if quick else 1000
    rates = {"adam_rates": (0.03, 0.1, 0.3), "mezo_rates": (0.03, 0.1, 0.3, 1.0)}
    _compare(run, "MiniLM on SST-2, head", problem, swarm, few, many=None, on_all=True, **rates)


def accuracy(run: Runner, quick: bool) -> None:
    """The share of next tokens that are the likeliest: no gradient leads there, and no cross-entropy is asked for."""
    text = shakespeare_text(8 if quick else 1)
    form = Form(quantize="nf4")
    problem = text_problem(assets.model("stories260K-pad64"), text, form, nodes=8)
    problem = replace(problem, task=Task(objective="accuracy"), metric=row_misses)
    subject = "stories260K-pad64 in nf4, by accuracy"
    swarm = Swarm(rounds=10 if quick else 125, directions=4, sides=1, step=0.03, epsilon=0.01)
    for scalars in SCALARS:
        run(subject, problem, replace(swarm, scalars=scalars))
    few = 40 if quick else 300
    for rate in MEZO_RATES:
        run(subject, problem, Mezo(steps=few, rate=10 * rate, epsilon=swarm.epsilon))


def _compare(
    run: Runner,
    subject: str,
    problem: Problem,
    swarm: Swarm,
    few: int,
    many: int | None,
    on_all: bool = False,
    adam_rates: Sequence[float] = FIRST_ORDER_RATES,
    mezo_rates: Sequence[float] = MEZO_RATES,
) -> None:
    """All methods on one problem; rates are chosen on runs of `few` steps, and first order goes on to `many`."""
    for scalars in SCALARS:
        run(subject, problem, replace(swarm, scalars=scalars))
    adam = FirstOrder(steps=few, rate=0, on_all=on_all)
    first = [run(subject, problem, replace(adam, rate=rate)) for rate in adam_rates]
    if many is not None:
        run(subject, problem, replace(adam, steps=many, rate=_best_rate(first)))
    for rate in mezo_rates:
        run(subject, problem, Mezo(steps=few, rate=rate, on_all=on_all))


def _every(rows: Rows, stride: int, first: int, most: int | None = None) -> Rows:
    """Every `stride`th row from the one numbered `first` on, at most so many."""
    chosen = slice(first, None if most is None else first + stride * most, stride)
    return replace(rows, **{name: getattr(rows, name)[chosen] for name in _OF_EACH_ROW[type(rows)]})


RECIPES: Final = {
    each.number: each
    for each in (
        Recipe(
            number=1,
            title="one text, eight nodes, bases in 4 and 8 bit",
            metric="held-out loss, nats per token",
            run=shakespeare,
        ),
        Recipe(
            number=2,
            title="sixteen nodes, a task of its own on each",
            metric="held-out loss of completions, nats per token, mean over clients",
            run=instructions,
        ),
        Recipe(
            number=3,
            title="a classification head on a sentence encoder",
            metric="held-out error, share of labels",
            run=sentiment,
        ),
        Recipe(
            number=4,
            title="trained by accuracy, which has no gradient",
            metric="held-out error, share of next tokens that are not the likeliest",
            run=accuracy,
        ),
        Recipe(
            number=5,
            title="larger batches, for nodes with a GPU",
            metric="held-out loss, nats per token",
            run=larger_batches,
        ),
    )
}
