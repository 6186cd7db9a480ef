"""What a round costs a node beyond its forward passes: everything else it does, as a ratio.

    python -m benchmarks.round [--json] [--quick] [--peers 4] [--directions 1] [--model DIR] [--out [DIR]]

Runs the node's own session, codec, probe and kernels on the embedded model, with commits as the coordinator would send
them; only the socket is left out. "Forward passes" are the two per direction, logits and loss included.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine
from benchmarks.command import add_json, add_out, command_line, deliver
from benchmarks.recipes.problem import Form
from benchmarks.recipes.swarm import Swarm, make_manifest
from node import embedded
from node.base import load_base
from node.corpus import pydoc_topics
from node.data import pack
from node.language import LanguageTrainer
from transport.messages import PROTOCOL_VERSION, Welcome, decode_from_coordinator, encode
from transport.session import Open, Session
from zo import kernels
from zo.commit import Commit
from zo.manifest import Manifest
from zo.replica import Replica
from zo.steps import step_rule


def measure_rounds(
    trainer: LanguageTrainer, manifest: Manifest, peers: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each round in all, and of its forward passes alone.

    Args:
        trainer: of the node.
        manifest: of the run.
        peers: participants of every commit, the node itself among them.
        rounds: to measure, after two that warm up.
    """
    session = Session(
        manifest.run_id,
        bytes.fromhex(manifest.base.digest),
        bytes.fromhex(manifest.base.tokenizer_digest),
        "benchmark",
        None,
    )
    session.on_link_up()
    welcome = Welcome(PROTOCOL_VERSION, 0, manifest.encode(), 0, manifest.schedule.first_exponent, None)
    assert any(isinstance(effect, Open) for effect in session.on_message(welcome, 0.0))
    session.opened(Replica(manifest, trainer.initial_weights()), 0.0)
    rule, scale = step_rule(manifest), step_rule(manifest).start()
    rng = np.random.default_rng(0)
    totals, forwards = [], []
    for number in range(rounds + 2):
        assert session.replica is not None
        head = session.replica.head
        begin = perf_counter()
        wanted = session.next_probe()
        assert wanted is not None
        round, exponent = wanted
        probed = trainer.probe(session.replica.weights, round, 0, exponent)
        for effect in session.on_probed(round, probed.codes, probed.loss, 0.0):
            encode(effect.message)  # type: ignore[union-attr]
        own_s = perf_counter() - begin
        # The coordinator's part is not the node's: it is not timed.
        others = rng.integers(-100, 100, (peers - 1) * manifest.probe.directions, np.int8)
        codes = probed.codes.tobytes() + others.tobytes()
        step, scale = rule.advance(scale, number, np.frombuffer(codes, np.int8))
        frame = Commit(number, (step,), (scale.exponent,), tuple(range(peers)), codes, head).encode()
        begin = perf_counter()
        session.on_message(decode_from_coordinator(frame), 0.0)
        totals.append(own_s + perf_counter() - begin)
        forwards.append(probed.forward_seconds)
    return totals[2:], forwards[2:]


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The figures of all settings asked for."""
    kernels.compile_kernels()
    base = load_base(options.model, threads=1)
    form = Form(train="B")
    settings = Swarm(rounds=1000, directions=options.directions, sides=2, step=0.02, smoothing=3)
    manifest = make_manifest(base, form, settings, 1)
    windows = pack(list(pydoc_topics().values()), base.tokenizer, form.sequence_length)
    trainer = LanguageTrainer(manifest, base, windows, None, private_seed=1, threads=1)
    rows = []
    for peers in track(options.peers, description="measuring", console=console, transient=True):
        totals, forwards = measure_rounds(trainer, manifest, peers, 5 if options.quick else 40)
        ratios = [total / forward for total, forward in zip(totals, forwards, strict=True)]
        rows.append(
            {
                "peers": peers,
                "round_s": median(totals),
                "forward_s": median(forwards),
                "ratio": median(ratios),
                "ratio_max": max(ratios),
            }
        )
    return {
        "model": Path(options.model).name,
        "parameters": manifest.adapter.size,
        "directions": settings.directions,
        "batch": f"{form.batch_size} × {form.sequence_length}",
        "rows": rows,
        "cpu": machine.cpu(),
        "num_cores": machine.num_cores(),
        "versions": machine.versions(("numpy", "numba", "torch", "transformers", "peft")),
        "commit": machine.commit(),
        "command": machine.command("benchmarks.round"),
    }


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a table for the docs."""
    lines = [
        f"`{figures['command']}` on {figures['cpu']} (one thread), commit {figures['commit']}: "
        f"{figures['model']}, {figures['parameters']:,} trained parameters, {figures['directions']} direction(s) of "
        f"{figures['batch']} tokens.",
        "",
        "| nodes in the commit | round | forward passes | ratio |",
        "|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['peers']} | {row['round_s'] * 1000:.1f} ms | {row['forward_s'] * 1000:.1f} ms | {row['ratio']:.3f} |"
        for row in figures["rows"]
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write if asked to."""
    parser = command_line("round", __doc__)
    add_json(parser)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 40")
    parser.add_argument(
        "--peers", type=int, nargs="+", default=[1, 4, 16, 64], help="nodes in a commit (1 4 16 64)"
    )
    parser.add_argument("--directions", type=int, default=1, help="per node and round (1)")
    parser.add_argument(
        "--model", default=str(embedded.path()), help="directory of the base (the embedded one)"
    )
    add_out(parser, "round.json and round.md")
    options = parser.parse_args(arguments)
    figures = measure(options, Console(stderr=True))
    table = Table("nodes in the commit", "round", "forward passes", "ratio")
    for row in figures["rows"]:
        round_ms, forward_ms = f"{row['round_s'] * 1000:.1f} ms", f"{row['forward_s'] * 1000:.1f} ms"
        table.add_row(str(row["peers"]), round_ms, forward_ms, f"{row['ratio']:.3f}")
    deliver("round", figures, markdown(figures), options, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
