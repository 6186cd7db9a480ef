"""The messages, their bytes and their bounds. One message is one frame: a MessagePack array that starts with its tag.

Tags, field order and types are the protocol: tests pin them, docs/protocol.md explains them. Everything that arrives is
checked against these types before anybody looks at it; what does not fit is a `WireError` and changes nothing.

Each agent of a run is a conversation of its own. The frames of agent 0, the only one of most runs, are messages as they
are; before those of agent a > 0 stands a, as one byte (`address`).
"""

from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from transport.seals import SIGNATURE_BYTES
from transport.squeezing import SqueezeError, is_squeezed, unsqueezed
from zo.commit import DIGEST_BYTES, Commit
from zo.manifest import MAX_AGENTS, RUN_ID_BYTES

PROTOCOL_VERSION: Final = 1
MAX_NODE_FRAME_BYTES: Final = 8 * 1024
"""Largest frame a coordinator accepts: a report of 4,096 codes fits twice."""
MAX_COORDINATOR_FRAME_BYTES: Final = 16 * 1024 * 1024
"""Largest frame a node accepts: a commit of 4,096 nodes × 4,000 codes just fits."""
HISTORY_BYTES: Final = 64 * 1024
"""About how much of the ledger goes into one `History` frame."""
PIECE_BYTES: Final = 32 * 1024
"""How much of a snapshot goes into one `Piece` frame."""
REPORT_ROUND_MODULUS: Final = 256

RunId = Annotated[bytes, Meta(min_length=RUN_ID_BYTES, max_length=RUN_ID_BYTES)]
Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
PublicKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
Round = Annotated[int, Meta(ge=0, le=2**40)]
Exponent = Annotated[int, Meta(ge=-64, le=63)]
# Not tuple[Exponent, Exponent]: in a union with a bounded integer msgspec 0.22 reads the length of such a type wrongly.
_Exponents = Annotated[tuple[Exponent, ...], Meta(min_length=2, max_length=2)]


