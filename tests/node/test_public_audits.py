"""Public audits at a real node: the same losses whatever its own data, and clear words about rows that are none."""

import json

import numpy as np
import pytest

from node import embedded
from node.base import load_base
from node.language import LanguageTrainer, read_data
from node.losses import measure
from node.records import DataError
from zo.layout import lora_layout
from zo.manifest import Task
from zo.weights import to_float

TEXT = "Return the value of the named attribute of an object, or the default if there is none. "
LABELLED = Task(kind="head", labels=("0", "1"))
ROWS = {
    "text": (Task(), [{"text": TEXT * 8}]),
    "completion": (Task(kind="completion"), [{"prompt": "Return the", "completion": " value"}] * 2),
    "head": (
        LABELLED,
        [{"text": "Return the value", "label": "1"}, {"text": "If there is none", "label": "0"}],
    ),
}


def make_trainer(make_manifest, tmp_path, task, rows, own, seed=1, at_once=0):
    """A node with these public rows and rows of its own."""
    base = load_base(embedded.path(), threads=1, labels=task.head_labels)
    layout = lora_layout(base.linear_shapes, ("v_proj",), 2, "AB", base.head and base.head.shape)
    manifest = make_manifest(
        kind=task.kind,
        labels=task.labels,
        objective=task.objective,
        max_new_tokens=task.max_new_tokens,
        targets=("v_proj",),
        rank=2,
        train="AB",
        size=layout.size,
        layout_digest=layout.digest().hex(),
        batch_size=4,
        sequence_length=32,
        rows=tuple(json.dumps(row) for row in rows),
    )
    path = tmp_path / f"own-{seed}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in own))
    private = read_data([path], base, task, 32)
    trainer = LanguageTrainer(manifest, base, private, None, private_seed=seed, threads=1)
    trainer._probe.at_once = at_once
    return trainer


@pytest.mark.parametrize("kind", ROWS)
def test_nodes_with_other_data_and_other_passes_tell_the_same(kind, make_manifest, tmp_path):
    task, rows = ROWS[kind]
    answers = []
    for seed, at_once in ((1, 0), (2, 2)):
        own = [
            {name: "zero one two " * 40 if name == "text" else value for name, value in row.items()}
            for row in rows
        ]
        trainer = make_trainer(
            make_manifest, tmp_path, task, rows, [*own, *rows][:: 3 - 2 * seed], seed, at_once
        )
        weights = trainer.initial_weights()
        trainer.probe(weights, 0, 0, -4)  # which leaves its own traces in the adapter
        answers.append(trainer.audit(weights, 77))
    assert answers[0] == answers[1]
    assert trainer.audit(weights, 78) != answers[0]
    assert np.array_equal(weights, trainer.initial_weights())
    trainer._adapter.load(to_float(weights))
    at_weights = measure(
        trainer._adapter.model, trainer._public.windows, batch_size=4, objective=trainer._objective
    )
    assert np.mean(answers[0]) == pytest.approx(at_weights.loss, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [([{"prompt": "a", "completion": "b"}], "text"), ([{"text": "too short"}], "32")],
)
def test_rows_that_are_none_of_the_run_are_named(rows, reason, make_manifest, tmp_path):
    with pytest.raises(DataError, match=rf"the public rows of the run's manifest \(audit.rows\): .*{reason}"):
        make_trainer(make_manifest, tmp_path, Task(), rows, [{"text": TEXT * 8}])


def test_public_prompts_leave_room_for_what_the_model_is_to_say(make_manifest, tmp_path):
    own, long = {"prompt": "a", "completion": "b"}, {"prompt": "the " * 28, "completion": "b"}
    limit = load_base(embedded.path(), threads=1).max_sequence_length
    task = Task(kind="completion", objective="exact-match", max_new_tokens=limit - 20)
    with pytest.raises(DataError, match=r"audit.rows\): a prompt of \d+ tokens and .* do not fit"):
        make_trainer(make_manifest, tmp_path, task, [long], [own])
