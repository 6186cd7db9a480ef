"""What a direction can gain at a point of training, by the law of docs/recipes.md: gradient, noise and curvature.

To first order a direction with the best step lowers the loss by |g|⁴ / (2 · tr H · (|g|² + noise/b)), in the mean over
directions of ±1. |g|² and the noise come from gradients of single batches, tr H from second differences along
directions (Hutchinson 1989).

    python -m benchmarks.law --model DIR --data FILE --rounds 125
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import command_line
from benchmarks.recipes.catalogue import fold, text_problem
from benchmarks.recipes.problem import Form, Problem, start
from benchmarks.recipes.swarm import Swarm, train
from node.data import batch
from node.gradients import Gradients
from zo.weights import to_float

EPSILON: Final = 0.003
_GRADIENT_BATCHES, _CURVATURE_DIRECTIONS, _CURVATURE_TIMES = 24, 12, 4
_SEED: Final = 77


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of training."""

    loss: float
    """Mean of the batches, nats per token."""
    gradient_square: float
    """|g|², free of the noise of the batches that it is estimated from."""
    noise: float
    """Of the gradient of one batch: the mean square of what it differs by from g."""
    curvature: float
    """tr H."""

    def gain(self, times: float = 1.0) -> float:
        """Of a direction with the best step, in nats, with batches so many times as large."""
        return self.gradient_square**2 / (2 * self.curvature * (self.gradient_square + self.noise / times))

    def step(self, times: float = 1.0) -> float:
        """The best step of a vote that is normalised by the RMS of slopes."""
        rms = (self.gradient_square + self.noise / times) ** 0.5
        return float(self.gradient_square / (rms * self.curvature))


def measured(problem: Problem, values: NDArray[np.float32]) -> Point:
    """The point at these values of the adapter, (size,)."""
    adapter, _, objective = start(problem, 1)
    gradients, size = Gradients(adapter), problem.form.batch_size
    losses, found = zip(
        *(
            gradients.gradient(values, batch(problem.pooled, size, _SEED, number))
            for number in range(_GRADIENT_BATCHES)
        ),
        strict=True,
    )
    each = np.array(found, np.float64)
    mean = each.mean(0)
    noise = float(((each - mean) ** 2).sum() / (len(each) - 1))
    large, rng = batch(problem.pooled, _CURVATURE_TIMES * size, _SEED, 0), np.random.default_rng(_SEED)

    def loss(at: NDArray[np.float32]) -> float:
        adapter.load(at)
        return objective(adapter.model, large).mean

    here, bends = loss(values), []
    for _ in range(_CURVATURE_DIRECTIONS):
        z = np.float32(EPSILON) * rng.choice(np.array([-1, 1], np.float32), values.size)
        bends.append((loss(values + z) + loss(values - z) - 2 * here) / EPSILON**2)
    return Point(
        loss=float(np.mean(losses)),
        gradient_square=float(mean @ mean) - noise / len(each),
        noise=noise,
        curvature=float(np.mean(bends)),
    )


def table(points: Sequence[tuple[str, Point]]) -> str:
    """The points in Markdown."""
    lines = [
        "| | loss | gradient² | noise of a batch | tr H | gain of a direction | in 4 times the batch | best step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {at.loss:.3f} | {at.gradient_square:.3g} | {at.noise:.3g} | {at.curvature:.4g} | "
        f"{at.gain():.2g} | {at.gain(4):.2g} | {at.step():.2g} |"
        for name, at in points
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure at the start, and after some rounds of a swarm."""
    parser = command_line("law", __doc__)
    parser.add_argument("--model", required=True, help="directory of a base")
    parser.add_argument("--data", required=True, help="text file; white space is folded")
    parser.add_argument("--rounds", type=int, default=125, help="of 8 nodes with 4 directions (125)")
    parser.add_argument("--step", type=float, default=0.03, help="of a round (0.03)")
    parser.add_argument("--batch-size", type=int, default=8, help="(8)")
    parser.add_argument("--sequence-length", type=int, default=128, help="(128)")
    options = parser.parse_args(arguments)
    form = Form(batch_size=options.batch_size, sequence_length=options.sequence_length)
    text = fold(Path(options.data).read_text("utf-8"))
    problem = text_problem(Path(options.model), text, form, nodes=8)
    points = [("start", measured(problem, start(problem, 1)[1]))]
    if options.rounds:
        how = Swarm(rounds=options.rounds, directions=4, sides=1, step=options.step, epsilon=EPSILON)
        trained = train(problem, how, 1, marks=(0.0,))
        passes = 8 * how.directions * how.rounds
        points.append((f"after {passes:,} passes", measured(problem, to_float(trained.weights))))
    print(table(points))
    return 0


if __name__ == "__main__":
    sys.exit(main())
