"""The benchmark of directions runs every variant, goes on where it was stopped, and judges its rows by the targets."""

import dataclasses
import json
import os
from pydoc_data.topics import topics

import numpy as np
import pytest

from benchmarks import directions
from benchmarks.recipes import comparison
from benchmarks.recipes import variants as v
from benchmarks.recipes.assets import AssetMissing
from benchmarks.recipes.baselines import FirstOrder
from benchmarks.recipes.catalogue import text_problem
from benchmarks.recipes.problem import Form
from benchmarks.recipes.traffic import Traffic
from node import embedded
from zo.commit import Commit
from zo.manifest import Moves

TEXT = "".join(topics[name] for name in sorted(topics))[:4000]


def tiny(*_):
    return v.Subject(
        title="a text",
        metric="held-out loss",
        problem=lambda nodes: text_problem(
            embedded.path(), TEXT, Form(batch_size=2, sequence_length=32, train="B"), nodes
        ),
        nodes=4,
        other_nodes=(1,),
        local_steps=(1, 2),
        few=2,
        passes=8,
        step=0.002,
        epsilon=0.01,
        directions=1,
        factors=(1.0,),
        adam=[FirstOrder(steps=2, rate=0.01)],
        moves=Moves(projections=24, updates=2, rate=0.01),
        move_rounds=2,
        estimators=(1.0,),
    )


def test_all_are_run_and_a_second_call_goes_on_after_what_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(directions, "subject", tiny)
    assert directions.main(["--recipe", "1", "--out", str(tmp_path)]) == 0
    path = tmp_path / "directions.json"
    rows = json.loads(path.read_text())["rows"]
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == [variant.name for variant in v.variants(tiny())]
    assert by_name[v.INT8]["points"][-1][0] == 8
    assert by_name[v.ONE_BIT_LONGER]["rounds"] == round(1.7 * 8 / 8)
    assert by_name[v.HALF_ALONE]["nodes"] == 1
    assert by_name[v.ALL_MOVE]["backwards"] == 2 * 2 * 2
    assert by_name["shared, mean"]["payload_down"] < by_name[v.INT8]["payload_down"]
    assert len({row["points"][-1][1] for row in rows}) > len(rows) // 2
    assert (tmp_path / "directions-1.png").stat().st_size > 10_000
    page = (tmp_path / "directions.md").read_text()
    assert all(f"| {name} |" in page for name in by_name)
    capsys.readouterr()

    path.write_text(json.dumps({"rows": rows[1:]}))
    ran = []
    measured = directions.measured
    monkeypatch.setattr(
        directions, "measured", lambda job, given: ran.append(job.variant.name) or measured(job, given)
    )
    assert directions.main(["--recipe", "1", "--out", str(tmp_path), "--json"]) == 0
    assert ran == [v.INT8]
    again = {row["name"]: row["points"] for row in json.loads(capsys.readouterr().out)}
    assert again == {name: row["points"] for name, row in by_name.items()}, "the same run again is the same"


def test_who_diverges_has_no_row_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    def fast(*_):
        return dataclasses.replace(
            tiny(),
            factors=(1.0, 600.0),
            other_nodes=(),
            local_steps=(),
            moves=None,
            estimators=(),
            passes=32,
        )

    monkeypatch.setattr(directions, "subject", fast)
    assert directions.main(["--recipe", "1", "--out", str(tmp_path)]) == 0
    rows = directions.load(tmp_path / "directions.json")
    assert {row.name for row in rows} == {variant.name for variant in v.variants(fast())}
    title = {1: ("a text", "loss")}
    pages = [comparison.markdown(rows, title, {1: "a.png"}, quick=quick) for quick in (False, True)]
    assert ["met" in page for page in pages] == [True, False], "two rounds say nothing about targets"
    assert 0.002 in {row.settings.get("step") for row in rows}
    assert "pool, no row: a weight of magnitude" in capsys.readouterr().err.replace("\n", " ")


