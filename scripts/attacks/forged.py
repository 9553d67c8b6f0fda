"""Identities that an attacker makes up."""

from __future__ import annotations

import random
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from p2ptrain.chain import Row
from p2ptrain.swarm.identity import Identity

PEER_ID_HEADER = b"\x00\x24\x08\x01\x12\x20"


def random_row(chance: random.Random, uplink_kbit: int = 0) -> Row:
    """What an honest member of a small swarm may say of itself."""
    return Row(chance.randint(1, 8), chance.randint(1_000, 20_000), uplink_kbit)


def identity_from(chance: random.Random) -> Identity:
    """An identity that follows from the seed."""
    key = Ed25519PrivateKey.from_private_bytes(chance.randbytes(32))
    return Identity(PEER_ID_HEADER + key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw), key)


def key_from(chance: random.Random, path: Path) -> Identity:
    """The same, in a file as libp2p reads it."""
    made = identity_from(chance)
    private = made.key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    path.touch(mode=0o600)
    path.write_bytes(b"\x08\x01\x12\x40" + private + made.peer_id[len(PEER_ID_HEADER) :])
    return made


def made_up_peer_id(chance: random.Random) -> bytes:
    """A peer id whose key nobody needs."""
    return PEER_ID_HEADER + chance.randbytes(32)
