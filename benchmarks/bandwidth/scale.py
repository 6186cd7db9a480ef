"""How many nodes one coordinator serves, and where that ends, and why: processor time, memory and bytes a round.

Nodes are light, but each has a real socket and a real session, and reports once a second.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import machine
from benchmarks.bandwidth import runs
from benchmarks.bandwidth.network import Network
from benchmarks.bandwidth.results import Results, Row
from benchmarks.bandwidth.wire import Clients, Say, Unmeasured
from coordinator.rundir import RunDirectory
from transport.keys import new_key_pair
from zo.manifest import Manifest

NODES: Final = (16, 64, 256, 1000, 4000)
QUICK_NODES: Final = (16, 256)
BEAT_S: Final = 1.0
_OF_A_PROCESS: Final = 1000
_GAP_S: Final = 0.001
_WARM_UP: Final = 3
_JOIN_WITHIN_S: Final = 240.0
_KEEPS_UP: Final = 0.9
"""Share of the rounds that were due."""
_FULL: Final = 0.9
"""Share of a core."""


@dataclass(frozen=True)
class Sample:
    """The coordinator at a moment."""

    at: float
    round: int
    cpu_s: float
    """Processor time of its process, in which is the kernel's part of its network traffic."""
    nodes_cpu_s: float
    """Of the nodes' processes."""
    machine_cpu_s: float
    """Of everything on the machine, this too."""
    memory_bytes: int
    up_bytes: int
    """On the wire, of all nodes; 0 where nobody counts them."""
    down_bytes: int


def measure(
    network: Network, counts: Sequence[int], manifest: Manifest, results: Results, seconds: float, say: Say
) -> Iterator[Row | str]:
    """A row for each number of nodes, also past the first that cannot be kept up with: it says why.

    Args:
        network: to measure on.
        counts: numbers of nodes, ascending.
        manifest: to vary.
        results: receives every row.
        seconds: how long to count, once everybody takes part.
        say: told what is being measured.
    """
    for count in counts:
        settings = {"nodes": count, "seconds": seconds, "beat_s": BEAT_S, "on": network.label}
        row = results.find(settings)
        if row is None:
            say(f"{count:,} nodes")
            try:
                row = results.add(settings, _measure(network, count, manifest, seconds))
            except (Unmeasured, runs.ServiceError, OSError) as error:
                yield f"{count:,} nodes: {error}"
                continue
        yield row


def summary(samples: Sequence[Sample], nodes: int) -> Row:
    """What the samples of one run come to, from the first after the warm-up to the last that saw a new round."""
    warm = [each for each in samples if each.round >= _WARM_UP]
    if not warm or warm[-1].round == warm[0].round:
        raise Unmeasured(f"no rounds were committed with {nodes:,} nodes after the first {_WARM_UP}")
    first = warm[0]
    last = next(each for each in warm if each.round == warm[-1].round)
    rounds, elapsed = last.round - first.round, last.at - first.at
    rounds_per_s = rounds / elapsed
    return {
        "rounds": rounds,
        "rounds_per_s": rounds_per_s,
        "cpu_ms_per_round": 1000 * (last.cpu_s - first.cpu_s) / rounds,
        "cpu_share": (last.cpu_s - first.cpu_s) / elapsed,
        "nodes_cpu_share": (last.nodes_cpu_s - first.nodes_cpu_s) / elapsed,
        "machine_cpu_share": (last.machine_cpu_s - first.machine_cpu_s) / elapsed,
        "memory_bytes": max(each.memory_bytes for each in warm),
        "wire_up": (last.up_bytes - first.up_bytes) / rounds / nodes,
        "wire_down": (last.down_bytes - first.down_bytes) / rounds / nodes,
        "keeps_up": rounds_per_s >= _KEEPS_UP / BEAT_S,
    }


def reason(row: Row, num_cores: int) -> str:
    """Why a coordinator does not keep up, in words; empty if it does. Shares are of one core."""
    if row["still_up"] < row["nodes"]:
        return f"{row['nodes'] - row['still_up']:,} nodes lost their connection"
    if row["keeps_up"]:
        return ""
    if row["cpu_share"] > _FULL:
        return "the coordinator is one thread, and its core is full"
    others = max(0.0, row["machine_cpu_share"] - row["cpu_share"] - row["nodes_cpu_share"])
    shares = (
        f"the coordinator takes {row['cpu_share']:.0%} of a core, the nodes {row['nodes_cpu_share']:.0%}, "
        f"and what else runs here {others:.0%}"
    )
    if row["machine_cpu_share"] > _FULL * num_cores:
        return f"{shares}: the machine's {num_cores} cores are full"
    return f"{shares}: a round, from report to commit, takes longer than {BEAT_S:g} s"


