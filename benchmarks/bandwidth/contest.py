"""One problem for every system of a comparison: the same base, adapter, data of each node, and held-out rows.

It is prepared once, as files in a directory, so that processes of any environment begin with the same. The files are
such as `zo-node join --data` takes, and everybody reads them as a node does.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.bandwidth.systems import NODES
from benchmarks.recipes import assets
from benchmarks.recipes.baselines import trained_parameters
from benchmarks.recipes.catalogue import BABYLLAMA, HELD_OUT, shakespeare_text
from benchmarks.recipes.problem import Form, HeldOut, Problem, start
from node import base as bases
from node.completions import read_completions
from node.data import Sequences, batch, read_windows
from node.frozen import Answers, frozen_backbone, once_per_batch
from node.labelled import read_labelled
from node.losses import loss_with_graph, row_losses, row_misses
from zo.manifest import Task

SEED: Final = 1
FLOAT_BYTES: Final = 4
_TEXT: Final = Task()
_ROWS_OF_A_NODE: Final = 216
"""In recipe 3: a batch is all of them, so that the encoder reads them once. Every process of every run reads its own
anew, so there are a quarter of what there could be."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What all systems train on, in a directory."""

    place: Path
    model: str
    nodes: int
    target: float
    """Held-out metric to reach."""
    metric: Literal["loss", "error"] = "loss"
    """Nats per token, or the share of labels that are wrong."""
    form: Form
    task: Task = _TEXT
    suffix: str = ".txt"
    """Of data files."""
    columns: tuple[tuple[str, str], ...] = ()
    """What fields are called in them, as `--column` has it."""
    held_out: int = 1
    """Parts that count alike."""
    whole: bool = False
    """A batch is all rows that somebody has."""
    at_once: int = 0
    """Directions whose views share a forward pass: what a node finds fastest when it tries, told to save the trial."""

    def data_path(self, node: int) -> Path:
        """A node's own data."""
        return self.place / f"node-{node}{self.suffix}"

    def held_out_path(self, part: int) -> Path:
        """What is held out."""
        return self.place / f"held-out-{part}{self.suffix}"

    @property
    def start_path(self) -> Path:
        """The adapter's first values, float32, as .npy."""
        return self.place / "start.npy"

    @property
    def sizes_path(self) -> Path:
        """How many of them each tensor of the adapter has, in order, as .npy."""
        return self.place / "sizes.npy"

    def problem(self, nodes: Sequence[int] = (), *, held_out: bool = False) -> Problem:
        """The problem with the data of these nodes, and with what is held out if that is wanted."""
        base = bases.load_base(self.model, threads=1, labels=self.task.head_labels)
        private = [self._rows([self.data_path(node)], base) for node in nodes or range(1)]
        parts = range(self.held_out if held_out else 0)
        return Problem(
            model=self.model,
            form=self.form,
            task=self.task,
            private=private,
            pooled=private[0],
            held_out=[self._rows([self.held_out_path(part)], base) for part in parts],
            metric=row_misses if self.metric == "error" else row_losses,
        )

    def save(self) -> None:
        """Write what `load` reads."""
        plain = {**asdict(self), "place": None, "task": msgspec.to_builtins(self.task)}
        (self.place / "contest.json").write_text(json.dumps(plain))

    def _rows(self, paths: Sequence[Path], base: bases.Base) -> Sequences:
        length, columns = self.form.sequence_length, dict(self.columns)
        if self.task.kind == "completion":
            return read_completions(paths, base.tokenizer, length, columns)
        if self.task.kind == "head":
            return read_labelled(paths, base.tokenizer, length, self.task, base.padding, columns)
        return read_windows(paths, base.tokenizer, length, columns)


def load(place: Path) -> Contest:
    """The contest in a directory."""
    plain: dict[str, Any] = json.loads((place / "contest.json").read_text())
    form = plain["form"]
    return Contest(
        **{
            **plain,
            "place": place,
            "form": Form(**{**form, "targets": tuple(form["targets"])}),
            "task": msgspec.convert(plain["task"], Task),
            "columns": tuple((field, name) for field, name in plain["columns"]),
        }
    )


def prepare(recipe: int, place: Path, *, quick: bool, rank: int) -> Contest:
    """Write a recipe's problem into a directory.

    Args:
        recipe: 1, 2 or 3.
        place: an existing directory.
        quick: two nodes and a small part of the data, with a target that is soon reached.
        rank: of the adapter; a head alone has none.

    Raises:
        AssetMissing: the model or the data are not there.
    """
    write = {1: _text, 2: _completions, 3: _labels}[recipe]
    contest = write(place, quick, rank)
    adapter, values, _ = start(contest.problem(), SEED)
    np.save(contest.start_path, values)
    np.save(contest.sizes_path, [each.size for each in adapter.layout.parameters])
    contest.save()
    return contest


def _text(place: Path, quick: bool, rank: int) -> Contest:
    """Recipe 1: a text in as many pieces as there are nodes, its last tenth held out."""
    text = shakespeare_text(16 if quick else 1)
    contest = Contest(
        place=place,
        model=str(assets.model("stories260K")),
        nodes=2 if quick else NODES[1],
        target=4.65 if quick else 3.75,
        form=Form(rank=rank, alpha=2.0 * rank),
    )
    cut = round(len(text) * (1 - HELD_OUT))
    edges = np.linspace(0, cut, contest.nodes + 1).astype(int)
    for node, (begin, end) in enumerate(pairwise(edges)):
        contest.data_path(node).write_text(text[begin:end], "utf-8")
    contest.held_out_path(0).write_text(text[cut:], "utf-8")
    return contest


