"""How well a swarm learns: N virtual nodes in one process, over the code path of real ones.

    python -m benchmarks.learning --model DIR --data FILE --seeds 1,2,3
    python -m benchmarks.learning --recipe 1 [--quick] [--json] [--out [DIR]]

Every round is probe, codes, step rule, commit, replica: only sockets and files are left out. The first form is one
text, the last tenth of it held out, the rest split among the nodes. The second runs a recipe, with what it is compared
with (docs/recipes.md); what is in its results already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np

from benchmarks import machine
from benchmarks.command import add_json, add_out, command_line
from benchmarks.recipes import page
from benchmarks.recipes.assets import AssetMissing
from benchmarks.recipes.catalogue import RECIPES, fold, text_problem
from benchmarks.recipes.problem import Form
from benchmarks.recipes.results import Results
from benchmarks.recipes.runner import Runner
from benchmarks.recipes.swarm import Swarm, train
from benchmarks.rows import ResultsError
from node import base as bases
from node.device import DeviceError
from transport.exits import Exit
from zo.quantization import KINDS, Kind

LOSS_EVERY = 25


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one row of the table was run with."""

    nodes: int
    rounds: int
    directions: int
    step: float
    decay: Literal["linear", "constant"]
    smoothing: int
    train: Literal["B", "AB"]
    rank: int
    alpha: float
    epsilon: float
    batch_size: int
    sequence_length: int
    quantize: Kind = "none"
    sides: int = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: what was reached, and what it cost."""

    seed: int
    held_out_start: float
    """Mean cross-entropy over all held-out windows before the first round, nats per token."""
    held_out_end: float
    curve: tuple[float, ...]
    """Mean loss of the nodes' own batches, over every LOSS_EVERY rounds."""
    forwards: int
    """Forward passes of all nodes together, evaluation not counted."""
    code_bytes: int
    """Codes sent by all nodes together, one byte per direction."""
    ledger_bytes: int
    """All commits as encoded: what one node receives, without the transport's frames."""
    no_votes: int
    digest: str
    """Of the weights after the last round."""
    seconds: float


