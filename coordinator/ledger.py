"""The ledger: commits, digests, members and events of one run, durable in SQLite before anybody sees them.

WAL with synchronous=FULL: when `append` returns, the commit survives a power cut. Readers (`status`, `verify`) never
block the writer. It stores bytes and chains them; it decides nothing. A `Ledger` shows one agent's rows, agent 0's
unless it is asked for another's (`track`); all are in one file.
"""

import contextlib
import copy
import sqlite3
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import msgspec

from coordinator.roster import Enrolment
from transport.seals import is_sealed
from zo.commit import Commit, Entry, Revert, chain_digest, decode_entry, genesis
from zo.steps import Scale

FORMAT: Final = "zo-ledger-3"
_NO_ROUND: Final = 2**62
_CHECKPOINT: Final = "round, digest, mean_square, exponent, moves_exponent"
_EVENT: Final = "at, agent, round, kind, node, text"
_NOTE: Final = f"INSERT INTO events ({_EVENT}) VALUES (?, ?, ?, ?, ?, ?)"
_SHUT_OUT: Final = "UPDATE members SET is_quarantined = ? WHERE node = ?"
_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE commits (
    agent INTEGER NOT NULL, round INTEGER NOT NULL, frame BLOB NOT NULL, bytes_before INTEGER NOT NULL,
    codes_before INTEGER NOT NULL, is_revert INTEGER NOT NULL, seal BLOB NOT NULL, PRIMARY KEY (agent, round));
CREATE INDEX reverts ON commits (agent, round) WHERE is_revert;
CREATE TABLE checkpoints (
    agent INTEGER NOT NULL, round INTEGER NOT NULL, digest BLOB NOT NULL, mean_square INTEGER NOT NULL,
    exponent INTEGER NOT NULL, moves_exponent INTEGER NOT NULL, PRIMARY KEY (agent, round));
CREATE TABLE members (
    agent INTEGER NOT NULL, node INTEGER NOT NULL, key BLOB NOT NULL, name TEXT NOT NULL, enrolled_at REAL NOT NULL,
    is_quarantined INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (agent, node), UNIQUE (agent, key));
CREATE TABLE events (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, agent INTEGER NOT NULL, round INTEGER NOT NULL, kind TEXT NOT NULL,
    node INTEGER, text TEXT NOT NULL);
CREATE INDEX visits ON events (agent, node, id) WHERE kind IN ('joined', 'left');
CREATE INDEX divergences ON events (id) WHERE kind IN ('diverged', 'released', 'started-over');
CREATE TABLE status (id INTEGER PRIMARY KEY CHECK (id = 1), json BLOB NOT NULL);
"""


class LedgerError(RuntimeError):
    """A ledger that is missing, damaged, of another version or of another run."""


class StorageError(RuntimeError):
    """The ledger could not be written: disk full, read-only or failing. What was written before is intact."""


class Checkpoint(NamedTuple):
    """The digest of the weights after `round` commits, and the step rule's memory there."""

    round: int
    digest: bytes
    scale: Scale
    """Read from a ledger it lacks `ahead`, which the last commit before says."""


class Divergences(NamedTuple):
    """What is remembered of a node whose digest differed."""

    number: int
    """How often, since it was last released."""
    must_start_over: bool
    """Whether it has not come back from round 0 since."""


class LedgerEvent(msgspec.Struct, frozen=True):
    """Something that happened."""

    at: float
    """Seconds since the epoch."""
    agent: int
    round: int
    kind: str
    node: int | None
    text: str


