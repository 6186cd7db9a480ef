"""The base: a frozen, pretrained language model with its tokenizer, and the digests that name both.

Decides what counts as a usable base and refuses the rest in words; what is trained on top of it is the
adapter's business (`node.adapter`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from node import quantization
from node.device import device_of
from node.memory import LOADING, OutOfMemoryError, memory_explained
from node.quantization import Form, QuantizationError
from transport import base_files, hub
from zo.manifest import Manifest
from zo.quantization import Dtype, Kind

# torch and transformers take seconds to import: a wrong path or digest is refused before that.
if TYPE_CHECKING:
    import torch

    from node.heads import HeadModule


_Read = TypeVar("_Read")
USUAL_LENGTH = 128


class BaseError(RuntimeError):
    """The base cannot be used: what is wrong, where, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A pretrained model that is never trained: evaluation mode, no parameter wants a gradient.

    Its layers may be quantised, and the rest in 16 bits. The adapter's layout does not depend on that.
    """

    model: torch.nn.Module
    """A transformers causal language model, or classifier; `Adapter` puts its LoRA layers into it."""
    tokenizer: Any
    """The transformers tokenizer that belongs to the model."""
    quantization: Kind
    """How its linear layers are held in memory; "none": as in the files, in float32."""
    path: str
    """What the base was asked for by: a directory, or the name of a model on the hub."""
    digest: str
    """Hex BLAKE2b-128 of config.json and every *.safetensors."""
    tokenizer_digest: str
    """Hex BLAKE2b-128 of the files that define the tokenizer."""
    linear_shapes: Mapping[str, tuple[int, int]]
    """(out_features, in_features) of every linear module, by its name in the base's files."""
    path_by_name: Mapping[str, str]
    """Where in the model the module of each such name is; classes of models put different prefixes before names."""
    head: HeadModule | None
    """The head of a classifier."""
    padding: int | None
    """The token that fills up rows of a classifier."""
    max_sequence_length: int | None
    """The longest sequence the model was made for, in tokens; None if its configuration does not say."""
    use_cache: bool | None
    """Whether its configuration has it keep keys and values; None if it does not say. Loaded here, it does not."""

    @property
    def usual_length(self) -> int:
        """Most tokens in a row where nobody says how many."""
        return min(USUAL_LENGTH, self.max_sequence_length or USUAL_LENGTH)


def load_base(
    path: str | Path,
    *,
    threads: int | None = None,
    quantize: Kind = "none",
    skip_quantize: Sequence[str] = (),
    dtype: Dtype = "float32",
    device: str = "cpu",
    labels: Sequence[str] | None = None,
) -> Base:
    """The base in a directory, or of a name that the Hugging Face hub (or its cache here) knows.

    Args:
        path: a directory with config.json, *.safetensors and tokenizer files, or a hub name (see `transport.hub`).
        threads: how many threads torch may use in this process; None leaves torch's choice.
        quantize: how to hold the linear layers; embeddings and the output layer are never quantised.
        skip_quantize: linear modules to leave as they are: whole names, or what follows a "." in them.
        dtype: what everything else is held and computed in.
        device: where: cpu, cuda, cuda:N, or auto for a GPU if there is one.
        labels: load a classifier of these labels instead of a causal language model.

    Raises:
        DeviceError: there is no such device.
        BaseError: the base is missing, gated, incomplete or broken, or it cannot be quantised like that.
        OutOfMemoryError: memory does not suffice for it.
    """
    folder = resolve(path)
    digest = read_digest(folder)
    tokenizer_digest = read_tokenizer_digest(folder)

    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from node import heads

    if threads is not None:
        torch.set_num_threads(threads)
    place = device_of(device)
    form = Form(quantize, tuple(skip_quantize), dtype, str(place))
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # the terminal belongs to the one live line of the node
    try:
        auto, config = _architecture(folder, labels)
        options = quantization.loading_options(folder, auto, config, form)
        # What a damaged file raises depends on the format and on the library's version: any failure to read
        # the files found above means the same to the caller.
        with memory_explained(f"to load the base in {folder}", LOADING):
            model, loading = auto.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, dtype),
                ignore_mismatched_sizes=labels is not None,  # a head of another number of labels
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
            if quantize == "none":
                model.to(place)
    except OutOfMemoryError:
        raise
    except QuantizationError as error:
        raise BaseError(str(error)) from error
    except Exception as error:
        raise BaseError(
            f"the base in {folder} cannot be loaded: {_first_line(error)}. Fetch it again, or name another."
        ) from error
    finally:
        if shows_progress:
            transformers_logging.enable_progress_bar()
    # transformers fills missing tensors with random numbers and goes on: every node with its own.
    missing = sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
    head, lacking = None, missing
    if labels is not None:
        try:
            head, lacking = heads.complete(model, len(labels), missing)
        except ValueError as error:
            raise BaseError(f"the base in {folder} cannot classify: {error}") from error
    if lacking:
        raise BaseError(
            f"the base in {folder} lacks {len(lacking)} of its tensors, the first is {lacking[0]}. "
            "Fetch it again: a part of the *.safetensors is missing."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise BaseError(
            f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}. Fetch its files again."
        ) from error
    padding = None
    if head is not None:
        try:
            padding = heads.padding(model, tokenizer)
        except ValueError as error:
            raise BaseError(f"the base in {folder} cannot classify: {error}") from error

    use_cache = getattr(model.config, "use_cache", None)
    model.config.use_cache = False  # no token is generated here: keys and values would be kept for nothing
    model.eval()
    model.requires_grad_(False)
    in_files = base_files.tensor_shapes(folder)
    whole = (
        () if head is None else tuple(f"{path}." for path in head.saved)
    )  # not adapted, but trained or completed
    linear = {
        path: shape
        for path, module in model.named_modules()
        if not f"{path}.".startswith(whole) and (shape := quantization.linear_shape(module)) is not None
    }
    path_by_name = {name_in_files(path, model.base_model_prefix, in_files): path for path in linear}
    return Base(
        model=model,
        tokenizer=tokenizer,
        quantization=quantize,
        path=str(path),
        digest=digest,
        tokenizer_digest=tokenizer_digest,
        linear_shapes={name: linear[path] for name, path in path_by_name.items()},
        path_by_name=path_by_name,
        head=head,
        padding=padding,
        max_sequence_length=_longest_sequence(model),
        use_cache=use_cache,
    )


