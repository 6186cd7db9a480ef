"""Rounds over links that are thin, slow or lossy: how many an hour, whether nodes stay, how long to a target.

A real coordinator, light nodes, and `emulator` between them. Nodes take no time to probe: the link alone counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks.bandwidth import runs
from benchmarks.bandwidth.network import Network
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
    return f"{bits_per_s / 1e6:g} Mbit/s" if bits_per_s >= 1e6 else f"{bits_per_s / 1e3:g} kbit/s"


def ways(quick: bool) -> list[Way]:
    """The links to measure."""
    if quick:
        return [
            Way(bits_per_s=rate, round_trip_s=ROUND_TRIP_S, loss=loss)
            for rate, loss in ((1_200, 0.0), (50_000, 0.1))
        ]
    return [Way(bits_per_s=rate, round_trip_s=ROUND_TRIP_S, loss=loss) for rate in RATES for loss in LOSSES]


def measure(
    network: Network, wanted: Sequence[Way], manifest: Manifest, results: Results, seconds: float, say: Say
) -> Iterator[Row | str]:
    """A row for each link; text instead of one that could not be measured.

    Args:
        network: to measure on; its wire is replaced.
        wanted: the links.
        manifest: to vary.
        results: receives every row.
        seconds: how long to count rounds, once everybody takes part.
        say: told what is being measured.
    """
    for way in wanted:
        settings = {
            **asdict(way),
            "nodes": NODES,
            "directions": DIRECTIONS,
            "seconds": seconds,
            "on": "TAP, user space",
        }
        row = results.find(settings)
        if row is None:
            if network.interface is None:
                yield f"{way}: {network.label}; links are emulated between namespaces"
                continue
            say(str(way))
            try:
                row = results.add(settings, _measure(network, way, manifest, seconds))
            except (Unmeasured, runs.ServiceError, OSError) as error:
                yield f"{way}: {error}"
                continue
        yield row


def _measure(network: Network, way: Way, manifest: Manifest, seconds: float) -> Row:
    with tempfile.TemporaryDirectory(prefix="zo-bench-") as name:
        place = Path(name)
        keys = [new_key_pair() for _ in range(NODES)]
        varied = runs.varied(manifest, {"probe": {"directions": DIRECTIONS}})
        run = runs.make(place / "run", varied, NODES, [each.public for each in keys])
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
    per_hour = 3600 * found["rounds"] / found["seconds"]
    each = NODES * found["rounds"]
    return {
        "rounds": found["rounds"],
        "measured_s": found["seconds"],
        "rounds_per_hour": per_hour,
        "disconnects": found["disconnects"],
        "joined_s": found["joined_s"],
        "wire_up": found["wire_up"] / each,
        "wire_down": found["wire_down"] / each,
    }


def seconds_to(exchanges: float, row: Row) -> float:
    """How long so many rounds of ours take over a measured link, joining included, without probing."""
    return float(row["joined_s"] + 3600 * exchanges / row["rounds_per_hour"])


def seconds_computed(up_bytes: float, down_bytes: float, exchanges: float, way: Way) -> float:
    """How long a system's bytes of a node and its exchanges take over a link at best: computed, without loss.

    Everything goes through the link once, and each exchange waits for a round trip.
    """
    return 8 * (up_bytes + down_bytes) / way.bits_per_s + exchanges * way.round_trip_s


def cells(row: Row) -> list[str]:
    """A row for people."""
    return [
        rate_text(row["bits_per_s"]),
        f"{1000 * row['round_trip_s']:.0f} ms",
        f"{row['loss']:.0%}",
        f"{row['rounds_per_hour']:,.0f}",
        str(row["disconnects"]),
        f"{row['joined_s']:.0f} s",
        f"{row['wire_up']:,.0f}",
        f"{row['wire_down']:,.0f}",
    ]


HEADINGS: Final = (
    "link",
    "round trip",
    "loss",
    "rounds an hour",
    "disconnects",
    "all joined after",
    "B up",
    "B down",
)
