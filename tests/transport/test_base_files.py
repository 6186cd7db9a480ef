"""What is read of a base without torch: digests, and shapes from the headers of its files."""

import hashlib
import json
import struct

import pytest

from transport.base_files import (
    BaseFilesError,
    digest,
    is_causal,
    layers_only,
    linear_shapes,
    tensor_shapes,
    tokenizer_digest,
)
from zo.layout import base_digest


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-2.safetensors").write_bytes(safetensors({"layers.1.q_proj.weight": [8, 4]}))
    (tmp_path / "model-1.safetensors").write_bytes(
        safetensors(
            {"layers.0.q_proj.weight": [8, 4], "layers.0.norm.weight": [4], "layers.0.q_proj.bias": [8]}
        )
    )
    return tmp_path


def test_shapes_of_linear_modules_from_all_files(model):
    assert linear_shapes(tensor_shapes(model)) == {"layers.0.q_proj": (8, 4), "layers.1.q_proj": (8, 4)}


def test_weights_that_are_kept_the_other_way_round_are_turned():
    tensors = {"h.0.attn.c_attn.weight": (32, 96), "h.0.ln_1.weight": (32,), "wte.weight": (1024, 32)}
    expected = {"h.0.attn.c_attn": (96, 32), "wte": (1024, 32)}
    assert linear_shapes(tensors, {"model_type": "gpt2"}) == expected
    assert linear_shapes(tensors, {"model_type": "llama"})["h.0.attn.c_attn"] == (32, 96)


def test_the_digest_is_over_config_and_weights_and_nothing_else(model):
    names = ["config.json", "model-1.safetensors", "model-2.safetensors"]
    expected = base_digest((name, [(model / name).read_bytes()]) for name in names)
    assert digest(model) == expected
    (model / "README.md").write_text("hello")
    (model / "tokenizer.json").write_text("[]")
    assert digest(model) == expected
    (model / "config.json").write_text('{"model_type": "llama" }')
    assert digest(model) != expected


def test_a_changed_byte_of_the_weights_changes_the_digest(model):
    before = digest(model)
    data = bytearray((model / "model-2.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model-2.safetensors").write_bytes(data)
    assert digest(model) != before
    assert len(bytes.fromhex(before)) == hashlib.blake2b(digest_size=16).digest_size


def test_the_tokenizer_is_tokenizer_json_or_its_older_files(model):
    assert tokenizer_digest(model) == base_digest([("tokenizer.json", [b"{}"])])
    (model / "tokenizer.json").unlink()
    with pytest.raises(BaseFilesError, match="has no tokenizer"):
        tokenizer_digest(model)
    (model / "vocab.json").write_text("{}")
    (model / "merges.txt").write_text("a b")
    assert tokenizer_digest(model) == base_digest([("merges.txt", [b"a b"]), ("vocab.json", [b"{}"])])


def test_what_is_missing_is_named(model, tmp_path):
    with pytest.raises(BaseFilesError, match="nowhere is not a directory"):
        tensor_shapes(tmp_path / "nowhere")
    (model / "config.json").unlink()
    with pytest.raises(BaseFilesError, match=r"has no config\.json"):
        digest(model)
    for file in model.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(BaseFilesError, match=r"has no \*\.safetensors; load"):
        tensor_shapes(model)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        struct.pack("<Q", 10**12) + b"{}",
        struct.pack("<Q", 9) + b"not json!",
        struct.pack("<Q", 100) + b'{"cut": ',
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xfe",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 34) + b'{"a.weight": {"shape": ["x", "y"]}}'[:34],
        safetensors({}).replace(b'"pt"', b'"pt'),
    ],
)
def test_a_broken_header_is_an_error_that_names_the_file(model, data):
    (model / "model-1.safetensors").write_bytes(data)
    with pytest.raises(BaseFilesError, match=r"model-1\.safetensors is not a safetensors file"):
        tensor_shapes(model)


@pytest.mark.parametrize("shape", ['["x", 4]', "[4.5, 4]", "[-1, 4]", "[[1], 4]"])
def test_a_shape_that_is_none_is_an_error(model, shape):
    text = f'{{"a.weight": {{"shape": {shape}}}}}'.encode()
    (model / "model-1.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(BaseFilesError, match="is not a safetensors file"):
        tensor_shapes(model)


def test_a_shape_that_is_no_list_is_an_error(model):
    text = b'{"a.weight": {"shape": 7}}'
    (model / "model-1.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(BaseFilesError, match="is not a safetensors file"):
        tensor_shapes(model)


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["BertModel"], False),
        (["GPT2LMHeadModel"], True),
        ([], True),
        (None, True),
        (7, True),
        ({"a": 1}, True),
    ],
)
def test_a_base_is_causal_by_the_name_of_its_class_or_if_it_has_none(architectures, expected):
    assert is_causal({"architectures": architectures}) is expected


def test_layers_are_what_has_a_number():
    shapes = {
        "model.embed_tokens": (9, 8),
        "lm_head": (9, 8),
        "model.layers.0.q_proj": (8, 8),
        "h.11.fc1": (4, 8),
    }
    assert set(layers_only(shapes)) == {"model.layers.0.q_proj", "h.11.fc1"}
