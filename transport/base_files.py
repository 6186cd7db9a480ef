"""What can be known of a base from its files alone, without torch: digests, configuration, shapes of its tensors.

The coordinator lays a run out by it; every node checks with it that it holds the same base, and names modules as the
files do, so that both mean the same by every name.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

from zo.layout import base_digest

TOKENIZER_PATTERNS: Final = ("tokenizer.model", "vocab*", "merges*")
"""The files of a tokenizer that has no tokenizer.json."""
_TURNED_MODELS: Final = ("gpt2", "openai-gpt", "imagegpt")
"""Models whose layers are transformers' `Conv1D`: their weights are (in_features, out_features)."""
_CHUNK_BYTES: Final = 1 << 20
_MAX_HEADER_BYTES: Final = 100_000_000


class BaseFilesError(ValueError):
    """A directory that holds no usable base; the message says what is missing."""


def digest(folder: Path) -> str:
    """Hexadecimal digest of config.json and every *.safetensors.

    Raises:
        BaseFilesError: a file is missing or cannot be read.
    """
    config = folder / "config.json"
    if not config.is_file():
        if (folder / "adapter_config.json").exists():
            raise BaseFilesError(f"{folder} holds a PEFT adapter, not a base; name the model it was made for")
        raise BaseFilesError(
            f"{folder} has no config.json; --model takes the directory of a transformers model"
        )
    return _digest([config, *weight_files(folder)])


def tokenizer_digest(folder: Path) -> str:
    """Hexadecimal digest of tokenizer.json, or of the older files in its place, and of a chat template if there is one.

    Raises:
        BaseFilesError: there are none, or they cannot be read.
    """
    template = _chat_template(folder)
    if (folder / "tokenizer.json").is_file():
        return _digest([folder / "tokenizer.json"], template)
    files = {file for pattern in TOKENIZER_PATTERNS for file in folder.glob(pattern)}
    if not files:
        raise BaseFilesError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model, or vocab and merges); copy the tokenizer "
            "files that belong to the model there"
        )
    return _digest(list(files), template)


def weight_files(folder: Path) -> list[Path]:
    """The *.safetensors of a base, sorted.

    Raises:
        BaseFilesError: no directory, or none in it.
    """
    if not folder.is_dir():
        raise BaseFilesError(
            f"{folder} is not a directory; --model takes the directory of a transformers model"
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BaseFilesError(
            f"{folder} has no *.safetensors; load the model with transformers and save it again with "
            "`save_pretrained`"
        )
    return files


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape by name of every tensor in the base's files.

    Raises:
        BaseFilesError: no directory, no safetensors, or a broken header.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        for name, entry in _header(file).items():
            if name == "__metadata__":
                continue
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if not isinstance(shape, list) or not all(
                type(length) is int and length >= 0 for length in shape
            ):
                raise BaseFilesError(
                    f"{file} is not a safetensors file: {name} would have the shape {shape!r}"
                )
            shapes[name] = tuple(shape)
    return shapes


def linear_shapes(
    tensors: Mapping[str, tuple[int, ...]], configuration: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) by module name, of every weight with two dimensions; embeddings look alike.

    Args:
        tensors: shape by name of all tensors of a base.
        configuration: of the base; a few models keep the weights of their layers the other way round.
    """
    is_turned = (configuration or {}).get("model_type") in _TURNED_MODELS
    return {
        name.removesuffix(".weight"): shape[::-1] if is_turned and is_in_layer(name) else shape
        for name, shape in tensors.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def layers_only(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Those modules that stand in a numbered layer: what quantisation is about, unlike embeddings and the head."""
    return {name: shape for name, shape in shapes.items() if is_in_layer(name)}


def is_in_layer(name: str) -> bool:
    """Whether a module or tensor stands in a numbered layer."""
    return any(part.isdecimal() for part in name.split("."))


def configuration(folder: Path) -> dict[str, Any]:
    """What config.json holds.

    Raises:
        BaseFilesError: it is missing, or not an object in JSON.
    """
    try:
        read = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseFilesError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise BaseFilesError(f"{folder / 'config.json'} is no JSON object")
    return read


def is_causal(configuration: Mapping[str, Any]) -> bool:
    """Whether the configuration is of a causal language model, by the name of its class; so if it has none."""
    architectures = configuration.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else "ForCausalLM"
    return str(name).endswith(("ForCausalLM", "LMHeadModel"))


def file_digest(files: Iterable[Path]) -> str:
    """Hexadecimal digest of some files, by their names and contents; see `zo.layout.base_digest`. Raises OSError."""
    return base_digest((file.name, _chunks(file)) for file in sorted(files, key=lambda file: file.name))


def _digest(files: list[Path], chat_template: bytes | None = None) -> str:
    parts: list[tuple[str, Iterable[bytes]]] = [(file.name, _chunks(file)) for file in files]
    if chat_template is not None:
        parts.append(("chat_template", [chat_template]))
    try:
        return base_digest(sorted(parts, key=itemgetter(0)))
    except OSError as error:
        raise BaseFilesError(f"{error.filename} cannot be read: {error.strerror}") from error


def _chat_template(folder: Path) -> bytes | None:
    """The template by which rows become tokens, as transformers finds it; None if there is none.

    It has a file of its own, or is in tokenizer_config.json, where there may be several by name.
    """
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if file.is_file():
            return file.read_bytes()
        found = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise BaseFilesError(f"the chat template of {folder} cannot be read: {error}") from error
    template = found.get("chat_template") if isinstance(found, dict) else None
    if template is None or isinstance(template, str):
        return None if template is None else template.encode()
    return json.dumps(template, sort_keys=True).encode()


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def _header(file: Path) -> dict[str, object]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise BaseFilesError(
                    f"{file} is not a safetensors file: its header would have {length} bytes"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise BaseFilesError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, BaseFilesError):
            raise
        raise BaseFilesError(f"{file} is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise BaseFilesError(f"{file} is not a safetensors file: its header is no object")
    return header
