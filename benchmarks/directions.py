"""Which directions, and codes of how many bits: what each learns, for the same forward passes.

Runs swarms of virtual nodes over the code path of real ones (`benchmarks.recipes.swarm`), one for each policy, width
and number of nodes, on one text. What is done is kept in the output file after each run: the same command goes on.

    python -m benchmarks.directions --quick
    python -m benchmarks.directions --model DIR --data FILE --nodes 1 4 16 --out directions.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from pydoc_data.topics import topics
from time import perf_counter
from typing import Any, Final, Literal

from benchmarks import machine
from benchmarks.recipes.catalogue import fold, text_problem
from benchmarks.recipes.problem import Form
from benchmarks.recipes.swarm import Swarm, train
from node import embedded
from transport.durable import write_atomically
from zo.manifest import Directions

_QUICK_TEXT: Final = 8_000


def _swarm(policy: Directions, bits: Literal[8, 4, 1] = 8) -> Swarm:
    return Swarm(rounds=300, directions=1, sides=2, step=0.002, full_votes=64, policy=policy, bits=bits)


VARIANTS: Final[dict[str, Swarm]] = {
    "private, 8 bits": _swarm(Directions()),
    "private, 4 bits": _swarm(Directions(), 4),
    "private, 1 bit": _swarm(Directions(), 1),
    "pool of 4096": _swarm(Directions(policy="pool")),
    "pool of 4096 by importance": _swarm(Directions(policy="pool", pool_draw="importance")),
    "shared, mean": _swarm(Directions(policy="shared")),
    "shared, median": _swarm(Directions(policy="shared", combine="median")),
    "shared, majority, 1 bit": _swarm(Directions(policy="shared", combine="majority"), 1),
    "4 groups, median": _swarm(Directions(policy="groups", groups=4, combine="median")),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run."""

    variant: str
    nodes: int
    rounds: int
    step: float
    held_out_start: float
    """Nats per token."""
    held_out_end: float
    forwards: int
    """Of all nodes together."""
    code_bytes_up: int
    """Of all nodes together, without framing."""
    ledger_bytes: int
    """All commits as encoded: what one node receives, without framing."""
    seconds: float


def measured(variant: str, nodes: int, options: argparse.Namespace) -> Row:
    """Train once.

    Shared directions make fewer votes, which are better known: their step is larger by the root of how many nodes share
    one, so that the codes' noise moves the weights as far as with private ones.
    """
    how = VARIANTS[variant]
    if how.policy.are_combined:
        how = replace(how, step=how.step * max(1.0, nodes / how.policy.groups) ** 0.5)
    how = replace(how, rounds=options.rounds)
    form = Form(batch_size=options.batch_size, sequence_length=options.sequence_length, train="B")
    problem = text_problem(Path(options.model), fold(_text(options)), form, nodes)
    began = perf_counter()
    trained = train(problem, how, options.seed, marks=(0.0, 1.0))
    start, end = trained.course.points
    return Row(
        variant=variant,
        nodes=nodes,
        rounds=how.rounds,
        step=how.step,
        held_out_start=round(start.metric, 4),
        held_out_end=round(end.metric, 4),
        forwards=end.forwards,
        code_bytes_up=end.up_bytes,
        ledger_bytes=trained.ledger_bytes,
        seconds=round(perf_counter() - began, 1),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| directions and codes | nodes | step | held-out loss | forward passes | codes up, all | commits down, each |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.variant} | {row.nodes} | {row.step:.4g} | {row.held_out_start:.3f} → {row.held_out_end:.3f} | "
        f"{row.forwards:,} | {row.code_bytes_up:,} | {row.ledger_bytes:,} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not in the output file yet, and print the table."""
    options = _options(arguments)
    rows: list[Row] = []
    if options.out is not None and options.out.exists():
        kept = json.loads(options.out.read_text("utf-8"))
        if kept["settings"] != _settings(options):
            print(f"{options.out} is of other settings: choose another file", file=sys.stderr)
            return 3
        rows = [Row(**each) for each in kept["rows"]]
    done = {(row.variant, row.nodes) for row in rows}
    wanted = [(variant, nodes) for nodes in options.nodes for variant in VARIANTS]
    for number, (variant, nodes) in enumerate(wanted):
        if (variant, nodes) in done:
            continue
        print(f"{number + 1} of {len(wanted)}: {variant}, {nodes} nodes", file=sys.stderr, flush=True)
        rows.append(measured(variant, nodes, options))
        if options.out is not None:
            write_atomically(options.out, json.dumps(_figures(options, rows), indent=1).encode())
    print(table(rows))
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("rounds", "batch_size", "sequence_length", "seed", "data", "quick")
    return {name: getattr(options, name) for name in names} | {"base": Path(options.model).name}


def _figures(options: argparse.Namespace, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "benchmark": "directions",
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": machine.cpu(),
        "commit": machine.commit(),
        "settings": _settings(options),
        "rows": [asdict(row) for row in rows],
    }


def _text(options: argparse.Namespace) -> str:
    if options.data is not None:
        return Path(options.data).read_text("utf-8")
    text = "".join(topics[name] for name in sorted(topics))
    return text[:_QUICK_TEXT] if options.quick else text


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.directions", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--model", default=str(embedded.path()), help="directory of a base (the embedded one)"
    )
    parser.add_argument("--data", help="text file (the language reference that help() shows)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="(1 4 16)")
    parser.add_argument("--rounds", type=int, default=300, help="(300)")
    parser.add_argument("--batch-size", type=int, default=8, help="(8)")
    parser.add_argument("--sequence-length", type=int, default=128, help="(128)")
    parser.add_argument("--seed", type=int, default=1, help="(1)")
    parser.add_argument(
        "--quick", action="store_true", help="a few short rounds of 4 nodes: whether it works"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to keep, and to go on from")
    options = parser.parse_args(arguments)
    if options.quick:
        options.nodes, options.rounds, options.batch_size, options.sequence_length = [4], 6, 2, 32
    return options


if __name__ == "__main__":
    sys.exit(main())