class Ledger:
    """One agent's rows of a run's ledger file.

    Attributes:
        path: of the file.
        agent: whose rows are read and written.
    """

    def __init__(
        self, path: Path, run_id: bytes, *, bits: int = 8, create: bool = False, read_only: bool = False
    ) -> None:
        """Open.

        Args:
            path: of the SQLite file.
            run_id: what the ledger must belong to.
            bits: of a code, to tell what a replay costs.
            create: make a new one; there must be none.
            read_only: refuse to write, and leave the writer undisturbed.

        Raises:
            LedgerError: missing, damaged, of another version or run.
            StorageError: it cannot be written.
        """
        if create == path.exists():
            raise LedgerError(f"{path} {'exists already' if create else 'does not exist'}")
        try:
            self._db = (
                connected_to_read(path)
                if read_only
                else sqlite3.connect(path.resolve(), isolation_level=None)
            )
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
                    self._db.executemany(
                        "INSERT INTO meta VALUES (?, ?)", [("format", FORMAT.encode()), ("run_id", run_id)]
                    )
            meta = dict(self._db.execute("SELECT key, value FROM meta"))
        except sqlite3.DatabaseError as error:
            self.close()
            raise _unusable(path, error, read_only) from error
        if meta.get("format") != FORMAT.encode():
            self.close()
            found = bytes(meta.get("format", b"none")).decode(errors="replace")
            raise LedgerError(
                f"{path} has format {found!r}, this version reads {FORMAT!r}; use the version that made it"
            )
        if meta.get("run_id") != run_id:
            self.close()
            raise LedgerError(
                f"{path} belongs to run {bytes(meta['run_id']).hex()}, the manifest beside it says {run_id.hex()}. "
                "The manifest of a run must not be edited: restore it, or `init` a new run"
            )
        self.path = path
        self.agent = 0
        self._run_id = run_id
        self._bits = bits
        self._totals = self._count_totals()

    def track(self, agent: int) -> "Ledger":
        """The same file, for another agent's rows; it is closed once for all."""
        other = copy.copy(self)
        other.agent = agent
        other._totals = other._count_totals()
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # ---- writing --------------------------------------------------------------------------------------------------

    def append(self, entry: Entry, frame: bytes | None = None, seal: bytes = b"") -> None:
        """Make an entry durable.

        Args:
            entry: the next one.
            frame: its encoded form, if at hand.
            seal: the signature under the chain's head with it; empty if the run is not signed.

        Raises:
            StorageError: it is not; the ledger is as before.
        """
        frame = entry.encode() if frame is None else frame
        num_bytes, codes = self._totals
        is_revert = isinstance(entry, Revert)
        row = (self.agent, entry.round, frame, num_bytes, codes, is_revert, seal)
        self._write("INSERT INTO commits VALUES (?, ?, ?, ?, ?, ?, ?)", *row)
        self._totals = num_bytes + len(frame), codes + self._num_codes(entry)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Record the digest at a round. Raises StorageError."""
        round, digest, scale = checkpoint
        self._write(
            "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?)",
            self.agent,
            round,
            digest,
            scale.mean_square,
            scale.exponent,
            scale.moves_exponent,
        )

    def enrol(self, enrolment: Enrolment) -> None:
        """Record a node that is new to this track. Raises StorageError."""
        self._write(
            "INSERT INTO members (agent, node, key, name, enrolled_at, is_quarantined) VALUES (?, ?, ?, ?, ?, ?)",
            self.agent,
            enrolment.node,
            enrolment.key,
            enrolment.name,
            time.time(),
            enrolment.is_quarantined,
        )

    def release(self, node: int) -> None:
        """Let a node in again, with a clean slate since an event says so: both or neither. Raises StorageError."""
        event = time.time(), self.agent, self.num_commits(), "released", node, f"node {node} may join again"
        self._write_together((_SHUT_OUT, (False, node)), (_NOTE, event))

    def set_quarantined(self, node: int, is_quarantined: bool) -> None:
        """Shut a node out of all tracks, or let it in again. Raises StorageError."""
        self._write(_SHUT_OUT, is_quarantined, node)

    def note(self, round: int, kind: str, node: int | None, text: str) -> None:
        """Record an event. Raises StorageError."""
        self._write(_NOTE, time.time(), self.agent, round, kind, node, text)

    def set_status(self, status: bytes) -> None:
        """Replace the status that readers see: JSON. Raises StorageError."""
        self._write("INSERT OR REPLACE INTO status VALUES (1, ?)", status)

    # ---- reading --------------------------------------------------------------------------------------------------

    def num_commits(self) -> int:
        """How many commits there are."""
        return int(
            self._one("SELECT COALESCE(MAX(round) + 1, 0) FROM commits WHERE agent = ?", self.agent)[0]
        )

    def frames(self, first: int = 0, last: int | None = None) -> Generator[bytes]:
        """The encoded commits first..last-1, in order.

        Raises:
            LedgerError: one is missing.
        """
        end = self.num_commits() if last is None else last
        rows = self._read(
            "SELECT round, frame FROM commits WHERE agent = ? AND round >= ? AND round < ? ORDER BY round",
            self.agent,
            first,
            end,
        )
        due = first
        with contextlib.closing(rows):  # a reader that stops half way does not keep the statement open
            for round, frame in rows:
                if round != due:
                    break
                yield frame
                due += 1
        if due < end:
            raise LedgerError(f"{self.path}: commit {due} is missing")

    def entries(self, first: int = 0, last: int | None = None) -> Iterator[Entry]:
        """The entries first..last-1, in order.

        Raises:
            LedgerError: one is missing or damaged.
        """
        for number, frame in enumerate(self.frames(first, last), first):
            try:
                yield decode_entry(frame)
            except ValueError as error:
                raise LedgerError(f"{self.path}: round {number}: {error}") from error

    def cost_since(self, first: int) -> tuple[int, int]:
        """Bytes and codes of all entries from `first` on: what a replay of them would move and compute."""
        rows = self._read(
            "SELECT bytes_before, codes_before FROM commits WHERE agent = ? AND round = ?", self.agent, first
        )
        row = next(iter(rows), None)
        num_bytes, codes = self._totals
        return (num_bytes - row[0], codes - row[1]) if row else (0, 0)

    def last_commit(self, before: int) -> Commit | None:
        """The newest entry of the rounds before this one that takes nothing back. Raises LedgerError."""
        rows = self._read(
            "SELECT frame FROM commits WHERE agent = ? AND round < ? AND NOT is_revert ORDER BY round DESC LIMIT 1",
            self.agent,
            before,
        )
        row = next(iter(rows), None)
        if row is None:
            return None
        try:
            entry = decode_entry(bytes(row[0]))
        except ValueError as error:
            raise LedgerError(f"{self.path} is damaged before round {before}: {error}") from error
        assert isinstance(entry, Commit)
        return entry

    def last_revert(self) -> int | None:
        """The round of the newest entry that takes back others, if there is one."""
        row = self._one("SELECT MAX(round) FROM commits WHERE agent = ? AND is_revert", self.agent)
        return None if row[0] is None else int(row[0])

    def head_after(self, num_commits: int) -> bytes:
        """The chain's head after so many commits: the last one's digest, or the agent's genesis."""
        if num_commits == 0:
            return genesis(self._run_id, self.agent)
        return chain_digest(next(self.frames(num_commits - 1, num_commits)))

    def check_seal(self, signer: str, round: int) -> None:
        """Check that the coordinator has signed the chain's head after `round` entries, and so all before it.

        Args:
            signer: the manifest's key; empty if nothing is signed.
            round: nothing is to be proved of the chain's beginning, 0.

        Raises:
            LedgerError: it has not.
        """
        if not signer or not round:
            return
        rows = self._read("SELECT seal FROM commits WHERE agent = ? AND round = ?", self.agent, round - 1)
        seal = bytes(next(iter(rows), (b"",))[0])
        if not is_sealed(signer, genesis(self._run_id, self.agent), round, self.head_after(round), seal):
            raise LedgerError(
                f"{self.path}: the entry of round {round - 1} is not signed by the run's coordinator: it, or one "
                "before it, was forged, changed or damaged; restore the run from a backup"
            )

    def checkpoints(self, first: int = 0, last: int | None = None) -> Iterator[Checkpoint]:
        """The digests recorded for rounds from first to last, by round; all of them without bounds."""
        rows = self._read(
            f"SELECT {_CHECKPOINT} FROM checkpoints WHERE agent = ? AND round >= ? AND round <= ? ORDER BY round",
            self.agent,
            first,
            _NO_ROUND if last is None else last,
        )
        for round, digest, *scale in rows:
            yield Checkpoint(round, digest, Scale(*scale))

    def last_checkpoint(self) -> Checkpoint | None:
        """The newest recorded digest."""
        rows = self._read(
            f"SELECT {_CHECKPOINT} FROM checkpoints WHERE agent = ? ORDER BY round DESC LIMIT 1", self.agent
        )
        row = next(iter(rows), None)
        return None if row is None else Checkpoint(row[0], row[1], Scale(*row[2:]))

    def digest_at(self, round: int) -> bytes | None:
        """The recorded digest after `round` commits, if there is one."""
        rows = self._read("SELECT digest FROM checkpoints WHERE agent = ? AND round = ?", self.agent, round)
        row = next(iter(rows), None)
        return None if row is None else bytes(row[0])

    def members(self) -> list[Enrolment]:
        """Everyone ever admitted to this track, and whether it has left it."""
        rows = self._read(
            "SELECT node, key, name, is_quarantined, (SELECT kind = 'left' FROM events WHERE agent = members.agent "
            "AND node = members.node AND kind IN ('joined', 'left') ORDER BY id DESC LIMIT 1) "
            "FROM members WHERE agent = ? ORDER BY node",
            self.agent,
        )
        return [Enrolment(*row[:3], *map(bool, row[3:])) for row in rows]

    def nodes(self) -> list[Enrolment]:
        """Everyone ever admitted to any track."""
        rows = self._read(
            "SELECT node, key, name, MAX(is_quarantined) FROM members GROUP BY node ORDER BY node"
        )
        return [Enrolment(node, key, name, bool(shut_out)) for node, key, name, shut_out in rows]

    def events(self, limit: int = -1, first: int = 0, last: int | None = None) -> list[LedgerEvent]:
        """The newest events of rounds from first to last, oldest first; all of them without limit and bounds."""
        rows = self._read(
            f"SELECT {_EVENT} FROM events WHERE agent = ? AND round >= ? AND round <= ? ORDER BY id DESC LIMIT ?",
            self.agent,
            first,
            _NO_ROUND if last is None else last,
            limit,
        )
        return [LedgerEvent(*row) for row in rows][::-1]

    def alerts(self, limit: int) -> list[LedgerEvent]:
        """The newest events about weights that differed or codes out of line, of any agent, oldest first."""
        rows = self._read(
            f"SELECT {_EVENT} FROM events WHERE kind IN ('diverged', 'first-difference', 'released', 'out-of-line') "
            "ORDER BY id DESC LIMIT ?",
            limit,
        )
        return [LedgerEvent(*row) for row in rows][::-1]

    def divergences(self) -> dict[int, Divergences]:
        """What became of the nodes whose digests differed in this track, by node; a release is from all tracks."""
        rows = self._read(
            "SELECT node, kind FROM events WHERE kind IN ('diverged', 'released', 'started-over') "
            "AND (agent = ? OR kind = 'released') ORDER BY id",
            self.agent,
        )
        found: dict[int, Divergences] = {}
        for node, kind in rows:
            before = found.get(node, Divergences(0, False))
            match kind:
                case "diverged":
                    found[node] = Divergences(before.number + 1, True)
                case "started-over":
                    found[node] = Divergences(before.number, False)
                case "released":
                    found[node] = Divergences(0, before.must_start_over)
        return found

    def status(self) -> bytes | None:
        """The last status written: JSON."""
        row = next(iter(self._read("SELECT json FROM status")), None)
        return None if row is None else bytes(row[0])

    def _count_totals(self) -> tuple[int, int]:
        """Bytes and codes of all entries."""
        rows = self._read(
            "SELECT frame, bytes_before, codes_before FROM commits WHERE agent = ? ORDER BY round DESC LIMIT 1",
            self.agent,
        )
        last = next(iter(rows), None)
        if last is None:
            return 0, 0
        frame, num_bytes, codes = last
        try:
            return num_bytes + len(frame), codes + self._num_codes(decode_entry(frame))
        except ValueError:  # whoever replays it will say which round is damaged
            return num_bytes + len(frame), codes

    def _num_codes(self, entry: Entry) -> int:
        """How many codes an entry has room for."""
        return len(entry.codes) * 8 // self._bits if isinstance(entry, Commit) else 0

    # ---- SQLite ---------------------------------------------------------------------------------------------------

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

    def _write(self, statement: str, *values: Any) -> None:
        self._write_together((statement, values))

    def _write_together(self, *statements: tuple[str, tuple[Any, ...]]) -> None:
        """All of them, or none."""
        try:
            with self._transaction():
                for statement, values in statements:
                    self._db.execute(statement, values)
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"cannot write {self.path}: {error}. What was acknowledged is safe; make room or repair the disk, "
                "then serve again"
            ) from error

    def _read(self, statement: str, *values: Any) -> Generator[Any, None, None]:
        try:
            # Not "yield from": that closes the cursor of who stops in the middle, also after the database's own end.
            for row in self._db.execute(statement, values):  # noqa: UP028
                yield row
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{self.path} is damaged: {error}") from error

    def _one(self, statement: str, *values: Any) -> Any:
        return next(self._read(statement, *values))


