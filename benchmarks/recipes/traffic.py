"""What a node of a virtual swarm would have sent and received: its frames are made, but never travel.

Reports and commits are encoded, abbreviated and squeezed as the transport does it. What carries them is computed, by
what `zo-bench wire` counts on an interface: ZMTP and CURVE around a frame, 66 bytes of Ethernet, IP and TCP for each
segment, and an acknowledgement alone for each frame of the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from transport.brevity import brief
from transport.messages import REPORT_ROUND_MODULUS, Report, encode
from transport.meter import zmtp_bytes
from transport.squeezing import squeezed
from zo.commit import Commit

SEGMENT_BYTES: Final = 1448
"""Of data, on Ethernet with time stamps."""
HEADER_BYTES: Final = 66
"""Ethernet 14, IP 20, TCP 32: of a segment, or of an acknowledgement alone."""


@dataclass
class Traffic:
    """Bytes of one node so far, on average over nodes: payloads, and with everything around them."""

    payload_up: float = 0.0
    payload_down: float = 0.0
    wire_up: float = 0.0
    wire_down: float = 0.0
    before: Commit | None = None

    def count(self, reports: Sequence[bytes], commit: Commit) -> None:
        """One round.

        Args:
            reports: packed codes of every node.
            commit: what came of them.
        """
        ups = [len(encode(Report(commit.round % REPORT_ROUND_MODULUS, codes))) for codes in reports]
        short = None if self.before is None else brief(self.before, commit)
        down = len(squeezed(commit.encode() if short is None else encode(short)))
        self.before = commit
        self.payload_up += fmean(ups)
        self.payload_down += down
        self.wire_up += fmean(_segments_bytes(up) for up in ups) + HEADER_BYTES
        self.wire_down += _segments_bytes(down) + HEADER_BYTES


def _segments_bytes(payload: int) -> int:
    sent = zmtp_bytes(payload)
    return sent + HEADER_BYTES * -(-sent // SEGMENT_BYTES)
