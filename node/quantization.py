"""How a base is quantised when it is loaded: what bitsandbytes is asked for, and what is refused before it begins.

Which kind the run wants stands in its manifest; which shapes fit is decided in `zo.quantization`. Layout, frozen A and
adapter know nothing of it: they are float32 in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transport.base_files import layers_only
from zo.manifest import BaseModel
from zo.quantization import FOUR_BIT, Kind, check_shapes, skipped


class QuantizationError(ValueError):
    """This base cannot be quantised as asked; the message says why and what would work."""


def agreed(base: BaseModel, kind: Kind | None, skip: Sequence[str] | None) -> tuple[Kind, tuple[str, ...]]:
    """How this node quantises the run's base, and which modules it leaves out.

    Args:
        base: of the run's manifest.
        kind: what this node asks for; None for what the run says.
        skip: likewise.

    Raises:
        QuantizationError: the node asks for another than the run's, and the run does not allow it.
    """
    wanted = base.quantize if kind is None else kind
    left_out = base.skip_quantize if skip is None else tuple(skip)
    if wanted == "none":
        left_out = ()
    if (wanted, left_out) != (base.quantize, base.skip_quantize) and not base.any_quantization:
        without = f" without {', '.join(base.skip_quantize)}" if base.skip_quantize else ""
        raise QuantizationError(
            f"all nodes of this run hold the base quantised as {base.quantize}{without}. Join without --quantize and "
            "--skip-quantize; only a run made with `zo-coordinator init --any-quantization` leaves the choice to nodes"
        )
    return wanted, left_out


def loading_options(folder: Path, auto: Any, config: Any, kind: Kind, skip: Sequence[str]) -> dict[str, Any]:
    """Arguments for transformers' `from_pretrained` that quantise the base in `folder`; none for "none".

    The shapes are looked at in an empty model first, so that a large base is not read in vain. What stands in no
    numbered layer (the output layer, a pooler, a head) is left as it is.

    Args:
        folder: for messages.
        auto: transformers' class that will load the base.
        config: of the base.
        kind: how to quantise.
        skip: linear modules to leave as they are.

    Raises:
        QuantizationError: a layer does not fit, a name in `skip` is unknown, the base is quantised already, or
            bitsandbytes is missing.
    """
    if kind == "none":
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    if getattr(config, "quantization_config", None) is not None:
        raise QuantizationError(
            f"the files in {folder} are quantised already; use --quantize none, or the base they were made from"
        )
    with torch.device("meta"):
        empty = auto.from_config(config, trust_remote_code=False)
    linear = {
        name: shape for name, module in empty.named_modules() if (shape := linear_shape(module)) is not None
    }
    layers = layers_only(linear)
    try:
        check_shapes(kind, layers, skip)
    except ValueError as error:
        raise QuantizationError(str(error)) from error
    _check_library()
    left_out = sorted({*(linear.keys() - layers.keys()), *skipped(layers, skip)})
    if kind in FOUR_BIT:
        asked = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=left_out,
        )
    else:
        asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_out)
    # The device is named because transformers would take a GPU if there is one.
    return {"quantization_config": asked, "device_map": {"": "cpu"}}


def linear_shape(module: Any) -> tuple[int, int] | None:
    """(out_features, in_features) of a module that is a linear layer, quantised or not; None for any other."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return module.out_features, module.in_features
    return (
        (module.nf, module.nx) if isinstance(module, Conv1D) else None
    )  # GPT-2 has linear layers of this name


def _check_library() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise QuantizationError(
            f"a quantised base needs bitsandbytes, which cannot be imported ({error}); "
            "install the node's extras: pip install 'zo-swarm[node]'"
        ) from error
