"""Moves: where a node's own steps lead, what of it leaves, and that the commits follow it."""

import msgspec
import numpy as np
import pytest

from node import embedded
from node.base import load_base
from node.data import Windows
from node.estimators import EstimatorError
from node.language import LanguageTrainer
from node.moves import rate_of
from zo import reference
from zo.codes import NO_VOTE, encode
from zo.commit import Commit
from zo.directions import Direction, run_key, stack
from zo.layout import lora_layout
from zo.packing import by_class, of_classes
from zo.replica import Replica
from zo.steps import step_rule
from zo.weights import to_float


@pytest.fixture(scope="module")
def base():
    return load_base(embedded.path(), threads=1)


@pytest.fixture(scope="module")
def windows():
    tokens = np.random.default_rng(0).integers(2, 500, (16, 24)).astype(np.int32)
    return Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0)


@pytest.fixture(scope="module")
def manifest(base, make_manifest):
    layout = lora_layout(base.linear_shapes, ("q_proj", "v_proj"), 4, "AB", None)
    return make_manifest(
        size=layout.size,
        layout_digest=layout.digest().hex(),
        train="AB",
        directions=4,
        projections=64,
        updates=3,
        optimizer="sgd",
        rate=0.5,
        batch_size=4,
        epsilon=0.003,
        step=0.002,
    )


@pytest.fixture(scope="module")
def trainer(base, windows, manifest):
    return LanguageTrainer(manifest, base, windows, None, private_seed=5, threads=1)


def test_codes_of_a_move_are_its_projections_with_the_sign_of_a_slope(trainer, manifest):
    trainer.choose_estimator("moves", trainer.rehearse())
    assert trainer.estimator == "moves"
    weights, mover = trainer.initial_weights(), trainer._mover
    before = weights.copy()
    probed = trainer.probe(weights, 2, 3, -6)
    moved, losses = mover.move(to_float(weights), 2, 5)
    assert len(losses) == 3
    assert probed.loss == pytest.approx(np.mean(losses))
    names = [Direction(3, 2 * 64 + i) for i in range(64)]
    projected = -reference.projections(moved, run_key(manifest.run_id), stack(names))
    expected = encode(projected, -6, np.random.default_rng([5, 2, 1]))
    assert probed.codes.size == 64
    assert np.abs(probed.codes.astype(int) - expected).max() <= 1
    assert probed.codes.any()
    assert np.array_equal(weights, before)


def test_one_step_of_sgd_is_the_gradient_and_adamw_goes_its_own_way(trainer, manifest):
    trainer.choose_estimator("moves", trainer.rehearse())
    mover, values = trainer._mover, to_float(trainer.initial_weights())
    drawn = trainer._probe.draw(Direction(0, 4))
    _, gradient = mover._gradients.gradient(values, drawn)
    mover._manifest = replaced(manifest, updates=1)
    moved, _ = mover.move(values, 4, 5)
    assert rate_of(manifest, 4) == pytest.approx(0.4)
    assert np.allclose(moved, -0.4 * gradient, atol=1e-6)
    mover._manifest = replaced(manifest, updates=1, optimizer="adamw", rate=0.01)
    moved, _ = mover.move(values, 4, 5)
    assert np.abs(moved).max() == pytest.approx(0.008, rel=0.1)  # Adam's first step: the sign of the gradient
    mover._manifest = manifest


def test_the_rate_of_moves_follows_the_schedule_of_the_run(manifest):
    assert [rate_of(manifest, round) for round in (0, 5, 10, 19)] == pytest.approx([0.5, 0.375, 0.25, 0.025])
    warm = scheduled_as(manifest, decay="constant", warm_up=3)
    assert [rate_of(warm, round) for round in (0, 2, 3, 19)] == pytest.approx([0.125, 0.375, 0.5, 0.5])
    halving = scheduled_as(manifest, decay="halving", half_life=4)
    assert [rate_of(halving, round) for round in (3, 4, 19)] == pytest.approx([0.5, 0.25, 0.03125])


def scheduled_as(manifest, **changes):
    return msgspec.structs.replace(manifest, schedule=msgspec.structs.replace(manifest.schedule, **changes))


def replaced(manifest, **changes):
    return msgspec.structs.replace(manifest, moves=msgspec.structs.replace(manifest.moves, **changes))


def test_a_move_that_is_not_finite_is_no_vote(trainer, manifest):
    trainer.choose_estimator("moves", trainer.rehearse())
    trainer._mover._manifest = replaced(manifest, rate=np.inf)
    assert (trainer.probe(trainer.initial_weights(), 0, 3, -6).codes == NO_VOTE).all()
    trainer._mover._manifest = manifest


def test_a_run_that_allows_no_moves_says_so(trainer, monkeypatch):
    rehearsal = trainer.rehearse()
    monkeypatch.setattr(trainer, "_manifest", replaced(trainer._manifest, projections=0))
    with pytest.raises(EstimatorError, match=r"allows the estimators two-sided, .*; got --estimator moves"):
        trainer.choose_estimator("moves", rehearsal)


def test_movers_and_others_learn_together_and_commits_follow_the_mean_move(trainer, manifest, monkeypatch):
    """Four nodes, two of either kind, by commits alone; the loss is that of the batches of movers."""
    rehearsal = trainer.rehearse()
    manifest = replaced(manifest, rate=2.0)
    monkeypatch.setattr(trainer, "_manifest", manifest)
    rule = step_rule(manifest)
    scale, replica = rule.start(), Replica(manifest, trainer.initial_weights())
    losses = []
    for round in range(6):
        trainer.choose_estimator("moves", rehearsal)
        movers = [trainer.probe(replica.weights, round, node, scale.moves_exponent) for node in (0, 2)]
        trainer.choose_estimator(None, rehearsal)
        slopes = [trainer.probe(replica.weights, round, node, scale.exponent).codes for node in (1, 3)]
        moves = np.concatenate([each.codes for each in movers])
        steps, after = rule.of_round(scale, round, np.concatenate(slopes), moves)
        codes = of_classes((0, 1, 2, 3), (0, 2), np.concatenate(slopes), moves, manifest)
        commit = Commit(
            round, steps, rule.exponents(after), (0, 1, 2, 3), codes.tobytes(), replica.head, (), (0, 2)
        )
        assert [each.size for each in by_class(commit, manifest)] == [8, 128]
        replica.apply(commit)
        scale = after
        losses.append(np.mean([each.loss for each in movers]))
    assert losses[-1] < losses[0] - 0.05