def test_what_is_no_results_file_is_not_written_over(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(directions, "subject", tiny)
    (tmp_path / "directions.json").write_text('{"rows": [{"recipe": 1}]}')
    assert directions.main(["--recipe", "1", "--out", str(tmp_path)]) == 3
    assert "name another --out" in capsys.readouterr().err
    assert (tmp_path / "directions.json").read_text() == '{"rows": [{"recipe": 1}]}'


def test_without_the_data_it_says_what_to_set(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ZO_TEST_ASSETS", raising=False)
    with pytest.raises(AssetMissing):
        v.subject(1, quick=True)
    assert directions.main(["--recipe", "1", "--out", str(tmp_path)]) == 3
    assert "ZO_TEST_ASSETS" in capsys.readouterr().err


@pytest.mark.assets
@pytest.mark.skipif("ZO_TEST_ASSETS" not in os.environ, reason="ZO_TEST_ASSETS names no directory")
@pytest.mark.parametrize("recipe", [1, 2])
def test_a_quick_call_asks_for_the_same_variants_of_a_recipe(recipe):
    quick, whole = (list(v.variants(v.subject(recipe, is_quick))) for is_quick in (True, False))
    assert {each.name for each in quick if each.group != v.NODES} <= {each.name for each in whole}
    assert all(each.tried[0].rounds <= 16 for each in quick if each.group == v.CODES)


def row(name, end, *, forwards=100, points=None, **fields):
    plain = {
        "key": name,
        "recipe": 1,
        "group": v.DIRECTIONS,
        "name": name,
        "nodes": 4,
        "settings": {"step": 0.01},
        "points": points or ((0, 4.0), (forwards, end)),
        "backwards": 0,
        "rounds": 10,
        "payload_up": 1000.0,
        "payload_down": 4000.0,
        "wire_up": 10_000.0,
        "wire_down": 20_000.0,
        "seed": 1,
        "seconds": 1.0,
        "date": "2026-01-01",
        "commit": "abc",
        "cpu": "a processor",
    }
    return comparison.Row(**plain | fields)


@pytest.mark.parametrize(
    ("rows", "expected", "is_met"),
    [
        (
            [row(v.INT8, 3.0), row(v.ONE_BIT_LONGER, 2.9, points=((0, 4.0), (80, 3.5), (160, 3.0)))],
            "1.60",
            True,
        ),
        ([row(v.INT8, 3.0), row(v.ONE_BIT_LONGER, 3.1)], "does not come down to 3.000", False),
        ([row(v.INT8, 3.0), row(v.POOL, 3.02)], "+0.67%", True),
        ([row(v.INT8, 3.0), row(v.POOL, 3.04)], "+1.33%", False),
        (
            [row("1 local steps", 3.0), row("16 local steps", 3.05, wire_up=1e3, wire_down=1e3)],
            "+1.67%",
            True,
        ),
        ([row("1 local steps", 3.0), row("16 local steps", 3.05)], "1.000 of its bytes", False),
        ([row(v.ALL_MOVE, 3.0, payload_up=30_000.0), row(v.ADAM, 2.9)], "90.9% of Adam", True),
        ([row(v.ALL_MOVE, 3.0, payload_up=30_001.0), row(v.ADAM, 2.9)], "90.9% of Adam", False),
        ([row(v.HALF_MOVE, 3.0), row(v.HALF_ALONE, 3.0)], "3, the half that moves alone", True),
        ([row(v.HALF_MOVE, 3.1), row(v.HALF_ALONE, 3.0)], "3.1, the half that moves alone", False),
    ],
)
def test_targets(rows, expected, is_met):
    (line,) = comparison.targets(rows)
    assert expected in line
    assert line.endswith(": met") == is_met
    assert ("**not met**" in line) != is_met


def test_of_what_was_tried_the_lowest_counts():
    found = comparison.best([row("a", 3.0), row("b", 2.5), dataclasses.replace(row("a", 2.8), seconds=9.0)])
    assert [(each.name, each.end) for each in found] == [("a", 2.8), ("b", 2.5)]


@pytest.mark.parametrize(
    ("nodes", "num_directions", "wire_up", "wire_down"),
    [(16, 1, 170, 191), (16, 64, 234, 1207), (16, 256, 434, 4411), (64, 256, 434, 17_293)],
)
def test_bytes_on_the_wire_are_those_that_an_interface_counts(nodes, num_directions, wire_up, wire_down):
    """What `zo-bench wire` measures, each way, where no acknowledgement rides on a frame."""
    rng = np.random.default_rng(1)

    def commit(number, previous):
        codes = rng.integers(-127, 128, nodes * num_directions, np.int8).tobytes()
        return Commit(number, (1 << 20,), (0,), tuple(range(nodes)), codes, previous)

    traffic, reports = Traffic(), [bytes(num_directions)] * nodes
    first = commit(0, b"p" * 16)
    traffic.count(reports, first)
    before = dataclasses.replace(traffic)
    traffic.count(reports, commit(1, first.digest()))
    assert traffic.wire_up - before.wire_up == wire_up
    assert traffic.wire_down - before.wire_down == wire_down