class WireError(ValueError):
    """A frame that is no message of this protocol."""


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages but `Commit`, which zo owns."""


# ---- from a node -------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag=1):
    """The first message of a session, and the answer to `Identify`. Who the node is, CURVE has proved already."""

    protocol: Annotated[int, Meta(ge=0, le=65535)]
    run_id: RunId
    base: Digest
    """Digest of the base the node holds."""
    tokenizer: Digest
    round: Round
    """Number of commits the node has applied."""
    head: Digest
    """Digest of the last of them (the chain's genesis before the first)."""
    name: Annotated[str, Meta(max_length=64)]
    """For people; nothing depends on it."""
    estimator: Annotated[str, Meta(max_length=16)] = ""
    """How the node measures slopes, where it chose; empty: as the manifest's `probe.sides` says."""


class Report(Message, frozen=True):
    """One node's codes for one round. Sent again until a commit shows that it counted, or that it came too late.

    The message of every round: it travels as a MessagePack extension, whose type is the round.
    """

    round: Annotated[int, Meta(ge=0, lt=REPORT_ROUND_MODULUS)]
    """The round modulo 256. Unambiguous: a node is never more than the flow window and a round ahead of what it
    acknowledged."""
    codes: Annotated[bytes, Meta(min_length=1, max_length=4096)]
    """A code per direction, in the order of the round's samples, packed as the manifest says (`zo.packing`)."""


class Progress(Message, frozen=True, tag=3):
    """How far a node has come, with the proof; opens the flow window for more commits."""

    round: Round
    digest: Digest
    """Digest of the node's weights after that many commits."""
    loss_milli: Annotated[int, Meta(ge=0, le=2**32)] | None
    """The node's recent mean loss in thousandths, if the manifest has nodes share it."""


class Leave(Message, frozen=True, tag=4):
    """The node goes, in good order: rounds no longer wait for it."""


class Fetch(Message, frozen=True, tag=5):
    """Asks for a piece of a snapshot. Answered by `Piece`."""

    content: Digest
    """Content address of the snapshot, from an `Offer`."""
    offset: Annotated[int, Meta(ge=0, le=2**40)]


class Follow(Message, frozen=True, tag=6):
    """The answer to an `Offer`: from where on the node wants the ledger's entries."""

    round: Round
    head: Digest


class Trace(Message, frozen=True, tag=7):
    """The answer to `Resync`: the node's digests of its last rounds, from which the first wrong one is found."""

    first: Round
    """Round of the first digest."""
    digests: Annotated[tuple[Digest, ...], Meta(max_length=128)]
    """Digests after so many commits, one for each round from `first` on."""


class Redeem(Message, frozen=True, tag=8):
    """Said over a connection whose handshake proved a ticket's token: let this key in from now on."""

    run_id: RunId
    key: PublicKey
    """The node's own public key, with which it comes back."""


class Rotate(Message, frozen=True, tag=9):
    """Said over a connection of a node's key: from now on this other key is the node."""

    key: PublicKey


class Answer(Message, frozen=True, tag=10):
    """The answer to `Audit`: two losses on the manifest's public rows. Comes before the next report of the weights."""

    round: Round
    losses: Annotated[bytes, Meta(min_length=8, max_length=8)]
    """Two float32, little-endian: at the weights plus epsilon times the direction, and minus."""


# ---- from the coordinator ----------------------------------------------------------------------------------------


class Offer(Message, frozen=True):
    """Two ways to catch up, and what each costs; the node chooses, because only it knows its link and its kernel."""

    content: Digest
    """BLAKE2b-128 of the snapshot's bytes, its content address."""
    round: Round
    """Commits that are in the snapshot."""
    num_bytes: Annotated[int, Meta(ge=0)]
    tail_bytes: Annotated[int, Meta(ge=0)]
    """Of the entries after the snapshot."""
    tail_codes: Annotated[int, Meta(ge=0)]
    replay_bytes: Annotated[int, Meta(ge=0)]
    """Of the entries that the node lacks."""
    replay_codes: Annotated[int, Meta(ge=0)]
    can_replay: bool
    """Whether a replay alone leads there: not past a `Revert`, which needs entries from before."""


class Welcome(Message, frozen=True, tag=16):
    """The answer to a `Hello` that fits. The missing entries follow, at once or, after an offer, upon `Follow`."""

    protocol: Annotated[int, Meta(ge=0, le=65535)]
    node: Annotated[int, Meta(ge=0, le=0xFFFF_FEFF)]
    """The node's number, the same at every visit: it names the node's directions."""
    manifest: bytes
    """Canonical bytes of the manifest, whose hash must be the run id of the ticket; empty for a node that said it has
    commits, and so has the manifest."""
    round: Round
    """The round in progress: the number of commits in the ledger."""
    exponent: Exponent | _Exponents
    """Exponent of this round's codes; in a pipelined run of this round's and of the next one's."""
    offer: Offer | None
    """A snapshot, if fetching it may be cheaper than replaying."""


class Refuse(Message, frozen=True, tag=17):
    """The answer to a `Hello` that does not fit. The node stops and shows the reason."""

    cause: Annotated[str, Meta(max_length=32)]
    """One word for programs: protocol, run, base, tokenizer, agent, estimator, fork, full, replaced, quarantined,
    invitation, revoked, key."""
    reason: Annotated[str, Meta(max_length=1024)]


class History(Message, frozen=True, tag=19):
    """A stretch of the ledger for a node that is behind: encoded entries, oldest first."""

    frames: Annotated[tuple[bytes, ...], Meta(min_length=1)]


class Brief(Message, frozen=True):
    """The commit after the one that the node was sent last (`transport.brevity`). A MessagePack extension, as `Report`.

    It differs from that one in round, steps, exponents, codes and the digest of the one before, and in nothing else.
    """

    round: Annotated[int, Meta(ge=0, lt=REPORT_ROUND_MODULUS)]
    """The round modulo 256."""
    data: bytes
    """The steps as uint32, little-endian; the exponents as int8; then the codes."""


class Resync(Message, frozen=True, tag=20):
    """The digest the node reported is not the ledger's: its weights are wrong, and it starts over."""

    round: Round
    digest: Digest
    """What the digest should have been."""


class Identify(Message, frozen=True, tag=21):
    """The coordinator does not know this session (it was restarted, or gave the node up): say `Hello`."""


class Finished(Message, frozen=True, tag=22):
    """All rounds are done. Sent to nodes that have every commit."""

    round: Round
    digest: Digest
    """Digest of the final weights."""


class Piece(Message, frozen=True, tag=23):
    """A piece of a snapshot."""

    content: Digest
    offset: Annotated[int, Meta(ge=0)]
    num_bytes: Annotated[int, Meta(ge=0)]
    """Of the whole snapshot; 0 if the coordinator does not have it any more."""
    data: bytes


class Admitted(Message, frozen=True, tag=25):
    """The answer to `Redeem` and `Rotate`: this key may join, and that is durable."""

    key: PublicKey


class Sealed(Message, frozen=True, tag=26):
    """The coordinator's signature under the chain that the node has by then: proof of every entry before."""

    round: Round
    """Entries that it covers."""
    head: Digest
    """Digest of the last of them."""
    signature: Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
    """Ed25519, under genesis, round and head (`transport.seals`)."""


class Audit(Message, frozen=True, tag=27):
    """Asks for the losses on the manifest's public rows at the weights of a round. Comes before the commit to it."""

    round: Round
    sample: Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
    """Names the direction: (`zo.directions.AUDIT`, sample, agent)."""


FromMember = Hello | Report | Progress | Leave | Fetch | Follow | Trace | Answer
"""What a node says in a run; the rest is about its key."""
FromNode = FromMember | Redeem | Rotate
ToMember = Welcome | Refuse | Commit | Brief | History | Resync | Identify | Finished | Piece | Sealed | Audit
FromCoordinator = ToMember | Admitted

Extended = TypeVar("Extended", Report, Brief)

_encoder = msgspec.msgpack.Encoder()
_EXTENSIONS: Final = frozenset((0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8))
_extension = msgspec.msgpack.Decoder(msgspec.msgpack.Ext)
# All but those that travel as extensions.
_from_node = msgspec.msgpack.Decoder(
    Hello | Progress | Leave | Fetch | Follow | Trace | Answer | Redeem | Rotate
)
_from_coordinator = msgspec.msgpack.Decoder(
    Welcome | Refuse | Commit | History | Resync | Identify | Finished | Piece | Sealed | Audit | Admitted
)


def encode(message: FromNode | FromCoordinator) -> bytes:
    """The message's frame, for agent 0; `address` makes it another's."""
    match message:
        case Report(round, data) | Brief(round, data):
            return _encoder.encode(msgspec.msgpack.Ext((round ^ 128) - 128, data))  # the type is an int8
    return _encoder.encode(message)


def address(frame: bytes, agent: int) -> bytes:
    """The frame of an agent, from that for agent 0.

    Before the message stands the agent's number as a MessagePack positive fixint, one byte; before one for agent 0
    nothing. A message is an array and never starts with such a byte, so the two cannot be confused.
    """
    assert 0 <= agent < MAX_AGENTS
    return bytes([agent]) + frame if agent else frame


def addressed(frame: bytes) -> tuple[int, bytes]:
    """The agent that a frame is about, and the frame as it would be for agent 0.

    Raises:
        WireError: agent 0 is named, which has no name on the wire: a message has one form.
    """
    if not frame or frame[0] >= MAX_AGENTS:
        return 0, frame
    if frame[0] == 0:
        raise WireError(f"frame of {len(frame)} bytes is no message: it names agent 0, which is never named")
    return frame[0], frame[1:]


def decode_from_node(frame: bytes) -> FromNode:
    """The message a node sent.

    Raises:
        WireError: too large, not MessagePack, an unknown tag, or a field out of its bounds.
    """
    if len(frame) > MAX_NODE_FRAME_BYTES:
        raise WireError(f"frame of {len(frame)} bytes; a node's may have {MAX_NODE_FRAME_BYTES}")
    if frame[:1] != b"" and frame[0] in _EXTENSIONS:
        return _extended(Report, frame)
    message: FromNode = _decode(_from_node, frame)
    return message


def decode_from_coordinator(frame: bytes) -> FromCoordinator:
    """The message a coordinator sent; also one that is squeezed (`transport.squeezing`).

    Raises:
        WireError: as `decode_from_node`.
    """
    if is_squeezed(frame):
        try:
            frame = unsqueezed(frame, MAX_COORDINATOR_FRAME_BYTES)
        except SqueezeError as error:
            raise WireError(f"frame of {len(frame)} bytes is no message: {error}") from error
    if len(frame) > MAX_COORDINATOR_FRAME_BYTES:
        raise WireError(
            f"frame of {len(frame)} bytes; a coordinator's may have {MAX_COORDINATOR_FRAME_BYTES}"
        )
    if frame[:1] != b"" and frame[0] in _EXTENSIONS:
        return _extended(Brief, frame)
    message: FromCoordinator = _decode(_from_coordinator, frame)
    return message


def _extended(kind: type[Extended], frame: bytes) -> Extended:
    """The message of a round."""
    extension = _decode(_extension, frame)
    try:
        return msgspec.convert((extension.code % REPORT_ROUND_MODULUS, bytes(extension.data)), kind)
    except msgspec.ValidationError as error:
        raise WireError(f"frame of {len(frame)} bytes is no message: {error}") from error


def _decode(decoder: "msgspec.msgpack.Decoder[Any]", frame: bytes) -> Any:
    try:
        return decoder.decode(frame)
    except (
        msgspec.DecodeError,
        ValueError,
    ) as error:  # ValueError: a commit's own checks, or bytes that are no UTF-8
        raise WireError(f"frame of {len(frame)} bytes is no message: {error}") from error
