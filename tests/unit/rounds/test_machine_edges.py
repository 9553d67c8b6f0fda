"""Claims about the corners of the round machine: answers that come late or never, liars, floods, forks under way."""

from __future__ import annotations

import hashlib
import itertools
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import RULES, RUN_ID, Cluster, Peer, identity_of, roots

from p2ptrain import chain
from p2ptrain.chain import ChainState, Expulsion, Join, Member, Row, Seal, SignedSeal
from p2ptrain.chain.forks import Mark
from p2ptrain.chain.sealed import Key, Reply, SealedRound
from p2ptrain.rounds.admissions import Admissions
from p2ptrain.rounds.events import (
    Apply,
    ContributionReady,
    ContributionReceived,
    Effect,
    FetchFailed,
    FetchRounds,
    JoinReceived,
    PublishSeal,
    Reduce,
    ReplyHeld,
    Resync,
    Rollback,
    RoundsFetched,
    SealHeard,
    SendContribution,
    SendJoin,
    StartRound,
    Synced,
    Tick,
    TipHeard,
)
from p2ptrain.rounds.machine import ASK_AFTER, RoundMachine
from p2ptrain.rounds.rules import RoundRules

ROW = Row(4, 16_000, 1000)
CHUNKS = RULES["chunks"]


def member(name: str, row: Row = ROW) -> Member:
    return Member(identity_of(name).peer_id, row, 0, True)


def standing(*names: str, row: Row = ROW) -> ChainState:
    """A chain at round 10 whose group is `names`."""
    group = tuple(member(name, row) for name in names)
    return ChainState(RUN_ID, 10, hashlib.sha256(b"10").digest(), hashlib.sha256(b"9").digest(), 20, group, group)


def machine_of(name: str, state: ChainState, **rules: object) -> RoundMachine:
    identity = identity_of(name)
    settings = RoundRules(**(RULES | rules))  # type: ignore[arg-type]
    machine = RoundMachine(identity.peer_id, settings, state, identity.sign, ROW)
    machine.start(0.0)
    return machine


def reply_of(key: Key, part: int, *indices: int) -> Reply:
    data = f"{key.round}/{part}/{indices}".encode()
    return Reply(hashlib.sha256(data).digest(), frozenset(indices), data)


def seal_after(
    state: ChainState,
    sealer: str,
    replies: dict[int, Reply],
    *,
    solo: bool = False,
    joins: tuple[Join, ...] = (),
    expelled: tuple[tuple[bytes, bytes], ...] = (),
    proofs: tuple[bytes, ...] = (),
    accused: bytes = b"",
) -> tuple[SealedRound, ChainState]:
    """What `sealer` seals on `state`, and the chain after it."""
    shape = chain.shape_of(state, CHUNKS)
    included = frozenset[int]().union(*(reply.included for reply in replies.values()))
    seal = Seal(
        version=chain.SEAL_VERSION,
        run_id=state.run_id,
        round=shape.round,
        parent=state.id,
        total=state.total + len(included),
        sealer=identity_of(sealer).peer_id,
        solo=solo,
        included=chain.bitmap(included, len(shape.members)),
        parts=tuple(replies[n].digest if n in replies else b"" for n in range(len(shape.parts))),
        rows=tuple(m.row for m in shape.members),
        joins=joins,
        root=b"",
        expelled=tuple(Expulsion(*one) for one in expelled),
        accused=accused,
    )
    signed: SignedSeal = chain.encode_seal(seal, identity_of(sealer).sign)
    data = tuple(replies[n].data if n in replies else None for n in range(len(shape.parts)))
    sealed = SealedRound(chain.seal_id(signed.body), seal, signed, data, proofs)
    return sealed, chain.extend(state, sealed.id, seal, CHUNKS)


def heard(sealed: SealedRound, source: str) -> SealHeard:
    return SealHeard(sealed.id, sealed.seal, sealed.signed, identity_of(source).peer_id)


def tip(name: str, state: ChainState) -> TipHeard:
    return TipHeard(identity_of(name).peer_id, state.round, state.id, state.total)


def of(kind: type, effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, kind)]


def contribute(machine: RoundMachine, now: float) -> list[Effect]:
    shape, key = machine.shape, machine.exchange_key
    assert shape is not None and key is not None
    return machine.handle(ContributionReady(key, ROW, tuple(b"mine" for _ in shape.parts)), now)


# ---- who is waited for ----------------------------------------------------------------------------------------


def test_a_member_that_talks_but_never_contributes_cannot_hold_the_chain() -> None:
    cluster = Cluster()
    ada, grace = cluster.group(2, dialable=False)
    grace._deliver = lambda message: None  # type: ignore[method-assign]
    cluster.run(5)
    number = ada.head.round
    cluster.run(90)
    assert ada.head.round > number


def test_a_member_that_comes_back_only_to_be_mute_again_is_left_out_for_longer_each_time() -> None:
    head = standing("a", "b")
    admissions = Admissions(identity_of("a").peer_id)
    mute, now, waits = identity_of("m").peer_id, 100.0, []
    for _ in range(9):
        admissions.leave_out(mute, now, 8.0)
        admissions.ask(mute, member("m").row, head)
        admissions.ask(identity_of("n").peer_id, member("n").row, head)
        (other,) = admissions.choose(head, (), now)
        assert other.peer_id == identity_of("n").peer_id
        admissions.withdraw(other.peer_id)
        until = next(later for later in range(10_000) if admissions.choose(head, (), now + later))
        waits.append(until)
        now += until
    assert waits == [8 * 2 ** min(times, 6) for times in range(9)]
    admissions.leave_out(mute, now + 2000.0, 8.0)
    assert admissions.mute[mute].until == now + 2008.0, "it was long ago"


def test_a_member_back_after_the_deadline_finds_the_round_still_open_for_it() -> None:
    cluster = Cluster(alone_after_seconds=60.0)
    ada, grace = cluster.group(2)
    cluster.split([ada], [grace])
    cluster.run(25)
    number = max(ada.head.round, grace.head.round)
    cluster.heal()
    cluster.run(20)
    assert min(ada.head.round, grace.head.round) > number
    assert cluster.one_chain(ada, grace)
    assert not any(sealed.seal.solo for sealed in ada.rounds[number:])


