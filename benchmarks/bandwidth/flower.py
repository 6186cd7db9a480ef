"""Flower as its users run it: a SuperLink and SuperNodes as processes over gRPC, in an environment of their own.

Their pins clash with ours, so they get a virtual environment; torch and the rest of ours are seen from there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks import machine
from benchmarks.bandwidth.network import Network
from benchmarks.bandwidth.wire import Unmeasured

VERSION: Final = "1.32.1"
_CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "zo-swarm"
_FLEET, _CONTROL, _SERVER, _CLIENT = 9092, 9093, 9091, 9400
_START_S: Final = 120.0
_QUIET: Final = {"FLWR_TELEMETRY_ENABLED": "0", "PYTHONDONTWRITEBYTECODE": "1"}


def environment(cache: Path = _CACHE) -> Path:
    """The directory of Flower's commands; installed from PyPI if they are not there.

    Raises:
        Unmeasured: they cannot be installed; the message says why.
    """
    folder = cache / f"flower-{VERSION}"
    done = folder / "installed"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing flwr {VERSION} from PyPI into {folder}, once", file=sys.stderr)
        commands = (
            [sys.executable, "-m", "venv", str(folder)],
            [
                str(folder / "bin" / "pip"),
                "install",
                "--quiet",
                "--disable-pip-version-check",
                f"flwr=={VERSION}",
            ],
        )
        for command in commands:
            try:
                found = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as error:
                raise Unmeasured(f"flwr {VERSION} cannot be installed: {error}") from error
            if found.returncode:
                raise Unmeasured(
                    f"flwr {VERSION} cannot be installed: {found.stderr.strip().rpartition(chr(10))[2][:300]}"
                )
        done.touch()
    # Written every time: another tree may have used the environment before.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = [each for each in sys.path if each.endswith("-packages")]
    ours = "\n".join([str(machine.ROOT), *packages, ""])
    (folder / "lib" / version / "site-packages" / "zo-bench.pth").write_text(ours)
    return folder / "bin"


@contextlib.contextmanager
def running(
    network: Network,
    place: Path,
    nodes: int,
    errors: Path,
    *,
    rounds: int,
    steps: int,
    rate: float = 0.01,
    int8: bool = False,
) -> Iterator[subprocess.Popen[str]]:
    """FedAvg under way: values after each round appear as PLACE/flower/ROUND.npy; the process that was given the run.

    Args:
        network: to run on.
        place: of the contest.
        nodes: how many.
        errors: file for what the processes say.
        rounds: of FedAvg.
        steps: local ones of Adam; 0 for none, and noise in their place.
        rate: theirs.
        int8: moves in int8 either way, instead of values in float32.

    Raises:
        Unmeasured: Flower did not start.
    """
    commands = environment()
    home = place / "flower-home"
    app, out = place / "flower-app", place / "flower"
    for folder in (home, app, out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    shutil.copy(Path(__file__).with_name("flower_app.py"), app)
    (app / "pyproject.toml").write_text(_app(place, nodes, rounds, steps, rate, int8))
    host = network.coordinator_address
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "{host}:{_CONTROL}"\ninsecure = true\n'
    )
    path = f"{commands}{os.pathsep}{os.environ.get('PATH', '')}"
    around = {**_QUIET, "FLWR_HOME": str(home), "PATH": path}
    children = []
    try:
        superlink = [
            str(commands / "flower-superlink"),
            "--insecure",
            "--disable-runtime-dependency-installation",
        ]
        ports = [
            "--serverappio-api-address",
            f"127.0.0.1:{_SERVER}",
            "--fleet-api-address",
            f"{host}:{_FLEET}",
        ]
        children.append(
            network.start(
                "coordinator",
                [*superlink, *ports, "--control-api-address", f"{host}:{_CONTROL}"],
                errors=errors,
                environment=around,
            )
        )
        supernode = [str(commands / "flower-supernode"), "--insecure", "--superlink", f"{host}:{_FLEET}"]
        for node in range(nodes):
            own = [
                "--clientappio-api-address",
                f"127.0.0.1:{_CLIENT + node}",
                "--node-config",
                f"partition-id={node}",
            ]
            child = network.start("nodes", [*supernode, *own], errors=errors, environment=around)
            children.append(child)
        run = [str(commands / "flwr"), "run", str(app), "bench"]
        until = time.monotonic() + _START_S
        while True:
            asked = network.start("coordinator", run, errors=errors, environment=around)
            children.append(asked)
            if asked.wait() == 0:
                break
            if time.monotonic() > until or children[0].poll() is not None:
                words = asked.stdout.read() if asked.stdout else ""
                raise Unmeasured(f"flwr run: {(words + errors.read_text())[-400:]}")
            time.sleep(1.0)
        yield children[0]
    finally:
        for child in children:
            child.terminate()  # all at once: each may take seconds to go
        for child in reversed(children):
            network.stop(child)


def _app(place: Path, nodes: int, rounds: int, steps: int, rate: float, int8: bool) -> str:
    """The app's pyproject.toml."""
    return f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "zo-bench-fedavg"
version = "1.0.0"
description = "FedAvg of an adapter"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "zo-bench"

[tool.flwr.app.components]
serverapp = "flower_app:server"
clientapp = "flower_app:client"

[tool.flwr.app.config]
place = "{place}"
nodes = {nodes}
rounds = {rounds}
steps = {steps}
rate = {float(rate)}
int8 = {str(int8).lower()}
"""
