"""Labels as words that a language model says: what it reads before the word, and by which token each word begins.

Decides how a template, a text and the tokenizer's chat template become a prompt, and refuses words that the model could
not tell apart. Which word is right is the row's business (`node.labelled`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from node.completions import completion_ids, prompt_ids, token_ids
from node.data import Pair
from node.records import DataError
from zo.manifest import TEXT_PLACE, Task

_EXAMPLE = "text"
"""In the place of a row's text where only what follows it matters."""


class Verbalizer(NamedTuple):
    """A task's template and words, in the tokens of one tokenizer."""

    encode: Callable[[str], list[int]]
    """A row's text to all tokens before the word."""
    words: tuple[int, ...]
    """The token by which each label's word begins."""


def verbalizer(tokenizer: Any, task: Task) -> Verbalizer:
    """The verbalizer of a task. In a chat the word is the beginning of the assistant's turn.

    Otherwise it follows the template after the white space at the template's end, or after a space. That belongs to the
    word where the tokenizer joins the two, as many do with a space, and to the prompt where it does not.

    Raises:
        DataError: a word becomes no token of its own, or two begin with the same.
    """
    template = task.template.rstrip()
    if tokenizer.chat_template:
        said = [completion_ids(tokenizer, Pair(_filled(template, _EXAMPLE), word)) for word in task.words]
    else:
        space = task.template[len(template) :] or " "
        read = _filled(template, _EXAMPLE)
        joined = [token_ids(tokenizer, read + space + word) for word in task.words]
        apart = token_ids(tokenizer, read + space)
        if all(tokens[: len(apart)] == apart for tokens in joined):
            template, read = template + space, read + space
        alone = token_ids(tokenizer, read)
        said = [tokens[len(alone) :] if tokens[: len(alone)] == alone else [] for tokens in joined]

    words: list[int] = []
    for label, word, tokens in zip(task.labels, task.words, said, strict=True):
        if not tokens:
            raise DataError(
                f"the word {word!r} of label {label!r} becomes no token of its own after {template[-20:]!r}; choose "
                "another word, or end the template otherwise"
            )
        if tokens[0] in words:
            other = task.words[words.index(tokens[0])]
            raise DataError(
                f"the words {other!r} and {word!r} begin with the same token, {tokenizer.decode(tokens[:1])!r}, and "
                "the model cannot tell them apart; choose words that this tokenizer begins differently"
            )
        words.append(tokens[0])
    return Verbalizer(lambda text: prompt_ids(tokenizer, _filled(template, text)), tuple(words))


def fitting(encode: Callable[[str], list[int]], text: str, most: int) -> tuple[list[int], int] | None:
    """The tokens of as much of a text's beginning as fits, and how many were cut; None if nothing of it does.

    Args:
        encode: a text to tokens, with what goes around it.
        text: the whole.
        most: tokens that fit.
    """
    whole = encode(text)
    if len(whole) <= most:
        return whole, 0
    fits, does_not = 0, len(text)  # characters
    while does_not - fits > 1:
        tried = (fits + does_not) // 2
        if len(encode(text[:tried])) <= most:
            fits = tried
        else:
            does_not = tried
    kept = encode(text[:fits])
    return (kept, len(whole) - len(kept)) if fits else None


def _filled(template: str, text: str) -> str:
    before, _, after = template.partition(TEXT_PLACE)  # once: the text may hold the same letters
    return before + text + after
