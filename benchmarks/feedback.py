"""Whether error feedback helps: what rounding took from a scalar, added to a later one, on a quadratic.

    python -m benchmarks.feedback [--quick] [--json] [--out [DIR]]

The loss is ½ Σ λ_j w_j², λ_j = j^−0.7, with 1,024 weights, 8 nodes of 4 directions and noisy slopes; codes and steps
are those of zo. "next" adds what was lost to the slope of the node's next round, along another direction; "index"
keeps it for each direction of a pool until the node meets that one again. The figure is the loss after 400 rounds, as
a share of the first, at the best of three steps, in the mean of three seeds.
"""

import sys
from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine
from benchmarks.command import add_json, add_out, command_line, deliver
from zo.codes import UNIT_BY_BITS, coefficients, decode, encode
from zo.steps import StepRule

Feedback = Literal["none", "next", "index"]

NODES: Final = 8
DIRECTIONS: Final = 4
SIZE: Final = 1024
NOISE: Final = 0.3
STEPS: Final = (0.0012, 0.0024, 0.0048)
SEEDS: Final = 3
_CURVATURE: Final = 1 / np.arange(1, SIZE + 1) ** 0.7
_POOL_SEED: Final = 99


def share_left(feedback: Feedback, pool: int, bits: int, step: float, rounds: int, seed: int) -> float:
    """The loss in the end as a share of that in the beginning.

    Args:
        feedback: what becomes of what rounding takes.
        pool: how many directions there are to draw from; 0 for new ones in every round.
        bits: of a code.
        step: of the schedule, which falls on a line.
        rounds: how many.
        seed: of directions, noise and rounding.
    """
    rng = np.random.default_rng(seed)
    directions = _signs(np.random.default_rng(_POOL_SEED), pool) if pool else None
    weights = np.full(SIZE, 0.3)
    first = _loss(weights)
    rule = StepRule(
        rounds=rounds,
        step=round(step * 2**28),
        decay="linear",
        smoothing=2,
        first_exponent=-4,
        full_votes=NODES * DIRECTIONS,
    )
    scale = rule.start()
    lost = np.zeros((NODES, pool if feedback == "index" else DIRECTIONS))
    for number in range(rounds):
        codes, along = [], []
        for node in range(NODES):
            if directions is None:
                drawn = _signs(rng, DIRECTIONS)
                places = np.arange(DIRECTIONS)
            else:
                indices = rng.integers(0, pool, DIRECTIONS)
                drawn = directions[indices]
                places = indices if feedback == "index" else np.arange(DIRECTIONS)
            slopes = drawn @ (_CURVATURE * weights) + NOISE * rng.standard_normal(DIRECTIONS)
            if feedback != "none":
                slopes += lost[node, places]
            found = encode(slopes, scale.exponent, rng, bits)
            lost[node, places] = slopes - decode(found, scale.exponent)
            codes.append(found)
            along.append(drawn)
        together = np.concatenate(codes)
        factor, scale = rule.advance(scale, number, together)
        weights = weights - (coefficients(together, factor) * 2.0**-28) @ np.concatenate(along)
    return _loss(weights) / first


def best(feedback: Feedback, pool: int, bits: int, rounds: int) -> float:
    """The share that is left at the best step."""
    return min(
        float(np.mean([share_left(feedback, pool, bits, step, rounds, seed) for seed in range(SEEDS)]))
        for step in STEPS
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = command_line("feedback", __doc__)
    parser.add_argument("--quick", action="store_true", help="20 rounds: to see that it runs")
    add_json(parser)
    add_out(parser, "feedback.json and feedback.md")
    options = parser.parse_args(arguments)
    rounds = 20 if options.quick else 400
    rows: list[dict[str, Any]] = []
    for pool in (0, 1024, 4096):
        kinds: tuple[Feedback, ...] = ("none", "next", "index") if pool else ("none", "next")
        rows += [
            {"pool": pool, "bits": bits, **{kind: best(kind, pool, bits, rounds) for kind in kinds}}
            for bits in sorted(UNIT_BY_BITS, reverse=True)
        ]
    figures = {"rows": rows, "commit": machine.commit(), "command": machine.command("benchmarks.feedback")}
    page = markdown(rows)
    deliver("feedback", figures, page, options, page)
    return 0


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    lines = ["| directions | bits | none | next | index |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        where = f"pool of {row['pool']:,}" if row["pool"] else "new in every round"
        cells = [f"{row[kind]:.3f}" if kind in row else "" for kind in ("none", "next", "index")]
        lines.append(f"| {where} | {row['bits']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _signs(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    return rng.integers(0, 2, (count, SIZE)) * 2 - 1


def _loss(weights: NDArray[np.float64]) -> float:
    return float(0.5 * (_CURVATURE * weights * weights).sum())


if __name__ == "__main__":
    sys.exit(main())
