"""The adapter: views of one vector, an unchanged base at the start, and an export that plain PEFT loads."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from node import embedded
from node.adapter import Adapter
from node.base import load_base
from node.data import Batch
from node.losses import mean_loss
from zo.initial import initial_weights
from zo.layout import initial_lora_A, lora_layout
from zo.weights import to_float

KEY = (17, 4)
TARGETS = ("q_proj", "v_proj", "down_proj")
RANK = 4


def adapt(train, **changes):
    base = load_base(embedded.path(), threads=1)
    settings = {"key": KEY, "targets": TARGETS, "rank": RANK, "alpha": 8, "train": train} | changes
    return base, Adapter(base, **settings)


@pytest.fixture(scope="module")
def tokens():
    return Batch(np.random.default_rng(0).integers(2, 500, (3, 32)))


@pytest.fixture(scope="module", params=["B", "AB"])
def adapted(request):
    return (*adapt(request.param), request.param)


def some_weights(size):
    return np.random.default_rng(1).integers(-(2**24), 2**24, size).astype(np.int32)


def test_the_layout_is_that_of_the_base_and_the_settings(adapted):
    base, adapter, train = adapted
    expected = lora_layout(base.linear_shapes, TARGETS, RANK, train)
    assert adapter.layout == expected
    assert adapter.layout.digest() == expected.digest()
    assert adapter.size == expected.size


def test_every_trained_tensor_is_a_view_of_the_vector(adapted):
    _, adapter, _ = adapted
    view = np.random.default_rng(2).normal(size=adapter.size).astype(np.float32)
    adapter.load(view)
    for name, values in adapter.layout.split(view).items():
        assert np.array_equal(tensor(adapter, name).numpy(), values), name


def test_frozen_and_first_values_are_the_generated_ones(adapted):
    base, adapter, train = adapted
    adapter.load(to_float(initial_weights(adapter.layout, KEY, train)))
    modules = sorted({name.rpartition(".")[0] for name in adapter.layout.split(np.zeros(adapter.size, "f4"))})
    assert len(modules) == 3 * base.model.config.num_hidden_layers
    for index, module in enumerate(modules):
        A = initial_lora_A(KEY, index, (RANK, base.linear_shapes[module][1]))
        found = tensor(adapter, f"{module}.lora_A").numpy()
        # A trained A lies on the grid of the weights: within half of 2^-28.
        assert np.abs(found - A).max() <= (0 if train == "B" else 2.0**-29)
        assert not tensor(adapter, f"{module}.lora_B").any()


def test_nothing_wants_a_gradient_and_nothing_drops_out(adapted):
    _, adapter, _ = adapted
    assert not any(p.requires_grad for p in adapter.model.parameters())
    assert not any(module.training for module in adapter.model.modules())
    assert not [m for m in adapter.model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]


def test_at_the_start_the_model_computes_the_base(adapted, tokens):
    _, adapter, train = adapted
    adapter.load(to_float(initial_weights(adapter.layout, KEY, train)))
    bare = AutoModelForCausalLM.from_pretrained(embedded.path(), dtype=torch.float32).eval()
    assert mean_loss(adapter.model, tokens) == mean_loss(bare, tokens)


def test_loading_takes_effect_and_can_be_taken_back(adapted, tokens):
    _, adapter, train = adapted
    start = to_float(initial_weights(adapter.layout, KEY, train))
    adapter.load(start)
    before = mean_loss(adapter.model, tokens)
    adapter.load(to_float(some_weights(adapter.size)))
    assert mean_loss(adapter.model, tokens) != before
    adapter.load(start)
    assert mean_loss(adapter.model, tokens) == before


def test_plain_peft_loads_the_export_with_the_same_loss(adapted, tokens, tmp_path):
    _, adapter, _ = adapted
    weights = some_weights(adapter.size)
    adapter.load(to_float(weights))
    loss = mean_loss(adapter.model, tokens)
    adapter.export(tmp_path / "out" / "adapter", weights, "owner/name")
    base = AutoModelForCausalLM.from_pretrained(embedded.path(), dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    assert mean_loss(reloaded, tokens) == loss
    assert reloaded.peft_config["default"].base_model_name_or_path == "owner/name"
    merged = reloaded.merge_and_unload()
    assert mean_loss(merged, tokens) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("train", "targets"),
    [("B", TARGETS), ("AB", TARGETS), ("AB", ("lm_head",)), ("B", ("q_proj", "lm_head"))],
)
def test_a_merged_export_is_a_plain_model_with_the_same_loss(train, targets, tokens, tmp_path):
    """Also where the output layer is adapted, which is the input embedding in the base, and no more in the export."""
    base = load_base(embedded.path(), threads=1)
    adapter = Adapter(base, key=KEY, targets=targets, rank=2, alpha=4, train=train)
    weights = some_weights(adapter.size)
    adapter.load(to_float(weights))
    loss = mean_loss(adapter.model, tokens)
    adapter.export_merged(tmp_path, weights, base.tokenizer)
    merged = load_base(tmp_path, threads=1)
    assert not [name for name, _ in merged.model.named_parameters() if "lora" in name]
    assert mean_loss(merged.model, tokens) == pytest.approx(loss, rel=1e-5)
    assert merged.tokenizer_digest == base.tokenizer_digest or merged.tokenizer("a b") == base.tokenizer(
        "a b"
    )


@pytest.mark.parametrize("said", [True, False, None])
def test_a_merged_export_keeps_keys_and_values_as_the_base_does(said, tmp_path):
    """They are not kept here, where no text is generated; what is exported goes elsewhere."""
    base = load_base(embedded.path(), threads=1)
    adapter = Adapter(replace(base, use_cache=said), key=KEY, targets=TARGETS, rank=2, alpha=4, train="B")
    adapter.export_merged(tmp_path, some_weights(adapter.size), base.tokenizer)
    assert base.use_cache is True
    assert json.loads((tmp_path / "config.json").read_text()).get("use_cache") is said


def test_an_export_holds_both_factors_and_is_the_same_every_time(adapted, tmp_path):
    _, adapter, _ = adapted
    weights = some_weights(adapter.size)
    adapter.export(tmp_path / "a", weights, "base")
    adapter.export(tmp_path / "b", weights, "base")
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert {name.split(".")[-2] for name in tensors} == {"lora_A", "lora_B"}
    assert config["target_modules"] == sorted(TARGETS)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (RANK, 8, 0.0)


@pytest.mark.parametrize(
    "view", [np.zeros(3, np.float32), np.zeros((1, 7), np.float32)], ids=["short", "two dimensions"]
)
def test_a_view_of_another_shape_is_refused(adapted, view):
    _, adapter, _ = adapted
    with pytest.raises(
        ValueError, match=rf"takes float32 of shape \({adapter.size},\), got float32 of shape"
    ):
        adapter.load(view)


def test_a_view_of_another_type_is_refused(adapted):
    _, adapter, _ = adapted
    with pytest.raises(ValueError, match="got int32 of shape"):
        adapter.load(np.zeros(adapter.size, np.int32))


def test_an_export_of_other_weights_is_refused(adapted, tmp_path):
    _, adapter, _ = adapted
    with pytest.raises(ValueError, match=r"got shape \(5,\)"):
        adapter.export(tmp_path / "out", np.zeros(5, np.int32), "base")
    assert not (tmp_path / "out").exists()


def test_a_base_takes_one_adapter(adapted):
    base, _, train = adapted
    with pytest.raises(ValueError, match="has an adapter already; load it again"):
        Adapter(base, key=KEY, targets=TARGETS, rank=RANK, alpha=8, train=train)


def test_an_unknown_target_is_named_with_its_near_matches():
    with pytest.raises(ValueError, match=r"'q_prj'; did you mean q_proj"):
        adapt("B", targets=("q_prj",))


def test_another_run_has_other_frozen_values():
    _, one = adapt("B")
    _, other = adapt("B", key=(17, 5))
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert not torch.equal(tensor(one, name), tensor(other, name))


def tensor(adapter: Adapter, name: str) -> torch.Tensor:
    module, _, factor = name.rpartition(".")
    return getattr(adapter.model.get_submodule(module), factor)["default"].weight
