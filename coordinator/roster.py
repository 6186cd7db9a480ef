"""The roster: which number each node of a run has, and who is shut out. What all its tracks share of their members.

A node is its key. It has one number in all tracks, since the number names its directions; whoever is in quarantine is
refused by all of them.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Enrolment(NamedTuple):
    """A node that was admitted to a track."""

    node: int
    key: bytes
    name: str
    is_quarantined: bool = False
    has_left: bool = False
    """Whether the last that was noted of it there is that it left."""


class Roster:
    """Everyone ever admitted to a run, to whatever track."""

    def __init__(self, enrolled: Iterable[Enrolment] = ()) -> None:
        self._node_by_key: dict[bytes, int] = {}
        self._quarantined: set[int] = set()
        for each in enrolled:
            self._node_by_key[each.key] = each.node
            if each.is_quarantined:
                self._quarantined.add(each.node)
        self._next_node = max(self._node_by_key.values(), default=-1) + 1

    def __len__(self) -> int:
        return len(self._node_by_key)

    def node_of(self, key: bytes) -> int | None:
        """The number of the node with this key; None if it was never admitted."""
        return self._node_by_key.get(key)

    def admit(self, key: bytes) -> int:
        """The number of a node that is let in: the one that it has, or the next."""
        node = self._node_by_key.get(key)
        if node is None:
            node = self._node_by_key[key] = self._next_node
            self._next_node += 1
        return node

    def quarantine(self, node: int) -> None:
        """Shut a node out."""
        self._quarantined.add(node)

    def is_quarantined(self, node: int | None) -> bool:
        """Whether a node is refused until somebody releases it."""
        return node in self._quarantined
