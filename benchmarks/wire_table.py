"""What a round costs on the wire, for docs/bandwidth.md: real CURVE sockets on loopback, counted by the kernel.

    python -m benchmarks.wire_table [--json] [--out [DIR]] [--rounds N] [--pause-ms MS] [--at-once] [--idle-s S]

Nodes and a coordinator exchange the messages of a session: handshake, `Hello` and `Welcome`; then, round by round, one
`Report` up and one `Commit` down; at last one `Progress` and one `Leave`. Nothing is trained. Payload and ZMTP are
exact; "wire" is the kernel's count of bytes and segments with 66 bytes of headers each (see `transport.meter`). A pause
after each message lets TCP acknowledge it with a segment of its own, as between nodes that compute: back to back,
acknowledgements would ride on the next message and the figures would be lower.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any, Final

import numpy as np

from benchmarks import machine
from benchmarks.command import add_json, add_out, command_line, deliver
from coordinator.rundir import RunDirectory
from node import embedded
from transport.brevity import Abbreviator
from transport.keys import KeyPair, new_key_pair
from transport.messages import (
    PROTOCOL_VERSION,
    REPORT_ROUND_MODULUS,
    FromCoordinator,
    FromNode,
    Hello,
    Leave,
    Progress,
    Report,
    Welcome,
    encode,
)
from transport.meter import SocketCount, zmtp_bytes
from transport.sockets import Arrival, CoordinatorSocket, Link, NodeSocket, Sent
from transport.squeezing import squeezed
from transport.ticket import Ticket
from zo.commit import Commit
from zo.manifest import Manifest

DIRECTIONS: Final = (1, 8, 64, 256)
NODES: Final = (4, 16)
FIRST_ROUND: Final = 1_000
"""Rounds from 128 to 65,535 have numbers of two or three bytes; earlier ones are a little cheaper."""
_ID: Final = bytes(range(16))
_TIMEOUT_S: Final = 10.0


class Swarm:
    """A coordinator's socket and some nodes' sockets in one process, connected over loopback."""

    def __init__(self, num_nodes: int, pause_s: float) -> None:
        """Connect everyone.

        Args:
            num_nodes: how many nodes.
            pause_s: how long to leave a connection idle after a message, in seconds.
        """
        keys = new_key_pair()
        self._pause_s = pause_s
        self._abbreviator = Abbreviator()
        self._coordinator = CoordinatorSocket("127.0.0.1", 0, keys)
        ticket = Ticket("127.0.0.1", self._coordinator.port, _ID, keys.public)
        node_keys: list[KeyPair] = [new_key_pair() for _ in range(num_nodes)]
        self.nodes = [NodeSocket(ticket, each) for each in node_keys]
        self._session_by_key: dict[bytes, bytes] = {}
        self._keys = [each.public for each in node_keys]
        up: set[int] = set()
        deadline = monotonic() + _TIMEOUT_S
        while len(up) < num_nodes:
            _check(deadline, "a connection")
            list(self._coordinator.receive(0.005))
            for index, node in enumerate(self.nodes):
                links, _ = node.poll(0.0)
                up |= {index} if Link.UP in links else set()

    def close(self) -> None:
        """Close all sockets."""
        for node in self.nodes:
            node.close()
        self._coordinator.close()

    def send_up(self, message: FromNode, *, pauses: bool = True) -> int:
        """Every node sends the message, and the coordinator has it; its payload in bytes."""
        frame = encode(message)
        for node in self.nodes:
            if not node.send(frame):
                raise RuntimeError("a node's frame could not be queued")
        arrivals: list[Arrival] = []
        deadline = monotonic() + _TIMEOUT_S
        while len(arrivals) < len(self.nodes):
            _check(deadline, "a node's frame")
            arrivals += self._coordinator.receive(0.01)
        self._session_by_key |= {arrival.key: arrival.session for arrival in arrivals}
        if pauses:
            self._pause()
        return len(frame)

    def send_down(self, message: FromCoordinator) -> int:
        """The coordinator sends the message to every node, and all have it; its payload in bytes."""
        frame = encode(message)
        for key in self._keys:
            session = self._session_by_key[key]
            if isinstance(message, Commit):  # as the service does
                frame = squeezed(self._abbreviator.shortened(session, message.encode()))
            if self._coordinator.send(session, frame) is not Sent.OK:
                raise RuntimeError("a coordinator's frame could not be queued")
        deadline = monotonic() + _TIMEOUT_S
        for node in self.nodes:
            frames: list[bytes] = []
            while not frames:
                _check(deadline, "a coordinator's frame")
                _, frames = node.poll(0.01)
        self._pause()
        return len(frame)

    def counts(self) -> list[SocketCount]:
        """What the kernel has counted on each node's connection."""
        found = [node.socket_count() for node in self.nodes]
        counts = [count for count in found if count is not None]
        if len(counts) < len(found):
            raise RuntimeError(
                "this system does not count bytes and segments by connection (Linux 4.19 does)"
            )
        return counts

    def wait(self, seconds: float) -> None:
        """Let the connections be idle.

        Raises:
            RuntimeError: one was lost.
        """
        deadline = monotonic() + seconds
        while (left := deadline - monotonic()) > 0:
            list(self._coordinator.receive(min(left, 0.25)))
            if any(Link.DOWN in node.poll(0.0)[0] for node in self.nodes):
                raise RuntimeError("an idle connection was lost")

    def _pause(self) -> None:
        self.wait(self._pause_s)