def _measure(network: Network, count: int, manifest: Manifest, seconds: float) -> Row:
    with tempfile.TemporaryDirectory(prefix="zo-bench-") as name:
        place = Path(name)
        keys = [new_key_pair() for _ in range(count)]
        run = runs.make(place / "run", runs.varied(manifest, {}), count, [each.public for each in keys])
        groups = [keys[start : start + _OF_A_PROCESS] for start in range(0, count, _OF_A_PROCESS)]
        clients: list[Clients] = []
        try:
            with runs.serving(network, run, place / "serve.err") as (ticket, process):
                for index, group in enumerate(groups):
                    clients.append(Clients(network, place / f"clients-{index}.err"))
                    clients[-1].order(
                        ticket,
                        group,
                        "beat",
                        beat_s=BEAT_S,
                        think_s=0.0,
                        seconds=seconds,
                        begin_round=_WARM_UP,
                        join_within_s=_JOIN_WITHIN_S,
                        gap_s=_GAP_S,
                        share=True,
                    )
                own = [each.process for each in clients]
                samples = list(_samples(network, run.path, process.pid, own, seconds))
                answers = [each.answer() for each in clients]
        finally:
            for each in clients:
                each.close()
    row = summary(samples, count) | {
        "nodes": count,
        "still_up": sum(each["still_up"] for each in answers),
        "disconnects": sum(each["disconnects"] for each in answers),
        "joined_s": max(each["joined_s"] for each in answers),
    }
    return row | {"why": reason(row, machine.num_cores())}


def _samples(
    network: Network, run: Path, process: int, nodes: Sequence[int], seconds: float
) -> Iterator[Sample]:
    """The coordinator every half a second, until rounds have come for `seconds` after the warm-up."""
    directory = RunDirectory(run)
    manifest = directory.manifest()
    until, counted_from = time.monotonic() + _JOIN_WITHIN_S + seconds, None
    with directory.ledger(manifest, read_only=True) as ledger:
        while (now := time.monotonic()) < until:
            wire = network.count()
            sample = Sample(
                at=now,
                round=ledger.num_commits(),
                cpu_s=cpu_seconds(process),
                nodes_cpu_s=sum(cpu_seconds(each) for each in nodes),
                machine_cpu_s=machine_cpu_seconds(),
                memory_bytes=memory_bytes(process),
                up_bytes=0 if wire is None else wire.up_bytes,
                down_bytes=0 if wire is None else wire.down_bytes,
            )
            yield sample
            if sample.round >= _WARM_UP and counted_from is None:
                counted_from = now
            if counted_from is not None and now - counted_from > seconds - 1:
                return
            time.sleep(0.5)


def cpu_seconds(process: int) -> float:
    """Processor time of a process so far, all its threads.

    Raises:
        OSError: it is gone.
    """
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine_cpu_seconds() -> float:
    """Processor time of everything on this machine so far: all but idle, and what a host did instead."""
    user, nice, system, _, _, interrupts, soft, *_ = (
        Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    ticks = sum(int(each) for each in (user, nice, system, interrupts, soft))
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_bytes(process: int) -> int:
    """Resident memory of a process. Raises OSError."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cells(row: Row) -> list[Any]:
    """A row for people."""
    return [
        f"{row['nodes']:,}",
        f"{row['rounds_per_s']:.2f}",
        f"{row['cpu_ms_per_round']:.0f} ms",
        f"{row['memory_bytes'] / 1e6:.0f} MB",
        f"{row['wire_up']:,.0f}",
        f"{row['wire_down']:,.0f}",
        f"{row['nodes'] * (row['wire_up'] + row['wire_down']) / 1000:,.0f} kB",
        f"{row['joined_s']:.0f} s",
        row["why"],
    ]


HEADINGS: Final = (
    "nodes",
    "rounds/s",
    "CPU a round",
    "memory",
    "B up",
    "B down",
    "all nodes, a round",
    "all joined after",
    "why no more",
)
