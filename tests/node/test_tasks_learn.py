"""A swarm of one node learns labels, by a head and by words: from rows to codes, commits and weights, as in a run."""

import pytest

from node import embedded
from node.base import load_base
from node.language import LanguageTrainer, read_data
from node.losses import measure
from zo.commit import Commit
from zo.layout import lora_layout
from zo.manifest import Task
from zo.replica import Replica
from zo.steps import step_rule
from zo.weights import to_float

SIGNS = {"0": ("Return the value of the", "Return a list of"), "1": ("If the object is", "If there is no")}
THINGS = ("file", "module", "name", "class", "string", "number", "directory", "process")
HEAD = Task(kind="head", labels=("0", "1"))
WORDS = Task(kind="verbalizer", labels=("0", "1"), words=("none", "list"), template="{text}. It is the")


@pytest.fixture
def rows(tmp_path):
    lines = [
        f"{start} {thing}\t{label}" for label, starts in SIGNS.items() for start in starts for thing in THINGS
    ]
    for name, part in (("train", lines[::2]), ("test", lines[1::2])):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tlabel", *part]))
    return tmp_path


@pytest.mark.parametrize(
    ("task", "targets", "step"),
    [(HEAD, (), 0.1), (HEAD, ("v_proj", "down_proj"), 0.03), (WORDS, ("v_proj", "down_proj"), 0.05)],
    ids=["head alone", "head and adapter", "words"],
)
def test_labels_are_learnt(task, targets, step, rows, make_manifest):
    base = load_base(embedded.path(), threads=1, labels=task.head_labels)
    layout = lora_layout(base.linear_shapes, targets, 2, "AB", base.head and base.head.shape)
    manifest = make_manifest(
        kind=task.kind,
        labels=task.labels,
        words=task.words,
        template=task.template,
        targets=targets,
        rank=2,
        train="AB",
        size=layout.size,
        layout_digest=layout.digest().hex(),
        rounds=60,
        directions=8,
        batch_size=8,
        sequence_length=24,
        step=step,
    )
    train, test = (read_data([rows / f"{name}.tsv"], base, task, 24) for name in ("train", "test"))
    trainer = LanguageTrainer(manifest, base, train, test, private_seed=1, threads=1)
    replica = Replica(manifest, trainer.initial_weights())
    before = trainer.evaluate(replica.weights)
    rule = step_rule(manifest)
    scale = rule.start()
    for number in range(manifest.run.rounds):
        codes = trainer.probe(replica.weights, number, 0, scale.exponent).codes
        step_now, scale = rule.advance(scale, number, codes)
        replica.apply(Commit(number, (step_now,), (scale.exponent,), (0,), codes.tobytes(), replica.head, ()))
    assert trainer.evaluate(replica.weights) < 0.3 * before
    trainer._adapter.load(to_float(replica.weights))
    assert measure(base.model, test, batch_size=8).accuracy >= 0.9
