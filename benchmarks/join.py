"""What it takes to join a run with very many rounds, and to restart its coordinator: bytes and seconds.

    python -m benchmarks.join [--commits 1000000] [--json] [--quick] [--out [DIR]]

Makes a run of the embedded model with that many commits, serves it with a real `zo-coordinator serve`, kills that and
serves again, and has nodes join over real CURVE sockets, each a process with the whole node service but no model: a
newcomer, one that was away for 1,000 rounds, and newcomers behind slow links. Bytes are those of the node's connection,
by message, with ZMTP and CURVE, and as the kernel counted them, handshake included. Seconds are from the first packet
until the node has every commit, its digest equal to the coordinator's.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import machine
from benchmarks.command import add_json, add_out, command_line, deliver
from benchmarks.long_run import fill, init_run
from benchmarks.slow_link import SlowLink
from coordinator.rundir import RunDirectory
from coordinator.status import read_status
from node import embedded
from node.state import StateDirectory
from transport.ticket import Ticket, parse_ticket
from zo import kernels

NODES: Final = 4
ROUNDS_AWAY: Final = 1000
TARGET_BYTES: Final = 2_000_000
TARGET_RESTART_S: Final = 2.0
_RESTARTS: Final = 5
_LINKS: Final = ((1_000_000, "1 Mbit/s"), (50_000, "50 kbit/s"))
_TIMEOUT_S: Final = 300.0


class Server:
    """A real `zo-coordinator serve`, started again and again."""

    def __init__(self, directory: RunDirectory, errors: Path) -> None:
        self._directory = directory
        self._errors = errors
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> tuple[Ticket, float, float | None]:
        """Its ticket; seconds from the start of the process until it was printed; of them, of the processor."""
        begin = perf_counter()
        with self._errors.open("a") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "coordinator.cli", "serve", str(self._directory.path)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=machine.ROOT,
                env=_environment(),
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        seconds = perf_counter() - begin
        if not line:
            raise RuntimeError(f"the coordinator did not start: {self._errors.read_text()}")
        return parse_ticket(line.strip()), seconds, _cpu_seconds(self._process.pid)

    def kill(self) -> None:
        """SIGKILL, so that the next start finds what a crash leaves."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@contextlib.contextmanager
def _serving(
    directory: RunDirectory, errors: Path
) -> Iterator[tuple[Ticket, list[tuple[float, float | None]]]]:
    """The ticket of a run that is being served, after some restarts, and what each start took: wall, processor."""
    server = Server(directory, errors)
    try:
        starts = []
        for _ in range(_RESTARTS):
            server.kill()
            ticket, wall_s, cpu_s = server.start()
            starts.append((wall_s, cpu_s))
        yield ticket, starts
    finally:
        server.kill()


