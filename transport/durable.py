"""Files that are whole at every instant, whatever is cut off while they are written; and where an agent's lie."""

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at every instant there is either the old or the new one, whole. Raises OSError."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def agent_folder(root: Path, agent: int) -> Path:
    """Where the files of an agent lie: agent 0's where a run with one agent has them, agent N's in `agent-N` there."""
    return root / f"agent-{agent}" if agent else root


def sync_directory(path: Path) -> None:
    """Make durable which files a directory holds. Raises OSError."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
