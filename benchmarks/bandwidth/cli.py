"""`zo-bench`: bytes, rounds and targets of this system and of others, measured side by side."""

from __future__ import annotations

import contextlib
import json as json_format
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import machine
from benchmarks.bandwidth import runs, scale, wire
from benchmarks.bandwidth.network import Network, NetworkError, network
from benchmarks.bandwidth.results import DIRECTORY, Results, Row, bare
from benchmarks.recipes.assets import AssetMissing
from benchmarks.rows import ResultsError
from transport.exits import HELP, Exit

app = typer.Typer(
    name="zo-bench",
    help="What a byte really buys: this system and others, every byte counted at three layers.",
    epilog=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
out = Console() if sys.stdout.isatty() else Console(width=160)
err = Console(stderr=True)

_INTERRUPTED: Final = 130
QuickOption = Annotated[
    bool, typer.Option("--quick", help="A small part, in a minute or two.", show_default=False)
]
SystemOption = Annotated[
    list[str] | None,
    typer.Option(
        "--system",
        metavar="NAME",
        help="Only systems with this in their name; may be repeated.",
        show_default="everyone",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.", show_default=False)]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Keep rows here as they are measured, and measure none again that is there; the repository's are in "
        f"{DIRECTORY}.",
        show_default=False,
    ),
]
LoopbackOption = Annotated[
    bool,
    typer.Option(
        "--loopback", help="Not in network namespaces, also where they are allowed.", show_default=False
    ),
]


def main() -> None:
    """The command."""
    app()


@contextlib.contextmanager
def failures_explained() -> Iterator[None]:
    """One line and an exit code for what may go wrong; everything is cleaned up by then."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("interrupted; with --out the same command goes on from here", style="yellow")
        raise typer.Exit(_INTERRUPTED) from None
    except (ResultsError, AssetMissing) as error:
        err.print(f"zo-bench: error: {error}", style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(Exit.INPUT) from None
    except (NetworkError, runs.ServiceError, OSError) as error:
        err.print(f"zo-bench: error: {error}", style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(Exit.BUSY) from None


@contextlib.contextmanager
def _choosing() -> Iterator[None]:
    """Where something is asked for that is not there, before anything is set up for it."""
    try:
        yield
    except ValueError as error:
        raise ResultsError(str(error)) from error


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not sys.stderr.isatty()) as bar:
        yield bar


def _collect(found: Iterable[Row | str], bar: Progress, task: object) -> tuple[list[Row], list[str]]:
    """Rows, and what could not be measured, which is said at once."""
    rows: list[Row] = []
    failed: list[str] = []
    for each in found:
        bar.advance(task)  # type: ignore[arg-type]
        if isinstance(each, str):
            failed.append(each)
            err.print(f"not measured: {each}", style="yellow", highlight=False, soft_wrap=True)
        else:
            rows.append(each)
    return rows, failed


def _tell(net: Network) -> None:
    err.print(f"on {net.label}", style="dim" if net.interface else "yellow", highlight=False, soft_wrap=True)


def _finish(rows: Sequence[Row], failed: Sequence[str], table: Table, json: bool) -> None:
    if json:
        sys.stdout.write(json_format.dumps([bare(row) for row in rows]) + "\n")
    else:
        out.print(table)
    if failed:
        raise typer.Exit(Exit.MISMATCH)


@app.command("wire", epilog="Example: zo-bench wire --quick --json")
def wire_command(
    quick: QuickOption = False,
    json: JsonOption = False,
    out_directory: OutOption = None,
    loopback: LoopbackOption = False,
    every: Annotated[
        bool,
        typer.Option(
            "--all", help="Every width with every policy at every size: 288 rows.", show_default=False
        ),
    ] = False,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds to take the median of.")] = 9,
    think_ms: Annotated[
        int,
        typer.Option(
            metavar="MS",
            min=0,
            help="What nodes take between a commit and their next report. Below 40 ms acknowledgements ride on it.",
        ),
    ] = round(wire.THINK_S * 1000),
) -> None:
    """Bytes of a round per node, up and down: payload, ZMTP, Ethernet; by nodes, directions, codes, CURVE, policy."""
    with failures_explained(), network(loopback=loopback) as net, tempfile.TemporaryDirectory() as place:
        _tell(net)
        results = Results("wire", out_directory)
        manifest = runs.template(Path(place) / "template").manifest()
        wanted, missing = wire.known(wire.cells(quick, every), manifest)
        for each in missing:
            err.print(
                f"{each}: this version of the product does not have it", style="yellow", highlight=False
            )
        with _progress() as bar:
            task = bar.add_task("wire", total=len(wanted))

            def say(what: str) -> None:
                bar.update(task, description=what)

            rows, failed = _collect(
                wire.measure(net, wanted, manifest, results, rounds, think_ms / 1000, say), bar, task
            )
        table = Table(
            "nodes",
            "directions",
            "codes",
            "CURVE",
            "policy",
            *(f"{x} up" for x in wire.LAYERS),
            "per direction",
            *(f"{x} down" for x in wire.LAYERS),
        )
        for row in rows:
            up, down = ([f"{row[f'{layer}_{way}']:,.0f}" for layer in wire.LAYERS] for way in ("up", "down"))
            table.add_row(
                str(row["nodes"]),
                str(row["directions"]),
                row["codes"],
                "on" if row["curve"] else "off",
                row["policy"],
                *up,
                f"{row['wire_up'] / row['directions']:.2f}",
                *down,
            )
        for row in rows:
            row.pop("frames", None)
        _finish(rows, failed, table, json)


@app.command("session", epilog="Example: zo-bench session --quick")
def session_command(
    quick: QuickOption = False,
    json: JsonOption = False,
    out_directory: OutOption = None,
    loopback: LoopbackOption = False,
) -> None:
    """Bytes of what is not a round: joining, catching up, heartbeats of an idle node, leaving."""
    with failures_explained(), network(loopback=loopback) as net, _progress() as bar:
        _tell(net)
        task = bar.add_task("session", total=4)
        results = Results("session", out_directory)
        found = wire.measure_session(
            net,
            results,
            5.0 if quick else 2 * wire.HEARTBEAT_S,
            lambda what: bar.update(task, description=what),
        )
        rows, failed = _collect(found, bar, task)
        bar.stop()
        table = Table(
            "what",
            *(f"{layer} up" for layer in wire.LAYERS),
            *(f"{layer} down" for layer in wire.LAYERS),
            "B/s",
        )
        for row in rows:
            counts = [f"{row[f'{layer}_{way}']:,.0f}" for way in ("up", "down") for layer in wire.LAYERS]
            table.add_row(row["what"], *counts, wire.idle_rate(row))
        _finish(rows, failed, table, json)


@app.command("scale", epilog="Example: zo-bench scale --quick")
def scale_command(
    quick: QuickOption = False,
    json: JsonOption = False,
    out_directory: OutOption = None,
    loopback: LoopbackOption = False,
) -> None:
    """The coordinator with 16 to 4,000 nodes, a round a second: processor time, memory, bytes, where it ends."""
    with failures_explained(), network(loopback=loopback) as net, tempfile.TemporaryDirectory() as place:
        _tell(net)
        results = Results("scale", out_directory)
        manifest = runs.template(Path(place) / "template").manifest()
        counts = scale.QUICK_NODES if quick else scale.NODES
        with _progress() as bar:
            task = bar.add_task("scale", total=len(counts))
            found = scale.measure(
                net,
                counts,
                manifest,
                results,
                6.0 if quick else 20.0,
                lambda what: bar.update(task, description=what),
            )
            rows, failed = _collect(found, bar, task)
        table = Table(*scale.HEADINGS)
        for row in rows:
            table.add_row(*scale.cells(row))
        _finish(rows, failed, table, json)


@app.command("link", epilog="Example: zo-bench link --quick")
def link_command(
    system: SystemOption = None,
    quick: QuickOption = False,
    json: JsonOption = False,
    out_directory: OutOption = None,
) -> None:
    """Exchanges an hour, and time to a target, over emulated links of 1.2 kbit/s to 1 Mbit/s, 600 ms, with loss."""
    with failures_explained():
        from benchmarks.bandwidth import link, loads, systems

        pairs = link.pairs(quick)
        with _choosing():
            names = systems.named(list(dict.fromkeys(name for name, _ in pairs)), system or ())
        wanted = [pair for pair in pairs if pair[0] in names]
        known = Results("target", out_directory or DIRECTORY).rows or Results("target", DIRECTORY).rows
        results = Results("link", out_directory)
        with network() as net, tempfile.TemporaryDirectory() as place, _progress() as bar:
            _tell(net)
            task = bar.add_task("link", total=len(wanted))
            found = link.measure(
                net,
                wanted,
                runs.template(Path(place) / "template").manifest(),
                results,
                10.0 if quick else 20.0,
                lambda what: bar.update(task, description=what),
                loads.exchanges_to_target(list(known.values())),
            )
            rows, failed = _collect(found, bar, task)
        table = Table(*link.HEADINGS)
        for row in rows:
            table.add_row(*link.cells(row))
        _finish(rows, failed, table, json)


@app.command("target", epilog="Example: zo-bench target --recipe 1 --quick")
def target_command(
    recipe: Annotated[int, typer.Option(metavar="N", help="Recipe whose problem all systems get.")] = 1,
    rank: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of the adapter: 4 has 23,000 parameters, 170 a million.")
    ] = 4,
    system: SystemOption = None,
    quick: QuickOption = False,
    json: JsonOption = False,
    out_directory: OutOption = None,
    loopback: LoopbackOption = False,
) -> None:
    """Bytes, passes and time until a held-out loss: ours, published rules, FedAvg with Flower, others over gloo."""
    with failures_explained():
        from benchmarks.bandwidth import contest as contests
        from benchmarks.bandwidth import systems, target

        with _choosing():
            wanted = systems.chosen(systems.systems(recipe, quick, rank), system or ())
        results = Results("target", out_directory)
        with (
            network(loopback=loopback) as net,
            tempfile.TemporaryDirectory(prefix="zo-bench-") as place,
            _progress() as bar,
        ):
            _tell(net)
            contest = contests.prepare(recipe, Path(place), quick=quick, rank=rank)
            task = bar.add_task("target", total=sum(each.num_runs for each in wanted))
            found = target.measure(
                net,
                contest,
                wanted,
                results,
                lambda what: bar.update(task, description=what),
                {"recipe": recipe, "quick": quick, "rank": rank},
            )
            rows, failed = _collect(found, bar, task)
        table = Table(*target.HEADINGS)
        for row in target.best(rows):
            table.add_row(*target.cells(row))
        _finish(rows, failed, table, json)


@app.command("report", epilog="Example: zo-bench report --results docs/results/bandwidth")
def report_command(
    results: Annotated[
        Path, typer.Option("--results", metavar="DIR", help="Where rows were kept with --out.")
    ] = DIRECTORY,
    out_directory: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Where report.md and report.html go.", show_default="beside the rows"
        ),
    ] = None,
) -> None:
    """One page of Markdown and one of HTML, with plots, of everything that has been measured."""
    with failures_explained():
        from benchmarks.bandwidth import report

        rows_by_part, notes = report.load(results)
        for note in notes:
            err.print(note, style="yellow", highlight=False, soft_wrap=True)
        if not any(rows_by_part.values()):
            raise ResultsError(f"{results} holds no results; measure some with --out {results}")
        found, lines = report.sections(rows_by_part), report.provenance(rows_by_part)
        says = report.summary(rows_by_part)
        place = out_directory or results
        place.mkdir(parents=True, exist_ok=True)
        (place / "report.md").write_text(report.markdown(found, lines, says), "utf-8")
        (place / "report.html").write_text(report.page(found, lines, says), "utf-8")
        if results.resolve() == (machine.ROOT / DIRECTORY).resolve():
            readme = machine.ROOT / "README.md"
            made = report.inserted(readme.read_text("utf-8"), report.wire_table(rows_by_part["wire"]))
            readme.write_text(made, "utf-8")
        out.print(f"{place / 'report.md'} and {place / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
