"""One problem for every system of a comparison: the same base, adapter, data of each node, and held-out text.

It is prepared once, as files in a directory, so that processes of any environment begin with the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from benchmarks.recipes import assets
from benchmarks.recipes.baselines import trained_parameters
from benchmarks.recipes.catalogue import HELD_OUT, fold, text_problem
from benchmarks.recipes.problem import Form, HeldOut, Problem, start
from node.data import Windows
from zo.manifest import Task

SEED: Final = 1
FLOAT_BYTES: Final = 4


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What all systems train on, in a directory."""

    place: Path
    model: str
    nodes: int
    target: float
    """Held-out loss to reach, in nats per token."""
    form: Form

    def text_path(self, node: int) -> Path:
        """A node's own text."""
        return self.place / f"node-{node}.txt"

    @property
    def start_path(self) -> Path:
        """The adapter's first values, float32, as .npy."""
        return self.place / "start.npy"

    def problem(self, nodes: Sequence[int] | None = None) -> Problem:
        """The problem with the data of these nodes; of all, if None."""
        wanted = range(self.nodes) if nodes is None else nodes
        private = [_windows(self.place / f"node-{node}.npy") for node in wanted]
        return Problem(
            model=self.model,
            form=self.form,
            task=Task(),
            private=private,
            pooled=private[0],
            held_out=[_windows(self.place / "held-out.npy")],
        )

    def save(self) -> None:
        """Write what `load` reads."""
        plain = {**asdict(self), "place": None, "form": asdict(self.form)}
        (self.place / "contest.json").write_text(json.dumps(plain))


def load(place: Path) -> Contest:
    """The contest in a directory."""
    plain: dict[str, Any] = json.loads((place / "contest.json").read_text())
    form = plain["form"]
    return Contest(**{**plain, "place": place, "form": Form(**{**form, "targets": tuple(form["targets"])})})


def prepare(recipe: int, place: Path, *, quick: bool, rank: int) -> Contest:
    """Write a recipe's problem into a directory.

    Args:
        recipe: its number; 1 is known.
        place: an existing directory.
        quick: two nodes and a small part of the text, with a target that is soon reached.
        rank: of the adapter.

    Raises:
        AssetMissing: the model or the text is not there.
        ValueError: another recipe.
    """
    if recipe != 1:
        raise ValueError(
            f"recipe must be 1, the only one that other systems are measured on yet; got {recipe}"
        )
    model = assets.model("stories260K")
    text = fold(assets.data("tinyshakespeare", "input.txt").read_text("utf-8"))
    if quick:
        text = text[: len(text) // 16]
    nodes = 2 if quick else 8
    form = Form(rank=rank, alpha=2.0 * rank)
    problem = text_problem(model, text, form, nodes)
    contest = Contest(place=place, model=str(model), nodes=nodes, target=4.65 if quick else 3.75, form=form)
    edges = np.linspace(0, round(len(text) * (1 - HELD_OUT)), nodes + 1).astype(int)
    for node in range(nodes):
        contest.text_path(node).write_text(text[edges[node] : edges[node + 1]], "utf-8")
    for name, rows in [
        *((f"node-{i}", each) for i, each in enumerate(problem.private)),
        ("held-out", problem.held_out[0]),
    ]:
        assert isinstance(rows, Windows)
        np.save(place / f"{name}.npy", rows.tokens)
    _, values, _ = start(problem, SEED)
    np.save(contest.start_path, values)
    contest.save()
    return contest


class Evaluator:
    """Measures values of the adapter on what is held out."""

    def __init__(self, contest: Contest) -> None:
        problem = contest.problem([0])
        self._adapter, self.start, _ = start(problem, SEED)
        self._held_out = HeldOut(problem, self._adapter)

    def __call__(self, values: NDArray[np.float32]) -> float:
        """Held-out loss at these values, (size,) float32, in nats per token."""
        self._adapter.load(values)
        return self._held_out()


class Learner:
    """A node of a first-order system: its own data, gradients of the same adapter, by backpropagation."""

    def __init__(self, contest: Contest, node: int) -> None:
        torch.set_num_threads(1)
        problem = contest.problem([node])
        self._adapter, _, _ = start(problem, SEED)
        self._parameters = trained_parameters(self._adapter)
        self._tokens = problem.private[0].take(np.arange(problem.private[0].num_windows))
        self._batch_size = contest.form.batch_size
        self._rng = np.random.default_rng((SEED, node))

    @property
    def values(self) -> NDArray[np.float32]:
        """The adapter's values of this moment, (size,) float32, a copy."""
        parts = [each.detach().reshape(-1) for each in self._parameters]
        return torch.cat(parts).numpy().astype(np.float32, copy=True)

    def gradient(self) -> NDArray[np.float32]:
        """Of one private batch at the present values, (size,) float32."""
        self._backward()
        return torch.cat([_gradient(each).reshape(-1) for each in self._parameters]).numpy().copy()

    def load(self, values: NDArray[np.float32]) -> None:
        """Go to these values."""
        self._adapter.load(np.ascontiguousarray(values, np.float32))

    def walk(self, steps: int, optimizer: torch.optim.Optimizer) -> None:
        """So many local steps, each on a private batch of its own."""
        for _ in range(steps):
            self._backward()
            optimizer.step()

    def adam(self, rate: float, decay: float = 0.0) -> torch.optim.Optimizer:
        """An optimiser of the adapter: Adam, or with decay AdamW."""
        if decay:
            return torch.optim.AdamW(self._parameters, rate, weight_decay=decay)
        return torch.optim.Adam(self._parameters, rate)

    def _backward(self) -> None:
        for each in self._parameters:
            each.grad = None
        rows = self._tokens if isinstance(self._tokens, np.ndarray) else self._tokens[0]
        drawn = torch.from_numpy(
            rows[self._rng.choice(len(rows), self._batch_size, replace=False)].astype(np.int64)
        )
        logits = self._adapter.model(input_ids=drawn[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), drawn[:, 1:].flatten())
        torch.autograd.backward(loss)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _windows(path: Path) -> Windows:
    tokens = np.load(path)
    return Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0)
