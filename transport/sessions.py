"""The sessions of a node: one for each agent that it trains, over one connection. Events in, effects of agents out.

Here is decided only which session a message is for, who greets first, whose turn it is to be probed, and when all is
over. The first greeting of a process is for one agent alone: the manifest comes with its answer, and says which others
there are.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from transport.catchup import Download
from transport.exits import Exit
from transport.messages import FromCoordinator
from transport.session import Effect, End, Session, Stage
from zo.manifest import Manifest
from zo.replica import Replica

AgentEffect = tuple[int, Effect]
"""The agent whose session wants it, and what it wants. A `Transmit` of it is to be addressed."""
_IN_ORDER: Final = (
    Stage.CONNECTING,
    Stage.GREETING,
    Stage.FETCHING,
    Stage.FOLLOWING,
    Stage.REPORTED,
    Stage.ENDED,
)


class AssignmentError(ValueError):
    """Agents that this run does not have, or does not let a node choose; the message says what would be right."""


def assigned(manifest: Manifest, named: Sequence[int] | None) -> tuple[int, ...]:
    """The agents that a node trains, ascending.

    Args:
        manifest: of the run.
        named: those that the node named; None if it named none.

    Raises:
        AssignmentError: the run has all nodes train all agents and some were named, or it has each node name its own
            and none were, or one is named that does not exist.
    """
    agents = manifest.agents
    have = "one agent, 0" if agents.count == 1 else f"{agents.count} agents, 0 to {agents.count - 1}"
    if named is None:
        if agents.assignment == "by-node":
            raise AssignmentError(
                f"this run has {have}, and every node names those that it trains: join with --agents, as in --agents 0"
            )
        return tuple(range(agents.count))
    if agents.assignment == "all":
        raise AssignmentError(
            f"in this run every node trains every agent (it has {have}): join without --agents"
        )
    unknown = sorted(set(named) - set(range(agents.count)))
    if unknown:
        raise AssignmentError(f"this run has {have}, got --agents {','.join(map(str, unknown))}")
    return tuple(sorted(set(named)))


class Sessions:
    """A node's side of all tracks that it takes part in.

    Attributes:
        by_agent: the sessions there are; before the manifest is known, one.
    """

    def __init__(self, named: Sequence[int] | None, make: Callable[[int], Session]) -> None:
        """Start with the lowest agent.

        Args:
            named: the agents that this node was told to train; None for those that the manifest gives it.
            make: the session for an agent, from what was saved.
        """
        self._named = named
        self._make = make
        first = 0 if named is None else min(named)
        self.by_agent = {first: make(first)}
        self._is_linked = False
        self._probed_last = -1
        self._reasons: dict[int, str] = {}
        """Why the sessions ended that are done."""

    # ---- events ---------------------------------------------------------------------------------------------------

    def on_link_up(self) -> list[AgentEffect]:
        """A connection to the ticket's coordinator stands."""
        self._is_linked = True
        return [effect for agent, each in self._each() for effect in self._of(agent, each.on_link_up())]

    def on_link_down(self) -> None:
        """The connection is gone; the socket tries again by itself."""
        self._is_linked = False
        for _, session in self._each():
            session.on_link_down()

    def check(self, manifest: Manifest) -> tuple[int, ...]:
        """The agents that this node trains in the run. Raises AssignmentError, as `assigned`."""
        return assigned(manifest, self._named)

    def on_manifest(self, manifest: Manifest) -> list[AgentEffect]:
        """The manifest is known, and fits: the sessions of the other agents begin."""
        effects: list[AgentEffect] = []
        for agent in self.check(manifest):
            if agent in self.by_agent:
                continue
            session = self.by_agent[agent] = self._make(agent)
            session.know(manifest)
            if self._is_linked:
                effects += self._of(agent, session.on_link_up())
        return effects

    def on_message(self, agent: int, message: FromCoordinator, now: float) -> list[AgentEffect]:
        """A message of the coordinator about an agent; one about an agent that this node does not train is nothing."""
        session = self.by_agent.get(agent)
        return [] if session is None else self._of(agent, session.on_message(message, now))

    def opened(self, agent: int, replica: Replica, now: float) -> list[AgentEffect]:
        """The replica that `Open` or `StartOver` of this agent asked for."""
        return self._of(agent, self.by_agent[agent].opened(replica, now))

    def on_probed(
        self, agent: int, round: int, codes: NDArray[np.int8], loss: float, now: float
    ) -> list[AgentEffect]:
        """A probe that `next_probe` asked for is done; arguments as of `Session.on_probed`."""
        self._probed_last = agent
        return self._of(agent, self.by_agent[agent].on_probed(round, codes, loss, now))

    def on_audited(self, agent: int, round: int, losses: tuple[float, float]) -> list[AgentEffect]:
        """An audit that `next_audit` asked for is done; arguments as of `Session.on_audited`."""
        return self._of(agent, self.by_agent[agent].on_audited(round, losses))

    def on_tick(self, now: float) -> list[AgentEffect]:
        """Time has passed."""
        return [effect for agent, each in self._each() for effect in self._of(agent, each.on_tick(now))]

    def leave(self) -> list[AgentEffect]:
        """The person at the node wants to stop, or it cannot go on."""
        return [effect for agent, each in self._each() for effect in self._of(agent, each.leave())]

    # ---- what the service may ask ---------------------------------------------------------------------------------

    def next_probe(self) -> tuple[int, int, int] | None:
        """(agent, round, exponent) to probe now: those that are ready take turns. None while none is.

        So while one agent's report and commit travel, the next is probed.
        """
        ready = [(agent, wanted) for agent, each in self._each() if (wanted := each.next_probe()) is not None]
        if not ready:
            return None
        agent, (round, exponent) = min(ready, key=lambda each: (each[0] <= self._probed_last, each[0]))
        return agent, round, exponent

    def next_audit(self) -> tuple[int, int, int] | None:
        """(agent, round, sample) of a public audit to answer now; None if none is asked for."""
        return next(
            ((agent, *wanted) for agent, each in self._each() if (wanted := each.next_audit()) is not None),
            None,
        )

    @property
    def stage(self) -> Stage:
        """Of the session that is least far."""
        return min((each.stage for _, each in self._each()), key=_IN_ORDER.index)

    @property
    def round(self) -> int:
        """Of the session that is least far."""
        return min(each.replica.round if each.replica else 0 for _, each in self._each())

    @property
    def behind(self) -> int:
        """Commits that are known to be missing here, of all agents."""
        return sum(each.behind for _, each in self._each())

    @property
    def downloads(self) -> list[Download]:
        """The snapshots that are being fetched."""
        return [
            each.download
            for _, each in self._each()
            if each.stage is Stage.FETCHING and each.download is not None
        ]

    @property
    def node(self) -> int | None:
        """The node's number, the same in all sessions; None before first contact."""
        return next((each.node for _, each in self._each() if each.node is not None), None)

    @property
    def loss(self) -> float | None:
        """The mean of the recent mean losses of all agents, in nats."""
        losses = [each.loss for _, each in self._each() if each.loss is not None]
        return sum(losses) / len(losses) if losses else None

    def _each(self) -> list[tuple[int, Session]]:
        return sorted(self.by_agent.items())

    def _of(self, agent: int, effects: Iterable[Effect]) -> list[AgentEffect]:
        """The effects of one session; that its run is done is an end only once the others are done as well."""
        found: list[AgentEffect] = []
        for effect in effects:
            if isinstance(effect, End) and effect.code is Exit.OK:
                self._reasons[agent] = effect.reason
                if all(each.stage is Stage.ENDED for each in self.by_agent.values()):
                    found.append((agent, End(Exit.OK, self._reason())))
            else:
                found.append((agent, effect))
        return found

    def _reason(self) -> str:
        if len(self.by_agent) == 1:
            return next(iter(self._reasons.values()))
        return "\n".join(f"agent {agent}: {reason}" for agent, reason in sorted(self._reasons.items()))
