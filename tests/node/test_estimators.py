"""Which estimator a node uses: what the run allows, what can be had here, and what is chosen of that."""

from dataclasses import replace

import numpy as np
import pytest

from node import embedded
from node.base import load_base
from node.bnb import bitsandbytes
from node.data import Windows
from node.estimators import EstimatorError, Trial, check, choose
from node.language import LanguageTrainer
from node.rehearsal import Rehearsal
from zo.directions import Direction
from zo.layout import lora_layout

REHEARSAL = Rehearsal(
    epsilon=0.01,
    sides=2,
    num_directions=4,
    signal=0.1,
    repeat=0.0,
    unevenness=0.001,
    at_once=0,
    seconds=1.0,
    ratio=1.0,
    why_not="",
)
GOOD = Trial(seconds=3.0, error=0.001)
ALL = ("two-sided", "one-sided", "forward", "backward")


@pytest.mark.parametrize(
    ("allowed", "trials", "drowns", "chosen", "why"),
    [
        (ALL, {"backward": GOOD, "forward": GOOD}, False, "backward", "3 s a round, two-sided takes 4 s"),
        (ALL, {"forward": GOOD}, False, "two-sided", ""),
        (ALL, {"forward": GOOD}, True, "forward", "3 s a round"),
        (("two-sided",), {"backward": GOOD}, False, "two-sided", ""),
        (ALL, {"backward": replace(GOOD, seconds=17.0)}, False, "two-sided", "backward: 17 s a round"),
        (
            ALL,
            {"backward": replace(GOOD, error=0.09)},
            False,
            "two-sided",
            "off by 0.09 where L+ - L- is 0.1",
        ),
        (ALL, {"backward": Trial(seconds=1, error=0, why_not="none")}, False, "two-sided", "backward: none"),
    ],
)
def test_what_is_best_is_chosen_of_what_is_allowed_right_and_fast(allowed, trials, drowns, chosen, why):
    rehearsal = replace(REHEARSAL, repeat=0.05 if drowns else 0.0)
    found, reason = choose("two-sided", allowed, trials, rehearsal, 4)
    assert found == chosen
    assert why in reason
    assert bool(why) == bool(reason)


def test_what_the_run_forbids_or_cannot_have_is_said(make_manifest):
    for wanted in ("auto", "two-sided", "one-sided", "forward", "backward"):
        check(wanted, make_manifest())
    with pytest.raises(EstimatorError, match="allows the estimators two-sided; got --estimator backward"):
        check("backward", make_manifest(estimators=("two-sided",)))
    scored = make_manifest(objective="accuracy", directions=1)
    with pytest.raises(
        EstimatorError, match="needs a derivative, and this run's objective, accuracy, has none"
    ):
        check("forward", scored)
    with pytest.raises(
        EstimatorError, match="compares two directions at least, and this run has one in a round"
    ):
        check("one-sided", scored)


@pytest.fixture(scope="module")
def base():
    return load_base(embedded.path(), threads=1)


@pytest.fixture(scope="module")
def windows():
    tokens = np.random.default_rng(0).integers(2, 500, (11, 24)).astype(np.int32)
    return Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0)


@pytest.fixture(scope="module")
def trainer(base, windows, make_manifest):
    layout = lora_layout(base.linear_shapes, ("q_proj", "v_proj"), 4, "AB", None)
    manifest = make_manifest(
        size=layout.size,
        layout_digest=layout.digest().hex(),
        train="AB",
        directions=8,
        local_steps=2,
        sides=1,
        batch_size=4,
        epsilon=0.003,
    )
    return LanguageTrainer(manifest, base, windows, None, private_seed=5, threads=1)


