"""The classification head of a loaded model: where it is, and what goes beside it that the base's files lack.

A base is often a bare encoder or a language model: transformers puts a head on it and fills what the files lack with
random numbers, on every node with others. Here the head's last linear layer is found, whose values are the run's, and
everything else is given values that change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from transport.base_files import is_in_layer
from zo.layout import Head


@dataclass(frozen=True, kw_only=True)
class HeadModule:
    """The last linear layer of a classifier."""

    path: str
    """Of the layer in the model."""
    shape: Head
    is_in_files: bool
    """Whether the base's files have it, so that the base is a classifier without any adapter."""
    saved: tuple[str, ...]
    """Paths of the modules that must go with an adapter as a whole: with the head, and with what was completed."""


def find_head(model: torch.nn.Module, num_labels: int) -> tuple[str, torch.nn.Linear] | None:
    """Path and module of the last linear layer outside the backbone that gives one logit for each label."""
    backbone = f"{getattr(model, 'base_model_prefix', '')}."
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module.out_features == num_labels
        and not path.startswith(backbone)
    ]
    return found[-1] if found else None


def complete(model: torch.nn.Module, num_labels: int, missing: Sequence[str]) -> tuple[HeadModule, list[str]]:
    """The head, and what the files still lack when everything beside it has values that change nothing.

    What lies between backbone and head (a pooler, a layer before the last) becomes the identity, and a normalisation
    has scale 1 and shift 0. The activations in between stay.

    Args:
        model: as transformers loaded it; changed in place.
        num_labels: how many logits it has.
        missing: names of the parameters that the files lack.

    Raises:
        ValueError: the model has no head of that size.
    """
    found = find_head(model, num_labels)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no linear head of {num_labels} labels")
    head, linear = found
    saved, left = {whole_head(model, head)}, []
    for name in missing:
        path = name.rpartition(".")[0]
        if path == head:
            continue
        neutral = _neutral(name, model.get_parameter(name)) if _is_beside_head(model, name) else None
        if neutral is None:
            left.append(name)
            continue
        with torch.no_grad():
            model.get_parameter(name).copy_(neutral)
        saved.add(whole_head(model, path))
    shape = Head(num_labels, linear.in_features, linear.bias is not None)
    in_files = not any(name.rpartition(".")[0] == head for name in missing)
    return HeadModule(path=head, shape=shape, is_in_files=in_files, saved=tuple(sorted(saved))), left


def whole_head(model: torch.nn.Module, path: str) -> str:
    """The path of the module to save that has the one at `path`: the whole head, or the pooler in the backbone."""
    parts = path.split(".")
    inside = parts[0] == getattr(model, "base_model_prefix", "")
    return ".".join(parts[: parts.index("pooler") + 1]) if inside else parts[0]


def padding(model: Any, tokenizer: Any) -> int:
    """The token that fills up rows of a classifier; the model's configuration names it afterwards.

    Raises:
        ValueError: the model finds the end of a row by the padding, and neither it nor the tokenizer has any.
    """
    known = (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    token = next((each for each in known if each is not None and each >= 0), None)
    if token is None and hasattr(model, "score"):  # so are the heads named that are put on causal models
        raise ValueError(
            "the tokenizer has neither a padding token nor an end-of-text token, and this model finds the end of a "
            'row by the padding; set "pad_token" in tokenizer_config.json'
        )
    model.config.pad_token_id = 0 if token is None else token
    return int(model.config.pad_token_id)


def _is_beside_head(model: torch.nn.Module, name: str) -> bool:
    """Whether a parameter lies between the layers and the head: a hole in the layers is not to be filled."""
    backbone = f"{getattr(model, 'base_model_prefix', '')}."
    return not is_in_layer(name) and (not name.startswith(backbone) or "pooler" in name.split("."))


def _neutral(name: str, parameter: torch.Tensor) -> torch.Tensor | None:
    """Shift 0, scale 1, the identity; None for what has no such value."""
    if parameter.ndim == 1:
        return torch.zeros_like(parameter) if name.endswith("bias") else torch.ones_like(parameter)
    if parameter.ndim == 2 and parameter.shape[0] == parameter.shape[1]:
        return torch.eye(len(parameter), dtype=parameter.dtype)
    return None
