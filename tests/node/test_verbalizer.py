"""Labels as words: which tokens the model reads and says, what is cut, and which words are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from node import embedded
from node.base import load_base
from node.labelled import arrange, read_labelled
from node.losses import label_logits, measure, row_losses
from node.records import DataError
from node.verbalizer import fitting, verbalizer
from zo.manifest import Task

TASK = Task(kind="verbalizer", labels=("0", "1"), words=("none", "list"), template="Given: {text}. It is the")


def with_words(*words, template="{text} It was"):
    return Task(kind="verbalizer", labels=tuple("abcdef"[: len(words)]), words=words, template=template)


class Words:
    """A token for every word with the space before it, as byte-pair encodings have it; "|" is never joined."""

    chat_template: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __init__(self):
        self.pieces = []

    def __call__(self, text, add_special_tokens, verbose):
        pieces = []
        for letter in text:
            begins = not pieces or letter in " \n|" or pieces[-1] in ("\n", "|") or letter == pieces[-1]
            if begins:
                pieces.append(letter)
            else:
                pieces[-1] += letter
        self.pieces += [piece for piece in dict.fromkeys(pieces) if piece not in self.pieces]
        return {"input_ids": [self.pieces.index(piece) for piece in pieces]}

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


class Chat(Words):
    chat_template = "there is one"

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        turns = "".join(f"<{turn['role'][0]}>|{turn['content']}|" for turn in chat)
        return turns + ("<a>|" if add_generation_prompt else "")


@pytest.mark.parametrize(
    ("tokenizer", "template", "prompt", "words"),
    [
        (Words(), "{text} It was", "so nice It was", [" bad", " good"]),
        (Words(), "{text} It was ", "so nice It was", [" bad", " good"]),
        (Words(), "{text}\n", "so nice\n", ["bad", "good"]),
        (Words(), "{text}|", "so nice|", [" bad", " good"]),
        (Words(), "Is {text} so?", "Is so nice so?", [" bad", " good"]),
        (Chat(), "{text}?", "<u>|so nice?|<a>|", ["bad", "good"]),
    ],
)
def test_what_is_read_and_what_is_said(tokenizer, template, prompt, words):
    made = verbalizer(tokenizer, with_words("bad", "good", template=template))
    assert tokenizer.decode(made.encode("so nice")) == prompt
    assert [tokenizer.decode([token]) for token in made.words] == words


def test_a_text_that_holds_the_place_of_the_text_is_left_alone():
    tokenizer = Words()
    made = verbalizer(tokenizer, with_words("bad", "good"))
    assert tokenizer.decode(made.encode("a {text} b")) == "a {text} b It was"


def test_words_that_begin_alike_are_refused():
    with pytest.raises(
        DataError, match="the words 'very good' and 'very bad' begin with the same token, ' very'"
    ):
        verbalizer(Words(), with_words("very good", "so so", "very bad"))


def test_words_that_are_no_token_of_their_own_are_refused():
    class Joining(Words):
        def __call__(self, text, add_special_tokens, verbose):
            return super().__call__(text.replace(" ", ""), add_special_tokens, verbose)

    said = r"the word 'bad' of label 'a' becomes no token of its own after '\{text\} It was'"
    with pytest.raises(DataError, match=said):
        verbalizer(Joining(), with_words("bad", "good"))


@given(st.text("ab ", min_size=1), st.integers(0, 8), st.integers(1, 12))
def test_as_much_of_a_text_is_kept_as_fits(text, num_around, most):
    found = fitting(lambda part: [0] * num_around + [ord(letter) for letter in part], text, most)
    if num_around + 1 > most:
        assert found is None or (found[1] == 0 and num_around + len(text) <= most)
        return
    tokens, num_cut = found
    assert len(tokens) == min(most, num_around + len(text))
    assert num_cut == num_around + len(text) - len(tokens)
    assert text.startswith("".join(map(chr, tokens[num_around:])))


@pytest.fixture(scope="module")
def base():
    return load_base(embedded.path(), threads=1)


TEXTS = ["Return the absolute value of the number", "If", "Sort the list in place"]


def test_the_loss_is_that_of_the_words_after_the_prompt(base):
    made = verbalizer(base.tokenizer, TASK)
    rows = arrange(TEXTS, [1, 0, 1], base.tokenizer, 64, TASK, None)
    losses, hits = [], []
    for text, label in zip(TEXTS, (1, 0, 1), strict=True):
        with torch.inference_mode():
            logits = base.model(input_ids=torch.tensor([made.encode(text)])).logits[0, -1]
        chosen = logits[list(made.words)]
        losses.append(float(cross_entropy(chosen[None], torch.tensor([label]))))
        hits.append(int(chosen.argmax()) == label)
    for batch_size in (1, 2, 3):
        found = measure(base.model, rows, batch_size=batch_size)
        assert found.loss == pytest.approx(np.mean(losses), rel=1e-4)
        assert found.accuracy == np.mean(hits)
    batch = rows.take(np.arange(3))
    other = np.where(np.arange(batch.tokens.shape[1]) >= batch.lengths[:, None], 77, batch.tokens)
    assert not np.array_equal(other, batch.tokens)
    assert torch.equal(
        label_logits(base.model, batch), label_logits(base.model, batch._replace(tokens=other))
    )
    assert row_losses(base.model, batch).sums == pytest.approx(losses, rel=1e-4)


def test_the_end_of_a_long_text_is_cut_and_the_template_stays(base):
    made = verbalizer(base.tokenizer, TASK)
    rows = arrange(TEXTS, [1, 0, 1], base.tokenizer, 16, TASK, None)
    tail = base.tokenizer(". It is the", add_special_tokens=False)["input_ids"][1:]
    for row, length, text in zip(rows.tokens, rows.lengths, TEXTS, strict=True):
        assert length <= 16
        assert row[length - len(tail) : length].tolist() == tail
        assert base.tokenizer.decode(row[1:4]) == base.tokenizer.decode(made.encode(text)[1:4])
    num_cut = sum(max(0, len(made.encode(text)) - 16) for text in TEXTS)
    assert 0 < num_cut == rows.num_tokens_cut
    assert f"cut by {num_cut} tokens to fit 16" in str(rows)


def test_a_template_that_leaves_no_place_is_said_with_the_row(base, tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text("text\tlabel\nIf\t0\n")
    needed = len(verbalizer(base.tokenizer, TASK).encode(""))
    with pytest.raises(
        DataError,
        match=rf"rows\.tsv, line 2: no part of the text fits into 6 tokens beside .* takes {needed}; ",
    ):
        read_labelled([file], base.tokenizer, 6, TASK, None)
