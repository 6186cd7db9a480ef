"""What a model says of texts: how they go on, or which label one has. The tokens are those of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from node import labelled
from node.base import Base
from node.completions import prompt_ids
from node.losses import label_logits
from node.memory import SAYING, memory_explained
from node.mixture import Mixture
from node.records import DataError
from zo.manifest import Task


@memory_explained("for this text", SAYING)
def complete(base: Base, model: torch.nn.Module, prompt: str, max_tokens: int) -> str:
    """What the model says after a prompt, the likeliest token each time, until it ends its text.

    Args:
        base: whose tokenizer and limits apply.
        model: the base's, with or without an adapter.
        prompt: not longer than the model can take with what follows.
        max_tokens: most tokens to add, at least 1.

    Raises:
        DataError: the prompt is empty, or too long for the model.
    """
    ids = prompt_ids(base.tokenizer, prompt)
    if not ids:
        raise DataError("the prompt is empty, and the tokenizer has no token to begin with; give a prompt")
    limit = base.max_sequence_length
    if limit is not None and len(ids) >= limit:
        raise DataError(f"the prompt has {len(ids)} tokens, the base takes {limit}; shorten it")
    room = max_tokens if limit is None else min(max_tokens, limit - len(ids))
    (made,) = continuations(model, base, [ids], room)
    text: str = base.tokenizer.decode(made, skip_special_tokens=True)
    return text


def continuations(
    model: torch.nn.Module, base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """What the model says after each of several prompts, the likeliest token each time: tokens, without the end.

    Prompts of unequal length are padded at their beginnings. What is there does not count, so a row says what it would
    say alone, up to the last digits of its logits.

    Args:
        model: a causal language model as transformers makes it, or several together.
        base: which says what ends a text.
        prompts: tokens, at least one in each.
        max_new_tokens: most tokens to add.
    """
    ends = _ends(base)
    if isinstance(model, Mixture):
        made = [_generate(model, list(prompt), max_new_tokens, ends) for prompt in prompts]
    else:
        made = _generate_batch(model, base, prompts, max_new_tokens, ends)
    return [list(takewhile(lambda token: token not in ends, each)) for each in made]


def _generate_batch(
    model: Any, base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: set[int]
) -> list[list[int]]:
    width, padding = max(map(len, prompts)), min(ends, default=0)
    tokens = np.array([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = next(model.parameters()).device
    with torch.inference_mode(), _by_likelihood_alone(base.model):
        made = model.generate(
            input_ids=torch.from_numpy(tokens).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(ends) or None,
            pad_token_id=padding,
        )
    new: list[list[int]] = made[:, width:].tolist()
    return new


@contextmanager
def _by_likelihood_alone(model: Any) -> Iterator[None]:
    """Without what the base's files say of how to choose tokens.

    A penalty of repetition, say, would be followed by `generate`; but no digest covers it, so that nodes might differ.
    """
    configured = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = configured


def _generate(model: Mixture, ids: list[int], room: int, ends: set[int]) -> list[int]:
    """The likeliest tokens after these, one by one, up to one that ends the text."""
    made: list[int] = []
    past_by_agent: dict[int, Any] = {}
    new = torch.tensor([ids], device=next(model.parameters()).device)

    def last(each: torch.nn.Module, agent: int) -> torch.Tensor:
        found: Any = each(input_ids=new, past_key_values=past_by_agent.get(agent), use_cache=True)
        past_by_agent[agent] = found.past_key_values
        logits: torch.Tensor = found.logits[0, -1]
        return logits

    with torch.inference_mode():
        while len(made) < room:
            made.append(int(model.together(last).argmax()))
            if made[-1] in ends:
                break
            new = new.new_tensor([[made[-1]]])
    return made


def _ends(base: Base) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's own configuration."""
    configured = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, base.tokenizer.eos_token_id] if token is not None}


@memory_explained("for this text", SAYING)
def classify(
    base: Base, model: torch.nn.Module, task: Task, sequence_length: int | None, text: str
) -> tuple[str, float]:
    """The likeliest label of a text, cut to fit into `sequence_length` (None: as usual), and its probability.

    Raises:
        DataError: the text is empty.
    """
    if not text.strip():
        raise DataError("the text is empty; give one to classify")
    length = sequence_length or base.usual_length
    rows = labelled.arrange([text], [0], base.tokenizer, length, task, base.padding)
    probabilities = label_logits(model, rows.take(np.array([0]))).softmax(1)[0]
    number = int(probabilities.argmax())
    return task.labels[number], float(probabilities[number])
