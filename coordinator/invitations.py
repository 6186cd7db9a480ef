"""Who may have a key admitted, and what becomes of keys that are not: decisions with their reasons. Pure.

Whether an admitted key's `Hello` fits the run is another question (`coordinator.admission`).
"""

import enum
import re
from typing import Final, NamedTuple

from transport.messages import Refuse

MOST_KEYS_OF_A_NODE: Final = 64


class InvitationError(ValueError):
    """What a person asked for cannot be done to keys or invitations."""


class KeyState(enum.StrEnum):
    """What became of a key that was admitted."""

    ADMITTED = "admitted"
    REVOKED = "revoked"
    REPLACED = "replaced"
    """By another key of the same node."""


class Invitation(NamedTuple):
    """What lets new keys in."""

    number: int
    uses_left: int | None
    """None for any number."""
    expires_at: float | None
    """Seconds since the epoch; None for never."""
    agents: frozenset[int] | None = None
    """The agents that keys it lets in may join; None for all."""

    def is_open(self, now: float) -> bool:
        """Whether it would let a key in at this time, in seconds since the epoch."""
        has_expired = self.expires_at is not None and now >= self.expires_at
        has_use = self.uses_left is None or self.uses_left > 0
        return has_use and not has_expired


class Standing(NamedTuple):
    """Who a key is: admitted once, or an invitation's, or nobody's."""

    state: KeyState | None = None
    identity: bytes = b""
    """The key under which its node was first admitted: what the ledger knows it by."""
    agents: frozenset[int] | None = None
    """The agents it may join; None for all."""
    invitation: Invitation | None = None


NOBODY: Final = Standing()
REVOKED: Final = Refuse(
    "revoked", "this node's key was revoked: `zo-coordinator allow` would let it in again"
)


def redemption(
    standing: Standing,
    said_run: bytes,
    run: bytes,
    of_new_key: Standing,
    num_admitted: int,
    capacity: int,
    now: float,
) -> Refuse | None:
    """Why a key is not let in by an invitation; None if it is, or is in already.

    Args:
        standing: of the key that the connection proved.
        said_run: run id of the ticket.
        run: run id of this run.
        of_new_key: the standing of the key to let in.
        num_admitted: keys that may join by now.
        capacity: most nodes that may join this run.
        now: seconds since the epoch.
    """
    invitation = standing.invitation
    if invitation is None:
        return Refuse("invitation", "this connection's key is not that of an invitation")
    if said_run != run:
        return Refuse("run", f"the ticket is for run {said_run.hex()}, this coordinator serves {run.hex()}")
    if of_new_key.state is KeyState.ADMITTED:
        return None
    if of_new_key.state is not None or of_new_key.invitation is not None:
        return outsider(of_new_key)
    if invitation.expires_at is not None and now >= invitation.expires_at:
        return Refuse("invitation", "the ticket's invitation has expired; ask for another")
    if invitation.uses_left is not None and invitation.uses_left <= 0:
        return Refuse("invitation", "the ticket's invitation is used up or was withdrawn; ask for another")
    if num_admitted >= capacity:
        return Refuse("full", f"{num_admitted} keys may join this run, its capacity is {capacity}")
    return None


def rotation(standing: Standing, of_new_key: Standing, num_keys: int) -> Refuse | None:
    """Why a node may not come under a new key from now on; None if it may, or does already.

    Args:
        standing: of the key that the connection proved.
        of_new_key: the standing of the key to come under.
        num_keys: that the node has had.
    """
    if standing.state is not KeyState.ADMITTED:
        return outsider(standing)
    is_own = of_new_key.state is KeyState.ADMITTED and of_new_key.identity == standing.identity
    if is_own:
        return None
    if num_keys >= MOST_KEYS_OF_A_NODE:
        return Refuse("key", f"this node has had {num_keys} keys, which is the most that a run remembers")
    if of_new_key == NOBODY:
        return None
    return Refuse("key", "the new key has been used before; make another")


def admittance(standing: Standing, agent: int) -> Refuse | None:
    """Why a key may not take part in an agent's track; None if it may."""
    if standing.state is not KeyState.ADMITTED:
        return outsider(standing)
    if standing.agents is not None and agent not in standing.agents:
        allowed = ", ".join(map(str, sorted(standing.agents)))
        return Refuse("agent", f"this node's key may train the agents {allowed}, not {agent}")
    return None


def outsider(standing: Standing) -> Refuse:
    """What a key is told that may not join."""
    if standing.state is KeyState.REVOKED:
        return REVOKED
    if standing.state is KeyState.REPLACED:
        return Refuse("revoked", "this node has another key now: this one was rotated out")
    return Refuse("invitation", "the key of an invitation may join only by its own node's key")


def parse_duration(text: str) -> float:
    """A duration in seconds, from 90s, 30m, 12h, 2d or 1w.

    Raises:
        InvitationError: not such a duration; the message says what would be.
    """
    match = re.fullmatch(r"(\d+)([smhdw])", text.strip())
    if match is None or int(match.group(1)) == 0:
        raise InvitationError(f"a duration looks like 90s, 30m, 12h, 2d or 1w, got {text!r}")
    return (
        int(match.group(1)) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}[match.group(2)]
    )
