"""How fast the mathematics is: apply, perturbed views, digest and codes, beside what they replace.

    python -m benchmarks.kernels [--json] [--quick] [--out DIR]

All cases are measured in one process, taking turns, so that whatever else the machine does falls on each alike. A
figure is the median over the turns; the best turn stands beside it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.command import add_json, add_out, command_line, deliver
from zo import codes, kernels, reference, weights
from zo.directions import Direction

MILLION = 1_000_000
KEY = (0x0123_4567, 0x89AB_CDEF)
DIRECTION = Direction(1, 2)
EPSILON = 1e-2
SAMPLE_S = 5e-3
"""Calls shorter than this are repeated within a turn until they add up to it."""


@dataclass
class Case:
    """One thing measured: what a call does, how much work that is, and the seconds per call of each turn."""

    name: str
    unit: str
    work: int
    """Units per call."""
    run: Callable[[], object]
    num_threads: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def median_per_s(self) -> float:
        """Units per second in the median turn."""
        return self.work / median(self.seconds)

    @property
    def best_per_s(self) -> float:
        """Units per second in the best turn."""
        return self.work / min(self.seconds)


def apply_case(size: int, num_directions: int, num_threads: int = 1) -> Case:
    """The Numba kernel on `size` parameters and `num_directions` directions."""
    vector, directions, coefficients = _update(size, num_directions)
    cores = "one core" if num_threads == 1 else f"{num_threads} cores"
    return Case(
        f"apply, {_count(size)} × {num_directions:,}, {cores}",
        "parameter·directions",
        size * num_directions,
        lambda: kernels.apply(vector, KEY, directions, coefficients),
        num_threads,
    )


def reference_case(size: int, num_directions: int) -> Case:
    """The same in plain NumPy."""
    vector, directions, coefficients = _update(size, num_directions)
    return Case(
        f"NumPy reference, {_count(size)} × {num_directions}",
        "parameter·directions",
        size * num_directions,
        lambda: reference.apply(vector, KEY, directions, coefficients),
    )


def torch_case(size: int, num_directions: int) -> Case | None:
    """The same the way it is usually done, in float32 and from a global generator; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    vector = torch.zeros(size)

    def run() -> None:
        for seed in range(num_directions):
            torch.manual_seed(seed)
            vector.add_(torch.normal(0.0, 1.0, (size,)), alpha=-1e-3)

    name = f"torch.manual_seed + normal + add_, {_count(size)} × {num_directions}, one core"
    return Case(name, "parameter·directions", size * num_directions, run)


def other_cases() -> dict[str, Case]:
    """Both perturbed views, digest and codes of a million parameters."""
    vector, _, _ = _update(MILLION, 0)
    views = np.empty(MILLION, np.float32), np.empty(MILLION, np.float32)
    rng = np.random.default_rng(0)
    gradients = rng.normal(scale=32, size=MILLION)
    encoded = codes.encode(gradients, 0, rng)
    return {
        "perturbed": Case(
            "both perturbed views, 1M",
            "parameters",
            MILLION,
            lambda: kernels.perturbed(vector, KEY, DIRECTION, EPSILON, out=views),
        ),
        "digest": Case("digest of 1M weights", "bytes", vector.nbytes, lambda: weights.digest(0, vector)),
        "encode": Case("codes from gradients", "codes", MILLION, lambda: codes.encode(gradients, 0, rng)),
        "decode": Case("gradients from codes", "codes", MILLION, lambda: codes.decode(encoded, 0)),
        "coefficients": Case(
            "coefficients from codes", "codes", MILLION, lambda: codes.coefficients(encoded, 2**20)
        ),
    }


def all_cases() -> dict[str, Case]:
    """Every case by a short name."""
    cores = machine.num_cores()
    found: dict[str, Case | None] = {
        "apply": apply_case(MILLION, 64),
        "torch": torch_case(MILLION, 64),
        "apply_small": apply_case(23_000, 32),
        "torch_small": torch_case(23_000, 32),
        "reference": reference_case(MILLION, 2),
        "apply_large": apply_case(MILLION, 1024),
        "apply_large_all_cores": apply_case(MILLION, 1024, cores) if cores > 1 else None,
        **other_cases(),
    }
    return {name: case for name, case in found.items() if case is not None}


def measure(cases: Sequence[Case], num_turns: int) -> None:
    """Let the cases take turns. Before the first, each warms up and its calls per turn are chosen."""
    num_calls = []
    for case in cases:
        _seconds(case, 1)
        num_calls.append(max(1, round(SAMPLE_S / _seconds(case, 1))))
    for _ in range(num_turns):
        for case, calls in zip(cases, num_calls, strict=True):
            case.seconds.append(_seconds(case, calls))


