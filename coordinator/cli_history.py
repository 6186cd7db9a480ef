"""The commands of `zo-coordinator` that look back: log, diff, export, rollback, retract, release, backup, simulate."""

import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from coordinator.cli_app import (
    AgentOption,
    JsonOption,
    RunArgument,
    agents_meant,
    app,
    epilog,
    err,
    failures_explained,
    one_agent,
    out,
)
from coordinator.display import plain, replay_progress, simulation_view
from coordinator.history import (
    Difference,
    HistoryError,
    LogRecord,
    back_up,
    compare,
    export_pool,
    export_state,
    records,
    take_back,
    took_part,
    whose,
)
from coordinator.ledger import Ledger
from coordinator.rundir import RunDirectory
from coordinator.simulation import Scenario, virtual
from coordinator.simulation import simulate as run_simulation
from transport.exits import Exit
from zo.directions import GROUP_0
from zo.manifest import MAX_GROUPS, Manifest


@app.command(
    short_help="Show the ledger and its events.", epilog=epilog("zo-coordinator log my-run --last 50")
)
def log(
    run: RunArgument,
    first: Annotated[int | None, typer.Option("--from", metavar="ROUND", help="First round to show.")] = None,
    last: Annotated[
        int, typer.Option(metavar="N", min=0, help="Without --from: show the last N rounds.")
    ] = 20,
    agent: AgentOption = None,
    json: JsonOption = False,
) -> None:
    """Show the ledger: what each round did, and what happened beside it. With several agents, name one."""
    with failures_explained():
        directory = RunDirectory(run)
        manifest = directory.manifest()
        with directory.ledger(manifest, read_only=True) as file:
            ledger = file.track(one_agent(manifest, agent))
            total = ledger.num_commits()
            start = max(0, total - last) if first is None else first
            if not 0 <= start <= total:
                raise HistoryError(f"the ledger has {total} rounds, got --from {start}")
            for record in records(ledger, manifest, start, total):
                if json:
                    sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
                else:
                    out.print(_line(record), highlight=False, soft_wrap=True, style=_style(record))


def _line(record: LogRecord) -> Text:
    digest = f"  digest {record.digest[:12]}…" if record.digest else ""
    kind = "" if record.kind == "commit" else f"{record.kind}: "
    return plain(f"{record.round:>8}  {kind}{record.text}{digest}")


def _style(record: LogRecord) -> str:
    if record.kind in (
        "diverged",
        "first-difference",
        "out-of-line",
        "malformed",
        "refused",
        "misfit",
        "revert",
    ):
        return "yellow"
    return "" if record.kind == "commit" else "dim"


@app.command(short_help="Compare two runs.", epilog=epilog("zo-coordinator diff my-run backup-of-my-run"))
def diff(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run directory.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another.", show_default=False)],
    agent: AgentOption = None,
    json: JsonOption = False,
) -> None:
    """Compare two runs: their manifests, and from which round on their ledgers differ. Exit code 12 if they do.

    With several agents all of them are compared, unless one is named; --json then prints one object a line for each.
    """
    with failures_explained():
        a, b = RunDirectory(run_a), RunDirectory(run_b)
        manifests = a.manifest(), b.manifest()
        with a.ledger(manifests[0], read_only=True) as one, b.ledger(manifests[1], read_only=True) as other:
            differences = [
                compare(manifests, (one.track(each), other.track(each)))
                for each in agents_meant(manifests[0], agent)
            ]
        if json:
            for difference in differences:
                sys.stdout.write(msgspec.json.encode(difference).decode() + "\n")
        else:
            _show_fields(differences[0])
            for difference in differences if differences[0].same_run else differences[:1]:
                if len(differences) > 1 and difference.same_run:
                    out.print(f"agent {difference.agent}, ", end="", highlight=False)
                _show(difference)
        if not all(difference.are_equal for difference in differences):
            raise typer.Exit(Exit.MISMATCH)


def _show_fields(difference: Difference) -> None:
    if difference.fields:
        table = Table("field", "A", "B", box=None, pad_edge=False)
        for name, (a, b) in difference.fields.items():
            table.add_row(plain(name), plain(str(a)), plain(str(b)))
        out.print(table, highlight=False)


