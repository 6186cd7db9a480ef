"""Frames from the coordinator in fewer bytes, where that saves any: zstandard, without what the node can work out.

A squeezed frame is a MessagePack binary string that holds one zstandard frame; no message and no agent's number begins
like one. In a squeezed `History` every entry but the first comes without its digest of the entry before: the node has
that entry, and hashes it. What a chain is made of are the frames as they were before.
"""

from itertools import pairwise
from typing import Any, Final

import msgspec
import zstandard

from zo.commit import chain_digest

LEAST_BYTES: Final = 128
"""Below it there is nothing to gain: zstandard needs 9 bytes and more to say what follows."""
_LEVEL: Final = 3
_HISTORY_TAG: Final = 19
_PREVIOUS: Final = 6
"""Where an entry has the digest of the one before it: in a `Commit` as in a `Revert`."""
_BINARY: Final = frozenset((0xC4, 0xC5, 0xC6))


class SqueezeError(ValueError):
    """Bytes that are no squeezed frame, or too large a one."""


def is_squeezed(frame: bytes) -> bool:
    """Whether a frame is one of these."""
    return frame[:1] != b"" and frame[0] in _BINARY


def squeezed(frame: bytes) -> bytes:
    """The frame as it may travel: squeezed if that is shorter, else as it is."""
    if len(frame) < LEAST_BYTES:
        return frame
    data = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(_abridged(frame))
    found: bytes = msgspec.msgpack.encode(data)
    return found if len(found) < len(frame) else frame


def unsqueezed(frame: bytes, max_bytes: int) -> bytes:
    """The frame that `squeezed` was given.

    Args:
        frame: one that `is_squeezed`.
        max_bytes: how large it may be. Nothing larger is ever allocated, whatever the frame claims.

    Raises:
        SqueezeError: it is not what `squeezed` makes, or larger.
    """
    try:
        data = msgspec.msgpack.decode(frame, type=bytes)
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= max_bytes:
            claims = "does not say how large it is" if size < 0 else f"holds {size} bytes"
            raise SqueezeError(f"a squeezed frame {claims}; it may hold {max_bytes}")
        # The window is as large as a frame may ask for, too.
        plain = zstandard.ZstdDecompressor(
            max_window_size=1 << max(max_bytes - 1, 1024).bit_length()
        ).decompress(data, max_output_size=size, allow_extra_data=False)
    except (msgspec.DecodeError, zstandard.ZstdError) as error:
        raise SqueezeError(f"not a squeezed frame: {error}") from error
    return _restored(plain)


def _abridged(frame: bytes) -> bytes:
    """A `History` without the digests that follow from the entries; any other frame as it is."""
    if not _is_history(frame):
        return frame
    tag, entries = msgspec.msgpack.decode(frame)
    shorter = [entries[0]]
    for before, entry in pairwise(entries):
        fields = msgspec.msgpack.decode(entry)
        if fields[_PREVIOUS] == chain_digest(before):
            fields[_PREVIOUS] = b""
        shorter.append(msgspec.msgpack.encode(fields))
    return msgspec.msgpack.encode([tag, shorter])


def _restored(frame: bytes) -> bytes:
    if not _is_history(frame):
        return frame
    try:
        tag, entries = msgspec.msgpack.decode(frame, type=tuple[int, list[bytes]])
        for index in range(1, len(entries)):
            fields: list[Any] = msgspec.msgpack.decode(entries[index], type=list)
            if len(fields) > _PREVIOUS and fields[_PREVIOUS] == b"":
                fields[_PREVIOUS] = chain_digest(entries[index - 1])
                entries[index] = msgspec.msgpack.encode(fields)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SqueezeError(f"a squeezed history that is none: {error}") from error
    return msgspec.msgpack.encode((tag, entries))


def _is_history(frame: bytes) -> bool:
    return frame[:2] == bytes((0x92, _HISTORY_TAG))
