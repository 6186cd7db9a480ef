"""What the commands ask of a model: what they are told, else what an export carries with it."""

import json

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from node import cli, embedded
from node.adapter import Adapter
from node.base import load_base
from node.records import DataError
from node.tasks import asked, keep_manifest
from transport.exits import Exit
from zo.layout import HEAD_BIAS
from zo.manifest import Task

LABELS = ("bad", "good")
HEAD = Task(kind="head", labels=LABELS)


def export_head(folder, encoder, manifest, label, value):
    """An adapter with a head that says this of everything: a logit of one label, the others being 0."""
    base = load_base(encoder, threads=1, labels=LABELS)
    adapter = Adapter(base, key=(1, 2), targets=("query",), rank=2, alpha=4, train="B")
    weights = np.zeros(adapter.size, np.int32)
    bias = next(parameter for parameter in adapter.layout.parameters if parameter.name == HEAD_BIAS)
    weights[bias.offset + label] = int(value * 2**28)
    adapter.export(folder, weights, str(encoder))
    keep_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def head_manifest(make_manifest):
    return make_manifest(kind="head", labels=LABELS, sequence_length=12)


@pytest.fixture(scope="module")
def exported(encoder, head_manifest, tmp_path_factory):
    """An adapter with a head that calls everything good, with its run's manifest beside it."""
    return export_head(tmp_path_factory.mktemp("adapter"), encoder, head_manifest, 1, 1.0)


@pytest.fixture(scope="module")
def contrary(encoder, head_manifest, tmp_path_factory):
    """One that calls everything bad, if less surely."""
    return export_head(tmp_path_factory.mktemp("adapter"), encoder, head_manifest, 0, 0.5)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text("good\tReturn the value\nbad\tNone\ngood\tSort the list, if there is one, in place\n")
    return file


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in (*arguments, "--threads", 1)])


BY_NUMBER = ("--column", "label=1", "--column", "text=2")


def test_plain_text_unless_told_otherwise(encoder, exported, tmp_path):
    model = str(encoder)
    assert asked(model, [], None, None, None, None) == (Task(), None)
    assert asked(model, [tmp_path], None, None, None, 32) == (Task(), 32)
    assert asked(model, [], "head", LABELS, None, None) == (HEAD, None)


def test_an_export_says_what_its_run_was_about(encoder, exported):
    model = str(encoder)
    assert asked(model, [exported], None, None, None, None) == (HEAD, 12)
    assert asked(str(exported), [], None, None, None, 40) == (HEAD, 40)
    assert asked(model, [exported], "text", None, None, None) == (Task(), 12)
    assert asked(model, [exported], None, ["0", "1"], None, None).task.labels == ("0", "1")


def test_a_classifier_says_its_labels(save_model, tmp_path):
    import transformers

    config = transformers.BertConfig(
        num_hidden_layers=0, hidden_size=12, vocab_size=8, id2label={0: "a", 1: "b"}
    )
    folder = save_model(transformers.BertForSequenceClassification(config), tmp_path / "base")
    assert asked(str(folder), [], "head", None, None, None).task.labels == ("a", "b")


@pytest.mark.parametrize("content", ["{", "[]", '{"id2label": 5}', '{"id2label": {"x": "y"}}', "{}"])
def test_labels_that_nobody_says_are_asked_for(encoder, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match=r"must name at least two, got \[\]\. Name all labels with --label"):
        asked(str(tmp_path), [], "head", None, None, None)


def test_evaluate_measures_loss_and_accuracy(encoder, exported, rows):
    options = ("--model", encoder, "--adapter", exported, "--data", rows, *BY_NUMBER)
    shown = run("evaluate", *options)
    assert shown.exit_code == 0, shown.output
    assert "nats per label over 3 rows, accuracy 66.7 %" in shown.stdout
    said = " ".join(shown.stderr.split())
    assert "data: 3 rows (1 bad, 2 good)" in said
    assert "to fit 12" in said
    figures = json.loads(run("evaluate", *options, "--json").stdout)
    assert figures.keys() == {"loss", "windows", "accuracy"}
    assert (figures["windows"], figures["accuracy"]) == (3, 2 / 3)


def test_predict_prints_the_label_alone(encoder, exported):
    shown = run("predict", "Return the value", "--model", encoder, "--adapter", exported)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == "good\n"
    assert shown.stderr.startswith("probability 0.7")


