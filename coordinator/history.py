"""History as a tool: what a ledger tells, how two of them differ, and how to take back without forgetting.

Nothing here removes anything. A rollback and a retraction are entries of their own (`zo.commit.Revert`), so a ledger
still proves everything that ever happened, and nodes follow them as they follow any other entry.
"""

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coordinator.archive import scale_of
from coordinator.ledger import Checkpoint, Ledger, LedgerError, StorageError, connected_to_read
from coordinator.rundir import RunDirectory, RunDirectoryError
from transport.durable import agent_folder, sync_directory, write_atomically
from zo.codes import NO_VOTE
from zo.commit import Commit, Entry, Revert, genesis
from zo.directions import GROUP_0, MAX_NODE
from zo.manifest import Manifest
from zo.naming import naming, spoken
from zo.packing import codes_of
from zo.poolfile import PoolFileError, encode_pool_file
from zo.replica import Replica
from zo.snapshot import encode_snapshot


class HistoryError(ValueError):
    """A request that does not fit the ledger; the message says why."""


class LogRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of `zo-coordinator log`: an entry of the ledger, or an event beside it."""

    round: int
    kind: str
    """"commit", "revert", or the kind of an event."""
    text: str
    participants: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    step: int | None = None
    exponent: int | None = None
    rms: float | None = None
    """Root mean square of the codes."""
    no_votes: int = 0
    digest: str | None = None
    """Digest of the weights after the entry, where it was recorded."""
    at: float | None = None
    """Seconds since the epoch, of events."""
    node: int | None = None


def records(ledger: Ledger, manifest: Manifest, first: int, last: int) -> Iterator[LogRecord]:
    """Entries first..last-1 of an agent's ledger with the events that happened before each, in order.

    Raises:
        LedgerError: an entry is missing or damaged.
    """
    events = ledger.events(first=first, last=last)
    digests = {each.round: each.digest.hex() for each in ledger.checkpoints(first, last)}
    position = 0
    for entry in ledger.entries(first, last):
        while position < len(events) and events[position].round <= entry.round:
            event = events[position]
            yield LogRecord(round=event.round, kind=event.kind, text=event.text, at=event.at, node=event.node)
            position += 1
        try:
            record = _entry_record(entry, digests.get(entry.round + 1), manifest)
        except ValueError as error:
            raise LedgerError(f"{ledger.path} is damaged at round {entry.round}: {error}") from error
        yield record
    for event in events[position:]:
        yield LogRecord(round=event.round, kind=event.kind, text=event.text, at=event.at, node=event.node)


def _entry_record(entry: Entry, digest: str | None, manifest: Manifest) -> LogRecord:
    if isinstance(entry, Revert):
        part = f"of {whose(entry.nodes)}" if entry.nodes else "of everyone"
        text = f"takes back rounds {entry.first} to {entry.last - 1} {part}"
        return LogRecord(round=entry.round, kind="revert", text=text, digest=entry.digest.hex())
    codes = codes_of(entry, manifest)
    votes = codes[codes != NO_VOTE].astype(np.float64)
    rms = float(np.sqrt(np.mean(votes**2))) if votes.size else None
    shown = "" if rms is None else f", RMS {rms:.1f}"
    return LogRecord(
        round=entry.round,
        kind="commit",
        text=f"{_heard(entry)}: {codes.size} codes{shown}, step {entry.steps[0]}",
        participants=entry.participants,
        late=entry.late,
        step=entry.steps[0],
        exponent=entry.exponents[0],
        rms=rms,
        no_votes=int(codes.size - votes.size),
        digest=digest,
    )


def whose(voices: Sequence[int]) -> str:
    """Some participants of commits, in words."""
    if all(voice <= MAX_NODE for voice in voices):
        return f"node {', '.join(map(str, voices))}"
    return ", ".join(map(spoken, voices))


def _heard(commit: Commit) -> str:
    if all(voice <= MAX_NODE for voice in commit.participants):
        marks = ("*" if node in commit.late else "" for node in commit.participants)
        return f"nodes {' '.join(f'{node}{mark}' for node, mark in zip(commit.participants, marks, strict=True))}"
    return whose(commit.participants)


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """How two runs relate, by the chains of one agent."""

    same_run: bool
    agent: int
    fields: dict[str, tuple[Any, Any]]
    """Fields of the manifest that differ, by dotted name: (in A, in B)."""
    rounds: tuple[int, int]
    common_rounds: int
    """Entries from the start that are equal in both."""

    @property
    def are_equal(self) -> bool:
        """Whether both are the same run at the same round."""
        return self.same_run and self.common_rounds == max(self.rounds)


def compare(manifests: tuple[Manifest, Manifest], ledgers: tuple[Ledger, Ledger]) -> Difference:
    """How two runs differ: in their manifests, and from which round on in their ledgers of one agent.

    The chain makes the common part one bisection: two heads are equal only if everything before is.
    """
    a, b = (dict(_flat(msgspec.to_builtins(manifest))) for manifest in manifests)
    fields = {name: (a.get(name), b.get(name)) for name in sorted(a | b) if a.get(name) != b.get(name)}
    same_run = manifests[0].run_id == manifests[1].run_id
    rounds = ledgers[0].num_commits(), ledgers[1].num_commits()
    low, high = 0, min(rounds) if same_run else 0
    while low < high:
        middle = (low + high + 1) // 2
        if ledgers[0].head_after(middle) == ledgers[1].head_after(middle):
            low = middle
        else:
            high = middle - 1
    return Difference(
        same_run=same_run, agent=ledgers[0].agent, fields=fields, rounds=rounds, common_rounds=low
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def take_back(
    directory: RunDirectory,
    manifest: Manifest,
    ledger: Ledger,
    first: int,
    voices: Sequence[int],
    warn: Callable[[str], None] = lambda _: None,
) -> tuple[Revert, Replica]:
    """Append the entry that takes back everything from round `first` on, of all or of some participants, of one agent.

    Args:
        directory: of the run, locked by the caller.
        manifest: of the run.
        ledger: the agent's.
        first: the first round to take back.
        voices: whose part, participants of commits; empty for everyone's.
        warn: called if the entry is durable, but something beside it, which a later start makes up for, is not.

    Returns:
        The entry, durable, and the replica after it.

    Raises:
        HistoryError: nothing to take back, or the run has weight decay.
        KeyFileError: the key to sign it with is missing, or another.
        WeightsOverflow: it would move a weight out of range; nothing has changed then.
        LedgerError: what is to be taken back is damaged; nothing has changed then.
        StorageError: the entry could not be written; nothing has changed then.
    """
    if manifest.schedule.weight_decay:
        raise HistoryError(
            "this run has weight decay: every round has shrunk what those before did, so that nothing can be taken "
            "back exactly. `export --round N` has the weights of a round, and `init --adapter` starts a run from them"
        )
    total = ledger.num_commits()
    if not 0 <= first < total:
        raise HistoryError(
            f"the ledger has {total} rounds: from round {first} on there is nothing to take back"
        )
    _check_known(manifest, ledger, voices)
    signer = directory.signer(manifest)
    replica = directory.state_at(total, manifest, ledger)
    if voices and not took_part(ledger, voices, first):
        raise HistoryError(f"{whose(voices)} took part in no round from {first} on")
    try:
        entry = replica.revert(first, total, tuple(sorted(set(voices))), ledger.entries)
        replica.apply(entry, history=ledger.entries)
    except ValueError as error:
        raise LedgerError(f"{ledger.path} is damaged in what is to be taken back: {error}") from error
    seal = (
        b""
        if signer is None
        else signer.seal(genesis(manifest.run_id, ledger.agent), replica.round, replica.head)
    )
    ledger.append(entry, seal=seal)
    try:
        ledger.checkpoint(Checkpoint(replica.round, replica.digest(), scale_of(manifest, ledger)))
        directory.snapshots(ledger.agent).save(
            replica.round, encode_snapshot(replica, manifest, with_weights=False)
        )
    except StorageError as error:
        warn(f"it is taken back, but {error}; the next `serve` makes up for it")
    return entry, replica


def _check_known(manifest: Manifest, ledger: Ledger, voices: Sequence[int]) -> None:
    policy = manifest.directions
    if not policy.are_combined:
        if unknown := set(voices) - {each.node for each in ledger.nodes()}:
            if min(unknown) > MAX_NODE:
                raise HistoryError("this run has no groups: name nodes")
            raise HistoryError(f"no node {min(unknown)} has ever joined; `zo-coordinator status` lists them")
        return
    for voice in voices:
        if voice <= MAX_NODE:
            group = naming(manifest).voice(voice)
            which = f"--group {group - GROUP_0}" if policy.policy == "groups" else "`rollback`"
            raise HistoryError(
                f"the codes of node {voice} are combined with those of others, and its part cannot be taken back; take "
                f"back that of all with {which}"
            )
        try:
            naming(manifest).check([voice])
        except ValueError as error:
            raise HistoryError(str(error)) from error


def took_part(ledger: Ledger, voices: Sequence[int], first: int) -> bool:
    """Whether any of these participants has codes in an agent's rounds from `first` on. Raises LedgerError."""
    return any(
        isinstance(entry, Commit) and not set(voices).isdisjoint(entry.participants)
        for entry in ledger.entries(min(first, ledger.num_commits()))
    )


