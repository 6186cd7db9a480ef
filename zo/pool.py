"""The seed pool: K directions that all nodes draw from, and K integers that are the whole of what was learnt (FedKSeed,
Qin et al. 2023, arXiv 2312.06353).

Every sample of every node draws an index by its name, so no index travels. What codes move adds up per index:

    weights = start − Σ_k accumulators[k] × z_k      exactly, modulo 2^32, after any number of commits and reverts

so momentum and weight decay act on the accumulators, where they mean the same and cost K operations, and a snapshot of
a pool run has the size of the pool, whatever the size of the weights and the age of the run.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from zo import kernels
from zo.codes import NO_VOTE
from zo.directions import UINT32_MAX, RunKey
from zo.manifest import Manifest
from zo.reference import philox4x32

_DRAW_BLOCK: Final = UINT32_MAX
"""Block of a sample's stream that draws its index: no direction of 2^31 weights gets so far."""
_WORD_BITS: Final = 32
_USUAL: Final = 32 << 8
"""The importance of an index that nobody has drawn: codes are as large in the mean, in units of 2^-8."""
_LEAST: Final = _USUAL >> 2
"""An index is drawn at least as often as if its codes were a quarter of that, so that none is given up."""
_MEMORY: Final = 3
"""Importances are means over about 2^3 draws."""


class Pool(msgspec.Struct, frozen=True):
    """What a pool run has learnt, and what it draws by. Arrays are never written to."""

    accumulators: NDArray[np.int32]
    """(K,) what weights have moved by along each direction, with the opposite sign."""
    aim: NDArray[np.int32] | None
    """(K,) with momentum, where the accumulators are going to."""
    importances: NDArray[np.int32] | None
    """(K,) mean magnitude of the codes of each index, in units of 2^-8; None where draws are uniform."""

    @property
    def vectors(self) -> list[NDArray[np.int32]]:
        """All of it, (K,) int32 each: for digests and snapshots."""
        return [each for each in (self.accumulators, self.aim, self.importances) if each is not None]

    @property
    def num_bytes(self) -> int:
        """Of `vectors`."""
        return sum(each.nbytes for each in self.vectors)

    def filled(self, vectors: Sequence[NDArray[np.int32]]) -> "Pool":
        """A pool of the same kind with these vectors, as `vectors` has them."""
        rest = list(vectors)
        accumulators = rest.pop(0)
        aim = None if self.aim is None else rest.pop(0)
        return Pool(accumulators, aim, None if self.importances is None else rest.pop(0))

    def after(
        self,
        indices: NDArray[np.uint32],
        coefficients: NDArray[np.int32],
        codes: NDArray[np.int8],
        momentum: int,
        decay: int,
    ) -> "Pool":
        """The pool after a commit.

        Args:
            indices: (n,) of its directions.
            coefficients: (n,) theirs.
            codes: (n,) theirs.
            momentum: as `manifest.Schedule.momentum`.
            decay: as `manifest.Schedule.weight_decay`; towards accumulators of 0, which is where the weights started.
        """
        moved = _plus(self.accumulators if self.aim is None else self.aim, indices, coefficients)
        if decay:
            kernels.decay(moved, np.zeros_like(moved), decay)
        importances = None if self.importances is None else _updated(self.importances, indices, codes)
        if self.aim is None:
            return Pool(moved, None, importances)
        followed = self.accumulators.copy()
        kernels.follow(followed, moved, momentum)
        return Pool(followed, moved, importances)

    def at_rest(self, indices: NDArray[np.uint32], coefficients: NDArray[np.int32]) -> "Pool":
        """The pool after a revert: with these added to the aim, and arrived there. Importances are facts, and stay."""
        moved = _plus(self.accumulators if self.aim is None else self.aim, indices, coefficients)
        return Pool(moved, None if self.aim is None else moved, self.importances)

    def seen(self, indices: NDArray[np.uint32], codes: NDArray[np.int8]) -> "Pool":
        """The pool with nothing new but the importances after a commit."""
        assert self.importances is not None
        return Pool(self.accumulators, self.aim, _updated(self.importances, indices, codes))

    def way_to(self, other: "Pool") -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The indices whose accumulators differ, and by how much: (m,) int64 and (m,) int32."""
        difference = other.accumulators - self.accumulators  # wrapping, as the weights do
        changed = np.flatnonzero(difference)
        return changed, difference[changed]


def start(manifest: Manifest) -> Pool | None:
    """The pool before round 0; None if the run has none."""
    policy = manifest.directions
    if policy.policy != "pool":
        return None
    zeros = np.zeros(policy.pool_size, np.int32)
    importances = np.full(policy.pool_size, _USUAL, np.int32) if policy.pool_draw == "importance" else None
    return Pool(zeros, zeros if manifest.schedule.momentum else None, importances)


def draw(
    key: RunKey,
    nodes: NDArray[np.int64],
    samples: NDArray[np.int64],
    agent: int,
    size: int,
    importances: NDArray[np.int32] | None = None,
) -> NDArray[np.int64]:
    """The pool's index for each sample, (n,) int64 within 0..size − 1.

    The first word of the Philox block (0xFFFF_FFFF, sample, node, agent), times the sum of all chances, without the
    last 32 bits, falls on an index. Chances are 1 each, or importances, but none less than a quarter of what is usual.

    Args:
        key: of the run.
        nodes: (n,) whose samples they are.
        samples: (n,) their numbers.
        agent: for whom.
        size: K.
        importances: of the round in which they are drawn; None for uniform draws.
    """
    counter = np.empty((nodes.size, 4), np.uint32)
    counter[:, 0] = _DRAW_BLOCK
    counter[:, 1], counter[:, 2], counter[:, 3] = samples, nodes, agent
    words = philox4x32(counter, key)[:, 0].astype(np.uint64)
    if importances is None:
        return ((words * np.uint64(size)) >> np.uint64(_WORD_BITS)).astype(np.int64)
    edges = np.cumsum(np.maximum(importances, _LEAST), dtype=np.uint64)
    points = (words * edges[-1]) >> np.uint64(_WORD_BITS)
    return np.asarray(np.searchsorted(edges, points, side="right"), np.int64)


def _plus(
    accumulators: NDArray[np.int32], indices: NDArray[np.uint32], coefficients: NDArray[np.int32]
) -> NDArray[np.int32]:
    sums = accumulators.astype(np.int64)
    np.add.at(sums, indices, coefficients)
    return sums.astype(np.int32)  # modulo 2^32


def _updated(
    importances: NDArray[np.int32], indices: NDArray[np.uint32], codes: NDArray[np.int8]
) -> NDArray[np.int32]:
    """importance += (mean |code| of the round − importance) >> 3, where there is a vote."""
    votes = codes != NO_VOTE
    num = np.bincount(indices[votes], minlength=importances.size)
    total = np.zeros(importances.size, np.int64)
    np.add.at(total, indices[votes], np.abs(codes[votes].astype(np.int64)))
    drawn = num > 0
    found = importances.astype(np.int64)
    found[drawn] += ((total[drawn] << 8) // num[drawn] - found[drawn]) >> _MEMORY
    return found.astype(np.int32)
