"""What the demo's processes left behind, measured: losses, digests, bytes, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from node import embedded
from node.base import load_base
from node.data import Windows, read_windows
from node.language import adapt
from node.losses import mean_loss_over
from node.state import load_result

_BATCH = 16
_RUN = "#1f6f8b"


@dataclass(frozen=True, kw_only=True)
class NodeBytes:
    """What one node sent and received, in bytes; None where a killed node left no count."""

    name: str
    payload_up: int
    payload_down: int
    zmtp_up: int
    zmtp_down: int
    wire_up: int | None
    wire_down: int | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that the demo shows at its end."""

    rounds: int
    training_s: float
    loss_before: float
    """Held-out loss of the base, nats per token."""
    loss_after: float
    """Held-out loss with the trained adapter, exported and loaded again with plain PEFT."""
    digest: str
    num_equal: int
    num_alive: int
    nodes: tuple[NodeBytes, ...]
    adapter_bytes: int
    """The adapter in float32: what one exchange of it would cost, once up or once down."""
    curve: tuple[tuple[int, int, float], ...]
    """(round, bytes on the socket of one node so far, held-out loss on a part of the held-out text), from round 0."""
    changes: tuple[tuple[str, str, int], ...]
    """(name of a node, what happened to it, round)."""

    @property
    def passed(self) -> bool:
        """Whether the loss fell and everyone who was alive at the end has the coordinator's weights."""
        return self.loss_after < self.loss_before and self.num_equal == self.num_alive == 4


def measure(
    output: Path,
    names: tuple[str, ...],
    killed: str,
    changes: Sequence[tuple[str, str, int]],
    training_s: float,
) -> Outcome:
    """Read the states, export the adapter, load it again with plain PEFT and measure the held-out losses.

    Args:
        output: the demo's directory.
        names: of all nodes.
        killed: the one that did not live to the end.
        changes: (name, what happened, round) of the nodes that did not take part from first to last.
        training_s: from the first round to the last.
    """
    from peft import PeftModel

    manifest, replica = load_result(output / "run")
    digests = [load_result(output / "nodes" / name)[1] for name in names if name != killed]
    num_equal = sum(each.round == replica.round and each.digest() == replica.digest() for each in digests)

    path = str(embedded.path())
    base = load_base(path, threads=None)
    held_out, quick = (
        read_windows([output / "data" / name], base.tokenizer, manifest.probe.sequence_length)
        for name in ("held-out.txt", "held-out-quick.txt")
    )
    before, quick_before = _loss(base.model, held_out), _loss(base.model, quick)
    adapt(base, manifest).export(output / "adapter", replica.weights, path)
    after = _loss(PeftModel.from_pretrained(load_base(path).model, str(output / "adapter")).eval(), held_out)

    logs = {name: _log(output / "nodes" / name / "log.jsonl") for name in names}
    outcome = Outcome(
        rounds=replica.round,
        training_s=training_s,
        loss_before=before,
        loss_after=after,
        digest=replica.digest().hex(),
        num_equal=num_equal,
        num_alive=len(digests),
        nodes=tuple(_bytes(name, logs[name]) for name in names),
        adapter_bytes=4 * manifest.adapter.size,
        curve=(
            (0, 0, quick_before),
            *(
                (record["round"], record["zmtp_up"] + record["zmtp_down"], record["held_out"])
                for record in logs[names[0]]
                if record.get("round", 0) > 0 and "held_out" in record
            ),
        ),
        changes=tuple(changes),
    )
    (output / "demo.json").write_text(
        json.dumps({**asdict(outcome), "passed": outcome.passed}, indent=1) + "\n"
    )
    return outcome


def _loss(model: Any, windows: Windows) -> float:
    return mean_loss_over(model, windows, batch_size=_BATCH)


def _log(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text("utf-8").splitlines()
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # the last line of a process that was killed
            continue
    return records


def _bytes(name: str, log: list[dict[str, Any]]) -> NodeBytes:
    last = next(record for record in reversed(log) if "payload_up" in record)
    return NodeBytes(
        name=name,
        payload_up=last["payload_up"],
        payload_down=last["payload_down"],
        zmtp_up=last["zmtp_up"],
        zmtp_down=last["zmtp_down"],
        wire_up=last.get("wire_up"),
        wire_down=last.get("wire_down"),
    )


def plot(outcome: Outcome, path: Path) -> None:
    """Held-out loss against the bytes that one node sent and received, next to what first-order would cost."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rounds, counts, losses = zip(*outcome.curve, strict=True)
    kilobytes = [count / 1000 for count in counts]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axhline(losses[0], color="#888888", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "the base, before training",
        (1, losses[0]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color="#666666",
    )
    axes.plot(kilobytes, losses, "o-", color=_RUN, linewidth=2, markersize=5)
    for name, event, round in outcome.changes:
        at = _between(round, rounds, kilobytes)
        axes.axvline(at, color="#bbbbbb", linewidth=1, linestyle=":")
        axes.annotate(
            f"{name}\n{event}",
            (at, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=9,
            color="#666666",
        )
    exchange = 2 * outcome.adapter_bytes / 1000
    axes.set_xlabel("kB that one node sent and received in all, encrypted")
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_title(
        f"{outcome.rounds} rounds in {kilobytes[-1]:.0f} kB; "
        f"one exchange of the adapter in float32 takes {exchange:.0f} kB",
        loc="left",
        fontsize=11,
    )
    axes.set_xlim(0, kilobytes[-1] * 1.03)
    axes.margins(y=0.12)
    figure.savefig(path, dpi=150)


def _between(round: int, rounds: Sequence[int], kilobytes: Sequence[float]) -> float:
    """Where on the axis of bytes a round lies, between the two rounds that were measured before and after it."""
    import numpy as np

    return float(np.interp(round, rounds, kilobytes))


def show(outcome: Outcome, events: list[str], output: Path, console: Console) -> None:
    """Print the outcome; no line is wider than 80 characters but one that ends in a long path."""
    for event in events:
        console.print(event, style="yellow", highlight=False)
    table = Table(
        title="bytes of each node", box=None, header_style="bold", title_justify="left", pad_edge=False
    )
    for title in ("node", "payload up", "down", "ZMTP up", "down", "wire up", "down"):
        table.add_column(title, justify="left" if title == "node" else "right")
    for each in outcome.nodes:
        counts = (
            each.payload_up,
            each.payload_down,
            each.zmtp_up,
            each.zmtp_down,
            each.wire_up,
            each.wire_down,
        )
        table.add_row(each.name, *("killed" if count is None else f"{count:,}" for count in counts))
    console.print(table)
    console.print(
        "ZMTP: with encryption; wire: what the kernel counted, plus headers, estimated\n"
        f"this adapter in float32: {outcome.adapter_bytes:,} up and as much down, for one exchange",
        style="dim",
        highlight=False,
    )
    fell = "fell" if outcome.loss_after < outcome.loss_before else "DID NOT FALL"
    console.print(
        f"\nheld-out loss {fell}: {outcome.loss_before:.4f} before, {outcome.loss_after:.4f} after "
        f"{outcome.rounds} rounds in {outcome.training_s:.0f} s\n"
        "(measured with the adapter as exported, loaded again by plain PEFT)",
        highlight=False,
    )
    style = "bold green" if outcome.passed else "bold red"
    parity = f"parity: {outcome.num_equal}/{outcome.num_alive} equal, digest {outcome.digest}"
    console.print(parity, style=style, highlight=False)
    console.print(
        f"adapter, ledger, logs and loss-against-bytes.png are in {output}", highlight=False, soft_wrap=True
    )