def run(model: str, text: str, settings: Settings, seed: int) -> Row:
    """Train once and measure."""
    form = Form(
        quantize=settings.quantize,
        rank=settings.rank,
        alpha=settings.alpha,
        train=settings.train,
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
    )
    problem = text_problem(Path(model), text, form, settings.nodes)
    how = Swarm(
        rounds=settings.rounds,
        directions=settings.directions,
        sides=settings.sides,
        step=settings.step,
        decay=settings.decay,
        smoothing=settings.smoothing,
        epsilon=settings.epsilon,
    )
    started = perf_counter()
    trained = train(problem, how, seed, marks=(0.0, 1.0))
    start, end = trained.course.points
    losses = trained.losses
    return Row(
        seed=seed,
        held_out_start=round(start.metric, 4),
        held_out_end=round(end.metric, 4),
        curve=tuple(
            round(float(np.mean(losses[i : i + LOSS_EVERY])), 3) for i in range(0, len(losses), LOSS_EVERY)
        ),
        forwards=end.forwards,
        code_bytes=end.up_bytes,
        ledger_bytes=trained.ledger_bytes,
        no_votes=trained.num_no_votes,
        digest=trained.digest,
        seconds=round(perf_counter() - started, 1),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, run once per seed or a recipe, print a table or JSON, and write if asked to."""
    options = _options(arguments)
    if options.recipe is not None:
        return run_recipe(options)
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    text = Path(options.data).read_text(encoding="utf-8")
    if not options.keep_line_breaks:
        text = fold(text)
    rows = []
    for seed in options.seeds:
        row = run(options.model, text, settings, seed)
        rows.append(row)
        if not options.json:
            print(
                f"seed {row.seed}: held-out loss {row.held_out_start:.3f} -> {row.held_out_end:.3f}, "
                f"{row.forwards:,} forwards, {row.code_bytes:,} bytes of codes, {row.seconds:.0f} s",
                flush=True,
            )
    figures = {
        "benchmark": "learning",
        "command": _command(options, sys.argv[1:] if arguments is None else arguments),
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": machine.cpu(),
        "versions": machine.versions(["numpy", "torch", "transformers", "peft"]),
        "commit": machine.commit(),
        "base": {"name": Path(options.model).name, "digest": bases.read_digest(options.model)},
        "text": _text_name(options),
        "settings": asdict(settings),
        "rows": [asdict(row) for row in rows],
        "held_out_end_worst": max(row.held_out_end for row in rows),
    }
    if options.json:
        print(json.dumps(figures))
    if options.out is not None:
        write(figures, options.out)
    return 0


def run_recipe(options: argparse.Namespace) -> int:
    """Run a recipe, or what of it is not among the results yet, and write its page and plots."""
    recipe = RECIPES[options.recipe]
    name = f"recipe-{recipe.number}{'-quick' * options.quick}"
    folder = options.out or Path("learning-out")
    try:
        results = Results(folder / f"{name}.json")
        runner = Runner(recipe.number, results, again=options.again, device=options.device)
        recipe.run(runner, options.quick)
    except (AssetMissing, ResultsError, DeviceError) as error:
        print(f"benchmarks.learning: {error}", file=sys.stderr)
        return Exit.INPUT
    results.keep(runner.keys)
    command = f"python -m benchmarks.learning --recipe {recipe.number}{' --quick' * options.quick}"
    text = page.markdown(f"Recipe {recipe.number}: {recipe.title}", command, recipe.metric, results.rows)
    (folder / f"{name}.md").write_text(text, "utf-8")
    page.plot(results.rows, recipe.metric, folder / f"{name}-forwards.png", folder / f"{name}-bytes.png")
    print(json.dumps([asdict(row) for row in results.rows]) if options.json else text)
    return 0


def write(figures: dict[str, Any], folder: Path) -> None:
    """Put figures into learning.json, in the place of older ones of the same subject; write learning.md anew.

    The subject is the base, how it is quantised, and the text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "learning.json"
    known: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []

    def subject(each: dict[str, Any]) -> tuple[str, int, str]:
        return each["base"]["name"], KINDS.index(each["settings"].get("quantize", "none")), each["text"]

    kept = sorted([*(each for each in known if subject(each) != subject(figures)), figures], key=subject)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (folder / "learning.md").write_text("\n".join(map(markdown, kept)), encoding="utf-8")


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a section for the docs."""
    settings, versions = figures["settings"], figures["versions"]
    quantize = settings.get("quantize", "none")
    held = "" if quantize == "none" else f" in {quantize}"
    lines = [
        f"## {figures['base']['name']}{held} on {figures['text']}",
        "",
        f"`{figures['command']}`, {figures['date']}, commit {figures['commit']}, {figures['cpu']} (one thread), "
        f"torch {versions['torch']}: {settings['nodes']} nodes, {settings['rounds']} rounds, {settings['directions']} "
        f"direction(s) a node and round, batches of {settings['batch_size']} × {settings['sequence_length']}; "
        f"train {settings['train']}, rank {settings['rank']}, alpha {settings['alpha']:g}, step {settings['step']:g} "
        f"({settings['decay']} decay), epsilon {settings['epsilon']:g}.",
        "",
        "| seed | held-out loss before | after | forward passes | codes | time |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['seed']} | {row['held_out_start']:.3f} | {row['held_out_end']:.3f} | {row['forwards']:,} | "
        f"{row['code_bytes']:,} B | {row['seconds']:.0f} s |"
        for row in figures["rows"]
    ]
    return "\n".join(lines) + "\n"


def _text_name(options: argparse.Namespace) -> str:
    file = Path(options.data)
    name = file.parent.name if file.stem == "input" and file.parent.name else file.name
    return f"{name}, line breaks {'kept' if options.keep_line_breaks else 'folded'}"


def _command(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """The command line, with placeholders for the places where somebody keeps models, data and results."""
    placeholders = {options.model: "MODEL", options.data: "TEXT", str(options.out): "DIR"}
    return " ".join(["python -m benchmarks.learning", *(placeholders.get(each, each) for each in arguments)])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("learning", __doc__)
    parser.add_argument("--recipe", type=int, choices=sorted(RECIPES), help="run this one")
    parser.add_argument("--quick", action="store_true", help="a small form of the recipe, minutes at most")
    parser.add_argument("--again", action="store_true", help="run a recipe's rows even if they are there")
    parser.add_argument(
        "--device", default="cpu", metavar="cpu|cuda|cuda:N|auto", help="where a recipe computes (cpu)"
    )
    one = parser.add_argument_group("without a recipe", "a swarm on one text")
    one.add_argument("--model", metavar="DIR", help="directory of the base")
    one.add_argument("--data", metavar="FILE", help="a UTF-8 text; its last tenth is held out")
    one.add_argument("--keep-line-breaks", action="store_true", help="do not fold white space into one space")
    seeds = [1, 2, 3]
    one.add_argument(
        "--seeds",
        type=lambda text: [int(part) for part in text.split(",")],
        metavar="N,N,...",
        default=seeds,
        help=f"a run for each ({','.join(map(str, seeds))})",
    )

    def amount(name: str, kind: type[int] | type[float], default: float, what: str) -> None:
        one.add_argument(name, type=kind, default=default, metavar="N", help=f"{what} ({default})")

    def choice(name: str, kinds: Sequence[object], default: object, what: str) -> None:
        one.add_argument(name, type=type(default), choices=kinds, default=default, help=f"{what} ({default})")

    amount("--nodes", int, 8, "virtual nodes, each with its part of the text")
    amount("--rounds", int, 300, "of a run")
    amount("--directions", int, 1, "of a node and round")
    choice("--sides", (1, 2), 2, "losses for a direction")
    amount("--step", float, 0.01, "of a round, in units of the weights")
    choice("--decay", ("linear", "constant"), "linear", "of the step")
    amount("--smoothing", int, 2, "a round changes the scale that normalises by 2^-N of the difference")
    choice("--train", ("B", "AB"), "AB", "parts of the adapter")
    amount("--rank", int, 4, "of the adapter")
    amount("--alpha", float, 8.0, "of the adapter")
    amount("--epsilon", float, 0.01, "of the perturbation")
    choice("--quantize", KINDS, "none", "how to hold the base")
    amount("--batch-size", int, 8, "windows in a batch")
    amount("--sequence-length", int, 128, "tokens of a window")
    add_json(parser)
    add_out(
        parser, "learning.json and learning.md, or what a recipe has found (without it, in learning-out),"
    )
    options = parser.parse_args(arguments)
    if options.recipe is None and not (options.model and options.data):
        parser.error("name a --recipe, or a --model and its --data")
    return options


if __name__ == "__main__":
    sys.exit(main())
