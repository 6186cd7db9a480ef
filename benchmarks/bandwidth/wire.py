"""What a round costs on the wire, and the rest of a session: a real coordinator, light nodes, real interfaces.

Every cell is a run of its own: its manifest, its `zo-coordinator serve`, its nodes. Rounds are in lockstep, with quiet
between a commit and the next report as between nodes that compute; so acknowledgements are segments of their own.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from benchmarks.bandwidth import runs, theory
from benchmarks.bandwidth.network import Network
from benchmarks.bandwidth.results import Results, Row
from benchmarks.long_run import fill
from coordinator.rundir import RunDirectory
from node import embedded
from transport.keys import KeyPair, new_key_pair
from transport.sockets import HEARTBEAT_INTERVAL_MS
from transport.ticket import Ticket
from zo.manifest import Manifest

NODES: Final = (1, 4, 16, 64)
DIRECTIONS: Final = (1, 8, 64, 256)
_SOME_NODES, _SOME_DIRECTIONS = (1, 16), (1, 64, 256)
BITS_BY_CODES: Final = {"int8": 8, "int4": 4, "1 bit": 1}
POLICIES: Final = ("private", "shared", "pool")
LAYERS: Final = ("payload", "zmtp", "wire")
THINK_S: Final = 0.06
"""Longer than TCP delays an acknowledgement, 40 ms."""
_WARM_UP: Final = 4
"""A young connection acknowledges at once, until the coordinator has answered a few times."""
_BEHIND: Final = 1024
HEARTBEAT_S: Final = HEARTBEAT_INTERVAL_MS / 1000

Say = Callable[[str], None]


class Unmeasured(RuntimeError):  # noqa: N818 — it says what became of a cell
    """A cell that could not be measured; the message says why. The others go on."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the table."""

    nodes: int
    directions: int
    codes: str
    curve: bool
    policy: str

    def __str__(self) -> str:
        curve = "" if self.curve else ", no CURVE"
        return f"{self.nodes} nodes × {self.directions}, {self.codes}, {self.policy}{curve}"

    @property
    def settings(self) -> runs.Settings:
        """What of its run's manifest differs from what `init` writes."""
        settings: dict[str, dict[str, Any]] = {"probe": {"directions": self.directions}}
        if self.codes != "int8":
            settings["codes"] = {"bits": BITS_BY_CODES[self.codes]}
        if self.policy != "private":
            settings["directions"] = {"policy": self.policy}
        return settings


def cells(quick: bool, every: bool = False) -> list[Cell]:
    """What there is to measure: each with CURVE first, whose frames are then sent without.

    Args:
        quick: few sizes; each width and each policy at one of them.
        every: of everything with everything; else other widths and policies than the usual at some sizes.
    """
    nodes, directions = ((1, 16), (1, 64)) if quick else (NODES, DIRECTIONS)

    def is_wanted(policy: str, codes: str, n: int, d: int) -> bool:
        if every or (policy, codes) == ("private", "int8"):
            return True
        if quick:
            return (n, d) == (16, 64) and (policy == "private" or codes == "int8")
        return n in _SOME_NODES and d in _SOME_DIRECTIONS

    return [
        Cell(nodes=n, directions=d, codes=codes, policy=policy, curve=curve)
        for policy, codes, n, d, curve in product(POLICIES, BITS_BY_CODES, nodes, directions, (True, False))
        if is_wanted(policy, codes, n, d)
    ]


def known(wanted: Sequence[Cell], manifest: Manifest) -> tuple[list[Cell], list[str]]:
    """The cells that this version of the product has, and in words what it lacks."""
    missing = [
        *(f"codes {codes}" for codes in BITS_BY_CODES if not _knows(manifest, codes=codes)),
        *(f"policy {policy}" for policy in POLICIES if not _knows(manifest, policy=policy)),
    ]
    return [cell for cell in wanted if runs.knows(manifest, cell.settings)], missing


def _knows(manifest: Manifest, codes: str = "int8", policy: str = "private") -> bool:
    cell = Cell(nodes=1, directions=8, codes=codes, curve=True, policy=policy)
    return runs.knows(manifest, cell.settings)


