"""The command `zo-node calibrate`: which epsilon suits a run's model, task and data on this machine."""

import json as json_format
import os
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from node import embedded
from node.base import check_base, load_base
from node.calibration import GOOD_ERROR, Row, proposed
from node.cli_app import (
    ColumnOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    QuantizeOption,
    ScoreOption,
    SkipOption,
    StartOption,
    ThreadsOption,
    app,
    columns_by_field,
    epilog,
    err,
    failures_explained,
    out,
)
from node.device import AUTO
from node.quantization import agreed
from node.records import DataError
from node.scores import load_score
from node.service import NodeError
from transport.exits import Exit
from zo import kernels
from zo.manifest import Manifest, ManifestError, parse_manifest


@app.command(
    short_help="Measure which epsilon suits a run.",
    epilog=epilog("zo-node calibrate my-run --data notes.txt"),
)
def calibrate(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A run's directory, a node's state directory, or a manifest.toml.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE", help="Data to measure on, as in join; may be repeated.", show_default=False
        ),
    ],
    column: ColumnOption = None,
    model: ModelOption = None,
    adapter: StartOption = None,
    score: ScoreOption = None,
    quantize: QuantizeOption = None,
    skip_quantize: SkipOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = AUTO,
    directions: Annotated[int, typer.Option(metavar="N", min=2, help="Directions to average over.")] = 8,
    threads: ThreadsOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead.", show_default=False)] = False,
) -> None:
    """Measure at many epsilons how wrong a slope is, and propose one: for `zo-coordinator init --epsilon`.

    A difference of losses is wrong by noise where epsilon is small, and by the curvature of the loss where it is large.
    The manifest's own epsilon is of no matter. Exit code 12 if no epsilon gives slopes that are more right than wrong.
    In JSON a figure that is not finite is null.
    """
    with failures_explained():
        manifest = _manifest(run)
        from node.language import LanguageTrainer, read_data

        form = agreed(manifest.base, quantize, skip_quantize, dtype, device)
        num_threads = threads or len(os.sched_getaffinity(0))
        kernels.compile_kernels()
        path = model or str(embedded.path())
        check_base(path, manifest, model, tokens_count=True)
        base = load_base(path, threads=num_threads, labels=manifest.task.head_labels, **form._asdict())
        rows = read_data(data, base, manifest.task, manifest.probe.sequence_length, columns_by_field(column))
        err.print(f"data: {rows}", style="dim", highlight=False, soft_wrap=True)
        own = load_score(score) if score else None
        trainer = LanguageTrainer(
            manifest, base, rows, None, private_seed=0, threads=num_threads, score=own, start=adapter
        )
        columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            shown = bar.add_task("", total=None)
            found = trainer.calibrate(
                directions, lambda done, total: bar.update(shown, completed=done, total=total)
            )
        best = proposed(found)
        if json:
            # JSON has neither infinity nor NaN: null.
            figures = [
                {name: value if isfinite(value) else None for name, value in asdict(each).items()}
                for each in found
            ]
            print(
                json_format.dumps(
                    {"epsilon": best and best.epsilon, "directions": directions, "rows": figures}
                )
            )
        else:
            out.print(_table(found, best))
        if best is None:
            raise NodeError(
                Exit.MISMATCH,
                "no epsilon is heard: at each, a slope is more wrong than right. Larger batches or sequences lessen "
                "noise, and so does a base held in more bits",
            )
        if not json:
            how = "" if best.error <= GOOD_ERROR else ", which is the best there is"
            out.print(
                f"use --epsilon {best.epsilon:g}: its slopes are off by {best.error:.0%}{how}",
                highlight=False,
            )


def _manifest(run: Path) -> Manifest:
    path = run / "manifest.toml" if run.is_dir() else run
    try:
        return parse_manifest(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}. Name a run directory as `zo-coordinator init` makes it"
        ) from error
    except (UnicodeDecodeError, ManifestError) as error:
        raise DataError(f"{path}: {error}") from error


def _table(rows: list[Row], best: Row | None) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("epsilon", "L+ - L-", "noise", "curvature", "off by", ""):
        table.add_column(title, justify="right")
    for row in rows:
        off = f"{row.error:.0%}" if row.error < 10 else "> 999%"
        figures = (f"{each:.2g}" for each in (row.signal, row.noise, row.curvature))
        table.add_row(f"{row.epsilon:g}", *figures, off, "←" if row == best else "")
    return table
