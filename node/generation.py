"""What a model says of one text: how it goes on, or which label it has. The tokens are those of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from node import labelled
from node.base import Base
from node.completions import prompt_ids
from node.losses import label_logits
from node.records import DataError
from zo.manifest import Task


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
    generating: Any = model
    end = base.tokenizer.eos_token_id
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        made = generating.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=room,
            do_sample=False,
            use_cache=True,
            pad_token_id=0 if end is None else end,
        )
    text: str = base.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
    return text


def classify(
    base: Base, model: torch.nn.Module, task: Task, sequence_length: int, text: str
) -> tuple[str, float]:
    """The likeliest label of a text, and its probability.

    Raises:
        DataError: the text is empty.
    """
    if not text.strip():
        raise DataError("the text is empty; give one to classify")
    rows = labelled.arrange([text], [0], base.tokenizer, sequence_length, task, base.padding)
    probabilities = label_logits(model, rows.take(np.array([0]))).softmax(1)[0]
    number = int(probabilities.argmax())
    return task.labels[number], float(probabilities[number])
