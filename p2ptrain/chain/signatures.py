"""Peer ids and hashes as they stand in seals, and signatures that are checked from a peer id alone.

A libp2p peer id of an Ed25519 key is the public key itself behind a six-byte header, so a signature needs no key beside
the 38-byte id of its signer (https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md). The run's owner and an
invitation's token have ids of this form too, though no peer has them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta

HASH_BYTES = 32
PEER_ID_BYTES = 38
SIGNATURE_BYTES = 64
# An "identity" multihash (code 0, length 36) of a protobuf message: field 1 (key type) = 1 (Ed25519), field 2 the key.
PEER_ID_HEADER = b"\x00\x24\x08\x01\x12\x20"
# libp2p's handshake signs with the same key; the prefix keeps a signature made here from ever meaning anything there.
SIGNATURE_DOMAIN = b"p2ptrain signature 1\0"

Hash = Annotated[bytes, Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
PeerId = Annotated[bytes, Meta(min_length=34, max_length=64)]
Signature = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


def id_of_key(public_key: bytes) -> bytes:
    """Return the id [38 bytes] of an Ed25519 public key [32 bytes]."""
    return PEER_ID_HEADER + public_key


def is_ed25519_peer_id(peer_id: bytes) -> bool:
    """Whether `peer_id` [38 bytes] carries its Ed25519 public key."""
    return len(peer_id) == PEER_ID_BYTES and peer_id.startswith(PEER_ID_HEADER)


@lru_cache(maxsize=1024)
def _public_key(peer_id: bytes) -> Ed25519PublicKey:
    """Raises ValueError. Kept, since members sign again and again, and this is a third of a check."""
    return Ed25519PublicKey.from_public_bytes(peer_id[len(PEER_ID_HEADER) :])


def verify(peer_id: bytes, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is that of the owner of `peer_id` over `data`; False for any malformed input."""
    if not is_ed25519_peer_id(peer_id) or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        _public_key(peer_id).verify(signature, SIGNATURE_DOMAIN + data)
    except (InvalidSignature, ValueError):
        return False
    return True