def _architecture(folder: Path, labels: Sequence[str] | None) -> tuple[Any, Any]:
    """The class of transformers that loads the base, and its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    names = {} if labels is None else dict(enumerate(labels))
    wanted = {"id2label": names, "label2id": {name: i for i, name in names.items()}} if names else {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **wanted)
    return AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification, config


def _longest_sequence(model: Any) -> int | None:
    """Most tokens in a sequence: fewer than there are positions where those are counted from behind the padding."""
    longest: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        skipped = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and skipped is not None:
            return int(module.num_embeddings - skipped - 1)
    return longest


def name_in_files(path: str, prefix: str, tensors: Container[str]) -> str:
    """What the base's files call the linear module that is at `path` in a model.

    Args:
        path: of the module.
        prefix: what this class of models puts before the names of its backbone; the files may be of another class.
        tensors: names of those in the files.
    """
    candidates = (path, path.removeprefix(prefix + "."), f"{prefix}.{path}")
    return next((name for name in candidates if f"{name}.weight" in tensors), path)


def _silence_known_warnings() -> None:
    """Keep four messages of the libraries off the terminal: they are not for whoever runs a node.

    One is about a call that PEFT makes and transformers has renamed, one about optional kernels for 4-bit arithmetic
    that bitsandbytes looks for when it is imported, one says at every layer and every pass that int8 computes in
    float16, and one lists tensors that the files lack, which `load_base` sees to. Every other warning is shown.
    """
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    for name in (
        "bitsandbytes.backends.cpu.ops",
        "bitsandbytes.backends.utils",
        "bitsandbytes.autograd._functions",
        "transformers.modeling_utils",
    ):
        logging.getLogger(name).addFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return (
        "gemm_4bit_forward" not in message
        and "LOAD REPORT" not in message
        and not message.startswith("MatMul8bitLt: inputs will be cast")
    )


# Here, because bitsandbytes may be imported by PEFT before any base is loaded.
_silence_known_warnings()


def read_digest(path: str | Path) -> str:
    """The digest of a base's weights, without loading it: hex, 32 characters. Raises BaseError."""
    return _explained(base_files.digest, path)


def read_tokenizer_digest(path: str | Path) -> str:
    """The digest of a base's tokenizer, without loading it: hex, 32 characters. Raises BaseError."""
    return _explained(base_files.tokenizer_digest, path)


def _explained(read: Callable[[Path], _Read], path: str | Path) -> _Read:
    try:
        return read(hub.find(path).folder)
    except base_files.BaseFilesError as error:
        raise BaseError(str(error)) from error


def check_unchanged(path: str, digest: str, tokenizer_digest: str, manifest: Manifest) -> None:
    """Check that a base is the one with which this node took part in the run before.

    Raises:
        BaseError: it has changed since.
    """
    run = manifest.base
    for what, found, was in (
        ("base", digest, run.digest),
        ("tokenizer", tokenizer_digest, run.tokenizer_digest),
    ):
        if found != was:
            raise BaseError(
                f"the {what} in {path} has changed since this node last took part in the run: its digest is {found}, "
                f"it was {was}. Fetch the files again, or name the run's base with --model"
            )


def check_base(path: str, manifest: Manifest, named: str | None, *, tokens_count: bool = False) -> None:
    """Check that a base is a run's.

    Args:
        path: where it is.
        manifest: the run's.
        named: what a person called it; None if nobody did.
        tokens_count: whether the tokenizer must be the run's as well.

    Raises:
        BaseError: it is another one.
    """
    run = manifest.base
    spelled = hub.spelled(run.name, run.revision)
    cure = "" if named else ". Name the run's base with --model"
    digest = read_digest(path)
    if digest != run.digest:
        raise BaseError(
            f"the base {path} has digest {digest}, the run's base {spelled!r} has {run.digest}{cure}"
        )
    if tokens_count and (found := read_tokenizer_digest(path)) != run.tokenizer_digest:
        raise BaseError(
            f"the tokenizer in {path} has digest {found}, that of the run's base {spelled!r} has "
            f"{run.tokenizer_digest}{cure}"
        )


def resolve(path: str | Path) -> Path:
    """The directory that holds the files of a base; a hub name is fetched, or found in the cache.

    Raises:
        BaseError: neither a directory nor a name under which the hub or the cache has a model.
    """
    return _explained(lambda folder: folder, path)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
