"""How fast a node probes: views one by one, side by side, and with frozen layers run once for all of them.

    python -m benchmarks.probing [--json] [--quick] [--random] [--model DIR] [--quantize nf4] [--out [DIR]]

Every row compares ways to measure the same losses of the same directions, in turns, so that what else the machine does
meets all of them alike: the medians of the ratios of neighbouring turns are the result.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine, random_base
from benchmarks.command import add_json, add_out, command_line, deliver
from node import embedded
from node.adapter import Adapter
from node.base import load_base
from node.probe import Probe
from node.stacked import frozen_layers
from zo import kernels
from zo.directions import Direction
from zo.quantization import KINDS, Kind

SHAPES = ((1, 32), (1, 128), (8, 128))
AT_ONCE = (1, 2, 4)
KEY = (1, 2)
LONG_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One base, shape and choice of adapted layers."""

    model: str
    quantize: Kind
    adapted: str
    """Which layers have an adapter."""
    batch: str
    sides: int
    one_by_one_ms: float
    """Of a direction, each view with a pass of its own."""
    ratios: dict[str, float]
    """By the number of directions in a pass: how many times as fast a direction is."""
    largest_difference: float
    """Of any loss from that one by one, in nats."""


def measure(
    model: str, kind: Kind, upper: bool, shape: tuple[int, int], sides: int, turns: int, threads: int
) -> Row:
    """One row.

    Args:
        model: directory of the base.
        kind: how it is quantised.
        upper: adapt the upper half of the layers only.
        shape: rows and tokens of a batch.
        sides: views of a direction.
        turns: how often each way is timed, after one that warms up; fewer, but two, if that takes a minute.
        threads: to compute with.
    """
    base = load_base(model, threads=threads, quantize=kind)
    config: Any = base.model.config
    num_layers = config.num_hidden_layers
    in_upper = {
        name
        for name in base.linear_shapes
        if any(f".{layer}." in name for layer in range(num_layers // 2, num_layers))
    }
    every = {name for name in base.linear_shapes if any(part.isdecimal() for part in name.split("."))}
    adapter = Adapter(
        base, key=KEY, targets=sorted(in_upper if upper else every), rank=4, alpha=8.0, train="AB"
    )
    assert bool(frozen_layers(adapter)[0]) == upper
    rows, length = shape
    probe = Probe(
        adapter,
        random_base.windows(len(base.tokenizer), shape),
        key=KEY,
        epsilon=0.01,
        directions=max(AT_ONCE),
        batch_size=rows,
        seed=0,
        sides=sides,
    )
    weights = np.random.default_rng(1).integers(-(2**22), 2**22, adapter.size).astype(np.int32)
    names = [Direction(0, sample) for sample in range(max(AT_ONCE))]
    ways = (0, *(n for n in AT_ONCE if sides * n > 1))
    seconds: dict[int, list[float]] = {way: [] for way in ways}
    losses = {}
    began = perf_counter()
    for turn in range(turns + 1):
        if turn > 2 and perf_counter() - began > LONG_S:
            break
        for way in ways:
            probe.at_once = way
            started = perf_counter()
            losses[way] = probe.losses(weights, names, sides)
            seconds[way].append((perf_counter() - started) / len(names))
    plain = seconds[0][1:]
    return Row(
        model=Path(model).name,
        quantize=kind,
        adapted="upper half" if upper else "all layers",
        batch=f"{rows} × {length}",
        sides=sides,
        one_by_one_ms=1000 * median(plain),
        ratios={
            str(way): median(one / other for one, other in zip(plain, seconds[way][1:], strict=True))
            for way in ways[1:]
        },
        largest_difference=max(float(np.abs(losses[way] - losses[0]).max()) for way in ways),
    )


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a table for the docs."""
    lines = [
        f"`{figures['command']}` on {figures['cpu']} ({figures['threads']} thread(s)), commit {figures['commit']}, "
        f"torch {figures['versions']['torch']}: the medians of {figures['turns']} turns.",
        "",
        "| base | held as | adapted | batch | views of a direction | one by one | "
        + " | ".join(f"{n} at once" for n in AT_ONCE)
        + " | losses differ by |",
        "|---|---|---|---|---:|---:|" + "---:|" * len(AT_ONCE) + "---:|",
    ]
    for row in figures["rows"]:
        ratios = " | ".join(
            f"{row['ratios'][str(n)]:.2f}×" if str(n) in row["ratios"] else "" for n in AT_ONCE
        )
        lines.append(
            f"| {row['model']} | {row['quantize']} | {row['adapted']} | {row['batch']} | {row['sides']} | "
            f"{row['one_by_one_ms']:.1f} ms | {ratios} | {row['largest_difference']:.1g} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write if asked to."""
    parser = command_line("probing", __doc__)
    add_json(parser)
    parser.add_argument("--quick", action="store_true", help="3 turns instead of 15, and the smallest batch")
    parser.add_argument("--random", action="store_true", help="also a base of 85 million random parameters")
    parser.add_argument("--model", action="append", help="directory of a further base; may be repeated")
    parser.add_argument("--quantize", choices=KINDS, default="nf4", help="how to hold further bases (nf4)")
    parser.add_argument("--threads", type=int, default=1, help="to compute with (1)")
    add_out(parser, "probing.json and probing.md")
    options = parser.parse_args(arguments)
    kernels.compile_kernels()
    kernels.set_threads(options.threads)
    turns = 3 if options.quick else 15
    with tempfile.TemporaryDirectory() as folder:
        bases: list[tuple[str, Kind]] = [(str(embedded.path()), "none")]
        if options.random:
            # Of the shape of a small Llama, and large enough to be read slowly.
            random_base.write(
                Path(folder) / "random-85M",
                hidden_size=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                intermediate_size=2048,
                tie_word_embeddings=True,
            )
            bases += [(str(Path(folder) / "random-85M"), options.quantize)]
        bases += [(model, options.quantize) for model in options.model or ()]
        rows = _rows(bases, options.quick, turns, options.threads)
    figures = {
        "rows": [asdict(row) for row in rows],
        "turns": turns,
        "threads": options.threads,
        "cpu": machine.cpu(),
        "num_cores": machine.num_cores(),
        "versions": machine.versions(("numpy", "numba", "torch", "transformers", "peft", "bitsandbytes")),
        "commit": machine.commit(),
        "command": _command(options),
    }
    table = Table("base", "adapted", "batch", "views", "one by one", *(f"{n} at once" for n in AT_ONCE))
    for row in rows:
        ratios = (f"{row.ratios[str(n)]:.2f}×" if str(n) in row.ratios else "" for n in AT_ONCE)
        held = f"{row.model}, {row.quantize}"
        table.add_row(held, row.adapted, row.batch, str(row.sides), f"{row.one_by_one_ms:.1f} ms", *ratios)
    deliver("probing", figures, markdown(figures), options, table)
    return 0


def _rows(bases: Sequence[tuple[str, Kind]], is_quick: bool, turns: int, threads: int) -> list[Row]:
    cases = [
        (model, kind, upper, shape, sides)
        for model, kind in bases
        for upper, sides in ((False, 2), (True, 2), (False, 1))
        for shape in (SHAPES[:1] if is_quick else SHAPES)
    ]
    shown = track(cases, description="measuring", console=Console(stderr=True), transient=True)
    return [measure(*case, turns, threads) for case in shown]


def _command(options: argparse.Namespace) -> str:
    """The command line without the places where somebody keeps models."""
    words = [
        "python -m benchmarks.probing",
        *(f"--model {Path(model).name}" for model in options.model or ()),
    ]
    words += [f"--{flag}" for flag in ("random", "quick") if getattr(options, flag)]
    return " ".join([*words, f"--quantize {options.quantize}", f"--threads {options.threads}"])


if __name__ == "__main__":
    sys.exit(main())
