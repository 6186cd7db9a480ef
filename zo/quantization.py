"""Which linear layers of a base are quantised, and whether their shapes allow it: names and numbers, no model.

The coordinator asks this of the shapes in the files, a node of the shapes in the model, before anything is quantised.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

from zo.layout import targeted

Kind = Literal["none", "int8", "nf4", "fp4"]
"""int8: LLM.int8() (arXiv 2208.07339); nf4, fp4: 4-bit blocks (QLoRA, arXiv 2305.14314); none: as in the files."""
KINDS: Final[tuple[Kind, ...]] = ("none", "int8", "nf4", "fp4")
Dtype = Literal["float32", "bfloat16", "float16"]
"""What the base is computed in. What is trained is float32 in any case."""
FOUR_BIT: Final = frozenset({"nf4", "fp4"})
OUTPUTS_MULTIPLE: Final = 32
"""Of the outputs of a layer that bitsandbytes 0.50 multiplies in 4 bit on a CPU."""
INPUTS_MULTIPLE: Final = 64
"""Of its inputs: a block of 64 weights shares one scale."""


def skipped(names: Iterable[str], skip: Sequence[str]) -> set[str]:
    """The modules that stay unquantised: those whose name is one of `skip`, or ends in "." and one of it.

    Raises:
        ValueError: one of `skip` means no module; the message offers near matches.
    """
    return set(targeted(names, skip)) if skip else set()


def check_shapes(kind: Kind, linear_shapes: Mapping[str, tuple[int, int]], skip: Sequence[str] = ()) -> None:
    """Check that every layer which is not skipped can be computed on a CPU when it is quantised.

    Args:
        kind: of quantisation; only 4-bit kinds have limits.
        linear_shapes: module name to (out_features, in_features), of the layers that would be quantised.
        skip: names of layers to leave as they are, as `skipped` understands them.

    Raises:
        ValueError: a layer cannot; the message names it, its size, what would fit, and the options that help. Or an
            unknown name in `skip`.
    """
    left_out = skipped(linear_shapes, skip)
    if kind not in FOUR_BIT:
        return
    misfits = {
        name: fault
        for name, shape in sorted(linear_shapes.items())
        if name not in left_out and (fault := _fault(*shape))
    }
    if not misfits:
        return
    (first, fault), *others = misfits.items()
    also = f", nor do {len(others)} more layers fit" if len(others) > 1 else ""
    also = also or ("" if not others else f", nor does {others[0][0]} fit")
    parts = sorted({name.rpartition(".")[2] for name in misfits})
    options = " ".join(f"--skip-quantize {part}" for part in parts)
    these = "this layer" if not others else "these layers"
    raise ValueError(f"layer {first} has {fault}{also}. Use --quantize int8, or skip {these} with {options}.")


def _fault(out_features: int, in_features: int) -> str:
    if out_features % OUTPUTS_MULTIPLE:
        return f"{out_features} outputs; 4-bit on CPU needs a multiple of {OUTPUTS_MULTIPLE}"
    if in_features % INPUTS_MULTIPLE:
        return f"{in_features} inputs; 4-bit on CPU needs a multiple of {INPUTS_MULTIPLE}"
    return ""
