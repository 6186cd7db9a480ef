"""A replica of the run's weights: the manifest plus the commits applied so far.

Node, coordinator, audit and simulation all hold one; it is the only code that turns commits into weights (law 1).
"""

import numpy as np
from numpy.typing import NDArray

from zo import codes as code_rules
from zo import kernels
from zo.commit import Commit, chain_digest
from zo.directions import run_key
from zo.manifest import Manifest
from zo.weights import Bound, digest


class ChainError(ValueError):
    """A commit that does not follow the one before."""


def samples(round: int, directions: int) -> range:
    """The samples of a round: direction i of round r is sample r × directions + i, for every node alike."""
    return range(round * directions, (round + 1) * directions)


class Replica:
    """Weights at a round, moved on by one commit at a time.

    Attributes:
        weights: (size,) int32, fixed point (zo.weights). Read it, never write it.
        round: number of commits applied.
        head: digest of the last commit applied, (16,) bytes; the run id before the first.
    """

    def __init__(
        self, manifest: Manifest, weights: NDArray[np.int32], round: int = 0, head: bytes | None = None
    ):
        if weights.shape != (manifest.adapter.size,) or weights.dtype != np.int32:
            raise ValueError(
                f"weights must be int32 of {manifest.adapter.size} entries, got {weights.dtype} of {weights.shape}"
            )
        self.weights = weights.copy()
        self.round = round
        self.head = manifest.run_id if head is None else head
        self._key = run_key(manifest.run_id)
        self._rounds = manifest.run.rounds
        self._directions = manifest.probe.directions
        self._bound = Bound(self.weights)

    def check(self, commit: Commit) -> NDArray[np.int32]:
        """The commit's coefficients, (participants × directions,) int32, if it can be applied next.

        Raises:
            ChainError: another round is due, the run has no more rounds, the chain does not match, or the number of
                codes is not the manifest's.
            WeightsOverflow: it would move a weight out of range. Nothing has changed then.
        """
        if commit.round != self.round:
            raise ChainError(f"commit of round {commit.round} where round {self.round} is due")
        if commit.round >= self._rounds:
            raise ChainError(f"commit of round {commit.round}, but the run ends after {self._rounds} rounds")
        if commit.previous != self.head:
            raise ChainError(
                f"commit of round {commit.round} follows {commit.previous.hex()}, this replica is at {self.head.hex()}"
            )
        expected = len(commit.participants) * self._directions
        if len(commit.codes) != expected:
            raise ChainError(
                f"commit of round {commit.round} has {len(commit.codes)} codes, expected {expected}"
            )
        coefficients = code_rules.coefficients(np.frombuffer(commit.codes, np.int8), commit.steps[0])
        self._bound.check(self.weights, coefficients)
        return coefficients

    def apply(self, commit: Commit, frame: bytes | None = None) -> None:
        """Move on by one commit. `frame`, if at hand, is its encoded form (saves encoding it again).

        Raises:
            ChainError, WeightsOverflow: as `check`; nothing has changed then.
        """
        coefficients = self.check(commit)
        directions = np.zeros((coefficients.size, 3), np.uint32)
        directions[:, 0] = np.repeat(np.asarray(commit.participants, np.uint32), self._directions)
        round_samples = np.asarray(samples(commit.round, self._directions), np.uint32)
        directions[:, 1] = np.tile(round_samples, len(commit.participants))
        voting = coefficients != 0
        kernels.apply(self.weights, self._key, directions[voting], coefficients[voting])
        self._bound.grow(coefficients)
        self.round += 1
        self.head = chain_digest(commit.encode() if frame is None else frame)

    def digest(self) -> bytes:
        """(16,) bytes that stand for the round and every bit of the weights."""
        return digest(self.round, self.weights)
