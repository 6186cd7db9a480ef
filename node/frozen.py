"""The frozen part of a model: what is below everything that is trained is computed once for a batch, not for each view.

Decides whether there is such a part: the whole backbone, where only what lies on top of it is trained, a head say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from node.adapter import Adapter


def frozen_backbone(adapter: Adapter) -> torch.nn.Module | None:
    """The model's backbone, embeddings and layers, if nothing in it is trained; None if something is."""
    prefix = getattr(adapter.model, "base_model_prefix", "")
    if any(path.partition(".")[0] == prefix for path in adapter.paths.values()):
        return None
    backbone = getattr(adapter.model, prefix, None) if prefix else None
    return backbone if isinstance(backbone, torch.nn.Module) else None


Answers = deque[tuple[dict[str, Any], Any]]
"""What a backbone was given, and what it answered."""


@contextmanager
def once_per_batch(backbone: torch.nn.Module | None, known: Answers | None = None) -> Iterator[None]:
    """Within it, a backbone that is given the same as before answers the same without computing it again.

    Args:
        backbone: from `frozen_backbone`; None changes nothing.
        known: where to keep answers; as many as it has room for. The last one, until the end, if it is None.
    """
    if backbone is None:
        yield
        return
    known = deque(maxlen=1) if known is None else known
    before, compute = vars(backbone).get("forward"), backbone.forward

    def forward(*args: Any, **options: Any) -> Any:
        given = {str(place): value for place, value in enumerate(args)} | options
        for known_given, answer in known:
            if _are_equal(known_given, given):
                return answer
        # An answer kept from inference mode would refuse to serve whoever wants gradients above it.
        with torch.inference_mode(False), torch.no_grad():
            answer = compute(*args, **options)
        known.append((given, answer))
        return answer

    backbone.forward = forward
    try:
        yield
    finally:
        if before is None:
            del backbone.forward
        else:
            backbone.forward = before


def _are_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_is_equal(one[name], other[name]) for name in one)


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    # What is neither tensor nor plain value (a cache, say) is equal to itself at most.
    return one is other or (isinstance(one, bool | int | float | str) and bool(one == other))
