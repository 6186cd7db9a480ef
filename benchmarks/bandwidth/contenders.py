"""Runs a system as its users run it, as processes over real sockets, and counts bytes at every exchange.

Leaves the adapter's values after each exchange; what they are worth, `target` measures afterwards.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.bandwidth import flower, forks, runs
from benchmarks.bandwidth.contest import FLOAT_BYTES, Contest
from benchmarks.bandwidth.network import Network
from benchmarks.bandwidth.systems import Settings, System
from benchmarks.bandwidth.wire import Unmeasured
from coordinator.rundir import RunDirectory
from coordinator.status import read_status
from zo.manifest import Manifest
from zo.weights import to_float

_LOOK_S: Final = 0.1
_STALL_S: Final = 600.0
_LAST_WORDS: Final = 400


@dataclass(frozen=True)
class Seen:
    """Counters when an exchange was first seen."""

    exchange: int
    seconds: float
    up_bytes: int
    down_bytes: int


@dataclass(frozen=True)
class Found:
    """A run before it is measured: what was seen, values after each exchange, and what an exchange is worth."""

    seen: Sequence[Seen]
    values: Callable[[int], NDArray[np.float32]]
    payload_up: float
    """Bytes per node and exchange."""
    nodes: int
    forwards: int
    """Forward passes of all nodes in an exchange."""
    backwards: int
    parameters: int


def run(
    network: Network,
    contest: Contest,
    system: System,
    settings: Settings,
    exchanges: int,
    say: Callable[[int], None],
) -> Found:
    """A system from the start of a contest.

    Args:
        network: to run on.
        contest: the problem.
        system: who.
        settings: one of its candidates.
        exchanges: how many.
        say: told how many there have been.

    Raises:
        Unmeasured, ServiceError, OSError, ValueError: it did not come to its end; the message says why.
    """
    if system.kind == "ours":
        return _ours(network, contest, system.alone, settings, exchanges, say)
    return _first_order(network, contest, system, settings, exchanges, say)


def watch(
    network: Network,
    exchanges: int,
    latest: Callable[[], int],
    is_alive: Callable[[], bool],
    say: Callable[[int], None],
    *,
    among_nodes: bool,
    stall_s: float = _STALL_S,
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
            say(exchange)
        elif not alive:
            raise Unmeasured(f"it ended after {seen[-1].exchange if seen else 0} of {exchanges} exchanges")
        elif now - last_at > stall_s:
            raise Unmeasured(
                f"no exchange for {stall_s:.0f} s, after {seen[-1].exchange if seen else 0} of {exchanges}"
            )
        time.sleep(_LOOK_S)
    return seen


# ---- ours -----------------------------------------------------------------------------------------------------------


def _ours(
    network: Network,
    contest: Contest,
    alone: bool,
    settings: Settings,
    exchanges: int,
    say: Callable[[int], None],
) -> Found:
    """`zo-coordinator serve` and a `zo-node join` for every node; alone: one of them, with everybody's data."""
    base, place = Path(contest.model), contest.place / f"ours-{time.monotonic_ns()}"
    place.mkdir()
    errors = place / "errors"
    made = RunDirectory(contest.place / "template")
    if not made.path.exists():
        made = runs.template(made.path, base, *_init_options(contest))
    manifest = runs.varied(made.manifest(), varying(contest, alone, settings, exchanges))
    nodes = 1 if alone else contest.nodes
    run = runs.make(place / "run", manifest, nodes, [], base)
    with runs.serving(network, run, errors) as (ticket, coordinator):
        arguments = []
        for node in range(nodes):
            mine = range(contest.nodes) if alone else (node,)
            data = [part for each in mine for part in ("--data", str(contest.data_path(each)))]
            columns = [part for each in contest.columns for part in ("--column", "=".join(each))]
            how = (
                ["--estimator", "moves"]
                if manifest.moves.projections
                else ["--at-once", str(contest.at_once)]
            )
            state = ["--state", str(place / f"node-{node}")]
            model = ["--model", contest.model, "--threads", "1"]
            arguments.append(["join", str(ticket), *model, *data, *columns, *how, *state])
        directory = RunDirectory(run.path)
        with (
            attended(network, ("node.cli", "node.language"), arguments, errors) as is_well,
            directory.ledger(directory.manifest(), read_only=True) as ledger,
        ):

            def all_well() -> bool:
                """A coordinator whose weights overflow ends, and its nodes would look for it for ever."""
                return is_well() and coordinator.poll() in (None, 0)

            seen = watch(network, exchanges, ledger.num_commits, all_well, say, among_nodes=False)
    return _replayed(run, nodes, seen)


def varying(contest: Contest, alone: bool, settings: Settings, exchanges: int) -> runs.Settings:
    """What of the manifest is of one run alone."""
    varied = {**settings, "run": {"rounds": exchanges}, "parity": {"digest_every": 64}}
    # In any other batch the frozen part of the base would be computed anew every time.
    if alone and contest.whole:
        varied["probe"] = {**settings["probe"], "batch_size": contest.nodes * contest.form.batch_size}
    return varied


