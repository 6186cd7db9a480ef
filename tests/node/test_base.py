"""Loading a base: what it is afterwards, what its digest covers, and what is refused in which words."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from node import embedded
from node.base import BaseError, load_base, read_digest, read_tokenizer_digest
from zo.layout import base_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded base that a test may damage."""
    copy = tmp_path / "base"
    copy.mkdir()
    for file in embedded.path().iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copyfile(file, copy / file.name)
    return copy


def test_a_base_is_frozen_float32_in_evaluation_mode(folder):
    base = load_base(folder, threads=1)
    assert torch.get_num_threads() == 1
    assert not any(module.training for module in base.model.modules())
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.model.config.use_cache is False
    assert base.path == str(folder)
    assert base.digest == read_digest(folder)
    assert base.tokenizer_digest == read_tokenizer_digest(folder)
    assert base.max_sequence_length == base.model.config.max_position_embeddings


def test_the_linear_shapes_are_those_of_the_weights(folder):
    base = load_base(folder)
    assert "model.layers.0.mlp.down_proj" in base.linear_shapes
    for name, shape in base.linear_shapes.items():
        assert base.model.get_submodule(name).weight.shape == shape


def test_the_digest_covers_configuration_and_tensors_in_the_order_of_their_names(folder):
    files = ["config.json", "model.safetensors"]
    expected = base_digest((name, [(folder / name).read_bytes()]) for name in files)
    assert read_digest(folder) == expected
    assert len(expected) == 32


def test_the_digest_ignores_other_files_and_where_the_base_lies(folder, tmp_path):
    before = read_digest(folder)
    (folder / "README.md").write_text("a card")
    moved = folder.rename(tmp_path / "elsewhere")
    assert read_digest(moved) == before


def test_one_changed_byte_changes_the_digest(folder):
    before = read_digest(folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert read_digest(folder) != before


def test_a_shard_more_changes_the_digest(folder):
    before = read_digest(folder)
    save_file({"more": torch.zeros(1)}, folder / "zzz.safetensors")
    assert read_digest(folder) != before


def test_the_tokenizer_digest_is_that_of_tokenizer_json(folder):
    content = (folder / "tokenizer.json").read_bytes()
    assert read_tokenizer_digest(folder) == base_digest([("tokenizer.json", [content])])
    (folder / "vocab.txt").write_text("a")
    assert read_tokenizer_digest(folder) == base_digest([("tokenizer.json", [content])])


def test_without_tokenizer_json_the_digest_is_that_of_its_parts(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_bytes(b"{}")
    (folder / "merges.txt").write_bytes(b"a b")
    expected = base_digest([("merges.txt", [b"a b"]), ("vocab.json", [b"{}"])])
    assert read_tokenizer_digest(folder) == expected


def test_a_chat_template_is_part_of_the_tokenizer_wherever_it_is_kept(folder):
    plain, content = read_tokenizer_digest(folder), (folder / "tokenizer.json").read_bytes()
    settings = folder / "tokenizer_config.json"
    template = "USER: {{ messages[0]['content'] }}\n"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    expected = base_digest([("chat_template", [template.encode()]), ("tokenizer.json", [content])])
    assert read_tokenizer_digest(folder) == expected != plain
    (folder / "chat_template.jinja").write_text("another")  # which transformers prefers
    assert read_tokenizer_digest(folder) not in (expected, plain)
    (folder / "chat_template.jinja").write_text(template)
    settings.unlink()
    assert read_tokenizer_digest(folder) == expected


def test_chat_templates_by_name_count_and_what_is_no_json_is_an_error(folder):
    plain, settings = read_tokenizer_digest(folder), folder / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": [{"name": "default", "template": "a"}]}))
    assert read_tokenizer_digest(folder) != plain
    settings.write_text("{")
    with pytest.raises(BaseError, match=r"the chat template of .* cannot be read"):
        read_tokenizer_digest(folder)


def test_digests_are_read_without_torch():
    code = (
        "import sys; from node import base, embedded; base.read_digest(embedded.path());"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_missing_directory_is_said(path):
    with pytest.raises(BaseError, match=rf"{path} does not exist; name a directory"):
        load_base(path)


def test_a_missing_directory_given_as_a_path_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(BaseError, match="does not exist"):
        read_digest(tmp_path / "nowhere")


def test_a_file_is_no_base(folder):
    with pytest.raises(BaseError, match=r"config\.json is a file; name the directory"):
        load_base(folder / "config.json")


def test_no_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(BaseError, match=r"has no config\.json"):
        load_base(folder)


def test_an_adapter_is_no_base(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(BaseError, match="holds a PEFT adapter, not a base"):
        load_base(folder)


def test_no_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseError, match=r"has no \*\.safetensors; .*save_pretrained"):
        load_base(folder)


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BaseError, match="has no tokenizer"):
        load_base(folder)


@pytest.mark.parametrize("kept_bytes", [0, 5, 1000, 100_000])
def test_a_truncated_file(folder, kept_bytes):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(BaseError, match=r"cannot be loaded: .+\. Fetch it again"):
        load_base(folder)


def test_a_missing_tensor_is_not_replaced_by_random_numbers(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        BaseError, match=r"lacks 1 of its tensors, the first is model\.layers\.0\.mlp\.up_proj"
    ):
        load_base(folder)


def test_a_broken_configuration(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(BaseError, match="cannot be loaded"):
        load_base(folder)


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseError, match=r"tokenizer in .* cannot be loaded"):
        load_base(folder)


def test_a_hub_name_is_resolved_by_the_hub_library(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(folder)
    )
    assert read_digest("owner/name") == read_digest(folder)
    assert asked == ["owner/name"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, "is gated: accept its licence"),
        (RepositoryNotFoundError, "neither a directory here nor a model on the hub"),
        (LocalEntryNotFoundError, r"the hub did not answer: .+\. Connect, or name a local directory"),
    ],
)
def test_what_the_hub_refuses_is_said(monkeypatch, error, words):
    def refuse(*_args, **_kwargs):
        # Without __init__, whose arguments differ between versions of the library.
        raise error.__new__(error, "no such luck")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(BaseError, match=words):
        load_base("owner/name")
