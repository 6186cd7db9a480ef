"""Quantised bases: what is quantised and what never is, what a node may choose, what is refused before a forward."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from node import embedded
from node.adapter import Adapter
from node.base import BaseError, load_base
from node.data import Batch
from node.losses import mean_loss
from node.probe import Probe
from node.quantization import Form, QuantizationError, agreed
from transport import base_files
from zo.codes import NO_VOTE
from zo.layout import lora_layout
from zo.weights import to_float

KEY = (17, 4)
TARGETS = ("q_proj", "up_proj")
QUANTISED = ("int8", "nf4", "fp4")
CLASS = {"int8": "Linear8bitLt", "nf4": "Linear4bit", "fp4": "Linear4bit"}
assets = pytest.mark.assets


def make_adapter(kind, train="AB", **options):
    base = load_base(embedded.path(), threads=1, quantize=kind, **options)
    return base, Adapter(base, key=KEY, targets=TARGETS, rank=2, alpha=4, train=train)


@pytest.fixture(scope="module")
def plain():
    return make_adapter("none")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(2, 500, (4, 24))


@pytest.mark.parametrize("kind", QUANTISED)
def test_layers_are_quantised_embeddings_and_head_are_not(kind):
    base = load_base(embedded.path(), threads=1, quantize=kind)
    assert base.quantization == kind
    kinds = {name: type(base.model.get_submodule(name)).__name__ for name in base.linear_shapes}
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {CLASS[kind]}
    assert base.model.get_input_embeddings().weight.dtype == torch.float32
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not any(module.training for module in base.model.modules())


@pytest.mark.parametrize("kind", QUANTISED)
def test_digests_shapes_layout_and_adapter_are_those_of_the_unquantised_base(kind, plain):
    expected_base, expected = plain
    base, adapter = make_adapter(kind)
    assert (base.digest, base.tokenizer_digest) == (expected_base.digest, expected_base.tokenizer_digest)
    assert base.linear_shapes == expected_base.linear_shapes
    assert adapter.layout == expected.layout
    ours, theirs = (
        {name: tensor for name, tensor in each.model.named_parameters() if "lora_" in name}
        for each in (adapter, expected)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, theirs[name])


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_loss_is_near_the_unquantised_one_and_the_same_every_time(kind, plain, tokens):
    _, adapter = make_adapter(kind)
    loss = mean_loss(adapter.model, Batch(tokens))
    assert loss == mean_loss(adapter.model, Batch(tokens))
    expected = mean_loss(plain[1].model, Batch(tokens))
    assert loss == pytest.approx(expected, rel=0.05)
    assert loss != expected


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_probe_votes_and_follows_the_unquantised_slope(kind, plain, windows):
    def codes(adapter):
        probe = Probe(adapter, windows, key=KEY, epsilon=0.01, directions=24, batch_size=4, seed=1)
        return probe.probe(np.zeros(adapter.size, np.int32), 0, 3, -8).codes.astype(float)

    _, adapter = make_adapter(kind, train="B")
    _, unquantised = make_adapter("none", train="B")
    ours, theirs = codes(adapter), codes(unquantised)
    assert NO_VOTE not in ours
    assert np.corrcoef(ours, theirs)[0, 1] > 0.7


@pytest.fixture(scope="module")
def windows():
    from node.data import Windows

    drawn = np.random.default_rng(3).integers(2, 500, (8, 24)).astype(np.int32)
    return Windows(tokens=drawn, num_texts=1, num_tokens=drawn.size, num_dropped=0)


def test_layers_that_are_skipped_stay_as_they_are():
    base = load_base(embedded.path(), threads=1, quantize="nf4", skip_quantize=["0.mlp.gate_proj", "q_proj"])
    kinds = {name: type(base.model.get_submodule(name)).__name__ for name in base.linear_shapes}
    plain = {name for name, kind in kinds.items() if kind == "Linear"}
    queries = {name for name in kinds if name.endswith("q_proj")}
    assert plain == {"lm_head", "model.layers.0.mlp.gate_proj", *queries}


def test_an_unknown_layer_to_skip_is_said():
    with pytest.raises(BaseError, match=r"'gate_prj'; did you mean gate_proj"):
        load_base(embedded.path(), quantize="nf4", skip_quantize=["gate_prj"])


def test_files_that_are_quantised_already_are_refused(tmp_path):
    base = load_base(embedded.path(), threads=1, quantize="nf4")
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BaseError, match="quantised already; use --quantize none"):
        load_base(tmp_path, quantize="int8")


@assets
@pytest.mark.skipif("ZO_TEST_ASSETS" not in os.environ, reason="ZO_TEST_ASSETS is not set")
def test_shapes_that_do_not_fit_are_found_before_the_base_is_loaded(monkeypatch):
    import transformers

    folder = Path(os.environ["ZO_TEST_ASSETS"]) / "models" / "stories260K"
    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
        with pytest.raises(BaseError, match="has 172 inputs; 4-bit on CPU needs a multiple of 64") as caught:
            load_base(folder, quantize="nf4")
    assert str(caught.value).endswith(
        "--skip-quantize down_proj --skip-quantize gate_proj --skip-quantize up_proj."
    )
    skip = ["down_proj", "gate_proj", "up_proj"]
    base = load_base(folder, threads=1, quantize="nf4", skip_quantize=skip)
    assert np.isfinite(mean_loss(base.model, Batch(np.ones((1, 8), np.int64))))
    base = load_base(folder, threads=1, quantize="int8")
    assert np.isfinite(mean_loss(base.model, Batch(np.ones((1, 8), np.int64))))


def test_a_node_takes_what_the_run_says(make_manifest):
    base = make_manifest(quantize="nf4", skip_quantize=("gate_proj",)).base
    wanted = Form("nf4", ("gate_proj",), "float32", "auto")
    assert agreed(base, None, None, None, "auto") == wanted
    assert agreed(base, "nf4", None, "float32", "auto") == wanted
    assert agreed(base, "nf4", ["gate_proj"], None, "auto") == wanted
    assert agreed(make_manifest(dtype="bfloat16").base, None, None, None, "cpu") == Form(dtype="bfloat16")


@pytest.mark.parametrize(("kind", "skip"), [("int8", None), ("none", None), (None, ["up_proj"]), (None, [])])
def test_a_node_may_not_choose_unless_the_run_allows_it(make_manifest, kind, skip):
    settings = {"quantize": "nf4", "skip_quantize": ("gate_proj",)}
    with pytest.raises(
        QuantizationError,
        match=r"quantised as nf4 without gate_proj, and compute it in float32\. Join without --quantize",
    ):
        agreed(make_manifest(**settings).base, kind, skip, None, "cpu")
    free = make_manifest(**settings, any_quantization=True).base
    expected_skip = () if kind == "none" else ("gate_proj",) if skip is None else tuple(skip)
    assert agreed(free, kind, skip, None, "cpu") == Form(kind or "nf4", expected_skip)


def test_a_node_may_not_compute_otherwise_unless_the_run_allows_it(make_manifest):
    with pytest.raises(QuantizationError, match="compute it in float32"):
        agreed(make_manifest().base, None, None, "bfloat16", "cpu")
    free = make_manifest(any_quantization=True).base
    assert agreed(free, None, None, "float16", "cuda:1") == Form(dtype="float16", device="cuda:1")


def test_int8_does_not_speak_at_every_layer(tokens, caplog):
    base = load_base(embedded.path(), threads=1, quantize="int8")
    with caplog.at_level(logging.DEBUG):
        mean_loss(base.model, Batch(tokens))
    assert "MatMul8bitLt" not in caplog.text
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert "something else" in caplog.text


def test_a_command_with_a_quantised_base_prints_its_result_alone(tmp_path):
    (tmp_path / "data.txt").write_text("Return the absolute value of the number. " * 20)
    command = [sys.executable, "-m", "node.cli", "evaluate", "--data", str(tmp_path / "data.txt")]
    options = ["--quantize", "int8", "--sequence-length", "16", "--threads", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("loss ")
    assert done.stderr.startswith("data: 1 text, ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["none", *QUANTISED])
def test_layers_of_gpt2_are_adapted_and_quantised_too(kind, save_model, tmp_path):
    sizes = {"vocab_size": 1024, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))
    folder = save_model(model, tmp_path / "base")
    base = load_base(folder, threads=1, quantize=kind)
    files = base_files.tensor_shapes(folder), base_files.configuration(folder)
    read = lora_layout(base_files.linear_shapes(*files), ("c_attn", "c_proj"), 2, "AB")
    adapter = Adapter(base, key=(1, 2), targets=("c_attn", "c_proj"), rank=2, alpha=4, train="AB")
    assert adapter.layout == read
    batch = Batch(np.random.default_rng(0).integers(2, 1000, (2, 16)))
    before = mean_loss(adapter.model, batch)
    weights = np.random.default_rng(1).integers(-(2**26), 2**26, adapter.size).astype(np.int32)
    adapter.load(to_float(weights))
    loss = mean_loss(adapter.model, batch)
    assert abs(loss - before) > 1e-3
    adapter.export(tmp_path / "adapter", weights, "base")
    again = PeftModel.from_pretrained(load_base(folder, quantize=kind).model, tmp_path / "adapter").eval()
    assert mean_loss(again, batch) == pytest.approx(loss, rel=1e-6)