def connected_to_read(path: Path) -> sqlite3.Connection:
    """A connection to a database that can only read, also where nothing beside the file can be written.

    SQLite keeps who reads a WAL database in a file beside it. On a medium that is read-only it cannot, and need not: as
    long as there is nothing in a log beside it, all is in the database. Who only reads leaves an empty log.

    Raises:
        sqlite3.DatabaseError: it cannot be opened.
    """
    address = f"{path.resolve().as_uri()}?mode=ro"
    db = sqlite3.connect(address, uri=True, isolation_level=None)
    try:
        db.execute("PRAGMA schema_version")
    except sqlite3.DatabaseError as error:
        db.close()
        if not is_storage(error):
            raise
        log = path.with_name(path.name + "-wal")
        if log.exists() and log.stat().st_size:
            told = sqlite3.OperationalError(
                f"{error}; a log lies beside it, which SQLite can only read where it can write: copy the run to such a "
                "place"
            )
            told.sqlite_errorcode = error.sqlite_errorcode
            raise told from error
        db = sqlite3.connect(f"{address}&immutable=1", uri=True, isolation_level=None)
    return db


def _unusable(path: Path, error: sqlite3.DatabaseError, read_only: bool) -> LedgerError | StorageError:
    if is_storage(error):
        return StorageError(f"cannot open {path}{'' if read_only else ' for writing'}: {error}")
    return LedgerError(f"{path} is not a ledger, or is damaged: {error}")


def is_storage(error: sqlite3.DatabaseError) -> bool:
    """Whether it is the disk that fails, not what is in the file."""
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_BUSY,
    )
