"""`zo-coordinator`: the only place of the coordinator that speaks to a person, prints and exits."""

import contextlib
import hashlib
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.live import Live
from rich.progress import Progress, TaskID

from coordinator import cli_init  # noqa: F401  # before the commands below, so that `--help` begins with it
from coordinator.archive import Restored, restore
from coordinator.audit import Audit, audit
from coordinator.cli_app import JsonOption, RunArgument, app, epilog, err, failures_explained, out
from coordinator.config import check_capacity
from coordinator.config import validate as validate_config
from coordinator.display import duration, replay_progress, status_line, status_view
from coordinator.rundir import RunDirectory
from coordinator.service import Service
from coordinator.status import Status, read_status
from transport.connections import MOST_OF_A_KEY, MOST_SILENT
from transport.keys import invitation_keys, standing_token
from transport.selftest import prove_closed
from transport.sockets import CoordinatorSocket
from transport.ticket import Ticket, reachable_host
from zo import kernels
from zo.manifest import (
    Manifest,
)

_OTHER_FILES: Final = 128
"""Ledger, locks, snapshots, and what a library may open."""


@app.command(short_help="Serve a run to its nodes.", epilog=epilog("zo-coordinator serve my-run --port 7411"))
def serve(
    run: RunArgument,
    host: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="Address to listen on.", show_default="as in coordinator.toml"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="TCP port to listen on.", show_default="as in coordinator.toml"),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            metavar="HOST",
            help="Host to print in the ticket, where nodes see this one under another (NAT, container).",
            show_default="found out",
        ),
    ] = None,
    stay: Annotated[
        bool,
        typer.Option(
            "--stay", help="Go on serving the finished run to nodes that come late.", show_default=False
        ),
    ] = False,
) -> None:
    """Serve a run: print its ticket, order the nodes' bytes, stop when all rounds are done and every node knows.

    On a directory that was served before it goes on where the ledger ends. Ctrl-C stops it; nothing is lost.
    """
    with failures_explained():
        directory = RunDirectory(run)
        manifest = directory.manifest()
        changes = {"host": host, "port": port, "advertise": advertise}
        given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        config = validate_config(msgspec.structs.replace(directory.config(), **given))
        check_capacity(config, manifest)
        keys, signer = directory.keys(), directory.signer(manifest)
        stopping = threading.Event()
        with directory.lock(), directory.ledger(manifest) as ledger, directory.keyring() as keyring:
            if not kernels.is_compiled():
                err.print("compiling the kernels, once for this machine …", style="dim")
                kernels.compile_kernels()
            restored = []
            with replay_progress(err) as bar:
                for agent in range(manifest.agents.count):
                    task = bar.add_task("replaying", total=None)
                    show = partial(_show_replay, bar, task)
                    restored.append(restore(directory, manifest, ledger.track(agent), show))
            _tell_origins(restored)
            # Until here a signal just ends it: what it reads is on disk, and whoever replays for long may be stopped.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stopping.set())
            _allow_connections(MOST_SILENT + MOST_OF_A_KEY * config.capacity)
            end = CoordinatorSocket(config.host, config.port, keys, keyring.passes)
            try:
                prove_closed(end, config.host, keys.public)
                place = config.advertise or reachable_host(config.host)
                keyring.set_address(place, end.port)
                token = standing_token(keys.secret)
                if not keyring.lets_in(invitation_keys(token).public, time.time()):
                    token = b""
                    err.print("by invitation only: `zo-coordinator invite` lets new nodes in", style="dim")
                ticket = Ticket(place, end.port, manifest.run_id, keys.public, token)
                out.print(str(ticket), style="bold", highlight=False, soft_wrap=True)
                sys.stdout.flush()
                secret = hashlib.blake2b(keys.secret, digest_size=32, person=b"zo-audit").digest()
                service = Service(directory, manifest, config, ledger, restored, end, keyring, signer, secret)
                _serve(service, stopping, stay)
            finally:
                end.close()


