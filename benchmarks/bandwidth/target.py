"""What it takes each system to reach a held-out loss: bytes on the wire, forward passes, seconds; on one problem.

Every system runs as its users run it (`contenders`), and leaves the adapter's values after each exchange; they are
measured afterwards, all by the same code. Counters are read as soon as a new exchange is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np

from benchmarks.bandwidth import contenders, runs
from benchmarks.bandwidth.contenders import Found
from benchmarks.bandwidth.contest import Contest, Evaluator
from benchmarks.bandwidth.network import Network
from benchmarks.bandwidth.results import Results, Row
from benchmarks.bandwidth.systems import Settings, System
from benchmarks.bandwidth.wire import Say, Unmeasured

MARKS: Final = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
"""Shares of a run after which it is measured."""


def measure(
    network: Network,
    contest: Contest,
    wanted: Sequence[System],
    results: Results,
    say: Say,
    prefix: dict[str, Any],
) -> Iterator[Row | str]:
    """A row for each run of each system; text instead of one that could not be measured.

    Args:
        network: to measure on.
        contest: the problem.
        wanted: systems.
        results: receives every row.
        say: told what is being measured.
        prefix: what else names a row: recipe, quick, rank.
    """
    judge = _Judge(contest)
    for system in wanted:
        tried: list[Row] = []
        for settings in system.candidates:
            row = _row(network, contest, system, settings, bool(system.search), judge, results, say, prefix)
            yield row
            if not isinstance(row, str):
                tried.append(row)
        if system.search:
            if not tried:
                yield f"{system.name}: none of its short runs came to an end, so there is no step to go on with"
                continue
            settings = min(tried, key=lambda row: row["end"])["settings"]
            yield _row(network, contest, system, settings, False, judge, results, say, prefix)


class _Judge:
    """Loads the model only if something is measured at all."""

    def __init__(self, contest: Contest) -> None:
        self._contest = contest
        self._evaluator: Evaluator | None = None

    @property
    def evaluator(self) -> Evaluator:
        if self._evaluator is None:
            self._evaluator = Evaluator(self._contest)
        return self._evaluator


def _row(
    network: Network,
    contest: Contest,
    system: System,
    candidate: Settings,
    search: bool,
    judge: _Judge,
    results: Results,
    say: Say,
    prefix: dict[str, Any],
) -> Row | str:
    exchanges = system.search if search else system.exchanges
    settings = {
        **prefix,
        "system": system.name,
        "exchanges": exchanges,
        "search": search,
        "settings": candidate,
        "on": network.label,
    }
    row = results.find(settings)
    if row is not None:
        return row
    name = f"{system.name}{', a short run' if search else ''}"
    say(name)
    try:
        found = contenders.run(
            network,
            contest,
            system,
            candidate,
            exchanges,
            lambda done: say(f"{name}: {done} of {exchanges} exchanges"),
        )
        marks = (1.0,) if search else MARKS
        measured = _judged(found, contest, judge.evaluator, marks, say)
    except (Unmeasured, runs.ServiceError, OSError, ValueError) as error:
        return f"{system.name}: {error}"
    return results.add(settings, {**measured, "good_at": system.good_at, "carried": system.carried})


def _judged(found: Found, contest: Contest, evaluate: Evaluator, marks: Sequence[float], say: Say) -> Row:
    """The course of a run, measured at some of its exchanges, and where it passed the target."""
    last = found.seen[-1].exchange
    wanted = sorted({round(mark * last) for mark in marks} - {0})
    by_exchange = {each.exchange: each for each in found.seen}
    points = [point(0, 0.0, 0, 0, found, evaluate.at_start)]
    for exchange in wanted:
        # One that went by unseen has the counters of the next that was seen.
        seen = by_exchange.get(exchange) or next(each for each in found.seen if each.exchange >= exchange)
        say(f"measuring exchange {exchange} of {last}")
        loss = evaluate(found.values(exchange))
        points.append(point(exchange, seen.seconds, seen.up_bytes, seen.down_bytes, found, loss))
    return {
        "nodes": found.nodes,
        "parameters": found.parameters,
        "target": contest.target,
        "metric": contest.metric,
        "points": points,
        "reached": reached(points, contest.target),
        "end": points[-1]["loss"],
    }


def point(
    exchange: int, seconds: float, up_bytes: int, down_bytes: int, found: Found, loss: float
) -> dict[str, float]:
    """A measurement; bytes are per node, forward passes those of all."""
    return {
        "exchange": exchange,
        "seconds": round(seconds, 2),
        "payload_up": found.payload_up * exchange,
        "wire_up": up_bytes / found.nodes,
        "wire_down": down_bytes / found.nodes,
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


def best(rows: Sequence[Row]) -> list[Row]:
    """Of every system the whole run that reached the target with the fewest bytes up, or else came nearest."""

    def merit(row: Row) -> tuple[bool, float, float]:
        hit = row["reached"]
        return hit is None, hit["wire_up"] if hit else 0.0, row["end"]

    whole = [row for row in rows if not row.get("search")]
    names = dict.fromkeys(row["system"] for row in whole)
    return [min((row for row in whole if row["system"] == name), key=merit) for name in names]


def cells(row: Row) -> list[str]:
    """A row for people."""
    hit = row["reached"]
    if hit is None:
        last = row["points"][-1]
        spent = [f"({last[name]:,.0f})" for name in ("exchange", "payload_up", "wire_up", "wire_down")]
        return [row["system"], f"not reached: {row['end']:.3f}", *spent, *_effort(last)]
    return [
        row["system"],
        f"{row['target']:g}",
        f"{hit['exchange']:.0f}",
        f"{hit['payload_up']:,.0f}",
        f"{hit['wire_up']:,.0f}",
        f"{hit['wire_down']:,.0f}",
        *_effort(hit),
    ]


def _effort(point: dict[str, float]) -> list[str]:
    both = " and as many backward" if point["backwards"] else ""
    return [f"{point['forwards']:,.0f}{both}", f"{point['seconds']:.0f} s"]


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
