"""A node on a GPU beside the same node on this machine's processor: speed, agreement, noise, and memory.

    python -m benchmarks.cuda [--model DIR]... [--large] [--quick] [--json] [--out [DIR]]

Both measure the same directions on the same batches, by the code of a real node. What a GPU computes need not be what
a processor computes: codes differ in a few units, and what a run holds does not depend on who measured
(docs/determinism.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from benchmarks import machine, random_base, rows
from benchmarks.command import add_json, add_out, command_line
from benchmarks.recipes.problem import PROJECTIONS
from node import embedded
from node.adapter import Adapter
from node.base import load_base
from node.losses import row_losses
from node.probe import Probe
from node.rehearsal import rehearse
from transport.exits import Exit
from zo import kernels
from zo.directions import Direction
from zo.initial import initial_weights
from zo.quantization import Dtype, Kind

KEY: Final = (1, 2)
FORMS: Final[tuple[tuple[Kind, Dtype], ...]] = (
    ("none", "float32"),
    ("none", "bfloat16"),
    ("nf4", "bfloat16"),
    ("int8", "float32"),
)
EPSILON: Final = 0.003
BYTES_PROMISED: Final = 12
"""For each parameter of the adapter, beside inference and a batch's activations."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One base, and how it is held."""

    model: str
    quantize: Kind
    dtype: Dtype
    rank: int
    batch: tuple[int, int]
    """Rows and tokens."""
    directions: int
    turns: int
    """Rounds that are timed on the GPU; on the processor half as many."""
    on_cpu: bool = True
    """Whether the processor measures the same; a base of billions of parameters would take it minutes."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one base costs a node on either device."""

    model: str
    quantize: Kind
    dtype: Dtype
    parameters: int
    """Of the adapter."""
    batch: str
    cpu_ms: float | None
    """Of a two-sided direction, as the rehearsal chose to measure it there; None if it was not measured."""
    gpu_ms: float
    gpu_one_by_one_ms: float
    """The same with a forward pass for each view."""
    gpu_at_once: int
    """Directions in a forward pass, as the rehearsal chose."""
    gpu_round_over_forward: float
    """A whole round of probing, perturbing and copying included, as a multiple of its forward passes."""
    losses_differ: float | None
    """Between the devices, at most, as a share of the loss."""
    slopes_correlate: float | None
    """Those of the GPU with those of the processor."""
    repeat: float
    """Noise of the GPU's losses where nothing changed, as a share of L+ − L−."""
    memory_per_parameter: float
    """What probing takes on the GPU beyond inference on the same batch, bytes for each parameter of the adapter."""
    gpu: str
    cpu: str
    threads: int
    """Of the processor."""
    torch: str | None
    bitsandbytes: str | None
    commit: str | None
    date: str

    @property
    def subject(self) -> tuple[str, ...]:
        """What is measured: a row takes the place of an older one of the same."""
        return self.model, self.quantize, self.dtype, self.batch


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One device's part of a row."""

    ms: float
    one_by_one_ms: float
    at_once: int
    round_over_forward: float
    repeat: float
    slopes: NDArray[np.float64]
    losses: NDArray[np.float64]
    memory: float
    parameters: int


def measure(case: Case, threads: int) -> Row:
    """One row."""
    gpu = _on("cuda", case, threads)
    cpu = _on("cpu", case, threads) if case.on_cpu else None
    num_rows, length = case.batch
    versions = machine.versions(("torch", "bitsandbytes"))
    return Row(
        model=Path(case.model).name,
        quantize=case.quantize,
        dtype=case.dtype,
        parameters=gpu.parameters,
        batch=f"{num_rows} × {length}",
        cpu_ms=None if cpu is None else cpu.ms,
        gpu_ms=gpu.ms,
        gpu_one_by_one_ms=gpu.one_by_one_ms,
        gpu_at_once=gpu.at_once,
        gpu_round_over_forward=gpu.round_over_forward,
        losses_differ=None if cpu is None else float(np.abs(gpu.losses / cpu.losses - 1).max()),
        slopes_correlate=None if cpu is None else float(np.corrcoef(gpu.slopes, cpu.slopes)[0, 1]),
        repeat=gpu.repeat,
        memory_per_parameter=gpu.memory / gpu.parameters,
        gpu=torch.cuda.get_device_name(0),
        cpu=machine.cpu(),
        threads=threads,
        torch=versions["torch"],
        bitsandbytes=versions["bitsandbytes"],
        commit=machine.commit(),
        date=datetime.now(UTC).date().isoformat(),
    )


