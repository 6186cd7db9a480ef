"""The byte meter: what every message costs as payload, on the socket, and about on the wire.

Payload is the MessagePack frame. The socket's bytes add ZMTP 3.1 framing and, with CURVE, its box (RFC 37, RFC 26).
Both are exact and kept by message type. What the kernel counted on a connection (handshake, heartbeats and resent
segments included) comes from TCP_INFO, and gives the estimate of Ethernet bytes.
"""

import os
import socket
import struct
import sys
from typing import Final

import msgspec

ETHERNET_SEGMENT_BYTES: Final = 66
"""Ethernet 14 + IPv4 20 + TCP 20 + timestamps 12; without preamble, frame check and gap."""
# CURVE: "\x07MESSAGE" 8, nonce 8, Poly1305 tag 16, flags 1.
CURVE_BOX_BYTES: Final = 33


def zmtp_bytes(payload_bytes: int, curve: bool = True) -> int:
    """Bytes that a one-frame message of `payload_bytes` occupies on the TCP connection."""
    body = payload_bytes + (CURVE_BOX_BYTES if curve else 0)
    return body + (2 if body <= 255 else 9)


def si_bytes(count: float) -> str:
    """A byte count for people: 999 B, 1.2 kB, 3.4 MB."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


class Count(msgspec.Struct):
    """A running count of one kind of traffic."""

    messages: int = 0
    payload_bytes: int = 0
    zmtp_bytes: int = 0

    def add(self, payload_bytes: int, curve: bool) -> None:
        """Count one message."""
        self.messages += 1
        self.payload_bytes += payload_bytes
        self.zmtp_bytes += zmtp_bytes(payload_bytes, curve)

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.messages + other.messages,
            self.payload_bytes + other.payload_bytes,
            self.zmtp_bytes + other.zmtp_bytes,
        )


class Meter:
    """Counts by direction and message type. "Up" is from nodes to the coordinator, whichever side counts."""

    def __init__(self, curve: bool = True) -> None:
        self.curve = curve
        self.up: dict[str, Count] = {}
        self.down: dict[str, Count] = {}

    def count_up(self, kind: str, payload_bytes: int) -> None:
        """Count one message from a node to the coordinator."""
        self.up.setdefault(kind, Count()).add(payload_bytes, self.curve)

    def count_down(self, kind: str, payload_bytes: int) -> None:
        """Count one message from the coordinator to a node."""
        self.down.setdefault(kind, Count()).add(payload_bytes, self.curve)

    @property
    def total_up(self) -> Count:
        """Everything from nodes to the coordinator."""
        return sum(self.up.values(), Count())

    @property
    def total_down(self) -> Count:
        """Everything from the coordinator to nodes."""
        return sum(self.down.values(), Count())


class SocketCount(msgspec.Struct, frozen=True):
    """What the kernel counted on one TCP connection, seen from this end."""

    bytes_sent: int
    """Acknowledged bytes plus those resent; retransmissions are in it."""
    bytes_received: int
    segments_sent: int
    segments_received: int

    @property
    def wire_bytes_sent(self) -> int:
        """Estimated Ethernet bytes sent: bytes plus headers of every segment, bare acknowledgements included."""
        return self.bytes_sent + ETHERNET_SEGMENT_BYTES * self.segments_sent

    @property
    def wire_bytes_received(self) -> int:
        """Estimated Ethernet bytes received."""
        return self.bytes_received + ETHERNET_SEGMENT_BYTES * self.segments_received

    def __add__(self, other: "SocketCount") -> "SocketCount":
        return SocketCount(
            self.bytes_sent + other.bytes_sent,
            self.bytes_received + other.bytes_received,
            self.segments_sent + other.segments_sent,
            self.segments_received + other.segments_received,
        )


NOTHING_COUNTED: Final = SocketCount(0, 0, 0, 0)


def read_socket_count(descriptor: int) -> SocketCount | None:
    """The kernel's counters of the TCP connection behind a file descriptor; None where the system has none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        info = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        return None
    with info:
        try:
            raw = info.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            return None
    if len(raw) < 208:  # kernels before 4.19
        return None
    # linux/tcp.h, struct tcp_info: bytes_received at 128, segs_out and segs_in at 136 and 140, bytes_sent at 200.
    (received,) = struct.unpack_from("=Q", raw, 128)
    segments_out, segments_in = struct.unpack_from("=II", raw, 136)
    (sent,) = struct.unpack_from("=Q", raw, 200)
    return SocketCount(sent, received, segments_out, segments_in)
