"""What members and reducers sign, and what convicts a reducer that did not sum what it was sent (rule 14).

A member signs what it contributes to a part. The reducer's reply names, by a digest, exactly the contributions that it
summed, and the reducer signs both together: the reply's *attestation*. Whoever has those contributions can repeat the
sum. One that comes out differently is a *proof*: it holds all that it takes to check it, and is checked by everyone
from the run's id and codec alone, wherever they stand on the chain.

No honest reducer can be convicted, whatever it forgot, crashed at, or was sent: what it signs is what `reduce_part`
makes of contributions whose signatures and form it has checked, and everybody's `reduce_part` makes the same. It need
not remember what it signed. Two different replies of one reducer for the same part are no proof, because a reducer that
lost its disk, or whose chain forked back, may honestly make a second one.

Cost: 64 bytes a contribution, 96 a reply, a signature for each to make and to check. A proof is as long as the
contributions to its part; of parts that took more than `PROOF_MAX_BYTES` there is none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from p2ptrain.chain.seal import MEMBERS_MAX, PROOF_MAX_BYTES, Key, Row, Verify
from p2ptrain.chain.signatures import HASH_BYTES, SIGNATURE_BYTES, Hash, PeerId, Signature
from p2ptrain.chain.state import PARTS_MAX, Group, RoundShape
from p2ptrain.compression import decoded, wire
from p2ptrain.compression.codec import Codec
from p2ptrain.compression.reduce import reduce_part

ATTESTATION_BYTES = HASH_BYTES + SIGNATURE_BYTES
_MESSAGE_MAX_BYTES = 256
"""Of a message, and of what msgpack adds to a payload."""
_PEER_MAX_BYTES = 72

Sign = Callable[[bytes], bytes]


class EvidenceError(ValueError):
    """Bytes that are not what they should be, or that convict nobody."""


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of what is sent: arrays, of exactly their fields."""


class SignedMessage(_Wire, frozen=True):
    """What a member signed of its message to one part, as the reducer passes it on."""

    member: Annotated[int, Meta(ge=0, lt=MEMBERS_MAX)]
    row: Row
    payload: Hash
    """SHA-256 of the payload; of no bytes where the weight is 0."""
    signature: Signature


class Bundle(_Wire, frozen=True):
    """What a reducer shows an auditor: the contributions that it summed, in members' order."""

    messages: Annotated[tuple[SignedMessage, ...], Meta(max_length=MEMBERS_MAX)]
    payloads: Annotated[tuple[bytes, ...], Meta(max_length=MEMBERS_MAX)]


class Proof(_Wire, frozen=True):
    """What convicts a reducer."""

    reducer: PeerId
    round: Annotated[int, Meta(ge=1, le=2**48)]
    base: Hash
    part: Annotated[int, Meta(ge=0, lt=MEMBERS_MAX + PARTS_MAX)]
    group: Group
    """The members of the round."""
    reply: bytes
    """With its attestation."""
    bundle: Bundle


class Contribution(NamedTuple):
    """One member's message to a part that we reduce; it has passed `check_contribution`."""

    member: int
    row: Row
    payload: bytes
    signature: bytes


Verdict = Literal["right", "wrong", "withheld", "skipped"]
"""Of an audit: `withheld` when what came is not what the reply's attestation names, or nothing came; `skipped` when
nothing was asked for."""
AUDITED_SHARE = 0.04
"""What audits may take of the bytes of contributions and replies."""

_bundle_decoder = msgspec.msgpack.Decoder(Bundle)
_proof_decoder = msgspec.msgpack.Decoder(Proof)
_encode = msgspec.msgpack.encode


# ---- contributions --------------------------------------------------------------------------------------------------


def contribution_digest(run_id: bytes, key: Key, part: int, row: Row, payload_sha256: bytes) -> bytes:
    """Return what the sender of a message to a part signs."""
    said = _encode((run_id, key.round, key.base, part, row, payload_sha256))
    return hashlib.sha256(b"p2ptrain contribution 1\0" + said).digest()


def sign_contribution(sign: Sign, run_id: bytes, key: Key, part: int, row: Row, payload: bytes) -> bytes:
    """Sign a message to a part."""
    return sign(contribution_digest(run_id, key, part, row, hashlib.sha256(payload).digest()))


def check_contribution(
    peer: bytes, signature: bytes, run_id: bytes, key: Key, part: int, row: Row, payload: bytes, verify: Verify
) -> bool:
    """Say whether `peer` signed this message."""
    digest = hashlib.sha256(payload).digest()
    return verify(peer, contribution_digest(run_id, key, part, row, digest), signature)