def _completions(place: Path, quick: bool, rank: int) -> Contest:
    """Recipe 2: a client's task for every node, each with rows of its own held out."""
    folder = assets.data("natural-instructions")
    nodes = 2 if quick else NODES[2]
    contest = Contest(
        place=place,
        model=str(assets.model(BABYLLAMA)),
        nodes=nodes,
        target=7.3 if quick else 5.5,
        form=Form(rank=rank, alpha=2.0 * rank, batch_size=4, sequence_length=256),
        task=Task(kind="completion"),
        suffix=".jsonl",
        held_out=nodes,
        at_once=2,
    )
    for node in range(nodes):
        for name, path in (("train", contest.data_path(node)), ("test", contest.held_out_path(node))):
            rows = (folder / f"client{node:02}.{name}.jsonl").read_text("utf-8").splitlines()
            path.write_text("\n".join(rows[:32] if quick else rows) + "\n", "utf-8")
    return contest


def _labels(place: Path, quick: bool, rank: int) -> Contest:
    """Recipe 3: films praised or not, a head on a frozen encoder; a node's batch is all of its rows."""
    nodes, num_rows = (2, 32) if quick else (NODES[3], _ROWS_OF_A_NODE)
    contest = Contest(
        place=place,
        model=str(assets.encoder()),
        nodes=nodes,
        target=0.49 if quick else 0.33,
        metric="error",
        whole=True,
        form=Form(targets=(), rank=rank, alpha=2.0 * rank, batch_size=num_rows, sequence_length=64),
        task=Task(kind="head", labels=("0", "1")),
        suffix=".tsv",
        columns=(("text", "1"), ("label", "2")),
    )

    def lines(name: str) -> list[str]:
        return assets.data("sst2", f"{name}.tsv").read_text("utf-8").splitlines()

    def write(path: Path, rows: Sequence[str]) -> None:
        path.write_text("\n".join(rows) + "\n", "utf-8")

    train, held_out = lines("train"), lines("dev") + lines("test")
    for node in range(nodes):
        write(contest.data_path(node), train[node :: NODES[3]][:num_rows])
    write(contest.held_out_path(0), held_out[::8] if quick else held_out)
    return contest


class Evaluator:
    """Measures values of the adapter on what is held out."""

    def __init__(self, contest: Contest) -> None:
        problem = contest.problem(held_out=True)
        self._adapter, self.start, _ = start(problem, SEED)
        self._held_out = HeldOut(problem, self._adapter)
        self._at_start: float | None = None

    def __call__(self, values: NDArray[np.float32]) -> float:
        """The held-out metric at these values, (size,) float32."""
        self._adapter.load(values)
        return self._held_out()

    @property
    def at_start(self) -> float:
        """The metric before anybody has trained: the same for all."""
        if self._at_start is None:
            self._at_start = self(self.start)
        return self._at_start


class Learner:
    """A node of a first-order system: its own data, gradients of the same adapter, by backpropagation."""

    def __init__(self, contest: Contest, node: int) -> None:
        torch.set_num_threads(1)
        problem = contest.problem([node])
        self._adapter, _, _ = start(problem, SEED)
        self._backbone = frozen_backbone(self._adapter)
        self._parameters = trained_parameters(self._adapter)
        self._rows = problem.private[0]
        self._batch_size = contest.form.batch_size
        self._seed, self._drawn = SEED * 1000 + node, 0
        self._known: Answers = deque(maxlen=1)

    @property
    def values(self) -> NDArray[np.float32]:
        """The adapter's values of this moment, (size,) float32, a copy."""
        parts = [each.detach().reshape(-1) for each in self._parameters]
        return torch.cat(parts).numpy().astype(np.float32, copy=True)

    def gradient(self) -> NDArray[np.float32]:
        """Of one private batch at the present values, (size,) float32."""
        with self._once():
            self._backward()
        return torch.cat([_gradient(each).reshape(-1) for each in self._parameters]).numpy().copy()

    def load(self, values: NDArray[np.float32]) -> None:
        """Go to these values."""
        self._adapter.load(np.ascontiguousarray(values, np.float32))

    def skip(self, batches: int) -> None:
        """Go on as if so many batches had been drawn: by one who starts anew in every round."""
        self._drawn = batches

    def walk(self, steps: int, optimizer: torch.optim.Optimizer) -> None:
        """So many local steps, each on a private batch of its own."""
        with self._once():
            for _ in range(steps):
                self._backward()
                optimizer.step()

    def adam(self, rate: float, decay: float = 0.0) -> torch.optim.Optimizer:
        """An optimiser of the adapter: Adam, or with decay AdamW."""
        if decay:
            return torch.optim.AdamW(self._parameters, rate, weight_decay=decay)
        return torch.optim.Adam(self._parameters, rate)

    def _once(self) -> AbstractContextManager[None]:
        """What is frozen of the model is computed once for a batch that comes again."""
        return once_per_batch(self._backbone, self._known)

    def _backward(self) -> None:
        for each in self._parameters:
            each.grad = None
        drawn = batch(self._rows, self._batch_size, self._seed, self._drawn)
        self._drawn += 1
        torch.autograd.backward(loss_with_graph(self._adapter.model, drawn))


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad
