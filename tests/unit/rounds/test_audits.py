"""Claims about the state machine's audits: which it draws, and what it makes of how they end."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import identity_of
from test_machine_edges import CHUNKS, machine_of, of, reply_of, seal_after, standing

from p2ptrain import chain
from p2ptrain.chain import ChainState, Row
from p2ptrain.chain.seal import proof_digest
from p2ptrain.chain.sealed import Key, Reply, SealedRound, reply_digest
from p2ptrain.rounds.audits import A_REDUCER_MAX, LEFT_OUT, PROOFS_KEPT, UNDER_WAY_MAX, Audits
from p2ptrain.rounds.events import (
    Apply,
    Audit,
    Audited,
    ContributionReady,
    ContributionReceived,
    Doubted,
    Effect,
    FetchRounds,
    LeftOut,
    PeerLeft,
    ProofHeard,
    PublishSeal,
    ReplyHeld,
    RoundsFetched,
    SealHeard,
    SendProof,
    TipHeard,
)
from p2ptrain.rounds.machine import RoundMachine

ROW = Row(4, 1000, 1000)
PROOF = b"a proof that was checked"


def id_of(name: str) -> bytes:
    return identity_of(name).peer_id


def attested(key: Key, part: int, *indices: int) -> Reply:
    """A reply whose digest is that of its bytes."""
    reply = reply_of(key, part, *indices)
    return replace(reply, digest=reply_digest(reply.data))


def round_of(state: ChainState, name: str, **changes: Any) -> tuple[SealedRound, ChainState]:
    """The next round, in which everybody answers."""
    shape = chain.shape_of(state, CHUNKS)
    key = Key(shape.round, shape.base)
    everybody = range(len(shape.members))
    replies = {number: attested(key, number, *everybody) for number in range(len(shape.parts))}
    return seal_after(state, name, replies, **changes)


def take_part(machine: RoundMachine, now: float) -> list[Effect]:
    key, shape = machine.exchange_key, machine.shape
    assert key is not None and shape is not None
    payloads = tuple(f"{part}".encode() for part in range(len(shape.parts)))
    return machine.handle(ContributionReady(key, ROW, payloads), now)


def adopt(machine: RoundMachine, sealer: str, now: float) -> list[Effect]:
    """Have it take part in a round and adopt its seal, by another."""
    take_part(machine, now)
    sealed, _ = round_of(machine.head, sealer)
    return machine.handle(RoundsFetched(id_of(sealer), machine.head.id, (sealed,)), now + 0.5)


def audits_of(machine: RoundMachine, rounds: int, sealer: str = "b", began: int = 0) -> list[list[Audit]]:
    """What it audits in each of so many rounds, all of which end well."""
    found = []
    for number in range(began, began + rounds):
        drawn = of(Audit, adopt(machine, sealer, 1.0 * number))
        for audit in drawn:
            machine.handle(Audited(audit.reducer, reply_digest(audit.reply), "right", b""), 1.0 * number + 0.6)
        found.append(drawn)
    return found


# ---- lots -----------------------------------------------------------------------------------------------------------


def test_each_part_is_audited_about_as_often_as_the_rules_say() -> None:
    """Of n members, n - 1 draw each part with a chance of the rate over n."""
    rate = 0.8
    machine = machine_of("a", standing("a", "b", "c", "d"), audits_a_part=rate)
    drawn = expected = 0.0
    for _ in range(500):
        assert machine.shape is not None
        others = sum(part.reducer != machine.shape.index(machine.me) for part in machine.shape.parts)
        expected += others * rate / 4
        (audits,) = audits_of(machine, 1, began=machine.head.round)
        drawn += len(audits)
    assert expected > 100
    assert abs(drawn - expected) < 4 * expected**0.5


def test_nobody_audits_itself_and_nothing_is_drawn_at_a_rate_of_zero() -> None:
    machine = machine_of("a", standing("a", "b", "c"), audits_a_part=1.0)
    drawn = [audit for of_round in audits_of(machine, 60) for audit in of_round]
    assert drawn and all(audit.reducer != machine.me for audit in drawn)
    assert not any(audits_of(machine_of("a", standing("a", "b", "c"), audits_a_part=0.0), 20))


def test_what_one_member_draws_tells_nothing_of_what_another_does() -> None:
    """The lots follow from a signature that nobody else can make."""
    state = standing("a", "b", "c", "d", "e")
    sealed, _ = round_of(state, "e")
    shape = chain.shape_of(state, CHUNKS)
    drawn = {}
    for name in "abcd":
        audits = Audits(id_of(name), identity_of(name).sign, 2.5)
        drawn[name] = [audit.part for audit in audits.draw(sealed, shape)]
        again = Audits(id_of(name), identity_of(name).sign, 2.5)
        assert [audit.part for audit in again.draw(sealed, shape)] == drawn[name]
    assert len({tuple(parts) for parts in drawn.values()}) > 1


def test_a_reducer_is_asked_for_few_parts_in_a_round() -> None:
    state = standing("a", "b", row=Row(4, 1000, 100))
    shape = chain.shape_of(state, 16 * 1024)
    assert sum(shape.members[part.reducer].peer_id == id_of("b") for part in shape.parts) > UNDER_WAY_MAX / 2
    audits = Audits(id_of("a"), identity_of("a").sign, 100.0)
    key = Key(shape.round, shape.base)
    replies = {number: attested(key, number, 0, 1) for number in range(len(shape.parts))}
    fake = SealedRound(
        bytes(32),
        seal_after(state, "b", {})[0].seal,
        seal_after(state, "b", {})[0].signed,
        tuple(reply.data for reply in replies.values()),
    )
    assert len(audits.draw(fake, shape)) == A_REDUCER_MAX


# ---- doubts ---------------------------------------------------------------------------------------------------------


def doubted(machine: RoundMachine, now: float) -> list[Audit]:
    """Have it adopt a round and doubt each of its replies; the audits, which end well."""
    assert machine.shape is not None
    shape, key = machine.shape, Key(machine.shape.round, machine.shape.base)
    sealed, _ = round_of(machine.head, "b")
    audits = of(Audit, adopt(machine, "b", now))
    for part, reply in enumerate(sealed.replies):
        assert reply is not None
        audits += of(Audit, machine.handle(Doubted(key, part, shape, reply), now + 0.6))
    for audit in audits:
        machine.handle(Audited(audit.reducer, reply_digest(audit.reply), "right", b""), now + 0.7)
    return audits


def test_a_reply_that_the_trainer_doubts_is_audited_and_its_reducer_believed_for_as_long_as_by_lot() -> None:
    """Else who makes right replies look wrong would have everybody audit everything."""
    rate, rounds = 0.05, 300
    machine = machine_of("a", standing("a", "b", "c"), audits_a_part=rate)
    audits = [doubted(machine, 1.0 * number) for number in range(rounds)]
    assert {audit.reducer for audit in audits[0]} == {id_of("b"), id_of("c")}, "looked at at once"
    lone = machine_of("a", standing("a", "b", "c"), audits_a_part=rate)
    by_lot = sum(map(len, audits_of(lone, rounds)))
    assert sum(map(len, audits)) - by_lot == pytest.approx(2 * rounds * rate / 3, abs=2)


def test_nobody_doubts_itself_and_nothing_is_looked_at_at_a_rate_of_zero() -> None:
    silent = machine_of("a", standing("a", "b", "c"), audits_a_part=0.0)
    assert not doubted(silent, 1.0)
    audits = doubted(machine_of("c", standing("a", "b", "c"), audits_a_part=0.1), 1.0)
    assert {audit.reducer for audit in audits} == {id_of("a"), id_of("b")}


def test_of_rounds_that_it_did_not_take_part_in_a_peer_audits_none() -> None:
    """By the time it has caught up with them, their reducers may have forgotten."""
    state = standing("a", "b", "c")
    machine = machine_of("a", state, audits_a_part=100.0)
    rounds = []
    for _ in range(4):
        sealed, state = round_of(state, "b")
        rounds.append(sealed)
    effects = machine.handle(RoundsFetched(id_of("b"), machine.head.id, tuple(rounds)), 1.0)
    assert len(of(Apply, effects)) == 4 and not of(Audit, effects)


# ---- how audits end -------------------------------------------------------------------------------------------------


def audited(machine: RoundMachine, name: str, verdict: Any, proof: bytes = b"", now: float = 0.5) -> list[Effect]:
    return machine.handle(Audited(id_of(name), hashlib.sha256(name.encode()).digest(), verdict, proof), now)


def test_a_reducer_that_withholds_is_audited_each_round_until_it_answers() -> None:
    machine = machine_of("a", standing("a", "b", "c"), audits_a_part=0.0)
    audited(machine, "c", "withheld")
    for number in range(3):
        (audit,) = of(Audit, adopt(machine, "b", 1.0 + number))
        assert audit.reducer == id_of("c")
        last = Audited(audit.reducer, reply_digest(audit.reply), "withheld" if number < 2 else "right", b"")
        machine.handle(last, 1.6 + number)
    assert not of(Audit, adopt(machine, "b", 4.0))
    assert not machine.audits.owing, "and is not accused any more"


def test_whom_a_seal_accuses_all_others_audit() -> None:
    state = standing("a", "b", "c", "d")
    shape = chain.shape_of(state, CHUNKS)
    first = next(n for n in "abcd" if id_of(n) == shape.members[shape.sealer_order[0]].peer_id)
    accused, looks_on = [name for name in "abcd" if name != first][:2]
    machine = machine_of(looks_on, state, audits_a_part=0.0)
    take_part(machine, 1.0)
    sealed, _ = round_of(state, first, accused=id_of(accused))
    effects = machine.handle(RoundsFetched(id_of(first), state.id, (sealed,)), 2.0)
    assert [audit.reducer for audit in of(Audit, effects)] == [id_of(accused)]


def test_a_peer_that_has_said_goodbye_owes_nothing() -> None:
    machine = machine_of("a", standing("a", "b", "c"), audits_a_part=0.0)
    machine.handle(PeerLeft(id_of("c")), 1.0)
    audited(machine, "c", "withheld")
    assert not machine.audits.owing and not machine.audits.suspects


def hear_everything(machine: RoundMachine, now: float) -> list[Effect]:
    """All replies of the round under way, after its length."""
    key, shape = machine.exchange_key, machine.shape
    assert key is not None and shape is not None
    effects = take_part(machine, now)
    for number in range(len(shape.parts)):
        everybody = range(len(shape.members))
        effects += machine.handle(ReplyHeld(key, number, attested(key, number, *everybody)), now + 0.1)
    return effects


def sealer_of(state: ChainState, place: int) -> str:
    shape = chain.shape_of(state, CHUNKS)
    return next(n for n in "abcdefgh" if id_of(n) == shape.members[shape.sealer_order[place]].peer_id)


def close_own(machine: RoundMachine, now: float) -> list[Effect]:
    """Its own parts close once all that others send is there."""
    key, shape = machine.exchange_key, machine.shape
    assert key is not None and shape is not None
    effects = []
    for number, part in enumerate(shape.parts):
        if shape.members[part.reducer].peer_id == machine.me:
            for member in shape.members:
                said = ContributionReceived(key, number, member.peer_id, ROW, 0, b"", b"x", b"")
                effects += machine.handle(said, now)
    return effects


def seals(machine: RoundMachine, now: float) -> list[SealedRound]:
    """What it seals in a round in which everybody answers."""
    effects = take_part(machine, now)
    effects += close_own(machine, now + 0.05)
    effects += hear_everything(machine, now + 0.1)
    return [effect.sealed for effect in of(PublishSeal, effects)]


def test_what_is_found_is_in_our_next_seal_and_given_to_those_who_seal_before() -> None:
    state = standing("a", "b", "c", "d")
    me, liar = sealer_of(state, 0), sealer_of(state, 3)
    machine = machine_of(me, state, audits_a_part=0.0)
    handed = of(SendProof, audited(machine, liar, "wrong", PROOF, now=1.0))
    assert {effect.sealer for effect in handed} == {id_of(sealer_of(state, 1))}, "the two first, but ourselves"
    assert all((effect.reducer, effect.proof) == (id_of(liar), PROOF) for effect in handed)
    (sealed,) = seals(machine, 2.0)
    assert [(named.peer_id, named.proof) for named in sealed.seal.expelled] == [(id_of(liar), proof_digest(PROOF))]
    assert sealed.proofs == (PROOF,)
    assert machine.head.expelled == (id_of(liar),)
    assert not of(SendProof, audited(machine, liar, "skipped", now=3.0))


def test_a_proof_that_was_handed_to_us_is_in_our_seal_and_not_handed_on() -> None:
    state = standing("a", "b", "c", "d")
    me, liar = sealer_of(state, 0), sealer_of(state, 3)
    machine = machine_of(me, state, audits_a_part=0.0)
    assert not of(SendProof, machine.handle(ProofHeard(id_of(liar), PROOF), 1.0))
    (sealed,) = seals(machine, 2.0)
    assert sealed.proofs == (PROOF,)


def test_who_withheld_is_accused_by_our_next_seal_in_turn_once() -> None:
    state = standing("a", "b", "c", "d")
    me, other = sealer_of(state, 0), sealer_of(state, 2)
    machine = machine_of(me, state, audits_a_part=0.0)
    audited(machine, other, "withheld", now=1.0)
    (sealed,) = seals(machine, 2.0)
    assert sealed.seal.accused == id_of(other)
    assert not machine.audits.owing


def test_two_replies_of_a_reducer_are_held_against_it_but_prove_nothing() -> None:
    state = standing("a", "b", "c", "d")
    machine = machine_of("a", state, audits_a_part=0.0)
    take_part(machine, 1.0)
    key, shape = machine.exchange_key, machine.shape
    assert key is not None and shape is not None
    part = next(n for n, one in enumerate(shape.parts) if shape.members[one.reducer].peer_id == id_of("c"))
    machine.handle(ReplyHeld(key, part, attested(key, part, 0, 1)), 1.5)
    sealed, _ = round_of(state, "b")
    machine.handle(RoundsFetched(id_of("b"), state.id, (sealed,)), 2.0)
    assert list(machine.audits.owing) == [id_of("c")]
    assert not machine.audits.proofs


def left_out_by(machine: RoundMachine, sealer: str, victim: str, now: float, *, kept: tuple[str, ...]) -> list[Effect]:
    """A round of which `sealer` seals none of the replies with a victim's work in them, which are all but its own and
    those of `kept`; the machine holds them."""
    take_part(machine, now)
    close_own(machine, now + 0.05)
    state, key, shape = machine.head, machine.exchange_key, machine.shape
    assert key is not None and shape is not None
    everybody = range(len(shape.members))
    others = [place for place in everybody if shape.members[place].peer_id != id_of(victim)]
    named = {}
    for number, part in enumerate(shape.parts):
        reducer = shape.members[part.reducer].peer_id
        left_out = reducer not in {id_of(name) for name in (sealer, *kept)}
        reply = attested(key, number, *(everybody if left_out else others))
        machine.handle(ReplyHeld(key, number, reply), now + 0.1)
        if not left_out and len(others) > 1:
            named[number] = reply
    sealed, _ = seal_after(state, sealer, named)
    return machine.handle(RoundsFetched(id_of(sealer), state.id, (sealed,)), now + 0.5)


def through_turns(machine: RoundMachine, turns: int, sealer: str, victim: str, kept: tuple[str, ...]) -> list[LeftOut]:
    """Rounds until it was `sealer`'s turn so many times, when it does that; others seal all that there is."""
    said = []
    while turns:
        now = 2.0 * machine.head.round
        first = sealer_of(machine.head, 0)
        if first == sealer:
            said += of(LeftOut, left_out_by(machine, sealer, victim, now, kept=kept))
            turns -= 1
        elif id_of(first) == machine.me:
            assert seals(machine, now)
        else:
            adopt(machine, first, now)
    return said


@pytest.mark.parametrize("name", ["a", "d"])
def test_who_seals_without_most_replies_turn_after_turn_is_accused_by_all_who_hold_them(name: str) -> None:
    machine = machine_of(name, standing("a", "b", "c", "d"), audits_a_part=0.0)
    assert not through_turns(machine, LEFT_OUT - 1, "b", "c", kept=())
    (said,) = through_turns(machine, 1, "b", "c", kept=())
    assert (said.round, said.sealer, said.members) == (machine.head.round, id_of("b"), (id_of("c"),))
    while sealer_of(machine.head, 0) != name:
        adopt(machine, sealer_of(machine.head, 0), 2.0 * machine.head.round)
    (sealed,) = seals(machine, 2.0 * machine.head.round)
    assert sealed.seal.accused == id_of("b")
    assert not machine.audits.left_out, "one accusation"


def test_a_seal_with_the_replies_makes_good_for_those_before() -> None:
    machine = machine_of("a", standing("a", "b", "c", "d"), audits_a_part=0.0)
    assert not through_turns(machine, LEFT_OUT - 1, "b", "c", kept=())
    assert machine.audits.left_out
    assert not through_turns(machine, 1, "b", "c", kept=("a", "c", "d"))
    assert not machine.audits.left_out


def test_no_reducer_that_keeps_its_replies_from_a_sealer_brings_it_an_accusation() -> None:
    machine = machine_of("a", standing("a", "b", "c", "d"), audits_a_part=0.0)
    assert not through_turns(machine, 2 * LEFT_OUT, "b", "c", kept=("a", "d"))
    assert not machine.audits.left_out


