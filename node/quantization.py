"""How a base is held in memory: what bitsandbytes is asked for, and what is refused before it begins.

Which kind the run wants stands in its manifest; which shapes fit is decided in `zo.quantization`. Layout, frozen A and
adapter know nothing of it: they are float32 in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transport.base_files import layers_only
from zo.manifest import BaseModel
from zo.quantization import FOUR_BIT, Dtype, Kind, check_shapes, skipped


class QuantizationError(ValueError):
    """This base cannot be quantised as asked; the message says why and what would work."""


class Form(NamedTuple):
    """How a base is held in memory, and where; the arguments of `load_base` by their names."""

    quantize: Kind = "none"
    skip_quantize: tuple[str, ...] = ()
    dtype: Dtype = "float32"
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto for a GPU if there is one."""


def agreed(
    base: BaseModel, kind: Kind | None, skip: Sequence[str] | None, dtype: Dtype | None, device: str
) -> Form:
    """How this node holds the run's base.

    Args:
        base: of the run's manifest.
        kind: the quantisation that this node asks for; None for what the run says.
        skip: modules that it leaves out of it; likewise.
        dtype: what it computes in; likewise.
        device: where; that is no business of the run's.

    Raises:
        QuantizationError: the node asks for another form than the run's, and the run does not allow it.
    """
    wanted = base.quantize if kind is None else kind
    left_out = base.skip_quantize if skip is None else tuple(skip)
    if wanted == "none":
        left_out = ()
    form = Form(wanted, left_out, base.dtype if dtype is None else dtype, device)
    if form[:3] != (base.quantize, base.skip_quantize, base.dtype) and not base.any_quantization:
        without = f" without {', '.join(base.skip_quantize)}" if base.skip_quantize else ""
        raise QuantizationError(
            f"all nodes of this run hold the base quantised as {base.quantize}{without}, and compute it in "
            f"{base.dtype}. Join without --quantize, --skip-quantize and --dtype; only a run made with "
            "`zo-coordinator init --any-quantization` leaves the choice to nodes"
        )
    return form


def loading_options(folder: Path, auto: Any, config: Any, form: Form) -> dict[str, Any]:
    """Arguments for transformers' `from_pretrained` that quantise the base in `folder`; none for "none".

    The shapes are looked at in an empty model first, so that a large base is not read in vain. What stands in no
    numbered layer (the output layer, a pooler, a head) is left as it is.

    Args:
        folder: for messages.
        auto: transformers' class that will load the base.
        config: of the base.
        form: how it is held; its device is a torch device's name.

    Raises:
        QuantizationError: a layer does not fit, a name in `skip` is unknown, the base is quantised already, or
            bitsandbytes is missing.
    """
    if form.quantize == "none":
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
        if form.device == "cpu":
            check_shapes(form.quantize, layers, form.skip_quantize)
        left_out = sorted({*(linear.keys() - layers.keys()), *skipped(layers, form.skip_quantize)})
    except ValueError as error:
        raise QuantizationError(str(error)) from error
    _check_library()
    if form.quantize in FOUR_BIT:
        asked = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=form.quantize,
            bnb_4bit_compute_dtype=getattr(torch, form.dtype),
            llm_int8_skip_modules=left_out,
        )
    else:
        asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_out)
    # The device is named because transformers would take a GPU if there is one.
    return {"quantization_config": asked, "device_map": {"": form.device}}


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
