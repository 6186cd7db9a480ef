"""Scores of text: how what a model says after a prompt is judged, by words or by a user's own callable.

Numbers and strings alone, no model. A user's callable is checked here: what it returns decides what a node votes for.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Final

from node.data import Pair

Score = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""A user's: (prompts, completions) -> one number for each, the larger the better; 1 is a loss of 0."""
Judge = Callable[[Sequence[Pair], Sequence[str]], Sequence[float]]
"""(prompts with their completions in the data, what was said after each) -> one number for each."""

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


class ScoreError(ValueError):
    """A user's callable cannot be had, fails, or returns what is no score."""


def by_words(judge: Callable[[str, str], float]) -> Judge:
    """What compares what was said with the completion in the data, row by row."""
    return lambda pairs, said: [judge(made, pair.completion) for pair, made in zip(pairs, said, strict=True)]


def token_f1(said: str, right: str) -> float:
    """Harmonic mean of precision and recall of the words of two texts (Rajpurkar et al. 2016, arXiv 1606.05250).

    Words are compared in lower case, without punctuation and without articles.
    """
    ours, theirs = _words(said), _words(right)
    if not ours or not theirs:
        return float(ours == theirs)
    num_common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * num_common / (len(ours) + len(theirs))


def exact_match(said: str, right: str) -> float:
    """1 if two texts have the same words in the same order, compared as `token_f1` does; else 0."""
    return float(_words(said) == _words(right))


def load_score(name: str) -> Score:
    """A user's callable by its name, MODULE:FUNCTION; modules in the working directory are found, too.

    Raises:
        ScoreError: the name is none, or there is nothing of it that can be called.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ScoreError(
            f"--score {name}: expected MODULE:FUNCTION, like judge:score for a file judge.py here"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            found = getattr(found, part)
    except Exception as error:  # a user's module may raise anything when it is imported
        raise ScoreError(f"--score {name}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ScoreError(f"--score {name}: {function_name} is a {type(found).__name__}, and cannot be called")
    score: Score = found
    return score


def by_callable(score: Score, warn: Callable[[str], None]) -> Judge:
    """What asks a user's callable, and says what is wrong with its answer, with prompt and completion.

    Args:
        score: the callable.
        warn: called once if a score is not finite, with which. Such a score is passed on.

    The judge raises ScoreError if the callable fails, or returns another number of scores or what is no number.
    """
    has_warned = False

    def judge(pairs: Sequence[Pair], said: Sequence[str]) -> list[float]:
        nonlocal has_warned
        prompts = [pair.prompt for pair in pairs]
        try:
            scores = list(score(prompts, list(said)))
        except Exception as error:  # whatever the user's code raises
            raise ScoreError(
                f"the score failed on {_shown(prompts, said)}: {type(error).__name__}: {error}"
            ) from error
        if len(scores) != len(prompts):
            raise ScoreError(
                f"the score must return one number for each of {len(prompts)} rows, got {len(scores)}"
            )
        for value, prompt, completion in zip(scores, prompts, said, strict=True):
            if not isinstance(value, Real):
                raise ScoreError(
                    f"the score must be a number, got {value!r} for {_shown([prompt], [completion])}"
                )
            if not math.isfinite(value) and not has_warned:
                has_warned = True
                warn(
                    f"the score is {float(value)} for {_shown([prompt], [completion])}; a direction with such a row is "
                    "no vote"
                )
        return [float(value) for value in scores]

    return judge


def _shown(prompts: Sequence[str], said: Sequence[str]) -> str:
    """The first row, short enough for a message."""
    more = f" and {len(prompts) - 1} more" * (len(prompts) > 1)
    return f"the prompt {prompts[0][-80:]!r} and the completion {said[0][:80]!r}{more}"


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
