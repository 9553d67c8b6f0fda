"""Whom a chain lets in and shuts out: claims about signed statements, against what was said in which order."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain import chain
from p2ptrain.chain import ChainState, Join, Member, Row, Seal, SealError
from p2ptrain.chain.admission import AMENDMENTS_MAX, INVITED_MAX, Access, AdmissionError, Grant, Revocation, Statement
from p2ptrain.swarm.identity import Identity, new_identity, verify
from p2ptrain.swarm.invitations import invite, read_invitation, revoke

RUN_ID = bytes(range(32))
CHUNKS = 30
OWNER, FOUNDER, LISTED, BOB, CYD, DAN = (new_identity() for _ in range(6))
CLOSED = Access("invite", OWNER.peer_id, (FOUNDER.peer_id, LISTED.peer_id))
ROW = Row(4, 1000, 100)


def grant(guest: Identity, by: Identity = OWNER, **flags: Any) -> Grant:
    return invite(by, RUN_ID, expires=1, **flags).grant(guest.peer_id)


def after(*statements: Statement, access: Access = CLOSED) -> Access:
    for statement in statements:
        access = access.amended(statement, RUN_ID)
    return access


def shut_out(subject: bytes, *, with_guests: bool = False, by: Identity = OWNER) -> Revocation:
    return revoke(by, RUN_ID, subject, with_guests=with_guests)


def test_the_owners_grant_lets_one_peer_in_and_nobody_else() -> None:
    access = after(grant(BOB))
    assert [access.admits(peer.peer_id) for peer in (FOUNDER, LISTED, BOB, CYD)] == [True, True, True, False]
    assert access.guests == {BOB.peer_id} and not CLOSED.guests


def forgeries() -> dict[str, tuple[Statement, str]]:
    good, spent = grant(BOB), invite(OWNER, RUN_ID, expires=1)
    change = msgspec.structs.replace
    for_cyd = invite(OWNER, RUN_ID, expires=1, peer_id=CYD.peer_id)
    return {
        "by a stranger": (grant(BOB, DAN), "may not invite"),
        "by the guest itself": (grant(BOB, BOB), "may not invite"),
        "in the owner's name": (change(grant(BOB, DAN), issued=good.issued), "not signed"),
        "of another guest": (change(good, guest=CYD.peer_id), "not signed"),
        "with a longer life": (change(good, issued=change(good.issued, expires=2**40)), "not signed"),
        "with more uses": (change(good, issued=change(good.issued, uses=9)), "not signed"),
        "with more rights": (change(good, issued=change(good.issued, may_invite=True)), "not signed"),
        "with another token": (change(good, issued=change(good.issued, token=DAN.peer_id)), "not signed"),
        "by another proof": (change(good, proof=spent.grant(BOB.peer_id).proof), "not signed"),
        "for another peer": (for_cyd.grant(BOB.peer_id), "for another peer"),
        "to another run": (invite(OWNER, bytes(32), expires=1).grant(BOB.peer_id), "another run"),
        "of one let in already": (grant(LISTED), "let in already"),
        "of a listed peer that lets others invite": (grant(BOB, LISTED, may_invite=True), "nobody but the owner"),
        "revoked by a member": (shut_out(BOB.peer_id, by=LISTED), "not signed"),
        "revoked in another run": (revoke(OWNER, bytes(32), BOB.peer_id, with_guests=False), "another run"),
    }


@pytest.mark.parametrize("what", forgeries())
def test_what_nobody_who_may_has_signed_does_not_count(what: str) -> None:
    statement, why = forgeries()[what]
    with pytest.raises(AdmissionError, match=why):
        after(statement)


@given(st.data())
def test_a_grant_with_any_bit_changed_lets_nobody_in(data: st.DataObject) -> None:
    encoded = bytearray(msgspec.msgpack.encode(grant(BOB)))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        changed = msgspec.msgpack.decode(bytes(encoded), type=Grant | Revocation)
    except msgspec.MsgspecError:
        return
    if changed != grant(BOB):
        assert CLOSED.refusal(changed, RUN_ID) is not None


def test_a_token_brings_as_many_guests_as_its_pass_says_and_counts_those_shut_out_too() -> None:
    token = invite(OWNER, RUN_ID, expires=1, uses=2)
    access = after(token.grant(BOB.peer_id), token.grant(CYD.peer_id), shut_out(BOB.peer_id))
    with pytest.raises(AdmissionError, match="used up"):
        after(token.grant(DAN.peer_id), access=access)
    with pytest.raises(AdmissionError, match="let in already"):
        after(token.grant(CYD.peer_id), access=access)


def test_a_grant_that_was_revoked_is_not_used_again_and_nor_is_another_of_the_same_peer() -> None:
    first = grant(BOB)
    access = after(first, shut_out(BOB.peer_id))
    assert not access.admits(BOB.peer_id) and access.guests == frozenset()
    for again in (first, grant(BOB)):
        with pytest.raises(AdmissionError, match="revoked it"):
            after(again, access=access)
    with pytest.raises(AdmissionError, match="revoked already"):
        after(shut_out(BOB.peer_id), access=access)


def test_a_token_that_was_revoked_brings_nobody_more_and_keeps_those_it_brought_unless_they_go_with_it() -> None:
    token = invite(OWNER, RUN_ID, expires=1, uses=9)
    for with_guests in (False, True):
        end = shut_out(token.issued.token, with_guests=with_guests)
        access = after(token.grant(BOB.peer_id), end)
        assert access.admits(BOB.peer_id) != with_guests
        assert (access.revocation(BOB.peer_id) == end) == with_guests
        with pytest.raises(AdmissionError, match="revoked it"):
            after(token.grant(CYD.peer_id), access=access)


def test_who_may_invite_may_until_the_owner_shuts_it_out_and_its_guests_may_not() -> None:
    access = after(grant(BOB, may_invite=True))
    of_bob = grant(CYD, BOB)
    with pytest.raises(AdmissionError, match="may not invite"):
        after(of_bob)
    access = after(of_bob, access=access)
    with pytest.raises(AdmissionError, match="may not invite"):
        after(grant(DAN, CYD), access=access)
    with pytest.raises(AdmissionError, match="may not invite"):
        after(grant(DAN, BOB), access=after(shut_out(BOB.peer_id), access=access))
    assert after(shut_out(BOB.peer_id), access=access).guests == {CYD.peer_id}
    assert after(shut_out(BOB.peer_id), shut_out(BOB.peer_id, with_guests=True), access=access).guests == frozenset()


def test_one_member_invites_no_more_than_it_may_and_the_owner_as_many_as_there_is_room_for() -> None:
    for inviter, most in ((LISTED, INVITED_MAX), (OWNER, None)):
        token, access = invite(inviter, RUN_ID, expires=1, uses=1000), CLOSED
        for _ in range(INVITED_MAX):
            access = after(token.grant(new_identity().peer_id), access=access)
        if most is None:
            after(token.grant(new_identity().peer_id), access=access)
        else:
            with pytest.raises(AdmissionError, match="as many as one member may"):
                after(token.grant(new_identity().peer_id), access=access)


def test_a_run_with_a_list_takes_the_owners_invitations_for_one_peer_and_an_open_run_none() -> None:
    listed = Access("list", CLOSED.owner, CLOSED.listed)
    assert after(grant(BOB, peer_id=BOB.peer_id), access=listed).admits(BOB.peer_id)
    for statement, why in ((grant(BOB), "one peer only"), (grant(BOB, LISTED, peer_id=BOB.peer_id), "may not")):
        with pytest.raises(AdmissionError, match=why):
            after(statement, access=listed)
    everyone = Access("open", OWNER.peer_id)
    with pytest.raises(AdmissionError, match="open"):
        after(grant(BOB), access=everyone)
    banned = after(shut_out(BOB.peer_id), access=everyone)
    assert not banned.admits(BOB.peer_id) and banned.admits(CYD.peer_id)


STATEMENTS: list[Statement] = [
    (BOBS := invite(OWNER, RUN_ID, expires=1, uses=2, may_invite=True)).grant(BOB.peer_id),
    BOBS.grant(DAN.peer_id),
    grant(CYD, BOB),
    grant(CYD, LISTED),
    shut_out(BOB.peer_id),
    shut_out(BOB.peer_id, with_guests=True),
    shut_out(BOBS.issued.token, with_guests=True),
    shut_out(LISTED.peer_id, with_guests=True),
]


@given(st.lists(st.sampled_from(STATEMENTS), max_size=12))
def test_what_a_state_says_of_access_can_be_checked_by_itself_and_shut_out_is_for_good(said: list[Statement]) -> None:
    access, out = CLOSED, set[bytes]()
    for statement in said:
        why = access.refusal(statement, RUN_ID)
        if why is None:
            access = access.amended(statement, RUN_ID)
        elif access.has(statement) and isinstance(statement, Revocation):
            assert why == "revoked already"
        if isinstance(statement, Revocation) and why is None:
            out.add(statement.subject)
        assert not any(map(access.admits, out))
        travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(access), type=Access)
        assert travelled == access and travelled.guests == access.guests
        assert travelled.continues(CLOSED, RUN_ID)
        # Without one of its statements, or with one twice, another state comes of it, or none.
        if access.amendments:
            twice = msgspec.structs.replace(access, amendments=access.amendments + access.amendments[:1])
            assert not twice.continues(CLOSED, RUN_ID)
    assert not access.continues(Access("list", CLOSED.owner, CLOSED.listed), RUN_ID)


def test_an_invitation_survives_being_handed_on_as_text_and_no_other_text_is_one() -> None:
    made = invite(OWNER, RUN_ID, expires=5, uses=3, peer_id=BOB.peer_id, may_invite=True)
    text = made.text()
    assert read_invitation(f" {text}\n") == made and text.isalnum()
    for bad in ("", "x", text[:-1], text + "1", text[:50] + ("2" if text[50] != "2" else "3") + text[51:], "1" * 2000):
        with pytest.raises(Exception, match="invitation"):
            read_invitation(bad)


# ---- seals ----------------------------------------------------------------------------------------------------


def member(identity: Identity, *, absent: int = 0, included: bool = True) -> Member:
    return Member(identity.peer_id, ROW, absent, included)


def state(*members: Member, access: Access = CLOSED, round: int = 10) -> ChainState:
    return ChainState(RUN_ID, round, b"h" * 32, b"p" * 32, 40, members, members, access)


def sealed(before: ChainState, *amendments: Statement, by: Identity = FOUNDER, **changes: Any) -> ChainState:
    shape = chain.shape_of(before, CHUNKS)
    seal = Seal(
        version=chain.SEAL_VERSION,
        run_id=RUN_ID,
        round=before.round + 1,
        parent=before.id,
        total=before.total + len(shape.members),
        sealer=by.peer_id,
        solo=False,
        included=chain.bitmap(range(len(shape.members)), len(shape.members)),
        parts=tuple(b"d" * 32 for _ in shape.parts),
        rows=tuple(m.row for m in shape.members),
        joins=(),
        root=b"",
        amendments=amendments,
    )
    signed = chain.encode_seal(msgspec.structs.replace(seal, **changes), by.sign)
    return chain.extend(before, *chain.open_seal(signed, verify), CHUNKS)


def test_a_guest_may_join_by_the_seal_that_lets_it_in_and_not_before() -> None:
    before, join = state(member(FOUNDER), member(LISTED)), (Join(BOB.peer_id, ROW),)
    with pytest.raises(SealError, match="not for"):
        sealed(before, joins=join)
    let_in = sealed(before, grant(BOB), joins=join)
    assert [m.peer_id for m in let_in.following][-1] == BOB.peer_id
    assert sealed(sealed(before, grant(BOB)), joins=join).following == let_in.following


def test_a_revoked_member_is_out_from_the_second_round_on_and_the_round_under_way_goes_on_with_it() -> None:
    before = state(member(FOUNDER), member(LISTED), member(BOB), access=after(grant(BOB)))
    first = sealed(before, shut_out(BOB.peer_id))
    assert chain.shape_of(first, CHUNKS) == chain.coming_shape(before, CHUNKS)
    assert [m.peer_id for m in first.following] == [FOUNDER.peer_id, LISTED.peer_id]
    # It may still seal the round that it is a member of, but not alone; nor is it let in anew.
    second = sealed(first, by=BOB)
    assert BOB.peer_id not in {m.peer_id for m in second.now + second.following}
    for changes in (
        {"joins": (Join(BOB.peer_id, ROW),)},
        {"by": BOB, "solo": True, "included": b"\x04", "total": first.total + 1},
    ):
        with pytest.raises(SealError, match="not for"):
            sealed(first, **changes)


def test_a_chain_keeps_its_last_member_though_it_was_revoked_until_another_has_had_a_part() -> None:
    alone = sealed(state(member(FOUNDER)), shut_out(FOUNDER.peer_id))
    assert [m.peer_id for m in alone.following] == [FOUNDER.peer_id]
    joined = sealed(alone, joins=(Join(LISTED.peer_id, ROW),))
    # A newcomer may never answer.
    later = sealed(joined)
    assert {m.peer_id for m in later.following} == {FOUNDER.peer_id, LISTED.peer_id}
    assert [m.peer_id for m in sealed(later).following] == [LISTED.peer_id]


def test_a_seal_with_one_statement_that_does_not_count_or_with_too_many_is_refused() -> None:
    before = state(member(FOUNDER))
    for amendments in ((grant(BOB), grant(BOB)), (shut_out(BOB.peer_id), grant(BOB)), (grant(CYD), grant(BOB, DAN))):
        with pytest.raises(SealError, match="does not count"):
            sealed(before, *amendments)
    guests = [grant(new_identity()) for _ in range(AMENDMENTS_MAX + 1)]
    assert len(sealed(before, *guests[:-1]).access.guests) == AMENDMENTS_MAX
    with pytest.raises(SealError, match="not a seal"):
        sealed(before, *guests)


def test_a_full_chain_of_guests_fits_into_a_snapshots_state() -> None:
    token = invite(OWNER, RUN_ID, expires=2**40, uses=1024, may_invite=True)
    guests = tuple(token.grant(DAN.peer_id[:30] + n.to_bytes(8)) for n in range(1024))
    revocations = tuple(shut_out(DAN.peer_id[:30] + n.to_bytes(8), with_guests=True) for n in range(1024))
    members = tuple(Member(DAN.peer_id[:30] + n.to_bytes(8), ROW, 0, True) for n in range(1024))
    full = state(*members, access=Access("invite", OWNER.peer_id, CLOSED.listed, guests + revocations))
    assert len(msgspec.msgpack.encode(full)) < 1024 * 1024
