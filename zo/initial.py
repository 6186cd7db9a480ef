"""Where a run starts: the weights of round 0, which follow from the layout and the run key alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from zo.directions import UINT32_MAX, RunKey
from zo.layout import HEAD_BIAS, HEAD_WEIGHT, Layout, initial_lora_A
from zo.weights import from_float, zeros

_HEAD_INDEX: Final = UINT32_MAX
"""In the place of a module's `layout_index`: the head is no module that LoRA adapts."""


def adapted_modules(layout: Layout) -> tuple[str, ...]:
    """The sorted names of the linear modules that a LoRA layout adapts; the head is none of them.

    The place of a module in this order is the `layout_index` of its initial A.
    """
    names = {parameter.name for parameter in layout.parameters} - {HEAD_WEIGHT, HEAD_BIAS}
    return tuple(sorted({name.rpartition(".")[0] for name in names}))


def initial_weights(
    layout: Layout,
    key: RunKey,
    train: Literal["B", "AB"],
    start: Mapping[str, NDArray[np.float32]] | None = None,
) -> NDArray[np.int32]:
    """The weights before the first commit: int32 (layout.size,).

    Every B is zero, so that the model starts as its base. A, where it is trained, is the generated A that a
    run with train="B" keeps frozen, rounded to the grid of the weights. A head starts as such an A does: a small linear
    layer, with a bias of zero.

    Args:
        layout: of what is trained.
        key: of the run.
        train: what is trained of each module.
        start: values by parameter that take the place of the generated ones, rounded to the grid of the weights.

    Raises:
        ValueError: `train` is neither "B" nor "AB", the layout holds other parameters than it says, or `start` has a
            value that is not within the range of the weights.
    """
    if train not in ("B", "AB"):
        raise ValueError(f'train must be "B" or "AB", got {train!r}')
    weights = zeros(layout.size)
    index_by_module = {module: index for index, module in enumerate(adapted_modules(layout))}
    for parameter in layout.parameters:
        module, _, factor = parameter.name.rpartition(".")
        entries = weights[parameter.offset : parameter.offset + parameter.size]
        given = None if start is None else start.get(parameter.name)
        if given is not None:
            try:
                entries[:] = from_float(given.ravel())
            except ValueError as error:
                raise ValueError(f"{parameter.name}: {error}") from error
        elif parameter.name == HEAD_WEIGHT or (factor == "lora_A" and train == "AB"):
            rows, in_features = parameter.shape
            index = _HEAD_INDEX if parameter.name == HEAD_WEIGHT else index_by_module[module]
            entries[:] = from_float(initial_lora_A(key, index, (rows, in_features))).ravel()
        elif factor != "lora_B" and parameter.name != HEAD_BIAS:
            raise ValueError(f'a layout with train="{train}" has no parameter {parameter.name}')
    return weights
