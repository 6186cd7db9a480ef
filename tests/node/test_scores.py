"""Scores of text: words against words, and a user's callable whose every wrong answer is said with its row."""

import math

import numpy as np
import pytest

from node.data import Pair
from node.scores import ScoreError, by_callable, by_words, exact_match, load_score, token_f1


@pytest.mark.parametrize(
    ("said", "right", "f1", "exact"),
    [
        ("The cat sat.", "a cat sat", 1, 1),
        ("cat", "the cat sat on the mat", 2 * 1 / (1 + 4), 0),
        ("sat cat", "cat sat", 1, 0),
        ("cat cat cat", "cat", 2 * 1 / (3 + 1), 0),
        ("dog", "cat", 0, 0),
        ("", "cat", 0, 0),
        ("the", "a", 1, 1),  # nothing is left of both
        ("Don't!", "dont", 1, 1),
    ],
)
def test_words_are_compared_as_they_are_for_squad(said, right, f1, exact):
    assert token_f1(said, right) == pytest.approx(f1)
    assert exact_match(said, right) == exact
    assert by_words(token_f1)([Pair("?", right)], [said]) == [token_f1(said, right)]


PAIRS = [Pair("why?", "because"), Pair("how?", "so")]
SAID = ["since", "thus"]


def judged(answer, warn=lambda _: None):
    return by_callable(lambda *_: answer, warn)(PAIRS, SAID)


def test_a_callable_sees_prompts_and_what_was_said():
    seen = []
    assert by_callable(lambda *given: seen.append(given) or [0.5, True], print)(PAIRS, SAID) == [0.5, 1.0]
    assert seen == [(["why?", "how?"], ["since", "thus"])]
    assert judged(np.array([0.25, 3], np.float32)) == [0.25, 3.0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1.0], "one number for each of 2 rows, got 1"),
        ([1.0, None], "must be a number, got None for the prompt 'how?' and the completion 'thus'"),
        (["1", 1.0], "must be a number, got '1' for the prompt 'why?' and the completion 'since'"),
        (7, "failed on the prompt 'why?' and the completion 'since' and 1 more: TypeError"),
    ],
)
def test_an_answer_that_is_no_score_is_said(answer, words):
    with pytest.raises(ScoreError, match="the score") as caught:
        judged(answer)
    assert words in str(caught.value)


def test_what_a_callable_raises_is_said():
    def fail(prompts, completions):
        raise KeyError("answers.json")

    with pytest.raises(
        ScoreError, match=r"the score failed on the prompt 'why\?' .* KeyError: 'answers.json'"
    ):
        by_callable(fail, print)(PAIRS, SAID)


def test_a_score_that_is_not_finite_is_passed_on_and_said_once():
    warnings = []
    judge = by_callable(lambda *_: [math.nan, math.inf], warnings.append)
    for _ in range(2):
        scores = judge(PAIRS, SAID)
        assert math.isnan(scores[0])
        assert scores[1] == math.inf
    (warning,) = warnings
    assert warning.startswith("the score is nan for the prompt 'why?' and the completion 'since'")


def test_a_callable_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text(
        "class Judge:\n    def score(p, c): return [1.0] * len(p)\nnot_one = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(
        tmp_path / "elsewhere"
    )  # so that what is put into the path is taken out again
    assert load_score("my_judge:Judge.score")(["a"], ["b"]) == [1.0]
    for name, words in (
        ("my_judge", "expected MODULE:FUNCTION"),
        ("my_judge:", "expected MODULE:FUNCTION"),
        ("my_judge:nothing", "AttributeError"),
        ("my_judge:not_one", "not_one is a int, and cannot be called"),
        ("no_such_judge:score", "ModuleNotFoundError: No module named 'no_such_judge'"),
    ):
        with pytest.raises(ScoreError, match=f"--score {name}: ") as caught:
            load_score(name)
        assert words in str(caught.value)