# ---- replies --------------------------------------------------------------------------------------------------------


def group_digest(group: Group) -> bytes:
    """Return what an attestation names the members of a round by: their peer ids in order, and how much each counts."""
    return hashlib.sha256(b"p2ptrain members 2\0" + _encode(group)).digest()


def inputs_digest(messages: Sequence[SignedMessage]) -> bytes:
    """Return what an attestation names the contributions by that were summed."""
    return hashlib.sha256(b"p2ptrain inputs 1\0" + _encode(tuple(messages))).digest()


def _attested(run_id: bytes, key: Key, part: int, group: Group, body: bytes, inputs: bytes) -> bytes:
    said = _encode((run_id, key.round, key.base, part, group_digest(group), hashlib.sha256(body).digest(), inputs))
    return hashlib.sha256(b"p2ptrain attestation 1\0" + said).digest()


def body_of(reply: bytes) -> bytes:
    """Return a reply without its attestation: what `wire.decode_reply` reads."""
    return reply[:-ATTESTATION_BYTES]


def reply_max_bytes(codec: Codec, start: int, end: int, members: int) -> int:
    """Return the largest length of a reply with its attestation, in bytes."""
    return wire.reply_max_bytes(codec, start, end, members) + ATTESTATION_BYTES


def attest(
    sign: Sign,
    run_id: bytes,
    key: Key,
    part: int,
    group: Group,
    body: bytes,
    messages: Sequence[SignedMessage],
) -> bytes:
    """Return a reply: `body` and the reducer's signature over it and over what it is the sum of."""
    inputs = inputs_digest(messages)
    return body + inputs + sign(_attested(run_id, key, part, group, body, inputs))


def check_attestation(
    reply: bytes, reducer: bytes, run_id: bytes, key: Key, part: int, group: Group, verify: Verify
) -> None:
    """Check that `reducer` made this reply for this part of a round of these members.

    Raises:
        EvidenceError: it did not.
    """
    body, tail = body_of(reply), reply[-ATTESTATION_BYTES:]
    inputs, signature = tail[:HASH_BYTES], tail[HASH_BYTES:]
    signed = _attested(run_id, key, part, group, body, inputs)
    if len(tail) != ATTESTATION_BYTES or not verify(reducer, signed, signature):
        raise EvidenceError("a reply that its reducer has not signed")


def reduce_and_attest(
    contributions: Sequence[Contribution],
    codec: Codec,
    start: int,
    end: int,
    *,
    sign: Sign,
    run_id: bytes,
    key: Key,
    part: int,
    group: Group,
) -> tuple[bytes, Bundle]:
    """Return the reply of a part, and what an auditor may ask for.

    Args:
        contributions: in members' order; those that are malformed are left out.
        group: the round's members.
    """
    good = [one for one in contributions if well_formed(codec, start, end, one.row.weight, one.payload)]
    summed = [(one.member, one.row.weight, one.payload) for one in good]
    body = reduce_part(summed, codec, start, end, len(group.peer_ids), group.standing)
    messages = tuple(
        SignedMessage(one.member, one.row, hashlib.sha256(one.payload).digest(), one.signature) for one in good
    )
    reply = attest(sign, run_id, key, part, group, body, messages)
    return reply, Bundle(messages, tuple(one.payload for one in good))


def well_formed(codec: Codec, start: int, end: int, weight: int, payload: bytes) -> bool:
    """Say whether a payload is one for chunks [start, end), or none where the weight is 0."""
    if bool(payload) != bool(weight):
        return False
    if not payload:
        return True
    try:
        decoded.contribution(payload, codec, start, end)
    except wire.WireError:
        return False
    return True


# ---- audits ---------------------------------------------------------------------------------------------------------


def audit(
    reply: bytes, bundle: bytes, codec: Codec, shape: RoundShape, part: int, run_id: bytes, verify: Verify
) -> tuple[Verdict, bytes]:
    """Judge the reply of a part by what its reducer shows; return the proof as well where the reply is wrong.

    Args:
        reply: has passed `check_attestation`.
        bundle: encoded, as it came from the reducer.
    """
    try:
        shown = _bundle_decoder.decode(bundle)
    except msgspec.MsgspecError:
        return "withheld", b""
    reducer = shape.members[shape.parts[part].reducer].peer_id
    proof = Proof(reducer, shape.round, shape.base, part, shape.group, reply, shown)
    try:
        _check_named(proof)
    except EvidenceError:
        return "withheld", b""
    if _fault(proof, run_id, codec, verify) is None:
        return "right", b""
    return "wrong", _encode(proof)