def test_members_that_cannot_reduce_go_on_when_all_reducers_died() -> None:
    cluster = Cluster()
    ada, grace, linus = cluster.group(3, dialable=False)
    cluster.kill(ada)
    cluster.run(240)
    applied = [sealed for sealed in grace.rounds if sealed.seal.total > 0][-1]
    assert any(applied.seal.parts), "only rounds without work are sealed"
    assert cluster.one_chain(grace, linus)


def test_a_seal_that_we_fetch_the_replies_of_is_not_taken_over() -> None:
    state = standing("a", "b", "c")
    shape = chain.shape_of(state, CHUNKS)
    order = [m for m in shape.sealer_order]
    names = {identity_of(n).peer_id: n for n in "abc"}
    first, second = (names[shape.members[i].peer_id] for i in order[:2])
    machine = machine_of(second, state)
    contribute(machine, 1.0)
    key = machine.exchange_key
    assert key is not None
    whole = {n: reply_of(key, n, 0, 1, 2) for n in range(3)}
    machine.handle(ReplyHeld(key, 0, whole[0]), 1.5)
    sealed, _ = seal_after(state, first, whole)
    machine.handle(heard(sealed, first), 2.0)
    effects: list[Effect] = []
    now = 2.0
    while machine.wake_at is not None and machine.wake_at < 2.0 + 1.5 + 2 * RULES["seal_timeout_seconds"]:
        now = max(now, machine.wake_at)
        effects += machine.handle(Tick(), now)
        if of(FetchRounds, effects):
            break
    effects += machine.handle(Tick(), 10.0)
    assert not of(PublishSeal, effects)
    # The sealer died before it could hand the replies over: the second place does it.
    effects = machine.handle(FetchFailed(identity_of(first).peer_id), 11.0)
    while machine.wake_at is not None and not of(PublishSeal, effects):
        effects += machine.handle(Tick(), machine.wake_at)
    assert of(PublishSeal, effects)


# ---- following others -----------------------------------------------------------------------------------------


def test_a_fetch_without_an_answer_ends_by_itself() -> None:
    state = standing("a", "b")
    machine = machine_of("z", state)
    ahead = ChainState(RUN_ID, 15, bytes(32), bytes(32), 30, (), ())
    effects = machine.handle(tip("a", ahead), 1.0)
    assert len(of(FetchRounds, effects)) == 1
    machine.handle(tip("a", state), 2.0)
    machine.handle(tip("b", ahead), 2.0)
    asked: list[Effect] = []
    for _ in range(20):
        assert machine.wake_at is not None
        if of(FetchRounds, asked):
            break
        asked = machine.handle(Tick(), machine.wake_at)
    assert isinstance(asked[0], FetchRounds) and asked[0].donor == identity_of("b").peer_id


def test_a_donor_that_failed_is_asked_again_without_a_new_event() -> None:
    state = standing("a", "b")
    machine = machine_of("z", state)
    ahead = ChainState(RUN_ID, 15, bytes(32), bytes(32), 30, (), ())
    machine.handle(tip("a", ahead), 1.0)
    machine.handle(FetchFailed(identity_of("a").peer_id), 1.2)
    assert not of(FetchRounds, machine.handle(tip("a", ahead), 1.3))
    assert machine.wake_at is not None and machine.wake_at <= 1.2 + RULES["seal_timeout_seconds"]
    assert of(FetchRounds, machine.handle(Tick(), machine.wake_at))


def test_rounds_that_overlap_our_chain_are_no_fork() -> None:
    state = standing("a", "b", "c")
    machine = machine_of("z", state)
    key = Key(11, state.parent)
    first, one = seal_after(state, "a", {n: reply_of(key, n, 0, 1, 2) for n in range(3)})
    second, two = seal_after(one, "b", {n: reply_of(Key(12, state.id), n, 0, 1, 2) for n in range(3)})
    donor = identity_of("a").peer_id
    machine.handle(RoundsFetched(donor, state.id, (first,)), 1.0)
    effects = machine.handle(RoundsFetched(donor, state.id, (first, second)), 2.0)
    assert not of(Rollback, effects) and len(of(Apply, effects)) == 1
    assert machine.head == two


def test_an_answer_from_before_the_last_two_seals_is_no_reason_to_start_anew() -> None:
    state = standing("a", "b", "c")
    machine = machine_of("z", state)
    donor = identity_of("a").peer_id
    first, one = seal_after(state, "a", {n: reply_of(Key(11, state.parent), n, 0, 1, 2) for n in range(3)})
    second, two = seal_after(one, "b", {n: reply_of(Key(12, state.id), n, 0, 1, 2) for n in range(3)})
    machine.handle(RoundsFetched(donor, state.id, (first, second)), 1.0)
    late, _ = seal_after(state, "b", {0: reply_of(Key(11, state.parent), 0, 0, 1)})
    assert not of(Resync, machine.handle(RoundsFetched(donor, state.id, (late,)), 2.0))
    assert not of(Resync, machine.handle(RoundsFetched(donor, None, ()), 2.0)), "nobody claims a better chain"
    assert machine.head == two


def test_a_chain_that_is_not_better_is_not_fetched_over_and_over() -> None:
    state = standing("a", "b")
    machine = machine_of("z", state)
    donor = identity_of("b").peer_id
    first, _ = seal_after(state, "a", {0: reply_of(Key(11, state.parent), 0, 0, 1)})
    machine.handle(RoundsFetched(donor, state.id, (first,)), 1.0)
    # On a sibling of our head, a learner sealed a round of nobody's work: as many rounds more, as much work.
    other, sibling = seal_after(state, "b", {1: reply_of(Key(11, state.parent), 1, 0, 1)})
    more, beyond = seal_after(sibling, "y", {}, solo=True)
    effects = machine.handle(tip("b", beyond), 2.0)
    asked = 0
    while of(FetchRounds, effects) and asked < 10:
        asked += 1
        effects = machine.handle(RoundsFetched(donor, state.id, (other, more)), 2.0)
    assert asked <= 1


def test_a_members_solo_seal_of_nobodys_work_does_not_take_the_group_apart() -> None:
    state = standing("a", "b")
    machine = machine_of("a", state)
    alone, after = seal_after(state, "b", {}, solo=True)
    effects = machine.handle(heard(alone, "b"), 0.5)
    effects += machine.handle(RoundsFetched(identity_of("b").peer_id, state.id, (alone,)), 0.7)
    assert not of(Apply, effects) and machine.is_member
    # Its next round has work in it, and nobody else is heard: one stands against one.
    following, _ = seal_after(after, "b", {0: reply_of(Key(12, state.id), 0, 0)})
    effects = machine.handle(RoundsFetched(identity_of("b").peer_id, state.id, (alone, following)), 3.1)
    assert len(of(Apply, effects)) == 2


