"""The public rows that `init --audit` takes into the manifest, checked as far as that needs no tokenizer."""

import json
from pathlib import Path

from zo.manifest import ManifestError


def audit_rows(path: Path) -> tuple[str, ...]:
    """The rows of a file, each an object in JSON: the lines of a .jsonl, or the one text of a .txt.

    Whether they are rows of the run's task a node says, whose tokenizer and reader they go through.

    Raises:
        ManifestError: the file cannot be read, is empty or of another kind, or a line is no object.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"--audit {path}: cannot be read: {error}") from error
    if path.suffix.lower() == ".txt":
        rows = [json.dumps({"text": text}, ensure_ascii=False)] if text.strip() else []
    elif path.suffix.lower() == ".jsonl":
        rows = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        raise ManifestError(f"--audit {path}: public rows come as .jsonl or .txt")
    for number, row in enumerate(rows, 1):
        try:
            is_object = isinstance(json.loads(row), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise ManifestError(f"--audit {path}: row {number} is no object in JSON: {row[:60]!r}")
    if not rows:
        raise ManifestError(f"--audit {path}: there is no row in it")
    return tuple(rows)
