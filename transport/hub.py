"""Where a base is: a directory here, or a model on the Hugging Face hub, fetched once and kept in its cache.

    NAME            the model as the hub has it now, or as it is in the cache
    NAME@REVISION   a commit, branch or tag of it

Reads no file and loads no model. The hub is asked only for what is in no directory here.
"""

import re
from pathlib import Path
from typing import Final, NamedTuple

from transport.base_files import TOKENIZER_PATTERNS, BaseFilesError

PATTERNS: Final = ("*.json", "*.jinja", "*.safetensors", *TOKENIZER_PATTERNS)
_COMMIT: Final = re.compile("[0-9a-f]{40}")


class Found(NamedTuple):
    """A base that is on this machine now."""

    folder: Path
    name: str
    """Of the model on the hub; else the directory's."""
    revision: str
    """The commit of the model on the hub, 40 hexadecimal digits; empty for a directory."""


def spelled(name: str, revision: str) -> str:
    """NAME@REVISION, or the name alone where there is no revision."""
    return f"{name}@{revision}" if revision else name


def split(model: str) -> tuple[str, str | None]:
    """Name and revision in NAME@REVISION; a directory has none."""
    name, _, revision = model.partition("@")
    return (model, None) if Path(model).expanduser().is_dir() else (name, revision or None)


def find(model: str | Path) -> Found:
    """The base in a directory, or of a name that the hub, or its cache here, knows.

    Raises:
        BaseFilesError: neither a directory nor a name under which the hub or the cache has a model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return Found(folder, folder.resolve().name, "")
    name, revision = _on_the_hub(model)
    folder = _fetched(str(model), name, revision)
    # The library keeps each commit in a folder of that name: the revision that was meant, and no other.
    return Found(folder, name, folder.name if _COMMIT.fullmatch(folder.name) else revision or "")


def bytes_to_fetch(model: str | Path) -> tuple[int, Path]:
    """How much `find` would download, and into which directory; nothing, where it cannot be told.

    Raises:
        BaseFilesError: neither a directory nor the name of a model on the hub.
    """
    from huggingface_hub import constants, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    if Path(model).expanduser().is_dir():
        return 0, cache
    name, revision = _on_the_hub(model)
    try:
        files = snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS), dry_run=True)
    except Exception:  # whatever it is, `find` says it, or does without the hub
        return 0, cache
    return sum(file.file_size or 0 for file in files if file.will_download), cache


def _on_the_hub(model: str | Path) -> tuple[str, str | None]:
    """Name and revision of a model that is in no directory here. Raises BaseFilesError if it can be none."""
    if Path(model).expanduser().exists():
        raise BaseFilesError(f"the base {model} is a file; name the directory that holds its config.json")
    # A hub name is NAME or OWNER/NAME: what cannot be one was meant as a directory.
    name, revision = split(str(model))
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BaseFilesError(
            f"the base {model} does not exist; name a directory with a config.json, or a hub name"
        )
    return name, revision


def _fetched(model: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except GatedRepoError as error:
        raise BaseFilesError(
            f"the base {name} is gated: accept its licence on https://huggingface.co/{name} and log in "
            "with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise BaseFilesError(f"the base {name} has no revision {revision!r}: it is what follows @") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BaseFilesError(
            f"the base {model} is neither a directory here nor a model on the hub; check the spelling, "
            "or log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:  # offline shows in many ways: connection, time-out, proxy, not in the cache
        first_line = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise BaseFilesError(
            f"the base {model} is no directory here, not in the cache, and the hub did not answer: {first_line}. "
            "Connect, or name a local directory"
        ) from error