@pytest.mark.parametrize("wanted", [None, "spsa", "two-sided", "forward", "backward"])
def test_a_trainer_measures_as_it_was_told_and_says_so(trainer, wanted):
    rehearsal = trainer.rehearse()
    said = trainer.choose_estimator(wanted, rehearsal)
    wanted = None if wanted == "spsa" else wanted
    assert said.startswith(wanted or "one-sided")
    assert trainer.estimator == (wanted or "")
    weights = trainer.initial_weights()
    codes = trainer.probe(weights, 3, 1, -8, walk_step=0).codes
    probe = trainer._probe
    assert codes.any()
    # Without a walk both local steps are at the same weights: the codes are those of the gradient, or near.
    if wanted in ("forward", "backward"):
        slopes, _ = probe.slopes_along(weights, [Direction(1, 24)])
        assert abs(codes[0] - slopes[0] * 2**8) <= 1 or abs(codes[0]) == 127


def test_backward_slopes_of_a_step_are_projections_of_one_gradient(trainer):
    trainer.choose_estimator("backward", trainer.rehearse())
    weights, probe = trainer.initial_weights(), trainer._probe
    names = [Direction(1, sample) for sample in range(16)]
    slopes, losses = probe.slopes_along(weights, names)
    assert losses.shape == (1,)
    differences = probe.losses(weights, names, 2, is_shared=True)
    expected = (differences[:, 0] - differences[:, 1]) / (2 * probe.epsilon)
    assert np.allclose(slopes, expected, rtol=0.05, atol=0.05 * np.abs(expected).max())
    assert np.corrcoef(slopes, expected)[0, 1] > 0.99


def test_auto_takes_backpropagation_where_it_works(trainer):
    said = trainer.choose_estimator("auto", trainer.rehearse())
    assert said.startswith(trainer.estimator or "one-sided")
    assert "a round" in said


def test_auto_leaves_a_quantised_base_as_it_is(windows, make_manifest):
    base = load_base(embedded.path(), threads=1, quantize="nf4")
    layout = lora_layout(base.linear_shapes, ("q_proj", "v_proj"), 4, "AB", None)
    manifest = make_manifest(
        size=layout.size, layout_digest=layout.digest().hex(), train="AB", batch_size=4, quantize="nf4"
    )
    trainer = LanguageTrainer(manifest, base, windows, None, private_seed=5, threads=1)
    said = trainer.choose_estimator("auto", trainer.rehearse())
    assert said == "two-sided (backward: would hold this quantised base in floats; name it to have that)"
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in base.model.modules())
    assert trainer.choose_estimator("backward", trainer.rehearse()).startswith("backward")
    assert not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in base.model.modules())


def test_a_one_sided_node_that_sees_much_curvature_measures_both_sides_and_says_so(
    base, windows, make_manifest, trainer, monkeypatch
):
    told = []
    monkeypatch.setattr(trainer, "_warn", told.append)
    trainer.choose_estimator("one-sided", trainer.rehearse())
    probe = trainer._probe
    asked, probe._num_steps = [], 0
    plain = probe.losses

    def curved(weights, names, sides, **options):
        asked.append(sides)
        found = plain(weights, names, sides, **options)
        bend = 10.0 * np.arange(len(names))[:, None]
        return found + bend

    monkeypatch.setattr(probe, "losses", curved)
    for round in range(40):
        trainer.probe(trainer.initial_weights(), round, 1, -8, walk_step=0)
    assert asked[0] == 2
    assert asked[1:16] == [1] * 15  # measured every so often at first
    assert asked[-1] == 2
    assert len(told) == 1
    assert told[0].startswith("100% of the variance of one-sided slopes is curvature: measuring both sides")


def test_with_differential_privacy_slopes_are_measured_as_the_run_says_and_no_other_way(trainer, monkeypatch):
    rehearsal = trainer.rehearse()
    monkeypatch.setattr(trainer._probe, "mechanism", object())
    for wanted in ("backward", "forward", "two-sided"):
        with pytest.raises(EstimatorError, match=f"as the run says, one-sided; got --estimator {wanted}"):
            trainer.choose_estimator(wanted, rehearsal)
    for wanted in (None, "auto", "one-sided"):
        assert trainer.choose_estimator(wanted, rehearsal) == "one-sided"
