"""Claims about what convicts a reducer: that each lie about a sum does, and that nothing else ever does."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import identity_of

from p2ptrain import chain
from p2ptrain.chain import ChainState, Key, Member, RoundShape, Row, evidence
from p2ptrain.chain.evidence import Bundle, Contribution, EvidenceError, Proof, SignedMessage
from p2ptrain.compression import coding, wire
from p2ptrain.compression.codec import Codec
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.swarm.identity import Identity, verify

RUN_ID = hashlib.sha256(b"run").digest()
MEMBERS = sorted((identity_of(name) for name in ("ada", "grace", "linus", "barbara")), key=lambda one: one.peer_id)
CHUNKS = 4
CODEC = Codec((4,) * CHUNKS, (6,) * CHUNKS, 2, clip_ratio=1.5, weight_cap_ratio=4.0)
PART = 1


def shape_of(members: Sequence[Identity] = MEMBERS, uplink: int = 100) -> RoundShape:
    """Round 11, of as many parts as members."""
    group = tuple(Member(one.peer_id, Row(4, 1000, uplink), 0, True, standing=2 + n) for n, one in enumerate(members))
    state = ChainState(RUN_ID, 10, hashlib.sha256(b"10").digest(), hashlib.sha256(b"9").digest(), 40, group, group)
    return chain.shape_of(state, CHUNKS)


SHAPE = shape_of()
KEY = Key(SHAPE.round, SHAPE.base)
SPEC = SHAPE.parts[PART]
IDS = [member.peer_id for member in SHAPE.members]
REDUCER = MEMBERS[SPEC.reducer]


def payload_of(seed: int) -> bytes:
    """Well-formed, for the part."""
    rng = np.random.default_rng(seed)
    chunks = range(SPEC.start, SPEC.end)
    index = np.concatenate([np.sort(rng.choice(64, 4, replace=False)) for _ in chunks])
    scale = np.repeat(coding.scale_table()[rng.integers(150, 200, len(chunks))], 4)
    levels = np.tile([coding.LEVELS_2BIT[0], coding.LEVELS_2BIT[1]] * 2, len(chunks))
    value = (scale * levels * rng.choice([-1, 1], len(index))).astype(np.float32)
    sent = wire.Coefficients(SPEC.start, SPEC.end, np.repeat(np.array(chunks), 4), index, value)
    return wire.encode_contribution(sent, CODEC)


def sent_by(member: int, payload: bytes, weight: int = 4) -> Contribution:
    row = Row(weight, 1000, 100)
    signature = evidence.sign_contribution(MEMBERS[member].sign, RUN_ID, KEY, PART, row, payload)
    return Contribution(member, row, payload, signature)


HONEST = [sent_by(member, payload_of(member)) for member in range(3)] + [sent_by(3, b"", weight=0)]


def reduced(contributions: Sequence[Contribution] = HONEST) -> tuple[bytes, Bundle]:
    return evidence.reduce_and_attest(
        contributions,
        CODEC,
        SPEC.start,
        SPEC.end,
        sign=REDUCER.sign,
        run_id=RUN_ID,
        key=KEY,
        part=PART,
        group=SHAPE.group,
    )


def lie(bundle: Bundle, body: bytes) -> bytes:
    return evidence.attest(REDUCER.sign, RUN_ID, KEY, PART, SHAPE.group, body, bundle.messages)


def audited(reply: bytes, bundle: Bundle) -> tuple[str, bytes]:
    encoded = evidence.encode_bundle(bundle)
    return evidence.audit(reply, encoded, CODEC, SHAPE, PART, RUN_ID, verify)


def proof_of(reply: bytes, bundle: Bundle, **changes: Any) -> bytes:
    proof = Proof(REDUCER.peer_id, KEY.round, KEY.base, PART, SHAPE.group, reply, bundle)
    return evidence.encode_proof(msgspec.structs.replace(proof, **changes))


def open_proof(encoded: bytes, run_id: bytes = RUN_ID) -> Proof:
    return evidence.open_proof(encoded, run_id, CODEC, verify)


def body_of_sum(bundle: Bundle, payloads: Sequence[bytes]) -> bytes:
    summed = [(said.member, said.row.weight, data) for said, data in zip(bundle.messages, payloads, strict=True)]
    return reduce_part(summed, CODEC, SPEC.start, SPEC.end, len(IDS), SHAPE.group.standing)


def flipped() -> tuple[bytes, Bundle]:
    """A reply of other numbers than those that it names."""
    _, bundle = reduced()
    others = [payload_of(10 + number) if data else b"" for number, data in enumerate(bundle.payloads)]
    return lie(bundle, body_of_sum(bundle, others)), bundle


# ---- nobody honest is convicted ------------------------------------------------------------------------------------


some_contributions = st.lists(
    st.tuples(st.sampled_from(["work", "nothing", "noise", "cut"]), st.integers(0, 2**32 - 1), st.integers(1, 9)),
    min_size=4,
    max_size=4,
)


@given(sent=some_contributions, there=st.sets(st.integers(0, 3)))
@settings(max_examples=60, deadline=None)
def test_whatever_members_send_a_reducer_that_sums_it_is_right(
    sent: list[tuple[str, int, int]], there: set[int]
) -> None:
    """Malformed payloads too: what comes a round early is signed, and its form is looked at no sooner than here."""
    contributions = []
    for member in sorted(there):
        kind, seed, weight = sent[member]
        payload = {"work": payload_of(seed), "noise": seed.to_bytes(40), "cut": payload_of(seed)[:-3], "nothing": b""}
        contributions.append(sent_by(member, payload[kind], weight if kind != "nothing" else 0))
    reply, bundle = reduced(contributions)
    evidence.check_attestation(reply, REDUCER.peer_id, RUN_ID, KEY, PART, SHAPE.group, verify)
    assert audited(reply, bundle) == ("right", b"")
    with pytest.raises(EvidenceError, match="right"):
        open_proof(proof_of(reply, bundle))


def _without_the_last(bundle: Bundle) -> Bundle:
    return Bundle(bundle.messages[:-1], bundle.payloads[:-1])


def _of_other_payloads(bundle: Bundle) -> Bundle:
    return Bundle(bundle.messages, (payload_of(99), *bundle.payloads[1:]))


def _of_another_weight(bundle: Bundle) -> Bundle:
    first = msgspec.structs.replace(bundle.messages[0], row=Row(1, 1000, 100))
    return Bundle((first, *bundle.messages[1:]), bundle.payloads)


def _unsigned(bundle: Bundle) -> Bundle:
    first = msgspec.structs.replace(bundle.messages[0], signature=bytes(64))
    return Bundle((first, *bundle.messages[1:]), bundle.payloads)


def _with_a_payload_too_many(bundle: Bundle) -> Bundle:
    return Bundle(bundle.messages, (*bundle.payloads, b""))


@pytest.mark.parametrize(
    "altered",
    [_without_the_last, _of_other_payloads, _of_another_weight, _unsigned, _with_a_payload_too_many],
    ids=lambda change: change.__name__[1:],
)
def test_who_alters_what_was_summed_convicts_nobody(altered: Any) -> None:
    reply, bundle = reduced()
    assert audited(reply, altered(bundle)) == ("withheld", b"")
    with pytest.raises(EvidenceError):
        open_proof(proof_of(reply, altered(bundle)))


@pytest.mark.parametrize("noise", [b"", b"\x92\x90\x90", b"\xc1" * 50, bytes(1000)])
def test_noise_in_place_of_what_was_summed_is_withholding_it(noise: bytes) -> None:
    reply, _ = reduced()
    assert evidence.audit(reply, noise, CODEC, SHAPE, PART, RUN_ID, verify) == ("withheld", b"")


def test_a_reply_to_the_members_of_another_branch_convicts_nobody() -> None:
    """Two branches may give a round the same key and other members: a reducer may answer on both."""
    reply, bundle = reduced()
    standing = SHAPE.group.standing
    others = [chain.Group(tuple(reversed(IDS)), standing), chain.Group(tuple(IDS), tuple(reversed(standing)))]
    for group in others:
        with pytest.raises(EvidenceError, match="not signed"):
            evidence.check_attestation(reply, REDUCER.peer_id, RUN_ID, KEY, PART, group, verify)
    fewer = chain.Group(tuple(IDS[:-1]), standing[:-1])
    for changes in (*({"group": group} for group in (*others, fewer)), {"part": 0}, {"round": 12}, {"base": bytes(32)}):
        with pytest.raises(EvidenceError, match="not signed"):
            open_proof(proof_of(reply, bundle, **changes))
    with pytest.raises(EvidenceError, match="no standing"):
        open_proof(proof_of(reply, bundle, group=chain.Group(tuple(IDS), standing[:-1])))


def test_two_replies_to_the_same_part_convict_nobody() -> None:
    """After a crash, or back from another branch, an honest reducer may close a part anew, with other messages."""
    for reply, bundle in (reduced(), reduced(HONEST[:2])):
        assert audited(reply, bundle) == ("right", b"")


# ---- every lie is convicted ----------------------------------------------------------------------------------------


def test_a_sum_of_other_numbers_convicts_its_reducer_before_everybody() -> None:
    reply, bundle = flipped()
    verdict, encoded = audited(reply, bundle)
    assert verdict == "wrong"
    assert len(encoded) <= evidence.PROOF_MAX_BYTES
    proof = open_proof(encoded)
    assert (proof.reducer, proof.round, proof.part) == (REDUCER.peer_id, KEY.round, PART)
    assert evidence.read_proof(encoded) == proof


def _one_bit(reply: bytes) -> bytes:
    """The last magnitude of the body."""
    body = bytearray(evidence.body_of(reply))
    body[-1] ^= 1
    return bytes(body)


def test_one_bit_of_difference_is_a_lie() -> None:
    reply, bundle = reduced()
    assert audited(lie(bundle, _one_bit(reply)), bundle)[0] == "wrong"


def test_whom_it_includes_is_part_of_the_sum() -> None:
    """Nobody is listed as present, or left out, against what the reducer has in hand."""
    _, bundle = reduced()
    fewer = Bundle(bundle.messages[:2], bundle.payloads[:2])
    assert audited(lie(bundle, body_of_sum(fewer, fewer.payloads)), bundle)[0] == "wrong"
    assert audited(lie(fewer, body_of_sum(bundle, bundle.payloads)), fewer)[0] == "wrong"


@pytest.mark.parametrize("member", range(4))
def test_a_contribution_that_its_sender_has_not_signed_convicts_the_reducer(member: int) -> None:
    """It is the reducer that must not take it; else it could make up what others sent."""
    row, payload = Row(4, 1000, 100), payload_of(50)
    made_up = Contribution(member, row, payload, REDUCER.sign(b"whatever"))
    if member == SPEC.reducer:
        made_up = made_up._replace(signature=bytes(64))
    contributions = sorted([*(one for one in HONEST if one.member != member), made_up], key=lambda one: one.member)
    reply, bundle = reduced(contributions)
    verdict, encoded = audited(reply, bundle)
    assert verdict == "wrong"
    assert open_proof(encoded).reducer == REDUCER.peer_id


@pytest.mark.parametrize("moved", ["round", "base", "part", "row", "run"])
def test_a_signature_counts_for_one_message_only(moved: str) -> None:
    row, payload, run_id, key, part = Row(4, 1000, 100), payload_of(1), RUN_ID, KEY, PART
    signature = evidence.sign_contribution(MEMBERS[0].sign, run_id, key, part, row, payload)
    said = {"run_id": run_id, "key": key, "part": part, "row": row, "payload": payload, "verify": verify}
    assert evidence.check_contribution(IDS[0], signature, **said)
    assert not evidence.check_contribution(IDS[1], signature, **said)
    assert not evidence.check_contribution(IDS[0], signature, **(said | {"payload": payload_of(2)}))
    other = {
        "round": {"key": replace(key, round=key.round + 1)},
        "base": {"key": replace(key, base=bytes(32))},
        "part": {"part": part + 1},
        "row": {"row": Row(5, 1000, 100)},
        "run": {"run_id": bytes(32)},
    }
    assert not evidence.check_contribution(IDS[0], signature, **(said | other[moved]))


def _twice(bundle: Bundle) -> Bundle:
    return Bundle((bundle.messages[0], *bundle.messages), (bundle.payloads[0], *bundle.payloads))


def _in_another_order(bundle: Bundle) -> Bundle:
    return Bundle(bundle.messages[::-1], bundle.payloads[::-1])


def _of_one_too_many(bundle: Bundle) -> Bundle:
    said = msgspec.structs.replace(bundle.messages[0], member=len(IDS))
    return Bundle((*bundle.messages, said), (*bundle.payloads, bundle.payloads[0]))


@pytest.mark.parametrize("named", [_twice, _in_another_order, _of_one_too_many], ids=lambda one: one.__name__[1:])
def test_a_reply_names_each_contribution_once_and_in_order(named: Any) -> None:
    reply, bundle = reduced()
    bundle = named(bundle)
    assert audited(lie(bundle, evidence.body_of(reply)), bundle)[0] == "wrong"


def test_a_malformed_contribution_must_not_be_named() -> None:
    payload = payload_of(1)[:-1]
    one = sent_by(0, payload)
    message = SignedMessage(0, one.row, hashlib.sha256(payload).digest(), one.signature)
    bundle = Bundle((message,), (payload,))
    assert (
        audited(lie(bundle, reduce_part([], CODEC, SPEC.start, SPEC.end, len(IDS), SHAPE.group.standing)), bundle)[0]
        == "wrong"
    )


# ---- proofs as bytes -----------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_bit_of_a_proof_can_be_another(data: st.DataObject) -> None:
    encoded = bytearray(proof_of(*flipped()))
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(EvidenceError):
        open_proof(bytes(encoded))


def test_a_proof_is_of_one_run_and_one_reducer() -> None:
    encoded = proof_of(*flipped())
    assert open_proof(encoded).reducer == REDUCER.peer_id
    with pytest.raises(EvidenceError, match="not signed"):
        open_proof(encoded, bytes(32))
    with pytest.raises(EvidenceError, match="not signed"):
        open_proof(proof_of(*flipped(), reducer=IDS[0]))


def test_a_proof_that_is_too_long_is_not_read() -> None:
    with pytest.raises(EvidenceError, match="bytes"):
        open_proof(bytes(evidence.PROOF_MAX_BYTES + 1))


def test_a_reply_of_another_model_or_of_none_convicts_nobody() -> None:
    """Nobody takes such bytes for a reply, so nobody is harmed; and no range outside the model is summed."""
    _, bundle = reduced()
    body = bytearray(evidence.body_of(reduced()[0]))
    body[9:13] = (CHUNKS + 1).to_bytes(4, "little")
    for wrong in (bytes(body), b"short"):
        with pytest.raises(EvidenceError, match="right"):
            open_proof(proof_of(lie(bundle, wrong), bundle))


@given(members=st.integers(1, 4), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_no_bundle_or_proof_is_longer_than_its_bound(members: int, seed: int) -> None:
    reply, bundle = reduced([sent_by(member, payload_of(seed + member)) for member in range(members)])
    longest = evidence.bundle_max_bytes(CODEC, SPEC.start, SPEC.end, members)
    assert len(evidence.encode_bundle(bundle)) <= longest
    assert len(reply) <= evidence.reply_max_bytes(CODEC, SPEC.start, SPEC.end, len(IDS))
    assert evidence.may_be_proven(CODEC, SPEC.start, SPEC.end, members)
    assert not evidence.may_be_proven(Codec((4096,) * 4096, (4096,) * 4096, 8), 0, 4096, 2)


def test_audits_are_as_many_as_their_share_of_the_traffic_allows() -> None:
    """Of n members and Q audits a part: Q (n - 1) / n times n contributions, over n - 1 of each and as many replies."""
    for codec in (CODEC, Codec((52,) * 9, (44,) * 9, 2), Codec((4,) * 9, (4,) * 9, 32)):
        contribution = wire.contribution_max_bytes(codec, 0, codec.chunks)
        reply = wire.reply_max_bytes(codec, 0, codec.chunks, 1)
        for members in (2, 3, 50):
            audited_bytes = evidence.audits_a_part(codec) * (members - 1) / members * members * contribution
            assert audited_bytes / ((members - 1) * (contribution + reply)) == pytest.approx(evidence.AUDITED_SHARE)
