"""Every frame that leaves a node, in a form that a person can check: what it says, and its bytes. Pure."""

from typing import Final

from transport.messages import addressed, decode_from_node
from transport.meter import zmtp_bytes

_BYTES_PER_LINE: Final = 32


def shown(frame: bytes) -> str:
    """A frame that this node sent: its message with all fields, its size, and every byte in hexadecimal.

    Raises:
        WireError: not a frame of a node.
    """
    agent, bare = addressed(frame)
    whose = f"for agent {agent}, " if agent else ""
    size = f"{len(frame)} bytes, encrypted {zmtp_bytes(len(frame))}"
    lines = [f"sent {size}: {whose}{decode_from_node(bare)}"]
    lines += [
        "    " + frame[start : start + _BYTES_PER_LINE].hex(" ")
        for start in range(0, len(frame), _BYTES_PER_LINE)
    ]
    return "\n".join(lines)
