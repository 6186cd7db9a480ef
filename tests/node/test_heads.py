"""The head of a classifier: found in any architecture, its surroundings neutral, and exported for plain PEFT."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from coordinator.trained import default_targets, head_of
from node.adapter import Adapter
from node.base import BaseError, load_base
from node.heads import find_head, padding
from node.language import open_model
from node.quantization import Form
from transport.base_files import configuration, linear_shapes, tensor_shapes
from zo.initial import initial_weights
from zo.layout import HEAD_BIAS, HEAD_WEIGHT, Head, initial_lora_A, lora_layout
from zo.manifest import Task
from zo.weights import to_float

KEY = (17, 4)
LABELS = ("no", "yes")
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
MARKS = {"bos_token_id": 0, "eos_token_id": 1}
DISTIL = {"vocab_size": 1024, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
GPT2 = {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | MARKS
MODELS = {
    "BertModel": SMALL,
    "BertForMaskedLM": SMALL,
    "BertForSequenceClassification": SMALL | {"num_labels": 3},
    "DistilBertModel": DISTIL | {"max_position_embeddings": 64},
    "RobertaForMaskedLM": SMALL,
    "ElectraModel": SMALL | {"embedding_size": 16},
    "ModernBertModel": SMALL | {"pad_token_id": 0, "global_attn_every_n_layers": 1},
    "DebertaV2Model": SMALL,
    "AlbertModel": SMALL,
    "LlamaForCausalLM": SMALL,
    "GPTNeoXForCausalLM": SMALL,
    "GPT2LMHeadModel": GPT2,
}
SAVED = {
    "BertModel": ("classifier",),
    "BertForMaskedLM": ("bert.pooler", "classifier"),
    "DistilBertModel": ("classifier", "pre_classifier"),
    "RobertaForMaskedLM": ("classifier",),
    "LlamaForCausalLM": ("score",),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, save_model, tmp_path_factory):
    """The name of a class, and the directory of a small model of it."""
    model_class = getattr(transformers, request.param)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**MODELS[request.param]))
    return request.param, save_model(model, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def batch():
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 1000, (3, 20)))
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    return ids, mask


def logits(model, batch, padding):
    ids, mask = batch
    with torch.inference_mode():
        return model(input_ids=ids.where(mask > 0, padding), attention_mask=mask).logits


def some_weights(size):
    return np.random.default_rng(1).integers(-(2**26), 2**26, size).astype(np.int32)


@pytest.mark.parametrize("alone", [False, True], ids=["with LoRA", "alone"])
def test_coordinator_node_and_plain_peft_agree_on_any_architecture(saved, alone, batch, tmp_path):
    name, folder = saved
    tensors = tensor_shapes(folder)
    shapes = linear_shapes(tensors, configuration(folder))
    targets = () if alone else tuple(default_targets(shapes))
    read = lora_layout(shapes, targets, 2, "AB", head_of(configuration(folder), tensors, 2))

    base = load_base(folder, threads=1, labels=LABELS)
    adapter = Adapter(base, key=KEY, targets=targets, rank=2, alpha=4, train="AB")
    assert adapter.layout == read
    assert base.head.saved == SAVED.get(name, base.head.saved)
    weights = some_weights(adapter.size)
    adapter.load(to_float(weights))
    ours = logits(adapter.model, batch, base.padding)
    assert ours.std() > 1e-3
    adapter.export(tmp_path / "adapter", weights, "owner/name")

    plain = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, ignore_mismatched_sizes=True
    )
    plain.config.pad_token_id = base.padding
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, batch, base.padding), ours)
    merged = loaded.merge_and_unload().eval()
    torch.testing.assert_close(logits(merged, batch, base.padding), ours, rtol=1e-4, atol=1e-5)

    adapter.export_merged(tmp_path / "merged", weights, base.tokenizer)
    again = load_base(tmp_path / "merged", threads=1, labels=LABELS)
    assert again.head.is_in_files
    assert again.model.config.id2label == {0: "no", 1: "yes"}
    torch.testing.assert_close(logits(again.model, batch, base.padding), ours, rtol=1e-4, atol=1e-5)


def test_two_nodes_load_the_same_model_although_files_lack_the_head(encoder, batch):
    first, second = (load_base(encoder, threads=1, labels=LABELS) for _ in range(2))
    assert not first.head.is_in_files
    start = []
    for base in (first, second):
        adapter = Adapter(base, key=KEY, targets=("query",), rank=2, alpha=4, train="B")
        adapter.load(to_float(initial_weights(adapter.layout, KEY, "B")))
        start.append(logits(adapter.model, batch, base.padding))
    assert torch.equal(*start)


def test_no_adapter_without_a_head_is_measured_on_a_base_without_one(encoder, tmp_path):
    task = Task(kind="head", labels=LABELS)
    for name, kind in (("with", "SEQ_CLS"), ("without", None)):
        model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
        config = LoraConfig(r=2, target_modules=["query"], task_type=kind)
        get_peft_model(model, config).save_pretrained(tmp_path / name)
    form = Form("none", (), "float32", "cpu")
    open_model(str(encoder), [tmp_path / "with"], task, threads=1, form=form)
    tensors = load_file(tmp_path / "without" / "adapter_model.safetensors")
    (tmp_path / "pickled").mkdir()
    shutil.copy(tmp_path / "without" / "adapter_config.json", tmp_path / "pickled")
    torch.save(tensors, tmp_path / "pickled" / "adapter_model.bin")
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    on_head = LoraConfig(r=2, target_modules=["classifier"])  # factors of a head that is not there
    get_peft_model(model, on_head).save_pretrained(tmp_path / "factors")
    with_head, *others = (tmp_path / name for name in ("with", "without", "pickled", "factors"))
    for adapters in (*([each] for each in others), [with_head, others[0]]):
        with pytest.raises(
            BaseError, match=rf"has no classification head of 2 labels, nor has {adapters[-1]}; name"
        ):
            open_model(str(encoder), adapters, task, threads=1, form=form)
    with pytest.raises(BaseError, match="has no classification head of 2 labels; name an adapter"):
        open_model(str(encoder), [], task, threads=1, form=form)


def test_a_head_starts_as_a_small_generated_layer():
    layout = lora_layout({"layers.0.q": (8, 4)}, ["q"], 2, "AB", Head(3, 8, has_bias=True))
    values = layout.split(to_float(initial_weights(layout, KEY, "AB")))
    assert not values[HEAD_BIAS].any()
    assert np.abs(values[HEAD_WEIGHT] - initial_lora_A(KEY, 0xFFFF_FFFF, (3, 8))).max() <= 2.0**-29
    assert 0.1 < np.abs(values[HEAD_WEIGHT]).max() <= 8**-0.5


def test_what_lies_before_the_head_and_is_lacking_is_the_identity(save_model, tmp_path):
    config = transformers.BertConfig(**SMALL)
    folder = save_model(transformers.BertModel(config, add_pooling_layer=False), tmp_path / "base")
    base = load_base(folder, threads=1, labels=LABELS)
    pooler = base.model.get_submodule("bert.pooler.dense")
    assert torch.equal(pooler.weight, torch.eye(32))
    assert not pooler.bias.any()
    assert "pooler.dense" not in base.linear_shapes, "the coordinator does not know of it"


def test_a_hole_in_the_layers_is_not_filled(encoder, tmp_path, save_model):
    from safetensors.torch import load_file, save_file

    tensors = load_file(encoder / "model.safetensors")
    del tensors["encoder.layer.1.attention.self.query.weight"]
    for file in encoder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"lacks 1 of its tensors, the first is bert\.encoder\.layer\.1"):
        load_base(tmp_path, threads=1, labels=LABELS)


def test_a_model_without_a_linear_head_is_refused(encoder):
    base = load_base(encoder, threads=1, labels=LABELS)
    assert find_head(base.model, 2)[0] == "classifier"
    assert find_head(base.model, 7) is None


def test_a_class_that_cannot_classify_is_refused(save_model, tmp_path):
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=32)
    folder = save_model(transformers.ViTModel(config), tmp_path / "vit")
    with pytest.raises(BaseError, match="cannot be loaded: Unrecognized configuration class"):
        load_base(folder, threads=1, labels=LABELS)


class Tokens:
    def __init__(self, pad, end):
        self.pad_token_id, self.eos_token_id = pad, end


@pytest.mark.parametrize(
    ("configured", "pad", "end", "expected"),
    [(5, 6, 7, 5), (None, 6, 7, 6), (None, None, 7, 7), (-1, None, 7, 7)],
)
def test_rows_are_padded_with_what_the_model_knows_or_the_tokenizer(configured, pad, end, expected):
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL))
    model.config.pad_token_id = configured
    assert padding(model, Tokens(pad, end)) == model.config.pad_token_id == expected


def test_a_tokenizer_without_padding_is_refused_where_the_end_of_a_row_is_found_by_it():
    causal = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL, pad_token_id=None))
    with pytest.raises(ValueError, match="neither a padding token nor an end-of-text token"):
        padding(causal, Tokens(None, None))
    config = transformers.BertConfig(**SMALL, pad_token_id=None)
    assert padding(transformers.BertForSequenceClassification(config), Tokens(None, None)) == 0


def test_positions_behind_the_padding_are_not_counted(save_model, tmp_path):
    config = transformers.RobertaConfig(**SMALL, pad_token_id=1)
    folder = save_model(transformers.RobertaModel(config), tmp_path / "base")
    base = load_base(folder, threads=1, labels=LABELS)
    assert base.max_sequence_length == 62
    ids = torch.full((1, 62), 9)
    assert logits(base.model, (ids, torch.ones_like(ids)), 1).isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_encoder_keeps_its_head(encoder, kind, save_model, tmp_path):
    config = transformers.BertConfig(**SMALL | {"hidden_size": 64})
    folder = save_model(transformers.BertModel(config), tmp_path / "base")
    base = load_base(folder, threads=1, quantize=kind, labels=LABELS)
    assert type(base.model.get_submodule("classifier")) is torch.nn.Linear
    assert type(base.model.get_submodule("bert.pooler.dense")) is torch.nn.Linear
    inside = base.model.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert type(inside).__name__ == {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[kind]
    adapter = Adapter(base, key=KEY, targets=("query",), rank=2, alpha=4, train="AB")
    adapter.load(to_float(some_weights(adapter.size)))
    ids = torch.full((1, 8), 9)
    assert logits(adapter.model, (ids, torch.ones_like(ids)), base.padding).isfinite().all()


def test_an_adapter_of_the_head_alone_names_no_module(encoder, tmp_path):
    base = load_base(encoder, threads=1, labels=LABELS)
    adapter = Adapter(base, key=KEY, targets=(), rank=2, alpha=4, train="B")
    assert [parameter.name for parameter in adapter.layout.parameters] == [HEAD_BIAS, HEAD_WEIGHT]
    adapter.export(tmp_path, some_weights(adapter.size), "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