def test_a_member_that_leaves_alone_takes_none_along_from_those_that_stay() -> None:
    state = standing("a", "b", "c")
    machine = machine_of("a", state)
    machine.handle(tip("c", state), 0.5)
    alone, after = seal_after(state, "b", {}, solo=True)
    branch = [alone]
    for number in range(12, 20):
        sealed, after = seal_after(after, "b", {0: reply_of(Key(number, after.parent), 0, 0)})
        branch.append(sealed)
    effects = machine.handle(RoundsFetched(identity_of("b").peer_id, state.id, tuple(branch)), 1.0)
    assert not of(Apply, effects)
    assert machine.refused_branch is not None and machine.refused_branch.total == after.total > state.total + 3


@pytest.mark.parametrize("joins", [0, 1])
def test_a_strangers_solo_seals_take_nobody_along_whatever_they_count(joins: int) -> None:
    state = standing("a", "b")
    machine = machine_of("a", state)
    made_up = tuple(Join(identity_of(f"made up {n}").peer_id, ROW) for n in range(joins))
    alone, after = seal_after(state, "z", {}, solo=True, joins=made_up)
    branch = [alone]
    for number in range(12, 40):
        key = Key(number, after.parent)
        count = len(chain.shape_of(after, CHUNKS).members)
        sealed, after = seal_after(after, "z", {0: reply_of(key, 0, *range(count))})
        branch.append(sealed)
    effects = machine.handle(heard(alone, "z"), 0.5) + machine.handle(tip("z", after), 0.6)
    effects += machine.handle(RoundsFetched(identity_of("z").peer_id, state.id, tuple(branch)), 0.7)
    assert after.total >= state.total + 28
    assert not of(Apply, effects) and not of(Rollback, effects) and not of(Resync, effects)


def test_a_learner_does_not_seal_alone_while_it_catches_up() -> None:
    state = standing("a", "b")
    machine = machine_of("z", state)
    machine.handle(tip("y", ChainState(RUN_ID, 90, bytes(32), bytes(32), 200, (), ())), 0.5)
    effects = machine.handle(Tick(), 0.5 + RULES["alone_after_seconds"] + RULES["seal_timeout_seconds"] + 1)
    assert not of(PublishSeal, effects)


def test_when_a_known_peer_is_slow_to_answer_the_next_one_is_asked() -> None:
    state = standing("a", "b", "c", "d")
    machine = machine_of("a", state)
    ahead, _ = seal_after(state, "b", {0: reply_of(Key(11, state.parent), 0, 0, 1)})
    asked: dict[bytes, float] = {}
    happens = [TipHeard(identity_of(name).peer_id, 11, ahead.id, 99) for name in "bcd"] + [Tick()] * 60
    for number, event in enumerate(happens):
        now = 0.5 + number / 4
        asked.update((effect.donor, now) for effect in of(FetchRounds, machine.handle(event, now)))  # type: ignore[attr-defined]
    times = sorted(asked.values())
    assert len(times) == 3
    assert all(b - a >= RULES["reply_timeout_seconds"] for a, b in itertools.pairwise(times))


def test_a_newcomer_that_no_seal_has_included_has_no_place_among_those_that_are_asked_first() -> None:
    newcomer = msgspec.structs.replace(member("n"), absent=-chain.NEWCOMER_ABSENCES_ALLOWED, included=False)
    state = msgspec.structs.replace(standing("a", "b"), following=(member("a"), member("b"), newcomer))
    machine = machine_of("a", state)
    assert machine.forks.is_stranger(identity_of("n").peer_id)
    assert not machine.forks.is_stranger(identity_of("b").peer_id)


def test_while_all_fetch_a_snapshot_that_does_not_come_rounds_go_on() -> None:
    cluster = Cluster()
    peers = cluster.group(3)
    cluster.run(5)
    number = min(peer.head.round for peer in peers)
    for peer in peers:
        peer.machine.fetching.resyncing = identity_of("z").peer_id
    cluster.run(30)
    assert min(peer.head.round for peer in peers) >= number + 20
    assert not any(sealed.seal.solo for sealed in peers[0].rounds[number:])


def test_who_fetches_a_snapshot_seals_nothing_alone() -> None:
    """Its own chain would seem worth staying on in the end."""
    cluster = Cluster()
    ada, grace = cluster.group(2)
    cluster.run(5)
    ada.machine.fetching.resyncing = identity_of("z").peer_id
    cluster.split([ada], [grace])
    number = ada.head.round
    cluster.run(60)
    assert ada.head.round <= number + 1 and grace.head.round > number + 10


def test_a_fetch_that_fails_does_not_end_a_resync() -> None:
    cluster = Cluster(root_interval=4)
    state = standing("a", "b")
    machine = machine_of("z", state, root_interval=4)
    cluster.add("q")
    machine.handle(tip("a", ChainState(RUN_ID, 15, bytes(32), bytes(32), 30, (), ())), 1.0)
    # It hears the tip of another whose journal does not reach back, and starts anew from that one.
    machine.handle(tip("b", ChainState(RUN_ID, 16, b"x" * 32, bytes(32), 40, (), ())), 1.0)
    assert of(Resync, machine.handle(RoundsFetched(identity_of("b").peer_id, None, ()), 1.1))
    machine.handle(FetchFailed(identity_of("a").peer_id), 1.2)
    assert machine.fetching.resyncing


# ---- forks under way ------------------------------------------------------------------------------------------


def test_what_was_sent_before_a_fork_is_settled_by_the_winning_seal_too() -> None:
    state = standing("a", "b", "c")
    machine = machine_of("b", state)
    contribute(machine, 1.0)
    key = machine.exchange_key
    assert key is not None
    worse, _ = seal_after(state, "a", {0: reply_of(key, 0, 0, 1)})
    better, _ = seal_after(state, "c", {n: reply_of(key, n, 0, 1, 2) for n in range(3)})
    machine.handle(RoundsFetched(identity_of("a").peer_id, state.id, (worse,)), 2.0)
    assert machine.head.id == worse.id
    assert of(FetchRounds, machine.handle(heard(better, "c"), 2.5))
    effects = machine.handle(RoundsFetched(identity_of("c").peer_id, state.id, (better,)), 3.0)
    kinds = [type(effect) for effect in effects]
    assert kinds.index(Rollback) < kinds.index(Apply)
    applied = of(Apply, effects)
    assert len(applied) == 1 and isinstance(applied[0], Apply)
    assert applied[0].sealed.id == better.id
    assert applied[0].contributed