class Clients:
    """A process of light nodes that carries out orders."""

    def __init__(self, network: Network, errors: Path) -> None:
        self._network, self._errors = network, errors
        self._process = self._start()

    def ask(
        self, ticket: Ticket, keys: Sequence[KeyPair], do: str, base: Path | None = None, **more: Any
    ) -> Any:
        """What an order comes to.

        Raises:
            Unmeasured: the nodes did not get where they should.
        """
        self.order(ticket, keys, do, base, **more)
        return self.answer()

    def order(
        self, ticket: Ticket, keys: Sequence[KeyPair], do: str, base: Path | None = None, **more: Any
    ) -> None:
        """Give an order; `answer` waits for what it comes to."""
        order = {
            "ticket": str(ticket),
            "keys": [(each.public.hex(), each.secret.hex()) for each in keys],
            "base": str(base or embedded.path()),
            "interface": self._network.interface,
            "do": do,
            **more,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """What the last order came to. Raises Unmeasured."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            words = self._errors.read_text()[-500:].strip().splitlines()
            self.close()
            self._process = self._start()
            raise Unmeasured(f"the process of light nodes ended: {words[-1] if words else 'without a word'}")
        answer = json.loads(line)
        if "failed" in answer:
            raise Unmeasured(answer["failed"])
        return answer["done"]

    @property
    def process(self) -> int:
        """Its process id."""
        return self._process.pid

    def close(self) -> None:
        """End it."""
        self._network.stop(self._process)

    def _start(self) -> subprocess.Popen[str]:
        return self._network.python("nodes", "benchmarks.bandwidth.clients", errors=self._errors)


def measure(
    network: Network,
    wanted: Sequence[Cell],
    manifest: Manifest,
    results: Results,
    rounds: int,
    think_s: float,
    say: Say,
) -> Iterator[Row | str]:
    """The rows of the cells, as they are done; text instead of a row that could not be measured.

    Args:
        network: to measure on.
        wanted: the cells; one without CURVE after its twin with it.
        manifest: to vary.
        results: receives every row; what is there is not measured again.
        rounds: to take the median of.
        think_s: between a commit and the next report.
        say: told what is being measured.
    """
    with tempfile.TemporaryDirectory(prefix="zo-bench-") as name:
        place = Path(name)
        clients = Clients(network, place / "clients.err")
        frames: dict[str, str] = {}
        try:
            for index, cell in enumerate(wanted):
                settings = {
                    **asdict(cell),
                    "think_ms": round(think_s * 1000),
                    "rounds": rounds,
                    "on": network.label,
                }
                row = results.find(settings)
                if row is not None:
                    frames = row.get("frames", frames)
                    yield row
                    continue
                say(str(cell))
                try:
                    if cell.curve:
                        found = _curved(
                            network, clients, cell, manifest, place / f"run-{index}", rounds, think_s
                        )
                        frames = found["frames"]
                    elif network.interface is None:
                        yield f"{cell}: without CURVE there are no counts on the loopback interface"
                        continue
                    else:
                        found = _plain(network, cell, frames, place / "plain.err", rounds, think_s)
                except (Unmeasured, runs.ServiceError) as error:
                    frames = {}
                    yield f"{cell}: {error}"
                    continue
                yield results.add(settings, found)
        finally:
            clients.close()


def _curved(
    network: Network,
    clients: Clients,
    cell: Cell,
    manifest: Manifest,
    path: Path,
    rounds: int,
    think_s: float,
) -> Row:
    keys = [new_key_pair() for _ in range(cell.nodes)]
    run = runs.make(path, runs.varied(manifest, cell.settings), cell.nodes, [each.public for each in keys])
    with runs.serving(network, run, path / "serve.err") as (ticket, _):
        found: Row = clients.ask(ticket, keys, "rounds", warm_up=_WARM_UP, rounds=rounds, think_s=think_s)
    bits = BITS_BY_CODES[cell.codes]
    found |= {
        "theory_up": theory.report_bytes(cell.directions, bits),
        "theory_down": theory.commit_bytes(cell.nodes, cell.directions, bits, cell.policy),
        "how": "the product's sockets, its coordinator and its session",
    }
    for way in ("up", "down"):
        apart = theory.deviation(found[f"payload_{way}"], found[f"theory_{way}"])
        is_squeezed = (
            way == "down"
            and theory.may_be_squeezed(bits, cell.policy)
            and found["payload_down"] < found["theory_down"]
        )
        if apart > theory.TOLERANCE and not is_squeezed:
            raise Unmeasured(
                f"the payload {way} of {found[f'payload_{way}']:.0f} B is {apart:.0%} off the theoretical "
                f"{found[f'theory_{way}']} B"
            )
        if not found[f"zmtp_{way}"] <= found[f"tcp_{way}"] <= 1.02 * found[f"zmtp_{way}"] + 2:
            raise Unmeasured(
                f"the kernel counted {found[f'tcp_{way}']} B {way}, the meter {found[f'zmtp_{way}']} B"
            )
    return found


def _plain(
    network: Network, cell: Cell, frames: dict[str, str], errors: Path, rounds: int, think_s: float
) -> Row:
    """The same frames without CURVE."""
    if not frames:
        raise Unmeasured("its twin with CURVE was not measured, so there are no frames to send")
    order = json.dumps(
        {
            "report": frames["Report"],
            "commit": frames["Brief"],
            "warm_up": _WARM_UP,
            "rounds": rounds,
            "think_s": think_s,
        }
    )
    module, address = "benchmarks.bandwidth.plain", network.coordinator_address
    hub = network.python("coordinator", module, "hub", address, str(cell.nodes), errors=errors)
    try:
        assert hub.stdin is not None
        assert hub.stdout is not None
        port = hub.stdout.readline().strip()
        hub.stdin.write(order + "\n")
        hub.stdin.flush()
        assert network.interface is not None
        nodes = network.python(
            "nodes", module, "nodes", address, port, str(cell.nodes), network.interface, errors=errors
        )
        try:
            assert nodes.stdin is not None
            assert nodes.stdout is not None
            nodes.stdin.write(order + "\n")
            nodes.stdin.flush()
            line = nodes.stdout.readline()
        finally:
            network.stop(nodes)
    finally:
        network.stop(hub)
    if not line:
        raise Unmeasured(f"the sockets without CURVE: {errors.read_text()[-300:]}")
    found: Row = json.loads(line)["done"]
    return found | {"how": "the same frames over bare sockets of the benchmark; the product has no such mode"}


def measure_session(network: Network, results: Results, idle_s: float, say: Say) -> Iterator[Row | str]:
    """The rows of joining, being idle, leaving; of catching up; and of the digest that goes with every so many rounds.

    Args:
        network: to measure on.
        results: receives every row.
        idle_s: how long to do nothing, in seconds: a multiple of `HEARTBEAT_S`, or there is no rate to be had from it.
        say: told what is being measured.
    """
    with tempfile.TemporaryDirectory(prefix="zo-bench-") as name:
        place = Path(name)
        base = {"on": network.label, "idle_s": idle_s}
        names = {
            "join": "join a new run, with a ticket",
            "idle": f"idle for {idle_s:.0f} s",
            "leave": "leave",
        }
        clients = Clients(network, place / "clients.err")
        try:
            if all(results.find({"what": what, **base}) for what in names.values()):
                yield from (results.find({"what": what, **base}) or {} for what in names.values())
            else:
                say(f"joining, {idle_s:.0f} s of nothing, leaving")
                # Never a quorum: nobody reports, and the connection is left to itself.
                run = _session_run(place / "new", 2)
                with runs.serving(network, run, place / "serve.err") as (ticket, _):
                    found = clients.ask(ticket, [new_key_pair()], "join", until=0, idle_s=idle_s)
                for row in found:
                    yield results.add({"what": names[row.pop("what")], **base}, row)
            behind = {"what": f"join after {_BEHIND:,} rounds of 4 nodes, 38,912 parameters", **base}
            row = results.find(behind)
            if row is None:
                say("catching up")
                run = _session_run(place / "old", 5)
                fill(run, _BEHIND, 4, lambda _: None)
                with runs.serving(network, run, place / "serve.err") as (ticket, _):
                    found = clients.ask(ticket, [new_key_pair()], "join", until=_BEHIND, idle_s=0)
                row = results.add(behind, {key: value for key, value in found[0].items() if key != "what"})
            yield row
        except (Unmeasured, runs.ServiceError) as error:
            yield f"session: {error}"
        finally:
            clients.close()


def idle_rate(row: Row) -> str:
    """Bytes a second of a row of doing nothing, both ways; empty for others, and for less than a heartbeat's time."""
    if not row["what"].startswith("idle") or row["seconds"] < HEARTBEAT_S:
        return ""
    return f"{(row['wire_up'] + row['wire_down']) / row['seconds']:.1f}"


def _session_run(path: Path, quorum: int) -> RunDirectory:
    """A run as a user makes it, of the embedded model with the usual adapter."""
    manifest = runs.template(path.with_name(f"{path.name}-init"), embedded.path()).manifest()
    return runs.make(path, runs.varied(manifest, {}), quorum, [])