def audits_a_part(codec: Codec) -> float:
    """Return how many audits of each part of a round all members together may make.

    A round of n members carries n - 1 contributions and as many replies of each part, an audit n contributions, and
    n - 1 of n members draw one. So at an expected Q of each part they take Q c / (c + r) of a round's bytes.
    """
    contribution = wire.contribution_max_bytes(codec, 0, codec.chunks)
    reply = wire.reply_max_bytes(codec, 0, codec.chunks, 1)
    return min(1.0, AUDITED_SHARE * (contribution + reply) / contribution)


def encode_proof(proof: Proof) -> bytes:
    """Encode a proof; one that convicts nobody, too."""
    return _encode(proof)


def encode_bundle(bundle: Bundle) -> bytes:
    """Encode what a reducer shows."""
    return _encode(bundle)


def bundle_max_bytes(codec: Codec, start: int, end: int, members: int) -> int:
    """Return the largest length of a bundle for chunks [start, end) of a round with `members` members, in bytes."""
    return 16 + members * (wire.contribution_max_bytes(codec, start, end) + _MESSAGE_MAX_BYTES)


def may_be_proven(codec: Codec, start: int, end: int, members: int) -> bool:
    """Say whether a proof about such a part is always short enough to count: else there is no use in an audit."""
    reply = reply_max_bytes(codec, start, end, members)
    longest = bundle_max_bytes(codec, start, end, members) + reply + members * _PEER_MAX_BYTES + 256
    return longest <= PROOF_MAX_BYTES


def read_proof(encoded: bytes) -> Proof:
    """Decode a proof, without checking what it says. Raises EvidenceError."""
    try:
        return _proof_decoder.decode(encoded)
    except msgspec.MsgspecError as error:
        raise EvidenceError(f"not a proof: {error}") from error


def open_proof(encoded: bytes, run_id: bytes, codec: Codec, verify: Verify) -> Proof:
    """Check a proof; return it.

    Raises:
        EvidenceError: it convicts nobody.
    """
    if len(encoded) > PROOF_MAX_BYTES:
        raise EvidenceError(f"a proof of {len(encoded)} bytes")
    proof = read_proof(encoded)
    if _encode(proof) != encoded:
        raise EvidenceError("a proof that is not in canonical form")
    if len(proof.group.peer_ids) != len(proof.group.standing):
        raise EvidenceError("a proof about members of no standing")
    key = Key(proof.round, proof.base)
    check_attestation(proof.reply, proof.reducer, run_id, key, proof.part, proof.group, verify)
    _check_named(proof)
    if _fault(proof, run_id, codec, verify) is None:
        raise EvidenceError("a proof of a reply that is right")
    return proof


def _check_named(proof: Proof) -> None:
    """Check that these are the contributions that the reply names. Raises EvidenceError."""
    messages, payloads = proof.bundle.messages, proof.bundle.payloads
    if inputs_digest(messages) != proof.reply[-ATTESTATION_BYTES:-SIGNATURE_BYTES]:
        raise EvidenceError("other contributions than the reply names")
    digests = [hashlib.sha256(payload).digest() for payload in payloads]
    if [message.payload for message in messages] != digests:
        raise EvidenceError("other payloads than were signed")


def _fault(proof: Proof, run_id: bytes, codec: Codec, verify: Verify) -> str | None:
    """Return what is wrong with the reply, given that it names these contributions; None: nothing.

    What is asked here is what `Answering` and `reduce_and_attest` see to before they sign.
    """
    body, members = body_of(proof.reply), proof.group.peer_ids
    messages, payloads = proof.bundle.messages, proof.bundle.payloads
    try:
        start, end = wire.reply_chunks(body)
    except wire.WireError:
        return None  # nobody takes it for a reply
    if not start < end <= codec.chunks:
        return None  # nor this one, of another run's model
    order = [message.member for message in messages]
    if order != sorted(set(order)) or (order and order[-1] >= len(members)):
        return "it names members that are not there"
    key = Key(proof.round, proof.base)
    for message, payload in zip(messages, payloads, strict=True):
        signed = contribution_digest(run_id, key, proof.part, message.row, message.payload)
        if not verify(members[message.member], signed, message.signature):
            return "it names a contribution that its sender has not signed"
        if not well_formed(codec, start, end, message.row.weight, payload):
            return "it names a contribution that is malformed"
    summed = [(s.member, s.row.weight, payload) for s, payload in zip(messages, payloads, strict=True)]
    if reduce_part(summed, codec, start, end, len(members), proof.group.standing) != body:
        return "it is not the sum of what it names"
    return None