def test_a_fork_at_the_last_round_leaves_the_round_under_way_as_it_is() -> None:
    state = standing("a", "b", "c")
    machine = machine_of("b", state)
    key = machine.exchange_key
    assert key is not None
    worse, _ = seal_after(state, "a", {0: reply_of(key, 0, 0, 1)})
    better, _ = seal_after(state, "c", {n: reply_of(key, n, 0, 1, 2) for n in range(3)})
    machine.handle(RoundsFetched(identity_of("a").peer_id, state.id, (worse,)), 1.0)
    sent = of(SendContribution, contribute(machine, 2.0))
    assert len(sent) == 2
    following = machine.exchange_key
    effects = machine.handle(RoundsFetched(identity_of("c").peer_id, state.id, (better,)), 3.0)
    assert machine.exchange_key == following == Key(12, state.id)
    assert not of(StartRound, effects) and not of(SendContribution, effects), "the same bytes are on their way still"
    last, _ = seal_after(machine.head, "a", {0: reply_of(Key(12, state.id), 0, 0, 1, 2)})
    applied = of(Apply, machine.handle(RoundsFetched(identity_of("a").peer_id, better.id, (last,)), 4.0))
    assert isinstance(applied[0], Apply) and applied[0].contributed


def test_a_round_begins_anew_when_a_fork_changes_its_members() -> None:
    state = standing("a", "b", "c")
    machine = machine_of("b", state)
    key = machine.exchange_key
    assert key is not None
    contribute(machine, 1.0)
    alone, _ = seal_after(state, "b", {1: reply_of(key, 1, 1)}, solo=True)
    effects = machine.handle(RoundsFetched(identity_of("b").peer_id, state.id, (alone,)), 2.0)
    assert of(StartRound, effects) and machine.shape is not None and len(machine.shape.members) == 1
    contribute(machine, 3.0)
    together, _ = seal_after(state, "c", {n: reply_of(key, n, 0, 1, 2) for n in range(3)})
    effects = machine.handle(RoundsFetched(identity_of("c").peer_id, state.id, (together,)), 4.0)
    starts = of(StartRound, effects)
    assert len(starts) == 1 and isinstance(starts[0], StartRound)
    assert starts[0].key == Key(12, state.id) and len(starts[0].shape.members) == 3
    # A reply to what was sent in the branch that was left is none of this round's.
    machine.handle(ReplyHeld(Key(12, state.id), 0, reply_of(Key(12, state.id), 0, 0)), 4.1)
    assert machine.held_reply(Key(12, state.id), 0) is None


def test_payloads_cut_for_another_shape_of_the_round_are_not_sent() -> None:
    state = standing("a", "b", "c")
    machine = machine_of("b", state)
    key = machine.exchange_key
    assert key is not None
    assert not machine.handle(ContributionReady(key, ROW, (b"whole",)), 1.0)
    assert machine.awaits(key)


# ---- starting anew --------------------------------------------------------------------------------------------


def test_who_started_anew_at_its_own_head_trains_on() -> None:
    state = standing("a", "b")
    machine = machine_of("a", state)
    assert of(StartRound, machine.handle(Synced(state), 1.0))


