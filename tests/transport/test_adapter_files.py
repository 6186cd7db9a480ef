"""An adapter as PEFT writes it, read without torch: its values by the run's names, or a reason why not."""

import json

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from transport.adapter_files import AdapterFilesError, digest, read_start
from transport.base_files import linear_shapes, tensor_shapes
from zo.layout import HEAD_BIAS, HEAD_WEIGHT, Head, base_digest

HEAD = Head(2, 32, has_bias=True)


@pytest.fixture(scope="module")
def shapes(encoder):
    return linear_shapes(tensor_shapes(encoder))


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    """A classifier's adapter, with random factors."""
    folder = tmp_path_factory.mktemp("adapter")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    torch.manual_seed(1)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=3,
        lora_alpha=6,
        target_modules=["query", "output.dense"],
        init_lora_weights=False,
    )
    get_peft_model(base, config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_tensors(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_factors_and_head_are_named_as_in_the_layout(saved, shapes):
    start = read_start(saved, shapes, HEAD)
    assert (start.factors.rank, start.factors.alpha) == (3, 6)
    assert start.factors.targets == ("output.dense", "query")
    tensors = load_file(saved / "adapter_model.safetensors")
    expected = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix("base_model.model.").removesuffix(".weight")
        if "lora" in name:
            expected[inner.removeprefix("bert.")] = tensor
    expected[HEAD_WEIGHT] = tensors["base_model.model.classifier.weight"]
    expected[HEAD_BIAS] = tensors["base_model.model.classifier.bias"]
    assert start.values.keys() == expected.keys()
    assert all(np.array_equal(start.values[name], expected[name]) for name in expected)
    assert start.beside_head == {}


def test_the_digest_is_over_configuration_and_tensors(saved, folder):
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert digest(saved) == base_digest((name, [(saved / name).read_bytes()]) for name in files)
    (folder / "README.md").write_text("a card")
    assert digest(folder) == digest(saved)
    change(folder, r=4)
    assert digest(folder) != digest(saved)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float64, 24)])
def test_other_kinds_of_floats_are_read(folder, shapes, dtype, bits):
    path = folder / "adapter_model.safetensors"
    tensors = {name: torch.from_numpy(tensor).to(dtype) for name, tensor in load_file(path).items()}
    before = read_start(folder, shapes, HEAD).values
    save_torch(tensors, path)
    for name, values in read_start(folder, shapes, HEAD).values.items():
        assert values.dtype == np.float32
        assert np.allclose(values, before[name], rtol=2.0**-bits, atol=1e-7)


def test_rank_stabilised_scaling_becomes_a_larger_alpha(folder, shapes):
    change(folder, use_rslora=True)
    assert read_start(folder, shapes, HEAD).factors.alpha == pytest.approx(6 * 3**0.5)


@pytest.mark.parametrize("begun", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_factors_that_began_without_a_change_of_the_base_are_read(folder, shapes, begun):
    before = read_start(folder, shapes, HEAD).values
    change(folder, init_lora_weights=begun)
    assert read_start(folder, shapes, HEAD).values.keys() == before.keys()


def test_what_lies_beside_the_head_is_kept_by_its_path(folder, shapes):
    change_tensors(folder, lambda tensors: tensors.update({
        "base_model.model.bert.pooler.dense.weight": np.eye(32, dtype=np.float32)
    }))  # fmt: skip
    start = read_start(folder, shapes, HEAD)
    assert list(start.beside_head) == ["bert.pooler.dense.weight"]
    assert HEAD_WEIGHT in start.values


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "is of kind IA3; a run starts from LORA"),
        ({"use_dora": True}, "has use_dora = True, which a run has no form for"),
        ({"rank_pattern": {"query": 8}}, r"has rank_pattern = \{'query': 8\}, which a run has no form for"),
        ({"kasa_config": {"svd": True}}, "has kasa_config = .*, which a run has no form for"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': it belongs to a base that PEFT changes"),
        ({"init_lora_weights": "olora"}, "Save it as plain LoRA"),
        ({"init_lora_weights": "loftq"}, "or start from the model that it is merged into"),
        ({"bias": "all"}, "has bias = 'all'; a run trains no biases"),
        ({"r": "3"}, "has r = '3', expected a number above 0"),
        ({"r": 0}, "has r = 0, expected a number above 0"),
        ({"lora_alpha": float("nan")}, "has lora_alpha = nan, expected a number above 0"),
        ({"lora_alpha": None}, "has lora_alpha = None, expected a number above 0"),
        ({"r": 5}, r"is not of this base: .*lora_A.weight is of shape \(3, 32\), expected \(5, 32\)"),
    ],
)
def test_what_a_run_has_no_form_for_is_refused(folder, shapes, settings, words):
    change(folder, **settings)
    with pytest.raises(AdapterFilesError, match=words):
        read_start(folder, shapes, HEAD)


@pytest.mark.parametrize("content", ["{", "[]", "7", "\xff"])
def test_a_broken_configuration(folder, shapes, content):
    (folder / "adapter_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(AdapterFilesError, match=r"adapter_config\.json (cannot be read|is of kind)"):
        read_start(folder, shapes, HEAD)


def lose_half(tensors):
    del tensors["base_model.model.bert.encoder.layer.1.output.dense.lora_B.weight"]


def add_module(tensors):
    tensors["base_model.model.bert.encoder.layer.7.output.dense.lora_B.weight"] = np.zeros(
        (32, 3), np.float32
    )


def keep_nothing(tensors):
    tensors.clear()


def make_whole(tensors):
    for name in list(tensors):
        tensors[name] = tensors[name].astype(np.int8)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lose_half, r"has one factor of encoder\.layer\.1\.output\.dense without the other"),
        (add_module, r"adapts bert\.encoder\.layer\.7\.output\.dense, which this base does not have"),
        (keep_nothing, "holds no LoRA factors"),
        (make_whole, "is of type I8, expected F64, F32, F16 or BF16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, shapes, edit, words):
    change_tensors(folder, edit)
    with pytest.raises(AdapterFilesError, match=words):
        read_start(folder, shapes, HEAD)


def test_a_head_that_is_not_the_runs_is_refused(saved, shapes):
    with pytest.raises(
        AdapterFilesError, match=r"holds classifier\.bias, which a run without a head does not train"
    ):
        read_start(saved, shapes, None)
    with pytest.raises(
        AdapterFilesError, match=r"holds no head of 3 labels, but classifier\.bias; name the labels"
    ):
        read_start(saved, shapes, Head(3, 32, has_bias=True))
    with pytest.raises(AdapterFilesError, match="its head has a bias, but this base's has none"):
        read_start(saved, shapes, Head(2, 32, has_bias=False))


def rename_head(tensors):
    tensors["odd"] = tensors.pop("base_model.model.classifier.weight")


def test_a_tensor_as_large_as_a_head_without_the_name_of_one_is_none(folder, shapes):
    change_tensors(folder, rename_head)
    with pytest.raises(AdapterFilesError, match="holds no head of 2 labels"):
        read_start(folder, shapes, HEAD)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder, shapes, name):
    (folder / name).unlink()
    with pytest.raises(AdapterFilesError, match=f"has no {name}; an adapter to start from is a directory as"):
        read_start(folder, shapes, HEAD)


def test_broken_tensors(folder, shapes):
    (folder / "adapter_model.safetensors").write_bytes(b"hello")
    with pytest.raises(AdapterFilesError, match=r"adapter_model\.safetensors is not a safetensors file"):
        read_start(folder, shapes, HEAD)
