"""The weights of round 0: zero, except for an A that is trained."""

import numpy as np
import pytest

from zo.initial import adapted_modules, initial_weights
from zo.layout import Head, initial_lora_A, layout, lora_layout
from zo.weights import digest, from_float

KEY = (1, 2)
# "a" sorts before "a.b", but "a.b.lora_A" before "a.lora_A": the index of a module is not that of its parameters.
SHAPES = {"a": (3, 5), "a.b": (2, 7), "z.a": (4, 6)}


def test_what_is_trained_alone_starts_at_zero():
    weights = initial_weights(lora_layout(SHAPES, ["a"], 2, "B"), KEY, "B")
    assert weights.dtype == np.int32
    assert np.array_equal(weights, np.zeros(2 * (3 + 4), np.int32))


def test_a_trained_factor_starts_as_the_frozen_one():
    made = lora_layout(SHAPES, ["a", "b"], 2, "AB")
    weights = initial_weights(made, KEY, "AB")
    assert adapted_modules(made) == ("a", "a.b", "z.a")
    for parameter in made.parameters:
        module, _, factor = parameter.name.rpartition(".")
        entries = weights[parameter.offset : parameter.offset + parameter.size]
        if factor == "lora_B":
            assert not entries.any()
        else:
            A = initial_lora_A(KEY, sorted(SHAPES).index(module), (2, SHAPES[module][1]))
            assert np.array_equal(entries, from_float(A).ravel())


def test_the_start_is_pinned():  # changing this breaks every run with train = "AB"
    weights = initial_weights(lora_layout(SHAPES, ["a", "b"], 2, "AB"), KEY, "AB")
    assert digest(0, weights).hex() == "12c91744731c4975c6572e5f0bfc976b"


def test_a_head_is_no_adapted_module_and_its_start_is_pinned():  # changing this breaks every run with a head
    made = lora_layout(SHAPES, ["a", "b"], 2, "AB", Head(3, 6, has_bias=True))
    assert adapted_modules(made) == ("a", "a.b", "z.a")
    assert digest(0, initial_weights(made, KEY, "AB")).hex() == "3ebe6c6e8c09fb1c1031ed12d7f30b5b"
    alone = lora_layout(SHAPES, [], 2, "B", Head(3, 6, has_bias=True))
    assert adapted_modules(alone) == ()
    assert np.array_equal(np.flatnonzero(initial_weights(alone, KEY, "B") == 0), np.arange(3)), "the bias"


def test_a_layout_that_is_not_what_train_says():
    with pytest.raises(ValueError, match=r'train="B" has no parameter a\.lora_A'):
        initial_weights(lora_layout(SHAPES, ["a"], 2, "AB"), KEY, "B")
    with pytest.raises(ValueError, match=r'train="AB" has no parameter a\.bias'):
        initial_weights(layout({"a.bias": (3,)}), KEY, "AB")
    with pytest.raises(ValueError, match='train must be "B" or "AB", got \'A\''):
        initial_weights(lora_layout(SHAPES, ["a"], 2, "B"), KEY, "A")
