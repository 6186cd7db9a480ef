"""What differential privacy costs in accuracy: recipe 3 with every node private, at several budgets.

    python -m benchmarks.privacy [--quick] [--nodes N] [--out [DIR]]

MiniLM on SST-2, a head alone, virtual nodes in one process over the code path of real ones
(`benchmarks.recipes.swarm`). Every node is private by itself: its rows, its noise, its budget, which lasts exactly for
the run. All of a node's rows are in every batch, so that nothing is drawn, and the accountant is that of the Gaussian
mechanism. What is there already of a run is not run again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
from rich.console import Console

from benchmarks import machine
from benchmarks.command import add_out, command_line
from benchmarks.recipes import problem as problems
from benchmarks.recipes.catalogue import sentiment_problem
from benchmarks.recipes.problem import HeldOut, Problem
from benchmarks.recipes.runner import described
from benchmarks.recipes.swarm import Exact, Swarm, make_manifest
from node.accountant import Cost, epsilon, noise_for
from node.language import adapt
from node.objectives import objective
from node.privacy import Mechanism, Release
from node.probe import Probe
from zo.directions import run_key
from zo.initial import initial_weights
from zo.weights import to_float

DELTA: Final = 1e-5
BUDGETS: Final = (None, 16.0, 8.0, 4.0, 2.0, 1.0, 0.5)
"""Epsilons; None: not private."""
CLIP: Final = 0.02
SETTINGS: Final = Swarm(rounds=400, directions=4, sides=1, step=0.3, epsilon=0.01)
NAME: Final = "privacy"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run."""

    budget: float | None
    """Epsilon that every node has; None: not private."""
    seed: int
    rounds: int
    clip: float
    noise: float | None
    """In units of `clip`."""
    spent: float | None
    """Epsilon at the end, as the accountant has it."""
    clipped: float | None
    """Share of rows that said more than they may."""
    accuracy: float
    """Of the head on the held-out rows, after the last round."""
    seconds: float


class Bench:
    """The nodes, their base and what is held out: the same for all runs, so that the encoder reads every row once."""

    def __init__(self, problem: Problem, settings: Swarm) -> None:
        """Load the base and put the nodes' data before it."""
        self.problem, self.settings = problem, settings
        self.base = problems.load(problem)
        self.adapter = adapt(self.base, make_manifest(self.base, problem.form, settings, 0, problem.task))
        self.probes = [
            Probe(
                self.adapter,
                windows,
                key=(0, 0),
                epsilon=settings.epsilon,
                directions=settings.directions,
                batch_size=problem.form.batch_size,
                seed=0,
                sides=settings.sides,
                objective=objective(problem.task, self.base, windows),
                at_once=settings.directions,
            )
            for windows in problem.private
        ]
        self.held_out = HeldOut(problem, self.adapter)

    def run(self, budget: float | None, seed: int, clip: float) -> Row:
        """Train once."""
        started, settings = perf_counter(), self.settings
        form, task = self.problem.form, self.problem.task
        manifest = make_manifest(self.base, form, settings, seed, task)
        key = run_key(manifest.run_id)
        noise = None if budget is None else noise_for(1.0, settings.rounds, budget, DELTA)
        for node, probe in enumerate(self.probes):
            assert probe.windows.num_windows <= probe.batch_size, "all rows are in every batch"
            probe.key, probe.seed = key, 1000 * seed + node
            # A run that can be repeated: the noise of real nodes is the operating system's.
            entropy = np.random.default_rng([seed, node]).bytes
            probe.mechanism = (
                None if noise is None else Mechanism(Release(rate=1.0, noise=noise, clip=clip), entropy)
            )
        trainer = Exact(manifest, initial_weights(self.adapter.layout, key, form.train), 0)
        for number in range(settings.rounds):
            trainer.round(number, self.probes)
        self.adapter.load(to_float(trainer.weights))
        made = [probe.mechanism for probe in self.probes if probe.mechanism is not None]
        assert all(each.num_releases == settings.rounds for each in made)
        return Row(
            budget=budget,
            seed=seed,
            rounds=settings.rounds,
            clip=clip,
            noise=noise,
            spent=None if noise is None else epsilon({Cost(1.0, noise): settings.rounds}, DELTA),
            clipped=sum(each.num_clipped for each in made) / sum(each.num_rows for each in made)
            if made
            else None,
            accuracy=1 - self.held_out(),
            seconds=round(perf_counter() - started, 1),
        )


