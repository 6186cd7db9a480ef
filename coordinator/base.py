"""What the coordinator needs to know of a base model, read from its files without torch.

The shapes of the linear modules stand in the headers of the safetensors files; the weights themselves are only hashed.
Every node derives the same layout from the loaded model, and refuses the run if the two differ.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from zo.layout import base_digest

_CHUNK_BYTES: Final = 1 << 20
_MAX_HEADER_BYTES: Final = 100_000_000
_TOKENIZER_PATTERNS: Final = ("tokenizer.model", "vocab*", "merges*")


class BaseFilesError(ValueError):
    """A directory that holds no usable base model; the message says what is missing."""


def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) by module name, of every two-dimensional weight in the base.

    Raises:
        BaseFilesError: no directory, no safetensors, or a broken header.
    """
    shapes = {}
    for file in _weight_files(model):
        for name, entry in _header(file).items():
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if not name.endswith(".weight") or shape is None:
                continue
            if not isinstance(shape, list) or not all(
                type(length) is int and length >= 0 for length in shape
            ):
                raise BaseFilesError(
                    f"{file} is not a safetensors file: {name} would have the shape {shape!r}"
                )
            if len(shape) == 2:
                shapes[name.removesuffix(".weight")] = (shape[0], shape[1])
    return shapes


def layers_only(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Those modules that stand in a numbered layer: what quantisation is about, unlike embeddings and the head."""
    return {
        name: shape for name, shape in shapes.items() if any(part.isdecimal() for part in name.split("."))
    }


def digest(model: Path) -> str:
    """Hexadecimal digest of config.json and the weights.

    Raises:
        BaseFilesError: a file is missing.
    """
    config = model / "config.json"
    if not config.is_file():
        raise BaseFilesError(f"{model} has no config.json; --model takes a Hugging Face model directory")
    return _digest([config, *_weight_files(model)])


def tokenizer_digest(model: Path) -> str:
    """Hexadecimal digest of the tokenizer's files.

    Raises:
        BaseFilesError: there are none.
    """
    if (model / "tokenizer.json").is_file():
        return _digest([model / "tokenizer.json"])
    files = [file for pattern in _TOKENIZER_PATTERNS for file in model.glob(pattern)]
    if not files:
        raise BaseFilesError(f"{model} has no tokenizer (tokenizer.json, tokenizer.model, vocab or merges)")
    return _digest(files)


def _weight_files(model: Path) -> list[Path]:
    if not model.is_dir():
        raise BaseFilesError(f"{model} is not a directory; --model takes a Hugging Face model directory")
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise BaseFilesError(f"{model} has no *.safetensors files; save the model with safe_serialization")
    return files


def _digest(files: list[Path]) -> str:
    return base_digest((file.name, _chunks(file)) for file in sorted(files, key=lambda file: file.name))


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def _header(file: Path) -> dict[str, object]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise BaseFilesError(f"{file} is not a safetensors file: its header would have {length} bytes")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise BaseFilesError(f"{file} is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise BaseFilesError(f"{file} is not a safetensors file: its header is no object")
    return header