def _init_options(contest: Contest) -> list[str]:
    """What of a contest `zo-coordinator init` is told."""
    form, task = contest.form, contest.task
    options = ["--batch-size", str(form.batch_size), "--sequence-length", str(form.sequence_length)]
    options += ["--task", task.kind]
    options += [part for label in task.labels for part in ("--label", label)]
    options += [part for each in form.targets or ("none",) for part in ("--target", each)]
    if form.targets:
        options += ["--rank", str(form.rank), "--alpha", str(form.alpha), "--train", form.train]
    return options


def _replayed(run: RunDirectory, nodes: int, seen: Sequence[Seen]) -> Found:
    """What the ledger says: values after any round, and what the reports weighed."""
    manifest = run.manifest()
    with run.ledger(manifest, read_only=True) as ledger:
        members = read_status(manifest, ledger).of_agent(0)
        payload = sum(each.payload_bytes_up for each in members) / len(members) / seen[-1].exchange

    def values(round: int) -> NDArray[np.float32]:
        with run.ledger(manifest, read_only=True) as ledger:
            return to_float(run.state_at(round, manifest, ledger).weights)

    forwards, backwards = passes(manifest)
    return Found(seen, values, payload, nodes, nodes * forwards, nodes * backwards, manifest.adapter.size)


def passes(manifest: Manifest) -> tuple[int, int]:
    """Forward and backward passes of a node in a round, where all nodes report moves if they may."""
    if manifest.moves.projections:
        return manifest.moves.updates, manifest.moves.updates
    return manifest.probe.directions * manifest.probe.sides, 0


# ---- first order ----------------------------------------------------------------------------------------------------


def _first_order(
    network: Network,
    contest: Contest,
    system: System,
    settings: Settings,
    exchanges: int,
    say: Callable[[int], None],
) -> Found:
    """Flower, or workers over gloo."""
    sizes = np.load(contest.sizes_path)
    size = int(sizes.sum())
    folder = contest.place / ("flower" if system.kind == "flower" else "gloo")
    errors = contest.place / f"{system.kind}-{time.monotonic_ns()}.err"
    local = settings.get("local_steps", 1)
    payload = FLOAT_BYTES * size
    if system.kind == "flower":
        int8 = bool(settings.get("int8"))
        payload = size + FLOAT_BYTES * sizes.size if int8 else payload
        with flower.running(
            network,
            contest.place,
            contest.nodes,
            errors,
            rounds=exchanges,
            steps=local,
            rate=settings["rate"],
            int8=int8,
        ) as process:
            seen = watch(
                network,
                exchanges,
                lambda: latest_of(folder),
                lambda: process.poll() is None,
                say,
                among_nodes=False,
            )
        if np.array_equal(np.load(folder / "1.npy"), np.load(contest.start_path)):
            raise Unmeasured(f"no client of Flower answered: {errors.read_text()[-_LAST_WORDS:]}")
    else:
        seen = _gloo(network, contest, system, settings, exchanges, folder, errors, say)
    every = {int(path.stem): np.load(path) for path in folder.glob("[0-9]*.npy")}
    total = contest.nodes * local
    return Found(seen, every.__getitem__, float(payload), contest.nodes, total, total, size)


def _gloo(
    network: Network,
    contest: Contest,
    system: System,
    settings: Settings,
    exchanges: int,
    folder: Path,
    errors: Path,
    say: Callable[[int], None],
) -> list[Seen]:
    """Workers that send to each other, counted where they do so: on the loopback interface of their namespace."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    told = json.dumps({**settings, "kind": system.kind, "exchanges": exchanges})
    more = [str(contest.nodes), str(_free_port()), told]
    arguments = [[str(contest.place), str(rank), *more] for rank in range(contest.nodes)]
    with attended(network, ("benchmarks.bandwidth.gloo_worker",), arguments, errors) as is_well:
        return watch(network, exchanges, lambda: latest_of(folder), is_well, say, among_nodes=True)


def _free_port() -> int:
    """A port that nobody listens on here; in a namespace of the benchmark nobody listens on any."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def attended(
    network: Network, modules: Sequence[str], arguments: Sequence[Sequence[str]], errors: Path
) -> Iterator[Callable[[], bool]]:
    """Nodes at work, and whether they are well: where something goes wrong, what they said last is told with it."""
    child = forks.start(network, "nodes", modules, arguments, errors)
    try:
        yield lambda: child.poll() in (None, 0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(10)  # who has heard of the end leaves by itself
    except Unmeasured as error:
        raise Unmeasured(f"{error}: {errors.read_text()[-_LAST_WORDS:]}") from error
    finally:
        network.stop(child)


def latest_of(folder: Path) -> int:
    """The last exchange whose values are there."""
    return max((int(path.stem) for path in folder.glob("[0-9]*.npy")), default=0)
