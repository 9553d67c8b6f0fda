"""Sealed rounds as bytes, in the journal and on the wire, and what must be true of their replies.

What arrives is checked in the order of cost: form, signature, length and hash of each reply, and only then its content.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from p2ptrain import chain
from p2ptrain.chain import ChainState, RoundShape, SealError, SignedSeal, Verify
from p2ptrain.chain.seal import Seal
from p2ptrain.compression import decoded, wire
from p2ptrain.compression.codec import Codec


@dataclass(frozen=True, slots=True)
class Key:
    """What everything of a round is filed under: the round and id(t-2)."""

    round: int
    base: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """What a reducer froze for one part; the same bytes to everyone."""

    digest: bytes
    included: frozenset[int]
    data: bytes


@dataclass(frozen=True, slots=True)
class SealedRound:
    """A seal with every reply that it names: what the journal keeps and what donors hand out."""

    id: bytes
    seal: Seal
    signed: SignedSeal
    replies: tuple[bytes | None, ...]
    """One per part of the round's partition; None where the seal says SKIP."""


class SealedRoundError(ValueError):
    """A sealed round that is malformed, or whose replies are not those that it names."""


class _Encoded(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    signed: SignedSeal
    replies: Annotated[tuple[bytes | None, ...], Meta(max_length=chain.MEMBERS_MAX)]


_decoder = msgspec.msgpack.Decoder(_Encoded)


def reply_digest(data: bytes) -> bytes:
    """What a seal names a reply by."""
    return hashlib.sha256(b"p2ptrain reply 1\0" + data).digest()


def make_reply(data: bytes, codec: Codec, shape: RoundShape, part: int) -> Reply:
    """Check a reply's bytes for one part of a round.

    Raises:
        SealedRoundError: not a well-formed reply of that part.
    """
    spec = shape.parts[part]
    try:
        content = decoded.reply(data, codec, spec.start, spec.end, len(shape.members))
    except wire.WireError as error:
        raise SealedRoundError(str(error)) from error
    return Reply(reply_digest(data), content.included, data)


def encode_sealed(sealed: SealedRound) -> bytes:
    """Inverse of `decode_sealed`."""
    return msgspec.msgpack.encode(_Encoded(sealed.signed, sealed.replies))


def decode_sealed(data: bytes, verify: Verify) -> SealedRound:
    """Check form, signature and reply hashes. Whether it continues a chain is for `chain.extend` to say.

    Raises:
        SealedRoundError: malformed, refused by `chain.open_seal`, or with other replies than it names.
    """
    try:
        encoded = _decoder.decode(data)
        identifier, seal = chain.open_seal(encoded.signed, verify)
    except (msgspec.MsgspecError, SealError) as error:
        raise SealedRoundError(f"not a sealed round: {error}") from error
    if len(encoded.replies) != len(seal.parts):
        raise SealedRoundError("a sealed round with the wrong number of replies")
    for digest, reply in zip(seal.parts, encoded.replies, strict=True):
        if (reply is None) != (digest == b"") or (reply is not None and reply_digest(reply) != digest):
            raise SealedRoundError("a sealed round with other replies than its seal names")
    return SealedRound(identifier, seal, encoded.signed, encoded.replies)


def check_replies(sealed: SealedRound, codec: Codec, shape: RoundShape) -> None:
    """Decode every reply once, so that applying the round cannot fail later.

    Raises:
        SealedRoundError: malformed, or including others than the seal says.
    """
    included: frozenset[int] = frozenset()
    for part, data in enumerate(sealed.replies):
        if data is not None:
            included |= make_reply(data, codec, shape, part).included
    if chain.bits(sealed.seal.included, len(shape.members)) != included:
        raise SealedRoundError("the seal includes others than its replies do")


def check_continues(state: ChainState, sealed: SealedRound, codec: Codec) -> ChainState:
    """The chain after `sealed`, whose replies are checked too.

    Raises:
        SealedRoundError: it does not continue `state`, or a reply is malformed.
    """
    shape = chain.shape_of(state, codec.chunks)
    try:
        following = chain.extend(state, sealed.id, sealed.seal, codec.chunks)
    except SealError as error:
        raise SealedRoundError(str(error)) from error
    check_replies(sealed, codec, shape)
    return following
