"""An epsilon that suits model and data, asked of `zo-node calibrate` in a process of its own: it needs torch."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from transport.exits import Exit
from zo.manifest import Manifest
from zo.toml import documented_toml


class CalibrationError(RuntimeError):
    """No epsilon was found; carries the exit code."""

    def __init__(self, code: Exit, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def proposed_epsilon(
    manifest: Manifest, model: Path, data: Sequence[Path], more: Sequence[str] = ()
) -> float:
    """The epsilon that is proposed for a run. What is shown meanwhile goes to this process's standard error.

    Args:
        manifest: of the run; its own epsilon is of no matter.
        model: directory of the base.
        data: files to measure on.
        more: further arguments of `zo-node calibrate`.

    Raises:
        CalibrationError: the node's extras are not installed, or the measurement failed.
    """
    if find_spec("torch") is None:
        raise CalibrationError(
            Exit.INPUT,
            "--calibrate runs the model, which needs the node's extras: pip install 'zo-swarm[node]'. Or measure on a "
            "node with `zo-node calibrate`, and give --epsilon here",
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.toml"
        path.write_text(documented_toml(manifest, "The manifest of a run to be."), "utf-8")
        files = [argument for file in data for argument in ("--data", str(file))]
        options = ["--model", str(model), *files, *more, "--json"]
        command = [sys.executable, "-m", "node.cli", "calibrate", str(path), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        known = done.returncode in set(Exit)
        raise CalibrationError(
            Exit(done.returncode) if known else Exit.INPUT,
            f"no epsilon was found: `zo-node calibrate` ended with exit code {done.returncode}, as it says above",
        )
    return float(json.loads(done.stdout)["epsilon"])