def export_state(
    directory: RunDirectory, manifest: Manifest, ledgers: Sequence[Ledger], round: int | None, output: Path
) -> list[Replica]:
    """Write manifest and weights after `round` commits to a directory that `zo-node export` takes.

    Args:
        directory: of the run.
        manifest: of the run.
        ledgers: those of the agents to write.
        round: after so many commits of each; None for all that each has.
        output: a directory to make.

    Raises:
        HistoryError: no such round, or the directory holds something already.
        StorageError: it cannot be written.
    """
    for ledger in ledgers:
        _check_round(manifest, ledger, round)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise HistoryError(f"{output} exists already; choose another directory")
    replicas = [
        directory.state_at(ledger.num_commits() if round is None else round, manifest, ledger)
        for ledger in ledgers
    ]
    try:
        for replica in replicas:
            path = agent_folder(output, replica.agent) / "snapshot.zo"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, encode_snapshot(replica, manifest))
        shutil.copyfile(directory.manifest_path, output / "manifest.toml")
    except OSError as error:
        raise StorageError(f"cannot write {output}: {error}") from error
    return replicas


def export_pool(
    directory: RunDirectory, manifest: Manifest, ledger: Ledger, round: int | None, output: Path
) -> tuple[Replica, int]:
    """Write what a pool run has learnt after `round` commits to a file that `zo-node export --from` takes.

    Args:
        directory: of the run.
        manifest: of the run.
        ledger: the agent's.
        round: after so many commits; None for all.
        output: a file to make.

    Returns:
        The replica that is in it, and how many bytes it has.

    Raises:
        HistoryError: no such round, no pool, or the file exists.
        StorageError: it cannot be written.
    """
    _check_round(manifest, ledger, round)
    if output.exists():
        raise HistoryError(f"{output} exists already; choose another file")
    replica = directory.state_at(ledger.num_commits() if round is None else round, manifest, ledger)
    try:
        data = encode_pool_file(replica, manifest)
        write_atomically(output, data)
    except PoolFileError as error:
        raise HistoryError(str(error)) from error
    except OSError as error:
        raise StorageError(f"cannot write {output}: {error}") from error
    return replica, len(data)