def _on(device: str, case: Case, threads: int) -> Measured:
    base = load_base(case.model, threads=threads, quantize=case.quantize, dtype=case.dtype, device=device)
    adapter = Adapter(base, key=KEY, targets=PROJECTIONS, rank=case.rank, alpha=2.0 * case.rank, train="AB")
    probe = Probe(
        adapter,
        random_base.windows(len(base.tokenizer), case.batch),
        key=KEY,
        epsilon=EPSILON,
        directions=case.directions,
        batch_size=case.batch[0],
        seed=0,
    )
    weights = initial_weights(adapter.layout, KEY, "AB")
    found = rehearse(probe, weights)
    names = [Direction(0, sample) for sample in range(case.directions)]
    slopes, losses = probe.slopes_along(weights, names)
    turns = range(case.turns if device == "cuda" else max(case.turns // 2, 1))
    probed = [probe.probe(weights, turn, 0, -4) for turn in turns]
    at_once, memory = probe.at_once, 0.0
    if device == "cuda":
        probe.at_once = 0
        inference = _peak(lambda: row_losses(adapter.model, probe.draw(names[0]))) - adapter.views.nbytes
        memory = _peak(lambda: probe.probe(weights, 0, 0, -4)) - inference
    one_by_one = [probe.probe(weights, turn, 0, -4).seconds for turn in turns] if at_once else []
    seconds = median(each.seconds for each in probed)
    return Measured(
        ms=1000 * seconds / case.directions,
        one_by_one_ms=1000 * (median(one_by_one) if one_by_one else seconds) / case.directions,
        at_once=at_once,
        round_over_forward=median(each.seconds / each.forward_seconds for each in probed),
        repeat=found.repeat / found.signal,
        slopes=slopes,
        losses=losses,
        memory=memory,
        parameters=adapter.size,
    )


def _peak(do: Any) -> int:
    """Most memory that torch has on the GPU at once, the second time that something is done."""
    do()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    do()
    return torch.cuda.max_memory_allocated()


def markdown(found: Sequence[Row]) -> str:
    """The rows as a table for the docs."""
    lines = [
        "# A node on a GPU",
        "",
        f"`python -m benchmarks.cuda`: two-sided directions, ε = {EPSILON:g}; the same directions and batches on both.",
        "",
        "| base | held as | adapter | batch | processor, a direction | GPU | one view a pass | directions a pass | "
        "round / forward passes | losses differ | slopes correlate | repeat noise / signal | memory beside inference, "
        "B a parameter |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        cells = [
            row.model,
            f"{row.quantize}, {row.dtype}",
            f"{row.parameters:,}",
            row.batch,
            "" if row.cpu_ms is None else f"{row.cpu_ms:,.1f} ms",
            f"{row.gpu_ms:.2f} ms" + ("" if row.cpu_ms is None else f", {row.cpu_ms / row.gpu_ms:.1f}×"),
            f"{row.gpu_one_by_one_ms:.2f} ms",
            str(row.gpu_at_once or "a view"),
            f"{row.gpu_round_over_forward:.3f}",
            "" if row.losses_differ is None else f"{row.losses_differ:.1g}",
            "" if row.slopes_correlate is None else f"{row.slopes_correlate:.4f}",
            f"{row.repeat:.1g}",
            f"{row.memory_per_parameter:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    where = {
        f"one {row.gpu}, and {row.cpu} with {row.threads} threads, torch {row.torch}, bitsandbytes {row.bitsandbytes}, "
        f"commit {row.commit}, {row.date}"
        for row in found
    }
    return "\n".join([*lines, "", f"Measured on {'; '.join(sorted(where))}.", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep every row as soon as it is there if asked to."""
    parser = command_line("cuda", __doc__)
    parser.add_argument("--model", action="append", help="directory of a base (embedded); may be repeated")
    parser.add_argument("--large", action="store_true", help="also a base of 1.1 billion random parameters")
    parser.add_argument("--quick", action="store_true", help="in float32 alone, 3 turns")
    add_json(parser)
    add_out(parser, "cuda.json and cuda.md")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        reason = "was installed without CUDA" if torch.version.cuda is None else "sees no GPU"
        print(
            f"benchmarks.cuda: torch {reason} here, so there is nothing to measure; run it where there is a GPU",
            file=sys.stderr,
        )
        return Exit.INPUT
    threads = machine.num_cores()
    kernels.compile_kernels()
    kernels.set_threads(threads)
    measured: list[Row] = []
    try:
        kept = [] if options.out is None else rows.read(options.out / "cuda.json", lambda row: Row(**row))
        with tempfile.TemporaryDirectory() as folder:
            cases = _cases(options, Path(folder))
            for case in track(cases, "measuring", console=Console(stderr=True), transient=True):
                row = measure(case, threads)
                measured.append(row)
                if options.out is not None:
                    kept = keep(options.out, [each for each in kept if each.subject != row.subject] + [row])
    except rows.ResultsError as error:
        print(f"benchmarks.cuda: {error}", file=sys.stderr)
        return Exit.INPUT
    print(json.dumps([asdict(row) for row in measured]) if options.json else markdown(measured))
    return 0


def keep(folder: Path, found: list[Row]) -> list[Row]:
    """Write rows and their page, and give them back."""
    rows.write(folder / "cuda.json", map(asdict, found))
    (folder / "cuda.md").write_text(markdown(found), "utf-8")
    return found


def _cases(options: argparse.Namespace, folder: Path) -> list[Case]:
    usual: dict[str, Any] = {
        "rank": 4,
        "batch": (8, 128),
        "directions": 8,
        "turns": 3 if options.quick else 9,
    }
    cases = [
        Case(model=model, quantize=kind, dtype=dtype, **usual)
        for model in options.model or [str(embedded.path())]
        for kind, dtype in (FORMS[:1] if options.quick else FORMS)
    ]
    if options.large:
        large = folder / "random-1.1B"
        # Of the shape of TinyLlama 1.1B.
        random_base.write(
            large,
            device="cuda",
            dtype="bfloat16",
            hidden_size=2048,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            intermediate_size=5632,
            vocab_size=32_000,
        )
        wide: dict[str, Any] = {"rank": 16, "batch": (8, 256), "directions": 4, "turns": 5, "on_cpu": False}
        cases += [Case(model=str(large), quantize=kind, dtype=dtype, **wide) for kind, dtype in FORMS[1:]]
    return cases


if __name__ == "__main__":
    sys.exit(main())