@pytest.mark.parametrize(
    ("mix", "order", "label", "probability"),
    [
        # 1 / (1 + e^-1) = 0.731 and 1 / (1 + e^0.5) = 0.378 that it is good
        ("mean", "01", "good", (0.731 + 0.378) / 2),
        ("mean", "011", "bad", 1 - (0.731 + 2 * 0.378) / 3),
        ("vote", "01", "good", 1 / 2),
        ("vote", "10", "bad", 1 / 2),
        ("vote", "011", "bad", 2 / 3),
    ],
)
def test_heads_predict_together(encoder, exported, contrary, mix, order, label, probability):
    folders = [(exported, contrary)[int(each)] for each in order]
    adapters = [option for folder in folders for option in ("--adapter", folder)]
    shown = run("predict", "Return the value", "--model", encoder, "--mix", mix, *adapters)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == f"{label}\n"
    assert float(shown.stderr.split()[1]) == pytest.approx(probability, abs=0.002)


def test_a_vote_has_an_accuracy_and_no_loss(encoder, exported, contrary, rows):
    adapters = [option for folder in (contrary, exported, contrary) for option in ("--adapter", folder)]
    options = ("--model", encoder, *adapters, "--data", rows, *BY_NUMBER, "--mix", "vote")
    shown = run("evaluate", *options)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == "accuracy 33.3 % over 3 rows\n"
    assert json.loads(run("evaluate", *options, "--json").stdout) == {"windows": 3, "accuracy": 1 / 3}


def fails(result, code, *words):
    assert result.exit_code == code, result.output
    (line,) = result.stderr.strip().splitlines()
    for word in words:
        assert word in line


def test_a_base_without_a_head_needs_an_adapter_that_has_one(encoder, rows):
    options = ("--model", encoder, "--task", "head", "--label", "bad", "--label", "good", "--data", rows)
    fails(
        run("evaluate", *options, *BY_NUMBER),
        Exit.BASE,
        "no classification head of 2 labels; name an adapter",
    )


def test_rows_are_no_longer_than_the_base_takes_if_nobody_says_how_long(encoder, exported, rows, tmp_path):
    for file in exported.glob("adapter*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())  # without the run's manifest
    task = ("--task", "head", "--label", "bad", "--label", "good")
    shown = run("evaluate", "--model", encoder, "--adapter", tmp_path, "--data", rows, *task, *BY_NUMBER)
    assert shown.exit_code == 0, shown.output
    rows.write_text("good\t" + "Return the value. " * 100)
    shown = run("evaluate", "--model", encoder, "--adapter", tmp_path, "--data", rows, *task, *BY_NUMBER)
    assert "to fit 64" in " ".join(shown.stderr.split())
    assert (
        run("predict", "Return " * 100, "--model", encoder, "--adapter", tmp_path, *task).stdout == "good\n"
    )


def test_bad_options_are_said(encoder, exported, rows):
    options = ("--model", encoder, "--adapter", exported, "--data", rows)
    fails(
        run("evaluate", *options),
        Exit.INPUT,
        "no column 'text'; the first line names 'good', 'Return the value'",
    )
    for column in ("text", "text=", "words=1"):
        fails(
            run("evaluate", *options, "--column", column),
            Exit.INPUT,
            f"--column {column}: expected FIELD=NAME",
        )
    fails(run("evaluate", *options, *BY_NUMBER, "--label", "x"), Exit.INPUT, "at least two, got ['x']")
    fails(run("evaluate", *options, *BY_NUMBER, "--sequence-length", 65), Exit.INPUT, "the base takes 64")
    fails(run("predict", " ", *options[:4]), Exit.INPUT, "the text is empty")


def test_a_language_model_says_the_label(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "Return the value", "label": 0}\n{"text": "If", "label": 1}\n')
    task = (
        "--task",
        "verbalizer",
        "--label",
        "0=none",
        "--label",
        "1=list",
        "--template",
        "{text}. It is the",
    )
    shown = run("evaluate", "--data", file, *task, "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["accuracy"] in (0.0, 0.5, 1.0)
    assert run("predict", "Return the value", *task).stdout.strip() in ("0", "1")
    fails(run("predict", "x", *task[:3], "0"), Exit.INPUT, "the label '0' has no word that stands for it")
    same = ("--task", "verbalizer", "--label", "0=list", "--label", "1=lists")
    fails(run("predict", "x", *same), Exit.INPUT, "'list' and 'lists' begin with the same token")


def test_the_embedded_model_is_asked_for_plain_text():
    assert asked(str(embedded.path()), [], None, None, None, None) == (Task(), None)
    assert (
        msgspec.structs.replace(Task(), kind="completion")
        == asked(str(embedded.path()), [], "completion", None, None, None).task
    )