def test_who_started_anew_does_not_judge_itself_by_its_old_root() -> None:
    cluster = Cluster(root_interval=4)
    ada, grace, linus = cluster.group(3)
    base = (ada.head.round // 4 + 1) * 4
    cluster.until(lambda: min(p.head.round for p in (ada, grace, linus)) >= base, 30)
    for peer, root in ((ada, b"r" * 32), (grace, b"r" * 32), (linus, b"x" * 32)):
        roots(peer, base, root)
    cluster.until(lambda: bool(linus.resyncs), 20)
    cluster.until(lambda: ada.head.round > base + 3, 30)
    assert len(linus.resyncs) == 1


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_sealer_whose_own_root_differs_starts_anew_as_well(odd: int) -> None:
    cluster = Cluster(root_interval=8)
    peers = cluster.group(3)
    base = (peers[0].head.round // 8 + 1) * 8
    cluster.until(lambda: min(p.head.round for p in peers) >= base, 60)
    for number, peer in enumerate(peers):
        roots(peer, base, b"x" * 32 if number == odd else b"r" * 32)
    # Each of three is the first sealer in one of three rounds.
    cluster.until(lambda: min(p.head.round for p in peers) >= base + 6, 60)
    assert [len(peer.resyncs) > 0 for peer in peers] == [number == odd for number in range(3)]


@pytest.mark.parametrize("listens", [True, False])
def test_a_sealer_that_makes_up_a_root_has_nobody_load_its_state(listens: bool) -> None:
    """Whoever reduces has heard the others' roots; whoever does not waits for the others' seals."""
    cluster = Cluster(root_interval=8)
    ada, grace, linus = cluster.group(3)
    frances = cluster.add("frances", dialable=listens)
    cluster.until(lambda: len(ada.head.following) == 4 and all(m.included for m in ada.head.following), 60)
    base = (ada.head.round // 8 + 1) * 8
    everybody = (ada, grace, linus, frances)
    cluster.until(lambda: min(p.head.round for p in everybody) >= base, 60)
    false = b"\0" * 31 + b"x"
    for peer in everybody:
        roots(peer, base, false if peer is linus else b"r" * 32)
    linus.machine._majority_root = lambda shape: false  # type: ignore[method-assign]
    cluster.until(lambda: min(p.head.round for p in everybody) >= base + 7, 60)
    sealed = [sealed.seal.root for sealed in ada.rounds if sealed.seal.round >= base + 2]
    assert {false, b"r" * 32} <= set(sealed)
    assert [peer.resyncs for peer in (ada, grace, frances)] == [[], [], []]


# ---- floods ---------------------------------------------------------------------------------------------------


def sizes(machine: RoundMachine) -> int:
    """Entries in everything that others can make a machine remember."""
    return sum(
        len(value)
        for name in vars(machine)
        if isinstance(value := getattr(machine, name), dict | set | list) and name != "rules"
    )


def test_what_strangers_say_fills_no_memory() -> None:
    state = standing("a", "b")
    machine = machine_of("a", state)
    for number in range(3000):
        stranger = b"\x00\x24\x08\x01\x12\x20" + number.to_bytes(32)
        machine.handle(TipHeard(stranger, 5, hashlib.sha256(stranger).digest(), 3), 0.5)
        machine.handle(JoinReceived(stranger, ROW), 0.5)
    grace = identity_of("b").peer_id
    for part in range(3000):
        machine.handle(ContributionReceived(Key(12, state.id), part, grace, ROW, 0, b"", b"x" * 10, b""), 0.5)
    assert sizes(machine) < 1000


def test_seals_of_strangers_fill_no_memory() -> None:
    state = standing("a", "b")
    machine = machine_of("a", state)
    shape = chain.shape_of(state, CHUNKS)
    for number in range(300):
        stranger = b"\x00\x24\x08\x01\x12\x20" + number.to_bytes(32)
        body = Seal(1, RUN_ID, 11, state.id, 20, stranger, True, bytes(1), (b"d" * 32, b"d" * 32),
                    tuple(m.row for m in shape.members), (), b"")  # fmt: skip
        signed = SignedSeal(msgspec.msgpack.encode(body), bytes(64))
        machine.handle(SealHeard(chain.seal_id(signed.body), body, signed, stranger), 0.5)
    assert sizes(machine) < 400


def test_joins_never_make_a_group_larger_than_a_seal_can_hold() -> None:
    group = tuple(Member(n.to_bytes(38), Row(1, 1, 0), 0, True) for n in range(chain.MEMBERS_MAX - 3))
    me = member("a")
    lone = standing("a")
    state = ChainState(lone.run_id, 10, lone.id, lone.parent, 20, (me,), (me, *group))
    machine = machine_of("a", state)
    for number in range(40):
        machine.handle(JoinReceived(b"\x01" + number.to_bytes(37), ROW), 0.1)
    effects = contribute(machine, 1.0)
    reduce = of(Reduce, effects)[0]
    assert isinstance(reduce, Reduce)
    effects = machine.handle(ReplyHeld(reduce.key, 0, reply_of(reduce.key, 0, 0)), 1.1)
    assert of(PublishSeal, effects) and len(machine.head.following) == chain.MEMBERS_MAX


def test_who_asked_to_join_long_ago_and_went_away_is_not_admitted() -> None:
    state = standing("a", "b")
    machine = machine_of("b", state)
    machine.handle(JoinReceived(identity_of("z").peer_id, ROW), 0.1)
    head = state
    for number in range(6):
        sealed, head = seal_after(head, "a", {0: reply_of(Key(11 + number, head.parent), 0, 0, 1)})
        machine.handle(RoundsFetched(identity_of("a").peer_id, sealed.seal.parent, (sealed,)), 1.0 + number)
    assert identity_of("z").peer_id not in machine.admissions.pending


def test_a_member_that_was_dropped_asks_to_join_while_its_last_round_is_under_way() -> None:
    here, gone = member("a"), member("b")
    base = standing("a", "b")
    state = ChainState(base.run_id, 10, base.id, base.parent, 20, (here, gone), (here,))
    identity = identity_of("b")
    machine = RoundMachine(identity.peer_id, RoundRules(**RULES), state, identity.sign, ROW)
    effects = machine.start(0.0)
    assert of(StartRound, effects) and [e.sealer for e in of(SendJoin, effects)] == [here.peer_id]  # type: ignore[attr-defined]


def test_a_member_that_restarts_from_where_it_stood_goes_on_with_the_group() -> None:
    cluster = Cluster()
    ada, _, linus = cluster.group(3)
    states, rounds = list(linus.states), list(linus.rounds)
    cluster.kill(linus)
    cluster.run(4)
    reborn = Peer(cluster, linus.name, states[-1], founder=False, dialable=True)
    reborn.states, reborn.rounds, reborn.sent = states, rounds, linus.sent
    cluster.peers[cluster.peers.index(linus)] = cluster.by_id[reborn.id] = reborn
    cluster.run(60)
    assert cluster.one_chain(ada, reborn)
    assert reborn.contributed[-1][1], "its work counts"
    assert reborn.id in {m.peer_id for m in ada.head.now}
    cluster.check()


def test_a_seal_that_includes_others_than_its_replies_is_refused() -> None:
    cluster = Cluster()
    peers = cluster.group(3)
    shape = peers[0].machine.shape
    assert shape is not None
    sealer, honest = (cluster.by_id[shape.members[place].peer_id] for place in shape.sealer_order[:2])
    key = Key(shape.round, shape.base)
    cluster.until(lambda: not honest.machine.awaits(key), 10)
    cluster.kill(sealer)
    number = next(n for n, part in enumerate(shape.parts) if shape.members[part.reducer].peer_id == sealer.id)
    reply = Reply(hashlib.sha256(b"reply").digest(), frozenset({0, 1}), b"reply")
    honest.hears(ReplyHeld(key, number, reply))
    seal = Seal(
        version=chain.SEAL_VERSION,
        run_id=RUN_ID,
        round=shape.round,
        parent=honest.head.id,
        total=honest.head.total + 3,
        sealer=sealer.id,
        solo=False,
        included=chain.bitmap({0, 1, 2}, 3),
        parts=tuple(reply.digest if n == number else b"" for n in range(3)),
        rows=tuple(m.row for m in shape.members),
        joins=(),
        root=b"",
    )
    signed = chain.encode_seal(seal, sealer.identity.sign)
    honest.hears(SealHeard(chain.seal_id(signed.body), seal, signed, sealer.id))
    assert honest.head.round == shape.round - 1
    assert honest.notes[-1].kind == "refused"


# ---- whom to follow -------------------------------------------------------------------------------------------


def machine_with(name: str, state: ChainState, *introducers: str, **options: Any) -> RoundMachine:
    identity = identity_of(name)
    given = [identity_of(introducer).peer_id for introducer in introducers]
    machine = RoundMachine(
        identity.peer_id, RoundRules(**RULES), state, identity.sign, ROW, introducers=given, **options
    )
    machine.start(0.0)
    return machine


def far(name: str) -> TipHeard:
    """It says that it stands at a round far ahead."""
    return TipHeard(identity_of(name).peer_id, 900, hashlib.sha256(name.encode()).digest(), 10_000)


def test_a_newcomer_asks_those_it_was_sent_to_before_anyone_else() -> None:
    machine = machine_with("z", chain.genesis(RUN_ID), "b")
    assert not of(FetchRounds, machine.handle(far("a"), 0.5))
    (asked,) = of(FetchRounds, machine.handle(far("b"), 1.0))
    assert asked.donor == identity_of("b").peer_id  # type: ignore[attr-defined]
    # Where that one does not answer, others may.
    machine.handle(FetchFailed(identity_of("b").peer_id), 9.0)
    assert of(FetchRounds, machine.handle(Tick(), 10.5))


def test_a_tip_that_is_never_delivered_keeps_nothing_from_a_member() -> None:
    state = standing("a", "b", "c")
    machine = machine_of("a", state)
    assert of(FetchRounds, machine.handle(far("z"), 0.5))
    ahead = ChainState(RUN_ID, 13, bytes(31) + b"3", bytes(31) + b"2", 29, (), ())
    (asked,) = of(FetchRounds, machine.handle(tip("b", ahead), 0.6))
    assert asked.donor == identity_of("b").peer_id  # type: ignore[attr-defined]
    # Nor does it stand between a survivor and its solo seal.
    machine.handle(FetchFailed(identity_of("b").peer_id), 0.7)
    contribute(machine, 1.0)
    key = machine.exchange_key
    assert key is not None
    for now in (3.0, 8.0, 12.0, 20.0, 30.0, 40.0):
        effects = machine.handle(far("z"), now)
        for wanted in of(Reduce, effects):
            effects += machine.handle(ReplyHeld(key, wanted.part, reply_of(key, wanted.part, 0)), now)  # type: ignore[attr-defined]
        if of(PublishSeal, effects):
            break
    assert machine.head.round == 11


def test_a_stranger_that_delivers_nothing_is_asked_less_and_less() -> None:
    machine = machine_of("a", standing("a", "b"), alone_after_seconds=10_000.0, round_max_seconds=10_000.0)
    asked, now = [], 0.0
    while now < 2000.0:
        now += 1.0
        if of(FetchRounds, machine.handle(far("z"), now)):
            asked.append(now)
            machine.handle(FetchFailed(identity_of("z").peer_id), now)
    assert len(asked) < 12


def test_no_snapshot_is_fetched_from_a_stranger_while_those_we_know_stand_with_us() -> None:
    state = standing("a", "b", "c")
    machine = machine_of("a", state)
    machine.handle(tip("b", state), 0.4)
    machine.handle(far("z"), 0.5)
    effects = machine.handle(RoundsFetched(identity_of("z").peer_id, None, ()), 0.6)
    assert not of(Resync, effects)
    assert machine.refused_branch is not None and "0 of 3 members" in machine.refused_branch.why


def test_who_was_away_for_long_goes_where_those_are_that_it_knew() -> None:
    machine = machine_of("a", standing("a", "b", "c"))
    end = hashlib.sha256(b"far on").digest()
    for name in ("b", "c"):
        machine.handle(TipHeard(identity_of(name).peer_id, 900, end, 2000), 0.5)
    effects = machine.handle(RoundsFetched(identity_of("b").peer_id, None, ()), 0.6)
    assert of(Resync, effects)
    marks = [Mark(n, n.to_bytes(32, "big"), 2 * n, b"", False, frozenset()) for n in range(800, 900)]
    there = [*marks, Mark(900, end, 2000, b"", False, frozenset())]
    assert machine.worth_changing_to(there, identity_of("b").peer_id, 0.9)
    assert not machine.worth_changing_to(marks, identity_of("b").peer_id, 0.9), "nobody stands there"


def test_who_comes_back_where_it_was_sent_goes_over_though_it_knows_nobody_there() -> None:
    for introducers, follows in (((), False), (("z",), True)):
        machine = machine_with("a", standing("a"), *introducers)
        machine.handle(far("z"), 0.5)
        effects = machine.handle(RoundsFetched(identity_of("z").peer_id, None, ()), 0.6)
        assert bool(of(Resync, effects)) == follows


def test_who_stands_at_the_beginning_keeps_no_newcomer_there() -> None:
    """As others do that begin at the same time, and liars that hand nothing out: no seal is theirs, so no chain is."""
    beginning = chain.genesis(RUN_ID)
    machine = machine_with("n", beginning, "b", "v", "w", "x")
    for name in "vwx":
        machine.handle(tip(name, beginning), 0.4)
    machine.handle(far("b"), 0.5)
    assert of(Resync, machine.handle(RoundsFetched(identity_of("b").peer_id, None, ()), 0.6))
    marks = [Mark(n, n.to_bytes(32, "big"), 2 * n, b"", False, frozenset()) for n in range(800, 900)]
    there = [*marks, Mark(900, far("b").id, 10_000, b"", False, frozenset())]
    for name in "vwx":
        machine.handle(tip(name, beginning), 0.7)
    assert machine.worth_changing_to(there, identity_of("b").peer_id, 0.9)


@pytest.mark.parametrize("first", ["the many", "the one"])
def test_a_newcomer_that_was_sent_to_two_chains_ends_where_more_are_and_stays_there(first: str) -> None:
    """Whichever it came to first, and whatever the other one claims."""
    state = standing("a", "b", "c")
    machine = machine_with("n", state if first == "the many" else chain.genesis(RUN_ID), "a", "x")
    if first == "the one":
        machine.handle(far("x"), 0.1)
        assert of(Resync, machine.handle(RoundsFetched(identity_of("x").peer_id, None, ()), 0.2))
        made_up = ChainState(RUN_ID, 900, far("x").id, b"x" * 32, 10_000, (member("x"),), (member("x"),))
        machine.handle(Synced(made_up), 0.3)
        assert machine.head.round == 900
    for name in "abc":
        machine.handle(tip(name, state), 0.5)
    machine.handle(far("x"), 0.6)
    donor = "a" if first == "the one" else "x"
    effects = machine.handle(RoundsFetched(identity_of(donor).peer_id, None, ()), 0.7)
    assert bool(of(Resync, effects)) == (first == "the one")
    if first == "the one":
        machine.handle(Synced(state), 0.8)
        for name in "abc":
            machine.handle(tip(name, state), 0.9)
        machine.handle(far("x"), 20.0)
        for name in "abc":
            machine.handle(tip(name, state), 20.0)
        assert not of(Resync, machine.handle(RoundsFetched(identity_of("x").peer_id, None, ()), 20.1))


def test_a_newcomer_between_two_chains_with_one_peer_each_looks_at_both_and_stays() -> None:
    def other(name: str) -> ChainState:
        return ChainState(RUN_ID, 900, far(name).id, b"x" * 32, 10_000, (member(name),), (member(name),))

    machine, now, moves = machine_with("n", chain.genesis(RUN_ID), "x", "y"), 0.0, 0
    for _ in range(20):
        for name in "xy":
            now += 1.0
            for heard in "xy":
                machine.handle(far(heard), now)
            if of(Resync, machine.handle(RoundsFetched(identity_of(name).peer_id, None, ()), now)):
                machine.handle(Synced(other(name)), now)
                moves += 1
    assert moves == 2


def test_through_a_restart_it_is_remembered_with_whom_a_chain_was_shared() -> None:
    """After a restart in the middle of rounds that it sealed alone."""
    company = frozenset(identity_of(name).peer_id for name in "abc")
    for kept, follows in ((frozenset[bytes](), False), (company, True)):
        machine = machine_with("a", standing("a"), company=kept)
        end = hashlib.sha256(b"far on").digest()
        for name in ("b", "c"):
            machine.handle(TipHeard(identity_of(name).peer_id, 900, end, 2000), 0.5)
        effects = machine.handle(RoundsFetched(identity_of("b").peer_id, None, ()), 0.6)
        assert bool(of(Resync, effects)) == follows


def test_rounds_whose_replies_were_not_checked_are_never_adopted() -> None:
    state = standing("a", "b")
    machine = machine_of("a", state)
    sealed, after = seal_after(state, "b", {0: reply_of(Key(11, state.parent), 0, 0, 1)})
    machine.handle(tip("b", after), 0.5)
    effects = machine.handle(RoundsFetched(identity_of("b").peer_id, state.id, (sealed,), checked=False), 1.0)
    assert not of(Apply, effects) and not of(Resync, effects)
    assert of(Apply, machine.handle(RoundsFetched(identity_of("b").peer_id, state.id, (sealed,)), 1.1))


def test_no_peer_chooses_by_whom_it_is_judged() -> None:
    """By saying that it stands at a state from before the others came."""
    old = ChainState(RUN_ID, 5, b"5" * 32, b"4" * 32, 5, (member("f"),), (member("f"),))
    state = standing("a", "b", "x")
    machine = machine_with("a", state, past=[Mark.of(old), Mark.of(state)])
    machine.handle(tip("b", state), 0.2)
    machine.handle(tip("x", old), 0.3)
    machine.handle(far("x"), 0.5)
    assert not of(Resync, machine.handle(RoundsFetched(identity_of("x").peer_id, None, ()), 0.6))
    machine.handle(far("x"), 20.5)
    machine.handle(tip("b", state), 20.5)
    fetched = RoundsFetched(identity_of("x").peer_id, None, (), parted_at=old.id)
    assert not of(Resync, machine.handle(fetched, 20.6))


def test_a_fork_older_than_the_donors_journal_is_judged_by_those_who_were_there() -> None:
    """Also by one whom neither side has heard of since: both remember the state at which they parted."""
    shared = ChainState(RUN_ID, 5, b"5" * 32, b"4" * 32, 5, (member("c"), member("d")), (member("c"), member("d")))
    state = standing("a", "b")
    for stands_there, follows in ((True, True), (False, False)):
        machine = machine_with("a", state, past=[Mark.of(shared), Mark.of(state)])
        machine.handle(tip("b", state), 0.2)
        machine.handle(far("z"), 0.5)
        if stands_there:
            machine.handle(TipHeard(identity_of("c").peer_id, *_far_tip(machine)), 0.5)
        fetched = RoundsFetched(identity_of("z").peer_id, None, (), parted_at=shared.id)
        assert bool(of(Resync, machine.handle(fetched, 0.6))) == follows


def _far_tip(machine: RoundMachine) -> tuple[int, bytes, int]:
    heard = machine.fetching.tips[identity_of("z").peer_id]
    return heard.round, heard.id, heard.total


def test_a_seal_out_of_turn_is_not_followed_before_it_may_be_its_sealers_turn() -> None:
    state = standing("a", "b", "c")
    machine = machine_of("a", state)
    shape = machine.shape
    assert shape is not None
    last = shape.members[shape.sealer_order[-1]].peer_id
    name = next(name for name in "abc" if identity_of(name).peer_id == last)
    other = next(one for one in "bc" if one != name)
    empty, _ = seal_after(state, name, {})
    machine.handle(tip(other, state), 0.4)
    assert not of(Apply, machine.handle(heard(empty, name), 0.6)), "of nobody's work, at half of the round"
    machine.handle(tip(other, state), 1.4)
    assert not of(Apply, machine.handle(Tick(), 1.5))
    due = RULES["min_seconds"] + 1.5 * RULES["seal_timeout_seconds"]
    assert of(Apply, machine.handle(Tick(), due + 0.1))


@pytest.mark.parametrize("handed_out", ["nothing", "a seal"])
def test_a_sealer_that_has_owed_again_and_again_is_waited_for_half_as_long_twice(handed_out: str) -> None:
    """A seal whose replies nobody hands out holds the others up for less than none."""
    waits = {}
    for strikes in (0, 2, 3, 4, 8):
        # Round 192, in which whoever is on trial has a turn.
        group = (msgspec.structs.replace(member("a"), strikes=strikes), member("b"), member("c"))
        state = ChainState(RUN_ID, 191, b"6" * 32, b"5" * 32, 20, group, group)
        shape = chain.shape_of(state, CHUNKS)
        assert [shape.members[i].peer_id for i in shape.sealer_order] == [identity_of(n).peer_id for n in "abc"]
        machine = machine_of("b", state)
        contribute(machine, 1.0)
        key = machine.exchange_key
        assert key is not None
        for part in range(len(shape.parts)):
            effects = machine.handle(ReplyHeld(key, part, reply_of(key, part, 0, 1, 2)), 1.5)
        if handed_out == "a seal":
            others = {part: reply_of(key, part, 0, 1) for part in range(len(shape.parts))}
            machine.handle(heard(seal_after(state, "a", others)[0], "a"), 1.5)
        now = 1.5
        while not of(PublishSeal, effects):
            assert machine.wake_at is not None
            now = max(now, machine.wake_at)
            effects = machine.handle(Tick(), now)
        waits[strikes] = now - 1.5
    # Replies are waited for first; one of ours stays open, as nobody makes it here.
    replies, turn = RULES["reply_timeout_seconds"], RULES["seal_timeout_seconds"]
    if handed_out == "a seal":
        turn *= ASK_AFTER  # then its sealer is asked, and has as long as replies take
    assert waits == pytest.approx({n: replies + turn / times for n, times in {0: 1, 2: 1, 3: 2, 4: 4, 8: 4}.items()})


def test_that_the_peer_it_was_sent_to_is_ahead_makes_a_newcomer_trust_no_other_donor() -> None:
    machine = machine_with("z", standing("a", "b"), "i")
    machine.handle(tip("a", machine.head), 0.3)
    for name in ("i", "x"):
        machine.handle(far(name), 0.5)
    assert not of(Resync, machine.handle(RoundsFetched(identity_of("x").peer_id, None, ()), 0.6))
    assert of(Resync, machine.handle(RoundsFetched(identity_of("i").peer_id, None, ()), 0.7))


def test_a_peer_that_has_changed_chains_judges_the_one_it_left_by_who_was_there_before_they_parted() -> None:
    """Not by the members of the chain left: these stand on it, so the peer would go back, and to and fro for ever."""
    shared = ChainState(RUN_ID, 5, b"5" * 32, b"4" * 32, 5, (member("b"), member("c")), (member("b"), member("c")))
    left = ChainState(RUN_ID, 9, b"9" * 32, b"8" * 32, 9, (member("a"), member("d")), (member("a"), member("d")))
    gone_to = ChainState(RUN_ID, 8, b"7" * 32, b"6" * 32, 8, (member("b"),), (member("b"),))
    forks = machine_with("a", left, past=[Mark.of(shared), Mark.of(left)]).forks
    forks.known[identity_of("b").peer_id] = Mark.of(shared)
    forks.go_over_to([Mark.of(gone_to)], identity_of("b").peer_id)
    forks.note_tip(TipHeard(identity_of("b").peer_id, 8, gone_to.id, 8), 0.0)
    forks.note_tip(TipHeard(identity_of("d").peer_id, 9, left.id, 9), 0.0)
    judged = forks.follows_from_afar(Mark.of(left), None, identity_of("d").peer_id, 0.1, is_member=True)
    assert not judged.follow, judged.why


def fork_of(names: str) -> tuple[ChainState, list[Mark], RoundMachine]:
    """A peer `a` that has gone on alone from a state that it shared, and who sealed the other branch since."""
    shared = standing(*"abcd")
    sealed, mine = seal_after(shared, "a", {}, solo=True)
    before = Mark.of(shared)
    machine = machine_with("a", mine, past=[before, Mark.of(mine, sealed.seal, before)])
    theirs, state = [before], shared
    for name in names:
        sealed, state = seal_after(state, name, {})
        theirs.append(Mark.of(state, sealed.seal, theirs[-1]))
    return state, theirs, machine


def test_of_a_fork_older_than_the_donors_journal_those_count_who_sealed_it() -> None:
    """As they do on the own branch, though nobody hears them any more: else the side with fewer would never yield."""
    there, theirs, machine = fork_of("bcbcbc")
    donor = identity_of("z").peer_id
    for shown, follows in (((), False), (tuple(theirs), True)):
        machine.handle(tip("z", there), 30.0 if shown else 0.5)
        fetched = RoundsFetched(donor, None, (), parted_at=theirs[0].id, shown=shown)
        assert bool(of(Resync, machine.handle(fetched, 30.1 if shown else 0.6))) == follows
    assert machine.worth_changing_to(theirs[4:], donor, 30.2), "its snapshot is of later than where the chains parted"
    machine.handle(Synced(there, tuple(theirs[4:])), 30.3)
    assert [mark.id for mark in theirs] == [mark.id for mark in machine.forks.past.after(b"")], "without a gap"


def test_what_a_donor_shows_counts_only_as_far_as_its_chain_goes_through_it() -> None:
    """Else an honest branch that nobody is on any more would speak for a chain that has nothing to do with it."""
    _, theirs, machine = fork_of("bcbcbc")
    donor, end = identity_of("z").peer_id, far("z")
    machine.handle(end, 0.5)
    fetched = RoundsFetched(donor, None, (), parted_at=theirs[0].id, shown=tuple(theirs))
    assert not of(Resync, machine.handle(fetched, 0.6))
    elsewhere = [Mark(end.round, end.id, end.total, donor, False, frozenset())]
    # As if it had named another tip when it was asked.
    machine.forks.shown = tuple(theirs)
    assert not machine.worth_changing_to(elsewhere, donor, 0.7)


def test_of_a_fork_that_takes_several_answers_those_count_who_sealed_its_later_pieces() -> None:
    there, theirs, machine = fork_of("bcbcbc")
    machine._before = None  # as after a restart
    rounds, state = [], standing(*"abcd")
    for name in "bc":
        sealed, state = seal_after(state, name, {})
        rounds.append(sealed)
    donor = identity_of("z").peer_id
    machine.handle(tip("z", there), 0.5)
    fetched = RoundsFetched(donor, theirs[0].id, tuple(rounds), checked=False, shown=tuple(theirs))
    assert of(Resync, machine.handle(fetched, 0.6))
    assert machine.forks.shown == tuple(theirs)


def test_the_founder_of_a_young_run_takes_nobody_along_by_one_that_hands_its_chain_out_and_shows_no_seals() -> None:
    """It was alone where the two chains part, and has sealed with those that came: it speaks for neither."""
    state = standing("a", "b", "f")
    founder = identity_of("f").peer_id
    beginning = Mark(5, b"5" * 32, 5, founder, False, frozenset({founder}))
    since = [Mark(n, bytes([n]) * 32, 2 * n, founder, False, Mark.of(state).members) for n in range(6, 10)]
    machine = machine_with("a", state, past=[beginning, *since, Mark.of(state)])
    machine.handle(tip("b", state), 0.2)
    machine.handle(far("z"), 0.5)
    machine.handle(TipHeard(founder, *_far_tip(machine)), 0.5)
    fetched = RoundsFetched(identity_of("z").peer_id, None, (), parted_at=beginning.id)
    assert not of(Resync, machine.handle(fetched, 0.6))
