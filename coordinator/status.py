"""What a run tells about itself: the type behind `status --json`, stored in the ledger once a second."""

from typing import Final

import msgspec

from coordinator.ledger import Ledger
from coordinator.membership import Presence
from zo.manifest import Manifest

_ALERTS_SHOWN: Final = 6
_MOST_PRESENT: Final = [
    each.value for each in (Presence.LIVE, Presence.JOINING, Presence.SILENT, Presence.GONE)
]


class MemberStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One node."""

    node: int
    name: str
    key: str
    """Its public key, hexadecimal."""
    estimator: str
    """How it measures slopes."""
    presence: str
    round: int
    """Commits it is known to have applied in this session."""
    digest_round: int | None
    digest: str | None
    """The last digest it reported, and of which round."""
    loss: float | None
    """The recent mean loss it reported, if the manifest has nodes share it."""
    latency_s: float | None
    quarantined: bool
    """Whether it is refused until `zo-coordinator release`."""
    divergences: int
    """How often its digest differed from the ledger's."""
    capped_rounds: int = 0
    """Rounds since the coordinator started in which its codes were longer than its share, and scaled down."""
    messages_up: int
    payload_bytes_up: int
    zmtp_bytes_up: int
    messages_down: int
    payload_bytes_down: int
    zmtp_bytes_down: int


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One agent: what `Status` says of a run with one agent alone."""

    agent: int
    round: int
    """Commits in its chain."""
    digest: str
    """Digest of its weights after `digest_round` commits."""
    digest_round: int
    live: int
    members: list[MemberStatus]
    """Those who ever trained it, with what they sent and received about it."""
    loss: float | None
    rounds_per_s: float


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """One run. "Up" is from nodes to the coordinator. Counts go on over restarts of the coordinator.

    With several agents, `agents` tells of each. The fields beside it then say: `round` and `rounds_per_s` how far the
    agent is that is furthest behind, `digest` and `digest_round` what agent 0 has, `live` how many nodes are live for
    any agent, `loss` the mean over the agents, `members` each node once, with the bytes about all agents.
    """

    run: str
    name: str
    serving: bool
    """Whether a coordinator said so at `updated_at`."""
    round: int
    """Commits in the ledger."""
    rounds: int
    digest: str
    """Digest of the weights after `digest_round` commits."""
    digest_round: int
    live: int
    members: list[MemberStatus]
    payload_bytes_up: int
    payload_bytes_down: int
    zmtp_bytes_up: int
    zmtp_bytes_down: int
    loss: float | None
    """Mean of the losses that members reported last."""
    rounds_per_s: float
    malformed_frames: int
    updated_at: float
    """Seconds since the epoch."""
    alerts: list[str] = []
    """The newest events about nodes whose weights differed or whose codes were out of line: which, and when."""
    agents: list[AgentStatus] = []
    """One for each agent, in order; empty if there is only one, of which the fields above say all."""

    def of_agent(self, agent: int) -> list[MemberStatus]:
        """The members of an agent's track."""
        return self.agents[agent].members if self.agents else self.members

    def loss_of(self, agent: int) -> float | None:
        """The mean of the losses that an agent's members reported last."""
        return self.agents[agent].loss if self.agents else self.loss


def status_of(
    manifest: Manifest,
    agents: list[AgentStatus],
    *,
    serving: bool,
    malformed_frames: int,
    updated_at: float,
) -> Status:
    """The status of a run from that of its agents."""
    members = agents[0].members if len(agents) == 1 else _merged(agents)
    behind = min(agents, key=lambda each: each.round)
    losses = [each.loss for each in agents if each.loss is not None]
    return Status(
        run=manifest.run_id.hex(),
        name=manifest.run.name,
        serving=serving,
        round=behind.round,
        rounds=manifest.run.rounds,
        digest=agents[0].digest,
        digest_round=agents[0].digest_round,
        live=sum(member.presence == Presence.LIVE.value for member in members),
        members=members,
        payload_bytes_up=sum(m.payload_bytes_up for m in members),
        payload_bytes_down=sum(m.payload_bytes_down for m in members),
        zmtp_bytes_up=sum(m.zmtp_bytes_up for m in members),
        zmtp_bytes_down=sum(m.zmtp_bytes_down for m in members),
        loss=sum(losses) / len(losses) if losses else None,
        rounds_per_s=behind.rounds_per_s,
        malformed_frames=malformed_frames,
        updated_at=updated_at,
        agents=agents if len(agents) > 1 else [],
    )


