"""The embedded base model: it is what its digest and its card say, and it can be made again."""

import io
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from node import base, corpus, embedded, pretrain, vocabulary


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(
        embedded.path(), local_files_only=True, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded.path(), local_files_only=True)


def test_the_files_are_those_of_the_digest() -> None:
    assert base.read_digest(embedded.path()) == embedded.DIGEST


def test_the_card_names_the_digest_and_the_command() -> None:
    card = (embedded.path() / "README.md").read_text(encoding="utf-8")
    assert f"`{embedded.DIGEST}`" in card
    assert "python -m node.pretrain --out node/embedded" in card


def test_the_model_is_small(model: Any) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == 918_656
    assert (embedded.path() / "model.safetensors").stat().st_size <= 4_000_000


def test_every_linear_layer_allows_4_bit(model: Any) -> None:
    shapes = {
        name: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert len(shapes) == 4 * 7 + 1
    assert all(size % 64 == 0 for shape in shapes.values() for size in shape), shapes


@pytest.mark.parametrize(
    "text", ["Return the value of x.", "  def f(x):\n\n\treturn '…'\r\n", "\x00 ∂ 漢字 🐍", ""]
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert max(tokens) < len(tokenizer) == vocabulary.VOCABULARY


def test_the_words_of_the_topics_are_half_known_to_it_and_their_layout_is_not(
    model: Any, tokenizer: Any
) -> None:
    _, held_out = corpus.split_topics(corpus.pydoc_topics(), 4, 0.15)
    texts = list(held_out.values())
    words = [pretrain.as_running_text(text) for text in texts]
    loss_of_words = pretrain.evaluate(model, vocabulary.stream(tokenizer, words))
    assert 1.5 < loss_of_words < 0.6 * math.log(vocabulary.VOCABULARY)
    assert pretrain.evaluate(model, vocabulary.stream(tokenizer, texts)) > loss_of_words + 0.5


def test_it_goes_on_with_a_sentence_in_words(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("Return a list of", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert text.startswith("Return a list of ")
    assert len(set(text.split())) >= 5


def test_validation_holds_whole_files() -> None:
    docstrings = [corpus.Docstring(f"{i}.py", f"{i} {j}") for i in range(100) for j in range(3)]
    training, validation = pretrain.split_docstrings(docstrings)
    assert sorted(training + validation) == sorted(text for _, text in docstrings)
    files = [{text.split()[0] for text in part} for part in (training, validation)]
    assert files[0].isdisjoint(files[1])
    assert 1 <= len(files[1]) <= 15


def test_windows_cover_the_text_again_and_again_in_the_same_order() -> None:
    settings = pretrain.Settings(batch_size=2, sequence_length=4)
    tokens = torch.arange(50)
    first, again = pretrain.windows(tokens, settings), pretrain.windows(tokens, settings)
    seen: set[int] = set()
    for _ in range(60):
        batch = next(first)
        assert batch.shape == (2, 4)
        assert torch.equal(batch, next(again))
        assert torch.equal(batch - batch[:, :1], torch.arange(4).expand(2, 4))
        seen |= set(batch.flatten().tolist())
    assert len(seen) == 50
    with pytest.raises(ValueError, match="a batch of 2 windows of 4 tokens needs 12 tokens, got 11"):
        next(pretrain.windows(tokens[:11], settings))


def test_the_learning_rate_rises_and_falls() -> None:
    settings = pretrain.Settings(steps=1000, warmup=100, learning_rate=1.0)
    rates = [pretrain.learning_rate(step, settings) for step in range(1000)]
    assert rates[:100] == pytest.approx([(step + 1) / 100 for step in range(100)])
    assert rates[100] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(rates[100:]))
    assert rates[-1] < 1e-4


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"sequence_length": 257}, {"dropout": 1.0}],
)
def test_settings_say_which_value_is_wrong(wrong: dict[str, Any]) -> None:
    ((field, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^{field} must be .*, got {value}$"):
        pretrain.Settings(**wrong)


def test_training_lowers_the_loss_and_is_repeatable(tokenizer: Any) -> None:
    tokens = vocabulary.stream(tokenizer, list(corpus.pydoc_topics().values())[:10])
    settings = pretrain.Settings(steps=8, batch_size=4, sequence_length=64, warmup=2)
    losses = []
    for _ in range(2):
        model = pretrain.new_model(settings.seed)
        before = pretrain.evaluate(model, tokens[:1024])
        losses.append((pretrain.train(model, tokens, settings), pretrain.evaluate(model, tokens[:1024])))
    assert losses[0] == losses[1]
    assert losses[0][1] < before - 0.5
    assert not any(module._forward_hooks for module in model.modules())


def test_a_short_pretraining_writes_a_base_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topics = corpus.pydoc_topics()
    some = tuple(corpus.Docstring(f"{name}.py", text) for name, text in topics.items())
    some_topics = dict(list(topics.items())[:4])
    monkeypatch.setattr(corpus, "stdlib_docstrings", lambda: some)
    monkeypatch.setattr(corpus, "pydoc_topics", lambda: some_topics)
    settings = pretrain.Settings(steps=3, batch_size=2, sequence_length=32, warmup=1)
    out = tmp_path / "new" / "base"
    console = Console(file=io.StringIO())
    losses = pretrain.pretrain(out, settings, "python -m node.pretrain --out node/embedded", console)
    digest = base.read_digest(out)
    assert digest in console.file.getvalue()  # type: ignore[attr-defined]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert digest in card
    assert f"{losses.topics:.3f}" in card
    assert all(str(tmp_path) not in file.read_text(encoding="utf-8") for file in out.glob("*.json"))
    loaded = base.load_base(out)
    assert pretrain.evaluate(loaded.model, torch.arange(256)) < 2 * math.log(vocabulary.VOCABULARY)
