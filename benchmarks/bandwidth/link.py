"""Exchanges over links that are thin, slow or lossy: how many an hour, whether nodes stay, how long to a target.

Real coordinators and servers, and `emulator` between them and their nodes. Ours are light nodes, which take no time to
probe; Flower's clients send noise instead of training: the link alone counts. What cannot be measured, or would take
too long, is computed (`loads`), and its row says so. Time to the target is that of so many exchanges as `target` found.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.bandwidth import contenders, flower, runs
from benchmarks.bandwidth.loads import DAY_S, LOADS, PARAMETERS, TENSORS, Load
from benchmarks.bandwidth.network import Network, NetworkError
from benchmarks.bandwidth.results import Results, Row
from benchmarks.bandwidth.wire import Clients, Say, Unmeasured
from transport.keys import new_key_pair
from zo.manifest import Manifest

RATES: Final = (1_200, 9_600, 50_000, 1_000_000)
LOSSES: Final = (0.0, 0.01, 0.1)
ROUND_TRIP_S: Final = 0.6
NODES: Final = 8
DIRECTIONS: Final = 16
"""As recipe 1 with 16 local steps."""
PIPELINED: Final = "ours, 4 directions a round, pipelined"
OURS: Final = {
    "ours, 16 local steps": DIRECTIONS,
    "ours, 64 local steps": 64,
    "ours, 4 directions a round": 4,
    PIPELINED: 4,
}
"""Codes in a report of ours, by the name of the system in `target`."""
FLOWER: Final = {"FedAvg, Flower": False, "FedAvg int8, Flower": True}
"""Whether in int8."""
_FLOWER_NODES: Final = 2
"""Everybody has a link of his own, and Flower starts a process for each message: eight would wait for this machine."""
_FLOWER_ROUNDS: Final = 2
_MEASURED_UP_TO_S: Final = 120.0
"""An exchange that takes longer by arithmetic is not measured."""
_JOIN_WITHIN_S: Final = 300.0
_SEED: Final = 7


@dataclass(frozen=True, kw_only=True)
class Way:
    """A link."""

    bits_per_s: int
    round_trip_s: float
    loss: float

    def __str__(self) -> str:
        return f"{rate_text(self.bits_per_s)}, {1000 * self.round_trip_s:.0f} ms, {self.loss:.0%} loss"


def rate_text(bits_per_s: float) -> str:
    """A link's rate for people."""
    for unit, size in (("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits_per_s >= size:
            return f"{bits_per_s / size:.4g} {unit}"
    return f"{bits_per_s:.3g} bit/s"


def pairs(quick: bool) -> list[tuple[str, Way]]:
    """Systems and the links they are to go over, in the order of measuring."""

    def way(rate: int, loss: float) -> Way:
        return Way(bits_per_s=rate, round_trip_s=ROUND_TRIP_S, loss=loss)

    if quick:
        return [
            ("ours, 16 local steps", way(1_200, 0.0)),
            ("ours, 64 local steps", way(50_000, 0.1)),
            ("FedAvg int8, Flower", way(1_000_000, 0.0)),
            *((name, way(1_200, 0.0)) for name in LOADS),
        ]
    ways = [way(rate, loss) for rate in RATES for loss in LOSSES]
    found = [(name, each) for name in (*OURS, *FLOWER) for each in ways]
    rest = [(name, way(rate, 0.0)) for name in LOADS if name not in FLOWER for rate in RATES]
    return [each for each in found if is_measured(*each) or not each[1].loss] + rest


def is_measured(system: str, way: Way) -> bool:
    """Whether a system is really run over a link: not if it has no server there, or would take too long."""
    if system in OURS:
        return True
    return system in FLOWER and LOADS[system].seconds(way.bits_per_s, way.round_trip_s) <= _MEASURED_UP_TO_S


def measure(
    network: Network,
    wanted: Sequence[tuple[str, Way]],
    manifest: Manifest,
    results: Results,
    seconds: float,
    say: Say,
    exchanges: Mapping[str, float],
) -> Iterator[Row | str]:
    """A row for each system and link; text instead of one that could not be measured.

    Args:
        network: to measure on; its wire is replaced.
        wanted: the systems and links.
        manifest: to vary, for ours.
        results: receives every row, but for the time to the target, which is made of it afterwards.
        seconds: how long to count rounds of ours, once everybody takes part.
        say: told what is being measured.
        exchanges: to the target, by system, as far as `target` has found them.
    """
    for system, way in wanted:
        row = _row(network, system, way, manifest, results, seconds, say)
        yield row if isinstance(row, str) else with_target(row, exchanges.get(system))


def _row(
    network: Network,
    system: str,
    way: Way,
    manifest: Manifest,
    results: Results,
    seconds: float,
    say: Say,
) -> Row | str:
    settings: dict[str, Any] = {"system": system, **asdict(way)}
    if not is_measured(system, way):
        settings["on"] = f"computed from {LOADS[system]}"
        return results.find(settings) or results.add(settings, _computed(LOADS[system], way))
    nodes, directions = (NODES, OURS[system]) if system in OURS else (_FLOWER_NODES, 0)
    settings |= {"nodes": nodes, "directions": directions, "seconds": seconds, "on": "TAP, user space"}
    row = results.find(settings)
    if row is not None:
        return row
    name = f"{system} over {way}"
    if network.interface is None:
        return f"{name}: {network.label}; links are emulated between namespaces"
    say(name)
    try:
        measured = (
            _ours(network, way, runs.varied(manifest, _varying(system)), seconds)
            if system in OURS
            else _flower(network, way, FLOWER[system])
        )
    except (Unmeasured, runs.ServiceError, NetworkError, OSError) as error:
        return f"{name}: {error}"
    return results.add(settings, measured)


def _varying(system: str) -> runs.Settings:
    """What of the manifest is a system of ours' own."""
    return {"probe": {"directions": OURS[system]}, "run": {"pipeline": int(system == PIPELINED)}}


def _computed(load: Load, way: Way) -> Row:
    exchange_s = load.seconds(way.bits_per_s, way.round_trip_s)
    return {
        "exchange_s": exchange_s,
        "rounds_per_hour": 3600 / exchange_s,
        "disconnects": None,
        "joined_s": 0.0,
        "wire_up": load.up_bytes,
        "wire_down": load.down_bytes,
    }


def _ours(network: Network, way: Way, manifest: Manifest, seconds: float) -> Row:
    """Rounds of ours, counted as long as told."""
    with tempfile.TemporaryDirectory(prefix="zo-bench-") as name:
        place = Path(name)
        keys = [new_key_pair() for _ in range(NODES)]
        run = runs.make(place / "run", manifest, NODES, [each.public for each in keys])
        with network.emulated(way.bits_per_s, way.round_trip_s / 2, way.loss, _SEED, place / "emulator.err"):
            clients = Clients(network, place / "clients.err")
            try:
                with runs.serving(network, run, place / "serve.err") as (ticket, _):
                    found: Row = clients.ask(
                        ticket,
                        keys,
                        "beat",
                        beat_s=0.0,
                        think_s=0.0,
                        seconds=seconds,
                        begin_round=2,
                        join_within_s=_JOIN_WITHIN_S,
                        leave_s=1.0,
                    )
            finally:
                clients.close()
    if not found["rounds"]:
        raise Unmeasured(
            f"no round in {found['seconds']:.0f} s: {found['disconnects']} connections were lost"
        )
    each = NODES * found["rounds"]
    return {
        "rounds": found["rounds"],
        "measured_s": found["seconds"],
        "exchange_s": found["seconds"] / found["rounds"],
        "rounds_per_hour": 3600 * found["rounds"] / found["seconds"],
        "disconnects": found["disconnects"],
        "joined_s": found["joined_s"],
        "wire_up": found["wire_up"] / each,
        "wire_down": found["wire_down"] / each,
    }


def _flower(network: Network, way: Way, int8: bool) -> Row:
    """Two rounds of Flower: the second is an exchange, and what the first took longer is joining."""
    with tempfile.TemporaryDirectory(prefix="zo-bench-") as name:
        place = Path(name)
        np.save(place / "start.npy", np.zeros(PARAMETERS, np.float32))
        sizes = [len(each) for each in np.array_split(np.arange(PARAMETERS), TENSORS)]
        np.save(place / "sizes.npy", sizes)
        errors, folder = place / "flower.err", place / "flower"
        with (
            network.emulated(way.bits_per_s, way.round_trip_s / 2, way.loss, _SEED, place / "emulator.err"),
            flower.running(
                network, place, _FLOWER_NODES, errors, rounds=_FLOWER_ROUNDS, steps=0, int8=int8
            ) as process,
        ):
            seen = contenders.watch(
                network,
                _FLOWER_ROUNDS,
                lambda: contenders.latest_of(folder),
                lambda: process.poll() is None,
                lambda _: None,
                among_nodes=False,
                stall_s=4 * _MEASURED_UP_TO_S,
            )
        if np.array_equal(np.load(folder / "2.npy"), np.load(place / "start.npy")):
            raise Unmeasured(f"no client of Flower answered: {errors.read_text()[-400:]}")
    first, last = seen[0], seen[-1]
    exchange_s = (last.seconds - first.seconds) / max(last.exchange - first.exchange, 1)
    if last is first:
        exchange_s = last.seconds / last.exchange
    return {
        "rounds": _FLOWER_ROUNDS,
        "measured_s": last.seconds,
        "exchange_s": exchange_s,
        "rounds_per_hour": 3600 / exchange_s,
        "disconnects": None,
        "joined_s": max(first.seconds - exchange_s * first.exchange, 0.0),
        "wire_up": last.up_bytes / last.exchange / _FLOWER_NODES,
        "wire_down": last.down_bytes / last.exchange / _FLOWER_NODES,
    }


def with_target(row: Row, exchanges: float | None) -> Row:
    """A row and what it means: seconds to the target, whether that is a day at most, and from which rate on."""
    if exchanges is None:
        return {**row, "exchanges": None, "target_s": None, "is_usable": None, "usable_from": None}
    load = Load(up_bytes=row["wire_up"], down_bytes=row["wire_down"], round_trips=1)
    if row["system"] in LOADS:
        load = LOADS[row["system"]]
    target_s = row["joined_s"] + exchanges * row["exchange_s"]
    return {
        **row,
        "exchanges": exchanges,
        "target_s": target_s,
        "is_usable": target_s <= DAY_S,
        "usable_from": load.slowest(exchanges, row["round_trip_s"]),
    }


def seconds_to(exchanges: float, row: Row) -> float:
    """How long so many exchanges take over a measured link, joining included, without anybody's computing."""
    return float(row["joined_s"] + 3600 * exchanges / row["rounds_per_hour"])


def seconds_computed(up_bytes: float, down_bytes: float, exchanges: float, way: Way) -> float:
    """How long a system's bytes of a node and its exchanges take over a link at best: computed, without loss.

    Everything goes through the link once, and each exchange waits for a round trip.
    """
    return 8 * (up_bytes + down_bytes) / way.bits_per_s + exchanges * way.round_trip_s


def cells(row: Row) -> list[str]:
    """A row of `with_target` for people."""
    per_hour, target_s, usable_from = 3600 / row["exchange_s"], row["target_s"], row["usable_from"]
    return [
        row["system"],
        rate_text(row["bits_per_s"]),
        f"{row['loss']:.0%}",
        "computed" if row["on"].startswith("computed") else "measured",
        f"{per_hour:,.3g}" if per_hour < 100 else f"{per_hour:,.0f}",
        "" if row["disconnects"] is None else str(row["disconnects"]),
        f"{row['joined_s']:.0f} s",
        f"{row['wire_up']:,.0f}",
        f"{row['wire_down']:,.0f}",
        "" if target_s is None else f"{target_s:,.0f} s" + ("" if row["is_usable"] else ", too long"),
        "" if usable_from is None else rate_text(usable_from),
    ]


HEADINGS: Final = (
    "system",
    "link",
    "loss",
    "how",
    "exchanges an hour",
    "disconnects",
    "all joined after",
    "B up",
    "B down",
    "to the target",
    "usable from",
)
