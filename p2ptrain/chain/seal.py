"""Seals: the signed record of what one round decided, its form, its id and its bitmaps.

Each seal names its parent, so a tip names a whole history. What follows from a list of seals is in `state.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from p2ptrain.chain.admission import AMENDMENTS_MAX, Statement
from p2ptrain.chain.signatures import HASH_BYTES, Hash, PeerId
from p2ptrain.compression import bitmaps

SEAL_VERSION = 1
MEMBERS_MAX = 1024
JOINS_MAX = 32  # newcomers one seal may admit
PROOFS_MAX = 2  # reducers one seal may expel
PROOF_MAX_BYTES = 8 * 1024 * 1024
SEAL_MAX_BYTES = 256 * 1024
UPLINK_MAX_KBIT = 10_000_000
SEQUENCES_PER_KILOSECOND_MAX = 1_000_000_000

OptionalHash = Annotated[bytes, Meta(max_length=HASH_BYTES)]
OptionalPeerId = Annotated[bytes, Meta(max_length=64)]


class SealError(ValueError):
    """A seal that no honest peer would have made, or that does not continue the chain it was checked against."""


@dataclass(frozen=True, slots=True)
class Key:
    """What everything of a round is filed under: the round and id(t-2)."""

    round: int
    base: bytes


class Row(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a member said of itself with its last contribution."""

    weight: Annotated[int, Meta(ge=0, le=1_000_000)]
    """Sequences behind the contribution."""
    sequences_per_kilosecond: Annotated[int, Meta(ge=0, le=SEQUENCES_PER_KILOSECOND_MAX)]
    """Sequences computed in 1000 seconds."""
    uplink_kbit: Annotated[int, Meta(ge=0, le=UPLINK_MAX_KBIT)]
    """Upload rate, in kbit/s; 0: this peer cannot be dialled, so it reduces nothing."""


class Join(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A newcomer that a seal admits; a member from two rounds later."""

    peer_id: PeerId
    row: Row


class Expulsion(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A reducer that a seal expels."""

    peer_id: PeerId
    proof: Hash
    """Of the proof that convicts it, which travels with the sealed round."""


class Seal(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The record of what one round decided. Its id is the hash of its encoding, its signature apart."""

    version: int
    run_id: Hash
    round: Annotated[int, Meta(ge=1, le=2**48)]
    parent: Hash
    total: Annotated[int, Meta(ge=0, le=2**62)]
    sealer: PeerId
    solo: bool
    included: Annotated[bytes, Meta(max_length=MEMBERS_MAX // 8)]
    parts: Annotated[tuple[OptionalHash, ...], Meta(max_length=MEMBERS_MAX)]
    rows: Annotated[tuple[Row, ...], Meta(max_length=MEMBERS_MAX)]
    joins: Annotated[tuple[Join, ...], Meta(max_length=JOINS_MAX)]
    root: OptionalHash
    amendments: Annotated[tuple[Statement, ...], Meta(max_length=AMENDMENTS_MAX)] = ()
    """Whom this seal lets in and shuts out."""
    expelled: Annotated[tuple[Expulsion, ...], Meta(max_length=PROOFS_MAX)] = ()
    accused: OptionalPeerId = b""
    """A member that owes the sealer an audit's answer; empty: none."""


class SignedSeal(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A seal as it travels: the encoded body that was hashed, and the sealer's signature over its id."""

    body: Annotated[bytes, Meta(max_length=SEAL_MAX_BYTES)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


Verify = Callable[[bytes, bytes, bytes], bool]
"""(peer id, data, signature) -> whether that peer signed that data."""

_seal_decoder = msgspec.msgpack.Decoder(Seal)
_signed_decoder = msgspec.msgpack.Decoder(SignedSeal)


def proof_digest(encoded: bytes) -> bytes:
    """Return what a seal names a proof by."""
    return hashlib.sha256(b"p2ptrain proof 1\0" + encoded).digest()


def seal_id(body: bytes) -> bytes:
    """Id of the seal encoded in `body`."""
    return hashlib.sha256(b"p2ptrain seal 1\0" + body).digest()


def encode_seal(seal: Seal, sign: Callable[[bytes], bytes]) -> SignedSeal:
    """Encode and sign a seal."""
    body = msgspec.msgpack.encode(seal)
    return SignedSeal(body, sign(seal_id(body)))


def open_seal(signed: SignedSeal, verify: Verify) -> tuple[bytes, Seal]:
    """Check the form and the signature of a seal; returns its id and content.

    Raises:
        SealError: not canonical, not a seal, or not signed by the sealer that it names.
    """
    try:
        seal = _seal_decoder.decode(signed.body)
    except msgspec.MsgspecError as error:
        raise SealError(f"not a seal: {error}") from error
    if msgspec.msgpack.encode(seal) != signed.body:
        raise SealError("seal is not in canonical form")
    identifier = seal_id(signed.body)
    if not verify(seal.sealer, identifier, signed.signature):
        raise SealError("seal is not signed by its sealer")
    return identifier, seal


def decode_signed_seal(data: bytes) -> SignedSeal:
    """Parse a signed seal from the wire.

    Raises:
        SealError: malformed.
    """
    try:
        return _signed_decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise SealError(f"not a signed seal: {error}") from error


def bitmap(indices: Iterable[int], size: int) -> bytes:
    """Pack member indices into a bitmap of `size` bits."""
    return bitmaps.pack(indices, size)


def bits(packed: bytes, size: int) -> frozenset[int]:
    """Unpack a bitmap of `size` members. Raises SealError: another length, or a bit set beyond `size`."""
    try:
        return bitmaps.unpack(packed, size)
    except ValueError as error:
        raise SealError(str(error)) from error