def _merged(agents: list[AgentStatus]) -> list[MemberStatus]:
    """Each node once: what it is to any agent, and what it sent and received about all of them."""
    parts_by_node: dict[int, list[MemberStatus]] = {}
    for agent in agents:
        for member in agent.members:
            parts_by_node.setdefault(member.node, []).append(member)
    return [_merged_member(parts) for _, parts in sorted(parts_by_node.items())]


def _merged_member(parts: list[MemberStatus]) -> MemberStatus:
    losses = [part.loss for part in parts if part.loss is not None]
    here = [part for part in parts if part.presence != Presence.GONE.value] or parts
    sums = {
        name: sum(getattr(part, name) for part in parts)
        for name in MemberStatus.__struct_fields__
        if name.endswith(("_up", "_down"))
    }
    return msgspec.structs.replace(
        parts[0],
        presence=min((part.presence for part in parts), key=_MOST_PRESENT.index),
        round=min(part.round for part in here),
        digest_round=None,
        digest=None,
        loss=sum(losses) / len(losses) if losses else None,
        latency_s=max((part.latency_s for part in parts if part.latency_s is not None), default=None),
        quarantined=any(part.quarantined for part in parts),
        divergences=sum(part.divergences for part in parts),
        capped_rounds=sum(part.capped_rounds for part in parts),
        **sums,
    )


def stored_status(ledger: Ledger) -> Status | None:
    """The newest status that a coordinator wrote; None if none did, or one of another version in another form."""
    stored = ledger.status()
    try:
        return None if stored is None else msgspec.json.decode(stored, type=Status)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def read_status(manifest: Manifest, ledger: Ledger) -> Status:
    """The newest status in a ledger; for a run that was never served, what its files say.

    Raises:
        LedgerError: the ledger is damaged.
    """
    several = manifest.agents.count > 1
    alerts = [
        f"{f'agent {event.agent}, ' if several else ''}round {event.round}: {event.text}"
        for event in ledger.alerts(_ALERTS_SHOWN)
    ]
    tracks = [ledger.track(agent) for agent in range(manifest.agents.count)]
    status = stored_status(ledger)
    if status is None:
        agents = [_unserved(track) for track in tracks]
        status = status_of(manifest, agents, serving=False, malformed_frames=0, updated_at=0.0)
    rounds = [track.num_commits() for track in tracks]
    shut_out = {
        each.node for each in ledger.nodes() if each.is_quarantined
    }  # a release changes the ledger alone
    agents = [
        msgspec.structs.replace(each, round=round, members=_as_is(each.members, shut_out))
        for each, round in zip(status.agents, rounds, strict=False)
    ]
    members = _as_is(status.members, shut_out)
    return msgspec.structs.replace(status, round=min(rounds), members=members, agents=agents, alerts=alerts)


def _as_is(members: list[MemberStatus], shut_out: set[int]) -> list[MemberStatus]:
    return [msgspec.structs.replace(each, quarantined=each.node in shut_out) for each in members]


def _unserved(ledger: Ledger) -> AgentStatus:
    checkpoint = ledger.last_checkpoint()
    return AgentStatus(
        agent=ledger.agent,
        round=ledger.num_commits(),
        digest=checkpoint.digest.hex() if checkpoint else "",
        digest_round=checkpoint.round if checkpoint else 0,
        live=0,
        members=[],
        loss=None,
        rounds_per_s=0.0,
    )
