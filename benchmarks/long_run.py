"""A run directory with very many rounds, made fast: the ledger's schema, chain, rule and snapshots, without a network.

The codes are drawn at random; everything that follows from them is what a coordinator would have computed. Commits
between two digests are applied together, which gives the same bits, and written 10,000 to a transaction.
"""

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine
from coordinator.rundir import RunDirectory
from coordinator.snapshots import is_due
from node import embedded
from transport.keys import new_key_pair
from transport.seals import Signer
from zo import kernels
from zo.codes import coefficients
from zo.commit import Commit, chain_digest
from zo.directions import run_key
from zo.manifest import Manifest
from zo.replica import Replica
from zo.snapshot import encode_snapshot
from zo.steps import StepRule, step_rule
from zo.weights import Bound

_TRANSACTION: Final = 10_000
_STEP: Final = 0.001
"""Random codes make a random walk: with the usual step a million rounds of it would leave the weights' range."""


def init_run(path: Path, rounds: int, quorum: int) -> RunDirectory:
    """A run of the embedded model, as `zo-coordinator init` makes it."""
    options = {
        "--rounds": rounds,
        "--directions": 1,
        "--step": _STEP,
        "--full-votes": 1,
        "--quorum": quorum,
        "--host": "127.0.0.1",
        "--port": 0,
    }
    arguments = [str(each) for option in options.items() for each in option]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "coordinator.cli",
            "init",
            str(path),
            "--model",
            str(embedded.path()),
            *arguments,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=machine.ROOT,
    )
    return RunDirectory(path)


def fill(directory: RunDirectory, commits: int, nodes: int, progress: Callable[[int], None]) -> bytes:
    """Write so many commits with as many nodes in each; the digest of the weights after them.

    Args:
        directory: a new run of at least so many rounds.
        commits: a multiple of the manifest's `digest_every`.
        nodes: participants of every commit.
        progress: called with the number of commits written.
    """
    manifest = directory.manifest()
    every = manifest.parity.digest_every
    if commits % every:
        raise ValueError(f"commits must be a multiple of {every}, where digests are recorded, got {commits}")
    filling = _Filling(manifest, directory.initial(manifest), nodes, directory.signer(manifest))
    last_num_bytes = last_bytes = last_codes = 0
    with closing(sqlite3.connect(directory.ledger_path, isolation_level=None)) as db:
        db.executemany(
            "INSERT INTO members (agent, node, key, name, enrolled_at) VALUES (0, ?, ?, ?, 0)",
            [(node, new_key_pair().public, f"node-{node}") for node in range(nodes)],
        )
        for first in range(0, commits, _TRANSACTION):
            db.execute("BEGIN")
            for number in range(first, min(first + _TRANSACTION, commits), every):
                rows, checkpoint = filling.advance(every)
                db.executemany("INSERT INTO commits VALUES (0, ?, ?, ?, ?, 0, ?)", rows)
                db.execute("INSERT INTO checkpoints VALUES (0, ?, ?, ?, ?, ?)", checkpoint)
                tail = filling.num_bytes - last_bytes, filling.num_codes - last_codes
                if is_due(last_num_bytes, *tail, manifest.adapter.size):
                    stored = directory.snapshots().save(
                        number + every, encode_snapshot(filling.replica(), manifest)
                    )
                    last_num_bytes, last_bytes, last_codes = (
                        stored.num_bytes,
                        filling.num_bytes,
                        filling.num_codes,
                    )
            db.execute("COMMIT")
            progress(min(first + _TRANSACTION, commits))
    return filling.replica().digest()


class _Filling:
    """The coordinator's state between two digests."""

    def __init__(self, manifest: Manifest, initial: Replica, nodes: int, signer: Signer | None) -> None:
        self.num_bytes = self.num_codes = 0
        self._manifest = manifest
        self._signer = signer
        self._genesis = initial.head
        self._rule: StepRule = step_rule(manifest)
        self._scale = self._rule.start()
        self._weights: NDArray[np.int32] = initial.weights.copy()
        self._bound = Bound(self._weights)
        self._head, self._round = initial.head, initial.round
        self._key = run_key(manifest.run_id)
        self._participants = tuple(range(nodes))
        self._rng = np.random.default_rng(1)

    def replica(self) -> Replica:
        """The weights as they stand."""
        return Replica(self._manifest, self._weights, self._round, self._head)

    def advance(
        self, rounds: int
    ) -> tuple[list[tuple[int, bytes, int, int, bytes]], tuple[int, bytes, int, int, int]]:
        """So many more rounds: rows of the table of commits, and one of that of checkpoints."""
        directions, num_nodes = self._manifest.probe.directions, len(self._participants)
        num_codes = num_nodes * directions
        codes = self._rng.normal(0, 32, (rounds, num_codes)).clip(-127, 127).astype(np.int8)
        rows = []
        moves = np.empty((rounds, num_codes), np.int32)
        for index in range(rounds):
            step, self._scale = self._rule.advance(self._scale, self._round, codes[index])
            commit = Commit(
                self._round,
                (step,),
                (self._scale.exponent,),
                self._participants,
                codes[index].tobytes(),
                self._head,
            )
            frame = commit.encode()
            self._head = chain_digest(frame)
            seal = (
                b"" if self._signer is None else self._signer.seal(self._genesis, self._round + 1, self._head)
            )
            rows.append((self._round, frame, self.num_bytes, self.num_codes, seal))
            moves[index] = coefficients(codes[index], step)
            self._round += 1
            self.num_bytes += len(frame)
            self.num_codes += num_codes
        names = np.zeros((rounds, num_nodes, directions, 3), np.uint32)
        names[..., 0] = np.arange(num_nodes, dtype=np.uint32)[:, None]
        samples = np.arange((self._round - rounds) * directions, self._round * directions)
        names[..., 1] = samples.reshape(rounds, 1, directions)
        self._bound.admit(self._weights, moves.ravel())
        kernels.apply(self._weights, self._key, names.reshape(-1, 3), moves.ravel())
        checkpoint = (
            self._round,
            self.replica().digest(),
            self._scale.mean_square,
            self._scale.exponent,
            self._scale.moves_exponent,
        )
        return rows, checkpoint
