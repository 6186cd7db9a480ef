"""What to say when memory does not suffice: loading, probing and evaluating fail alike, and each has its own cure."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Final

LOADING: Final = (
    "hold the base in fewer bits with --quantize nf4 or --dtype bfloat16 (in a run: if it allows that), close other "
    "programs, or take a smaller base"
)
PROBING: Final = (
    "join with --at-once 0, hold the base in fewer bits with --quantize if the run allows that, or make a run of lower "
    "batch_size and sequence_length"
)
SAYING: Final = "give a shorter text or fewer --max-tokens, or hold the base in fewer bits with --quantize"
EVALUATING: Final = "lower --batch-size or --sequence-length, or hold the base in fewer bits with --quantize"


_WORDS: Final = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "cublas_status_alloc_failed",
)


class OutOfMemoryError(RuntimeError):
    """Memory does not suffice; the message says for what, and what to lower."""


@contextlib.contextmanager
def memory_explained(doing: str, cure: str) -> Iterator[None]:
    """Turn what libraries raise for want of memory into one sentence.

    Args:
        doing: for what it does not suffice: "to load the base".
        cure: what to lower.

    Raises:
        OutOfMemoryError: memory did not suffice.
    """
    try:
        yield
    except Exception as error:
        if not _is_about_memory(error):
            raise
        raise OutOfMemoryError(f"there is not enough memory {doing}: {cure}") from error


def _is_about_memory(error: BaseException) -> bool:
    """Whether an error, or what it came from, is that memory could not be had, on a CPU, a GPU, or for a file."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    said = str(error).lower()
    if any(words in said for words in _WORDS):
        return True
    return error.__cause__ is not None and _is_about_memory(error.__cause__)
