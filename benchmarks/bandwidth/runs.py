"""Run directories for benchmarks, made by `zo-coordinator init` once, then varied field by field; the real service.

Decides which settings of the manifest this version of the product knows.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import machine
from benchmarks.bandwidth.network import Network, quiet_environment
from benchmarks.light_node import Onlooker
from coordinator.config import ServiceConfig
from coordinator.rundir import RunDirectory
from node import embedded
from transport.seals import Signer
from transport.ticket import Ticket, parse_ticket
from zo import kernels
from zo.manifest import Manifest, ManifestError, validate
from zo.replica import Replica

Settings = Mapping[str, Mapping[str, Any]]
"""Section of the manifest -> field -> value."""


class ServiceError(RuntimeError):
    """The coordinator of a benchmark did not start, or ended; the message has its last words."""


def template(path: Path, base: Path | None = None, *more: str) -> RunDirectory:
    """A run of the embedded model with a very small adapter, as `zo-coordinator init` makes it."""
    if not kernels.is_compiled():
        kernels.compile_kernels()
    small = () if base else ("--target", "q_proj", "--rank", "1")
    options = (
        "--rounds",
        "1000000",
        "--directions",
        "1",
        "--digest-every",
        "64",
        "--step",
        "0.0001",
        "--full-votes",
        "1",
    )
    command = ["init", str(path), "--model", str(base or embedded.path()), *small, *options, *more]
    done = subprocess.run(
        [sys.executable, "-m", "coordinator.cli", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=machine.ROOT,
        env=quiet_environment(),
    )
    if done.returncode:
        raise ServiceError(f"`zo-coordinator init` ended with {done.returncode}: {done.stderr.strip()}")
    return RunDirectory(path)


def varied(manifest: Manifest, settings: Settings) -> Manifest:
    """A manifest with other values, and a nonce of its own.

    Raises:
        ManifestError: this version does not know a field, or does not take the value.
    """
    plain = msgspec.to_builtins(manifest)
    for section, fields in settings.items():
        plain.setdefault(section, {}).update(fields)
    plain["run"]["nonce"] = secrets.token_hex(16)
    try:
        return validate(msgspec.convert(plain, Manifest))
    except (msgspec.ValidationError, ValueError) as error:
        raise ManifestError(f"{dict(settings)}: {error}") from error


def knows(manifest: Manifest, settings: Settings) -> bool:
    """Whether this version of the product has these settings."""
    try:
        varied(manifest, settings)
    except ManifestError:
        return False
    return True


def make(
    path: Path, manifest: Manifest, quorum: int, keys: Iterable[bytes], base: Path | None = None
) -> RunDirectory:
    """A run directory that can be served.

    Args:
        path: where there is nothing yet.
        manifest: of the run, but for who signs it.
        quorum: least number of reports.
        keys: public keys that are admitted without a ticket.
        base: directory of its base; the embedded one if None.
    """
    run, signing_key = RunDirectory(path), secrets.token_bytes(32)
    signed = msgspec.structs.replace(manifest.run, signer=Signer(signing_key).public)
    manifest = msgspec.structs.replace(manifest, run=signed)
    weights = Onlooker(manifest, base or embedded.path()).initial_weights()
    config = ServiceConfig(port=0, quorum=quorum, capacity=4096)
    run.create(manifest, config, Replica(manifest, weights), signing_key=signing_key)
    with run.keyring() as keyring:
        for key in keys:
            keyring.allow(key)
    return run


@contextlib.contextmanager
def serving(
    network: Network, run: RunDirectory, errors: Path
) -> Iterator[tuple[Ticket, subprocess.Popen[str]]]:
    """A real `zo-coordinator serve` on the coordinator's side: its ticket and its process.

    Raises:
        ServiceError: it did not start.
    """
    child = network.python(
        "coordinator",
        "coordinator.cli",
        "serve",
        str(run.path),
        "--host",
        network.coordinator_address,
        "--port",
        "0",
        "--advertise",
        network.coordinator_address,
        errors=errors,
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline().strip()
        if not line:
            child.wait()
            raise ServiceError(f"the coordinator did not start: {errors.read_text()[-1000:]}")
        yield parse_ticket(line), child
    finally:
        network.stop(child)
