"""When memory does not suffice it is said for what, and what to lower; any other failure stays what it is."""

import errno

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from node import cli, doctor, embedded
from node.base import load_base
from node.data import pack
from node.language import LanguageTrainer
from node.memory import OutOfMemoryError, memory_explained
from node.quantization import Form
from transport.exits import Exit
from zo.layout import lora_layout


def too_large_for_a_tensor(*_args, **_kwargs):
    torch.empty(2**50)


def too_large_for_an_array(*_args, **_kwargs):
    np.empty(2**46)


def too_large_for_a_gpu(*_args, **_kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def too_large_to_map(*_args, **_kwargs):
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def wrapped(*_args, **_kwargs):
    try:
        np.empty(2**46)
    except MemoryError as error:
        raise ValueError("the file is broken") from error


CAUSES = (too_large_for_a_tensor, too_large_for_an_array, too_large_for_a_gpu, too_large_to_map, wrapped)


@pytest.mark.parametrize("fail", CAUSES)
def test_all_that_libraries_raise_means_the_same(fail):
    said = "there is not enough memory to try: lower something"
    with pytest.raises(OutOfMemoryError, match=said), memory_explained("to try", "lower something"):
        fail()


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.ENOENT, "no file"), KeyError("x")]
)
def test_other_failures_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, memory_explained("to try", "lower something"):
        raise error
    assert caught.value is error


def test_a_base_that_is_too_large(monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", too_large_for_a_tensor)
    with pytest.raises(
        OutOfMemoryError, match=r"to load the base in .*: hold the base in fewer bits with --q"
    ):
        load_base(embedded.path(), threads=1)
    base, finding = doctor.load(str(embedded.path()), Form(), 1)
    assert base is None
    assert (finding.state, "not enough memory" in finding.found) == ("fail", True)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in (*arguments, "--threads", 1)])


def fails(result, *words):
    assert result.exit_code == Exit.MEMORY, result.output
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    for word in words:
        assert word in line


def test_the_commands_say_what_to_lower(monkeypatch, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("Return the absolute value of the number. " * 50)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", too_large_for_a_tensor)
    fails(
        run("evaluate", "--data", data),
        "to evaluate: lower --batch-size or --sequence-length, or hold the base in",
    )
    fails(
        run("predict", "Return"),
        "for this text: give a shorter text or fewer --max-tokens, or hold the base in",
    )


def test_a_node_says_what_to_lower(monkeypatch, make_manifest):
    base = load_base(embedded.path(), threads=1)
    layout = lora_layout(base.linear_shapes, ("q_proj",), 2, "B")
    manifest = make_manifest(
        targets=("q_proj",), rank=2, size=layout.size, layout_digest=layout.digest().hex(), batch_size=1
    )
    rows = pack(["Return the absolute value of the number. " * 50], base.tokenizer, 16)
    trainer = LanguageTrainer(manifest, base, rows, rows, private_seed=1, threads=1)
    weights = trainer.initial_weights()
    assert trainer.probe(weights, 0, 0, -4).codes.size == 2
    monkeypatch.setattr(base.model, "forward", too_large_for_a_tensor)
    advice = "join with --at-once 0, hold the base in fewer bits with --quantize if the run allows that, or make a run"
    with pytest.raises(OutOfMemoryError, match=f"to probe: {advice}"):
        trainer.rehearse()
    with pytest.raises(OutOfMemoryError, match=f"to probe: {advice}"):
        trainer.probe(weights, 0, 0, -4)
    with pytest.raises(OutOfMemoryError, match=f"for the held-out data: {advice}"):
        trainer.evaluate(weights)
