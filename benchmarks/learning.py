"""How well a swarm learns: N virtual nodes in one process, over the code path of real ones.

    python -m benchmarks.learning --model DIR --data FILE --seeds 1,2,3

Every round is probe, codes, step rule, commit, replica: only sockets and files are left out. The held-out
text is the last tenth of the file; each node trains on its own contiguous part of the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine
from node import base as bases
from node.adapter import Adapter
from node.data import Windows, pack
from node.losses import evaluate
from node.probe import Probe
from zo import manifest as manifests
from zo.codes import NO_VOTE
from zo.commit import Commit
from zo.directions import run_key
from zo.initial import initial_weights
from zo.layout import lora_layout
from zo.quantization import KINDS, Kind
from zo.replica import Replica
from zo.steps import step_rule

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HELD_OUT = 0.1
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


def fold(text: str) -> str:
    """The text with every run of white space replaced by one space.

    The small story models never saw a line break: kept, it would be most of what there is to learn.
    """
    return " ".join(text.split())


def split(text: str, tokenizer: object, nodes: int, sequence_length: int) -> tuple[list[Windows], Windows]:
    """Every node's own windows, and the held-out ones."""
    cut = round(len(text) * (1 - HELD_OUT))
    edges = np.linspace(0, cut, nodes + 1).astype(int)
    private = [pack([text[start:end]], tokenizer, sequence_length) for start, end in pairwise(edges)]
    return private, pack([text[cut:]], tokenizer, sequence_length)


def make_manifest(base: bases.Base, settings: Settings, seed: int) -> manifests.Manifest:
    """The manifest of one run; the seed decides the run id and with it every direction."""
    layout = lora_layout(base.linear_shapes, TARGETS, settings.rank, settings.train)
    return manifests.validate(
        manifests.Manifest(
            protocol=1,
            run=manifests.Run(
                name="learning",
                rounds=settings.rounds,
                nonce=hashlib.blake2b(str(seed).encode(), digest_size=16).hexdigest(),
            ),
            base=manifests.BaseModel(
                name=Path(base.path).name,
                digest=base.digest,
                tokenizer_digest=base.tokenizer_digest,
                quantize=settings.quantize,
            ),
            adapter=manifests.Adapter(
                targets=TARGETS,
                rank=settings.rank,
                alpha=settings.alpha,
                train=settings.train,
                size=layout.size,
                layout_digest=layout.digest().hex(),
            ),
            probe=manifests.Probing(
                epsilon=settings.epsilon,
                directions=settings.directions,
                batch_size=settings.batch_size,
                sequence_length=settings.sequence_length,
            ),
            schedule=manifests.Schedule(
                step=settings.step, decay=settings.decay, smoothing=settings.smoothing, first_exponent=-4
            ),
            parity=manifests.Parity(digest_every=16, share_loss=True),
        )
    )


def run(model: str, text: str, settings: Settings, seed: int) -> Row:
    """Train once and measure."""
    base = bases.load_base(model, threads=1, quantize=settings.quantize)
    private, held_out = split(text, base.tokenizer, settings.nodes, settings.sequence_length)
    manifest = make_manifest(base, settings, seed)
    key = run_key(manifest.run_id)
    adapter = Adapter(
        base, key=key, targets=TARGETS, rank=settings.rank, alpha=settings.alpha, train=settings.train
    )
    probes = [
        Probe(
            adapter,
            windows,
            key=key,
            epsilon=settings.epsilon,
            directions=settings.directions,
            batch_size=settings.batch_size,
            seed=seed * 1000 + node,
        )
        for node, windows in enumerate(private)
    ]
    rule = step_rule(manifest)
    scale = rule.start()
    replica = Replica(manifest, initial_weights(adapter.layout, key, settings.train))
    started = perf_counter()
    start = evaluate(adapter, replica.weights, held_out, batch_size=settings.batch_size)
    losses: list[float] = []
    ledger_bytes = no_votes = 0
    for number in range(settings.rounds):
        probed = [
            probe.probe(replica.weights, number, node, scale.exponent) for node, probe in enumerate(probes)
        ]
        codes: NDArray[np.int8] = np.concatenate([each.codes for each in probed])
        step, scale = rule.advance(scale, number, codes)
        commit = Commit(
            round=number,
            steps=(step,),
            exponents=(scale.exponent,),
            participants=tuple(range(settings.nodes)),
            codes=codes.tobytes(),
            previous=replica.head,
        )
        replica.apply(commit)
        losses.append(float(np.nanmean([each.loss for each in probed])))
        ledger_bytes += len(commit.encode())
        no_votes += int(np.count_nonzero(codes == NO_VOTE))
    end = evaluate(adapter, replica.weights, held_out, batch_size=settings.batch_size)
    sent = settings.nodes * settings.rounds * settings.directions
    return Row(
        seed=seed,
        held_out_start=round(start, 4),
        held_out_end=round(end, 4),
        curve=tuple(
            round(float(np.mean(losses[i : i + LOSS_EVERY])), 3) for i in range(0, len(losses), LOSS_EVERY)
        ),
        forwards=2 * sent,
        code_bytes=sent,
        ledger_bytes=ledger_bytes,
        no_votes=no_votes,
        digest=replica.digest().hex(),
        seconds=round(perf_counter() - started, 1),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, run once per seed, print a table or one JSON object, and write if asked to."""
    options = _options(arguments)
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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--model", required=True, help="directory of the base")
    parser.add_argument("--data", required=True, help="a UTF-8 text; its last tenth is held out")
    parser.add_argument(
        "--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3]
    )
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--directions", type=int, default=1, help="per node and round")
    parser.add_argument("--step", type=float, default=0.01, help="in units of the weights")
    parser.add_argument("--decay", choices=("linear", "constant"), default="linear")
    parser.add_argument("--smoothing", type=int, default=2)
    parser.add_argument("--train", choices=("B", "AB"), default="AB")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=8.0)
    parser.add_argument("--epsilon", type=float, default=0.01)
    parser.add_argument("--quantize", choices=KINDS, default="none", help="how to hold the base")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument(
        "--keep-line-breaks", action="store_true", help="do not fold white space into one space"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        nargs="?",
        const=Path("docs/results"),
        help="also write learning.json and learning.md to DIR (docs/results)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
