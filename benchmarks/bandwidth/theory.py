"""How many bytes a report and a commit must have, from the MessagePack specification alone: nothing is encoded here.

What is measured must lie within `TOLERANCE` of it.
"""

from __future__ import annotations

from typing import Final

TOLERANCE: Final = 0.05
_ARRAY_AND_TAG: Final = 2
_DIGEST_BYTES: Final = 18
"""16, and two of a header."""
_STEP_BYTES: Final = 5
"""A step is usually of 32 bits."""


def int_bytes(value: int) -> int:
    """Bytes of an integer."""
    if -32 <= value < 128:
        return 1
    for limit, size in ((2**8, 2), (2**16, 3), (2**32, 5)):
        if (-limit // 2 if value < 0 else 0) <= value < limit:
            return size
    return 9


def binary_bytes(length: int) -> int:
    """Bytes of a byte string of so many bytes."""
    return length + (2 if length < 2**8 else 3 if length < 2**16 else 5)


def array_header_bytes(length: int) -> int:
    """Bytes before the elements of an array of so many."""
    return 1 if length < 16 else 3 if length < 2**16 else 5


def packed_bytes(codes: int, bits: int) -> int:
    """Bytes of so many codes, all of them votes."""
    return -(-codes * bits // 8)


def report_bytes(round: int, directions: int, bits: int) -> int:
    """Payload of a report: round modulo 256, codes."""
    return _ARRAY_AND_TAG + int_bytes(round % 256) + binary_bytes(packed_bytes(directions, bits))


def commit_bytes(round: int, nodes: int, directions: int, bits: int, policy: str) -> int:
    """Payload of a commit: round, a step, an exponent, who is in it, codes, digest of the one before, nobody late.

    With the policy `shared` it names one direction's owner, of 32 bits, and has the codes of one.
    """
    names = [0xFFFF_FFFE] if policy == "shared" else range(nodes)
    participants = array_header_bytes(len(names)) + sum(map(int_bytes, names))
    codes = binary_bytes(packed_bytes(len(names) * directions, bits))
    step, exponent, late = 1 + _STEP_BYTES, 2, 1
    return _ARRAY_AND_TAG + int_bytes(round) + step + exponent + participants + codes + _DIGEST_BYTES + late


def deviation(measured: float, expected: float) -> float:
    """By what share a measured payload differs from the theoretical one."""
    return abs(measured - expected) / expected
