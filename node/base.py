"""The base: a frozen, pretrained language model with its tokenizer, and the digests that name both.

Decides what counts as a usable base and refuses the rest in words; what is trained on top of it is the
adapter's business (`node.adapter`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node import quantization
from node.quantization import QuantizationError
from transport import base_files
from zo.quantization import Kind

# torch and transformers take seconds to import: a wrong path or digest is refused before that.
if TYPE_CHECKING:
    import torch

HUB_PATTERNS = ("*.json", "*.safetensors", *base_files.TOKENIZER_PATTERNS)


class BaseError(RuntimeError):
    """The base cannot be used: what is wrong, where, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A pretrained model that is never trained: evaluation mode, no parameter wants a gradient.

    Float32, but for the layers that are quantised. The adapter's layout does not depend on that.
    """

    model: torch.nn.Module
    """A transformers causal language model; `Adapter` puts its LoRA layers into it."""
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
    """(out_features, in_features) of every linear module, by its name in the model."""
    max_sequence_length: int | None
    """The longest sequence the model was made for, in tokens; None if its configuration does not say."""


def load_base(
    path: str | Path,
    *,
    threads: int | None = None,
    quantize: Kind = "none",
    skip_quantize: Sequence[str] = (),
) -> Base:
    """The base in a directory, or of a name that the Hugging Face hub (or its cache here) knows.

    Args:
        path: a directory with config.json, *.safetensors and tokenizer files, or a hub name.
        threads: how many threads torch may use in this process; None leaves torch's choice.
        quantize: how to hold the linear layers; embeddings and the output layer are never quantised.
        skip_quantize: linear modules to leave as they are: whole names, or what follows a "." in them.

    Raises:
        BaseError: the base is missing, gated, incomplete or broken, or it cannot be quantised like that.
    """
    folder = resolve(path)
    digest = read_digest(folder)
    tokenizer_digest = read_tokenizer_digest(folder)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    if threads is not None:
        torch.set_num_threads(threads)
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # the terminal belongs to the one live line of the node
    try:
        options = quantization.loading_options(folder, quantize, skip_quantize)
        # What a damaged file raises depends on the format and on the library's version: any failure to read
        # the files found above means the same to the caller.
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except QuantizationError as error:
        raise BaseError(str(error)) from error
    except Exception as error:
        raise BaseError(
            f"the base in {folder} cannot be loaded: {_first_line(error)}. Fetch it again, or name another."
        ) from error
    finally:
        if shows_progress:
            transformers_logging.enable_progress_bar()
    if missing := sorted(loading["missing_keys"]):
        # transformers fills missing tensors with random numbers and goes on: every node with its own.
        raise BaseError(
            f"the base in {folder} lacks {len(missing)} of its tensors, the first is {missing[0]}. "
            "Fetch it again: a part of the *.safetensors is missing."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise BaseError(
            f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}. Fetch its files again."
        ) from error

    model.config.use_cache = False  # no token is generated here: keys and values would be kept for nothing
    model.eval()
    model.requires_grad_(False)
    return Base(
        model=model,
        tokenizer=tokenizer,
        quantization=quantize,
        path=str(path),
        digest=digest,
        tokenizer_digest=tokenizer_digest,
        linear_shapes={
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        },
        max_sequence_length=getattr(model.config, "max_position_embeddings", None),
    )


def _silence_known_warnings() -> None:
    """Keep three messages of the libraries off the terminal: they are not for whoever runs a node.

    One is about a call that PEFT makes and transformers has renamed, one about optional kernels for 4-bit arithmetic
    that bitsandbytes looks for when it is imported, and one says at every layer and every pass that int8 computes in
    float16. Every other warning is shown.
    """
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    for name in (
        "bitsandbytes.backends.cpu.ops",
        "bitsandbytes.backends.utils",
        "bitsandbytes.autograd._functions",
    ):
        logging.getLogger(name).addFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "gemm_4bit_forward" not in message and not message.startswith("MatMul8bitLt: inputs will be cast")


# Here, because bitsandbytes may be imported by PEFT before any base is loaded.
_silence_known_warnings()


def read_digest(path: str | Path) -> str:
    """The digest of a base's weights, without loading it: hex, 32 characters. Raises BaseError."""
    return _explained(base_files.digest, path)


def read_tokenizer_digest(path: str | Path) -> str:
    """The digest of a base's tokenizer, without loading it: hex, 32 characters. Raises BaseError."""
    return _explained(base_files.tokenizer_digest, path)


def _explained(read: Callable[[Path], str], path: str | Path) -> str:
    folder = resolve(path)
    try:
        return read(folder)
    except base_files.BaseFilesError as error:
        raise BaseError(str(error)) from error


def resolve(path: str | Path) -> Path:
    """The directory that holds the files of a base; a hub name is fetched, or found in the cache.

    Raises:
        BaseError: neither a directory nor a name under which the hub or the cache has a model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise BaseError(f"the base {path} is a file; name the directory that holds its config.json.")
    # A hub name is NAME or OWNER/NAME: what cannot be one was meant as a directory.
    if isinstance(path, Path) or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        raise BaseError(
            f"the base {path} does not exist; name a directory with a config.json, or a hub name."
        )
    return _fetch(str(path))


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
    except GatedRepoError as error:
        raise BaseError(
            f"the base {name} is gated: accept its licence on https://huggingface.co/{name} and log in "
            "with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BaseError(
            f"the base {name} is neither a directory here nor a model on the hub; check the spelling, "
            "or log in with `hf auth login` if it is private."
        ) from error
    except Exception as error:  # offline shows in many ways: connection, time-out, proxy, not in the cache
        raise BaseError(
            f"the base {name} is no directory here, not in the cache, and the hub did not answer: "
            f"{_first_line(error)}. Connect, or name a local directory."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
