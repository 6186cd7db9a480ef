"""What is asked of a model where no coordinator says it: from the command line, or from what an export carries with it.

An exported adapter has its run's manifest beside it, so that whoever evaluates it need not repeat what that says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from node.base import BaseError, resolve
from node.records import DataError
from zo.manifest import Manifest, ManifestError, Objective, Task, TaskKind, parse_manifest, task
from zo.toml import documented_toml

MANIFEST_FILE: Final = "manifest.toml"
ADAPTER_FILE: Final = "adapter_config.json"


Mix = Literal["mean", "vote"]
"""How several agents predict together: the mean of their probabilities, or a vote of what each holds the likeliest."""


class Asked(NamedTuple):
    """A task, and how long its rows may be."""

    task: Task
    sequence_length: int | None
    """None if nobody says."""


def keep_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the run's manifest beside what was exported from it. Raises OSError."""
    text = documented_toml(manifest, "The manifest of the run that this was exported from.")
    (folder / MANIFEST_FILE).write_text(text, "utf-8")


def adapters_in(folders: Sequence[Path]) -> list[Path]:
    """The PEFT adapters that are meant: each folder itself, or the agents of an export of several (`agent-0`, …).

    Raises:
        BaseError: a folder holds none.
    """
    found: list[Path] = []
    for folder in folders:
        if (folder / ADAPTER_FILE).is_file():
            found.append(folder)
            continue
        agents = [path for path in folder.glob("agent-*") if (path / ADAPTER_FILE).is_file()]
        if not agents:
            raise BaseError(f"{folder} is not a PEFT adapter: it has no {ADAPTER_FILE}")
        found += sorted(agents, key=lambda path: (len(path.name), path.name))
    return found


def check_mix(mix: Mix | None, adapters: Sequence[Path]) -> None:
    """Check that there is something to mix. Raises DataError."""
    if mix is not None and len(adapters) < 2:
        raise DataError(f"--mix {mix} takes several adapters, got {len(adapters)}: repeat --adapter")


def asked(
    model: str,
    adapters: Sequence[Path],
    kind: TaskKind | None,
    labels: Sequence[str] | None,
    template: str | None,
    sequence_length: int | None,
) -> Asked:
    """The task: as given here; if nothing is, as in the run that adapter or model come from; else plain text.

    Args:
        model: directory or hub name of the base.
        adapters: directories of PEFT adapters; the first tells.
        kind: of the task.
        labels: of the rows, as `zo.manifest.task` takes them; for a head those of the model's files if there are none.
        template: of a verbalizer.
        sequence_length: most tokens in a row.

    Raises:
        DataError: what is given does not make a task.
        BaseError: there is no such model.
    """
    known = _exported_from(adapters[0] if adapters else resolve(model))
    length = sequence_length or (known.probe.sequence_length if known else None)
    if known is not None and kind in (None, known.task.kind) and not labels and template is None:
        return Asked(known.task, length)
    kind = kind or (known.task.kind if known else "text")
    if kind == "head" and not labels:
        labels = _labels_in(resolve(model))
    try:
        return Asked(task(kind, labels or (), template), length)
    except ValueError as error:
        raise DataError(f"{error}. Name all labels with --label, once for each") from error


def judged_by(
    wanted: Task, objective: Objective | None, score: str | None, max_new_tokens: int | None
) -> Task:
    """The task with another objective, where one is given.

    Args:
        wanted: as `asked` gives it.
        objective: another than the task's; a callable if only `score` is given.
        score: the name of a callable.
        max_new_tokens: most tokens said after a prompt.

    Raises:
        DataError: what is given does not go together.
    """
    changes: dict[str, object] = {}
    if objective is not None or score is not None:
        changes |= {"objective": objective or "callable", "score": score or ""}
    if max_new_tokens is not None:
        changes["max_new_tokens"] = max_new_tokens
    try:
        return msgspec.structs.replace(wanted, **changes)
    except ValueError as error:
        raise DataError(str(error)) from error


def _exported_from(folder: Path) -> Manifest | None:
    try:
        return parse_manifest((folder / MANIFEST_FILE).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ManifestError):
        return None


def _labels_in(folder: Path) -> tuple[str, ...]:
    """The labels of a model that was saved as a classifier."""
    try:
        configuration = json.loads((folder / "config.json").read_text("utf-8"))
        names = configuration.get("id2label") or {}
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except (OSError, ValueError, AttributeError, TypeError):
        return ()
