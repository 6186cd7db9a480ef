"""A run that starts from a PEFT adapter: the same model, to the rounding of the weights, and refusals."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from node.adapter import Adapter
from node.base import BaseError, load_base
from node.start import check_start, start_of
from transport.adapter_files import digest
from zo.initial import initial_weights
from zo.weights import to_float

KEY = (17, 4)
SMALL = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES = (
    ("BertModel", "head"),
    ("RobertaForMaskedLM", "head"),
    ("LlamaForCausalLM", "head"),
    ("LlamaForCausalLM", "text"),
)


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def made(request, save_model, tmp_path_factory):
    """A base, an adapter that PEFT made for it, and its labels."""
    kind, task = request.param
    is_head = task == "head"
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    config = model_class.config_class(
        **SMALL, intermediate_size=64, max_position_embeddings=64, pad_token_id=1
    )
    base = save_model(model_class(config), tmp_path_factory.mktemp("base"))
    auto = transformers.AutoModelForSequenceClassification if is_head else transformers.AutoModelForCausalLM
    plain = auto.from_pretrained(base, num_labels=3) if is_head else auto.from_pretrained(base)
    targets = ["q_proj", "down_proj"] if kind == "LlamaForCausalLM" else ["query", "intermediate.dense"]
    task = "SEQ_CLS" if is_head else "CAUSAL_LM"
    more = {"modules_to_save": ["pooler"]} if kind == "BertModel" else {}
    config = LoraConfig(
        task_type=task, r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, **more
    )
    adapter = tmp_path_factory.mktemp("adapter")
    tuned = get_peft_model(plain, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(adapter)
    return base, adapter, ("a", "b", "c") if is_head else None


def logits(model):
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 1000, (3, 20)))
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def manifest_of(make_manifest, folder, labels):
    task = {"kind": "head", "labels": labels} if labels else {}
    return make_manifest(start=digest(folder), **task)


@pytest.mark.parametrize("train", ["B", "AB"])
def test_the_model_of_round_0_is_the_adapters(made, train, make_manifest, tmp_path):
    folder, adapter, labels = made
    base = load_base(folder, threads=1, labels=labels)
    start = start_of(manifest_of(make_manifest, adapter, labels), adapter, base)
    bare = logits(base.model)
    ours = Adapter(base, key=KEY, **asdict(start.factors), train=train, start=start)
    weights = initial_weights(ours.layout, KEY, train, start.values)
    ours.load(to_float(weights))

    auto = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModelForCausalLM
    plain = auto.from_pretrained(folder, num_labels=3) if labels else auto.from_pretrained(folder)
    expected = logits(PeftModel.from_pretrained(plain, adapter).eval())
    torch.testing.assert_close(logits(ours.model), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(bare, expected, atol=1e-3)

    ours.export(tmp_path / "out", weights, str(folder))
    plain = auto.from_pretrained(folder, num_labels=3) if labels else auto.from_pretrained(folder)
    exported = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    assert torch.equal(logits(exported), logits(ours.model))


def test_a_node_without_the_runs_adapter_is_told(made, make_manifest, tmp_path):
    _, adapter, labels = made
    manifest = manifest_of(make_manifest, adapter, labels)
    check_start(manifest, adapter)
    with pytest.raises(
        BaseError, match=f"starts from a PEFT adapter, of digest {digest(adapter)}; name its directory"
    ):
        check_start(manifest, None)
    with pytest.raises(
        BaseError, match="starts from no adapter, but from generated values; leave out --adapter"
    ):
        check_start(make_manifest(), adapter)
    with pytest.raises(BaseError, match=r"has no adapter_config\.json"):
        check_start(manifest, tmp_path)
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "adapter_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(
        BaseError, match=f"has digest {digest(tmp_path)}, the run starts from one of digest {digest(adapter)}"
    ):
        check_start(manifest, tmp_path)


def test_an_adapter_for_something_else_beside_the_head_is_refused(made, make_manifest):
    folder, adapter, labels = made
    if labels is None:
        return
    base = load_base(folder, threads=1, labels=labels)
    start = start_of(manifest_of(make_manifest, adapter, labels), adapter, base)
    wrong = replace(start, beside_head={"nowhere.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(
        ValueError, match=r"nowhere\.weight of the adapter to start from is of shape \(2, 2\), here \(\)"
    ):
        Adapter(base, key=KEY, targets=(), rank=3, alpha=6, train="B", start=wrong)
