"""Seals: the coordinator's Ed25519 signatures under the heads of a chain, so that nobody else can make history.

A head stands for every entry before it, so one seal proves all of them. What is signed names the chain by its
genesis, which follows from the run id and the agent: a seal of another run, agent or round is none here. The public key
is in the manifest, and so in the run id of every ticket. The secret key is a file of its own, and not the coordinator's
CURVE key, which whoever relays its connections must have.
"""

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_BYTES: Final = 64
_DOMAIN: Final = b"zo-seal\x01"


class Signer:
    """Who can seal: the holder of a run's secret key.

    Attributes:
        public: hexadecimal, what the manifest names.
    """

    def __init__(self, secret: bytes) -> None:
        """Take a secret key, (32,) bytes."""
        self._key = Ed25519PrivateKey.from_private_bytes(secret)
        self.public = self._key.public_key().public_bytes_raw().hex()

    def seal(self, genesis: bytes, round: int, head: bytes) -> bytes:
        """The signature under a chain's head after `round` entries: (64,) bytes, the same every time (RFC 8032)."""
        return self._key.sign(_signed(genesis, round, head))


def is_sealed(public: str, genesis: bytes, round: int, head: bytes, signature: bytes) -> bool:
    """Whether the holder of a manifest's key signed that a chain has this head after `round` entries.

    Args:
        public: hexadecimal, of the manifest.
        genesis: where the chain begins, (16,) bytes.
        round: entries before the head.
        head: (16,) bytes.
        signature: (64,) bytes; of any other length it is none.
    """
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(
            signature, _signed(genesis, round, head)
        )
    except (InvalidSignature, ValueError):  # ValueError: the key is no point of the curve
        return False
    return True


def _signed(genesis: bytes, round: int, head: bytes) -> bytes:
    """What is signed: parts of fixed length, so that no two chains, rounds or heads give the same bytes."""
    return _DOMAIN + genesis + round.to_bytes(8, "little") + head
