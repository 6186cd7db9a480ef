"""Recipes: what is run once is not run again, and what a page claims follows from its rows."""

import json
import os
from dataclasses import replace
from pydoc_data.topics import topics

import numpy as np
import pytest

from benchmarks.learning import main
from benchmarks.recipes import assets, page
from benchmarks.recipes.baselines import FirstOrder, Mezo
from benchmarks.recipes.catalogue import RECIPES, Recipe, instructions_problem, text_problem
from benchmarks.recipes.course import Course, Point
from benchmarks.recipes.problem import Form
from benchmarks.recipes.results import Results, Row
from benchmarks.recipes.runner import Runner
from benchmarks.recipes.swarm import Swarm, train
from node import embedded

FORM = Form(rank=2, batch_size=2, sequence_length=32)
SWARM = Swarm(rounds=4, directions=3, sides=1, step=0.01)


@pytest.fixture(scope="module")
def problem():
    text = "".join(topics[name] for name in sorted(topics))[:12_000]
    return text_problem(embedded.path(), text, FORM, nodes=2)


def row(method, *, end, forwards=100, seed=1, start=4.0, subject="a", **settings):
    middle = Point(forwards // 2, 50, (start + end) / 2)
    return Row(
        key=f"{subject}{method}{seed}{settings}",
        subject=subject,
        method=method,
        form={"batch_size": 8, "sequence_length": 128},
        settings={"rate": 0.01, "scalars": method, **settings},
        seed=seed,
        points=(Point(0, 0, start), middle, Point(forwards, 100, end)),
        seconds=1.0,
        date="2026-11-20",
        commit="abc",
        cpu="a processor",
        torch="2",
    )


def test_floats_and_codes_go_the_same_way_on_the_same_bytes_a_quarter_as_wide(problem):
    swarm = replace(SWARM, rounds=16, step=0.02)
    codes = train(problem, swarm, seed=1)
    floats = train(problem, replace(swarm, scalars="float"), seed=1)
    ends = codes.course.points[-1], floats.course.points[-1]
    assert ends[0].forwards == ends[1].forwards == 2 * 16 * 3
    assert (ends[0].up_bytes, ends[1].up_bytes) == (96, 384)
    assert codes.course.points[0].metric == floats.course.points[0].metric
    before = floats.course.points[0].metric
    assert abs(ends[0].metric - ends[1].metric) < abs(ends[1].metric - before) / 3


def test_first_order_and_mezo_train_the_same_adapter(problem, tmp_path):
    runner = Runner(9, Results(tmp_path / "rows.json"), again=False)
    adam = runner("a", problem, FirstOrder(steps=40, rate=0.01))
    mezo = runner("a", problem, Mezo(steps=3, rate=1e-4))
    swarm = runner("a", problem, SWARM)
    assert adam.end < adam.start - 0.02
    assert adam.start == mezo.start == swarm.start
    assert mezo.end != mezo.start
    assert (adam.forwards, mezo.forwards) == (40, 6)
    assert mezo.points[-1].up_bytes == 3 * 4


def test_steps_on_all_rows_need_a_forward_pass_for_each_node(problem, tmp_path):
    runner = Runner(9, Results(tmp_path / "rows.json"), again=False)
    adam = runner("a", problem, FirstOrder(steps=3, rate=0.01, on_all=True))
    mezo = runner("a", problem, Mezo(steps=3, rate=1e-4, on_all=True))
    assert (adam.forwards, mezo.forwards) == (2 * 3, 2 * 2 * 3)
    assert mezo.points[-1].up_bytes == 3 * 4
    assert adam.end < adam.start
    other = runner("a", problem, FirstOrder(steps=3, rate=0.01, on_all=True), seed=2)
    start = runner("a", problem, FirstOrder(steps=3, rate=0.01), seed=2)
    assert other.start == start.start
    assert other.end != start.end


def test_in_4_bit_first_order_has_true_gradients(problem):
    """The fused kernel of bitsandbytes on a CPU has none, and torch only warns."""
    from benchmarks.recipes.baselines import first_order

    form = replace(FORM, quantize="nf4")
    course = first_order(replace(problem, form=form), FirstOrder(steps=40, rate=0.01), 1, lambda *_: None)
    whole = first_order(problem, FirstOrder(steps=40, rate=0.01), 1, lambda *_: None)
    improvement, expected = (each.points[0].metric - each.points[-1].metric for each in (course, whole))
    assert improvement == pytest.approx(expected, rel=0.3)


def test_a_row_is_run_once_unless_again_is_asked_for(problem, tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    calls = []
    course = Course(1, lambda: 3.0)
    monkeypatch.setattr("benchmarks.recipes.runner._run", lambda *_: calls.append(1) or course)
    runner = Runner(9, Results(path), again=False)
    first = runner("a", problem, SWARM)
    assert runner("a", problem, SWARM) == first
    assert Runner(9, Results(path), again=False)("a", problem, SWARM) == first
    assert len(calls) == 1
    Runner(9, Results(path), again=True)("a", problem, SWARM)
    assert len(calls) == 2
    for changed in (
        lambda: runner("a", problem, SWARM, seed=2),
        lambda: runner("a", problem, replace(SWARM, step=0.02)),
        lambda: runner("b", replace(problem, form=replace(FORM, rank=3)), SWARM),
        lambda: runner("c", replace(problem, held_out=problem.private), SWARM),
    ):
        before = len(calls)
        changed()
        assert len(calls) == before + 1


def test_rows_that_a_recipe_no_longer_asks_for_are_dropped_at_its_end(tmp_path):
    results = Results(tmp_path / "rows.json")
    for each in (row("one", end=3), row("two", end=3), row("three", end=3)):
        results.add(each)
    results.keep([row("three", end=3).key, row("one", end=3).key])
    assert [each.method for each in Results(tmp_path / "rows.json").rows] == ["three", "one"]


def test_a_course_is_measured_when_a_mark_is_reached():
    measured = iter(range(10))
    course = Course(100, lambda: float(next(measured)), marks=(0.0, 0.1, 0.2, 0.9, 1.0))
    for forwards in (5, 25, 60, 100):
        course.reached(forwards, 2 * forwards)
    assert [point.forwards for point in course.points] == [0, 25, 100]
    assert course.points[-1] == Point(100, 200, 2.0)


def test_a_page_says_what_came_of_the_targets():
    rows = [
        row("swarm, int8", end=3.0),
        row("swarm, float", end=2.95),
        row("first order, Adam", end=2.8),
        row("first order, Adam", end=2.5, seed=2),
        row("MeZO", end=3.5, forwards=400),
    ]
    codes, share, reached, mezo = page.targets(rows, "loss")
    assert codes == "- **not met**: a, int8 ends at 3.000, float at 2.950: 1.69% apart"
    assert "66.7% of the improvement of first order (1.500) with 100 forward passes" in share
    assert reached == "- a, 65% of it after about 98 forward passes"
    assert mezo == "- met: a, MeZO's lowest, 3.500 after 400 at rate 0.01, after about 50: 0.12 of them"


@pytest.mark.parametrize(
    ("forwards", "end", "verdict"),
    [(5_000, 3.2, "- a, 53.3%"), (20_000, 3.2, "- **not met**: a, 53.3%"), (5_000, 3.0, "- met: a, 66.7%")],
)
def test_a_run_shorter_than_the_target_allows_has_not_missed_it(forwards, end, verdict):
    rows = [row("swarm, int8", end=end, forwards=forwards), row("first order, Adam", end=2.5)]
    assert next(page.targets(rows, "loss")).startswith(verdict)


@pytest.mark.parametrize(("end", "verdict"), [(0.22, "met"), (0.2301, "**not met**")])
def test_errors_are_compared_in_points(end, verdict):
    rows = [row("swarm, int8", end=end, start=0.5), row("first order, Adam", end=0.21, start=0.5)]
    (line,) = page.targets(rows, "held-out error")
    assert line.startswith(f"- {verdict}: a, {end:.1%} wrong, by first order 21.0%: ")


def test_a_run_that_only_diverged_is_nothing_to_be_compared_with():
    assert list(page.targets([row("swarm, int8", end=3.0), row("MeZO", end=4.5)], "loss")) == []


def test_a_metric_that_the_swarm_never_came_to_is_a_target_not_met():
    (line,) = page.targets([row("swarm, int8", end=3.0), row("MeZO", end=2.9)], "loss")
    assert line == "- **not met**: a, MeZO's lowest, 2.900 after 100 at rate 0.01, was not reached"


def test_forward_passes_are_read_off_between_points():
    learnt = row("swarm, int8", end=3.0)
    assert page.forwards_to(learnt, 3.75) == pytest.approx(25)
    assert page.forwards_to(learnt, 4.5) == 0
    assert page.forwards_to(learnt, 2.9) is None


def test_missing_assets_are_named(monkeypatch, tmp_path):
    monkeypatch.delenv(assets.VARIABLE, raising=False)
    with pytest.raises(assets.AssetMissing, match="ZO_TEST_ASSETS names no directory"):
        assets.model("stories260K")
    monkeypatch.setenv(assets.VARIABLE, str(tmp_path))
    with pytest.raises(assets.AssetMissing, match=r"models/stories260K does not exist"):
        assets.model("stories260K")


def test_a_recipe_without_its_assets_says_so_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(assets.VARIABLE, str(tmp_path))
    assert main(["--recipe", "1", "--quick", "--out", str(tmp_path / "out")]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "input.txt does not exist; ZO_TEST_ASSETS must name a directory" in line


def test_a_recipe_leaves_rows_a_page_and_two_plots(monkeypatch, problem, tmp_path, capsys):
    def run(runner, quick):
        assert quick
        runner("tiny", problem, SWARM)
        runner("tiny", problem, FirstOrder(steps=2, rate=0.01))

    monkeypatch.setitem(RECIPES, 1, Recipe(number=1, title="tiny", metric="held-out loss", run=run))
    arguments = ["--recipe", "1", "--quick", "--out", str(tmp_path)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "# Recipe 1: tiny" in shown
    assert "of the improvement of first order" in shown
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "recipe-1-quick.json",
        "recipe-1-quick.md",
        "recipe-1-quick-forwards.png",
        "recipe-1-quick-bytes.png",
    }
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [each["method"] for each in rows] == ["swarm, int8", "first order, Adam"]
    assert np.isfinite(rows[0]["points"][-1][2])


def test_agents_learn_apart_and_are_measured_together(problem):
    two = train(problem, replace(SWARM, agents=2, step=0.05), seed=1, marks=(0.0, 1.0))
    one = train(problem, replace(SWARM, step=0.05), seed=1, marks=(0.0, 1.0))
    assert two.course.points[0].metric == pytest.approx(one.course.points[0].metric, abs=1e-4)
    assert two.course.points[-1].forwards == 2 * one.course.points[-1].forwards
    assert two.course.points[-1].metric != one.course.points[-1].metric
    assert two.ledger_bytes > 1.9 * one.ledger_bytes


@pytest.mark.assets
@pytest.mark.skipif(assets.VARIABLE not in os.environ, reason=f"{assets.VARIABLE} names no directory")
def test_any_number_of_nodes_has_all_rows_of_the_clients_between_them():
    form = Form(batch_size=4, sequence_length=64)
    by_nodes = {nodes: instructions_problem(form, 4, nodes) for nodes in (0, 1, 2, 16)}
    assert [len(problem.private) for problem in by_nodes.values()] == [4, 1, 2, 16]
    for problem in by_nodes.values():
        pairs = [pair for rows in problem.private for pair in rows.pairs]
        assert sorted(pairs) == sorted(problem.pooled.pairs)
        assert len(problem.held_out) == 4
    first, shared = by_nodes[0].private[0], by_nodes[16].private[:4]
    assert [len(rows.pairs) for rows in shared] == [rows.num_windows for rows in shared]
    assert max(rows.num_windows for rows in shared) - min(rows.num_windows for rows in shared) <= 1
    assert sum(rows.num_scored for rows in shared) == first.num_scored
