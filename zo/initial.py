"""Where a run starts: the weights of round 0, which follow from the layout and the run key alone."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zo.directions import RunKey
from zo.layout import Layout, initial_lora_A
from zo.weights import from_float, zeros


def adapted_modules(layout: Layout) -> tuple[str, ...]:
    """The sorted names of the linear modules that a LoRA layout trains.

    The place of a module in this order is the `layout_index` of its initial A.
    """
    return tuple(sorted({parameter.name.rpartition(".")[0] for parameter in layout.parameters}))


def initial_weights(layout: Layout, key: RunKey, train: Literal["B", "AB"]) -> NDArray[np.int32]:
    """The weights before the first commit: int32 (layout.size,).

    Every B is zero, so that the model starts as its base. A, where it is trained, is the generated A that a
    run with train="B" keeps frozen, rounded to the grid of the weights.

    Raises:
        ValueError: `train` is neither "B" nor "AB", or the layout holds other parameters than it says.
    """
    if train not in ("B", "AB"):
        raise ValueError(f'train must be "B" or "AB", got {train!r}')
    weights = zeros(layout.size)
    index_by_module = {module: index for index, module in enumerate(adapted_modules(layout))}
    for parameter in layout.parameters:
        module, _, factor = parameter.name.rpartition(".")
        if factor == "lora_A" and train == "AB":
            rank, in_features = parameter.shape
            A = initial_lora_A(key, index_by_module[module], (rank, in_features))
            weights[parameter.offset : parameter.offset + A.size] = from_float(A.ravel())
        elif factor != "lora_B":
            raise ValueError(f'a layout with train="{train}" has no parameter {parameter.name}')
    return weights
