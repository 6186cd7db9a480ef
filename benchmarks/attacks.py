"""What attackers cost an honest swarm: the time of its rounds, quiet and under attack, and the coordinator's memory.

    python -m benchmarks.attacks [--seconds S] [--json] [--out [DIR]]

A real coordinator, real nodes with a small loss, attackers in a process of their own. This process is one of the nodes,
and takes the times of commits as they reach it.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.command import add_json, add_out, command_line, deliver
from benchmarks.soak_node import LogisticTrainer
from benchmarks.soak_swarm import Swarm
from coordinator.rundir import RunDirectory
from node.base import read_digest, read_tokenizer_digest
from node.service import NodeService
from node.state import StateDirectory
from transport.keys import KeyPair, new_key_pair
from transport.sockets import Link, NodeSocket
from transport.ticket import Ticket, parse_ticket

_NODES: Final = 3
_PROBE_S: Final = 0.02
_FRAMES_AT_ONCE: Final = 5000
_GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
_FRAME: Final = b"\x00\x08" + bytes(8)


def half_open(ticket: Ticket, _: KeyPair, number: int, count: Any) -> None:
    """Open connections, one after the other, and say nothing over them."""
    kept = []
    for _index in range(number):
        with contextlib.suppress(OSError):
            kept.append(socket.create_connection((ticket.host, ticket.port), 10))
            count.value += 1
        if len(kept) > 8000:
            kept.pop(0).close()
    time.sleep(3600)


def junk_of_strangers(ticket: Ticket, _: KeyPair, number: int, count: Any) -> None:
    """Frames before the handshake, as many as go through before the other end hangs up; and again."""
    while count.value < number:
        with contextlib.suppress(OSError), socket.create_connection((ticket.host, ticket.port), 10) as end:
            end.sendall(_GREETING + _FRAME * _FRAMES_AT_ONCE)
            count.value += _FRAMES_AT_ONCE
            while end.recv(4096):
                pass
    time.sleep(3600)


def junk_of_a_member(ticket: Ticket, keys: KeyPair, number: int, count: Any) -> None:
    """Frames that are no messages, from a key that is admitted, as fast as they go; again after every cut."""
    end = NodeSocket(ticket, keys)
    while count.value < number:
        links, _frames = end.poll(0.0)
        if Link.DOWN in links or not end.send(b"junk"):
            time.sleep(0.001)
        else:
            count.value += 1
    time.sleep(3600)


ATTACKS: Final[dict[str, tuple[Callable[..., None], int]]] = {
    "half-open connections": (half_open, 10_000),
    "frames of junk from strangers": (junk_of_strangers, 1_000_000),
    "frames of junk from a member": (junk_of_a_member, 1_000_000),
}


class Stopwatch:
    """Starts and ends the attacks, and takes the times of rounds, from within a node."""

    def __init__(
        self, ticket: Ticket, keys: KeyPair, coordinator: int, seconds: float, show: Console
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._ticket, self._keys, self._coordinator, self._seconds = ticket, keys, coordinator, seconds
        self._show = show
        names = [name for attack in ATTACKS for name in ("quiet", attack)]
        self._phases = [*names, "quiet"]
        self._times: list[float] = []
        self._attacker: BaseProcess | None = None
        self._count: Any = None
        self._until: float | None = None

    def on_round(self, record: dict[str, object]) -> None:
        """A commit has become part of the weights."""
        if "members" in record:
            self._times.append(time.monotonic())

    def on_look(self, _: object) -> None:
        """The node has a moment."""
        now = time.monotonic()
        if not self._times:
            return
        if self._until is not None and now < self._until:
            return
        if self._until is not None:
            self._close()
        if not self._phases:
            signal.raise_signal(signal.SIGTERM)
            return
        name = self._phases[0]
        self._count = multiprocessing.Value("q", 0)
        if name in ATTACKS:
            attack, number = ATTACKS[name]
            arguments = (self._ticket, self._keys, number, self._count)
            self._attacker = multiprocessing.get_context("fork").Process(
                target=attack, args=arguments, daemon=True
            )
            self._attacker.start()
        self._times = self._times[-1:]
        self._until = now + self._seconds

    def _close(self) -> None:
        if self._attacker is not None:
            self._attacker.kill()
            self._attacker.join()
            self._attacker = None
        took = np.diff(self._times)
        row = {
            "what": self._phases.pop(0),
            "number": int(self._count.value),
            "rounds": int(took.size),
            "median_s": float(np.median(took)),
            "p99_s": float(np.quantile(took, 0.99)),
            "longest_s": float(took.max()),
            "coordinator_bytes": _resident_bytes(self._coordinator),
        }
        self.rows.append(row)
        self._show.print(
            f"{row['what']}: p99 {row['p99_s']:.3f} s over {row['rounds']} rounds", highlight=False
        )


def _resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def measure(directory: Path, seconds: float, show: Console) -> dict[str, Any]:
    """The figures of all phases, each of so many seconds."""
    swarm = Swarm(directory, "light", _NODES + 1, _NODES + 1)
    try:
        swarm.serve()
        for place in range(_NODES):
            swarm.start_node(place)
        keys = new_key_pair()
        with RunDirectory(swarm.run).keyring() as keyring:
            keyring.allow(keys.public)
        ticket = parse_ticket(swarm.ticket)
        state = StateDirectory(directory / "measuring")
        stopwatch = Stopwatch(ticket, keys, swarm.coordinator_id, seconds, show)
        with state.lock():
            pace = np.random.default_rng(0)
            service = NodeService(
                ticket,
                state,
                read_digest(swarm.base),
                read_tokenizer_digest(swarm.base),
                lambda manifest: LogisticTrainer(
                    manifest, 0, lambda _: time.sleep(_PROBE_S * pace.uniform(0.5, 1.5))
                ),
                name="measuring",
                connect_timeout_s=60.0,
                evaluate_every=0,
                show=stopwatch.on_look,
                log=stopwatch.on_round,
            )
            service.run()
    finally:
        swarm.kill_all()
    quiet = [row["p99_s"] for row in stopwatch.rows if row["what"] == "quiet"]
    return {
        "benchmark": "attacks",
        "command": machine.command("benchmarks.attacks"),
        "cpu": machine.cpu(),
        "cores": machine.num_cores(),
        "commit": machine.commit(),
        "nodes": _NODES + 1,
        "seconds": seconds,
        "quiet_p99_s": float(np.median(quiet)),
        "rows": stopwatch.rows,
    }


def _cells(row: dict[str, Any], quiet_p99_s: float) -> list[str]:
    number = f"{row['number']:,} " if row["number"] else ""
    return [
        number + row["what"],
        str(row["rounds"]),
        f"{1000 * row['median_s']:.0f} ms",
        f"{1000 * row['p99_s']:.0f} ms",
        f"{row['p99_s'] / quiet_p99_s:.2f}",
        f"{1000 * row['longest_s']:.0f} ms",
        f"{row['coordinator_bytes'] / 1e6:.0f} MB",
    ]


_COLUMNS: Final = ("phase", "rounds", "median round", "p99", "p99 / quiet", "longest", "coordinator's memory")


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a page."""
    lines = [
        "# Under attack",
        "",
        "What attackers cost an honest swarm. Made by",
        "",
        "```sh",
        figures["command"],
        "```",
        "",
        f"at commit {figures['commit']}, on {figures['cores']} cores of {figures['cpu']}. {figures['nodes']} nodes "
        f"whose probes take {1000 * _PROBE_S:.0f} ms, a real coordinator, {figures['seconds']:.0f} s for each phase; "
        "attackers and nodes share the machine with the coordinator.",
        "",
        "The number is what the attackers got off: a member that floods is cut off after some thousand frames, and has",
        "to make another handshake for the next.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---|" + "--:|" * (len(_COLUMNS) - 1),
    ]
    lines += ["| " + " | ".join(_cells(row, figures["quiet_p99_s"])) + " |" for row in figures["rows"]]
    lines += ["", "The p99 in quiet is the median of the quiet phases."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write if asked to."""
    parser = command_line("attacks", __doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase (20)")
    add_json(parser)
    add_out(parser, "attacks.json and attacks.md")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(Path(directory) / "swarm", options.seconds, Console(stderr=True))
    table = Table(*_COLUMNS)
    for row in figures["rows"]:
        table.add_row(*_cells(row, figures["quiet_p99_s"]))
    deliver("attacks", figures, markdown(figures), options, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