def report(cases: dict[str, Case], command: str) -> dict[str, Any]:
    """The figures under stable names, and where they were measured."""
    per_s = {name: case.median_per_s for name, case in cases.items()}

    def ratio(name: str, base: str) -> float | None:
        return per_s[name] / per_s[base] if base in per_s else None

    installed = machine.versions(["numpy", "numba", "torch"])
    return {
        "apply_param_directions_per_s": per_s["apply"],
        "apply_small_param_directions_per_s": per_s["apply_small"],
        "apply_all_cores_param_directions_per_s": per_s.get("apply_large_all_cores"),
        "torch_normal_param_directions_per_s": per_s.get("torch"),
        "ratio_to_torch_normal": ratio("apply", "torch"),
        "ratio_to_torch_normal_small": ratio("apply_small", "torch_small"),
        "ratio_to_reference": ratio("apply", "reference"),
        "perturbed_params_per_s": per_s["perturbed"],
        "digest_bytes_per_s": per_s["digest"],
        "codes_per_s": per_s["encode"],
        "decoded_codes_per_s": per_s["decode"],
        "cases": {
            name: {
                "name": case.name,
                "unit": f"{case.unit}/s",
                "median": case.median_per_s,
                "best": case.best_per_s,
                "turns": len(case.seconds),
            }
            for name, case in cases.items()
        },
        "cpu": machine.cpu(),
        "num_cores": machine.num_cores(),
        **{f"{package}_version": found for package, found in installed.items()},
        "commit": machine.commit(),
        "command": command,
    }


def markdown(figures: dict[str, Any]) -> str:
    """The report as a page for the documents."""
    rows = "\n".join(
        f"| {case['name']} | {_amount(case['median'])} | {_amount(case['best'])} | {case['unit']} |"
        for case in figures["cases"].values()
    )
    ratio = figures["ratio_to_torch_normal"]
    against_torch = (
        f"`apply` does {ratio:.0f}× the work of `torch.normal` in the same time.\n" if ratio else ""
    )
    return f"""# Kernels

Median and best of {figures["cases"]["apply"]["turns"]} turns. {against_torch}
| what | median | best | unit |
|---|---:|---:|---|
{rows}

{_where(figures)}

    {figures["command"]}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write if asked to."""
    options = _options(arguments)
    console = Console(stderr=True)
    if not kernels.is_compiled():
        console.print("compiling the kernels, once for this machine …", style="dim")
    kernels.compile_kernels()
    cases = all_cases()
    measure(list(cases.values()), num_turns=5 if options.quick else 31)
    figures = report(cases, machine.command("benchmarks.kernels"))
    deliver("kernels", figures, markdown(figures), options, _table(figures))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("kernels", __doc__)
    add_json(parser)
    parser.add_argument("--quick", action="store_true", help="5 turns instead of 31")
    add_out(parser, "kernels.json and kernels.md")
    return parser.parse_args(arguments)


def _table(figures: dict[str, Any]) -> Table:
    table = Table(caption=_where(figures), caption_justify="left")
    table.add_column("what")
    for column in ("median", "best"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    for case in figures["cases"].values():
        table.add_row(case["name"], _amount(case["median"]), _amount(case["best"]), case["unit"])
    if figures["ratio_to_torch_normal"]:
        table.add_section()
        table.add_row("apply to torch, 1M × 64", f"{figures['ratio_to_torch_normal']:.0f}", "", "×")
    return table


def _where(figures: dict[str, Any]) -> str:
    packages = ", ".join(
        f"{package} {figures[f'{package}_version'] or 'missing'}"
        for package in ("python", "numpy", "numba", "torch")
    )
    return (
        f"{figures['cpu']}, {figures['num_cores']} cores; {packages}; commit {figures['commit'] or 'unknown'}"
    )


def _update(size: int, num_directions: int) -> tuple[Any, Any, Any]:
    """Weights, names and coefficients of an update, from a fixed seed."""
    rng = np.random.default_rng(0)
    return (
        rng.integers(-(2**20), 2**20, size, dtype=np.int32),
        rng.integers(0, 2**32, (num_directions, 3), dtype=np.uint32),
        rng.integers(-1000, 1000, num_directions, dtype=np.int32),
    )


def _seconds(case: Case, num_calls: int) -> float:
    """Seconds per call, over so many calls."""
    kernels.set_threads(case.num_threads)
    begin = perf_counter()
    for _ in range(num_calls):
        case.run()
    return (perf_counter() - begin) / num_calls


def _count(size: int) -> str:
    return f"{size // MILLION}M" if size % MILLION == 0 else f"{size // 1000}k"


def _amount(value: float) -> str:
    """Three significant digits with a decimal prefix."""
    for prefix, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= unit:
            return f"{value / unit:.3g} {prefix}"
    return f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
