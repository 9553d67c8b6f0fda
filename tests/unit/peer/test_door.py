"""Whom one peer lets in before the chain does: by the grant that is shown to it, its own clock, and for a while."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from p2ptrain import chain
from p2ptrain.chain import ChainState, Member, Row
from p2ptrain.chain.admission import Access, Grant
from p2ptrain.peer.admission import (
    EXPIRED,
    NO_ROOM,
    PROVISIONAL_MAX,
    PROVISIONAL_SECONDS,
    Admission,
    shuts_out,
)
from p2ptrain.swarm.identity import Identity, new_identity
from p2ptrain.swarm.invitations import invite, revoke

RUN_ID = bytes(range(32))
OWNER, ADA, BOB, CYD = (new_identity() for _ in range(4))
EXPIRES = 1000
ROW = Row(4, 1000, 100)


class Door:
    """One peer's admission, with a chain and clocks that a test moves."""

    def __init__(self, mode: Any = "invite", round: int = 5, introducers: frozenset[bytes] = frozenset()) -> None:
        access = Access(mode, OWNER.peer_id, (ADA.peer_id,))
        ada = Member(ADA.peer_id, ROW, 0, True)
        self.head = ChainState(RUN_ID, round, bytes(32), bytes(32), 9, (ada,), (ada,), access)
        self.unix = self.now = 100.0
        self.admission = Admission(lambda: self.head, introducers, lambda: self.unix, lambda: self.now)

    def seal(self, *statements: Any) -> None:
        access = self.head.access
        for statement in statements:
            access = access.amended(statement, RUN_ID)
        self.head = msgspec.structs.replace(self.head, access=access)

    def admits(self, peer: Identity) -> bool:
        return self.admission.admits(peer.peer_id)


def grant(guest: Identity, **flags: Any) -> Grant:
    return invite(OWNER, RUN_ID, expires=EXPIRES, **flags).grant(guest.peer_id)


def test_a_guest_is_let_in_at_once_and_for_a_while_and_by_the_chain_for_good() -> None:
    door = Door()
    assert door.admits(ADA) and not door.admits(BOB)
    assert door.admission.take(grant(BOB)) == ""
    assert door.admits(BOB) and not door.admits(CYD)
    door.now += PROVISIONAL_SECONDS
    assert not door.admits(BOB), "no seal has let it in"
    shown = grant(BOB)
    assert door.admission.take(shown) == ""
    door.seal(shown)
    door.now += PROVISIONAL_SECONDS
    assert door.admits(BOB) and door.admission.take(shown) == ""


def test_an_invitation_that_has_expired_by_this_peers_clock_is_not_taken() -> None:
    door = Door()
    door.unix = EXPIRES + 1
    assert door.admission.take(grant(BOB)) == EXPIRED
    assert not door.admits(BOB)


def test_what_is_used_twice_at_a_time_is_used_up_before_the_chain_has_it() -> None:
    door, token = Door(), invite(OWNER, RUN_ID, expires=EXPIRES, uses=1)
    assert door.admission.take(token.grant(BOB.peer_id)) == ""
    assert "used up" in door.admission.take(token.grant(CYD.peer_id))
    assert door.admission.take(token.grant(BOB.peer_id)) == "", "showing it again is no second use"


def test_guests_that_wait_are_bounded_and_those_that_wait_keep_their_place() -> None:
    door, token = Door(), invite(OWNER, RUN_ID, expires=EXPIRES, uses=1000)
    guests = [new_identity() for _ in range(PROVISIONAL_MAX + 1)]
    said = [door.admission.take(token.grant(guest.peer_id)) for guest in guests]
    assert said == [""] * PROVISIONAL_MAX + [NO_ROOM]
    assert [door.admits(guest) for guest in guests] == [True] * PROVISIONAL_MAX + [False]
    door.now += PROVISIONAL_SECONDS
    assert door.admission.take(token.grant(guests[-1].peer_id)) == ""


def test_who_is_revoked_is_served_to_the_end_of_the_round_that_it_is_a_member_of() -> None:
    door, out = Door(), revoke(OWNER, RUN_ID, BOB.peer_id, with_guests=False)
    shown = grant(BOB)
    assert door.admission.take(shown) == ""
    door.seal(shown, out)
    bob = Member(BOB.peer_id, ROW, 0, True)
    door.head = msgspec.structs.replace(door.head, now=(*door.head.now, bob))
    assert door.admits(BOB)
    door.head = msgspec.structs.replace(door.head, now=door.head.following)
    assert not door.admits(BOB) and door.admission.revocation(BOB.peer_id) == out
    assert "revoked" not in door.admission.take(shown) and not door.admits(BOB), "it is on the chain, and void"


def test_a_newcomer_goes_by_the_peers_whose_addresses_it_was_given_until_it_has_the_chain() -> None:
    door = Door(round=0, introducers=frozenset({BOB.peer_id}))
    assert door.admits(BOB) and not door.admits(CYD)
    door.head = msgspec.structs.replace(door.head, round=1)
    assert not door.admits(BOB)


@pytest.mark.parametrize("with_guests", [False, True])
def test_a_revocation_means_a_peer_by_its_id_or_with_who_brought_it(with_guests: bool) -> None:
    beginning = chain.genesis(RUN_ID, access=Access("invite", OWNER.peer_id, (ADA.peer_id,)))
    mine = invite(ADA, RUN_ID, expires=EXPIRES).grant(BOB.peer_id)

    def means_bob(subject: bytes, by: Identity = OWNER, run_id: bytes = RUN_ID) -> bool:
        return shuts_out(revoke(by, run_id, subject, with_guests=with_guests), BOB.peer_id, mine, beginning)

    assert means_bob(BOB.peer_id)
    assert means_bob(ADA.peer_id) == with_guests == means_bob(mine.issued.token)
    assert not means_bob(CYD.peer_id)
    # What others make up sends nobody away.
    assert not means_bob(BOB.peer_id, by=CYD) and not means_bob(BOB.peer_id, run_id=bytes(32))
