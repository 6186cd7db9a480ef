"""What brief commits and squeezed frames save on the way down, for the table of docs/bandwidth.md.

    python -m benchmarks.squeezing [RUN ...] [--json] [--out [DIR]]

Without a run: chains of 128 commits whose codes are Gaussian with the RMS of 32 that the step rule keeps them at, for
some numbers of nodes and directions and every width. With runs: the ledgers of their agents 0, as they are. "Live" is
the mean payload of a commit, whole and as a node is sent it that has the one before; "history" the mean payload of an
entry for a node that catches up. All of it is computed, by the code that a coordinator sends with.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import machine
from benchmarks.command import add_json, add_out, command_line, deliver
from coordinator.conductor import history_slice
from coordinator.membership import FLOW_WINDOW
from coordinator.rundir import RunDirectory
from transport.brevity import Abbreviator
from transport.messages import History, encode
from transport.squeezing import squeezed
from zo.codes import LEVELS_BY_BITS, UNIT_BY_BITS
from zo.commit import Commit, chain_digest, decode_entry
from zo.packing import pack

SHAPES: Final = ((4, 1), (4, 8), (16, 1), (16, 8), (64, 8), (16, 256))
ROUNDS: Final = 128
FIRST_ROUND: Final = 1_000


def gaussian_chain(num_nodes: int, num_directions: int, bits: int) -> list[bytes]:
    """Encoded commits of a width, with codes as rounding makes them of Gaussian slopes."""
    rng = np.random.default_rng(bits)
    unit, limit = UNIT_BY_BITS[bits], LEVELS_BY_BITS[bits]
    frames: list[bytes] = []
    head = bytes(16)
    for round in range(FIRST_ROUND, FIRST_ROUND + ROUNDS):
        slopes = rng.standard_normal(num_nodes * num_directions) * 32
        levels = np.clip(np.rint(slopes / unit), -limit, limit) if bits > 1 else np.where(slopes < 0, -1, 1)
        codes = pack((levels * unit).astype(np.int8), bits)
        step = int(rng.integers(1_800_000, 2_200_000))
        frames.append(Commit(round, (step,), (-4,), tuple(range(num_nodes)), codes, head).encode())
        head = chain_digest(frames[-1])
    return frames


def measured(frames: Sequence[bytes]) -> dict[str, float]:
    """Mean payload of an entry, in bytes: whole, and as it travels live and in histories."""
    abbreviator = Abbreviator()
    live = [
        squeezed(abbreviator.shortened(b"", frame))
        for frame in frames
        if isinstance(decode_entry(frame), Commit)
    ]
    history, done = 0, 0
    while done < len(frames):
        part = history_slice(frames[done : done + FLOW_WINDOW])
        history += len(squeezed(encode(History(tuple(part)))))
        done += len(part)
    count = len(frames)
    return {
        "entries": count,
        "whole": sum(map(len, frames)) / count,
        "live": sum(map(len, live)) / len(live),
        "history": history / count,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    lines = ["| commits | whole | live | saved | in a history | saved |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        cells = [f"{row['whole']:,.1f}"]
        for kind in ("live", "history"):
            cells += [f"{row[kind]:,.1f}", f"{1 - row[kind] / row['whole']:.0%}"]
        lines.append(f"| {row['what']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = command_line("squeezing", __doc__)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="directory of a run")
    add_json(parser)
    add_out(parser, "squeezing.json and squeezing.md")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for path in options.runs:
        directory = RunDirectory(path)
        with directory.ledger(directory.manifest(), read_only=True) as ledger:
            frames = list(ledger.frames())
        if not frames:
            parser.error(f"{path} has no rounds yet")
        rows.append({"what": path.name, **measured(frames)})
    if not options.runs:
        rows = [
            {
                "what": f"{nodes} × {directions}, {bits} bit",
                **measured(gaussian_chain(nodes, directions, bits)),
            }
            for nodes, directions in SHAPES
            for bits in sorted(UNIT_BY_BITS, reverse=True)
        ]
    figures = {"rows": rows, "commit": machine.commit(), "command": machine.command("benchmarks.squeezing")}
    page = markdown(rows)
    deliver("squeezing", figures, page, options, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
