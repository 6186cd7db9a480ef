"""What privacy costs: runs end with their budgets spent, and what is there is not run again."""

import json
from dataclasses import replace

import pytest

from benchmarks import privacy
from benchmarks.privacy import Bench, Row, main, markdown
from benchmarks.recipes.problem import Form, Problem
from node.base import load_base
from node.labelled import read_labelled
from node.losses import row_misses
from zo.manifest import Task

SETTINGS = replace(privacy.SETTINGS, rounds=3)


@pytest.fixture(scope="module")
def problem(encoder, tmp_path_factory):
    task = Task(kind="head", labels=("0", "1"))
    path = tmp_path_factory.mktemp("data") / "rows.tsv"
    path.write_text("text\tlabel\n" + "".join(f"row number {n}\t{n % 2}\n" for n in range(8)))
    base = load_base(encoder, threads=1, labels=task.labels)
    rows = read_labelled([path], base.tokenizer, 16, task, base.padding)
    form = Form(targets=(), batch_size=8, sequence_length=16)
    both = {"private": [rows, rows], "pooled": rows, "held_out": [rows]}
    return Problem(model=str(encoder), form=form, task=task, metric=row_misses, **both)


def test_a_private_run_spends_its_budget_and_can_be_repeated(problem):
    bench = Bench(problem, SETTINGS)
    one, again, plain = bench.run(8.0, 1, 0.02), bench.run(8.0, 1, 0.02), bench.run(None, 1, 0.02)
    assert replace(one, seconds=0.0) == replace(again, seconds=0.0)
    assert 7.9 < one.spent <= 8.0
    assert one.noise > 0
    assert plain.noise is plain.spent is plain.clipped is None


def test_runs_that_are_there_are_not_run_again(problem, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(privacy, "sentiment_problem", lambda quick, nodes: problem)
    monkeypatch.setattr(privacy, "SETTINGS", SETTINGS)
    monkeypatch.setattr(privacy, "BUDGETS", (None, 8.0))
    assert main(["--out", str(tmp_path), "--seeds", "1"]) == 0
    rows = json.loads((tmp_path / "privacy.json").read_text())["rows"]
    assert [row["budget"] for row in rows] == [None, 8.0]
    assert (tmp_path / "privacy.png").stat().st_size > 0
    monkeypatch.setattr(privacy, "Bench", None)
    assert main(["--out", str(tmp_path), "--seeds", "1"]) == 0
    assert json.loads((tmp_path / "privacy.json").read_text())["rows"] == rows
    assert "| 8 |" in (tmp_path / "privacy.md").read_text()


def test_a_page_says_what_was_lost():
    def row(budget, seed, accuracy):
        noise = None if budget is None else 9.0
        return vars(Row(budget=budget, seed=seed, rounds=9, clip=0.02, noise=noise, spent=budget, clipped=None,
                        accuracy=accuracy, seconds=1.0))  # fmt: skip

    about = {
        "command": "c",
        "cpu": "p",
        "commit": "0",
        "nodes": 4,
        "rows_per_node": 9,
        "held_out": 100,
        "delta": 1e-5,
    }
    settings = {"rounds": 9, "directions": 4, "step": 0.3}
    rows = [row(None, 1, 0.80), row(None, 2, 0.78), row(8.0, 1, 0.75), row(8.0, 2, 0.77)]
    page = markdown(about | {"settings": settings, "rows": rows})
    assert "| not private |  | 79.0 (78.0 to 80.0) |  | 2 |" in page
    assert "| 8 | 9.0 | 76.0 (75.0 to 77.0) | 3.0 | 2 |" in page
