"""A PEFT adapter as the start of a run, read from its files without torch: digest, settings, and values by name.

The coordinator takes rank, alpha and modules from it, and everybody the weights of round 0; so both read it here.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from transport.base_files import file_digest
from zo.layout import HEAD_BIAS, HEAD_WEIGHT, Head, targeted

CONFIGURATION: Final = "adapter_config.json"
TENSORS: Final = "adapter_model.safetensors"
_FACTOR: Final = re.compile(r"^(?P<path>.+)\.(?P<factor>lora_[AB])\.weight$")
_PREFIX: Final = "base_model.model."
_PLAIN: Final = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "arrow_config",
    "ensure_weight_tying",
)
_EMPTY: Final = (
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)
"""Settings of PEFT that make more of an adapter than B A on some modules; a run has no form for them."""
_STARTS: Final = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Ways in which factors began that left the base as it was; for others PEFT changes it, mostly at every load."""
_DTYPES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


class AdapterFilesError(ValueError):
    """A directory that holds no adapter from which a run could start; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Which low-rank factors there are."""

    targets: tuple[str, ...]
    """The modules that have some: last parts of their names."""
    rank: int
    alpha: float
    """B A is scaled by alpha / rank."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run takes from an adapter."""

    factors: Factors
    values: Mapping[str, NDArray[np.float32]]
    """By the names of a layout: both factors of every module, and a head if the adapter has one."""
    beside_head: Mapping[str, NDArray[np.float32]]
    """By the path of the parameter in the model: what the adapter brings along between base and head."""


def digest(folder: Path) -> str:
    """Hexadecimal digest of the adapter's configuration and tensors.

    Raises:
        AdapterFilesError: a file is missing or cannot be read.
    """
    for name in (CONFIGURATION, TENSORS):
        if not (folder / name).is_file():
            raise AdapterFilesError(
                f"{folder} has no {name}; an adapter to start from is a directory as PEFT's `save_pretrained` writes it"
            )
    try:
        return file_digest([folder / CONFIGURATION, folder / TENSORS])
    except OSError as error:
        raise AdapterFilesError(f"{error.filename} cannot be read: {error.strerror}") from error


def read_start(folder: Path, linear_shapes: Mapping[str, tuple[int, int]], head: Head | None) -> Start:
    """What a run on a base takes from an adapter in a directory.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        linear_shapes: (out_features, in_features) of the base's modules by their names in its files.
        head: the shape of the run's; None if its task has none.

    Raises:
        AdapterFilesError: it is no plain LoRA adapter, it is another base's, or it has what the run does not train.
    """
    digest(folder)
    settings = _settings(folder / CONFIGURATION)
    rank = settings["r"]
    values: dict[str, NDArray[np.float32]] = {}
    others: dict[str, NDArray[np.float32]] = {}
    for name, tensor in _tensors(folder / TENSORS).items():
        factor = _FACTOR.match(name)
        if factor is None:
            others[name] = tensor
            continue
        module = _module(factor["path"], linear_shapes)
        if module is None:
            raise AdapterFilesError(f"{folder} adapts {factor['path']}, which this base does not have")
        out_features, in_features = linear_shapes[module]
        expected = (rank, in_features) if factor["factor"] == "lora_A" else (out_features, rank)
        if tensor.shape != expected:
            raise AdapterFilesError(
                f"{folder} is not of this base: {name} is of shape {tensor.shape}, expected {expected}"
            )
        values[f"{module}.{factor['factor']}"] = tensor
    modules = {name.rpartition(".")[0] for name in values}
    if lone := sorted(
        module for module in modules if len({f"{module}.lora_A", f"{module}.lora_B"} - set(values))
    ):
        raise AdapterFilesError(f"{folder} has one factor of {lone[0]} without the other")
    if others:
        taken, others = _head(folder, others, head)
        values |= taken
    if not values:
        raise AdapterFilesError(f"{folder} holds no LoRA factors")
    return Start(
        factors=Factors(
            targets=_targets(modules, linear_shapes),
            rank=rank,
            alpha=settings["lora_alpha"] * (sqrt(rank) if settings.get("use_rslora") else 1.0),
        ),
        values=values,
        beside_head=others,
    )


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFilesError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise AdapterFilesError(f"{path} is of kind {kind}; a run starts from LORA")
    for name in (*_PLAIN, *_EMPTY):
        if settings.get(name):
            raise AdapterFilesError(f"{path} has {name} = {settings[name]!r}, which a run has no form for")
    if (start := settings.get("init_lora_weights", True)) not in _STARTS:
        raise AdapterFilesError(
            f"{path} has init_lora_weights = {start!r}: it belongs to a base that PEFT changes for it. Save it as "
            "plain LoRA, by save_pretrained(..., path_initial_model_for_weight_conversion=...) of PEFT, or start from "
            "the model that it is merged into"
        )
    if settings.get("bias", "none") != "none":
        raise AdapterFilesError(f"{path} has bias = {settings['bias']!r}; a run trains no biases")
    for name, kind in (("r", int), ("lora_alpha", (int, float))):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < inf:
            raise AdapterFilesError(f"{path} has {name} = {value!r}, expected a number above 0")
    return settings


