"""The ledger's entries and their chain: the same bytes on the wire, on disk and under the hash.

An entry is a `Commit`, which moves the weights by a round's codes, or a `Revert`, which takes back what earlier entries
did. Every entry has a round of its own; nothing is ever removed from a ledger.
"""

import hashlib
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from zo.directions import AUDIT, MAX_NODE, SHARED

DIGEST_BYTES: Final = 16
COMMIT_TAG: Final = 18
REVERT_TAG: Final = 24
STEP_MAX: Final = 2**31 - 1


class Commit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=COMMIT_TAG):
    """What one round did to the weights: its participants' codes and the step they are multiplied with.

    The chain starts at the agent's `genesis`: that is `previous` of round 0.
    """

    round: int
    steps: tuple[int, ...]
    """One int32 per class of codes: of slopes, and of moves in a run that allows them."""
    exponents: tuple[int, ...]
    """Exponents for the codes of the *next* round, one per class; in a pipelined run of the round after that."""
    participants: tuple[int, ...]
    """Ascending: node numbers, or the reserved ones of directions that nodes share (`naming.Naming.voice`)."""
    codes: bytes
    """Packed (`packing.codes_of`): the same number for every participant, in the order of participants and of their
    samples."""
    previous: bytes
    """Digest of the commit before, (16,) bytes."""
    late: tuple[int, ...] = ()
    """Participants whose codes are for the samples of the round before: they came too late for it (staleness one)."""
    movers: tuple[int, ...] = ()
    """Participants whose codes are projections of moves, as many as the manifest says of these; others' are slopes."""

    def __post_init__(self) -> None:
        """Check what a type cannot say.

        Raises:
            ValueError: an impossible commit.
        """
        if self.round < 0:
            raise ValueError(f"round must not be negative, got {self.round}")
        if not 1 <= len(self.steps) == len(self.exponents) <= 2:
            raise ValueError(
                f"one or two classes of codes are known, got {len(self.steps)} steps, {len(self.exponents)} exponents"
            )
        for step, exponent in zip(self.steps, self.exponents, strict=True):
            if not 0 <= step <= STEP_MAX:
                raise ValueError(f"step must be within 0 and {STEP_MAX}, got {step}")
            if not -64 <= exponent <= 63:
                raise ValueError(f"exponent must be within -64 and 63, got {exponent}")
        _check_voices("participants", self.participants)
        if self.late and not (_is_ascending(self.late) and set(self.late) <= set(self.participants)):
            raise ValueError(f"late must be ascending participants, got {self.late}")
        if self.movers and not (_is_ascending(self.movers) and set(self.movers) <= set(self.participants)):
            raise ValueError(f"movers must be ascending participants, got {self.movers}")
        if self.movers and len(self.steps) == 1:
            raise ValueError(f"there are movers, {self.movers}, and no step for moves")
        if self.late and self.round == 0:
            raise ValueError("round 0 has no round before it to be late for")
        if bool(self.participants) != bool(self.codes):
            raise ValueError(f"{len(self.participants)} participants with {len(self.codes)} bytes of codes")
        if len(self.previous) != DIGEST_BYTES:
            raise ValueError(f"the previous digest must have {DIGEST_BYTES} bytes, got {len(self.previous)}")

    def encode(self) -> bytes:
        """The commit's one canonical form, MessagePack: sent, stored and hashed as it is."""
        return msgspec.msgpack.encode(self)

    def digest(self) -> bytes:
        """(16,) bytes that stand for this commit and, through `previous`, all before it."""
        return chain_digest(self.encode())


Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class Revert(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=REVERT_TAG):
    """Takes back, exactly, what the entries first..last-1 did: all of it, or the part of some nodes.

    The inverse of an integer update is an integer update, so the weights are as if it had never been: to the last bit
    where everything since `first` is taken back. A run's step schedule goes on; rounds are not given back.
    """

    round: Annotated[int, Meta(ge=0)]
    first: Annotated[int, Meta(ge=0)]
    last: int
    """One past the last entry taken back; at most `round`."""
    nodes: tuple[int, ...]
    """Whose part is taken back: participants of those entries, ascending; empty for everyone's."""
    digest: Digest
    """Digest of the weights after it."""
    previous: Digest

    def __post_init__(self) -> None:
        """Check what a type cannot say.

        Raises:
            ValueError: an impossible revert.
        """
        if not self.first < self.last <= self.round:
            raise ValueError(
                f"a revert in round {self.round} cannot take back the rounds from {self.first} to before {self.last}"
            )
        _check_voices("nodes", self.nodes)

    def encode(self) -> bytes:
        """The one canonical form, as of `Commit`."""
        return msgspec.msgpack.encode(self)


def _check_voices(what: str, voices: tuple[int, ...]) -> None:
    if not _is_ascending(voices):
        raise ValueError(f"{what} must be ascending and distinct, got {voices}")
    if voices and not (voices[0] >= 0 and (voices[-1] < AUDIT or voices[-1] == SHARED)):
        raise ValueError(f"{what} must be within 0 and {MAX_NODE}, or groups, or everyone, got {voices}")


def _is_ascending(numbers: tuple[int, ...]) -> bool:
    """Whether every number is larger than the one before. Checked for every commit that arrives: kept out of Python."""
    return list(numbers) == sorted(set(numbers))


Entry = Commit | Revert


def genesis(run_id: bytes, agent: int) -> bytes:
    """Where an agent's chain begins, (16,) bytes: the run id for agent 0, a digest of run id and agent for others."""
    if agent == 0:
        return run_id
    return hashlib.blake2b(
        run_id + agent.to_bytes(4, "little"), digest_size=DIGEST_BYTES, person=b"zo-agent"
    ).digest()


def chain_digest(frame: bytes) -> bytes:
    """The digest of an encoded commit: BLAKE2b-128, (16,) bytes."""
    return hashlib.blake2b(frame, digest_size=DIGEST_BYTES, person=b"zo-commit").digest()


def decode_entry(frame: bytes) -> Entry:
    """The entry in `frame`.

    Raises:
        ValueError: not an entry, an impossible one, or not in its canonical form: its digest would be another than
            that of the same entry encoded by somebody else.
    """
    try:
        entry: Entry = _entries.decode(frame)
    except msgspec.DecodeError as error:
        raise ValueError(f"not a ledger entry: {error}") from error
    if entry.encode() != frame:
        raise ValueError(f"the entry of round {entry.round} is not in its canonical form")
    return entry


_entries: "msgspec.msgpack.Decoder[Entry]" = msgspec.msgpack.Decoder(Commit | Revert)
