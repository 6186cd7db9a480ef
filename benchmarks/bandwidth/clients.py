"""Many light nodes in one process: reads one JSON order a line, answers each with one JSON line.

    python -m benchmarks.bandwidth.clients

An order is {"ticket", "keys", "base", "do": "rounds" | "beat" | "join", …}; see the functions of those names.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.bandwidth.light import LightNode, Pace
from transport.base_files import digest, tokenizer_digest
from transport.keys import KeyPair
from transport.meter import NOTHING_COUNTED
from transport.ticket import parse_ticket

_STALL_S: Final = 120.0
_COUNTERS: Final = Path("/proc/self/net/dev")


class StalledError(RuntimeError):
    """Nodes did not get where they should."""


def read_interface(name: str) -> tuple[int, int]:
    """Bytes that an interface of this process's namespace has (sent, received) so far."""
    for line in _COUNTERS.read_text().splitlines():
        found, _, fields = line.partition(":")
        if found.strip() == name:
            numbers = fields.split()
            return int(numbers[8]), int(numbers[0])
    raise StalledError(f"there is no interface {name} here")


def totals(nodes: Sequence[LightNode], interface: str | None) -> dict[str, int]:
    """What all nodes have sent and received so far, at three layers, and what the kernel saw of the second."""
    counts = [node.socket_count() or NOTHING_COUNTED for node in nodes]
    found = {
        "payload_up": sum(node.meter.total_up.payload_bytes for node in nodes),
        "payload_down": sum(node.meter.total_down.payload_bytes for node in nodes),
        "zmtp_up": sum(node.meter.total_up.zmtp_bytes for node in nodes),
        "zmtp_down": sum(node.meter.total_down.zmtp_bytes for node in nodes),
        "tcp_up": sum(count.bytes_sent for count in counts),
        "tcp_down": sum(count.bytes_received for count in counts),
    }
    if interface is None:
        up, down = sum(c.wire_bytes_sent for c in counts), sum(c.wire_bytes_received for c in counts)
    else:
        up, down = read_interface(interface)
    return found | {"wire_up": up, "wire_down": down}


def differences(marks: Sequence[dict[str, int]], nodes: int) -> dict[str, float]:
    """Per node, the median over the stretches between marks: a heartbeat in one of them changes nothing."""
    return {
        key: median(after[key] - before[key] for before, after in pairwise(marks)) / nodes for key in marks[0]
    }


def rounds(order: dict[str, Any]) -> dict[str, Any]:
    """Rounds in lockstep, with quiet before and after each: bytes per node and round, and a round's frames.

    The order's `think_s` is how long nodes take between a commit and their next report; `warm_up` and `rounds` how many
    rounds are not counted, and are.
    """
    allowed = 0

    def pace(round: int) -> float | None:
        return 0.0 if round < allowed else None

    nodes = _started(order, pace)
    try:
        _wait(nodes, lambda node: node.reached is not None, "join")
        marks = []
        for number in range(order["warm_up"] + order["rounds"]):
            if number >= order["warm_up"]:
                marks.append(totals(nodes, order["interface"]))
            allowed = number + 1
            _wait(nodes, partial(_has_applied, allowed), f"apply round {number}")
            time.sleep(order["think_s"])
        marks.append(totals(nodes, order["interface"]))
        frames = {kind: nodes[0].frames[kind].hex() for kind in ("Report", "Brief")}
        return {**differences(marks, len(nodes)), "frames": frames}
    finally:
        _end(nodes)


