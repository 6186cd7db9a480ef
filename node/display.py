"""How a node looks in a terminal: one live line."""

from rich.text import Text

from node.service import View
from transport.meter import si_bytes
from transport.session import Stage


def view_line(view: View) -> Text:
    """The line that `join` keeps up to date."""
    if view.notice:
        return _one_line([f"round {view.round}/{view.rounds}", view.notice] if view.rounds else [view.notice])
    if view.stage in (Stage.CONNECTING, Stage.GREETING):
        return Text("connecting …")
    parts = [f"node {view.node}", f"round {view.round}/{view.rounds}"]
    if view.agents > 1:
        parts.insert(1, f"{view.agents} agents")
    if view.to_fetch_bytes:
        share = view.fetched_bytes / view.to_fetch_bytes
        parts.append(f"fetching a snapshot, {share:.0%} of {si_bytes(view.to_fetch_bytes)}")
    elif view.behind:
        parts.append(f"catching up, {view.behind:,} behind")
    if view.catch_up_left_s is not None:
        parts.append(f"{view.catch_up_left_s:.0f} s left")
    if view.loss is not None:
        parts.append(f"loss {view.loss:.3f}")
    if view.held_out is not None:
        parts.append(f"held out {view.held_out:.3f}")
    if view.num_no_votes:  # early in the line: a narrow terminal must not cut it off
        parts.append(f"{view.num_no_votes} without a finite loss")
    if view.privacy:
        parts.append(view.privacy)
    if view.members:
        parts.append(f"{view.members} member{'s' * (view.members != 1)}")
    up, down = view.meter.total_up.payload_bytes, view.meter.total_down.payload_bytes
    parts.append(f"up {si_bytes(up)} down {si_bytes(down)}")
    if view.num_directions:
        parts.append(f"{up / view.num_directions:.1f} B/direction")
    if view.lag_s is not None:
        parts.append(f"lag {view.lag_s * 1000:.0f} ms")
    if view.num_late:
        parts.append(f"{view.num_late} late")
    return _one_line(parts)


def _one_line(parts: list[str]) -> Text:
    return Text(" · ".join(parts), overflow="ellipsis", no_wrap=True)


def summary(view: View) -> str:
    """What this node cost, for the end of `join`."""
    up, down = view.meter.total_up, view.meter.total_down
    lines = [
        f"{'':10}{'up':>10}{'down':>10}",
        f"{'payload':10}{si_bytes(up.payload_bytes):>10}{si_bytes(down.payload_bytes):>10}",
        f"{'ZMTP':10}{si_bytes(up.zmtp_bytes):>10}{si_bytes(down.zmtp_bytes):>10}   with CURVE",
    ]
    if view.socket is not None:
        count = view.socket
        sent, received = si_bytes(count.bytes_sent), si_bytes(count.bytes_received)
        wire_up, wire_down = si_bytes(count.wire_bytes_sent), si_bytes(count.wire_bytes_received)
        lines.append(f"{'socket':10}{sent:>10}{received:>10}   as the kernel counted them")
        lines.append(f"{'wire':10}{wire_up:>10}{wire_down:>10}   estimated, with all headers")
    if view.privacy:
        lines.append(f"{'privacy':10}{view.privacy} spent")
    return "\n".join(lines)
