"""Frames of a measured round sent again without encryption, for the price of CURVE alone. The product has no such mode.

    python -m benchmarks.bandwidth.plain hub ADDRESS NODES
    python -m benchmarks.bandwidth.plain nodes ADDRESS PORT NODES INTERFACE

The hub takes a frame of every node and sends each the other one; both read what to send from standard input, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import zmq

from benchmarks.bandwidth.counters import differences, read_interface
from transport.meter import zmtp_bytes

_TIMEOUT_MS = 10_000


def hub(address: str, num_nodes: int) -> None:
    """The coordinator's end: prints its port, then answers every round of reports with a commit to everyone."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.set(zmq.RCVTIMEO, -1)
    router.bind(f"tcp://{address}:*")
    print(bytes(router.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode().rpartition(":")[2], flush=True)
    commit = bytes.fromhex(json.loads(sys.stdin.readline())["commit"])
    while True:
        peers = [router.recv_multipart()[0] for _ in range(num_nodes)]
        for peer in peers:
            router.send_multipart([peer, commit])


def nodes(address: str, port: int, num_nodes: int, interface: str) -> None:
    """The nodes' end: prints bytes per node and round, as `clients.rounds` counts them."""
    order = json.loads(sys.stdin.readline())
    report, commit = bytes.fromhex(order["report"]), bytes.fromhex(order["commit"])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealers = []
    for _ in range(num_nodes):
        dealer = context.socket(zmq.DEALER)
        dealer.set(zmq.RCVTIMEO, _TIMEOUT_MS)
        dealer.connect(f"tcp://{address}:{port}")
        dealers.append(dealer)
    marks: list[dict[str, int]] = []
    for number in range(order["warm_up"] + order["rounds"] + 1):
        if number >= order["warm_up"]:
            marks.append(read_interface(interface))
        if len(marks) > order["rounds"]:
            break
        for dealer in dealers:
            dealer.send(report)
        for dealer in dealers:
            if len(dealer.recv()) != len(commit):
                raise RuntimeError("another frame came than was sent")
        time.sleep(order["think_s"])
    found: dict[str, Any] = differences(marks, num_nodes)
    for way, frame in (("up", report), ("down", commit)):
        found |= {f"payload_{way}": len(frame), f"zmtp_{way}": zmtp_bytes(len(frame), curve=False)}
    print(json.dumps({"done": found}), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Be one of the two ends."""
    what, address, *more = sys.argv[1:] if arguments is None else arguments
    if what == "hub":
        hub(address, int(more[0]))
    else:
        nodes(address, int(more[0]), int(more[1]), more[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
