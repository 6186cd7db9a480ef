"""A node's state directory: its key, the manifest, the agents' newest weights, and the lock that makes it one node's.

Agents are saved one by one, each as one file that is whole at every instant. Their chains are independent of each
other, so there is no state that several of them would have to be in together.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from transport.catchup import Download
from transport.durable import agent_folder, sync_directory, write_atomically
from transport.keys import KeyPair, load_or_make_key
from zo.manifest import Manifest, ManifestError, parse_manifest
from zo.replica import Replica
from zo.snapshot import decode_snapshot, encode_snapshot
from zo.toml import documented_toml


class StateError(RuntimeError):
    """A state directory that cannot be used; the message says why."""


class DamagedStateError(StateError):
    """What was saved is damaged, or another version's."""


class StateBusyError(RuntimeError):
    """Another process uses the state directory."""


class StateDirectory:
    """Where a node keeps what it must not lose. Everything but the key can be had again from the coordinator."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest_path = path / "manifest.toml"
        self.log_path = path / "log.jsonl"
        self.privacy_path = path / "privacy.json"
        self._next_key_path = path / "node.key.new"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Make the directory if need be, and hold it.

        Raises:
            StateError: it cannot be made or written.
            StateBusyError: another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StateError(f"cannot write the state directory {self.path}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StateBusyError(
                    f"another node uses the state directory {self.path}; "
                    "to run a second node on this machine, give it its own --name"
                ) from error
            yield
        finally:
            os.close(descriptor)

    def keys(self) -> KeyPair:
        """The node's keys, made at first use. Raises KeyFileError."""
        return load_or_make_key(self.path / "node.key")

    def has_keys(self) -> bool:
        """Whether a node has ever been here."""
        return (self.path / "node.key").exists()

    def next_keys(self) -> KeyPair:
        """The keys to come in their place, made at first use. Raises KeyFileError."""
        return load_or_make_key(self._next_key_path)

    def has_next_keys(self) -> bool:
        """Whether a change of keys was begun, and it is not known what became of it."""
        return self._next_key_path.exists()

    def adopt_next_keys(self) -> None:
        """Put the next keys in the place of the node's. Raises StateError."""
        try:
            os.replace(self._next_key_path, self.path / "node.key")
            sync_directory(self.path)
        except OSError as error:
            raise StateError(f"cannot replace the key in {self.path}: {error.strerror}") from error

    def private_seed(self) -> int:
        """A secret number that only this node knows, from its key: it decides batches and rounding."""
        secret = self.keys().secret
        return int.from_bytes(hashlib.blake2b(secret, digest_size=8, person=b"zo-private").digest(), "little")

    def manifest(self) -> Manifest | None:
        """The manifest of the run that this node last took part in; None if it has none that can be read."""
        try:
            return parse_manifest(self.manifest_path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, ManifestError):
            return None

    def save_manifest(self, manifest: Manifest) -> None:
        """Keep the manifest. Raises StateError."""
        _write(self.manifest_path, documented_toml(manifest, "The manifest of the run.").encode())

    def saved_weights(self) -> list[Path]:
        """The files with the saved weights of all agents."""
        return [*self.path.glob("snapshot.zo"), *self.path.glob("agent-*/snapshot.zo")]

    def set_aside(self) -> Path | None:
        """Move the saved weights of all agents into a directory of their own, which `load_result` reads as it does this
        one; the node then starts from round 0. Nothing is deleted.

        Returns:
            that directory; None if nothing was saved.

        Raises:
            StateError: it cannot be written.
        """
        saved = self.saved_weights()
        if not saved:
            return None
        aside = next(path for n in count(1) if not (path := self.path / f"set-aside-{n}").exists())
        try:
            aside.mkdir()
            if self.manifest_path.exists():
                shutil.copy(self.manifest_path, aside)
            for path in saved:
                target = aside / path.relative_to(self.path)
                target.parent.mkdir(exist_ok=True)
                path.rename(target)
        except OSError as error:
            raise StateError(f"cannot set the saved weights aside in {aside}: {error.strerror}") from error
        return aside

    def agent(self, agent: int) -> "AgentState":
        """What is kept of one agent."""
        return AgentState(self, agent)


