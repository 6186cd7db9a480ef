"""What a model says after a prompt: the likeliest tokens after the very tokens of training."""

import pytest
import torch
from typer.testing import CliRunner

from node import cli, embedded
from node.base import load_base
from node.completions import prompt_ids
from node.generation import complete
from node.records import DataError


@pytest.fixture(scope="module")
def base():
    return load_base(embedded.path(), threads=1)


def test_each_token_is_the_likeliest(base):
    ids = prompt_ids(base.tokenizer, "Return the")
    start = len(ids)
    with torch.inference_mode():
        for _ in range(4):
            ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert complete(base, base.model, "Return the", 4) == base.tokenizer.decode(ids[start:])


def test_what_the_bases_files_say_of_choosing_tokens_is_not_followed(base, monkeypatch):
    """No digest covers generation_config.json: nodes that hold the same base must say the same."""
    said = complete(base, base.model, "Return the", 8)
    configured = base.model.generation_config
    for name, value in (("repetition_penalty", 5.0), ("no_repeat_ngram_size", 1), ("min_length", 40)):
        monkeypatch.setattr(configured, name, value)
    assert complete(base, base.model, "Return the", 8) == said
    assert base.model.generation_config is configured


def test_what_does_not_fit_is_said_or_cut(base):
    long = "Return the " * 2000
    with pytest.raises(DataError, match=rf"tokens, the base takes {base.max_sequence_length}; shorten it"):
        complete(base, base.model, long, 4)
    room = 3
    tokens = base.tokenizer(long, add_special_tokens=False)["input_ids"][
        : base.max_sequence_length - 1 - room
    ]
    prompt = base.tokenizer.decode(tokens)
    said = complete(base, base.model, prompt, 100)
    assert len(base.tokenizer(said, add_special_tokens=False)["input_ids"]) <= room + 2


def test_the_command_prints_the_completion_alone():
    result = CliRunner().invoke(cli.app, ["predict", "Return the", "--max-tokens", "3", "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert result.stderr == ""


def test_an_adapter_that_is_none(tmp_path):
    result = CliRunner().invoke(cli.app, ["predict", "Return the", "--adapter", str(tmp_path)])
    assert result.exit_code == 5
    assert "is not a PEFT adapter" in result.stderr
