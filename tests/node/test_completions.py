"""Prompts and completions: which tokens a row becomes, what is cut or left out, and that only completions count."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from node import embedded
from node.base import load_base
from node.completions import arrange, completion_ids, prompt_ids, read_completions
from node.data import Batch, Pair, read_windows
from node.language import read_data
from node.losses import mean_loss, mean_loss_over
from node.records import DataError
from zo.manifest import Task


class Letters:
    """One token per character, its code point; 1 begins a text, 0 ends it."""

    chat_template: str | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | None = 0

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


class Bare(Letters):
    bos_token_id = None
    eos_token_id = None


class Chatty(Letters):
    chat_template = "there is one"

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        assert not tokenize
        turns = "".join(f"<{turn['role'][0]}>{turn['content']}." for turn in chat)
        return turns + ("<a>" if add_generation_prompt else "")


class Rewriting(Chatty):
    """A template that writes the first turn otherwise when a second follows."""

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        return ("" if add_generation_prompt else "!") + super().apply_chat_template(
            chat, tokenize, add_generation_prompt
        )


def spell(ids):
    return "".join({0: "|", 1: "^"}.get(int(token), chr(int(token))) for token in ids)


def both(tokenizer, prompt, completion):
    return spell(prompt_ids(tokenizer, prompt)), spell(completion_ids(tokenizer, Pair(prompt, completion)))


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows, name="rows.jsonl"):
        file = tmp_path / name
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return file

    return write_rows


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion, "more": 1}


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Letters(), ("^ab", "cd|")),
        (Bare(), ("ab", "cd")),
        (Chatty(), ("<u>ab.<a>", "cd.")),
        (Rewriting(), ("<u>ab.<a>", "cd|")),
    ],
)
def test_the_tokens_of_a_row(tokenizer, expected):
    assert both(tokenizer, "ab", "cd") == expected


def test_rows_are_padded_and_only_completions_are_marked(write):
    rows = read_completions([write(pair("ab", "c"), pair("d", "efg"))], Letters(), 10)
    assert [spell(row) for row in rows.tokens] == ["^abc||", "^defg|"]
    batch = rows.take(np.array([1, 0]))
    assert batch.scored.tolist() == [
        [False, False, True, True, True, True],
        [False] * 3 + [True] * 2 + [False],
    ]
    assert rows.take(np.array([0])).tokens.shape == (1, 5), "a batch is no wider than its longest row"
    assert (rows.num_windows, rows.num_scored) == (2, 6)
    assert str(rows) == "2 rows, 6 tokens in completions"


def test_long_prompts_lose_their_front_and_long_completions_are_left_out(write):
    file = write(pair("abcdef", "xy"), pair("a", "x"), pair("a", "uvwxyz"))
    rows = read_completions([file], Letters(), 6)
    assert [spell(row) for row in rows.tokens] == ["^efxy|", "^ax|||"]
    assert str(rows) == (
        "2 rows, 5 tokens in completions; 1 prompt cut at the front by 4 tokens to fit 6; "
        "1 row left out, too long a completion for 6"
    )


@given(
    st.lists(st.tuples(st.text("ab", min_size=1), st.text("cd", min_size=1)), min_size=1), st.integers(2, 9)
)
def test_every_completion_is_kept_whole_or_left_out(pairs, sequence_length):
    texts = [Pair(*each) for each in pairs]
    rows = [([ord(c) for c in prompt], [ord(c) for c in completion]) for prompt, completion in pairs]
    fitting = [(p, c) for p, c in pairs if len(c) < sequence_length]
    if not fitting:
        with pytest.raises(DataError, match="no completion"):
            arrange(texts, rows, sequence_length)
        return
    made = arrange(texts, rows, sequence_length)
    assert made.tokens.shape[1] <= sequence_length
    assert made.num_windows + made.num_dropped == len(pairs)
    assert list(made.pairs) == fitting
    for row, begin, end, (prompt, completion) in zip(
        made.tokens, made.begins, made.ends, fitting, strict=True
    ):
        assert spell(row[begin:end]) == completion
        assert 1 <= begin <= len(prompt)
        assert spell(row[:1]) == prompt[0]
        assert prompt.endswith(spell(row[1:begin]))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([pair("a", "b"), pair("a", " ")], r"rows\.jsonl, line 2: the completion is empty; remove the row"),
        (
            [{"text": "ab"}],
            r"line 1: no field 'prompt'; the fields there are 'text'\. Name the right one with --column prompt=NAME",
        ),
        (
            [pair("a", "b"), "", {"prompt": "a"}],
            r"line 3: no field 'completion'; the fields there are 'prompt'",
        ),
        (["{"], r"line 1: .*every line is an object like \{\"prompt\""),
        ([pair("a", "bcdef")], r"no completion of 1 row fits into 4 tokens with a token of its prompt"),
    ],
)
def test_rows_that_cannot_be_used_are_named(write, rows, words):
    with pytest.raises(DataError, match=words):
        read_completions([write(*rows)], Letters(), 4)


def test_data_of_another_kind_is_refused_with_what_is_expected(write):
    with pytest.raises(
        DataError, match=r"rows of prompt and completion are expected, as \.jsonl, \.tsv or a saved"
    ):
        read_completions([write("text", name="a.txt")], Letters(), 4)
    with pytest.raises(DataError, match=r"no field 'text'; the fields there are 'prompt', 'completion'"):
        read_windows([write(pair("a", "b"))], Letters(), 4)
    with pytest.raises(DataError, match="no data file was named"):
        read_completions([], Letters(), 4)


def test_an_empty_prompt_needs_a_token_to_begin_with(write):
    rows = read_completions([write(pair("", "b"))], Letters(), 4)
    assert spell(rows.tokens[0]) == "^b|"
    with pytest.raises(DataError, match="line 1: the prompt is empty"):
        read_completions([write(pair("", "b"))], Bare(), 4)


def test_a_chat_template_that_refuses_is_a_clear_error(write):
    tokenizer = load_base(embedded.path(), threads=1).tokenizer
    file = write(pair("ab", "cd"))
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
    assert read_completions([file], tokenizer, 64).num_windows == 1
    tokenizer.chat_template = "{{ raise_exception('the first turn must be the system\\'s') }}"
    with pytest.raises(
        DataError, match="chat template refuses a user's turn: the first turn must be the system's"
    ):
        read_completions([file], tokenizer, 64)


@pytest.fixture(scope="module")
def base():
    return load_base(embedded.path(), threads=1)


PAIRS = [
    pair("Return the absolute", " value of the number."),
    pair("If the", " list is empty, None."),
    pair("Sort", "."),
]


def test_the_loss_is_that_of_the_completion_alone(base, write):
    rows = read_completions([write(*PAIRS)], base.tokenizer, 64)
    total, tokens = 0.0, 0
    for each in PAIRS:
        prompt = prompt_ids(base.tokenizer, each["prompt"])
        completion = completion_ids(base.tokenizer, Pair(each["prompt"], each["completion"]))
        with torch.inference_mode():
            logits = base.model(input_ids=torch.tensor([prompt + completion])).logits[0]
        total += float(cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(completion), reduction="sum"))
        tokens += len(completion)
    assert tokens == rows.num_scored
    for batch_size in (1, 2, 3):
        assert mean_loss_over(base.model, rows, batch_size=batch_size) == pytest.approx(
            total / tokens, rel=1e-5
        )


def test_padding_does_not_change_a_loss(base, write):
    rows = read_completions([write(*PAIRS)], base.tokenizer, 64)
    tokens, scored, _ = rows.take(np.array([0, 2]))
    other = np.where(np.arange(tokens.shape[1]) >= rows.ends[[0, 2], None], 77, tokens)
    assert not np.array_equal(tokens, other)
    assert mean_loss(base.model, Batch(tokens, scored)) == mean_loss(base.model, Batch(other, scored))


def test_the_task_says_which_kind_of_data_is_read(base, write):
    file = write(*PAIRS)
    assert read_data([file], base, Task(kind="completion"), 32).num_windows == 3
    with pytest.raises(DataError, match="no field 'text'"):
        read_data([file], base, Task(kind="text"), 32)


def test_rows_longer_than_the_base_can_take_are_refused(base, write):
    with pytest.raises(DataError, match="sequences are to have 257 tokens, the base takes 256"):
        read_data([write(*PAIRS)], base, Task(kind="completion"), 257)


@pytest.mark.assets
@pytest.mark.skipif("ZO_TEST_ASSETS" not in os.environ, reason="ZO_TEST_ASSETS is not set")
@pytest.mark.parametrize("client", [0, 7, 15])
def test_real_instructions_are_read_whole(client):
    assets = Path(os.environ["ZO_TEST_ASSETS"])
    file = assets / "data" / "natural-instructions" / f"client{client:02}.train.jsonl"
    base = load_base(assets / "models" / "babyllama-tok361-pad64", threads=1)
    rows = read_completions([file], base.tokenizer, 256)
    given = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert rows.num_windows + rows.num_dropped == len(given)
    expected = [completion_ids(base.tokenizer, Pair(each["prompt"], each["completion"])) for each in given]
    fitting = [ids for ids in expected if len(ids) < 256]
    found = [row[b:e].tolist() for row, b, e in zip(rows.tokens, rows.begins, rows.ends, strict=True)]
    assert found == fitting
    batch = rows.take(np.arange(2))
    assert np.isfinite(mean_loss(base.model, batch))