class AgentState:
    """What a node keeps of one agent. All of it can be had again from the coordinator."""

    def __init__(self, directory: StateDirectory, agent: int) -> None:
        self.path = agent_folder(directory.path, agent)
        self.snapshot_path = self.path / "snapshot.zo"
        self._manifest_path = directory.manifest_path
        self._agent = agent

    def load(self, run_id: bytes) -> tuple[Manifest, Replica] | None:
        """What was saved for this run; None if nothing was, or if it cannot be trusted: it can be had again."""
        try:
            manifest = parse_manifest(self._manifest_path.read_text("utf-8"))
            if manifest.run_id != run_id:
                return None
            return manifest, decode_snapshot(self.snapshot_path.read_bytes(), manifest, self._agent)
        except (OSError, UnicodeDecodeError, ManifestError, ValueError):
            return None

    def load_download(self) -> Download | None:
        """A snapshot that was not fetched to its end; None if there is none."""
        for part in self.path.glob("*.part"):
            with contextlib.suppress(OSError, ValueError):
                return Download(bytes.fromhex(part.stem), part.read_bytes())
        return None

    def keep_piece(self, content: bytes, data: bytes) -> None:
        """Append to the snapshot that is being fetched, and forget any other. Raises StateError."""
        path = self.path / f"{content.hex()}.part"
        try:
            if not path.exists():
                self.drop_download()
            self.path.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(data)
        except OSError as error:
            raise StateError(f"cannot write {path}: {error.strerror}") from error

    def drop_download(self) -> None:
        """Remove what was kept of a download."""
        for part in self.path.glob("*.part"):
            part.unlink(missing_ok=True)

    def drop_weights(self) -> None:
        """Remove the saved weights: they are wrong. Raises StateError."""
        try:
            self.snapshot_path.unlink(missing_ok=True)
        except OSError as error:
            raise StateError(f"cannot remove {self.snapshot_path}: {error.strerror}") from error

    def save(self, replica: Replica, manifest: Manifest) -> None:
        """Keep the weights. Raises StateError."""
        _write(self.snapshot_path, encode_snapshot(replica, manifest))


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}") from error


def default_state(run_id: bytes, name: str) -> Path:
    """Where a node keeps its state unless it is told otherwise."""
    root = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return root / "zo-node" / run_id.hex()[:12] / name


def load_result(path: Path, agent: int = 0) -> tuple[Manifest, Replica]:
    """The manifest and an agent's newest weights in a node's state directory or a coordinator's run directory.

    Raises:
        DamagedStateError: they are damaged.
        StateError: there are none.
    """
    directory = StateDirectory(path)
    try:
        manifest = parse_manifest(directory.manifest_path.read_text("utf-8"))
        newest = _newest_snapshot(directory, agent)
        return manifest, decode_snapshot(newest.read_bytes(), manifest, agent, _start(path, manifest, agent))
    except OSError as error:
        raise StateError(
            f"{path} holds no weights{f' of agent {agent}' if agent else ''} yet: cannot read {error.filename} "
            f"({error.strerror}). Name a node's state directory or a coordinator's run directory"
        ) from error
    except ValueError as error:
        raise DamagedStateError(f"{path}: {error}") from error


def _start(path: Path, manifest: Manifest, agent: int) -> Replica | None:
    """Where a run directory's snapshots of a pool start; None for other runs, and for a node's state."""
    initial = path / "initial.zo"
    if manifest.directions.policy != "pool" or not initial.is_file():
        return None
    return Replica(manifest, decode_snapshot(initial.read_bytes(), manifest).weights, agent=agent)


def held_agents(path: Path) -> list[int]:
    """The agents of which `load_result` finds weights; none if it is no such directory."""
    directory = StateDirectory(path)
    try:
        manifest = parse_manifest(directory.manifest_path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ManifestError):
        return []
    return [agent for agent in range(manifest.agents.count) if _newest_snapshot(directory, agent).is_file()]


def _newest_snapshot(directory: StateDirectory, agent: int) -> Path:
    """A node keeps one snapshot of an agent; a coordinator keeps several, named ROUND-CONTENT.zo."""
    rounds = {
        int(path.name.partition("-")[0]): path
        for path in agent_folder(directory.path / "snapshots", agent).glob("*.zo")
        if path.name.partition("-")[0].isdigit()
    }
    return rounds[max(rounds)] if rounds else directory.agent(agent).snapshot_path
