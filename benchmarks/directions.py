"""Policies, widths, estimators, local steps and numbers of nodes: what each learns from the same number of passes.

Runs swarms of virtual nodes over the code path of real ones (`benchmarks.recipes.swarm`) on recipes 1 to 3, and shows
the held-out metric against forward passes, payload and wire bytes. What is done is kept after each run: the same
command goes on. Needs ZO_TEST_ASSETS, as recipes do.

    python -m benchmarks.directions --quick
    python -m benchmarks.directions --out
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import machine
from benchmarks import rows as rows_of
from benchmarks.command import add_json, add_out, command_line
from benchmarks.recipes import comparison
from benchmarks.recipes.assets import AssetMissing
from benchmarks.recipes.baselines import FirstOrder, first_order
from benchmarks.recipes.comparison import Row
from benchmarks.recipes.problem import Problem
from benchmarks.recipes.results import key_of
from benchmarks.recipes.runner import described
from benchmarks.recipes.swarm import Swarm, train
from benchmarks.recipes.variants import Subject, Variant, subject, variants
from transport.exits import Exit
from zo.weights import WeightsOverflow

MARKS: Final = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run that is to be."""

    recipe: int
    subject: Subject
    variant: Variant
    settings: Swarm | FirstOrder
    seed: int
    marks: Sequence[float] = MARKS
    """Shares of the run after which it is measured."""

    @property
    def key(self) -> str:
        """What makes it the same as another, apart from the data."""
        variant = self.variant
        how = (self.settings.method, described(self.settings), variant.nodes, variant.every)
        return key_of(self.recipe, self.subject.title, *how, self.seed)


def jobs(recipes: Sequence[int], quick: bool, seed: int) -> Iterator[Job]:
    """All runs of some recipes."""
    for recipe in recipes:
        of = subject(recipe, quick)
        for variant in variants(of):
            for settings in variant.tried:
                marks = (0.0, 1.0) if quick else MARKS
                yield Job(
                    recipe=recipe, subject=of, variant=variant, settings=settings, seed=seed, marks=marks
                )


def measured(job: Job, problem: Problem) -> Row:
    """Run it."""
    variant, settings, began = job.variant, job.settings, perf_counter()
    if variant.every > 1:
        problem = replace(problem, private=problem.private[:: variant.every])
    nodes = len(problem.private)
    if isinstance(settings, Swarm):
        trained = train(problem, settings, job.seed, marks=job.marks)
        course, traffic = trained.course, trained.traffic
        backwards = sum(
            settings.passes(node)
            for node in range(nodes)
            if settings.estimator(node) in ("backward", "moves")
        )
        exchanges = settings.rounds
        counts = traffic.payload_up, traffic.payload_down, traffic.wire_up, traffic.wire_down
    else:
        course = first_order(problem, settings, job.seed, lambda *_: None)
        backwards, exchanges, counts = course.points[-1].forwards, 1, (0.0, 0.0, 0.0, 0.0)
    return Row(
        key=job.key,
        recipe=job.recipe,
        group=variant.group,
        name=variant.name,
        nodes=nodes,
        settings=described(settings),
        points=tuple((point.forwards, point.metric) for point in course.points),
        backwards=backwards * exchanges,
        rounds=exchanges if isinstance(settings, Swarm) else settings.steps,
        payload_up=counts[0],
        payload_down=counts[1],
        wire_up=counts[2],
        wire_down=counts[3],
        seed=job.seed,
        seconds=round(perf_counter() - began, 1),
        date=datetime.now(UTC).date().isoformat(),
        commit=machine.commit(),
        cpu=machine.cpu(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not among the results yet, and write the page and its plots."""
    options = _options(arguments)
    err = Console(stderr=True)
    name = "directions-quick" if options.quick else "directions"
    path = options.out / f"{name}.json"
    try:
        known = {row.key: row for row in load(path)}
        wanted = list(jobs(options.recipe, options.quick, options.seed))
        run(wanted, known, path, err)
    except (AssetMissing, rows_of.ResultsError) as error:
        err.print(f"benchmarks.directions: {error}", style="red", highlight=False, soft_wrap=True)
        return Exit.INPUT
    rows = [known[job.key] for job in wanted if job.key in known]
    titles = {job.recipe: (job.subject.title, job.subject.metric) for job in wanted}
    for recipe in titles:
        comparison.plot([row for row in rows if row.recipe == recipe], titles[recipe], _picture(path, recipe))
    pictures = {recipe: _picture(path, recipe).name for recipe in titles}
    text = comparison.markdown(rows, titles, pictures, quick=options.quick)
    path.with_suffix(".md").write_text(text, "utf-8")
    print(json.dumps([asdict(row) for row in rows]) if options.json else text)
    return 0


def run(wanted: Sequence[Job], known: dict[str, Row], path: Path, err: Console) -> None:
    """Run all that is not known, and keep each; who diverges has no row, and the others go on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    left = [job for job in wanted if job.key not in known]
    made: dict[int, Any] = {}
    with Progress(*columns, console=err, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(wanted), completed=len(wanted) - len(left))
        for job in left:
            bar.update(task, description=f"recipe {job.recipe}: {job.variant.name}")
            problem_of = made.setdefault(job.recipe, cache(job.subject.problem))
            try:
                row = measured(job, problem_of(job.variant.nodes))
            except WeightsOverflow as error:
                err.print(f"recipe {job.recipe}: {job.variant.name}, no row: {error}", highlight=False)
                bar.advance(task)
                continue
            known[job.key] = row
            save(path, list(known.values()))
            bar.advance(task)
            err.print(
                f"recipe {row.recipe}: {row.name}, {row.start:.3f} → {row.end:.3f}, {row.forwards:,} forward passes, "
                f"{row.seconds:.0f} s",
                highlight=False,
            )


def load(path: Path) -> list[Row]:
    """What was run already. Raises ResultsError."""
    return rows_of.read(path, lambda row: Row(**row))


def save(path: Path, rows: Sequence[Row]) -> None:
    """Keep all rows, at once or not at all."""
    rows_of.write(path, map(asdict, rows))


def _picture(path: Path, recipe: int) -> Path:
    return path.with_name(f"{path.stem}-{recipe}.png")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("directions", __doc__)
    parser.add_argument(
        "--recipe", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="which (1 2 3)"
    )
    parser.add_argument("--seed", type=int, default=1, help="(1)")
    parser.add_argument("--quick", action="store_true", help="very short runs: whether it works")
    add_json(parser)
    add_out(parser, "rows, page and plots", Path("directions-out"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
