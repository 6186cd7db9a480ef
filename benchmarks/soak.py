"""The soak: a swarm of real processes that are killed, stopped and replaced at random, and end with one digest.

    python -m benchmarks.soak [--seconds 300 | --hours 8] [--nodes 16] [--model both|light|demo] [--seed N]

At the end the faults stop, everyone catches up, and every node's saved state, the coordinator's replica and a fresh
replay of the ledger must be equal to the last bit, nothing applied twice, no stall of 30 s (times as much as a busy
machine slows a process down, which is measured). With `--model both`, four
fifths of the time go to light nodes (all of the node's service, a small loss) and a fifth to the embedded model.
"""

import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from rich.console import Console

from benchmarks import machine
from benchmarks.command import add_json, add_out, command_line, deliver
from benchmarks.soak_schedule import Happening, Kind, num_places, schedule
from benchmarks.soak_swarm import SoakError, Swarm
from coordinator.display import duration
from transport.exits import Exit
from zo import kernels

MOST_STALL_S: Final = 30.0
_COORDINATOR_EVERY_S: Final = 20.0
_NODE_EVERY_S: Final = {"light": 1.0, "demo": 6.0}
_DEMO_NODES: Final = 4
_LOOK_EVERY_S: Final = 0.05
_SAY_EVERY_S: Final = 30.0


class Watch:
    """When commits were seen: the longest time without any, and how long the first one took after each restart."""

    def __init__(self, commits: int, now: float) -> None:
        self.longest_s = 0.0
        self.recoveries_s: list[float] = []
        self.commits = commits
        self._moved_at = now
        self._killed_at: float | None = None

    def look(self, commits: int, now: float) -> None:
        """There are so many commits at the time `now`, in seconds."""
        self.longest_s = max(self.longest_s, now - self._moved_at)
        if commits > self.commits:
            self.commits, self._moved_at = commits, now
            if self._killed_at is not None:
                self.recoveries_s.append(now - self._killed_at)
                self._killed_at = None

    def killed(self, now: float) -> None:
        """The coordinator was killed."""
        self._killed_at = now


