"""The problem that all systems of a comparison get: the same files for everybody, of every recipe."""

import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bandwidth import contest as contests
from benchmarks.bandwidth import runs, systems
from benchmarks.bandwidth.contenders import _init_options, passes, varying
from benchmarks.recipes import assets
from coordinator.rundir import RunDirectory
from node.data import Batch, LabelledBatch

needs_assets = pytest.mark.skipif(
    assets.VARIABLE not in os.environ, reason=f"{assets.VARIABLE} names no directory"
)
_has_encoder = (assets._CACHE.expanduser() / assets.ENCODER).exists()
RECIPES = [
    1,
    2,
    pytest.param(3, marks=pytest.mark.skipif(not _has_encoder, reason="the encoder is not installed")),
]


def prepared(recipe, place):
    return contests.prepare(recipe, place, quick=True, rank=2)


@needs_assets
@pytest.mark.parametrize("recipe", RECIPES)
def test_whoever_loads_a_contest_has_the_same_and_a_step_of_adam_lowers_the_metric(recipe, tmp_path):
    made = prepared(recipe, tmp_path)
    again = contests.load(tmp_path)
    assert again == made
    evaluate = contests.Evaluator(again)
    learner = contests.Learner(again, 1)
    assert np.array_equal(evaluate.start, np.load(again.start_path))
    assert np.load(again.sizes_path).sum() == evaluate.start.size
    learner.load(evaluate.start)
    assert np.array_equal(learner.values, evaluate.start)
    learner.walk(6, learner.adam(0.03 if recipe == 3 else 0.003))
    assert evaluate(learner.values) < evaluate.at_start


@needs_assets
@pytest.mark.parametrize(("recipe", "kind", "parts"), [(1, Batch, 1), (2, Batch, 2)])
def test_nodes_have_rows_of_their_own_and_parts_count_alike(recipe, kind, parts, tmp_path):
    made = prepared(recipe, tmp_path)
    problem = made.problem([0, 1], held_out=True)
    first, second = (rows.take(np.arange(1)) for rows in problem.private)
    assert isinstance(first, kind)
    assert not isinstance(first, LabelledBatch)
    assert not np.array_equal(first.tokens, second.tokens)
    assert len(problem.held_out) == parts


@needs_assets
def test_a_client_that_starts_anew_goes_on_with_other_batches(tmp_path):
    made = prepared(1, tmp_path)
    one, other = contests.Learner(made, 0), contests.Learner(made, 0)
    first, second = one.gradient(), one.gradient()
    other.skip(1)
    assert np.array_equal(other.gradient(), second)
    assert not np.array_equal(first, second)


@needs_assets
@pytest.mark.parametrize("recipe", RECIPES)
def test_init_makes_the_adapter_of_the_contest_and_a_run_of_it_begins(recipe, tmp_path):
    made = prepared(recipe, tmp_path)
    run = runs.template(tmp_path / "run", Path(made.model), *_init_options(made))
    manifest = RunDirectory(run.path).manifest()
    assert manifest.adapter.size == np.load(made.start_path).size
    assert manifest.probe.batch_size == made.form.batch_size
    assert manifest.task == made.task
    again = runs.make(tmp_path / "again", runs.varied(manifest, {}), 2, [], Path(made.model))
    assert again.manifest().adapter == manifest.adapter


@needs_assets
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_worker_with_all_data_takes_all_of_it_at_once_where_nodes_do(recipe, tmp_path):
    made = prepared(recipe, tmp_path)
    (mezo,) = (each for each in systems.systems(recipe, False) if each.alone)
    (alone, shared) = (varying(made, is_alone, mezo.candidates[0], 10) for is_alone in (True, False))
    size = made.form.batch_size
    assert shared["probe"].get("batch_size", size) == size
    assert alone["probe"].get("batch_size", size) == (made.nodes * size if recipe == 3 else size)
    assert alone["probe"]["epsilon"] == mezo.candidates[0]["probe"]["epsilon"]
    assert alone["run"] == {"rounds": 10}


def test_passes_are_those_of_slopes_or_of_moves(tmp_path):
    manifest = runs.template(tmp_path / "run").manifest()
    assert passes(runs.varied(manifest, {"probe": {"directions": 4, "sides": 1}})) == (4, 0)
    assert passes(runs.varied(manifest, {"moves": {"projections": 256, "updates": 10}})) == (10, 10)
