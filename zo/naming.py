"""Naming: which directions the codes of a round belong to, by the run's policy.

A commit's participants are *voices*: the `node` values of its directions' names. In a private run that is the number of
the node; where nodes share directions it is one of the reserved numbers, and one row of codes stands for all of them.
So whoever applies, reverts or replays a commit needs no other policy than this module.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from zo.directions import GROUP_0, MAX_NODE, SEED_POOL, SHARED, Direction, Drawn, RunKey, run_key
from zo.manifest import Directions, Manifest
from zo.pool import draw


class Naming(msgspec.Struct, frozen=True):
    """How a run names directions."""

    policy: Directions = Directions()
    key: RunKey = (0, 0)
    """Of the run; a pool's draws follow from it."""

    def voice(self, node: int) -> int:
        """Under which number a commit has the codes of a node."""
        match self.policy.policy:
            case "shared":
                return SHARED
            case "groups":
                return GROUP_0 + node % self.policy.groups
            case "private" | "pool":
                return node

    def check(self, voices: Sequence[int]) -> None:
        """Check that a commit of this run may have these participants.

        Args:
            voices: ascending.

        Raises:
            ValueError: it may not; the message names the first that is none.
        """
        match self.policy.policy:
            case "shared":
                low, high = SHARED, SHARED
            case "groups":
                low, high = GROUP_0, GROUP_0 + self.policy.groups - 1
            case "private" | "pool":
                low, high = 0, MAX_NODE
        for voice in (*voices[:1], *voices[-1:]):
            if not low <= voice <= high:
                raise ValueError(
                    f"{spoken(voice)} is no participant of a run with policy = {self.policy.policy!r}"
                )

    def of_round(
        self, node: int, samples: range, agent: int = 0, importances: NDArray[np.int32] | None = None
    ) -> list[Direction]:
        """The names of what a node measures.

        Args:
            node: its number.
            samples: of the round.
            agent: for whom.
            importances: of a pool in this round, where it is drawn by them.
        """
        voices = np.full(len(samples), self.voice(node))
        names = self.names(voices, np.asarray(samples), agent, importances).tolist()
        if self.policy.policy != "pool":
            return [Direction(*name) for name in names]
        drawn: list[Direction] = []
        for name, sample in zip(names, samples, strict=True):
            direction = Drawn(*name)
            direction.by = sample
            drawn.append(direction)
        return drawn

    def names(
        self,
        voices: NDArray[np.int64],
        samples: NDArray[np.int64],
        agent: int = 0,
        importances: NDArray[np.int32] | None = None,
    ) -> NDArray[np.uint32]:
        """The names of directions, (n, 3) uint32 as `kernels.apply` takes them.

        Args:
            voices: (n,) whose each is.
            samples: (n,) their samples.
            agent: whose weights they move.
            importances: of a pool in the round of these samples, where it is drawn by them.

        Raises:
            ValueError: such a pool, and no importances.
        """
        if self.policy.policy == "pool":
            if (importances is not None) != (self.policy.pool_draw == "importance"):
                raise ValueError(f"importances do not go with pool_draw = {self.policy.pool_draw!r}")
            indices = draw(self.key, voices, samples, agent, self.policy.pool_size, importances)
            return pool_names(indices, agent)
        return np.stack([voices, samples, np.full(voices.size, agent)], axis=1).astype(np.uint32)


def pool_names(indices: NDArray[np.int64], agent: int) -> NDArray[np.uint32]:
    """The names of directions of the seed pool, (n, 3) uint32."""
    parts = [np.full(indices.size, SEED_POOL), indices, np.full(indices.size, agent)]
    return np.stack(parts, axis=1).astype(np.uint32)


PRIVATE = Naming()
"""Every node has directions of its own."""


def naming(manifest: Manifest) -> Naming:
    """That of a run."""
    return Naming(manifest.directions, run_key(manifest.run_id))


def spoken(voice: int) -> str:
    """A participant of a commit, in words: the node's number, "everyone", or the group's."""
    if voice == SHARED:
        return "everyone"
    if GROUP_0 <= voice < SHARED:
        return f"group {voice - GROUP_0}"
    return str(voice)
