"""The run directory: manifest, configuration, keys, ledger and snapshots of one run, and who may write them."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from coordinator.config import ConfigError, ServiceConfig, parse_config
from coordinator.keyring import Keyring
from coordinator.ledger import Ledger, LedgerError, StorageError
from coordinator.snapshots import SnapshotStore, Stored
from transport.durable import agent_folder, write_atomically
from transport.keys import (
    KeyFileError,
    KeyPair,
    invitation_keys,
    load_key,
    load_secret,
    new_key_pair,
    save_key,
    save_secret,
    standing_token,
)
from transport.messages import PROTOCOL_VERSION
from transport.seals import Signer
from zo.manifest import Manifest, ManifestError, parse_manifest
from zo.replica import Replica
from zo.snapshot import SnapshotError, decode_snapshot, encode_snapshot
from zo.toml import documented_toml
from zo.weights import WeightsOverflow

_MANIFEST_TITLE: Final = (
    "The manifest of this run: what all its nodes share. Its hash is the run id, so it cannot be edited; "
    "`zo-coordinator init` makes a new one."
)
_CONFIG_TITLE: Final = (
    "How this coordinator is operated. May be edited; read at the start of `zo-coordinator serve`."
)


class RunDirectoryError(ValueError):
    """A directory that is no run directory, or cannot become one."""


class BusyError(RuntimeError):
    """The run directory is being served by another process."""


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest_path = path / "manifest.toml"
        self.config_path = path / "coordinator.toml"
        self.key_path = path / "coordinator.key"
        self.signing_key_path = path / "signing.key"
        self.ledger_path = path / "ledger.sqlite"
        self.keyring_path = path / "keys.sqlite"
        self.initial_path = path / "initial.zo"
        self._snapshots: dict[int, SnapshotStore] = {}

    def snapshots(self, agent: int = 0) -> SnapshotStore:
        """The snapshots of an agent."""
        if agent not in self._snapshots:
            self._snapshots[agent] = SnapshotStore(agent_folder(self.path / "snapshots", agent))
        return self._snapshots[agent]

    def check_absent(self) -> None:
        """Check that nothing is there yet but perhaps an empty directory. Raises RunDirectoryError."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunDirectoryError(
                f"{self.path} exists already; choose another directory, or remove it first"
            )

    def create(
        self,
        manifest: Manifest,
        config: ServiceConfig,
        initial: Replica,
        *,
        invite_only: bool = False,
        signing_key: bytes | None = None,
    ) -> None:
        """Make the directory and everything in it; its manifest last, so that half a directory is none.

        Args:
            manifest: of the run.
            config: how it is operated at first.
            initial: the weights of round 0.
            invite_only: make no standing invitation.
            signing_key: the secret key of the manifest's signer; None if it names none.

        Raises:
            RunDirectoryError: there is something already.
            StorageError: it cannot be written.
        """
        self.check_absent()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            keys = new_key_pair()
            save_key(self.key_path, keys)
            if signing_key is not None:
                save_secret(self.signing_key_path, signing_key)
            with Keyring(self.keyring_path, create=True) as keyring:
                if not invite_only:
                    keyring.invite(invitation_keys(standing_token(keys.secret)).public)
            Ledger(self.ledger_path, manifest.run_id, create=True).close()
            write_atomically(self.initial_path, encode_snapshot(initial, manifest))
            write_atomically(self.config_path, documented_toml(config, _CONFIG_TITLE).encode())
            write_atomically(self.manifest_path, documented_toml(manifest, _MANIFEST_TITLE).encode())
        except OSError as error:
            raise StorageError(f"cannot write the run directory {self.path}: {error}") from error

    def manifest(self) -> Manifest:
        """The manifest.

        Raises:
            RunDirectoryError: there is none.
            ManifestError: it is wrong, or of another version of the protocol.
        """
        text = self._read(self.manifest_path)
        protocol = _protocol(text)
        if protocol not in (None, PROTOCOL_VERSION):
            raise ManifestError(
                f"{self.manifest_path} is of protocol version {protocol}, this program speaks "
                f"{PROTOCOL_VERSION}; use the version that made it"
            )
        try:
            return parse_manifest(text)
        except ManifestError as error:
            raise ManifestError(f"{self.manifest_path}: {error}") from error

    def config(self) -> ServiceConfig:
        """The service configuration. Raises RunDirectoryError, ConfigError."""
        text = self._read(self.config_path)
        try:
            return parse_config(text)
        except ConfigError as error:
            raise ConfigError(f"{self.config_path}: {error}") from error

    def keys(self) -> KeyPair:
        """The coordinator's keys. Raises KeyFileError."""
        return load_key(self.key_path)

    def signer(self, manifest: Manifest) -> Signer | None:
        """Who signs the ledger; None if nothing is signed. Raises KeyFileError, also if it is not the manifest's."""
        if not manifest.run.signer:
            return None
        signer = Signer(load_secret(self.signing_key_path))
        if signer.public != manifest.run.signer:
            raise KeyFileError(
                f"{self.signing_key_path} is not the key that this run is signed with, {manifest.run.signer}; restore "
                "it from a backup"
            )
        return signer

    def ledger(self, manifest: Manifest, *, read_only: bool = False) -> Ledger:
        """The ledger. Raises LedgerError, StorageError."""
        return Ledger(self.ledger_path, manifest.run_id, bits=manifest.codes.bits, read_only=read_only)

    def keyring(self, *, read_only: bool = False) -> Keyring:
        """Which keys may join. Raises KeyringError, StorageError."""
        return Keyring(self.keyring_path, read_only=read_only)

    def initial(self, manifest: Manifest, agent: int = 0) -> Replica:
        """The weights of round 0, the same for every agent.

        Raises:
            SnapshotError: damaged, or of another run.
            RunDirectoryError: missing.
        """
        try:
            stored = decode_snapshot(self.initial_path.read_bytes(), manifest)
        except OSError as error:
            raise RunDirectoryError(f"cannot read {self.initial_path}: {error}") from error
        return Replica(manifest, stored.weights, agent=agent)

    def newest(self, manifest: Manifest, ledger: Ledger, before: int | None = None) -> tuple[Replica, str]:
        """The newest state from which to replay, and in words which one it is.

        Args:
            manifest: of the run.
            ledger: of the run; its agent's state is found.
            before: not after this round.

        Raises:
            SnapshotError, RunDirectoryError: no snapshot serves, and the weights of round 0 cannot be had.
        """
        found, reason = self.newest_snapshot(manifest, ledger, before)
        if found is None:
            return self.initial(manifest, ledger.agent), f"start of the run ({reason})"
        return found[1], f"snapshot of round {found[0].round}"

    def newest_snapshot(
        self, manifest: Manifest, ledger: Ledger, before: int | None = None
    ) -> tuple[tuple[Stored, Replica] | None, str]:
        """The newest snapshot that can be trusted with the replica in it, if there is one; why none newer serves.

        A snapshot is a short cut only: one that is missing, damaged or not part of the ledger is passed over.
        """
        reason = "there is no snapshot yet"
        total, snapshots = ledger.num_commits(), self.snapshots(ledger.agent)
        is_pool = manifest.directions.policy == "pool"  # whose snapshots have no weights
        start = self.initial(manifest, ledger.agent) if is_pool else None
        for stored in reversed(snapshots.stored()):
            if before is not None and stored.round > before:
                continue
            try:
                replica = decode_snapshot(snapshots.read(stored), manifest, ledger.agent, start)
            except (OSError, SnapshotError) as error:
                reason = str(error)
                continue
            if replica.round <= total and ledger.head_after(replica.round) == replica.head:
                return (stored, replica), reason
            reason = f"snapshot of round {replica.round} is not part of the ledger"
        return None, reason

    def state_at(self, round: int, manifest: Manifest, ledger: Ledger) -> Replica:
        """The replica after `round` commits, from the nearest snapshot before. Raises LedgerError."""
        replica, _ = self.newest(manifest, ledger, before=round)
        for entry in ledger.entries(replica.round, round):
            try:
                replica.apply(entry, history=ledger.entries)
            except (ValueError, WeightsOverflow) as error:
                raise LedgerError(f"{ledger.path} is damaged at round {replica.round}: {error}") from error
        ledger.check_seal(manifest.run.signer, round)
        return replica

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for writing.

        Raises:
            BusyError: another process holds it.
        """
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(f"cannot write the run directory {self.path}: {error}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError(
                    f"{self.path} is being served by another process; stop that one first"
                ) from error
            yield
        finally:
            os.close(descriptor)

    def _read(self, path: Path) -> str:
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(
                f"{self.path} is not a run directory: cannot read {path.name} ({error}). "
                "Make one with `zo-coordinator init`"
            ) from error


def _protocol(text: str) -> object:
    """The protocol version that a manifest claims, whatever else is in it; None if it claims none."""
    try:
        return msgspec.toml.decode(text).get("protocol")
    except msgspec.DecodeError:
        return None
