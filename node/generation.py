"""Text from a model: what it says after a prompt. The same tokens as in training go before (`node.completions`)."""

from __future__ import annotations

from typing import Any

import torch

from node.base import Base
from node.completions import prompt_ids
from node.data import DataError


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