def _tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """Float32 by name, without what PEFT puts before names."""
    tensors = {}
    try:
        for name, entry in sorted(deserialize(path.read_bytes())):  # type: ignore[no-untyped-call]
            dtype, data = entry["dtype"], entry["data"]
            if dtype == "BF16":  # the upper half of a float32
                values = (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
            elif dtype in _DTYPES:
                values = np.frombuffer(data, _DTYPES[dtype]).astype(np.float32)
            else:
                raise AdapterFilesError(
                    f"{path}: {name} is of type {dtype}, expected {', '.join(_DTYPES)} or BF16"
                )
            tensors[name.removeprefix(_PREFIX)] = values.reshape(entry["shape"])
    except (OSError, SafetensorError) as error:
        raise AdapterFilesError(f"{path} is not a safetensors file: {error}") from error
    return tensors


def _module(path: str, linear_shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """What the base's files call the module at a path of a model: classes of models differ in the first part of it."""
    if path in linear_shapes:
        return path
    inner = path.partition(".")[2]
    if inner in linear_shapes:
        return inner
    return next((name for name in linear_shapes if name.partition(".")[2] == path), None)


def _head(
    folder: Path, tensors: dict[str, NDArray[np.float32]], head: Head | None
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """The head's values by their names in a layout, and what is beside it."""
    if head is None:
        raise AdapterFilesError(f"{folder} holds {min(tensors)}, which a run without a head does not train")
    shape = (head.num_labels, head.in_features)
    weights = sorted(
        name for name, tensor in tensors.items() if tensor.shape == shape and name.endswith(".weight")
    )
    if not weights:
        raise AdapterFilesError(
            f"{folder} holds no head of {head.num_labels} labels, but {min(tensors)}; name the labels of its own run"
        )
    path = weights[-1].removesuffix(".weight")
    bias = tensors.get(f"{path}.bias")
    if (bias is not None) != head.has_bias:
        wrong = (
            "has no bias, but this base's has" if head.has_bias else "has a bias, but this base's has none"
        )
        raise AdapterFilesError(f"{folder}: its head {wrong}")
    taken = {HEAD_WEIGHT: tensors[f"{path}.weight"]} | ({} if bias is None else {HEAD_BIAS: bias})
    return taken, {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] != path}


def _targets(modules: set[str], linear_shapes: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Names that mean these modules and no others: as few parts of their ends as serve."""

    def shortest(module: str) -> str:
        parts = module.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
        return next((end for end in ends if modules.issuperset(targeted(linear_shapes, [end]))), module)

    return tuple(sorted({shortest(module) for module in modules}))
