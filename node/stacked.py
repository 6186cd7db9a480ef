"""Several views of the adapter in one forward pass: the batch is stacked, and each part of it meets a view of its own.

Decides how a LoRA layer computes with one pair of factors per part, and a head with one weight per part; the base's
layer runs once on the whole stack, so that a pass bound by reading the base's weights costs no more for several views
than for one. When that is worth it is measured elsewhere (`node.rehearsal`); the plain forward with one view is PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from node.adapter import NAME, Adapter
from zo.layout import HEAD, HEAD_BIAS, HEAD_WEIGHT


@contextmanager
def side_by_side(adapter: Adapter, num_views: int) -> Iterator[None]:
    """While it holds, the model takes batches of `num_views` equal parts, and part i meets row i of `adapter.views`.

    The parts follow each other along the first dimension of the batch, and every adapted layer must get them like
    that: a model that gathers tokens between its layers (a mixture of experts) cannot be stacked.

    Args:
        adapter: holds at least `num_views` views.
        num_views: at least 1.

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
        sums = result.to(B.dtype).reshape(len(B), -1, result.shape[-1])
        sums = torch.baddbmm(sums, torch.matmul(parts, A.mT), B.mT, alpha=scaling)
        return sums.to(result.dtype).view(result.shape)

    return forward
