"""A peer's Ed25519 identity: the key file libp2p reads, and signatures that others check from the peer id alone.

How a signature is checked is in `chain/signatures.py`. What was given up: RSA identities, which hivemind generates by
default, cannot sign anything here.

Cost: a peer id is 38 bytes, a signature 64.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import base58
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from p2ptrain.chain.signatures import PEER_ID_BYTES, SIGNATURE_DOMAIN, id_of_key, is_ed25519_peer_id, verify
from p2ptrain.errors import HomeError

__all__ = [
    "PEER_ID_BYTES",
    "Identity",
    "format_peer_id",
    "identity_of_key",
    "is_ed25519_peer_id",
    "load_or_create_identity",
    "new_identity",
    "parse_peer_id",
    "verify",
]

# Protobuf by hand: field 1 (key type) = 1 (Ed25519), field 2 (data) of 64 bytes.
_PRIVATE_HEADER = b"\x08\x01\x12\x40"


@dataclass(frozen=True)
class Identity:
    """A peer id and the private key behind it."""

    peer_id: bytes
    """38 bytes, as libp2p puts them on the wire."""
    key: Ed25519PrivateKey

    def __repr__(self) -> str:
        return f"Identity({format_peer_id(self.peer_id)})"

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature of `data`, for `verify`."""
        return self.key.sign(SIGNATURE_DOMAIN + data)


def new_identity() -> Identity:
    """A fresh identity, kept in memory only."""
    return identity_of_key(Ed25519PrivateKey.generate())


def load_or_create_identity(path: Path) -> Identity:
    """Reads the key file at `path`, or writes a new one there (mode 0600, never a partial file).

    Two processes that race get the same identity. Raises HomeError when the file is not an Ed25519 key in libp2p's
    format or cannot be read or written.
    """
    try:
        if not path.exists():
            _write_new(path, _encode(Ed25519PrivateKey.generate()))
        data = path.read_bytes()
    except OSError as error:
        raise HomeError(
            f"cannot read or write the identity {path}: {error.strerror}", hint="check who owns the directory"
        ) from error
    if len(data) != 68 or not data.startswith(_PRIVATE_HEADER):
        raise HomeError(
            f"{path} is not an Ed25519 identity",
            hint=f"move it away to get a new peer id: mv {path} {path}.old",
        )
    key = Ed25519PrivateKey.from_private_bytes(data[4:36])
    identity = identity_of_key(key)
    if data[36:] != identity.peer_id[6:]:
        raise HomeError(
            f"{path} is damaged: its two halves do not belong together",
            hint=f"restore it from a copy, or move it away to get a new peer id: mv {path} {path}.old",
        )
    return identity


@lru_cache(maxsize=1024)
def format_peer_id(peer_id: bytes) -> str:
    """The text form, such as 12D3KooW..."""
    return base58.b58encode(peer_id).decode()


def parse_peer_id(text: str) -> bytes:
    """The bytes of a peer id in text form; ValueError unless it is an Ed25519 one."""
    peer_id = base58.b58decode(text)
    if not is_ed25519_peer_id(peer_id):
        raise ValueError(f"{text!r} is not an Ed25519 peer id")
    return peer_id


def identity_of_key(key: Ed25519PrivateKey) -> Identity:
    """Return the identity behind a private key: a peer's, the owner's, or a token's."""
    return Identity(id_of_key(key.public_key().public_bytes_raw()), key)


def _encode(key: Ed25519PrivateKey) -> bytes:
    private = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    return _PRIVATE_HEADER + private + key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def _write_new(path: Path, data: bytes) -> None:
    """Creates `path` with `data` in one step; leaves an existing file as it is."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            # A link, unlike a rename, never replaces the identity that another process has just made.
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink()
