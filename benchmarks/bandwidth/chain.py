"""What the light nodes of one process would all work out alike, worked out once: messages, commits, weights.

Equal chains have equal weights (law 1), so nodes at the same point of the ledger share them. What a node decides from
them, and what goes over its socket, is its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks.light_node import Onlooker
from transport.brevity import expanded
from transport.messages import Brief, FromCoordinator, decode_from_coordinator
from zo.commit import Commit, genesis
from zo.manifest import Manifest
from zo.replica import ChainError, Replica

_REMEMBERED: Final = 64
"""Commits. A node that is further behind cannot follow."""


class Chain:
    """One run's ledger, as far as any node of this process has seen it."""

    def __init__(self, base: Path) -> None:
        """Know nothing.

        Args:
            base: directory of the base, for the shapes of the weights.
        """
        self._base = base
        self._truth: Replica | None = None
        self._decoded: tuple[bytes, FromCoordinator] | None = None
        self._brief: tuple[Brief, Commit, Commit] | None = None
        self._after: dict[bytes, tuple[Commit, bytes]] = {}
        """Head -> the commit that follows, the head after it."""
        self._digest_by_head: dict[bytes, bytes] = {}

    def decoded(self, frame: bytes) -> FromCoordinator:
        """The message in a frame; the same object for equal frames in a row. Raises WireError."""
        if self._decoded is None or self._decoded[0] != frame:
            self._decoded = frame, decode_from_coordinator(frame)
        return self._decoded[1]

    def expanded(self, brief: Brief, before: Commit) -> Brief | Commit:
        """The commit that a `Brief` is after the one before it, or itself if it does not follow."""
        if self._brief is None or self._brief[0] is not brief or self._brief[1] is not before:
            try:
                self._brief = brief, before, expanded(brief, before)
            except ValueError:
                return brief
        return self._brief[2]

    def replica(self, manifest: Manifest) -> SharedReplica:
        """A node's replica of round 0."""
        if self._truth is None:
            weights = Onlooker(manifest, self._base).initial_weights()
            self._truth = Replica(manifest, weights)
            self._digest_by_head[self._truth.head] = self._truth.digest()
        return SharedReplica(self, self._truth, genesis(manifest.run_id, 0))

    def head_after(self, commit: Commit) -> bytes:
        """The head once a commit is applied, which the first node that has it does for all.

        Raises:
            ChainError, WeightsOverflow: as `Replica.apply`; or others are too far ahead.
        """
        assert self._truth is not None
        known = self._after.get(commit.previous)
        if known is None:
            self._truth.apply(commit)
            known = self._after[commit.previous] = commit, self._truth.head
            self._digest_by_head[self._truth.head] = self._truth.digest()
            for memory in (self._after, self._digest_by_head):
                if len(memory) > _REMEMBERED:
                    del memory[next(iter(memory))]
        if known[0] is not commit and known[0] != commit:
            raise ChainError(f"two commits of round {commit.round} follow {commit.previous.hex()}")
        return known[1]

    def digest(self, head: bytes) -> bytes:
        """Of the weights at a head. Raises ChainError if it is too long ago."""
        try:
            return self._digest_by_head[head]
        except KeyError:
            raise ChainError(f"{head.hex()} is further back than {_REMEMBERED} commits") from None


class SharedReplica(Replica):
    """A replica that looks the next state up instead of computing it. Its weights are those of whoever is furthest."""

    def __init__(self, chain: Chain, truth: Replica, head: bytes) -> None:
        self._chain = chain
        self.weights, self.pool, self.agent = truth.weights, truth.pool, truth.agent
        self.round, self.head = 0, head

    def apply(self, entry: object, frame: bytes | None = None, history: object = None) -> None:
        """Step along the chain. Raises ChainError, WeightsOverflow."""
        if not isinstance(entry, Commit):
            raise ChainError("light nodes that share their weights cannot take rounds back")
        self._check_follows(entry)
        self.head = self._chain.head_after(entry)
        self.round += 1

    def digest(self) -> bytes:
        """What a real replica at this point of the chain has."""
        return self._chain.digest(self.head)
