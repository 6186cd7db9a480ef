"""The keyring: which keys may join a run, and which invitations let new ones in. Durable before it counts.

A file of its own beside the ledger: the ledger is what everybody may have a copy of, this is not. `zo-coordinator
invite`, `allow` and `revoke` write it while the run is served; the server notices.

An invitation is a key pair that follows from a ticket's token; only its public key is here. So a stranger does not pass
the handshake at all, and whoever does with an invitation's key can do no more than have one key of its own admitted.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self

from coordinator.invitations import Invitation, KeyState, Standing
from coordinator.ledger import StorageError, connected_to_read, is_storage

FORMAT: Final = "zo-keyring-1"
_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE keys (
    key BLOB PRIMARY KEY, identity BLOB NOT NULL, state TEXT NOT NULL, since REAL NOT NULL, invitation INTEGER,
    agents TEXT)
    WITHOUT ROWID;
CREATE TABLE invitations (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, uses_left INTEGER, expires_at REAL, made_at REAL NOT NULL,
    agents TEXT);
"""


class KeyringError(RuntimeError):
    """A keyring that is missing, damaged or of another version."""


class KeyRecord(NamedTuple):
    """What is known of one key."""

    key: bytes
    identity: bytes
    """The key under which its node was first admitted: itself, unless it was rotated."""
    state: KeyState
    since: float
    """Seconds since the epoch."""
    invitation: int | None
    """Number of the invitation that let it in; None if a person did."""
    agents: frozenset[int] | None
    """The agents that it may join; None for all."""


