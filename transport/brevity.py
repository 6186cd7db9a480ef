"""A commit in few bytes, for a node that has the one before: no participants, where they are the same, and no digest.

As with headers of TCP (RFC 1144) the other side fills in what it has seen last. The chain, its digests and the ledger
are of whole commits.
"""

import struct

import msgspec

from transport.messages import REPORT_ROUND_MODULUS, Brief, encode
from zo.commit import Commit

_STEP_BYTES, _EXPONENT_BYTES = 4, 1


def brief(before: Commit, commit: Commit) -> Brief | None:
    """`commit` for a node that has `before`, the one before it; None if they differ in more than a `Brief` says."""
    rest = struct.pack(f"<{len(commit.steps)}I{len(commit.exponents)}b", *commit.steps, *commit.exponents)
    found = Brief(commit.round % REPORT_ROUND_MODULUS, rest + commit.codes)
    try:
        return found if expanded(found, before) == commit else None
    except ValueError:
        return None


def expanded(brief: Brief, before: Commit) -> Commit:
    """The commit that a `Brief` is, after the one before it.

    Raises:
        ValueError: it does not follow `before`, or would be an impossible commit.
    """
    round = before.round + 1
    if round % REPORT_ROUND_MODULUS != brief.round:
        raise ValueError(
            f"a commit of a round that is {brief.round} modulo 256 does not follow {before.round}"
        )
    classes = len(before.steps)
    size = classes * (_STEP_BYTES + _EXPONENT_BYTES)
    if len(brief.data) < size:
        raise ValueError(f"{len(brief.data)} bytes are no commit of {classes} classes of codes")
    numbers = struct.unpack_from(f"<{classes}I{classes}b", brief.data)
    return msgspec.structs.replace(
        before,
        round=round,
        steps=numbers[:classes],
        exponents=numbers[classes:],
        codes=brief.data[size:],
        previous=before.digest(),
    )


class Abbreviator:
    """Which sessions have the commit before, and so may be sent a `Brief`. One for each agent, at the coordinator."""

    def __init__(self) -> None:
        self._commit: Commit | None = None
        self._frame = b""
        self._short = b""
        self._have_before: set[bytes] = set()
        self._have: set[bytes] = set()

    def shortened(self, session: bytes, frame: bytes) -> bytes:
        """The frame of a commit as this session is to be sent it now; the next call takes it that it was.

        Args:
            session: of the connection.
            frame: an encoded commit; not older than that of the last call.
        """
        if frame != self._frame:
            before, self._commit = self._commit, msgspec.msgpack.decode(frame, type=Commit)
            found = None if before is None else brief(before, self._commit)
            self._frame, self._short = frame, frame if found is None else encode(found)
            self._have_before, self._have = self._have, set()
        self._have.add(session)
        return self._short if session in self._have_before else self._frame

    def forget(self, session: bytes) -> None:
        """What was sent to a session last did not reach it."""
        self._have.discard(session)
        self._have_before.discard(session)
