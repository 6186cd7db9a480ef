"""The adapter: low-rank matrices inside the base, and its head, whose trained entries are views of one flat vector.

Decides how the vector and the model's tensors correspond (LoRA, arXiv 2106.09685: W + alpha / rank · B A).
Where the numbers come from is decided elsewhere: `load` takes a view, `export` the weights of a run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import node.bnb  # noqa: F401  # before peft imports what this imports

# isort: split
import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, inject_adapter_in_model, load_peft_weights
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.numpy import save_file
from transformers.pytorch_utils import Conv1D

from node.base import Base, BaseError
from node.heads import HeadModule, whole_head
from transport import hub
from transport.adapter_files import Start
from zo.directions import RunKey
from zo.initial import adapted_modules
from zo.layout import HEAD, Layout, initial_lora_A, lora_layout
from zo.weights import to_float

NAME = "default"  # PEFT's own name for a model's only adapter
FILE = "adapter_model.safetensors"


class Adapter:
    """LoRA layers in a base and its head, if it has one, set as a whole from a flat float32 vector.

    The base's model is changed in place: it computes base plus adapter from then on. One adapter per base.
    """

    layout: Layout
    """Names, shapes and offsets of the trained tensors."""
    model: torch.nn.Module
    """The base's model with the LoRA layers in it, in evaluation mode."""
    paths: dict[str, str]
    """Where in the model each adapted module is, and the head as `zo.layout.HEAD`."""
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
        start: Start | None = None,
    ) -> None:
        """Put LoRA layers on the targeted linear modules of the base; the model still computes the base.

        Args:
            base: what to adapt.
            key: the run's; generates the A that is frozen with train="B".
            targets: module names, whole or from a dot on: "q_proj", "layers.0.mlp.up_proj"; none: the head alone.
            rank: columns of B, rows of A.
            alpha: B A is scaled by alpha / rank.
            train: whether the vector holds B alone or A and B.
            start: an adapter whose frozen values take the place of the generated ones.

        Raises:
            ValueError: an unknown target (its near matches are named), a base that has an adapter already, or a start
                that has something beside the head which the base does not have.
        """
        if any(hasattr(module, "lora_A") for module in base.model.modules()):
            raise ValueError(f"the base {base.path} has an adapter already; load it again for another")
        head = None if base.head is None else base.head.shape
        self.layout = lora_layout(base.linear_shapes, targets, rank, train, head)
        self.size = self.layout.size
        modules = adapted_modules(self.layout)
        paths = [base.path_by_name[name] for name in modules]
        self.config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=_targets(base.model, targets, paths),
            bias="none",
            fan_in_fan_out=any(isinstance(base.model.get_submodule(path), Conv1D) for path in paths),
            task_type="CAUSAL_LM",
        )
        if modules:
            with warnings.catch_warnings():
                # Of merging an adapter of the output layer, which `export_merged` does as it should be.
                warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
                inject_adapter_in_model(self.config, base.model, adapter_name=NAME)
        self.model = base.model
        self._use_cache = base.use_cache
        self.model.eval()
        self.model.requires_grad_(False)

        self.paths = dict(zip(modules, paths, strict=True))
        self._frozen: dict[str, NDArray[np.float32]] = {}
        for index, (name, path) in enumerate(self.paths.items()):
            out_features, in_features = base.linear_shapes[name]
            given = None if start is None else start.values.get(f"{name}.lora_A")
            A = initial_lora_A(key, index, (rank, in_features)) if given is None else given
            B = torch.zeros(out_features, rank)
            for factor, values in (("lora_A", torch.from_numpy(A.copy())), ("lora_B", B)):
                _set(self.model, f"{path}.{factor}.{NAME}.weight", values)
            if train == "B":
                self._frozen[f"{path}.lora_A.weight"] = A
        if base.head is not None:
            self._take_head(base.head, {} if start is None else start.beside_head)
        self.hold(1)

    def _take_head(self, head: HeadModule, beside: Mapping[str, NDArray[np.float32]]) -> None:
        """See to it that the head is a part of the vector and of what is exported, with what goes beside it."""
        self.paths[HEAD] = head.path
        saved = {*head.saved, *(whole_head(self.model, path.rpartition(".")[0]) for path in beside)}
        for path, values in beside.items():
            try:
                expected = tuple(self.model.get_parameter(path).shape)
            except AttributeError:
                expected = ()
            if values.shape != expected:
                raise ValueError(
                    f"{path} of the adapter to start from is of shape {values.shape}, here {expected}"
                )
            _set(self.model, path, torch.from_numpy(values.copy()))
        for path in sorted(saved):
            for name, parameter in self.model.get_submodule(path).named_parameters():
                self._frozen[f"{path}.{name}"] = parameter.float().cpu().numpy()
        # The head is float32, whatever the base is computed in.
        self.model.get_submodule(head.path).register_forward_pre_hook(_in_float32)
        self.config.task_type = "SEQ_CLS"
        self.config.modules_to_save = [path.rpartition(".")[2] for path in sorted(saved)]

    def hold(self, num_views: int) -> None:
        """Make room for so many views of the vector; the model goes on computing with the first of them.

        Args:
            num_views: at least 1; each takes 4 bytes per entry of the vector, on another device than a CPU twice.
        """
        host = torch.zeros(num_views, self.size)
        views = host.to(next(self.model.parameters()).device)  # the same memory on a CPU
        for parameter in self.layout.parameters:
            path = self.path_of(parameter.name)
            view = views[0, parameter.offset : parameter.offset + parameter.size].view(parameter.shape)
            view.copy_(self.model.get_parameter(path))
            _set(self.model, path, view)
        self.views, self._on_host, self.host = views, host, host.numpy()

    def path_of(self, parameter: str) -> str:
        """Where in the model a parameter of the layout is."""
        name, _, last = parameter.rpartition(".")
        return f"{self.paths[name]}.{last}" if name == HEAD else f"{self.paths[name]}.{last}.{NAME}.weight"

    def push(self) -> None:
        """Bring what was written into `host` to where the model computes."""
        if self.views.data_ptr() != self._on_host.data_ptr():
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

    def load_weights(self, weights: NDArray[np.int32]) -> None:
        """Set every trained tensor to the values of a run's weights, int32 (size,), without another copy of them."""
        to_float(weights, out=self.host[0])
        self.views[0].copy_(self._on_host[0])

    def export(self, directory: str | Path, weights: NDArray[np.int32], base_name: str) -> None:
        """Write a plain PEFT adapter that `PeftModel.from_pretrained(base, directory)` loads.

        Args:
            directory: made if it is missing; receives adapter_config.json and adapter_model.safetensors.
            weights: the weights of a run, int32 (size,).
            base_name: what the adapter's configuration names as its base: a path, a hub name, or NAME@REVISION.

        Raises:
            ValueError: the weights do not fit the layout.
        """
        if weights.shape != (self.size,):
            raise ValueError(f"the adapter has {self.size} weights, got shape {weights.shape}")
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {
            self.path_of(name).replace(f".{NAME}.weight", ".weight"): values
            for name, values in self.layout.split(to_float(weights)).items()
        }
        config = LoraConfig(**self.config.to_dict())
        config.base_model_name_or_path, config.revision = hub.split(base_name)
        config.inference_mode = True
        if not isinstance(config.target_modules, str):
            config.target_modules = sorted(
                config.target_modules
            )  # a set: its order differs between processes
        config.save_pretrained(folder)
        save_file(
            {
                f"base_model.model.{name}": np.ascontiguousarray(t)
                for name, t in (self._frozen | trained).items()
            },
            folder / FILE,
            metadata={"format": "pt"},
        )

    def export_merged(self, directory: str | Path, weights: NDArray[np.int32], tokenizer: Any) -> None:
        """Write a plain model with the adapter merged into its weights, and the tokenizer beside it.

        The base must not be quantised. This adapter is used up: its layers are gone from the model. If the output layer
        has an adapter, and was the input embedding, it no longer is.

        Args:
            directory: made if it is missing; receives what `save_pretrained` writes, in float32.
            weights: the weights of a run, int32 (size,).
            tokenizer: the base's.

        Raises:
            ValueError: the weights do not fit the layout.
        """
        self.load_weights(weights)
        model: Any = self.model
        for name in adapted_modules(self.layout):
            path = self.paths[name]
            parent, _, last = path.rpartition(".")
            module: Any = self.model.get_submodule(path)
            layer = module.get_base_layer()
            if _num_holders(self.model, layer.weight) > 1:
                # The output layer of many models is the input embedding, which must stay as it is.
                layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
                model.config.tie_word_embeddings = False
            module.merge()
            setattr(self.model.get_submodule(parent), last, layer)
        if self._use_cache is None:
            del model.config.use_cache  # nor is it in the base's configuration
        else:
            model.config.use_cache = self._use_cache
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _in_float32(_head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(each.float() for each in inputs)


def with_adapter(model: torch.nn.Module, adapter: Path, name: str = NAME) -> torch.nn.Module:
    """The model with a PEFT adapter from a directory, in evaluation mode.

    Args:
        model: a base, or what this gave before: then the adapter is one more, and the first stays the active one.
        adapter: the directory.
        name: what PEFT is to call it.

    Raises:
        BaseError: there is none, or it is broken or another model's.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise BaseError(f"{adapter} is not a PEFT adapter: it has no adapter_config.json")
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(adapter), name)
            loaded: torch.nn.Module = model.eval()
        else:
            loaded = PeftModel.from_pretrained(model, str(adapter), name).eval()
    except Exception as error:  # PEFT raises many kinds for a broken file
        raise BaseError(f"cannot load the adapter {adapter}: {error}") from error
    return loaded


def brings_head(adapter: Path, head: HeadModule) -> bool:
    """Whether a PEFT adapter brings a head: else transformers' own would count, which is random, also below factors."""
    try:
        names = load_peft_weights(str(adapter), device="cpu")
    except Exception:  # PEFT raises many kinds for a broken file
        return True  # loading it for good says what is wrong
    return any(f".{name}".endswith(f".{head.path}.weight") for name in names)


def _num_holders(model: torch.nn.Module, weight: torch.nn.Parameter) -> int:
    return sum(each is weight for _, each in model.named_parameters(remove_duplicate=False))


def _targets(model: torch.nn.Module, targets: Sequence[str], paths: Sequence[str]) -> list[str] | str:
    """How a PEFT configuration names the modules at `paths`: as the run does, if PEFT means the same by it."""
    if not paths:
        return str(DUMMY_TARGET_MODULES)  # what PEFT understands as none
    ends = tuple(f".{target}" for target in targets)
    meant = {path for path, _ in model.named_modules() if path in targets or path.endswith(ends)}
    return list(targets if meant == set(paths) else paths)


def _set(model: torch.nn.Module, path: str, values: torch.Tensor) -> None:
    owner, _, name = path.rpartition(".")
    device = model.get_parameter(path).device
    setattr(model.get_submodule(owner), name, torch.nn.Parameter(values.to(device), requires_grad=False))