def test_of_two_members_nobody_accuses_the_other_because_its_own_reply_is_missing() -> None:
    machine = machine_of("a", standing("a", "b"), audits_a_part=0.0)
    assert not through_turns(machine, LEFT_OUT, "b", "a", kept=())
    assert not machine.audits.left_out


def test_a_seal_whose_proof_we_lack_is_fetched_whole_and_one_that_we_hold_adopted() -> None:
    state = standing("a", "b", "c", "d")
    sealer, me, liar = sealer_of(state, 0), sealer_of(state, 1), sealer_of(state, 3)
    sealed, after = round_of(state, sealer, expelled=((id_of(liar), proof_digest(PROOF)),), proofs=(PROOF,))
    heard = SealHeard(sealed.id, sealed.seal, sealed.signed, id_of(sealer))
    for held in (False, True):
        machine = machine_of(me, state, audits_a_part=0.0)
        if held:
            machine.handle(ProofHeard(id_of(liar), PROOF), 0.5)
        hear_everything(machine, 1.0)
        close_own(machine, 1.2)
        hear_everything(machine, 1.3)
        effects = machine.handle(heard, 1.8)
        assert bool(of(Apply, effects)) == held
        assert bool(of(FetchRounds, effects)) != held
        if held:
            assert machine.head == after
            assert of(Apply, effects)[0].sealed.proofs == (PROOF,)


def test_an_expelled_peer_seals_nothing_and_asks_for_nothing() -> None:
    state = msgspec.structs.replace(standing("a", "b"), expelled=(id_of("a"),))
    machine = machine_of("a", state, audits_a_part=0.0)
    effects = [*take_part(machine, 1.0), *machine.handle(TipHeard(id_of("b"), 10, state.id, state.total), 500.0)]
    assert not of(PublishSeal, effects)


@pytest.mark.parametrize("count", [PROOFS_KEPT + 5])
def test_what_others_hand_us_fills_no_memory(count: int) -> None:
    machine = machine_of("a", standing("a", "b"), audits_a_part=0.0)
    for number in range(count):
        machine.handle(ProofHeard(id_of("b"), number.to_bytes(8)), 1.0)
        audited(machine, f"{number}", "withheld")
    assert len(machine.audits.proofs) == PROOFS_KEPT
    assert not machine.audits.suspects, "of those that are no members"
    machine.check_invariants()
