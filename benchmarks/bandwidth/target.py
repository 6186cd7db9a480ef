"""What it takes each system to reach a held-out loss: bytes on the wire, forward passes, seconds; on one problem.

Every system runs as its users run it, as processes over real sockets, and leaves the adapter's values after each
exchange; they are measured afterwards, all by the same code. Counters are read as soon as a new exchange is seen.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.bandwidth import flower, runs
from benchmarks.bandwidth.contest import FLOAT_BYTES, Contest, Evaluator
from benchmarks.bandwidth.network import Network
from benchmarks.bandwidth.results import Results, Row
from benchmarks.bandwidth.wire import Say, Unmeasured
from benchmarks.recipes.course import MARKS
from coordinator.rundir import RunDirectory
from coordinator.status import read_status
from zo.manifest import Manifest
from zo.weights import to_float

_LOOK_S: Final = 0.1
_STALL_S: Final = 600.0
LOCAL_STEPS: Final = 10


@dataclass(frozen=True, kw_only=True)
class System:
    """A system and the settings that it is run with; of those with the same name the best counts."""

    name: str
    kind: str
    """ours, flower, gradients or diloco."""
    exchanges: int
    settings: dict[str, Any] = field(default_factory=dict)
    good_at: str = ""


@dataclass(frozen=True)
class Seen:
    """Counters when an exchange was first seen."""

    exchange: int
    seconds: float
    up_bytes: int
    down_bytes: int


def systems(quick: bool) -> list[System]:
    """Everyone who takes part, with as many candidates each: three, of which the best counts; quick: one."""
    local = 4 if quick else 16
    walk = {"probe": {"directions": local, "local_steps": local, "sides": 2, "epsilon": 0.01}}
    alone = {"probe": {"directions": 1, "sides": 2, "epsilon": 0.01}}
    rates = (0.01,) if quick else (0.003, 0.01, 0.03)
    steps = (0.01,) if quick else (0.005, 0.01, 0.02)
    found = [
        System(
            name=f"ours, {local} local steps",
            kind="ours",
            exchanges=4 if quick else 20,
            settings={**walk, "schedule": {"step": step, "full_votes": local, "decay": "linear"}},
            good_at="the fewest bytes; memory of inference; nodes come and go; weights equal to the bit",
        )
        for step in steps
    ]
    if not quick:
        found += [
            System(
                name="ours, a direction a round",
                kind="ours",
                exchanges=300,
                settings={**alone, "schedule": {"step": step, "full_votes": 1, "decay": "linear"}},
                good_at="the least code; fresh weights in every round",
            )
            for step in steps
        ]
        found += [
            System(name=name, kind="ours", exchanges=300, settings=settings, good_at=good_at)
            for name, settings, good_at in published()
        ]
    found += [
        System(
            name="FedAvg, Flower",
            kind="flower",
            exchanges=2 if quick else 3,
            settings={"rate": rate, "local_steps": LOCAL_STEPS},
            good_at="few rounds and few passes; a framework for any model, strategy and device",
        )
        for rate in rates
    ]
    found += [
        System(
            name="gradients, gloo",
            kind="gradients",
            exchanges=10 if quick else 60,
            settings={"rate": rate},
            good_at="the least wall time on a fast link; equals one large batch",
        )
        for rate in rates
    ]
    return found + [
        System(
            name="DiLoCo, gloo",
            kind="diloco",
            exchanges=2 if quick else 6,
            settings={"rate": rate, "local_steps": LOCAL_STEPS, "outer_rate": 0.7},
            good_at="as gradients, with a fraction of the exchanges; no server",
        )
        for rate in rates
    ]


def published() -> list[tuple[str, dict[str, dict[str, Any]], str]]:
    """The published systems as settings of our manifest: name, settings, what it is good at."""
    one = {"directions": 1, "sides": 2, "epsilon": 0.001}
    raw = {"decay": "constant", "normalised": False, "full_votes": 1}
    return [
        (
            "MeZO's and Just One Byte's rule",
            {"probe": one, "schedule": {**raw, "step": 0.001}},
            "no state, no schedule",
        ),
        (
            "DeComFL's rule, one shared direction",
            {
                "probe": one,
                "directions": {"policy": "shared", "combine": "mean"},
                "schedule": {**raw, "step": 0.001},
            },
            "traffic does not grow with model or nodes",
        ),
        (
            "FeedSign's rule, majority of signs",
            {
                "probe": one,
                "codes": {"bits": 1},
                "directions": {"policy": "shared", "combine": "majority"},
                "schedule": {"decay": "constant", "step": 0.01, "full_votes": 1},
            },
            "one bit up and down; withstands liars",
        ),
        (
            "FedKSeed's rule, a pool of 4,096",
            {
                "probe": {"directions": 16, "local_steps": 16, "sides": 2, "epsilon": 0.001},
                "directions": {"policy": "pool", "pool_size": 4096},
                "schedule": {"decay": "constant", "step": 0.01, "full_votes": 16},
            },
            "a newcomer loads a number a seed, whatever came before",
        ),
    ]


def measure(
    network: Network,
    contest: Contest,
    wanted: Sequence[System],
    results: Results,
    say: Say,
    prefix: dict[str, Any],
) -> Iterator[Row | str]:
    """A row for each system; text instead of one that could not be measured.

    Args:
        network: to measure on.
        contest: the problem.
        wanted: systems.
        results: receives every row.
        say: told what is being measured.
        prefix: what else names a row: recipe, quick, rank.
    """
    evaluator: Evaluator | None = None
    for system in wanted:
        settings = {
            **prefix,
            "system": system.name,
            "exchanges": system.exchanges,
            "settings": system.settings,
            "on": network.label,
        }
        row = results.find(settings)
        if row is None:
            say(system.name)
            try:
                evaluator = evaluator or Evaluator(contest)
                found = (
                    _ours(network, contest, system)
                    if system.kind == "ours"
                    else _first_order(network, contest, system)
                )
                row = results.add(
                    settings, {**_judged(found, contest, evaluator, say), "good_at": system.good_at}
                )
            except (Unmeasured, runs.ServiceError, OSError, ValueError) as error:
                yield f"{system.name}: {error}"
                continue
        yield row


@dataclass(frozen=True)
class Found:
    """A run before it is measured: what was seen, values after each exchange, and what an exchange is worth."""

    seen: Sequence[Seen]
    values: Callable[[int], NDArray[np.float32]]
    payload_up: float
    """Bytes per node and exchange."""
    forwards: int
    """Forward passes of all nodes in an exchange."""
    backwards: int
    parameters: int


def _judged(found: Found, contest: Contest, evaluate: Evaluator, say: Say) -> Row:
    """The course of a run, measured at some of its exchanges, and where it passed the target."""
    last = found.seen[-1].exchange
    wanted = sorted({round(mark * last) for mark in MARKS} - {0})
    by_exchange = {each.exchange: each for each in found.seen}
    points = [point(0, 0.0, 0, 0, found, contest.nodes, evaluate(evaluate.start))]
    for exchange in wanted:
        # One that went by unseen has the counters of the next that was seen.
        seen = by_exchange.get(exchange) or next(each for each in found.seen if each.exchange >= exchange)
        say(f"measuring exchange {exchange} of {last}")
        loss = evaluate(found.values(exchange))
        points.append(
            point(exchange, seen.seconds, seen.up_bytes, seen.down_bytes, found, contest.nodes, loss)
        )
    return {
        "nodes": contest.nodes,
        "parameters": found.parameters,
        "target": contest.target,
        "points": points,
        "reached": reached(points, contest.target),
        "end": points[-1]["loss"],
    }


def point(
    exchange: int, seconds: float, up_bytes: int, down_bytes: int, found: Found, nodes: int, loss: float
) -> dict[str, float]:
    """A measurement; bytes are per node, forward passes those of all."""
    return {
        "exchange": exchange,
        "seconds": round(seconds, 2),
        "payload_up": found.payload_up * exchange,
        "wire_up": up_bytes / nodes,
        "wire_down": down_bytes / nodes,
        "forwards": found.forwards * exchange,
        "backwards": found.backwards * exchange,
        "loss": round(loss, 5),
    }


def reached(points: Sequence[dict[str, float]], target: float) -> dict[str, float] | None:
    """Where a run came down to the target, between two points linearly; None if it never did."""
    for before, after in pairwise(points):
        if after["loss"] <= target < before["loss"]:
            share = (before["loss"] - target) / (before["loss"] - after["loss"])
            # Nobody can stop within an exchange: those are counted whole.
            exchange = min(
                int(np.ceil(before["exchange"] + share * (after["exchange"] - before["exchange"]))),
                after["exchange"],
            )
            share = (exchange - before["exchange"]) / (after["exchange"] - before["exchange"])
            return {name: before[name] + share * (after[name] - before[name]) for name in before}
    return None


def _watch(
    network: Network,
    exchanges: int,
    latest: Callable[[], int],
    is_alive: Callable[[], bool],
    *,
    among_nodes: bool,
) -> list[Seen]:
    """Counters at each new exchange until the last.

    Raises:
        Unmeasured: nothing came for a long time, or the run ended before.
    """
    first = network.count(among_nodes=among_nodes)
    begin = last_at = time.monotonic()
    seen: list[Seen] = []
    while not seen or seen[-1].exchange < exchanges:
        alive, exchange, now = is_alive(), latest(), time.monotonic()
        if exchange > (seen[-1].exchange if seen else 0):
            count = network.count(among_nodes=among_nodes)
            delta = None if count is None or first is None else count - first
            seen.append(
                Seen(exchange, now - begin, delta.up_bytes if delta else 0, delta.down_bytes if delta else 0)
            )
            last_at = now
        elif not alive:
            raise Unmeasured(f"it ended after {seen[-1].exchange if seen else 0} of {exchanges} exchanges")
        elif now - last_at > _STALL_S:
            raise Unmeasured(
                f"no exchange for {_STALL_S:.0f} s, after {seen[-1].exchange if seen else 0} of {exchanges}"
            )
        time.sleep(_LOOK_S)
    return seen


# ---- ours -----------------------------------------------------------------------------------------------------------


def _ours(network: Network, contest: Contest, system: System) -> Found:
    """`zo-coordinator serve` and a `zo-node join` for every node."""
    base, place = Path(contest.model), contest.place / f"ours-{time.monotonic_ns()}"
    place.mkdir()
    errors = place / "errors"
    form = contest.form
    targets = [part for each in form.targets for part in ("--target", each)]
    adapter = ["--rank", str(form.rank), "--alpha", str(form.alpha), "--train", form.train]
    data = ["--batch-size", str(form.batch_size), "--sequence-length", str(form.sequence_length)]
    made = runs.template(place / "template", base, *targets, *adapter, *data)
    manifest = runs.varied(
        made.manifest(),
        {**system.settings, "run": {"rounds": system.exchanges}, "parity": {"digest_every": 16}},
    )
    run = runs.make(place / "run", manifest, contest.nodes, [], base)
    children: list[subprocess.Popen[str]] = []
    with runs.serving(network, run, errors) as (ticket, _), _attended(network, children, errors):
        for node in range(contest.nodes):
            arguments = [
                "join",
                str(ticket),
                "--model",
                contest.model,
                "--data",
                str(contest.text_path(node)),
            ]
            state = ["--state", str(place / f"node-{node}")]
            children.append(network.python("nodes", "node.cli", *arguments, *state, errors=errors))
        directory = RunDirectory(run.path)
        with directory.ledger(directory.manifest(), read_only=True) as ledger:
            seen = _watch(
                network, system.exchanges, ledger.num_commits, lambda: _are_well(children), among_nodes=False
            )
    return _replayed(run, contest, manifest, system, seen)


def _replayed(
    run: RunDirectory, contest: Contest, manifest: Manifest, system: System, seen: Sequence[Seen]
) -> Found:
    """What the ledger says: values after any round, and what the reports weighed."""
    manifest = run.manifest()
    with run.ledger(manifest, read_only=True) as ledger:
        status = read_status(manifest, ledger)
        members = status.of_agent(0)
        payload = sum(each.payload_bytes_up for each in members) / len(members) / system.exchanges

    def values(round: int) -> NDArray[np.float32]:
        with run.ledger(manifest, read_only=True) as ledger:
            return to_float(run.state_at(round, manifest, ledger).weights)

    passes = contest.nodes * manifest.probe.directions * manifest.probe.sides
    return Found(seen, values, payload, passes, 0, manifest.adapter.size)


# ---- first order ----------------------------------------------------------------------------------------------------


def _first_order(network: Network, contest: Contest, system: System) -> Found:
    """Flower, or workers over gloo."""
    size = int(np.load(contest.start_path).size)
    folder = contest.place / ("flower" if system.kind == "flower" else "gloo")
    errors = contest.place / f"{system.kind}.err"
    if system.kind == "flower":
        settings = system.settings
        with flower.running(
            network, contest, system.exchanges, settings["local_steps"], settings["rate"], errors
        ) as process:
            seen = _watch(
                network,
                system.exchanges,
                lambda: _latest(folder),
                lambda: process.poll() is None,
                among_nodes=False,
            )
    else:
        seen = _gloo(network, contest, system, folder, errors)
    if system.kind == "flower" and np.array_equal(np.load(folder / "1.npy"), np.load(contest.start_path)):
        raise Unmeasured(f"no client of Flower answered: {errors.read_text()[-600:]}")
    kept = {each.exchange: np.load(folder / f"{each.exchange}.npy") for each in seen}
    every = {int(path.stem): np.load(path) for path in folder.glob("[0-9]*.npy")} | kept
    local = system.settings.get("local_steps", 1)
    passes = contest.nodes * local
    return Found(seen, every.__getitem__, float(FLOAT_BYTES * size), passes, passes, size)


def _gloo(network: Network, contest: Contest, system: System, folder: Path, errors: Path) -> list[Seen]:
    """Workers that send to each other, counted where they do so: on the loopback interface of their namespace."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    settings = json.dumps({**system.settings, "kind": system.kind, "exchanges": system.exchanges})
    more = [str(contest.nodes), str(29_400 + len(system.name)), settings]
    children = [
        network.python(
            "nodes", "benchmarks.bandwidth.gloo_worker", str(contest.place), str(rank), *more, errors=errors
        )
        for rank in range(contest.nodes)
    ]
    with _attended(network, children, errors):
        return _watch(
            network, system.exchanges, lambda: _latest(folder), lambda: _are_well(children), among_nodes=True
        )