def _show(difference: Difference) -> None:
    a, b = difference.rounds
    if not difference.same_run:
        out.print("two runs of their own: no round in common", highlight=False)
    elif difference.are_equal:
        out.print(f"equal: {a} rounds", highlight=False)
    elif difference.common_rounds == min(a, b):
        longer = "A" if a > b else "B"
        out.print(f"equal up to round {min(a, b)}; {longer} has {abs(a - b)} more", highlight=False)
    else:
        out.print(
            f"a fork: equal up to round {difference.common_rounds}, then {a - difference.common_rounds} in A alone "
            f"and {b - difference.common_rounds} in B",
            highlight=False,
        )


@app.command(
    short_help="Write the weights after a round.",
    epilog=epilog("zo-coordinator export my-run --round 9 -o state"),
)
def export(
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory to make.", show_default=False)
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option(
            "--pool",
            metavar="FILE",
            help="Instead, of a pool run: a file to make, of as many integers as the pool has directions.",
            show_default=False,
        ),
    ] = None,
    round: Annotated[
        int | None, typer.Option(metavar="R", help="After so many rounds.", show_default="the newest")
    ] = None,
    agent: AgentOption = None,
) -> None:
    """Write the weights after a round, for `zo-node export` to turn into a PEFT adapter.

    With several agents those of all, unless one is named.
    """
    with failures_explained():
        if (output is None) == (pool is None):
            raise HistoryError("give -o DIR, or of a pool run --pool FILE")
        directory = RunDirectory(run)
        manifest = directory.manifest()
        if pool is not None:
            with directory.ledger(manifest, read_only=True) as ledger:
                track = ledger.track(one_agent(manifest, agent))
                replica, num_bytes = export_pool(directory, manifest, track, round, pool)
            out.print(
                f"round {replica.round}, digest {replica.digest().hex()}: {num_bytes:,} bytes",
                highlight=False,
            )
            out.print(
                f"Next: zo-node export --from {pool} -o ADAPTER --model MODEL",
                highlight=False,
                soft_wrap=True,
            )
            return
        assert output is not None
        with directory.ledger(manifest, read_only=True) as ledger:
            tracks = [ledger.track(each) for each in agents_meant(manifest, agent)]
            replicas = export_state(directory, manifest, tracks, round, output)
        for replica in replicas:
            whose = f"agent {replica.agent}, " if manifest.agents.count > 1 else ""
            out.print(f"{whose}round {replica.round}, digest {replica.digest().hex()}", highlight=False)
        out.print(f"Next: zo-node export {output} -o ADAPTER --model MODEL", highlight=False, soft_wrap=True)


@app.command(
    short_help="Take back everything since a round.", epilog=epilog("zo-coordinator rollback my-run --to 120")
)
def rollback(
    run: RunArgument,
    to: Annotated[
        int, typer.Option(metavar="R", help="Weights as they were after R rounds.", show_default=False)
    ],
    agent: AgentOption = None,
) -> None:
    """Take back everything since a round, exactly, as an entry of its own; the history stays.

    The run must not be served meanwhile. Nodes follow when it is served again. Rounds are not given back. With several
    agents, name one: each has rounds of its own.
    """
    with failures_explained():
        directory = RunDirectory(run)
        manifest = directory.manifest()
        with directory.lock(), directory.ledger(manifest) as ledger:
            _take_back(directory, manifest, ledger.track(one_agent(manifest, agent)), to, [])


@app.command(short_help="Take back what some nodes did.", epilog=epilog("zo-coordinator retract my-run 3"))
def retract(
    run: RunArgument,
    nodes: Annotated[
        list[int] | None,
        typer.Argument(metavar="[NODE]...", help="Node numbers, from `status`.", show_default=False),
    ] = None,
    group: Annotated[
        list[int] | None,
        typer.Option(
            metavar="G",
            help="A group whose nodes share directions; may be repeated.",
            min=0,
            max=MAX_GROUPS - 1,
            show_default=False,
        ),
    ] = None,
    since: Annotated[
        int, typer.Option("--from", metavar="ROUND", min=0, help="Only from this round on.")
    ] = 0,
    agent: AgentOption = None,
) -> None:
    """Take back what some nodes' codes did, exactly, as an entry of its own; the history stays.

    It undoes their direct moves. It does not undo that others measured their slopes at weights which these moves had
    shaped, nor that they entered the steps' normalisation: only a rollback does. With several agents, it is taken back
    from all that they trained, unless one is named.
    """
    with failures_explained():
        directory = RunDirectory(run)
        manifest = directory.manifest()
        with directory.lock(), directory.ledger(manifest) as ledger:
            voices = [*(nodes or []), *(GROUP_0 + each for each in group or [])]
            if not voices:
                raise HistoryError("name at least one node, or --group; `rollback` takes back everything")
            tracks = [ledger.track(each) for each in agents_meant(manifest, agent)]
            trained = [track for track in tracks if took_part(track, voices, since)]
            for track in trained or tracks[:1]:  # which says that there is nothing to take back
                _take_back(directory, manifest, track, since, voices)


