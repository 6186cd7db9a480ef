"""Members of a track: who is here, how far each has come, and how far ahead of what it acknowledged it may be sent.

The transition table is the whole of the presence logic; an event that has no arrow from a state changes nothing.
"""

import enum
from dataclasses import dataclass, field
from typing import Final

from coordinator.pace import Latency
from transport.messages import REPORT_ROUND_MODULUS
from transport.meter import Count

FLOW_WINDOW: Final = 128
"""Commits a node may be sent beyond what it acknowledged. Nodes acknowledge at least every 64 rounds; and it must stay
below 255, so that the round of a report modulo 256 names one round, also where nodes measure one round ahead."""
QUIET_AFTER_S: Final = 150.0
"""Two and a half of the longest times between two messages of a node that waits for the others."""
LOST_AFTER_S: Final = 900.0
"""Long enough to load a large base from a slow disk. Who speaks again is asked who it is, and is here again."""
FAREWELL_S: Final = 45.0
"""How long a run that is over waits for who went without a word: several attempts to reconnect, 5 s apart at most, and
longer than `GREET_S`, after which a node that waits in vain says `Hello` again."""


class Presence(enum.Enum):
    """Where a member stands."""

    JOINING = "joining"
    LIVE = "live"
    SILENT = "silent"
    GONE = "gone"


class Event(enum.Enum):
    """What can happen to a member."""

    HELLO = "said hello: it may still have a model to load and commits to catch up on"
    REPORTED = "reported, in time or late"
    HEARD = "any message"
    MISSED = "let a deadline pass"
    QUIET = "not heard of for long"
    LOST = "the connection is gone, or nobody reads at its other end"
    LEFT = "said that it goes, or was told to go"


TRANSITIONS: Final = {
    (Presence.GONE, Event.HELLO): Presence.JOINING,
    (Presence.JOINING, Event.REPORTED): Presence.LIVE,
    (Presence.JOINING, Event.LOST): Presence.GONE,
    (Presence.JOINING, Event.LEFT): Presence.GONE,
    (Presence.LIVE, Event.HELLO): Presence.JOINING,
    (Presence.LIVE, Event.MISSED): Presence.SILENT,
    (Presence.LIVE, Event.QUIET): Presence.SILENT,
    (Presence.LIVE, Event.LOST): Presence.GONE,
    (Presence.LIVE, Event.LEFT): Presence.GONE,
    (Presence.SILENT, Event.HELLO): Presence.JOINING,
    (Presence.SILENT, Event.HEARD): Presence.LIVE,
    (Presence.SILENT, Event.LOST): Presence.GONE,
    (Presence.SILENT, Event.LEFT): Presence.GONE,
}


def transition(presence: Presence, event: Event) -> Presence:
    """Where a member stands after an event."""
    return TRANSITIONS.get((presence, event), presence)


@dataclass(kw_only=True)
class Member:
    """A node's part in one track of the run: everyone who has been admitted to it at least once."""

    node: int
    key: bytes
    """(32,) bytes: the CURVE public key that is this node."""
    name: str
    estimator: str = ""
    """What it said that it measures slopes by; empty: as the manifest says, or not heard of yet."""
    presence: Presence = Presence.GONE
    session: bytes | None = None
    """Routing id of its connection; None while it is gone."""
    acknowledged: int = 0
    """Commits it is known to have applied."""
    cursor: int = 0
    """Commits it has been sent: acknowledged ≤ cursor ≤ acknowledged + FLOW_WINDOW."""
    heard_at: float = 0.0
    """When its last message came, in seconds on the conductor's clock."""
    latency: Latency | None = None
    digest_round: int | None = None
    digest: bytes | None = None
    """The last digest it reported, and of which round."""
    loss: float | None = None
    num_divergences: int = 0
    num_capped: int = 0
    """Rounds since the coordinator started in which its codes were longer than its share."""
    up: Count = field(default_factory=Count)
    down: Count = field(default_factory=Count)
    is_choosing: bool = False
    """Whether it has not said yet from where on it wants the ledger: it was made an offer, or is to start over."""
    has_offer: bool = False
    """Whether it is an offer that it chooses about."""
    must_start_over: bool = False
    """Whether it differed, and has not come back from round 0 since."""
    owes_trace: bool = False
    """Whether it differed, and has not sent the digests yet from which the first wrong round is found."""
    is_finished: bool = False
    """Whether it has been told that the run is over."""
    has_left: bool = False
    """Whether it said that it goes, or was told to, and has not come back since."""

    def note(self, event: Event) -> None:
        """Move along the transition table."""
        self.presence = transition(self.presence, event)
        if event in (Event.HELLO, Event.LEFT):
            self.has_left = event is Event.LEFT
        if self.presence is Presence.GONE:
            self.session = None

    def silence(self, now: float) -> Event | None:
        """What it means that nothing was heard since `heard_at`: `LOST`, `QUIET`, or nothing yet.

        A machine that is cut off without a word has no other end. Who is slow is given twice, or eight times, as long
        as it takes otherwise.
        """
        quiet_s = now - self.heard_at
        if quiet_s >= max(LOST_AFTER_S, 8 * self._usual_s):
            return Event.LOST
        return Event.QUIET if quiet_s >= max(QUIET_AFTER_S, 2 * self._usual_s) else None

    def is_owed_the_end(self, now: float) -> bool:
        """Whether a run that is over is served on for this member: without it, it would wait for the end for ever.

        Who is here may be loading, catching up, or in the midst of a probe: then it has not read yet what it was sent,
        and will not if the connection ends before. Who went without a word, or was here when the coordinator was
        killed, is on its way back, or was killed.
        """
        if self.has_left:
            return False
        if self.presence is Presence.GONE:
            return now < self.heard_at + max(FAREWELL_S, 2 * self._usual_s)
        return self.silence(now) is None

    @property
    def _usual_s(self) -> float:
        """How long it may take to report, in seconds; 0 if that is not known."""
        return 0.0 if self.latency is None else self.latency.timeout_s

    def room(self) -> int:
        """How many more commits it may be sent now."""
        return max(0, self.acknowledged + FLOW_WINDOW - self.cursor)

    def acknowledge(self, round: int) -> None:
        """Take note that it has applied `round` commits; more than it was sent is not believed."""
        self.acknowledged = max(self.acknowledged, min(round, self.cursor))

    def resolve(self, round_modulo: int, ahead: int = 0) -> int | None:
        """The round a report is for: the one in acknowledged..cursor + ahead that fits modulo 256; None if none does.

        Args:
            round_modulo: as the report has it.
            ahead: rounds that nodes measure ahead of their commits.
        """
        round = self.acknowledged + (round_modulo - self.acknowledged) % REPORT_ROUND_MODULUS
        return round if round <= self.cursor + ahead else None
