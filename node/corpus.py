"""Two texts that every Python installation carries: docstrings to pretrain on, topics to fine-tune on.

The embedded base model reads the docstrings of the standard library. The demo's nodes then hold the reference
text of ``pydoc_data.topics`` as their private data. This module decides what belongs to which text, so that a
model of the first has not seen the second; tokens and windows are left to the callers.
"""

import ast
import hashlib
import importlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

SKIPPED_DIRECTORIES = frozenset(
    {
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "pydoc_data",
    }
)
"""Directories of the standard library that are not read, at any depth."""

SKIPPED_FILES = frozenset({"pdb.py"})
"""Files that are not read: the help of pdb's commands stands word for word in the topic "debugger"."""

SHORTEST_REPEATED_PARAGRAPH = 40
"""Characters. A shorter paragraph ("For example:") may stand in several topics."""


class Docstring(NamedTuple):
    """One docstring of the standard library."""

    module: str
    """The file it stands in, relative to the library, with "/" on every platform: ``email/message.py``."""
    text: str
    """The text without its indentation and outer blank lines; never empty."""


def stdlib_docstrings(library: Path | None = None) -> tuple[Docstring, ...]:
    """The docstrings of the standard library's modules, classes and functions, each text once.

    Files are parsed, never imported. The order is that of the sorted paths and, within a file, of the lines:
    the same Python release gives the same tuple.

    Args:
        library: the directory to read; that of the running Python when None.

    Raises:
        ValueError: there are no docstrings, as in a Python that carries its library compiled or zipped.
    """
    root = Path(sysconfig.get_path("stdlib")) if library is None else library
    module_by_text: dict[str, str] = {}
    for path in _sources(root):
        module = path.relative_to(root).as_posix()
        for text in _docstrings(path):
            module_by_text.setdefault(text, module)
    if not module_by_text:
        raise ValueError(
            f"no docstrings under {root}; use a Python installation that has its library as .py files"
        )
    return tuple(Docstring(module, text) for text, module in module_by_text.items())


def pydoc_topics() -> dict[str, str]:
    """The language reference that ``help("topic")`` shows, by topic name, in the order of the names.

    Lines lose their trailing blanks; nothing else changes.

    Raises:
        ValueError: this Python came without ``pydoc_data``.
    """
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ValueError(
            "this Python has no pydoc_data.topics; use one with its documentation topics installed"
        ) from error
    return {
        name: "\n".join(line.rstrip() for line in topics[name].splitlines()).strip()
        for name in sorted(topics)
    }


def distinct_topics(topics: Mapping[str, str]) -> dict[str, str]:
    """The topics with each paragraph in one topic only, in the order of the names.

    Many topics are sections of a larger one: "with" stands in "compound" again. A paragraph stays in the
    largest topic that has it, and a topic of which less than half is left is dropped. Without this, text held
    out under one name would be trained on under another.
    """
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = topics[name].split("\n\n")
        fresh = [paragraph for paragraph in paragraphs if _words(paragraph) not in seen]
        seen.update(words for words in map(_words, paragraphs) if len(words) >= SHORTEST_REPEATED_PARAGRAPH)
        text = "\n\n".join(fresh).strip()
        if text and 2 * len(text) >= len(topics[name]):
            kept[name] = text
    return {name: kept[name] for name in sorted(kept)}


def split_topics(
    topics: Mapping[str, str], num_nodes: int, held_out: float
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Distinct topics for each node, and those that no node sees.

    The held-out topics are picked in the order of a hash of their names; for a share, each is at most a
    quarter of the held-out text, so that there are several. The others go, largest first, to the node that
    has the fewest characters.

    Args:
        topics: text by topic name; made distinct here.
        num_nodes: how many nodes share the rest.
        held_out: a share of all characters, between 0 and 1, or a number of topics when it is an int.

    Returns:
        (one dict per node, the held-out dict), each in the order of the names.

    Raises:
        ValueError: no node, a share outside 0 to 1, or too few topics for every node to have one.
    """
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1, got {num_nodes}")
    distinct = distinct_topics(topics)
    held = _held_out(distinct, held_out)
    rest = sorted(distinct.keys() - held, key=lambda name: (-len(distinct[name]), name))
    if len(rest) < num_nodes:
        raise ValueError(
            f"{num_nodes} nodes need as many topics, but {len(rest)} of {len(distinct)} are left; "
            "hold out fewer"
        )
    names_by_node: list[list[str]] = [[] for _ in range(num_nodes)]
    characters = [0] * num_nodes
    for name in rest:
        node = characters.index(min(characters))
        names_by_node[node].append(name)
        characters[node] += len(distinct[name])
    by_node = [{name: distinct[name] for name in sorted(names)} for names in names_by_node]
    return by_node, {name: distinct[name] for name in sorted(held)}


def digest(texts: Iterable[str]) -> str:
    """Hex BLAKE2b-128 of texts in order, each in UTF-8 after its length in bytes (u64, little-endian)."""
    state = hashlib.blake2b(digest_size=16)
    for text in texts:
        content = text.encode()
        state.update(len(content).to_bytes(8, "little"))
        state.update(content)
    return state.hexdigest()


def _sources(root: Path) -> list[Path]:
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (
        path
        for path in relative
        if SKIPPED_DIRECTORIES.isdisjoint(path.parts[:-1]) and path.name not in SKIPPED_FILES
    )
    return [root / path for path in sorted(kept, key=lambda path: path.as_posix())]


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's strings are not our caller's concern
        tree = ast.parse(path.read_bytes(), filename=str(path))
    owners = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    owners.sort(
        key=lambda node: getattr(node, "lineno", 0)
    )  # ast.walk goes level by level; a module has no line
    for owner in owners:
        text = (ast.get_docstring(owner) or "").strip()
        if text:
            yield text


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _held_out(topics: Mapping[str, str], held_out: float) -> set[str]:
    order = sorted(topics, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())
    if isinstance(held_out, int):
        if held_out < 0:
            raise ValueError(
                f"held_out must be a number of topics or a share between 0 and 1, got {held_out}"
            )
        return set(order[:held_out])
    if not 0.0 <= held_out < 1.0:
        raise ValueError(
            f"held_out must be a share between 0 and 1, or a whole number of topics, got {held_out}"
        )
    target = held_out * sum(map(len, topics.values()))
    held: set[str] = set()
    taken = 0
    for name in order:
        size = len(topics[name])
        if 4 * size <= target and taken + size <= target:
            held.add(name)
            taken += size
    return held