def _take_back(
    directory: RunDirectory, manifest: Manifest, ledger: Ledger, first: int, voices: list[int]
) -> None:
    def warn(text: str) -> None:
        err.print(f"zo-coordinator: warning: {text}", style="yellow", highlight=False, soft_wrap=True)

    entry, replica = take_back(directory, manifest, ledger, first, voices, warn)
    part = f" of {whose(entry.nodes)}" if entry.nodes else ""
    text = f"took back rounds {entry.first} to {entry.last - 1}{part}"
    ledger.note(entry.round, "retracted" if entry.nodes else "rolled-back", None, text)
    which = f"agent {ledger.agent}, " if manifest.agents.count > 1 else ""
    out.print(f"{which}round {entry.round}: {text}", highlight=False)
    out.print(f"digest {replica.digest().hex()}", highlight=False)


@app.command(short_help="Let a quarantined node in again.", epilog=epilog("zo-coordinator release my-run 3"))
def release(
    run: RunArgument,
    node: Annotated[
        int, typer.Argument(metavar="NODE", help="A quarantined node's number.", show_default=False)
    ],
) -> None:
    """Let a quarantined node join again. The run must not be served meanwhile."""
    with failures_explained():
        directory = RunDirectory(run)
        manifest = directory.manifest()
        with directory.lock(), directory.ledger(manifest) as ledger:
            known = {each.node: each for each in ledger.nodes()}
            if node not in known or not known[node].is_quarantined:
                raise HistoryError(f"node {node} is not in quarantine")
            ledger.release(node)
        out.print(f"node {node} may join again", highlight=False)


@app.command(
    short_help="Copy a run, served or not.", epilog=epilog("zo-coordinator backup my-run /media/disk/my-run")
)
def backup(
    run: RunArgument,
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="Directory to make.", show_default=False)
    ],
) -> None:
    """Copy a run, while it is served or not, into a directory that can be served in its place. It holds the key too."""
    with failures_explained():
        directory = RunDirectory(run)
        manifest = directory.manifest()
        back_up(directory, destination)
        copy = RunDirectory(destination)
        with copy.ledger(manifest, read_only=True) as ledger:
            rounds = sum(ledger.track(agent).num_commits() for agent in range(manifest.agents.count))
        err.print(f"copied {rounds} rounds to {destination}", highlight=False, soft_wrap=True)


@app.command(
    short_help="Simulate a swarm of this run.",
    epilog=epilog("zo-coordinator simulate my-run --nodes 1000 --seed 7"),
)
def simulate(
    run: RunArgument,
    nodes: Annotated[int, typer.Option(min=1, max=4096, metavar="N", help="Virtual nodes.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds.")] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="Everything that happens follows from it.")] = 1,
    churn: Annotated[
        float, typer.Option(min=0, max=1, help="Share of nodes that leave or come, a round.")
    ] = 0.2,
    loss: Annotated[float, typer.Option(min=0, max=0.9, help="Share of frames that never arrive.")] = 0.1,
    slow: Annotated[
        float, typer.Option(min=0, max=1, help="Share of nodes that are 100 times slower.")
    ] = 0.02,
    mass_loss: Annotated[
        float, typer.Option(min=0, max=1, help="Share that vanishes at once, half way.")
    ] = 0.0,
    kills: Annotated[int, typer.Option(min=0, metavar="N", help="Kills of the coordinator.")] = 2,
    json: JsonOption = False,
) -> None:
    """Run the real state machines of coordinator and nodes over a virtual network and clock; check every promise.

    With the run's manifest, but a small adapter and random codes. Exit code 12 if a promise does not hold; the message
    names the seed that shows it again.
    """
    with failures_explained():
        manifest = RunDirectory(run).manifest()
        scenario = Scenario(
            nodes=nodes,
            rounds=rounds,
            seed=seed,
            churn=churn,
            loss=loss,
            slow=slow,
            mass_loss=mass_loss,
            coordinator_kills=kills,
        )
        started = time.monotonic()
        with replay_progress(err) as bar:
            task = bar.add_task("simulating", total=rounds)
            result = run_simulation(
                virtual(manifest, scenario), scenario, lambda done, _: bar.update(task, completed=done)
            )
    if json:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
        return
    out.print(simulation_view(result, time.monotonic() - started), highlight=False)