@contextlib.contextmanager
def _attended(network: Network, children: Sequence[subprocess.Popen[str]], errors: Path) -> Iterator[None]:
    """Where something goes wrong, what the children said last is told with it; none of them stays behind."""
    try:
        yield
    except Unmeasured as error:
        raise Unmeasured(f"{error}: {errors.read_text()[-400:]}") from error
    finally:
        for child in children:
            with contextlib.suppress(Exception):
                child.wait(10)
            network.stop(child)


def _are_well(children: Sequence[subprocess.Popen[str]]) -> bool:
    """Whether all of them run, or have ended in good order."""
    return all(child.poll() in (None, 0) for child in children)


def _latest(folder: Path) -> int:
    """The last exchange whose values are there."""
    return max((int(path.stem) for path in folder.glob("[0-9]*.npy")), default=0)


def best(rows: Sequence[Row]) -> list[Row]:
    """Of every system the candidate that reached the target with the fewest bytes up, or else came nearest."""

    def merit(row: Row) -> tuple[bool, float, float]:
        hit = row["reached"]
        return hit is None, hit["wire_up"] if hit else 0.0, row["end"]

    names = dict.fromkeys(row["system"] for row in rows)
    return [min((row for row in rows if row["system"] == name), key=merit) for name in names]


def cells(row: Row) -> list[str]:
    """A row for people."""
    hit = row["reached"]
    if hit is None:
        return [row["system"], f"not reached: {row['end']:.3f}", "", "", "", "", "", ""]
    return [
        row["system"],
        f"{row['target']:g}",
        f"{hit['exchange']:.0f}",
        f"{hit['payload_up']:,.0f}",
        f"{hit['wire_up']:,.0f}",
        f"{hit['wire_down']:,.0f}",
        f"{hit['forwards']:,.0f}{' and as many backward' if hit['backwards'] else ''}",
        f"{hit['seconds']:.0f} s",
    ]


HEADINGS: Final = (
    "system",
    "loss",
    "exchanges",
    "payload up",
    "wire up",
    "wire down",
    "forward passes",
    "time",
)
