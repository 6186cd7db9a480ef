"""Packing: how codes become the bytes of a report and of a commit, for each width that a manifest may ask for.

In memory codes are int8 in common units, whatever their width (`codes`); a width decides which values there are and how
many of them share a byte. Every array of codes has one packed form, so that equal codes have equal digests.

    8 bits: one int8 each
    4 bits: code / 12 in two's complement, −8 for no vote; the first code of a byte in its low half
    1 bit:  set for +32, the first code in the lowest bit; if any code is no vote, as many bytes more that mark these
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from zo.codes import NO_VOTE, UNIT_BY_BITS, coefficients
from zo.commit import Commit
from zo.manifest import Manifest

_NUM_SYMBOLS: Final = 256
_NO_SYMBOL: Final = 255
_SILENT: Final = 2
"""The symbol of one bit that is no bit."""


def _code_by_symbol(bits: int) -> NDArray[np.int8]:
    unit = UNIT_BY_BITS[bits]
    if bits == 1:
        return np.array([-unit, unit, NO_VOTE], np.int8)
    half = 1 << (bits - 1)
    levels = np.append(np.arange(half), np.arange(-half, 0)) * unit
    levels[half] = NO_VOTE
    return levels.astype(np.int8)


_CODE_BY_SYMBOL: Final = {bits: _code_by_symbol(bits) for bits in UNIT_BY_BITS}
_SYMBOL_BY_CODE: Final = {bits: np.full(_NUM_SYMBOLS, _NO_SYMBOL, np.uint8) for bits in UNIT_BY_BITS}
for _bits, _codes in _CODE_BY_SYMBOL.items():
    _SYMBOL_BY_CODE[_bits][_codes.view(np.uint8)] = np.arange(_codes.size)


def expressible(bits: int) -> NDArray[np.int8]:
    """All codes that a width has, (2^bits,) int8, or (3,) for one bit; NO_VOTE among them."""
    return _CODE_BY_SYMBOL[bits]


def most_bytes(num: int, bits: int) -> int:
    """How many bytes `num` codes take at most."""
    return _length(num, bits) * (2 if bits == 1 else 1)


def pack(codes: NDArray[np.int8], bits: int) -> bytes:
    """The packed form of (n,) codes.

    Raises:
        ValueError: a code is none of that width.
    """
    if bits == 8:
        return codes.tobytes()
    symbols = _SYMBOL_BY_CODE[bits][codes.view(np.uint8)]
    if (symbols == _NO_SYMBOL).any():
        raise ValueError(f"{codes[symbols == _NO_SYMBOL][0]} is no code of {bits} bits")
    if bits == 4:
        symbols = np.append(symbols, np.zeros(symbols.size % 2, np.uint8))
        return (symbols[::2] | symbols[1::2] << 4).tobytes()
    silent = symbols == _SILENT
    marks = np.packbits(silent, bitorder="little").tobytes() if silent.any() else b""
    return np.packbits(symbols == 1, bitorder="little").tobytes() + marks


def unpack(data: bytes, num: int, bits: int) -> NDArray[np.int8]:
    """The (num,) codes in their packed form; of 8 bits they are the bytes themselves, and cannot be written.

    Raises:
        ValueError: not the packed form of so many codes.
    """
    length = _length(num, bits)
    is_marked = bits == 1 and len(data) == 2 * length
    if len(data) != length and not is_marked:
        raise ValueError(f"{num} codes of {bits} bits take {length} bytes, got {len(data)}")
    if bits == 8:
        return np.frombuffer(data, np.int8)
    stream = np.frombuffer(data, np.uint8)
    if bits == 4:
        symbols = np.stack([stream & 15, stream >> 4], axis=1).reshape(-1)[:num]
    else:
        symbols = np.unpackbits(stream[:length], count=num, bitorder="little")
        if is_marked:
            silent = np.unpackbits(stream[length:], count=num, bitorder="little")
            symbols = np.where(silent, _SILENT, symbols)
    codes = _CODE_BY_SYMBOL[bits][symbols]
    if pack(codes, bits) != data:
        raise ValueError(f"{num} codes of {bits} bits are not in their packed form")
    return codes


def bits_of_commits(manifest: Manifest) -> int:
    """The width of the codes in a run's commits: that of the reports, unless they are combined."""
    if manifest.directions.are_combined:
        return 1 if manifest.directions.combine == "majority" else 8
    return manifest.codes.bits


def num_codes_each(
    participants: Sequence[int], movers: Sequence[int], manifest: Manifest
) -> NDArray[np.int64]:
    """How many codes each participant of a round has, (participants,)."""
    each = np.where(np.isin(participants, movers), manifest.moves.projections, manifest.probe.directions)
    return each.astype(np.int64)


def are_moves(participants: Sequence[int], movers: Sequence[int], manifest: Manifest) -> NDArray[np.bool_]:
    """Which codes of a round are of moves, (n,), in their order."""
    return np.repeat(np.isin(participants, movers), num_codes_each(participants, movers, manifest))


def by_class(commit: Commit, manifest: Manifest) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """The codes of a commit that are slopes, and those that are of moves. Raises ValueError, as `codes_of`."""
    codes = codes_of(commit, manifest)
    of_moves = are_moves(commit.participants, commit.movers, manifest)
    return codes[~of_moves], codes[of_moves]


def of_classes(
    participants: Sequence[int],
    movers: Sequence[int],
    slopes: NDArray[np.int8],
    moves: NDArray[np.int8],
    manifest: Manifest,
) -> NDArray[np.int8]:
    """The codes of a commit from those of each class: (n,), in the order of participants. The inverse of `by_class`."""
    if not movers:
        return slopes
    of_moves = are_moves(participants, movers, manifest)
    codes = np.empty(of_moves.size, np.int8)
    codes[of_moves], codes[~of_moves] = moves, slopes
    return codes


def coefficients_of(commit: Commit, manifest: Manifest) -> NDArray[np.int32]:
    """What each code of a commit moves the weights by, (n,). Raises ValueError, as `codes_of`."""
    codes = codes_of(commit, manifest)
    found = coefficients(codes, commit.steps[0])
    if not commit.movers:
        return found
    of_moves = are_moves(commit.participants, commit.movers, manifest)
    found[of_moves] = coefficients(codes[of_moves], commit.steps[1])
    return found


def codes_of(commit: Commit, manifest: Manifest) -> NDArray[np.int8]:
    """The codes of a commit, (n,) int8, in the order of participants and of their samples.

    Raises:
        ValueError: they are not as many as the manifest says, or not in their packed form.
    """
    num = int(num_codes_each(commit.participants, commit.movers, manifest).sum())
    try:
        return unpack(commit.codes, num, bits_of_commits(manifest))
    except ValueError as error:
        raise ValueError(f"commit of round {commit.round}: {error}") from error


def _length(num: int, bits: int) -> int:
    """How many bytes `num` votes take."""
    return -(-num * bits // 8)
