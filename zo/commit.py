"""Commits and their chain: the ledger's unit, the same bytes on the wire, on disk and under the hash."""

import hashlib
from typing import Final

import msgspec

from zo.directions import MAX_NODE

DIGEST_BYTES: Final = 16
COMMIT_TAG: Final = 18
STEP_MAX: Final = 2**31 - 1


class Commit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=COMMIT_TAG):
    """What one round did to the weights: its participants' codes and the step they are multiplied with.

    The chain starts at the run id: `previous` of round 0 is the run id itself.
    """

    round: int
    steps: tuple[int, ...]
    """One int32 per class of codes (one class: measured slopes)."""
    exponents: tuple[int, ...]
    """Exponents for the codes of the *next* round, one per class."""
    participants: tuple[int, ...]
    """Node numbers, ascending."""
    codes: bytes
    """int8, the same number for every participant, in the order of participants and of their samples."""
    previous: bytes
    """Digest of the commit before, (16,) bytes."""

    def __post_init__(self) -> None:
        """Check what a type cannot say.

        Raises:
            ValueError: an impossible commit.
        """
        if self.round < 0:
            raise ValueError(f"round must not be negative, got {self.round}")
        if len(self.steps) != 1 or len(self.exponents) != 1:
            raise ValueError(
                f"one class of codes is known, got {len(self.steps)} steps, {len(self.exponents)} exponents"
            )
        if not 0 <= self.steps[0] <= STEP_MAX:
            raise ValueError(f"step must be within 0 and {STEP_MAX}, got {self.steps[0]}")
        if not -64 <= self.exponents[0] <= 63:
            raise ValueError(f"exponent must be within -64 and 63, got {self.exponents[0]}")
        if self.participants and not 0 <= min(self.participants) <= max(self.participants) <= MAX_NODE:
            raise ValueError(f"participants must be within 0 and {MAX_NODE}, got {self.participants}")
        if any(b <= a for a, b in zip(self.participants, self.participants[1:], strict=False)):
            raise ValueError(f"participants must be ascending and distinct, got {self.participants}")
        if bool(self.participants) != bool(self.codes) or (
            self.participants and len(self.codes) % len(self.participants)
        ):
            raise ValueError(
                f"{len(self.codes)} codes do not divide among {len(self.participants)} participants"
            )
        if len(self.previous) != DIGEST_BYTES:
            raise ValueError(f"the previous digest must have {DIGEST_BYTES} bytes, got {len(self.previous)}")

    def encode(self) -> bytes:
        """The commit's one canonical form, MessagePack: sent, stored and hashed as it is."""
        return msgspec.msgpack.encode(self)

    def digest(self) -> bytes:
        """(16,) bytes that stand for this commit and, through `previous`, all before it."""
        return chain_digest(self.encode())


def chain_digest(frame: bytes) -> bytes:
    """The digest of an encoded commit: BLAKE2b-128, (16,) bytes."""
    return hashlib.blake2b(frame, digest_size=DIGEST_BYTES, person=b"zo-commit").digest()


def decode_commit(frame: bytes) -> Commit:
    """The commit in `frame`.

    Raises:
        ValueError: not a commit, an impossible one, or not in its canonical form: its digest would be another than
            that of the same commit encoded by somebody else.
    """
    try:
        commit = msgspec.msgpack.decode(frame, type=Commit)
    except msgspec.DecodeError as error:
        raise ValueError(f"not a commit: {error}") from error
    if commit.encode() != frame:
        raise ValueError(f"commit of round {commit.round} is not in its canonical form")
    return commit