def _allow_connections(number: int) -> None:
    """Let this process hold so many connections, if the system does: usual are 1,024 files, which any stranger could
    use up, and a connection that cannot be accepted keeps libzmq busy."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if resource.RLIM_INFINITY != soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _show_replay(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def _tell_origins(restored: list[Restored]) -> None:
    """Say where each agent goes on that has come anywhere."""
    for agent, (replica, _, origin) in enumerate(restored):
        if replica.round:
            whose = f"agent {agent}: " if len(restored) > 1 else ""
            err.print(
                f"{whose}continuing at round {replica.round}, from {origin}", style="dim", highlight=False
            )


def _serve(service: Service, stopping: threading.Event, stay: bool) -> None:
    if not err.is_terminal:
        shown_at = -math.inf

        def show_rarely(status: Status, reason: str) -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at >= 10:
                shown_at = time.monotonic()
                err.print(status_line(status, reason), highlight=False, soft_wrap=True)

        service.run(stopping.is_set, stay, show_rarely)
    else:
        with Live(console=err, auto_refresh=False) as live:
            service.run(
                stopping.is_set, stay, lambda status, why: live.update(status_line(status, why), refresh=True)
            )
    service.close()
    status = service.status
    done = "finished" if status.round >= status.rounds else "stopped"
    for each in status.agents:
        err.print(
            f"agent {each.agent}: {done} at round {each.round}/{status.rounds}, digest {each.digest}",
            highlight=False,
        )
    if not status.agents:
        err.print(f"{done} at round {status.round}/{status.rounds}, digest {status.digest}", highlight=False)


@app.command(short_help="Show where a run stands.", epilog=epilog("zo-coordinator status my-run --watch"))
def status(
    run: RunArgument,
    json: JsonOption = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Show it again every second until Ctrl-C.", show_default=False),
    ] = False,
) -> None:
    """Show where a run stands: round, members, digests, loss, bytes. Never disturbs the coordinator."""
    with failures_explained():
        directory = RunDirectory(run)
        manifest = directory.manifest()
        with directory.ledger(manifest, read_only=True) as ledger:
            if not watch:
                _show_status(read_status(manifest, ledger), json)
                return
            with contextlib.suppress(KeyboardInterrupt), _renewing(json) as show:
                while True:
                    show(read_status(manifest, ledger))
                    time.sleep(1)


def _show_status(status: Status, json: bool) -> None:
    if json:
        print(msgspec.json.encode(status).decode(), flush=True)
    else:
        out.print(status_view(status), highlight=False)


@contextlib.contextmanager
def _renewing(json: bool) -> Iterator[Callable[[Status], None]]:
    """Shows statuses in one place of a terminal; one after the other as JSON or where there is no terminal."""
    if json or not out.is_terminal:
        yield lambda status: _show_status(status, json)
    else:
        with Live(console=out, auto_refresh=False) as live:
            yield lambda status: live.update(status_view(status), refresh=True)


@app.command(short_help="Prove a ledger by replaying it.", epilog=epilog("zo-coordinator verify my-run"))
def verify(
    run: RunArgument,
    json: JsonOption = False,
) -> None:
    """Replay the whole ledger; prove the chain, every signature, every step and every recorded digest, of every agent.

    With several agents, --json prints one object a line for each.
    """
    with failures_explained():
        directory = RunDirectory(run)
        manifest = directory.manifest()
        with directory.ledger(manifest, read_only=True) as ledger, replay_progress(err) as bar:
            for agent in range(manifest.agents.count):
                started = time.monotonic()
                show = partial(_show_replay, bar, bar.add_task("verifying", total=None))
                proof = audit(manifest, directory.initial(manifest, agent), ledger.track(agent), show)
                _show_proof(proof, manifest, time.monotonic() - started, json)


def _show_proof(proof: Audit, manifest: Manifest, seconds: float, json: bool) -> None:
    if json:
        print(msgspec.json.encode(proof).decode())
        return
    whose = f"agent {proof.agent} " if manifest.agents.count > 1 else ""
    signed = "every one signed, " if manifest.run.signer else ""
    out.print(
        f"{whose}verified: {proof.rounds} commits in one chain, {signed}every step by the rule, "
        f"{proof.digests_proven} digests reproduced ({duration(seconds)})",
        highlight=False,
        soft_wrap=True,
    )
    out.print(f"digest {proof.digest}\nhead   {proof.head}", highlight=False)


# After the commands above, so that `--help` lists these below them.
from coordinator import cli_history, cli_members  # noqa: E402, F401


def main() -> None:
    """The entry point of `zo-coordinator`."""
    app()


if __name__ == "__main__":
    main()
