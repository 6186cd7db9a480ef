"""The adapter that a run starts from: whether a node has it, and what it takes from it."""

from __future__ import annotations

from pathlib import Path

from node.base import Base, BaseError
from transport.adapter_files import AdapterFilesError, Start, digest, read_start
from zo.manifest import Manifest


def check_start(manifest: Manifest, folder: Path | None) -> None:
    """Check that a node has the adapter that the run starts from, and names none where it starts from none.

    Raises:
        BaseError: it is missing, another one, or not wanted.
    """
    wanted = manifest.adapter.start
    if folder is None:
        if wanted:
            raise BaseError(
                f"the run starts from a PEFT adapter, of digest {wanted}; name its directory with --adapter"
            )
        return
    if not wanted:
        raise BaseError("the run starts from no adapter, but from generated values; leave out --adapter")
    try:
        found = digest(folder)
    except AdapterFilesError as error:
        raise BaseError(str(error)) from error
    if found != wanted:
        raise BaseError(
            f"the adapter {folder} has digest {found}, the run starts from one of digest {wanted}"
        )


def start_of(manifest: Manifest, folder: Path | None, base: Base) -> Start | None:
    """The adapter that the run starts from; None if it starts from generated values. Raises BaseError."""
    check_start(manifest, folder)
    if folder is None:
        return None
    try:
        return read_start(folder, base.linear_shapes, None if base.head is None else base.head.shape)
    except AdapterFilesError as error:
        raise BaseError(str(error)) from error
