"""How many bytes a report and a commit must have, from the MessagePack specification alone: nothing is encoded here.

What is measured must lie within `TOLERANCE` of it.
"""

from __future__ import annotations

from typing import Final

TOLERANCE: Final = 0.05
_STEP_AND_EXPONENT_BYTES: Final = 5
"""A step of 32 bits, an exponent of 8."""


def extension_bytes(length: int) -> int:
    """Bytes of an extension of so many: a type, and a length unless it is a small power of two."""
    if length in (1, 2, 4, 8, 16):
        return 2 + length
    return length + (3 if length < 2**8 else 4 if length < 2**16 else 6)


def packed_bytes(codes: int, bits: int) -> int:
    """Bytes of so many codes, all of them votes."""
    return -(-codes * bits // 8)


def report_bytes(directions: int, bits: int) -> int:
    """Payload of a report: an extension of the codes, whose type is the round."""
    return extension_bytes(packed_bytes(directions, bits))


def commit_bytes(nodes: int, directions: int, bits: int, policy: str) -> int:
    """Payload of a commit for a node that has the one before: an extension of step, exponent and codes.

    With the policy `shared` it has the means of all nodes' codes, which are of 8 bits whatever theirs are. See
    `may_be_squeezed`.
    """
    num, bits = (directions, 8) if policy == "shared" else (nodes * directions, bits)
    return extension_bytes(_STEP_AND_EXPONENT_BYTES + packed_bytes(num, bits))


def may_be_squeezed(bits: int, policy: str) -> bool:
    """Whether a commit may come to less: means of narrow codes are few different bytes. Other codes fill theirs."""
    return policy == "shared" and bits < 8


def deviation(measured: float, expected: float) -> float:
    """By what share a measured payload differs from the theoretical one."""
    return abs(measured - expected) / expected