def join(ticket: Ticket, state: Path, commits: int) -> dict[str, Any]:
    """What a node's process says of its catching up."""
    arguments = [str(ticket), str(state), "--base", str(embedded.path()), "--until", str(commits)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.light_node", *arguments],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        cwd=machine.ROOT,
        env=_environment(),
    )
    if done.returncode:
        raise RuntimeError(f"the node ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def measure(commits: int, quick: bool, console: Console, directory: Path) -> dict[str, Any]:
    """All figures of one run with so many commits, made in `directory`."""
    if not kernels.is_compiled():
        kernels.compile_kernels()
    every = 16  # digests are recorded so often: the builder works from one to the next
    commits = -(-commits // every) * every
    begin = perf_counter()
    run = init_run(directory / "run", commits + 1000, NODES)
    manifest = run.manifest()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"writing {commits:,} commits", total=commits)
        digest = fill(run, commits, NODES, lambda done: bar.update(task, completed=done)).hex()
    build_s = perf_counter() - begin
    with run.ledger(manifest, read_only=True) as ledger:
        ledger_bytes, _ = ledger.cost_since(0)
        away = StateDirectory(directory / "away")
        away.path.mkdir()
        away.save_manifest(manifest)
        away.agent(0).save(run.state_at(commits - min(ROUNDS_AWAY, commits // 2), manifest, ledger), manifest)
    snapshots = run.snapshots().stored()
    rows = []
    with _serving(run, directory / "serve.err") as (ticket, starts):

        def row(what: str, state: Path, link: float | None = None) -> None:
            with console.status(what), contextlib.ExitStack() as stack:
                through = ticket
                if link is not None:
                    port = stack.enter_context(SlowLink(ticket.port, link)).port
                    through = msgspec.structs.replace(ticket, port=port)
                found = join(through, state, commits)
            equal = found.pop("digest") == digest and found.pop("round") == commits
            rows.append({"what": what, **found, "digest_equal": equal})

        row("newcomer, loopback", directory / "newcomer")
        row(f"away for {min(ROUNDS_AWAY, commits // 2):,} rounds, loopback", away.path)
        for bits_per_s, name in _LINKS[: 1 if quick else 2]:
            row(f"newcomer, {name}", directory / f"slow-{bits_per_s}", bits_per_s)
        with run.ledger(manifest, read_only=True) as ledger:
            status = read_status(manifest, ledger)
    cpu_times = [cpu for _, cpu in starts if cpu is not None]
    return {
        "commits": commits,
        "bytes": sum(_socket_bytes(rows[0])),
        "seconds": rows[0]["seconds"],
        "digest_equal": all(each["digest_equal"] for each in rows) and status.digest == digest,
        "restart_seconds": median(wall for wall, _ in starts),
        "restart_cpu_seconds": median(cpu_times) if cpu_times else None,
        "restarts": [wall for wall, _ in starts],
        "load_average": os.getloadavg()[0],
        "rows": rows,
        "parameters": manifest.adapter.size,
        "nodes": NODES,
        "directions": manifest.probe.directions,
        "ledger_bytes": ledger_bytes,
        "ledger_file_bytes": run.ledger_path.stat().st_size,
        "snapshots": [{"round": each.round, "bytes": each.num_bytes} for each in snapshots],
        "build_seconds": build_s,
        "target_bytes": TARGET_BYTES,
        "target_restart_seconds": TARGET_RESTART_S,
        "cpu": machine.cpu(),
        "num_cores": machine.num_cores(),
        "versions": machine.versions(("numpy", "numba", "pyzmq", "msgspec", "zstandard")),
        "commit": machine.commit(),
        "command": machine.command("benchmarks.join"),
    }


def _socket_bytes(row: dict[str, Any]) -> tuple[int, int]:
    """Bytes up and down on the connection: the kernel's count where there is one, else what the meter computes."""
    if row["kernel_up"] is None:
        return row["zmtp_up"], row["zmtp_down"]
    return row["kernel_up"], row["kernel_down"]


def _cpu_seconds(process: int) -> float | None:
    """Processor time of a process so far, in seconds; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": str(machine.ROOT)}


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a table for the docs."""
    newest = figures["snapshots"][-1] if figures["snapshots"] else {"round": 0, "bytes": 0}
    lines = [
        f"`{figures['command']}` on {figures['cpu']} (one thread), commit {figures['commit']}: a run of "
        f"{figures['commits']:,} commits of {figures['nodes']} nodes × {figures['directions']} direction(s), "
        f"{figures['parameters']:,} trained parameters. All entries of the ledger together have "
        f"{figures['ledger_bytes'] / 1e6:.1f} MB; the newest snapshot has {newest['bytes']:,} bytes, "
        f"{figures['commits'] - newest['round']:,} rounds before the end.",
        "",
        "| who joins | payload down | with ZMTP and CURVE | kernel: down | kernel: up | until caught up | digest |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in figures["rows"]]
    starts = ", ".join(f"{each:.2f}" for each in figures["restarts"])
    cpu_s = figures["restart_cpu_seconds"]
    cpu = "" if cpu_s is None else f"of processor time {cpu_s:.2f} s"
    lines += [
        "",
        f"Start of `zo-coordinator serve` after SIGKILL, from the start of the process until the ticket is printed: "
        f"median {figures['restart_seconds']:.2f} s ({starts}), {cpu}; the machine's load was "
        f"{figures['load_average']:.1f} on {figures['num_cores']} cores.",
    ]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    kernel_up, kernel_down = row["kernel_up"], row["kernel_down"]
    return [
        row["what"],
        f"{row['payload_down']:,}",
        f"{row['zmtp_down']:,}",
        "" if kernel_down is None else f"{kernel_down:,}",
        "" if kernel_up is None else f"{kernel_up:,}",
        f"{row['seconds']:.2f} s",
        "equal" if row["digest_equal"] else "DIFFERENT",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write if asked to; 1 if a digest differs."""
    parser = command_line("join", __doc__)
    parser.add_argument("--commits", type=int, help="rounds in the ledger (1000000; 20000 with --quick)")
    add_json(parser)
    parser.add_argument("--quick", action="store_true", help="20,000 commits, and no link of 50 kbit/s")
    add_out(parser, "join.json and join.md")
    options = parser.parse_args(arguments)
    commits = options.commits if options.commits is not None else 20_000 if options.quick else 1_000_000
    if commits < 1:
        parser.error("--commits must be at least 1")
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(commits, options.quick, Console(stderr=True), Path(directory))
    restart = f"restart of the coordinator: {figures['restart_seconds']:.2f} s until the ticket"
    table = Table(
        *("who joins", "payload down", "ZMTP", "kernel down", "kernel up", "caught up", "digest"),
        caption=restart,
        caption_justify="left",
    )
    for each in figures["rows"]:
        table.add_row(*_cells(each))
    deliver("join", figures, markdown(figures), options, table)
    return 0 if figures["digest_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