def measure_rounds(
    num_nodes: int, num_directions: int, num_rounds: int, pause_s: float, *, at_once: bool
) -> dict[str, Any]:
    """What a round costs each node: one report up, one commit with everyone's codes down.

    Args:
        num_nodes: who all report and all receive.
        num_directions: of each node.
        num_rounds: to average over.
        pause_s: how long to leave a connection idle after a message, in seconds.
        at_once: the commit follows the last report without a pause.

    Raises:
        RuntimeError: the sockets' bytes are not those that the meter computes.
    """
    swarm = Swarm(num_nodes, pause_s)
    try:
        payload_up: list[int] = []
        payload_down: list[int] = []
        warm_up = 3  # a young connection acknowledges at once
        before, head = swarm.counts(), _ID
        for number in range(FIRST_ROUND, FIRST_ROUND + warm_up + num_rounds):
            if number == FIRST_ROUND + warm_up:
                before, payload_up, payload_down = swarm.counts(), [], []
            report = Report(number % REPORT_ROUND_MODULUS, bytes(num_directions))
            payload_up.append(swarm.send_up(report, pauses=not at_once))
            commit = _commit(number, num_nodes, num_directions, head)
            payload_down.append(swarm.send_down(commit))
            head = commit.digest()
        after = swarm.counts()
    finally:
        swarm.close()
    row: dict[str, Any] = {
        "nodes": num_nodes,
        "directions": num_directions,
        "payload_up": mean(payload_up),
        "zmtp_up": mean(map(zmtp_bytes, payload_up)),
        "wire_up": mean(b.wire_bytes_sent - a.wire_bytes_sent for a, b in zip(before, after, strict=True))
        / num_rounds,
        "payload_down": mean(payload_down),
        "zmtp_down": mean(map(zmtp_bytes, payload_down)),
        "wire_down": mean(
            b.wire_bytes_received - a.wire_bytes_received for a, b in zip(before, after, strict=True)
        )
        / num_rounds,
    }
    sent = mean(b.bytes_sent - a.bytes_sent for a, b in zip(before, after, strict=True)) / num_rounds
    received = (
        mean(b.bytes_received - a.bytes_received for a, b in zip(before, after, strict=True)) / num_rounds
    )
    for what, counted, computed in (("sent", sent, row["zmtp_up"]), ("received", received, row["zmtp_down"])):
        # A retransmission or a heartbeat (every 80 s) may fall into the measurement; more than that is an error.
        if not computed <= counted <= 1.1 * computed + 10:
            raise RuntimeError(
                f"the kernel counted {counted:.1f} bytes {what} a round, the meter {computed:.1f}"
            )
    row["wire_up_per_direction"] = row["wire_up"] / num_directions
    return row


def measure_session(manifest: Manifest, pause_s: float, idle_s: float) -> list[dict[str, Any]]:
    """What the rest of a session costs one node: joining, a progress message, leaving, and `idle_s` of nothing."""
    swarm = Swarm(1, pause_s)
    try:
        (at_start,) = swarm.counts()
        rows = [
            {
                "what": "handshake",
                "payload_up": 0,
                "zmtp_up": at_start.bytes_sent,
                "wire_up": at_start.wire_bytes_sent,
                "payload_down": 0,
                "zmtp_down": at_start.bytes_received,
                "wire_down": at_start.wire_bytes_received,
            }
        ]
        hello = Hello(PROTOCOL_VERSION, _ID, _ID, _ID, 0, _ID, "a-node")
        welcome = Welcome(PROTOCOL_VERSION, 0, manifest.encode(), 0, -4, None)
        rows.append(_exchange(swarm, "Hello and Welcome", hello, welcome))
        rows.append(_exchange(swarm, "Progress", Progress(FIRST_ROUND, _ID, 4_770), None))
        if idle_s:
            rows.append(
                _exchange(
                    swarm, f"{idle_s:.0f} s of nothing else (a heartbeat every 80 s)", None, None, idle_s
                )
            )
        rows.append(_exchange(swarm, "Leave", Leave(), None))
    finally:
        swarm.close()
    return rows


