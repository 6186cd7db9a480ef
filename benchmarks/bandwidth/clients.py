"""Many light nodes in one process: reads one JSON order a line, answers each with one JSON line.

    python -m benchmarks.bandwidth.clients

An order is {"ticket", "keys", "base", "do": "rounds" | "beat" | "join", …}; see the functions of those names.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import zmq

from benchmarks.bandwidth.chain import Chain
from benchmarks.bandwidth.counters import StalledError, differences, read_interface
from benchmarks.bandwidth.fleet import Fleet
from benchmarks.bandwidth.light import LightNode, Pace
from transport.base_files import digest, tokenizer_digest
from transport.keys import KeyPair
from transport.meter import NOTHING_COUNTED
from transport.ticket import parse_ticket

_STALL_S: Final = 120.0
_LOOK_S: Final = 0.002
_SETTLE_S: Final = 0.2


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
    if interface is not None:
        return found | read_interface(interface)
    return found | {
        "wire_up": sum(count.wire_bytes_sent for count in counts),
        "frames_up": sum(count.segments_sent for count in counts),
        "wire_down": sum(count.wire_bytes_received for count in counts),
        "frames_down": sum(count.segments_received for count in counts),
    }


def rounds(order: dict[str, Any]) -> dict[str, Any]:
    """Rounds in lockstep, with quiet before and after each: bytes and Ethernet frames per node and round.

    The order's `think_s` is how long nodes take between a commit and their next report; `warm_up` and `rounds` how many
    rounds are not counted, and are.
    """
    allowed = 0

    def pace(round: int) -> float | None:
        return 0.0 if round < allowed else None

    fleet = _started(order, pace)
    try:
        _wait(fleet, _has_joined, "join")
        marks = []
        for number in range(order["warm_up"] + order["rounds"]):
            if number >= order["warm_up"]:
                marks.append(totals(fleet.nodes, order["interface"]))
            allowed = number + 1
            fleet.wake()
            _wait(fleet, partial(_has_applied, allowed), f"apply round {number}")
            time.sleep(order["think_s"])
        marks.append(totals(fleet.nodes, order["interface"]))
        frames = {kind: fleet.nodes[0].frames[kind].hex() for kind in ("Report", "Brief")}
        return {**differences(marks, fleet.size), "frames": frames}
    finally:
        _end(fleet)


def beat(order: dict[str, Any]) -> dict[str, Any]:
    """Rounds on a beat for `seconds`: how many there were, how often a connection was lost, bytes of all nodes.

    With `beat_s` 0 nodes report as soon as they can, after `think_s`. A process starts to count when all its nodes have
    joined and `begin_round` is committed. With `share` its nodes compute what they have in common once; see `Chain`.
    """
    beat_s, think_s = order["beat_s"], order["think_s"]
    within_s = order.get("join_within_s", _STALL_S)
    leaves_at: dict[int, float] = {}

    def pace(round: int) -> float | None:
        if round not in leaves_at:
            now = time.monotonic()
            # The same clock for every process of this machine.
            leaves_at[round] = (now // beat_s + 1) * beat_s if beat_s else now + think_s
        return leaves_at[round]

    began = time.monotonic()
    fleet = _started(order, pace, order.get("gap_s", 0.0))
    try:
        _wait(fleet, _has_joined, "join", within_s)
        joined_s = time.monotonic() - began
        _wait(fleet, partial(_has_applied, order["begin_round"]), "begin", within_s)
        begin, before = time.monotonic(), totals(fleet.nodes, order["interface"])
        first, lost = _least_round(fleet), sum(node.disconnects for node in fleet.nodes)
        cpu_before = time.process_time()
        while (elapsed := time.monotonic() - begin) < order["seconds"]:
            time.sleep(0.05)
            if _least_round(fleet) - first >= order.get("most_rounds", 10**9):
                break
        elapsed = time.monotonic() - begin
        after, rounds = totals(fleet.nodes, order["interface"]), _least_round(fleet) - first
        return {
            **{key: after[key] - before[key] for key in after},
            "joined_s": joined_s,
            "seconds": elapsed,
            "rounds": rounds,
            "cpu_s": time.process_time() - cpu_before,
            "disconnects": sum(node.disconnects for node in fleet.nodes) - lost,
            "still_up": sum(node.is_up for node in fleet.nodes),
            "ended": sorted({node.ended for node in fleet.nodes if node.ended}),
        }
    finally:
        _end(fleet, order.get("leave_s", 5.0))


def join(order: dict[str, Any]) -> list[dict[str, Any]]:
    """One node: joins and catches up, is idle for `idle_s`, leaves; bytes of each."""
    zero = totals([], order["interface"])
    begin = time.monotonic()
    fleet = _started(order, lambda _: None)
    try:
        _wait(fleet, lambda node: node.reached is not None and node.round >= order["until"], "catch up")
        seconds = time.monotonic() - begin
        time.sleep(_SETTLE_S)
        joined = totals(fleet.nodes, order["interface"])
        rows = [{"what": "join", "seconds": seconds, **_less(joined, zero)}]
        if order["idle_s"]:
            time.sleep(order["idle_s"])
            idle = totals(fleet.nodes, order["interface"])
            rows.append({"what": "idle", "seconds": order["idle_s"], **_less(idle, joined)})
            joined = idle
    finally:
        _end(fleet)
    time.sleep(_SETTLE_S)
    rows.append({"what": "leave", "seconds": 0.0, **_less(totals(fleet.nodes, order["interface"]), joined)})
    return rows


def _less(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {key: after[key] - before[key] for key in after}


def _has_joined(node: LightNode) -> bool:
    return node.reached is not None


def _has_applied(rounds: int, node: LightNode) -> bool:
    return node.round >= rounds


def _least_round(fleet: Fleet) -> int:
    return min(node.round for node in fleet.nodes)


def _started(order: dict[str, Any], pace: Pace, gap_s: float = 0.0) -> Fleet:
    base, ticket = Path(order["base"]), parse_ticket(order["ticket"])
    digests = bytes.fromhex(digest(base)), bytes.fromhex(tokenizer_digest(base))
    chain = Chain(base) if order.get("share") else None

    def made(keys: KeyPair, context: zmq.Context[zmq.Socket[bytes]]) -> LightNode:
        return LightNode(ticket, keys, digests, base, pace, context, chain)

    pairs = [KeyPair(bytes.fromhex(public), bytes.fromhex(secret)) for public, secret in order["keys"]]
    fleet = Fleet([partial(made, each) for each in pairs], gap_s)
    fleet.start()
    return fleet


def _wait(fleet: Fleet, holds: Callable[[LightNode], bool], what: str, within_s: float = _STALL_S) -> None:
    """Until something holds for every node. Raises StalledError."""
    until, pending = time.monotonic() + within_s, list(range(fleet.size))
    while pending := [i for i in pending if i >= len(fleet.nodes) or not holds(fleet.nodes[i])]:
        failure = fleet.failure
        if failure is not None or time.monotonic() > until:
            why = f"; {failure}" if failure else ""
            raise StalledError(
                f"{len(pending)} of {fleet.size} nodes did not {what} within {within_s:.0f} s{why}"
            )
        time.sleep(_LOOK_S * (1 + fleet.size // 100))


def _end(fleet: Fleet, within_s: float = 5.0) -> None:
    fleet.leave()
    fleet.join(within_s)


def _allow_many_files() -> None:
    """A node takes five descriptors."""
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
