"""Shapes that quantisation can take: which layers are looked at, and what is said about those that do not fit."""

import pytest

from zo.quantization import KINDS, check_shapes, skipped

FITTING = {"layers.0.q_proj": (64, 64), "layers.0.up_proj": (96, 64)}


@pytest.mark.parametrize("kind", KINDS)
def test_multiples_of_32_and_64_fit_every_kind(kind):
    check_shapes(kind, FITTING)


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_only_four_bits_have_limits(kind):
    check_shapes(kind, {"layers.0.up_proj": (7, 3)})


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((172, 64), "has 172 outputs; 4-bit on CPU needs a multiple of 32"),
        ((64, 172), "has 172 inputs; 4-bit on CPU needs a multiple of 64"),
        ((64, 96), "has 96 inputs; 4-bit on CPU needs a multiple of 64"),
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_layer_that_does_not_fit_is_named_with_the_cure(kind, shape, words):
    with pytest.raises(ValueError, match="layer") as caught:
        check_shapes(kind, {**FITTING, "layers.0.gate_proj": shape})
    assert str(caught.value) == (
        f"layer layers.0.gate_proj {words}. "
        "Use --quantize int8, or skip this layer with --skip-quantize gate_proj."
    )
    check_shapes(kind, {**FITTING, "layers.0.gate_proj": shape}, ["gate_proj"])


def test_several_layers_are_counted_and_each_kind_of_them_is_named_once():
    shapes = {f"layers.{i}.{part}": (64, 100) for i in range(3) for part in ("down_proj", "odd")}
    with pytest.raises(ValueError, match="layer") as caught:
        check_shapes("nf4", shapes | FITTING)
    assert str(caught.value) == (
        "layer layers.0.down_proj has 100 inputs; 4-bit on CPU needs a multiple of 64, nor do 5 more layers fit. "
        "Use --quantize int8, or skip these layers with --skip-quantize down_proj --skip-quantize odd."
    )
    check_shapes("nf4", shapes | FITTING, ["down_proj", "odd"])
    with pytest.raises(ValueError, match=r"layers\.1\.odd has 100 inputs; .*, nor does layers\.2\.odd fit"):
        check_shapes("nf4", shapes | FITTING, ["down_proj", "0.odd"])


def test_skipping_takes_whole_names_and_their_last_parts():
    assert skipped(FITTING, ["q_proj"]) == {"layers.0.q_proj"}
    assert skipped(FITTING, ["layers.0.up_proj", "0.q_proj"]) == set(FITTING)
    assert skipped(FITTING, []) == set()
    with pytest.raises(ValueError, match="did you mean q_proj"):
        skipped(FITTING, ["q_prj"])
    with pytest.raises(ValueError, match="did you mean q_proj"):
        check_shapes("int8", FITTING, ["q_prj"])
