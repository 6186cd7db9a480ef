"""The canonical layout: which entry of the flat vector is which parameter, and what the run starts from.

Two nodes that agree on the layout's digest mean the same by every entry; the digest is part of the run id.
"""

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from math import prod, sqrt
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from zo import reference
from zo.directions import INITIAL, Direction, RunKey

DIGEST_BYTES: Final = 16
MAX_SIZE: Final = reference.MAX_BLOCKS * reference.BITS_PER_BLOCK
HEAD: Final = "head"
HEAD_WEIGHT: Final = f"{HEAD}.weight"
HEAD_BIAS: Final = f"{HEAD}.bias"
_LAYOUT_PERSON: Final = b"zo-layout"
_BASE_PERSON: Final = b"zo-base"


class Head(NamedTuple):
    """The shape of a classification head, the last linear layer of a classifier: one logit for each label."""

    num_labels: int
    in_features: int
    has_bias: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name of its parameters in a layout."""
        weight = {HEAD_WEIGHT: (self.num_labels, self.in_features)}
        return weight | ({HEAD_BIAS: (self.num_labels,)} if self.has_bias else {})


class Parameter(msgspec.Struct, frozen=True, array_like=True):
    """One named parameter: entries offset..offset + product(shape) of the flat vector, in row-major order."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """All parameters, sorted by name (by code point), without gaps. Made by `layout`."""

    parameters: tuple[Parameter, ...]
    size: int

    def digest(self) -> bytes:
        """(16,) bytes: BLAKE2b-128 ("zo-layout") of [[[name, shape, offset], …], size] as MessagePack."""
        encoded = msgspec.msgpack.encode(self)
        return hashlib.blake2b(encoded, digest_size=DIGEST_BYTES, person=_LAYOUT_PERSON).digest()

    def split(self, vector: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Views of a (size,) vector by parameter name, each in its parameter's shape.

        Raises:
            ValueError: the vector has another size.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"the layout has {self.size} entries, got a vector of shape {vector.shape}")
        return {p.name: vector[p.offset : p.offset + p.size].reshape(p.shape) for p in self.parameters}


def layout(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The canonical layout of parameters given by name, in whatever order.

    Raises:
        ValueError: no parameters, an empty name, a dimension below 1, or more than 2^39 entries.
    """
    if not shapes:
        raise ValueError("a layout needs at least one parameter, got none")
    parameters, offset = [], 0
    for name in sorted(shapes):
        shape = tuple(int(dim) for dim in shapes[name])
        if not name:
            raise ValueError(f"a parameter needs a name, got an empty one of shape {shape}")
        if any(dim < 1 for dim in shape):
            raise ValueError(f"every dimension of {name} must be at least 1, got {shape}")
        parameters.append(Parameter(name, shape, offset))
        offset += prod(shape)
    if offset > MAX_SIZE:
        raise ValueError(f"a layout has at most {MAX_SIZE} entries, got {offset}")
    return Layout(tuple(parameters), offset)


def targeted(module_names: Iterable[str], targets: Sequence[str]) -> list[str]:
    """The sorted names of the modules that a target means: equal to it, or ending in "." and it.

    Raises:
        ValueError: no targets, or a target that means no module; the message offers near matches.
    """
    names = sorted(module_names)
    if not targets:
        raise ValueError("targets must name at least one module, got none")
    chosen: set[str] = set()
    for target in targets:
        meant = {name for name in names if name == target or name.endswith("." + target)}
        if not meant:
            if not names:
                raise ValueError(f"no linear module is named {target!r}: there are none that can be adapted")
            last_parts = sorted({name.rpartition(".")[2] for name in names})
            near = difflib.get_close_matches(target, [*last_parts, *names], n=3) or last_parts
            raise ValueError(f"no linear module is named {target!r}; did you mean {', '.join(near)}?")
        chosen |= meant
    return sorted(chosen)


def lora_layout(
    linear_shapes: Mapping[str, tuple[int, int]],
    targets: Sequence[str],
    rank: int,
    train: Literal["B", "AB"],
    head: Head | None = None,
) -> Layout:
    """The layout of the LoRA factors (arXiv 2106.09685) that are trained on the targeted modules, and of a head.

    Args:
        linear_shapes: module name to (out_features, in_features).
        targets: full names of modules, or what follows a "." in them; none only beside a head.
        rank: of the factors, at least 1.
        train: "B" for `MODULE.lora_B` (out, rank) alone, "AB" also for `MODULE.lora_A` (rank, in).
        head: trained as a whole, as `HEAD_WEIGHT` and, if it has one, `HEAD_BIAS`.

    Raises:
        ValueError: an unknown target, a rank below 1, or another value of `train`.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if train not in ("B", "AB"):
        raise ValueError(f'train must be "B" or "AB", got {train!r}')
    shapes = {} if head is None else head.shapes
    for module in targeted(linear_shapes, targets) if targets or head is None else ():
        out_features, in_features = linear_shapes[module]
        shapes[f"{module}.lora_B"] = (out_features, rank)
        if train == "AB":
            shapes[f"{module}.lora_A"] = (rank, in_features)
    return layout(shapes)


def initial_lora_A(run_key: RunKey, layout_index: int, shape: tuple[int, int]) -> NDArray[np.float32]:  # noqa: N802
    """The first LoRA A of a module: (rank, in_features) float32, uniform in ±1/√in, equal on every machine.

    Entry i is ((word_i >> 8) × 2^−23 − 1) × float32(1/√in): 24 random bits, exact in float32, then one
    rounding. The range is that of torch's `kaiming_uniform_(a=√5)`, with which LoRA's authors start A.

    Args:
        run_key: of the run.
        layout_index: index of the module among the sorted targeted modules; the `sample` of the direction
            INITIAL.
        shape: (rank, in_features).
    """
    rank, in_features = shape
    stream = reference.words(run_key, Direction(INITIAL, layout_index), rank * in_features)
    unit = (stream >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return (unit * np.float32(1 / sqrt(in_features))).reshape(shape)


def base_digest(files: Iterable[tuple[str, Iterable[bytes]]]) -> str:
    """The digest that names a base model or a tokenizer, 32 hexadecimal digits.

    BLAKE2b-128, personalised "zo-base", over (length of the name as little-endian uint16, name in UTF-8,
    BLAKE2b-256 of the content) of each file. The content has its own digest because its length is not known
    before its end.

    Args:
        files: (name, content in chunks) of each file, sorted by name. The caller reads; chunks may be of any
            size.

    Raises:
        ValueError: no files, names not ascending and distinct, or a name beyond 65,535 bytes.
    """
    state = hashlib.blake2b(digest_size=DIGEST_BYTES, person=_BASE_PERSON)
    last: str | None = None
    for name, chunks in files:
        if last is not None and name <= last:
            raise ValueError(f"files must be sorted by name and distinct, got {name!r} after {last!r}")
        encoded = name.encode()
        if len(encoded) > 0xFFFF:
            raise ValueError(f"a file name has at most 65,535 bytes, got {len(encoded)}")
        content = hashlib.blake2b(digest_size=32)
        for chunk in chunks:
            content.update(chunk)
        state.update(len(encoded).to_bytes(2, "little") + encoded + content.digest())
        last = name
    if last is None:
        raise ValueError("a base consists of at least one file, got none")
    return state.hexdigest()
