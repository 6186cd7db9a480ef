"""The adapter: low-rank matrices inside the base whose trained entries are views of one flat vector.

Decides how the vector and the model's tensors correspond (LoRA, arXiv 2106.09685: W + alpha / rank · B A).
Where the numbers come from is decided elsewhere: `load` takes a view, `export` the weights of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.numpy import save_file

from node.base import Base, BaseError
from zo.directions import RunKey
from zo.initial import adapted_modules
from zo.layout import Layout, initial_lora_A, lora_layout
from zo.weights import to_float

NAME = "default"  # PEFT's own name for a model's only adapter
FILE = "adapter_model.safetensors"


class Adapter:
    """LoRA layers in a base, set as a whole from a flat float32 vector.

    The base's model is changed in place: it computes base plus adapter from then on. One adapter per base.
    """

    layout: Layout
    """Names, shapes and offsets of the trained tensors."""
    model: torch.nn.Module
    """The base's model with the LoRA layers in it, in evaluation mode."""
    views: torch.Tensor
    """(num_views, size) float32, where the model computes; its trained tensors are views of the first row."""
    host: NDArray[np.float32]
    """(num_views, size): the same on the host, for kernels to write; `push` brings it over. On a CPU it is `views`."""

    def __init__(
        self,
        base: Base,
        *,
        key: RunKey,
        targets: Sequence[str],
        rank: int,
        alpha: float,
        train: Literal["B", "AB"],
    ) -> None:
        """Put LoRA layers on the targeted linear modules of the base; the model still computes the base.

        Args:
            base: what to adapt.
            key: the run's; generates the A that is frozen with train="B".
            targets: module names, whole or from a dot on: "q_proj", "layers.0.mlp.up_proj".
            rank: columns of B, rows of A.
            alpha: B A is scaled by alpha / rank.
            train: whether the vector holds B alone or A and B.

        Raises:
            ValueError: an unknown target (its near matches are named), or a base that has an adapter already.
        """
        if any(hasattr(module, "lora_A") for module in base.model.modules()):
            raise ValueError(f"the base {base.path} has an adapter already; load it again for another")
        self.layout = lora_layout(base.linear_shapes, targets, rank, train)
        self.size = self.layout.size
        self.config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=list(targets),
            bias="none",
            task_type="CAUSAL_LM",
        )
        self.model = inject_adapter_in_model(self.config, base.model, adapter_name=NAME)
        self.model.eval()
        self.model.requires_grad_(False)

        self._frozen: dict[str, NDArray[np.float32]] = {}
        for index, module_name in enumerate(adapted_modules(self.layout)):
            out_features, in_features = base.linear_shapes[module_name]
            module: Any = self.model.get_submodule(module_name)
            A = initial_lora_A(key, index, (rank, in_features))
            if train == "B":
                self._frozen[f"{module_name}.lora_A"] = A
            _set(module.lora_A[NAME], torch.from_numpy(A.copy()))
            _set(module.lora_B[NAME], torch.zeros(out_features, rank))
        self.hold(1)

    def hold(self, num_views: int) -> None:
        """Make room for so many views of the vector; the model goes on computing with the first of them.

        Args:
            num_views: at least 1; each takes 4 bytes per entry of the vector, on another device than a CPU twice.
        """
        views = torch.zeros(num_views, self.size, device=next(self.model.parameters()).device)
        for parameter in self.layout.parameters:
            module_name, _, factor = parameter.name.rpartition(".")
            linear = getattr(self.model.get_submodule(module_name), factor)[NAME]
            view = views[0, parameter.offset : parameter.offset + parameter.size].view(parameter.shape)
            view.copy_(linear.weight)
            _set(linear, view)
        self.views = views
        self._on_host = views.cpu()  # the same memory on a CPU
        self.host = self._on_host.numpy()

    def push(self) -> None:
        """Bring what was written into `host` to where the model computes."""
        if self.views.device.type != "cpu":
            self.views.copy_(self._on_host)

    def load(self, view: NDArray[np.float32]) -> None:
        """Set every trained tensor: float32 (size,), in the order of the layout.

        Raises:
            ValueError: the view has another shape or type.
        """
        if view.shape != (self.size,) or view.dtype != np.float32:
            raise ValueError(
                f"the adapter takes float32 of shape ({self.size},), got {view.dtype} of shape {view.shape}"
            )
        self.host[0] = view
        self.views[0].copy_(self._on_host[0])

    def export(self, directory: str | Path, weights: NDArray[np.int32], base_name: str) -> None:
        """Write a plain PEFT adapter that `PeftModel.from_pretrained(base, directory)` loads.

        Args:
            directory: made if it is missing; receives adapter_config.json and adapter_model.safetensors.
            weights: the weights of a run, int32 (size,).
            base_name: what the adapter's configuration names as its base: a hub name or a path.

        Raises:
            ValueError: the weights do not fit the layout.
        """
        if weights.shape != (self.size,):
            raise ValueError(f"the adapter has {self.size} weights, got shape {weights.shape}")
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self._frozen | self.layout.split(to_float(weights))
        config = LoraConfig(**{**self.config.to_dict(), "base_model_name_or_path": base_name})
        config.inference_mode = True
        config.target_modules = sorted(
            config.target_modules
        )  # a set: its order differs from process to process
        config.save_pretrained(folder)
        save_file(
            {f"base_model.model.{name}.weight": np.ascontiguousarray(t) for name, t in tensors.items()},
            folder / FILE,
            metadata={"format": "pt"},
        )

    def export_merged(self, directory: str | Path, weights: NDArray[np.int32], tokenizer: Any) -> None:
        """Write a plain model with the adapter merged into its weights, and the tokenizer beside it.

        The base must not be quantised. This adapter is used up: its layers are gone from the model.

        Args:
            directory: made if it is missing; receives what `save_pretrained` writes, in float32.
            weights: the weights of a run, int32 (size,).
            tokenizer: the base's.

        Raises:
            ValueError: the weights do not fit the layout.
        """
        self.load(to_float(weights))
        for name in adapted_modules(self.layout):
            parent, _, last = name.rpartition(".")
            module: Any = self.model.get_submodule(name)
            module.merge()
            setattr(self.model.get_submodule(parent), last, module.get_base_layer())
        model: Any = self.model
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def with_adapter(model: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    """The model with a PEFT adapter from a directory, in evaluation mode.

    Raises:
        BaseError: there is none, or it is broken or another model's.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise BaseError(f"{adapter} is not a PEFT adapter: it has no adapter_config.json")
    try:
        loaded: torch.nn.Module = PeftModel.from_pretrained(model, str(adapter)).eval()
    except Exception as error:  # PEFT raises many kinds for a broken file
        raise BaseError(f"cannot load the adapter {adapter}: {error}") from error
    return loaded


def _set(linear: torch.nn.Module, values: torch.Tensor) -> None:
    linear.weight = torch.nn.Parameter(values, requires_grad=False)
