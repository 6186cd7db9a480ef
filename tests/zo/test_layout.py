"""The canonical layout and what a run starts from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo import reference
from zo.directions import INITIAL, Direction
from zo.layout import Head, base_digest, initial_lora_A, layout, lora_layout

LINEAR = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.0.mlp.up_proj": (192, 64),
    "model.layers.1.self_attn.q_proj": (64, 64),
    "lm_head": (512, 64),
}
shapes_by_name = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.lists(st.integers(1, 9), max_size=3).map(tuple),
    min_size=1,
    max_size=8,
)


@given(shapes_by_name, st.randoms(use_true_random=False))
def test_the_layout_does_not_depend_on_the_order_of_insertion(shapes, random):
    items = list(shapes.items())
    random.shuffle(items)
    assert layout(dict(items)) == layout(shapes)
    assert layout(dict(items)).digest() == layout(shapes).digest()


@given(shapes_by_name)
def test_parameters_are_sorted_and_leave_no_gap(shapes):
    made = layout(shapes)
    assert [p.name for p in made.parameters] == sorted(shapes)
    ends = [0]
    for parameter in made.parameters:
        assert parameter.offset == ends[-1]
        assert parameter.shape == shapes[parameter.name]
        ends.append(parameter.offset + int(np.prod(parameter.shape, dtype=int)))
    assert made.size == ends[-1]


def test_the_digest_of_a_layout():  # changing this changes every run id
    made = layout({"b": (2, 3), "a": (4,)})
    assert made.digest().hex() == "e2b09231877d15ca0a5eb7a9f6e77382"


def test_name_shape_and_boundaries_all_reach_the_digest():
    variants = [
        {"a": (6,)},
        {"a": (2, 3)},
        {"a": (3, 2)},
        {"b": (6,)},
        {"a": (3,), "b": (3,)},
        {"a": (2,), "b": (4,)},
    ]
    assert len({layout(shapes).digest() for shapes in variants}) == len(variants)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "at least one parameter"),
        ({"a": (3, 0)}, r"every dimension of a must be at least 1, got \(3, 0\)"),
        ({"a": (-1,)}, "every dimension of a"),
        ({"": (1,)}, "needs a name"),
        ({"a": (2**20, 2**20)}, "at most 549755813888 entries"),
    ],
)
def test_impossible_layouts_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        layout(shapes)


def test_split_gives_views_in_the_shapes_of_the_parameters():
    made = layout({"b": (2, 3), "a": (4,)})
    vector = np.arange(10, dtype=np.float32)
    views = made.split(vector)
    assert list(views) == ["a", "b"]
    assert views["b"].tolist() == [[4, 5, 6], [7, 8, 9]]
    views["a"][0] = 100
    assert vector[0] == 100
    with pytest.raises(ValueError, match="10 entries, got a vector of shape"):
        made.split(vector[:9])


def test_training_b_alone_takes_the_out_features():
    made = lora_layout(LINEAR, ["q_proj", "lm_head"], rank=4, train="B")
    assert [(p.name, p.shape) for p in made.parameters] == [
        ("lm_head.lora_B", (512, 4)),
        ("model.layers.0.self_attn.q_proj.lora_B", (64, 4)),
        ("model.layers.1.self_attn.q_proj.lora_B", (64, 4)),
    ]


def test_training_both_factors():
    made = lora_layout(LINEAR, ["mlp.up_proj"], rank=2, train="AB")
    assert [(p.name, p.shape) for p in made.parameters] == [
        ("model.layers.0.mlp.up_proj.lora_A", (2, 64)),
        ("model.layers.0.mlp.up_proj.lora_B", (192, 2)),
    ]


def test_a_base_without_linear_modules():
    with pytest.raises(
        ValueError, match="no linear module is named 'q_proj': there are none that can be adapted"
    ):
        lora_layout({}, ["q_proj"], 4, "B")


def test_a_head_is_laid_out_beside_the_factors_or_alone():
    head = Head(3, 8, has_bias=True)
    made = lora_layout(LINEAR, ["q_proj"], rank=4, train="B", head=head)
    without = lora_layout(LINEAR, ["q_proj"], rank=4, train="B")
    assert made.size == without.size + 3 * 8 + 3
    assert {p.name: p.shape for p in lora_layout(LINEAR, [], 4, "B", head).parameters} == {
        "head.bias": (3,),
        "head.weight": (3, 8),
    }
    assert lora_layout(LINEAR, [], 4, "B", Head(3, 8, has_bias=False)).size == 24
    with pytest.raises(ValueError, match="did you mean q_proj"):
        lora_layout(LINEAR, ["q_prj"], 4, "B", head)


def test_a_target_is_whole_names_only_and_may_repeat():
    assert lora_layout(LINEAR, ["q_proj", "q_proj"], 1, "B") == lora_layout(
        LINEAR, ["self_attn.q_proj"], 1, "B"
    )
    with pytest.raises(ValueError, match=r"no linear module is named 'proj'"):
        lora_layout(LINEAR, ["proj"], rank=1, train="B")


def test_an_unknown_target_is_met_with_near_ones():
    with pytest.raises(ValueError, match=r"named 'q_prj'; did you mean q_proj"):
        lora_layout(LINEAR, ["up_proj", "q_prj"], rank=4, train="B")


@pytest.mark.parametrize(
    ("targets", "rank", "train", "message"),
    [
        ([], 4, "B", "at least one module"),
        (["lm_head"], 0, "B", "rank"),
        (["lm_head"], 4, "A", 'train must be "B"'),
    ],
)
def test_other_adapters_are_refused(targets, rank, train, message):
    with pytest.raises(ValueError, match=message):
        lora_layout(LINEAR, targets, rank, train)


def test_the_frozen_a_is_uniform_and_follows_from_its_name():
    A = initial_lora_A((1, 2), 3, (4, 64))
    assert A.dtype == np.float32
    assert A.shape == (4, 64)
    words = reference.words((1, 2), Direction(INITIAL, 3), 256).astype(np.float64)
    exact = (np.floor(words / 256) * 2.0**-23 - 1) / 8  # 1/√64 is exact, so every step is
    assert np.array_equal(A.reshape(-1), exact)
    assert not np.array_equal(A, initial_lora_A((1, 2), 4, (4, 64)))
    many = initial_lora_A((1, 2), 0, (1000, 100))
    assert np.abs(many).max() <= 0.1
    assert many.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.01)


def test_the_frozen_a_in_hex():  # changing this breaks every run in the field
    assert (
        initial_lora_A((1, 2), 0, (2, 3)).astype("<f4").tobytes().hex()
        == "0c440e3f39b5ebbdcbfe4abe5f7d2dbee42099be65ce08bf"
    )


def test_the_base_digest_does_not_depend_on_chunks():
    whole = [("config.json", [b"{}"]), ("model.safetensors", [b"abcdef"])]
    parts = [("config.json", [b"{", b"", b"}"]), ("model.safetensors", iter([b"abc", b"def"]))]
    assert base_digest(whole) == base_digest(parts)
    assert (
        base_digest(whole) == "7f286ca850240b12375240244cdccae4"
    )  # changing this refuses every base in the field


def test_names_contents_and_boundaries_all_reach_the_base_digest():
    variants = [
        [("a", [b"bc"])],
        [("a", [b"cb"])],
        [("ab", [b"c"])],
        [("a", [b"b"]), ("c", [b""])],
        [("a", [b""]), ("b", [b"c"])],
    ]
    assert len({base_digest(files) for files in variants}) == len(variants)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "at least one file"),
        ([("b", [b""]), ("a", [b""])], "sorted by name"),
        ([("a", [b""]), ("a", [b""])], "distinct"),
        ([("a" * 65_536, [b""])], "65,535 bytes"),
    ],
)
def test_files_in_disorder_are_refused(files, message):
    with pytest.raises(ValueError, match=message):
        base_digest(files)
