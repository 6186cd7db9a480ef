"""The tracks of a run: one conductor for each agent, and what concerns all of them. Events in, effects of agents out.

A track is what a run with one agent is. Here is decided only which track a message is for, that a node speaks to all
tracks through one connection, and when all of it is over.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from coordinator.conductor import Conductor
from coordinator.effects import Effect, Note, Send, send
from coordinator.membership import Member
from transport.messages import FromMember, Hello, Refuse

AgentEffect = tuple[int, Effect]
"""The agent whose track wants it, and what it wants. A `Send` of it is to be addressed."""
_UNKNOWN_AGENT: Final = "agent"


class Conductors:
    """All tracks of one run."""

    def __init__(self, conductors: Sequence[Conductor]) -> None:
        """One conductor for each agent, in their order; they share a roster."""
        self._conductors = tuple(conductors)

    def __getitem__(self, agent: int) -> Conductor:
        return self._conductors[agent]

    def __iter__(self) -> Iterator[Conductor]:
        return iter(self._conductors)

    def __len__(self) -> int:
        return len(self._conductors)

    # ---- what the service may ask ---------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether all rounds of all agents are done."""
        return all(conductor.is_over for conductor in self)

    def owe_the_end(self, now: float) -> bool:
        """Whether a run that is over is still to be served for somebody."""
        return any(conductor.owed_the_end(now) for conductor in self)

    def member_of(self, session: bytes) -> Member | None:
        """Whose session this is, in the first track that knows it; None if it is nobody's."""
        members = (conductor.session_member(session) for conductor in self)
        return next((member for member in members if member is not None), None)

    def wake_at(self) -> float | None:
        """When the next tick is due, on the clock of `now`; None if only messages can change anything."""
        return min((at for conductor in self if (at := conductor.wake_at()) is not None), default=None)

    def reason(self, now: float) -> str:
        """What the track that is furthest behind waits for, in words; once all are over, what one of them waits for."""
        if self.is_over:
            agent = min(range(len(self)), key=lambda each: not self[each].owed_the_end(now))
        else:
            agent = min(range(len(self)), key=lambda each: self[each].round)
        reason = self[agent].reason(now)
        return f"agent {agent}, {reason}" if reason and len(self) > 1 else reason

    # ---- events ---------------------------------------------------------------------------------------------------

    def on_message(
        self, session: bytes, key: bytes, agent: int, message: FromMember, now: float
    ) -> list[AgentEffect]:
        """A message about an agent, of a session whose handshake proved `key`."""
        if agent >= len(self):
            return self._unknown(session, agent, message)
        conductor = self[agent]
        others = [(each, other) for each, other in enumerate(self) if each != agent]
        is_hello = isinstance(message, Hello)
        has_manifest = is_hello and any(other.session_member(session) is not None for _, other in others)
        effects = _of(agent, conductor.on_message(session, key, message, now, has_manifest=has_manifest))
        is_member = conductor.session_member(session) is not None
        for each, other in others:
            if is_hello and is_member:
                effects += _of(each, other.on_moved(key, session, now))
            other.heard(session, now)
        return effects

    def on_tick(self, now: float) -> list[AgentEffect]:
        """Time has passed."""
        return [effect for agent, each in enumerate(self) for effect in _of(agent, each.on_tick(now))]

    def on_unsent(self, session: bytes, now: float) -> list[AgentEffect]:
        """A frame could not be queued: the session is gone, or its reader is stuck."""
        return [
            effect for agent, each in enumerate(self) for effect in _of(agent, each.on_unsent(session, now))
        ]

    def on_shut_out(self, key: bytes, refusal: Refuse, now: float) -> list[AgentEffect]:
        """The node with this key may take part no more, in any track."""
        return [
            effect
            for agent, each in enumerate(self)
            for effect in _of(agent, each.on_shut_out(key, refusal, now))
        ]

    def withdraw(self, node: int) -> None:
        """A node is shut out because of what it did in one track: its codes count in no round any more."""
        for each in self:
            each.withdraw(node)

    def settle(self) -> list[AgentEffect]:
        """Bring the coordinator's own replicas up to the last commits; called after the effects are carried out."""
        return [effect for agent, each in enumerate(self) for effect in _of(agent, each.settle())]

    def _unknown(self, session: bytes, agent: int, message: FromMember) -> list[AgentEffect]:
        if not isinstance(message, Hello):
            return []
        last = len(self) - 1
        reason = f"the run has {'one agent, 0' if last == 0 else f'the agents 0 to {last}'}; this node asks for {agent}"
        refusal: Send = send(session, Refuse(_UNKNOWN_AGENT, reason))
        return [(0, Note("refused", None, f"{message.name or 'a node'}: {reason}")), (agent, refusal)]


def _of(agent: int, effects: Iterable[Effect]) -> list[AgentEffect]:
    return [(agent, effect) for effect in effects]