class Keyring:
    """One run's keyring file, with a copy of it in memory."""

    def __init__(self, path: Path, *, create: bool = False, read_only: bool = False) -> None:
        """Open.

        Args:
            path: of the SQLite file.
            create: make a new one; there must be none.
            read_only: refuse to write; it need not be possible.

        Raises:
            KeyringError: missing, damaged, or of another version.
            StorageError: it cannot be written.
        """
        if create == path.exists():
            raise KeyringError(
                f"{path} {'exists already' if create else 'does not exist: restore it from a backup of the run'}"
            )
        self.path = path
        self._version: int | None = None
        self._records: dict[bytes, KeyRecord] = {}
        try:
            if create:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            self._db = connected_to_read(path) if read_only else sqlite3.connect(path, isolation_level=None)
        except OSError as error:
            raise StorageError(f"cannot open {path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise _unusable(path, error, read_only) from error
        try:
            if not read_only:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA busy_timeout=5000")
            if create:
                with self._transaction():
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._set("format", FORMAT)
            found = self._get("format")
            if found != FORMAT:
                raise KeyringError(f"{path} has format {found!r}, this version reads {FORMAT!r}")
            self.refresh()
        except sqlite3.DatabaseError as error:
            self.close()
            raise _unusable(path, error, read_only) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # ---- what a service may ask, of the copy in memory ---------------------------------------------------------------

    def refresh(self) -> bool:
        """Read the file again if another process has written it; whether one has."""
        (version,) = self._db.execute("PRAGMA data_version").fetchone()
        if version == self._version:
            return False
        self._version = version
        self._reload()
        return True

    def passes(self, public: bytes) -> bool:
        """Whether a key may complete the handshake: to join, or to be told what is wrong with its invitation."""
        record = self._records.get(public)
        if record is not None:
            return record.state is KeyState.ADMITTED
        return public in self._invitations

    def lets_in(self, public: bytes, now: float) -> bool:
        """Whether a key is that of an invitation which is open at this time, in seconds since the epoch."""
        invitation = self._invitations.get(public)
        return invitation is not None and invitation.is_open(now)

    def standing(self, public: bytes) -> Standing:
        """Who a key is."""
        record = self._records.get(public)
        if record is None:
            return Standing(invitation=self._invitations.get(public))
        return Standing(record.state, record.identity, record.agents)

    def num_admitted(self) -> int:
        """Keys that may join."""
        return self._num_admitted

    def num_keys_of(self, identity: bytes) -> int:
        """How many keys a node has had."""
        return sum(record.identity == identity for record in self._records.values())

    def records(self) -> list[KeyRecord]:
        """All keys that were ever admitted, oldest first."""
        return sorted(self._records.values(), key=lambda record: (record.since, record.key))

    def invitations(self) -> list[Invitation]:
        """All invitations, oldest first."""
        return sorted(self._invitations.values(), key=lambda invitation: invitation.number)

    def is_revoked(self, identity: bytes) -> bool:
        """Whether no key of a node may join any more."""
        return not any(
            record.identity == identity and record.state is KeyState.ADMITTED
            for record in self._records.values()
        )

    # ---- changes; durable when they return --------------------------------------------------------------------------

    def invite(
        self,
        public: bytes,
        uses: int | None = None,
        expires_at: float | None = None,
        agents: frozenset[int] | None = None,
    ) -> Invitation:
        """Make an invitation.

        Args:
            public: its public key, (32,) bytes.
            uses: how many keys it lets in; None for any number.
            expires_at: seconds since the epoch; None for never.
            agents: those that the keys may join; None for all.

        Raises:
            StorageError: it is not made.
        """
        with self._change():
            self._db.execute(
                "INSERT INTO invitations (key, uses_left, expires_at, made_at, agents) VALUES (?, ?, ?, ?, ?)",
                (public, uses, expires_at, time.time(), _to_text(agents)),
            )
        return self._invitations[public]

    def withdraw(self, number: int) -> bool:
        """Make an invitation void; False if there is none with this number. Raises StorageError."""
        with self._change():
            changed = self._db.execute(
                "UPDATE invitations SET uses_left = 0 WHERE id = ?", (number,)
            ).rowcount
        return bool(changed)

    def allow(self, public: bytes, agents: frozenset[int] | None = None) -> None:
        """Let a key in, to some agents or all, also one that was revoked. Raises StorageError."""
        with self._change(public):
            self._db.execute(
                "INSERT INTO keys VALUES (?, ?, 'admitted', ?, NULL, ?) "
                "ON CONFLICT (key) DO UPDATE SET state = 'admitted', since = excluded.since, agents = excluded.agents",
                (public, public, time.time(), _to_text(agents)),
            )

    def revoke(self, identity: bytes) -> None:
        """Shut out all keys of a node. Raises StorageError."""
        with self._change():
            self._db.execute(
                "UPDATE keys SET state = 'revoked', since = ? WHERE identity = ? AND state = 'admitted'",
                (time.time(), identity),
            )

    def redeem(self, invitation: Invitation, public: bytes) -> bool:
        """Let a key in and count the use of its invitation, both or neither.

        Another process may have written since the copy in memory was read, so the file itself is asked.

        Returns:
            Whether it has happened: not if the invitation has no use left by now, or the key is known by now.

        Raises:
            StorageError: neither has happened.
        """
        with self._change(public):
            counted = self._db.execute(
                "UPDATE invitations SET uses_left = uses_left - 1 WHERE id = ? "
                "AND (uses_left IS NULL OR uses_left > 0) AND NOT EXISTS (SELECT 1 FROM keys WHERE key = ?)",
                (invitation.number, public),
            ).rowcount
            if counted:
                self._db.execute(
                    "INSERT INTO keys VALUES (?, ?, 'admitted', ?, ?, ?)",
                    (public, public, time.time(), invitation.number, _to_text(invitation.agents)),
                )
        return bool(counted)

    def rotate(self, old: bytes, new: bytes) -> bool:
        """Put another key in the place of a node's, both or neither.

        Returns:
            Whether it has happened: not if the old key may not join any more, or the new one is known by now.

        Raises:
            StorageError: neither has happened.
        """
        now = time.time()
        with self._change():
            put = self._db.execute(
                "INSERT INTO keys SELECT ?, identity, 'admitted', ?, invitation, agents FROM keys "
                "WHERE key = ? AND state = 'admitted' ON CONFLICT DO NOTHING",
                (new, now, old),
            ).rowcount
            if put:
                self._db.execute("UPDATE keys SET state = 'replaced', since = ? WHERE key = ?", (now, old))
        return bool(put)

    def set_address(self, host: str, port: int) -> None:
        """Remember where the run is served, for the tickets of `invite`. Raises StorageError."""
        with self._change():
            self._set("host", host)
            self._set("port", str(port))

    def address(self) -> tuple[str, int] | None:
        """Where the run was served last."""
        host, port = self._get("host"), self._get("port")
        return None if host is None or port is None else (host, int(port))

    # ---- SQLite -----------------------------------------------------------------------------------------------------

    def _reload(self, key: bytes | None = None) -> None:
        which, keys = ("", ()) if key is None else (" WHERE key = ?", (key,))
        found = {
            key: KeyRecord(key, identity, KeyState(state), since, invitation, _to_agents(agents))
            for key, identity, state, since, invitation, agents in self._db.execute(
                f"SELECT * FROM keys{which}", keys
            )
        }
        self._records = found if key is None else self._records | found
        self._num_admitted = sum(record.state is KeyState.ADMITTED for record in self._records.values())
        self._invitations = {
            key: Invitation(number, uses_left, expires_at, _to_agents(agents))
            for number, key, uses_left, expires_at, _, agents in self._db.execute("SELECT * FROM invitations")
        }

    def _set(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def _get(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    @contextlib.contextmanager
    def _change(self, key: bytes | None = None) -> Iterator[None]:
        """A transaction whose effect the copy in memory then has, too.

        Args:
            key: the only one that it changes; else all are read again, which for thousands takes as long as many joins.
        """
        try:
            with self._transaction():
                yield
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"cannot write {self.path}: {error}. Nothing has changed; make room or repair the disk, then try again"
            ) from error
        self._reload(key)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise


def _to_text(agents: frozenset[int] | None) -> str | None:
    return None if agents is None else ",".join(map(str, sorted(agents)))


def _to_agents(text: str | None) -> frozenset[int] | None:
    return None if text is None else frozenset(map(int, text.split(",")))


def _unusable(path: Path, error: sqlite3.DatabaseError, read_only: bool) -> KeyringError | StorageError:
    if is_storage(error):
        return StorageError(f"cannot open {path}{'' if read_only else ' for writing'}: {error}")
    return KeyringError(f"{path} is not a keyring, or is damaged: {error}")