def _check_round(manifest: Manifest, ledger: Ledger, round: int | None) -> None:
    total = ledger.num_commits()
    if round is not None and not 0 <= round <= total:
        whose = f" of agent {ledger.agent}" if manifest.agents.count > 1 else ""
        raise HistoryError(f"the ledger{whose} has {total} rounds, got --round {round}")


def back_up(directory: RunDirectory, destination: Path) -> None:
    """Copy a run directory, served or not, to a new one that can be served: a consistent ledger, keys and snapshots.

    Raises:
        RunDirectoryError: the destination holds something already.
        StorageError: it cannot be written.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise RunDirectoryError(f"{destination} exists already; choose another directory")
    copy = RunDirectory(destination)
    try:
        destination.mkdir(parents=True, exist_ok=True)
        # Snapshots first: one that is newer than the copied ledger would be passed over, but never the other way round.
        for agent in range(directory.manifest().agents.count):
            snapshots = directory.snapshots(agent)
            for stored in snapshots.stored():
                with contextlib.suppress(
                    FileNotFoundError
                ):  # the service makes room for newer ones meanwhile
                    copy.snapshots(agent).save(stored.round, snapshots.read(stored))
        _copy_database(directory.ledger_path, copy.ledger_path)
        copy.keyring_path.touch(0o600)
        _copy_database(directory.keyring_path, copy.keyring_path)
        for path in (
            directory.key_path,
            *([directory.signing_key_path] if directory.signing_key_path.exists() else []),
            directory.config_path,
            directory.initial_path,
            directory.manifest_path,
        ):
            copied = destination / path.name
            shutil.copy2(path, copied)  # with its mode: the key stays its owner's alone
            with copied.open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(destination)
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"cannot back up to {destination}: {error}") from error


def _copy_database(path: Path, copy: Path) -> None:
    """A consistent copy, also while it is written. Raises sqlite3.Error."""
    with (
        contextlib.closing(connected_to_read(path)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