def markdown(figures: dict[str, Any]) -> str:
    """The tables of docs/bandwidth.md."""
    lines = [
        "| nodes | directions | report: payload | ZMTP + CURVE | wire | wire per direction "
        "| commit: payload | ZMTP + CURVE | wire |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in figures["rounds"]:
        cells = (
            f"{row['nodes']}",
            f"{row['directions']}",
            *(f"{row[key]:,.0f}" for key in ("payload_up", "zmtp_up", "wire_up")),
            f"{row['wire_up_per_direction']:.1f}",
            *(f"{row[key]:,.0f}" for key in ("payload_down", "zmtp_down", "wire_down")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| once | payload up | socket up | wire up | payload down | socket down | wire down |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    keys = ("payload_up", "zmtp_up", "wire_up", "payload_down", "zmtp_down", "wire_down")
    lines += [
        f"| {row['what']} | " + " | ".join(f"{row[k]:,.0f}" for k in keys) + " |"
        for row in figures["session"]
    ]
    lines += ["", "| one exchange of an adapter in float32 | up | down |", "|---|--:|--:|"]
    lines += [
        f"| {row['what']}, {row['parameters']:,} parameters | {row['payload_up']:,} | {row['payload_down']:,} |"
        for row in figures["float32"]
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = command_line("wire_table", __doc__)
    add_json(parser)
    add_out(parser, "wire_table.json and wire_table.md")
    parser.add_argument("--rounds", type=int, default=20, help="rounds to average over (20)")
    parser.add_argument(
        "--pause-ms", type=int, default=60, help="idle time after each message (60: more than a delayed ACK)"
    )
    parser.add_argument(
        "--idle-s", type=float, default=0, help="also measure an idle connection for so long (0)"
    )
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="no pause before a commit: its segments acknowledge the reports",
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.pause_ms, options.idle_s) < 0:
        parser.error("--rounds must be at least 1, --pause-ms and --idle-s not negative")
    pause_s = options.pause_ms / 1000
    manifest = _manifest()
    sizes = (("the demo's", manifest.adapter.size), ("a larger one", 1_000_000))
    figures = {
        "rounds": [
            measure_rounds(nodes, directions, options.rounds, pause_s, at_once=options.at_once)
            for nodes in NODES
            for directions in DIRECTIONS
        ],
        "session": measure_session(manifest, pause_s, options.idle_s),
        "float32": [
            {"what": what, "parameters": size, "payload_up": 4 * size, "payload_down": 4 * size}
            for what, size in sizes
        ],
        "pause_ms": options.pause_ms,
        "at_once": options.at_once,
        "cpu": machine.cpu(),
        "commit": machine.commit(),
        "command": machine.command("benchmarks.wire_table"),
        **{f"{name}_version": found for name, found in machine.versions(["pyzmq", "msgspec"]).items()},
    }
    page = markdown(figures)
    deliver("wire_table", figures, page, options, page)
    return 0


def _exchange(
    swarm: Swarm, what: str, up: FromNode | None, down: FromCoordinator | None, idle_s: float = 0
) -> dict[str, Any]:
    (before,) = swarm.counts()
    payload_up = 0 if up is None else swarm.send_up(up)
    payload_down = 0 if down is None else swarm.send_down(down)
    swarm.wait(idle_s)
    (after,) = swarm.counts()
    return {
        "what": what,
        "payload_up": payload_up,
        "zmtp_up": after.bytes_sent - before.bytes_sent,
        "wire_up": after.wire_bytes_sent - before.wire_bytes_sent,
        "payload_down": payload_down,
        "zmtp_down": after.bytes_received - before.bytes_received,
        "wire_down": after.wire_bytes_received - before.wire_bytes_received,
    }


def _commit(number: int, num_nodes: int, num_directions: int, previous: bytes) -> Commit:
    spread = np.random.default_rng(number).standard_normal(num_nodes * num_directions) * 32
    codes = np.clip(np.rint(spread), -127, 127).astype(np.int8).tobytes()
    return Commit(
        round=number,
        steps=(2**31 - 1,),
        exponents=(-4,),
        participants=tuple(range(num_nodes)),
        codes=codes,
        previous=previous,
    )


def _manifest() -> Manifest:
    """A manifest as `zo-coordinator init` writes it for the demo's base."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "demo"
        arguments = ["-m", "coordinator.cli", "init", str(path), "--model", str(embedded.path())]
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=machine.ROOT)
        return RunDirectory(path).manifest()


def _check(deadline: float, what: str) -> None:
    if monotonic() > deadline:
        raise RuntimeError(f"{what} did not arrive within {_TIMEOUT_S:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
