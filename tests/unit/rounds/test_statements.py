"""Statements on their way into the chain: handed to those who seal, sealed once, and kept through forks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).parent))

from cluster import RUN_ID, Cluster, Peer, identity_of

from p2ptrain import chain
from p2ptrain.chain import ChainState
from p2ptrain.chain.admission import AMENDMENTS_MAX, Access, Statement
from p2ptrain.rounds import events
from p2ptrain.rounds.statements import GRANT_ROUNDS, PENDING_MAX, Statements
from p2ptrain.swarm.invitations import invite, revoke

OWNER, GUEST = identity_of("owner"), identity_of("guest")
ACCESS = Access("invite", OWNER.peer_id, tuple(identity_of(name).peer_id for name in "abcd"))
GRANT = invite(OWNER, RUN_ID, expires=2**40).grant(GUEST.peer_id)
TOKEN = invite(OWNER, RUN_ID, expires=2**40, uses=1000)


def revoked(name: str) -> Statement:
    return revoke(OWNER, RUN_ID, identity_of(name).peer_id, with_guests=False)


class Closed(Cluster):
    """A run for a to d, and whom its owner lets in."""

    def add(self, name: str, *, founder: bool = False, dialable: bool = True) -> Peer:
        peer = Peer(self, name, chain.genesis(RUN_ID, access=ACCESS), founder=founder, dialable=dialable)
        self.peers.append(peer)
        self.by_id[peer.id] = peer
        return peer

    def amended(self, *peers: Peer) -> list[tuple[Statement, ...]]:
        """What each chain has."""
        return [peer.head.access.amendments for peer in peers]


def test_a_grant_that_one_peer_hears_is_sealed_by_the_next_and_its_guest_becomes_a_member() -> None:
    cluster = Closed()
    group = cluster.group(3)
    group[1].hears(events.StatementHeard(GRANT))
    rounds = group[0].head.round
    cluster.until(lambda: all(cluster.amended(*group)), 20)
    assert group[0].head.round <= rounds + 2
    assert cluster.amended(*group) == [(GRANT,)] * 3
    guest = cluster.add("guest")
    cluster.until(lambda: guest.machine.is_member, 60)
    assert cluster.one_chain(*group, guest)


def test_nobody_that_the_run_is_not_for_is_admitted_though_it_asks() -> None:
    cluster = Closed()
    group = cluster.group(2)
    stranger = cluster.add("x")
    cluster.run(20)
    assert not any(m.peer_id == stranger.id for m in group[0].head.following)
    assert group[0].machine.admissions.pending, "it has asked"


def test_a_revoked_member_is_out_after_two_rounds_that_take_no_longer_than_others() -> None:
    cluster = Closed()
    group = cluster.group(4)
    sealed_at: dict[int, float] = {}

    def listen(peer: Peer, event: events.Event, effects: list[events.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, events.Apply) and peer is group[0]:
                sealed_at[effect.sealed.seal.round] = cluster.now

    cluster.listener = listen
    cluster.run(10)
    group[0].hears(events.StatementHeard(revoked("c")))
    cluster.until(lambda: len(group[0].head.now) == 3, 20)
    cluster.run(10)
    rounds = {sealed.seal.round: sealed.seal for sealed in group[0].rounds}
    (at,) = (number for number, seal in rounds.items() if seal.amendments)
    assert [len(rounds[number].rows) for number in (at, at + 1, at + 2)] == [4, 4, 3]
    assert chain.bits(rounds[at + 1].included, 4) == frozenset(range(4))
    lengths = {number: sealed_at[number] - sealed_at[number - 1] for number in sealed_at if number - 1 in sealed_at}
    usual = [length for number, length in lengths.items() if number <= at]
    # With three members in place of four the same batch takes a third longer.
    assert max(lengths[number] for number in range(at + 1, at + 5)) < max(usual) * 4 / 3 + 0.1
    assert cluster.one_chain(group[0], group[1], group[3])


def test_a_revoked_peer_makes_no_solo_seal_when_all_others_are_silent() -> None:
    cluster = Closed()
    group = cluster.group(3)
    group[0].hears(events.StatementHeard(revoked("c")))
    cluster.until(lambda: all(cluster.amended(*group)), 20)
    cluster.split(group[:2], [group[2]])
    cluster.run(40)
    assert not any(note.kind == "solo" for note in group[2].notes)
    assert len(group[0].head.now) == 2 and group[0].head.round > group[2].head.round + 5


def test_what_was_sealed_on_a_branch_that_lost_is_sealed_again_on_the_one_that_won() -> None:
    cluster = Closed()
    group = cluster.group(4)
    cluster.split(group[:1], group[1:])
    # The one alone is the one that hears of it, and seals it alone.
    group[0].hears(events.StatementHeard(revoked("d")))
    group[0].hears(events.StatementHeard(GRANT))
    cluster.until(lambda: len(group[0].head.access.amendments) == 2, 60)
    assert not any(cluster.amended(*group[1:]))
    cluster.heal()
    cluster.until(lambda: all(len(found) == 2 for found in cluster.amended(*group)), 60)
    assert cluster.one_chain(*group[:3])
    assert not any(m.peer_id == group[3].id for m in group[1].head.following)


def state(access: Access = ACCESS, round: int = 9) -> ChainState:
    return msgspec.structs.replace(chain.genesis(RUN_ID, access=access), round=round)


def kept(*heard: Statement, at: ChainState | None = None) -> Statements:
    made = Statements(identity_of("a").peer_id)
    made.hear(heard, at or state())
    return made


def test_statements_that_wait_are_bounded_and_grants_give_way_to_revocations() -> None:
    guests = [TOKEN.grant(identity_of(f"guest {n}").peer_id) for n in range(PENDING_MAX + 5)]
    waiting = kept(*guests)
    assert list(waiting.pending) == guests[:PENDING_MAX]
    assert waiting.hear([revoked("b"), revoked("c")], state())
    assert len(waiting.pending) == PENDING_MAX
    chosen = waiting.choose(state())
    assert chosen[:2] == (revoked("b"), revoked("c")) and len(chosen) == AMENDMENTS_MAX
    assert not waiting.hear([revoked("b")], state()), "it is no news"


def test_what_no_sealer_takes_is_forgotten_but_the_owners_word() -> None:
    waiting = kept(GRANT, revoked("b"))
    waiting.forget_stale(state(round=9 + GRANT_ROUNDS))
    assert list(waiting.pending) == [revoked("b")]
    waiting.forget_stale(state(ACCESS.amended(revoked("b"), RUN_ID)))
    assert not waiting.pending


def test_a_peer_does_not_shut_itself_out_by_a_solo_seal_nor_seal_what_contradicts_itself() -> None:
    mine: Any = kept(revoked("a"), revoked("b"))
    assert mine.choose(state()) == (revoked("a"), revoked("b"))
    assert mine.choose(state(), solo=True) == (revoked("b"),)
    shut = revoke(OWNER, RUN_ID, GUEST.peer_id, with_guests=False)
    assert kept(GRANT, shut).choose(state()) == (shut,)
