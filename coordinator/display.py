"""How a run looks in a terminal: one live line for `serve`, a table for `status`."""

import time
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from coordinator.simulation import SimulationResult
from coordinator.status import MemberStatus, Status
from transport.meter import si_bytes

SILENT_S: Final = 10.0
"""A coordinator renews its status every second; one that has not for so long was killed, or is stuck."""


def duration(seconds: float) -> str:
    """A duration for people: 42 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def pace(rounds_per_s: float) -> str:
    """A speed for people: 2.5 rounds/s, 40 s a round."""
    return f"{rounds_per_s:.1f} rounds/s" if rounds_per_s >= 0.5 else f"{duration(1 / rounds_per_s)} a round"


def status_line(status: Status, reason: str) -> Text:
    """The one line that `serve` keeps up to date."""
    several = [f"{len(status.agents)} agents"] if status.agents else []
    parts = [*several, f"round {status.round}/{status.rounds}", f"{status.live} live"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    parts.append(f"up {si_bytes(status.payload_bytes_up)} down {si_bytes(status.payload_bytes_down)}")
    left = max(0, status.rounds - status.round)  # an entry that takes back the last round is one more
    if left and not status.live:
        parts.append("waiting for nodes")
    elif left and status.rounds_per_s > 0:
        parts.append(f"{pace(status.rounds_per_s)}, {duration(left / status.rounds_per_s)} left")
    elif reason:
        parts.append(reason.partition(": ")[2])
    return Text(" · ".join(parts), overflow="ellipsis", no_wrap=True)


def status_view(status: Status) -> RenderableType:
    """What `status` shows: the run, its agents if there are several, then one row for each node."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("node", "name", "estimator", "presence", "round", "digest", "loss", "up", "down"):
        table.add_column(
            title, justify="right" if title in ("node", "round", "loss", "up", "down") else "left"
        )
    for member in status.members:
        table.add_row(*_row(member))
    age = max(0.0, time.time() - status.updated_at)
    if not status.serving:
        serving = "not served"
    elif age < SILENT_S:
        serving = "being served"
    else:
        serving = f"nothing heard of its coordinator for {duration(age)}"
    head = Text(f"{status.name}  run {status.run}  ({serving})\n", style="bold")
    head.append(f"round {status.round}/{status.rounds}", style="not bold")
    if status.digest and not status.agents:
        head.append(f"  digest {status.digest} at round {status.digest_round}", style="not bold")
    if status.loss is not None:
        head.append(f"  loss {status.loss:.3f}", style="not bold")
    payload = f"{si_bytes(status.payload_bytes_up)} up, {si_bytes(status.payload_bytes_down)} down"
    sockets = f"{si_bytes(status.zmtp_bytes_up)} up, {si_bytes(status.zmtp_bytes_down)} down"
    head.append(f"\npayload {payload}; with ZMTP and CURVE {sockets}\n", style="not bold")
    alerts = [Text("")] if status.alerts else []
    for alert in status.alerts:
        line = plain(alert)
        line.stylize("yellow")
        alerts.append(line)
    agents: list[RenderableType] = [_agent_table(status), Text("")] if status.agents else []
    return Group(head, *agents, table if status.members else Text("nobody has joined yet"), *alerts)


def _agent_table(status: Status) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("agent", "round", "live", "loss", "digest"):
        table.add_column(title, justify="left" if title == "digest" else "right")
    for each in status.agents:
        loss = "" if each.loss is None else f"{each.loss:.3f}"
        digest = f"{each.digest} @{each.digest_round}" if each.digest else ""
        table.add_row(str(each.agent), f"{each.round}/{status.rounds}", str(each.live), loss, digest)
    return table


def plain(text: str) -> Text:
    """What a node calls itself, as it is: no markup of ours, and nothing that a terminal would obey."""
    return Text("".join(letter if letter.isprintable() else "\ufffd" for letter in text))


def _row(member: MemberStatus) -> tuple[str | Text, ...]:
    digest = "" if member.digest is None else f"{member.digest[:12]}… @{member.digest_round}"
    loss = "" if member.loss is None else f"{member.loss:.3f}"
    up, down = si_bytes(member.payload_bytes_up), si_bytes(member.payload_bytes_down)
    presence = "quarantined" if member.quarantined else member.presence
    return (
        str(member.node),
        plain(member.name),
        member.estimator,
        presence,
        str(member.round),
        digest,
        loss,
        up,
        down,
    )


def simulation_view(result: SimulationResult, seconds: float) -> RenderableType:
    """What `simulate` shows: what happened, and what held."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column()
    rows: list[tuple[object, str]] = [
        (
            f"{result.rounds:,}",
            f"rounds{f' of each of {result.agents} agents' if result.agents > 1 else ''} in "
            f"{duration(result.virtual_s)} of virtual time, {duration(seconds)} of real",
        ),
        (
            f"{result.joins:,}",
            f"joins, {result.leaves:,} departures, {result.coordinator_kills} coordinator kills",
        ),
        (f"{result.frames_lost:,}", "frames lost"),
        (f"{result.leaps:,}", "times a node went on from a snapshot instead of replaying"),
        (
            f"{result.reports_counted:,}",
            f"reports counted, none twice; {result.reports_late:,} of them a round late",
        ),
        (f"{result.median_round_s:.1f} s", f"median round; the longest took {result.longest_round_s:.1f} s"),
        (
            f"{result.nodes_at_the_end:,}",
            "nodes were there at the end: all of them learned of it, and are equal",
        ),
    ]
    if result.round_after_mass_loss_s is not None:
        rows.append(
            (
                f"{result.round_after_mass_loss_s:.1f} s",
                f"for the round in which most nodes vanished; its deadline was {result.deadline_at_mass_loss_s:.1f} s",
            )
        )
    for number, text in rows:
        table.add_row(str(number), text)
    return Group(table, Text(f"digest {result.digest}   seed {result.seed}"))


def replay_progress(console: Console) -> Progress:
    """A progress bar with an ETA for the replay of commits."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
