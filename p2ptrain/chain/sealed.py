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
from p2ptrain.chain import ChainState, RoundShape, SealError, SignedSeal, Verify, evidence
from p2ptrain.chain.evidence import EvidenceError
from p2ptrain.chain.seal import Key, Seal, proof_digest
from p2ptrain.compression import decoded, wire
from p2ptrain.compression.codec import Codec


@dataclass(frozen=True, slots=True)
class Reply:
    """What a reducer froze for one part, with its attestation; the same bytes to everyone."""

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
    proofs: tuple[bytes, ...] = ()
    """One for each expulsion that the seal names, in its order."""


class SealedRoundError(ValueError):
    """A sealed round that is malformed, or whose replies are not those that it names."""


class _Encoded(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    signed: SignedSeal
    replies: Annotated[tuple[bytes | None, ...], Meta(max_length=chain.MEMBERS_MAX)]
    proofs: Annotated[tuple[bytes, ...], Meta(max_length=chain.PROOFS_MAX)] = ()


_decoder = msgspec.msgpack.Decoder(_Encoded)


def reply_digest(data: bytes) -> bytes:
    """What a seal names a reply by."""
    return hashlib.sha256(b"p2ptrain reply 1\0" + data).digest()


def make_reply(data: bytes, codec: Codec, shape: RoundShape, part: int, run_id: bytes, verify: Verify) -> Reply:
    """Check a reply's bytes for one part of a round: that its reducer attests to them, and their form.

    Raises:
        SealedRoundError: not a well-formed reply of that part and reducer.
    """
    spec, key = shape.parts[part], Key(shape.round, shape.base)
    try:
        reducer = shape.members[spec.reducer].peer_id
        evidence.check_attestation(data, reducer, run_id, key, part, shape.group, verify)
        content = decoded.reply(evidence.body_of(data), codec, spec.start, spec.end, len(shape.members))
    except (EvidenceError, wire.WireError) as error:
        raise SealedRoundError(str(error)) from error
    return Reply(reply_digest(data), content.included, data)


def encode_sealed(sealed: SealedRound) -> bytes:
    """Inverse of `decode_sealed`."""
    return msgspec.msgpack.encode(_Encoded(sealed.signed, sealed.replies, sealed.proofs))


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
    if [proof_digest(proof) for proof in encoded.proofs] != [one.proof for one in seal.expelled]:
        raise SealedRoundError("a sealed round with other proofs than its seal names")
    return SealedRound(identifier, seal, encoded.signed, encoded.replies, encoded.proofs)


def check_replies(sealed: SealedRound, codec: Codec, shape: RoundShape, verify: Verify) -> None:
    """Decode every reply once, so that applying the round cannot fail later.

    Raises:
        SealedRoundError: malformed, not its reducer's, or including others than the seal says.
    """
    included: frozenset[int] = frozenset()
    for part, data in enumerate(sealed.replies):
        if data is not None:
            included |= make_reply(data, codec, shape, part, sealed.seal.run_id, verify).included
    if chain.bits(sealed.seal.included, len(shape.members)) != included:
        raise SealedRoundError("the seal includes others than its replies do")


def check_proofs(sealed: SealedRound, codec: Codec, verify: Verify) -> None:
    """Check that each proof convicts the peer that the seal expels for it.

    Raises:
        SealedRoundError: one does not.
    """
    for named, encoded in zip(sealed.seal.expelled, sealed.proofs, strict=True):
        try:
            proof = evidence.open_proof(encoded, sealed.seal.run_id, codec, verify)
        except EvidenceError as error:
            raise SealedRoundError(f"a seal expels a peer without proof: {error}") from error
        if proof.reducer != named.peer_id:
            raise SealedRoundError("a seal expels another peer than its proof convicts")


def check_continues(state: ChainState, sealed: SealedRound, codec: Codec, verify: Verify) -> ChainState:
    """The chain after `sealed`, whose replies and proofs are checked too.

    Raises:
        SealedRoundError: it does not continue `state`, a reply is malformed, or a proof convicts nobody.
    """
    shape = chain.shape_of(state, codec.chunks)
    try:
        following = chain.extend(state, sealed.id, sealed.seal, codec.chunks)
    except SealError as error:
        raise SealedRoundError(str(error)) from error
    check_replies(sealed, codec, shape, verify)
    check_proofs(sealed, codec, verify)
    return following