def markdown(figures: dict[str, Any]) -> str:
    """The page for the docs."""
    rows = [Row(**row) for row in figures["rows"]]
    plain = mean([row.accuracy for row in rows if row.budget is None])
    settings = figures["settings"]
    lines = [
        "# What privacy costs",
        "",
        f"`{figures['command']}` on {figures['cpu']} (one thread), commit {figures['commit']}.",
        "",
        f"A linear head on frozen MiniLM features, SST-2: {figures['nodes']} nodes with {figures['rows_per_node']} "
        f"rows each, {settings['rounds']} rounds of {settings['directions']} one-sided directions, all rows in every "
        f"batch, step {settings['step']:g}. {figures['held_out']} held-out rows: an accuracy of 75 % is known to "
        f"±{100 * (0.1875 / figures['held_out']) ** 0.5:.1f} points (one standard deviation). Each node has a budget "
        f"of its own at δ = {figures['delta']:g}, spent to the last round; a row says at most {rows[-1].clip:g}.",
        "",
        "| ε | noise, in units of the bound | accuracy | lost, in points | seeds |",
        "|---:|---:|---:|---:|---:|",
    ]
    for budget in dict.fromkeys(row.budget for row in rows):
        of_it = [row for row in rows if row.budget == budget]
        reached = [row.accuracy for row in of_it]
        name = "not private" if budget is None else f"{budget:g}"
        noise = "" if budget is None else f"{of_it[0].noise:.1f}"
        spread = f" ({100 * min(reached):.1f} to {100 * max(reached):.1f})" if len(reached) > 1 else ""
        lost = "" if budget is None else f"{100 * (plain - mean(reached)):.1f}"
        lines.append(f"| {name} | {noise} | {100 * mean(reached):.1f}{spread} | {lost} | {len(of_it)} |")
    return "\n".join(lines) + "\n"


def mean(values: Sequence[float]) -> float:
    """Of at least one; NaN of none."""
    return float(np.mean(values)) if len(values) else float("nan")


def plot(figures: dict[str, Any], path: Path) -> None:
    """Accuracy against epsilon, every run a point."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [Row(**row) for row in figures["rows"]]
    figure, panel = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    means = [100 * mean([row.accuracy for row in rows if row.budget == each]) for each in budgets]
    panel.plot(budgets, means, color="C0", label="every node private")
    points = [(row.budget, 100 * row.accuracy) for row in rows if row.budget is not None]
    panel.scatter([budget for budget, _ in points], [reached for _, reached in points], color="C0", s=12)
    plain = 100 * mean([row.accuracy for row in rows if row.budget is None])
    panel.axhline(plain, color="C7", linestyle="--", label="not private")
    panel.set_xscale("log", base=2)
    panel.set_xticks(budgets, [f"{each:g}" for each in budgets])
    panel.set_xlabel(f"ε of each node, at δ = {figures['delta']:g}")
    panel.set_ylabel("accuracy on held-out rows, %")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, print, and write if asked to."""
    parser = command_line("privacy", __doc__)
    parser.add_argument("--quick", action="store_true", help="four nodes of 32 rows, 20 rounds, one seed")
    parser.add_argument(
        "--nodes", type=int, default=16, metavar="N", help="of 432 rows each (16, which is all)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each budget (3)")
    parser.add_argument(
        "--clip", type=float, default=CLIP, metavar="C", help=f"most a row may say ({CLIP:g})"
    )
    parser.add_argument("--again", action="store_true", help="run also what is there already")
    add_out(parser, "privacy.json, privacy.md and privacy.png")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    settings = replace(SETTINGS, rounds=20) if options.quick else SETTINGS
    problem = sentiment_problem(options.quick, 4 if options.quick else options.nodes)
    path = None if options.out is None else options.out / f"{NAME}.json"
    about = {
        "settings": described(settings),
        "delta": DELTA,
        "nodes": len(problem.private),
        "rows_per_node": problem.private[0].num_windows,
        "held_out": sum(each.num_windows for each in problem.held_out),
    }
    known: list[dict[str, Any]] = []
    if path is not None and path.exists() and not options.again:
        before = json.loads(path.read_text("utf-8"))
        if {name: before.get(name) for name in about} == about:
            known = [row for row in before["rows"] if row["clip"] == options.clip]
    bench, rows = None, []
    wanted = [
        (budget, seed) for budget in BUDGETS for seed in range(1, (1 if options.quick else options.seeds) + 1)
    ]
    figures: dict[str, Any] = {}
    for done, (budget, seed) in enumerate(wanted):
        found = next((row for row in known if (row["budget"], row["seed"]) == (budget, seed)), None)
        if found is None:
            if bench is None:
                console.print("loading the base; the first run reads all rows with it", style="dim")
                bench = Bench(problem, settings)
            found = asdict(bench.run(budget, seed, options.clip))
        rows.append(found)
        console.print(
            f"{done + 1}/{len(wanted)}: epsilon {budget}, seed {seed}: {100 * found['accuracy']:.1f} % "
            f"({found['seconds']:.0f} s)",
            highlight=False,
        )
        figures = about | {
            "rows": rows,
            "cpu": machine.cpu(),
            "versions": machine.versions(("numpy", "torch", "transformers", "dp-accounting")),
            "commit": machine.commit(),
            "command": machine.command("benchmarks.privacy"),
        }
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(figures, indent=2) + "\n")
    if path is not None:
        path.with_suffix(".md").write_text(markdown(figures))
        plot(figures, path.with_suffix(".png"))
    sys.stdout.write(markdown(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
