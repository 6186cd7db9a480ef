"""Bases of random parameters and rows of random tokens: for speed, what a model has learnt does not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from node import embedded
from node.base import load_base
from node.data import Windows
from zo.quantization import Dtype


def write(folder: Path, *, device: str = "cpu", dtype: Dtype = "float32", **shape: Any) -> None:
    """Write a Llama of random parameters with the tokenizer of the embedded base.

    Args:
        folder: made if it is missing.
        device: where the parameters are drawn.
        dtype: what they are written in.
        shape: fields of transformers' LlamaConfig; as many tokens as the tokenizer has, if it does not say how many.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = load_base(embedded.path()).tokenizer
    config = LlamaConfig(**{"vocab_size": len(tokenizer), "dtype": dtype, **shape})
    with torch.device(device):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def windows(num_tokens: int, batch: tuple[int, int]) -> Windows:
    """Rows for four batches of so many rows and tokens, of a vocabulary of `num_tokens`."""
    rows, length = batch
    tokens = np.random.default_rng(0).integers(2, num_tokens, (4 * rows, length)).astype(np.int32)
    return Windows(tokens=tokens, num_texts=1, num_tokens=tokens.size, num_dropped=0)
