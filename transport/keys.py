"""CURVE key pairs as files that only their owner can read."""

import hashlib
import os
import stat
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from transport.durable import sync_directory


class KeyFileError(RuntimeError):
    """A key file that is missing, malformed or readable by others."""


class KeyPair(msgspec.Struct, frozen=True):
    """A Curve25519 key pair: (32,) bytes each."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public.hex()}, secret=…)"


def new_key_pair() -> KeyPair:
    """A fresh key pair from the system's randomness."""
    public, secret = zmq.curve_keypair()
    return KeyPair(z85.decode(public), z85.decode(secret))


def public_of(secret: bytes) -> bytes:
    """The public key that belongs to a secret key."""
    return z85.decode(zmq.curve_public(z85.encode(secret)))


def invitation_keys(token: bytes) -> KeyPair:
    """The key pair that a ticket's token stands for: whoever has the token passes the handshake with it.

    The coordinator keeps its public key alone, from which nobody finds the token.
    """
    secret = hashlib.blake2b(token, digest_size=32, person=b"zo-invitation").digest()
    return KeyPair(public_of(secret), secret)


def standing_token(secret: bytes) -> bytes:
    """The token of a run's standing invitation, (16,) bytes, from the coordinator's secret key: stored nowhere."""
    return hashlib.blake2b(secret, digest_size=16, person=b"zo-standing").digest()


def save_key(path: Path, pair: KeyPair) -> None:
    """Write the secret key, from which the public one follows, as `save_secret` does."""
    save_secret(path, pair.secret)


def save_secret(path: Path, secret: bytes) -> None:
    """Write a secret key, (32,) bytes, with mode 0600 from its first byte on.

    Raises:
        FileExistsError: there is a file already; keys are never overwritten.
    """
    # Under its name there is the whole key or nothing, whenever this is killed: half a key would be the end of a node.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secret.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # phones and memory cards have no second names for a file
            if path.exists():
                raise FileExistsError(f"{path} exists") from None
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def load_key(path: Path) -> KeyPair:
    """The key pair whose secret key is in `path`. Raises KeyFileError, as `load_secret`."""
    secret = load_secret(path)
    return KeyPair(public_of(secret), secret)


def load_secret(path: Path) -> bytes:
    """The secret key in `path`, (32,) bytes.

    Raises:
        KeyFileError: missing, malformed, or open to others than its owner.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read the key file {path}: {error}") from error
    if mode & 0o077:
        raise KeyFileError(
            f"key file {path} has mode {mode:04o}, others could read it. Run: chmod 600 {path}"
        )
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise KeyFileError(
            f"key file {path} does not hold a key of 64 hexadecimal digits; restore it from a backup"
        )
    return secret


def load_or_make_key(path: Path) -> KeyPair:
    """The key pair in `path`, made there first if there is none."""
    if not path.exists():
        save_key(path, new_key_pair())
    return load_key(path)
