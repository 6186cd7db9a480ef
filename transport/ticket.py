"""Tickets: one line of text that holds all a node needs to find a coordinator and to know that it is the right one.

    zo://HOST:PORT/RUN#KEY.TOKEN

RUN is the run id in hexadecimal, KEY the coordinator's public CURVE key and TOKEN a secret that lets its holder in,
both in unpadded base64url: no character that a shell or a chat program would touch. A node whose key is known needs no
TOKEN.
"""

import base64
import binascii
import ipaddress
import re
import socket
from typing import Final

import msgspec

from zo.manifest import RUN_ID_BYTES

DEFAULT_PORT: Final = 7411
TOKEN_BYTES: Final = 16
_FORM: Final = "zo://HOST:PORT/RUN#KEY.TOKEN"


class TicketError(ValueError):
    """A ticket that is no ticket; the message says which part is wrong."""


class Ticket(msgspec.Struct, frozen=True):
    """Where the coordinator is, which run it serves, and its public key."""

    host: str
    """Name or address; an IPv6 address without brackets."""
    port: int
    run_id: bytes
    key: bytes
    token: bytes = b""
    """(16,) bytes that let a new node in; empty if the ticket only says where to go."""

    def __str__(self) -> str:
        secret = f".{_to_text(self.token)}" if self.token else ""
        return f"zo://{_bracketed(self.host)}:{self.port}/{self.run_id.hex()}#{_to_text(self.key)}{secret}"

    def __repr__(self) -> str:
        return (
            f"<ticket for {self.endpoint}, run {self.run_id.hex()}>"  # the token is nobody's but its holder's
        )

    @property
    def endpoint(self) -> str:
        """The address in the form that ZeroMQ takes."""
        return f"tcp://{_bracketed(self.host)}:{self.port}"


def parse_ticket(text: str) -> Ticket:
    """The ticket in `text`.

    Raises:
        TicketError: the message names the part that is wrong, and what it should look like.
    """
    text = text.strip()
    match = re.fullmatch(r"zo://(\[[^\]]+\]|[^:/#\[\]]+):([0-9]+)/([^#]*)(?:#([^.]*)(\.(.*))?)?", text)
    if match is None:
        raise TicketError(
            f"not a ticket: {_shown(text)}. A ticket looks like {_FORM}; copy the whole line that serve printed"
        )
    host, port_text, run_text, key_text, token_part, token_text = match.groups()
    port = int(port_text.lstrip("0")[:9] or "0")  # of a number of thousands of digits Python makes none
    if not 1 <= port <= 65535:
        raise TicketError(f"the ticket's port must be between 1 and 65535, got {port}")
    try:
        run_id = bytes.fromhex(run_text)
    except ValueError:
        run_id = b""
    if len(run_id) != RUN_ID_BYTES or len(run_text) != 2 * RUN_ID_BYTES:
        raise TicketError(
            f"the ticket's run must be {2 * RUN_ID_BYTES} hexadecimal digits, "
            f"got {len(run_text)} characters: {_shown(run_text)}"
        )
    if not key_text:
        raise TicketError("the ticket has no key after '#'. If it was typed into a shell, put it in quotes")
    key = _to_bytes(key_text)
    if len(key) != 32:
        raise TicketError(
            f"the ticket's key must be 43 characters after '#', got {len(key_text)}: was it cut off?"
        )
    token = _to_bytes(token_text or "")
    if token_part and len(token) != TOKEN_BYTES:
        raise TicketError(
            f"the ticket's token must be 22 characters after '.', got {len(token_text)}: was it cut off?"
        )
    return Ticket(host.strip("[]"), port, run_id, key, token)


def reachable_host(bound: str) -> str:
    """The host to print in a ticket for a socket bound to `bound`.

    A specific address is itself, loopback included. For "any address" it is the address this machine would use to
    reach the network (asking the routing table sends nothing), or its name where there is no route.
    """
    bound = bound.strip("[]")
    if bound not in ("*", "0.0.0.0", "::"):
        return bound
    # 192.0.2.0/24 and 2001:db8::/32 are reserved for documentation; connecting a datagram socket only looks up a route.
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        if family == socket.AF_INET6 and bound == "0.0.0.0":
            continue
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                host = str(probe.getsockname()[0])
        except OSError:
            continue
        if not ipaddress.ip_address(host).is_loopback:
            return host
    return socket.gethostname()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _to_text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _to_bytes(text: str) -> bytes:
    """What unpadded base64url says; nothing if it is none, or not in the one form that `_to_text` gives."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""
    return data if _to_text(data) == text else b""


def _shown(text: str) -> str:
    """The beginning of a text, without what may be a secret."""
    text = text.partition(".")[0] if "#" in text else text
    return repr(text if len(text) <= 60 else text[:57] + "...")
