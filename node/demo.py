"""The demo: a swarm on one machine, as real as anywhere else. Coordinator and nodes are processes of their own.

Four nodes train the embedded model on different topics of Python's reference; one is killed with SIGKILL a third of the
way, another joins at half. What counts is measured afterwards from what they left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from node import embedded
from node.corpus import pydoc_topics, split_topics
from node.demo_report import Outcome, measure, plot, show
from zo import kernels

NUM_NODES: Final = 4
NAMES: Final = ("ada", "ben", "cho", "dia", "eve")
KILLED, LATE = NAMES[1], NAMES[4]
_BATCH_SIZE: Final = 4
_TRAIN: Final = "AB"
_STEP: Final = 0.02
_STARTUP_S: Final = 60.0
_STALL_S: Final = 60.0
_LOAD_S: Final = 300.0
_EVALUATIONS: Final = 12
_ALONE: Final = 0.6
_HELD_OUT: Final = 0.1
_MARK: Final = ".zo-demo"
"""The first file of a demo: what is removed for the next one has it."""


class DemoError(RuntimeError):
    """The demo could not be carried through; the message says where to look."""


@dataclass
class _Swarm:
    """The processes of a demo, and what happened to them."""

    directory: Path
    stack: ExitStack
    coordinator: subprocess.Popen[bytes] | None = None
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    started_at: dict[str, float] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    killed_at: int | None = None
    joined_at: int | None = None

    def start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        """Start a process of ours, its output in a file of its own."""
        log = self.stack.enter_context((self.directory / f"{name}.log").open("wb"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        self.stack.callback(_end, process)
        return process

    def start_node(self, name: str, ticket: str, *, evaluates: bool, evaluate_every: int) -> None:
        """Start a node on its own topics."""
        arguments = ["node.cli", "join", ticket, "--name", name, "--threads", "1"]
        arguments += ["--data", str(self.directory / "data" / f"{name}.txt")]
        arguments += ["--state", str(self.directory / "nodes" / name)]
        if evaluates:
            arguments += ["--eval", str(self.directory / "data" / "held-out-quick.txt")]
            arguments += ["--eval-every", str(evaluate_every)]
        self.started_at[name] = time.monotonic()
        self.nodes[name] = self.start(name, arguments)


def run_demo(output: Path, *, rounds: int, directions: int, console: Console) -> bool:
    """Run it all, show it, and say whether the loss fell and all digests are equal.

    Args:
        output: directory for everything; one that an earlier demo made is replaced.
        rounds: to train.
        directions: per node and round.
        console: where to show it.

    Raises:
        DemoError: a process failed, or nothing moved for a minute.
    """
    _prepare(output)
    if not kernels.is_compiled():
        console.print("compiling the kernels, once for this machine …", style="dim")
        kernels.compile_kernels()
    with ExitStack() as stack:
        swarm = _Swarm(output, stack)
        ticket = _start_coordinator(swarm, rounds, directions)
        every = max(1, rounds // _EVALUATIONS)
        for index, name in enumerate(NAMES[:NUM_NODES]):
            swarm.start_node(name, ticket, evaluates=index == 0, evaluate_every=every)
        where = ticket.partition("#")[0]
        console.print(f"{NUM_NODES} nodes join {where[:40]}…", style="dim", highlight=False)
        training_s = _watch(swarm, ticket, rounds, console)
    assert swarm.killed_at is not None
    assert swarm.joined_at is not None
    changes = ((KILLED, "killed", swarm.killed_at), (LATE, "joined", swarm.joined_at))
    outcome = measure(output, NAMES, KILLED, changes, training_s)
    plot(outcome, output / "loss-against-bytes.png")
    show(outcome, swarm.events, output, console)
    return outcome.passed


def _prepare(output: Path) -> None:
    if output.exists():
        if not any((output / name).is_file() for name in (_MARK, "demo.json")) and any(output.iterdir()):
            raise DemoError(f"{output} holds something else than a demo; choose another --output")
        shutil.rmtree(output)
    (output / "data").mkdir(parents=True)
    (output / _MARK).write_text("A demo of zo-swarm: the next one in this place removes it.\n", "utf-8")
    shares, held_out = split_topics(pydoc_topics(), len(NAMES), _HELD_OUT)
    for name, share in zip(NAMES, shares, strict=True):
        (output / "data" / f"{name}.txt").write_text("\n\n".join(share.values()), "utf-8")
    text = "\n\n".join(held_out.values())
    (output / "data" / "held-out.txt").write_text(text, "utf-8")
    # While it trains, one node measures a part of it, so that measuring does not take longer than training.
    (output / "data" / "held-out-quick.txt").write_text(text[:24_000], "utf-8")


def _start_coordinator(swarm: _Swarm, rounds: int, directions: int) -> str:
    run = swarm.directory / "run"
    arguments = ["coordinator.cli", "init", str(run), "--model", str(embedded.path()), "--name", "demo"]
    arguments += ["--rounds", str(rounds), "--directions", str(directions), "--batch-size", str(_BATCH_SIZE)]
    arguments += ["--train", _TRAIN, "--step", str(_STEP), "--full-votes", "1"]
    arguments += ["--quorum", str(NUM_NODES - 1), "--host", "127.0.0.1"]
    made = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    if made.returncode:
        raise DemoError(f"zo-coordinator init failed: {made.stderr.strip()}")
    # Port 0 lets the system choose, so that a demo never collides with a run of yours.
    swarm.coordinator = swarm.start("coordinator", ["coordinator.cli", "serve", str(run), "--port", "0"])
    log = swarm.directory / "coordinator.log"
    deadline = time.monotonic() + _STARTUP_S
    while time.monotonic() < deadline and swarm.coordinator.poll() is None:
        for line in log.read_text("utf-8").split("\n")[:-1]:  # the last one may still be being written
            if line.startswith("zo://"):
                return line
        time.sleep(0.05)
    raise DemoError(f"the coordinator did not start; see {log}")


def _watch(swarm: _Swarm, ticket: str, rounds: int, console: Console) -> float:
    """Show the run until it ends; kill and add nodes on the way. Seconds from the first round to the last."""
    assert swarm.coordinator is not None
    statuses: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    arguments = ["coordinator.cli", "status", str(swarm.directory / "run"), "--json", "--watch"]
    reader = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE)
    swarm.stack.callback(_end, reader)
    assert reader.stdout is not None
    lines = reader.stdout

    def read_statuses() -> None:
        for line in lines:
            statuses.put(json.loads(line))

    Thread(target=read_statuses, daemon=True).start()
    first_round_at: float | None = None
    last_round, moved_at = 0, time.monotonic()
    with _table(console) as update:
        while swarm.coordinator.poll() is None and any(node.poll() is None for node in swarm.nodes.values()):
            now = time.monotonic()
            try:
                status = statuses.get(timeout=0.5)
            except Empty:
                status = None
            if status is not None:
                update(status, swarm)
                if status["round"] > last_round:
                    last_round, moved_at = status["round"], now
                    first_round_at = first_round_at or now
                _intervene(swarm, ticket, status, rounds, first_round_at)
            _check_processes(swarm)
            patience = (
                _STALL_S if last_round else _LOAD_S
            )  # a cold disk takes its time to give four nodes torch
            if now - moved_at > patience:
                raise DemoError(f"no round was closed for {patience:.0f} s; see {swarm.directory}/*.log")
        if swarm.coordinator.poll() is None:  # it would wait a while for the one that was killed
            swarm.coordinator.send_signal(signal.SIGTERM)
        if swarm.coordinator.wait(_STARTUP_S):
            raise DemoError(f"the coordinator failed; see {swarm.directory}/coordinator.log")
    for name, process in swarm.nodes.items():
        try:
            code = process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            raise DemoError(f"{name} did not end with the run; see {swarm.directory}/{name}.log") from None
        if code and name != KILLED:
            raise DemoError(f"{name} ended with exit code {code}; see {swarm.directory}/{name}.log")
    if swarm.killed_at is None or swarm.joined_at is None:
        raise DemoError(
            "the run was over before a node could be killed and another could join; use more --rounds"
        )
    return moved_at - (first_round_at or moved_at)


def _intervene(
    swarm: _Swarm, ticket: str, status: dict[str, Any], rounds: int, first_round_at: float | None
) -> None:
    round = status["round"]
    if swarm.killed_at is None and round >= rounds // 3:
        swarm.killed_at = round
        swarm.nodes[KILLED].kill()
        swarm.events.append(f"round {round}: killed {KILLED} (SIGKILL)")
    if LATE not in swarm.nodes and first_round_at is not None:
        # Start the newcomer so early that, having loaded its model, it joins at about half.
        rate = round / max(time.monotonic() - first_round_at, 1.0)
        # The first four loaded all at once, on whatever cores there are; the newcomer loads alone.
        load_s = _ALONE * (first_round_at - min(swarm.started_at.values()))
        if round + rate * load_s >= rounds / 2:
            swarm.start_node(LATE, ticket, evaluates=False, evaluate_every=1)
    if swarm.joined_at is None:
        late = next((m for m in status["members"] if m["name"] == LATE and m["presence"] == "live"), None)
        if late is not None:
            swarm.joined_at = round
            swarm.events.append(f"round {round}: {LATE} has caught up and takes part")


def _check_processes(swarm: _Swarm) -> None:
    for name, process in swarm.nodes.items():
        code = process.poll()
        if code and name != KILLED:
            raise DemoError(f"{name} ended with exit code {code}; see {swarm.directory}/{name}.log")


@contextmanager
def _table(console: Console) -> Iterator[Any]:
    if not console.is_terminal:
        shown = -1

        def print_tenths(status: dict[str, Any], swarm: _Swarm) -> None:
            nonlocal shown
            tenth = status["round"] * 10 // status["rounds"]
            if tenth > shown:
                shown = tenth
                loss = "" if status["loss"] is None else f"  training loss {status['loss']:.3f}"
                console.print(
                    f"round {status['round']}/{status['rounds']}  {status['live']} live{loss}",
                    highlight=False,
                )

        yield print_tenths
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda status, swarm: live.update(_view(status, swarm), refresh=True)


def _view(status: dict[str, Any], swarm: _Swarm) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("node", "presence", "round", "loss", "sent", "received", "digest"):
        table.add_column(title, justify="left" if title in ("node", "presence", "digest") else "right")
    for member in status["members"]:
        loss = "" if member["loss"] is None else f"{member['loss']:.3f}"
        digest = "" if member["digest"] is None else f"{member['digest'][:10]}… @{member['digest_round']}"
        table.add_row(
            Text(member["name"]),
            member["presence"],
            str(member["round"]),
            loss,
            f"{member['payload_bytes_up']:,} B",
            f"{member['payload_bytes_down']:,} B",
            digest,
        )
    head = Table.grid(padding=(0, 1))  # a bar alone ends without a new line
    waiting = Text("the nodes are loading their models …" if not status["round"] else "", style="dim")
    bar = ProgressBar(total=status["rounds"], completed=status["round"], width=40)
    head.add_row(f"round {status['round']}/{status['rounds']}", bar)
    return Group(head, table, waiting, *(Text(event, style="yellow") for event in swarm.events))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


__all__ = ["DemoError", "Outcome", "run_demo"]