def beat(order: dict[str, Any]) -> dict[str, Any]:
    """Rounds on a beat for `seconds`: how many there were, how often a connection was lost, bytes of all nodes.

    With `beat_s` 0 nodes report as soon as they can, after `think_s`. A process starts to count when all its nodes have
    joined and `begin_round` is committed.
    """
    beat_s, think_s = order["beat_s"], order["think_s"]
    first_seen: dict[int, float] = {}

    def pace(round: int) -> float | None:
        now = time.monotonic()
        if not beat_s:
            return first_seen.setdefault(round, now + think_s)
        if round not in first_seen:
            first_seen[round] = (
                now // beat_s + 1
            ) * beat_s  # the same clock for every process of this machine
        return first_seen[round]

    began = time.monotonic()
    nodes = _started(order, pace, gap_s=order.get("gap_s", 0.0))
    try:
        _wait(nodes, lambda node: node.reached is not None, "join", order.get("join_within_s", _STALL_S))
        joined_s = time.monotonic() - began
        _wait(
            nodes,
            lambda node: node.round >= order["begin_round"],
            "begin",
            order.get("join_within_s", _STALL_S),
        )
        begin, before = time.monotonic(), totals(nodes, order["interface"])
        first, lost = min(node.round for node in nodes), sum(node.disconnects for node in nodes)
        while (elapsed := time.monotonic() - begin) < order["seconds"]:
            time.sleep(0.05)
            if min(node.round for node in nodes) - first >= order.get("most_rounds", 10**9):
                break
        elapsed = time.monotonic() - begin
        after = totals(nodes, order["interface"])
        found = [node.round for node in nodes]
        return {
            **{key: after[key] - before[key] for key in after},
            "joined_s": joined_s,
            "seconds": elapsed,
            "rounds": min(found) - first,
            "disconnects": sum(node.disconnects for node in nodes) - lost,
            "still_up": sum(node.is_up for node in nodes),
            "ended": sorted({node.ended for node in nodes if node.ended}),
        }
    finally:
        _end(nodes, order.get("leave_s", 5.0))


def join(order: dict[str, Any]) -> list[dict[str, Any]]:
    """One node: joins and catches up, is idle for `idle_s`, leaves; bytes of each."""
    zero = totals([], order["interface"])
    begin = time.monotonic()
    nodes = _started(order, lambda _: None)
    try:
        _wait(nodes, lambda node: node.reached is not None and node.round >= order["until"], "catch up")
        seconds = time.monotonic() - begin
        time.sleep(0.2)
        joined = totals(nodes, order["interface"])
        rows = [{"what": "join", "seconds": seconds, **_less(joined, zero)}]
        if order["idle_s"]:
            time.sleep(order["idle_s"])
            idle = totals(nodes, order["interface"])
            rows.append({"what": "idle", "seconds": order["idle_s"], **_less(idle, joined)})
            joined = idle
    finally:
        _end(nodes)
    time.sleep(0.2)
    rows.append({"what": "leave", "seconds": 0.0, **_less(totals(nodes, order["interface"]), joined)})
    return rows


def _less(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {key: after[key] - before[key] for key in after}


def _has_applied(rounds: int, node: LightNode) -> bool:
    return node.round >= rounds


def _started(order: dict[str, Any], pace: Pace, gap_s: float = 0.0) -> list[LightNode]:
    base, ticket = Path(order["base"]), parse_ticket(order["ticket"])
    digests = bytes.fromhex(digest(base)), bytes.fromhex(tokenizer_digest(base))
    nodes = []
    for public, secret in order["keys"]:
        keys = KeyPair(bytes.fromhex(public), bytes.fromhex(secret))
        nodes.append(LightNode(ticket, keys, digests, base, pace))
    for node in nodes:
        node.start()
        time.sleep(gap_s)
    return nodes


def _wait(nodes: Sequence[LightNode], holds: Any, what: str, within_s: float = _STALL_S) -> None:
    until = time.monotonic() + within_s
    while not all(holds(node) for node in nodes):
        over = [node.ended for node in nodes if node.ended is not None]
        if over or time.monotonic() > until:
            missing = sum(not holds(node) for node in nodes)
            why = f"; one ended: {over[0]}" if over else ""
            raise StalledError(f"{missing} of {len(nodes)} nodes did not {what} within {within_s:.0f} s{why}")
        time.sleep(0.002)


def _end(nodes: Sequence[LightNode], within_s: float = 5.0) -> None:
    for node in nodes:
        node.leave()
    until = time.monotonic() + within_s
    for node in nodes:
        node.join(max(0.0, until - time.monotonic()))


def _allow_many_files() -> None:
    """A node takes some ten descriptors."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> int:
    """Carry out orders until there are no more."""
    _allow_many_files()
    work = {"rounds": rounds, "beat": beat, "join": join}
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer: Any = {"done": work[order["do"]](order)}
        except (StalledError, OSError) as error:
            answer = {"failed": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
