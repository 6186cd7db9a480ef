"""Several views of the adapter in one forward pass: the batch is stacked, and each part of it meets a view of its own.

Decides how a LoRA layer computes with one pair of factors per part, and a head with one weight per part. The base's
layer runs once on the whole stack, so that a pass bound by reading the base's weights costs no more for several views
than for one; layers below the first adapted one run on every batch once, however many views it meets. When that is
worth it is measured elsewhere (`node.rehearsal`); the plain forward with one view is PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from transformers import Cache

from node.adapter import NAME, Adapter
from zo.layout import HEAD, HEAD_BIAS, HEAD_WEIGHT

_CACHES: Final = ("past_key_values", "past_key_value", "layer_past", "cache_params")
"""What layers call what they are to remember, where it is not of the class Cache."""


@contextmanager
def side_by_side(adapter: Adapter, num_views: int, num_copies: int = 1) -> Iterator[None]:
    """While it holds, the model takes batches of `num_views` equal parts, and part i meets row i of `adapter.views`.

    The parts follow each other along the first dimension of the batch, and every adapted layer must get them like
    that: a model that gathers tokens between its layers (a mixture of experts) cannot be stacked.

    Args:
        adapter: holds at least `num_views` views.
        num_views: at least 1.
        num_copies: how many parts after each other hold the same rows: 2 for both signs on one batch. Layers below the
            first adapted one then run on one of them, unless they are given a cache, as where text is generated.

    Raises:
        ValueError: the adapter holds fewer views.
    """
    if not 1 <= num_views <= len(adapter.views):
        raise ValueError(f"the adapter holds {len(adapter.views)} views, asked for {num_views}")
    views = adapter.views[:num_views]
    stacks = {
        parameter.name: views[:, parameter.offset : parameter.offset + parameter.size].view(
            num_views, *parameter.shape
        )
        for parameter in adapter.layout.parameters
    }
    replaced: list[Any] = []
    try:
        for name, path in adapter.paths.items():
            layer: Any = adapter.model.get_submodule(path)
            replaced.append(layer)
            if name == HEAD:
                layer.forward = _linear(stacks[HEAD_WEIGHT], stacks.get(HEAD_BIAS))
                continue
            A = stacks.get(f"{name}.lora_A", layer.lora_A[NAME].weight)
            layer.forward = _low_rank(layer.base_layer, A, stacks[f"{name}.lora_B"], layer.scaling[NAME])
        if num_copies > 1:
            frozen, _ = frozen_layers(adapter)
            replaced += frozen
            for place, each in enumerate(frozen):
                last = place == len(frozen) - 1
                each.forward = _once(each.forward, num_views, num_copies, place == 0, last)
        yield
    finally:
        for layer in replaced:
            vars(layer).pop("forward", None)  # the class's is PEFT's again


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of a head: W_i x + b_i for part i of the rows of x.

    Args:
        weight: (num_views, num_labels, in_features).
        bias: (num_views, num_labels), or None.
    """

    def forward(x: torch.Tensor) -> torch.Tensor:
        result = torch.matmul(x.to(weight.dtype).reshape(len(weight), -1, x.shape[-1]), weight.mT)
        if bias is not None:
            result = result + bias[:, None]
        return result.view(*x.shape[:-1], -1)

    return forward


def _low_rank(
    base: torch.nn.Module, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of a LoRA layer: base(x) + scaling · B_i A_i x for part i of the rows of x.

    Args:
        base: the frozen layer.
        A: (num_views, rank, in_features), or (rank, in_features) if all views share it.
        B: (num_views, out_features, rank).
        scaling: alpha / rank.
    """

    def forward(x: torch.Tensor) -> torch.Tensor:
        result = base(x)
        parts = x.to(B.dtype).reshape(len(B), -1, x.shape[-1])
        sums: torch.Tensor = result.to(B.dtype).reshape(len(B), -1, result.shape[-1])
        sums.baddbmm_(torch.matmul(parts, A.mT), B.mT, alpha=scaling)  # what the base made is ours to add to
        return sums.to(result.dtype).view(result.shape)

    return forward


def frozen_layers(adapter: Adapter) -> tuple[list[Any], float]:
    """The layers from the first on that are below every adapted one, and which share of all layers they are.

    All of them, if the head is trained alone; none, if it cannot be told.
    """
    model: Any = adapter.model
    number = getattr(model.config, "num_hidden_layers", None)
    lists = ((path, each) for path, each in model.named_modules() if isinstance(each, torch.nn.ModuleList))
    path, layers = next(((path, each) for path, each in lists if len(each) == number), ("", []))
    places = []
    for name, adapted in adapter.paths.items():
        if adapted.startswith(f"{path}."):
            places.append(int(adapted.removeprefix(f"{path}.").partition(".")[0]))
        elif name != HEAD:
            return [], 0.0  # it may come before the layers
    if not layers:
        return [], 0.0
    count = min(places, default=len(layers))
    return list(layers)[:count], count / len(layers)


def _once(
    forward: Callable[..., Any], num_views: int, num_copies: int, is_first: bool, is_last: bool
) -> Callable[..., Any]:
    """The forward of a frozen layer on a stack of which `num_copies` parts after each other are equal.

    It runs on one of each, and so do the layers up to the last, which gives every copy the result. With a cache, under
    whatever name and in whatever place, text is generated, and the copies do not stay equal.
    """

    num_batches = num_views // num_copies

    def first_of_each(value: Any, num_rows: int) -> Any:
        if isinstance(value, tuple):
            return tuple(first_of_each(each, num_rows) for each in value)
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or len(value) != num_rows:
            return value
        return value.reshape(num_batches, num_copies, -1, *value.shape[1:])[:, 0].flatten(0, 1)

    def for_all(value: torch.Tensor) -> torch.Tensor:
        parts = value.reshape(num_batches, 1, -1, *value.shape[1:])
        return parts.expand(-1, num_copies, *parts.shape[2:]).flatten(0, 2)

    def once(hidden: torch.Tensor, *others: Any, **more: Any) -> Any:
        has_cache = any(isinstance(value, Cache) for value in (*others, *more.values()))
        if has_cache or any(more.get(name) is not None for name in _CACHES):
            return forward(hidden, *others, **more)
        num_rows = len(hidden) if is_first else len(hidden) * num_copies
        others = first_of_each(others, num_rows)
        more = {name: first_of_each(value, num_rows) for name, value in more.items()}
        result = forward(first_of_each(hidden, num_rows) if is_first else hidden, *others, **more)
        if not is_last:
            return result
        return (for_all(result[0]), *result[1:]) if isinstance(result, tuple) else for_all(result)

    return once