def soak(
    directory: Path, model: str, num_nodes: int, seconds: float, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """One soak from beginning to end; its figures.

    Args:
        directory: to be made; holds everything.
        model: "light" or "demo".
        num_nodes: least number of nodes at any time.
        seconds: how long things happen; starting and proving come on top.
        seed: of the schedule.
        say: called often, with where it stands.

    Raises:
        SoakError: something that must hold does not.
    """
    swarm = Swarm(directory, model, num_nodes, num_places(num_nodes))
    plan = list(schedule(seed, num_nodes, seconds, _NODE_EVERY_S[model], _COORDINATOR_EVERY_S))
    try:
        swarm.serve()
        for place in range(num_places(num_nodes)):
            swarm.start_node(place)
        _wait_for_first(swarm)
        begin = time.monotonic()
        watch = Watch(swarm.num_commits(), begin)
        before = watch.commits
        for happening in [*plan, None]:
            until = begin + (seconds if happening is None else happening.at_s)
            while (now := time.monotonic()) < until:
                _look(swarm, watch)
                say(
                    f"{model}: {duration(seconds - (now - begin))} left · round {watch.commits} · "
                    f"{len(swarm.nodes)} nodes · longest stall {watch.longest_s:.1f} s"
                )
                time.sleep(min(_LOOK_EVERY_S, max(until - time.monotonic(), 0.0)))
            if happening is not None:
                _do(swarm, happening, watch)
        _look(swarm, watch)
        elapsed, rounds = time.monotonic() - begin, watch.commits - before
        say(f"{model}: the faults are over, everyone catches up")
        for place in range(num_places(num_nodes)):
            if place in swarm.nodes and not swarm.nodes[place].may_end_with:
                swarm.send(place, signal.SIGCONT)
            else:
                swarm.start_node(place)
        swarm.hold()
        swarm.wait_until_level()
        proof, num_samples = swarm.prove()
    finally:
        swarm.kill_all()
    slowdown = statistics.median(swarm.slowdowns or [1.0])
    if watch.longest_s >= MOST_STALL_S * slowdown:
        raise SoakError(
            f"no commit for {watch.longest_s:.1f} s; at most {MOST_STALL_S:.0f} s are allowed on a machine that has "
            f"nothing else to do, and this one slows processes down {slowdown:.1f} times"
        )
    counts = Counter(happening.kind for happening in plan)
    return {
        "model": model,
        "seed": seed,
        "nodes": num_nodes,
        "seconds": round(elapsed, 1),
        "rounds": rounds,
        "rounds_per_s": round(rounds / elapsed, 2),
        "longest_stall_s": round(watch.longest_s, 2),
        "slowdown": round(slowdown, 2),
        "recoveries_s": {
            "median": round(statistics.median(watch.recoveries_s), 2) if watch.recoveries_s else None,
            "longest": round(max(watch.recoveries_s), 2) if watch.recoveries_s else None,
        },
        "survived": {kind.value: counts[kind] for kind in Kind},
        "equal_states": num_places(num_nodes) + 2,
        "samples_applied_once": num_samples,
        "commits": proof.rounds,
        "digests_proven": proof.digests_proven,
        "digest": proof.digest,
    }


def _wait_for_first(swarm: Swarm) -> None:
    deadline = time.monotonic() + 120
    while not swarm.num_commits():
        swarm.check()
        if time.monotonic() > deadline:
            raise SoakError("no commit within 120 s of the start")
        time.sleep(_LOOK_EVERY_S)


def _look(swarm: Swarm, watch: Watch) -> None:
    swarm.check()
    watch.look(swarm.num_commits(), time.monotonic())


def _do(swarm: Swarm, happening: Happening, watch: Watch) -> None:
    node = happening.node
    match happening.kind:
        case Kind.KILL_COORDINATOR:
            swarm.kill_coordinator()
            # What was committed just before belongs to the time before: else it would pass for a recovery.
            watch.look(swarm.num_commits(), time.monotonic())
            watch.killed(time.monotonic())
            swarm.serve()
        case Kind.KILL:
            swarm.kill_node(node)
        case Kind.LEAVE:
            swarm.send(node, signal.SIGTERM)
        case Kind.STOP:
            swarm.send(node, signal.SIGSTOP)
        case Kind.WAKE:
            swarm.send(node, signal.SIGCONT)
        case Kind.JOIN:
            swarm.start_node(node)
        case Kind.JOIN_TORN:
            swarm.wait_for_end(node)
            saved = swarm.state(node) / "snapshot.zo"
            if saved.exists():
                saved.write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
            swarm.start_node(node)
        case Kind.JOIN_NEW:
            swarm.wait_for_end(node)
            shutil.rmtree(swarm.state(node), ignore_errors=True)
            swarm.start_node(node)


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a page."""
    lines = ["# Soak", "", "What real processes survived, and what it cost. Made by", "", "```sh"]
    lines += [figures["command"], "```", ""]
    lines += [f"at commit {figures['commit']}, on {figures['cores']} cores of {figures['cpu']}.", ""]
    parts = figures["parts"]
    lines += ["| | " + " | ".join(f"{part['model']} model" for part in parts) + " |"]
    lines += ["|---|" + "--:|" * len(parts)]
    rows: dict[str, Callable[[dict[str, Any]], object]] = {
        "seed": lambda part: part["seed"],
        "nodes, at least": lambda part: part["nodes"],
        "seconds of faults": lambda part: part["seconds"],
        "rounds": lambda part: f"{part['rounds']:,}",
        "rounds a second": lambda part: part["rounds_per_s"],
        "longest stall, s": lambda part: part["longest_stall_s"],
        "start of the coordinator, times its processor time": lambda part: part["slowdown"],
        "kill of the coordinator to next commit, s: median": lambda part: part["recoveries_s"]["median"],
        "the longest": lambda part: part["recoveries_s"]["longest"],
        **{kind.value: partial(_survived, kind) for kind in Kind},
        "states with the replay's digest": lambda part: f"{part['equal_states']} of {part['equal_states']}",
        "(node, round) applied, each once": lambda part: f"{part['samples_applied_once']:,}",
    }
    lines += [
        f"| {title} | " + " | ".join(str(get(part)) for part in parts) + " |" for title, get in rows.items()
    ]
    lines += [
        "",
        "The states are those of all nodes, the run directory and the coordinator's replica. The longest stall",
    ]
    lines += ["is the longest time between two commits, seen from outside 20 times a second.", ""]
    return "\n".join(lines)


def _survived(kind: Kind, part: dict[str, Any]) -> object:
    return part["survived"][kind.value]


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak, print, and write if asked to."""
    parser = command_line("soak", __doc__)
    time_group = parser.add_mutually_exclusive_group()
    time_group.add_argument("--seconds", type=float, default=300.0, help="of faults, in all (300)")
    time_group.add_argument("--hours", type=float, help="the same in hours")
    parser.add_argument("--nodes", type=int, default=16, help="light nodes at any time, at least (16)")
    parser.add_argument("--model", choices=("both", "light", "demo"), default="both", help="(both)")
    parser.add_argument("--seed", type=int, help="of the schedule (drawn, and printed)")
    add_json(parser)
    add_out(parser, "soak.json and soak.md")
    options = parser.parse_args(arguments)
    seconds = options.seconds if options.hours is None else options.hours * 3600
    if seconds < 1 or options.nodes < 1:
        parser.error("at least 1 second and 1 node")
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    shares = (
        {"light": seconds * 0.8, "demo": seconds * 0.2}
        if options.model == "both"
        else {options.model: seconds}
    )
    console = Console(stderr=True)
    said_at = 0.0

    def say(text: str) -> None:
        nonlocal said_at
        if console.is_terminal:
            console.print(text, end="\r", highlight=False, no_wrap=True, overflow="ellipsis")
        elif time.monotonic() - said_at >= _SAY_EVERY_S:
            said_at = time.monotonic()
            console.print(text, highlight=False, soft_wrap=True)

    signal.signal(signal.SIGTERM, _interrupt)
    kernels.compile_kernels()  # once here, not in every process at once
    scratch = Path(tempfile.mkdtemp(prefix="zo-soak-"))
    parts = []
    try:
        for model, share in shares.items():
            nodes = options.nodes if model == "light" else _DEMO_NODES
            parts.append(soak(scratch / model, model, nodes, share, seed, say))
    except SoakError as error:
        console.print(
            f"\nsoak failed with --seed {seed}: {error}", markup=False, highlight=False, soft_wrap=True
        )
        console.print(f"everything is left in {scratch}", highlight=False, soft_wrap=True)
        return Exit.MISMATCH
    except KeyboardInterrupt:
        console.print(f"\nstopped; --seed {seed}", highlight=False)
        shutil.rmtree(scratch, ignore_errors=True)
        return 130
    except BaseException:
        console.print(f"\nsoak failed with --seed {seed}; everything is left in {scratch}", highlight=False)
        raise
    shutil.rmtree(scratch, ignore_errors=True)
    figures = {
        "benchmark": "soak",
        "cpu": machine.cpu(),
        "cores": machine.num_cores(),
        "commit": machine.commit(),
        "versions": machine.versions(["numpy", "numba", "pyzmq"]),
        "command": machine.command("benchmarks.soak"),
        "parts": parts,
    }
    deliver("soak", figures, markdown(figures), options, "\n".join(map(_summary, parts)))
    return Exit.OK


def _summary(part: dict[str, Any]) -> str:
    survived = ", ".join(f"{count} x {what}" for what, count in part["survived"].items() if count)
    return (
        f"{part['model']} model, seed {part['seed']}: {part['rounds']:,} rounds in {part['seconds']:.0f} s "
        f"({part['rounds_per_s']} a second), longest stall {part['longest_stall_s']} s\n"
        f"  survived {survived}\n"
        f"  {part['equal_states']} states with one digest {part['digest']}, equal to a replay of "
        f"{part['commits']:,} commits"
    )


if __name__ == "__main__":
    sys.exit(main())
