"""A round on trial: how a node would fare with a base, without any data of its own. For the doctor.

Random tokens stand for the data and, where the run is not known, a small adapter on every layer for the run's.
"""

from __future__ import annotations

import numpy as np

from node.adapter import Adapter
from node.base import Base
from node.completions import Completions
from node.data import Pair, Sequences, Windows
from node.labelled import Labelled
from node.objectives import objective
from node.probe import Probe
from node.rehearsal import Rehearsal, rehearse
from transport.base_files import layers_only
from zo.initial import initial_weights
from zo.manifest import Manifest, Probing, Task

_KEY = (0, 0)


def rehearsed(base: Base, manifest: Manifest | None, probing: Probing) -> Rehearsal:
    """What a node would find before its first round.

    Args:
        base: freshly loaded; it holds an adapter afterwards.
        manifest: of the run; None for an adapter of rank 4 on every layer.
        probing: of the run, or what stands for it.

    Raises:
        ValueError: the run's adapter does not fit the base.
    """
    task = manifest.task if manifest else Task(kind="text") if base.head is None else _labelled_task()
    adapter = Adapter(
        base,
        key=_KEY,
        targets=manifest.adapter.targets if manifest else sorted(layers_only(base.linear_shapes)),
        rank=manifest.adapter.rank if manifest else 4,
        alpha=manifest.adapter.alpha if manifest else 8.0,
        train=manifest.adapter.train if manifest else "AB",
    )
    length = min(probing.sequence_length, base.max_sequence_length or probing.sequence_length)
    rows = random_rows(base, task, probing.batch_size, length)
    stand_in = _letters if task.objective == "callable" else None
    probe = Probe(
        adapter,
        rows,
        key=_KEY,
        epsilon=probing.epsilon,
        directions=probing.directions,
        batch_size=probing.batch_size,
        seed=0,
        sides=probing.sides,
        local_steps=probing.local_steps,
        objective=objective(task, base, rows, stand_in),
    )
    train = manifest.adapter.train if manifest else "AB"
    return rehearse(probe, initial_weights(adapter.layout, _KEY, train))


def random_rows(base: Base, task: Task, num_rows: int, length: int) -> Sequences:
    """Rows of random tokens, as long as they may be, of the kind that a task asks for."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, len(base.tokenizer), (num_rows, length)).astype(np.int32)
    if task.kind == "completion":
        room = base.max_sequence_length or length + task.max_new_tokens
        begins = max(1, min(length // 2, room - task.max_new_tokens))
        return Completions(
            tokens=tokens,
            begins=np.full(num_rows, begins),
            ends=np.full(num_rows, length),
            pairs=(Pair("", "one two three"),) * num_rows,
            sequence_length=length,
            num_cut=0,
            num_tokens_cut=0,
            num_dropped=0,
        )
    if task.labels:
        numbers = np.arange(num_rows) % len(task.labels)
        is_by_words = task.kind == "verbalizer"
        return Labelled(
            tokens=tokens,
            lengths=np.full(num_rows, length),
            labels=numbers,
            words=rng.permutation(len(base.tokenizer))[: len(task.labels)] if is_by_words else None,
            names=task.labels,
            padding=base.padding or 0,
            sequence_length=length,
            num_cut=0,
            num_tokens_cut=0,
        )
    return Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0)


def _labelled_task() -> Task:
    return Task(kind="head", labels=("0", "1"))


def _letters(_prompts: object, completions: object) -> list[float]:
    """In the place of a callable that only nodes have."""
    assert isinstance(completions, list)
    return [len(set(text)) / 26 for text in completions]
