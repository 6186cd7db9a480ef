"""`init --calibrate` with a real model: what the coordinator writes is what a node's process measured."""

import subprocess
import sys

import pytest

from coordinator.rundir import RunDirectory
from node import embedded
from node.calibration import EPSILONS


@pytest.mark.e2e
def test_a_run_is_made_with_an_epsilon_that_was_measured(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("Return the number of items in the list, which may be empty.\n" * 40)
    command = [
        sys.executable,
        "-m",
        "coordinator.cli",
        "init",
        str(tmp_path / "run"),
        "--calibrate",
        str(notes),
    ]
    options = ["--model", str(embedded.path()), "--batch-size", "1", "--sequence-length", "16"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    epsilon = RunDirectory(tmp_path / "run").manifest().probe.epsilon
    assert epsilon in EPSILONS
    assert f"epsilon {epsilon:g}, as measured" in done.stdout
