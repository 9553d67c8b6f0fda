"""Claims of the protocol, on real machines with a clock that the test moves."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import DELAY, RULES, Cluster, Peer, roots

from p2ptrain import chain
from p2ptrain.chain import Row
from p2ptrain.chain.sealed import Key
from p2ptrain.rounds.events import ContributionReceived, Tick


def included(peer: Peer, place: int = -1) -> set[bytes]:
    """Who the seal at that place of a peer's chain includes."""
    sealed, before = peer.rounds[place], peer.states[place - 1]
    members = chain.shape_of(before, RULES["chunks"]).members
    return {members[i].peer_id for i in chain.bits(sealed.seal.included, len(members))}


def members(peer: Peer) -> set[bytes]:
    return {member.peer_id for member in peer.head.now}


def test_a_founder_seals_the_first_round_at_once_and_trains_on_alone() -> None:
    cluster = Cluster()
    ada = cluster.add("a", founder=True)
    assert ada.head.round == 1 and ada.rounds[0].seal.solo
    cluster.run(20)
    assert ada.head.round > 10
    assert ada.head.total == ada.head.round - 1  # the first seal includes nobody
    cluster.check()


def test_who_does_not_found_a_run_waits_for_one() -> None:
    cluster = Cluster()
    grace = cluster.add("b")
    cluster.run(60)
    assert grace.head.round == 0


def test_a_newcomer_is_a_member_two_rounds_after_the_seal_that_admits_it() -> None:
    cluster = Cluster()
    ada = cluster.add("a", founder=True)
    cluster.run(10)
    grace = cluster.add("b")
    cluster.until(lambda: any(join.peer_id == grace.id for sealed in ada.rounds for join in sealed.seal.joins), 10)
    admitted = ada.head.round
    cluster.until(lambda: grace.id in members(ada), 10)
    assert ada.head.round == admitted + 1  # its `now` is of round admitted + 2
    cluster.run(20)
    assert included(ada) == {ada.id, grace.id}
    assert cluster.one_chain(ada, grace)
    cluster.check()


def test_a_group_goes_on_together_round_by_round() -> None:
    cluster = Cluster()
    peers = cluster.group(4)
    before = peers[0].head.round
    cluster.run(30)
    assert peers[0].head.round > before + 15
    assert cluster.one_chain(*peers)
    assert included(peers[0], -2) == {peer.id for peer in peers}
    cluster.check()


def test_a_slow_peer_stays_a_member_with_weight_zero() -> None:
    cluster = Cluster()
    ada, grace, linus = cluster.group(3)
    linus.slowness = None
    cluster.run(60)
    assert linus.id in members(ada) and linus.id in included(ada, -2)
    row = next(member.row for member in ada.head.now if member.peer_id == linus.id)
    assert row.weight == 0
    assert not any(contributed for number, contributed in linus.contributed[-5:])
    assert cluster.one_chain(ada, grace, linus)


def test_a_dead_member_is_waited_for_until_the_deadline_and_is_out_after_three_seals() -> None:
    cluster = Cluster()
    ada, grace, linus = cluster.group(3)
    cluster.kill(linus)
    died_in = ada.head.round
    worst = RULES["max_seconds"] + RULES["round_max_seconds"] + RULES["grace_seconds"] + RULES["reply_timeout_seconds"]
    for _ in range(3):
        number = ada.head.round
        assert cluster.until(lambda number=number: ada.head.round > number, 60) < worst + RULES["seal_timeout_seconds"]
    cluster.until(lambda: linus.id not in members(ada), 60)
    assert ada.head.round <= died_in + 6
    cluster.run(10)
    assert cluster.one_chain(ada, grace)
    cluster.check()


def test_the_second_place_seals_one_timeout_after_a_dead_sealer() -> None:
    cluster = Cluster()
    peers = cluster.group(3)
    shape = peers[0].machine.shape
    assert shape is not None
    first, second = (cluster.by_id[shape.members[place].peer_id] for place in shape.sealer_order[:2])
    third = next(peer for peer in peers if peer not in (first, second))
    number = shape.round
    # It dies when its reply is on the way to all, in the moment before it could seal.
    cluster.until(lambda: any(key.round == number for key, _ in first.frozen), 20)
    cluster.kill(first)
    seconds = cluster.until(lambda: second.head.round == number, 30)
    limit = RULES["reply_timeout_seconds"] + RULES["seal_timeout_seconds"]
    assert seconds <= limit + 2 * DELAY
    cluster.run(1)
    assert third.head.id == second.head.id
    assert any(note.kind == "takeover" for note in second.notes)


def test_a_reply_half_handed_out_is_sealed_and_fetched_by_those_who_lack_it() -> None:
    cluster = Cluster()
    peers = cluster.group(3)
    dying = peers[0]
    dying.replies_left = 1
    cluster.until(lambda: not dying.alive, 20)
    others = [peer for peer in peers if peer.alive]
    number = max(peer.head.round for peer in others) + 1
    cluster.until(lambda: all(peer.head.round >= number + 1 for peer in others), 60)
    assert cluster.one_chain(*others)
    for sealed in others[0].rounds[-3:]:
        for digest, reply in zip(sealed.seal.parts, sealed.replies, strict=True):
            assert (digest == b"") == (reply is None)
    assert [s.id for s in others[0].rounds[:number]] == [s.id for s in others[1].rounds[:number]]
    cluster.check()


def test_a_reducer_that_dies_before_its_reply_costs_its_part_alone() -> None:
    cluster = Cluster()
    ada, grace, linus = cluster.group(3)
    linus.replies_left = 0
    cluster.until(lambda: not linus.alive, 20)
    number = max(ada.head.round, grace.head.round)
    cluster.until(lambda: min(ada.head.round, grace.head.round) > number, 60)
    sealed = ada.rounds[number]
    assert sum(part == b"" for part in sealed.seal.parts) == 1
    assert cluster.one_chain(ada, grace)


def test_a_learner_carries_the_run_on_when_the_only_member_dies() -> None:
    cluster = Cluster()
    ada = cluster.add("a", founder=True)
    cluster.run(10)
    grace = cluster.add("b")
    cluster.until(lambda: grace.head.round == ada.head.round, 10)
    cluster.kill(ada)
    assert not any(member.peer_id == grace.id for member in grace.head.now)
    number = grace.head.round
    seconds = cluster.until(lambda: grace.head.round > number, 60)
    assert seconds <= RULES["alone_after_seconds"] + RULES["seal_timeout_seconds"] + 2
    assert grace.rounds[-1].seal.solo
    cluster.run(20)
    assert grace.head.round > number + 8 and members(grace) == {grace.id}
    cluster.check()


def test_a_learner_that_lags_far_behind_does_not_take_itself_for_the_last_one_alive() -> None:
    cluster = Cluster()
    ada = cluster.add("a", founder=True)
    cluster.run(40)
    grace = cluster.add("b")
    cluster.run(30)
    assert not any(sealed.seal.sealer == grace.id and sealed.seal.solo for sealed in grace.rounds)
    assert cluster.one_chain(ada, grace)


def test_a_fork_of_depth_one_heals_to_the_larger_total() -> None:
    cluster = Cluster(alone_after_seconds=9.0)
    ada, grace, linus = cluster.group(3)
    # Linus alone seals a round that the others, who go on as two, seal as well.
    cluster.split([ada, grace], [linus])
    cluster.until(lambda: linus.rounds[-1].seal.solo and min(ada.head.round, grace.head.round) >= linus.head.round, 90)
    assert not linus.rounds[-2].seal.solo
    fork = linus.head
    assert fork.id not in {state.id for state in ada.states}
    cluster.heal()
    cluster.run(40)
    assert cluster.one_chain(ada, grace, linus)
    assert {ada.id, grace.id, linus.id} == members(ada)
    assert linus.rollbacks == 1 and not linus.resyncs
    assert fork.id not in {state.id for state in linus.states}
    cluster.check()


def test_two_that_trained_apart_meet_on_the_chain_of_more_work_and_train_together() -> None:
    cluster = Cluster()
    ada, grace = cluster.group(2)
    cluster.split([ada], [grace])
    grace.slowness = 3.0
    cluster.run(60)
    assert members(ada) == {ada.id} and members(grace) == {grace.id}
    winner = max((ada, grace), key=lambda peer: peer.head.total)
    tip = winner.head.id
    cluster.heal()
    grace.slowness = 1.0
    cluster.run(40)
    assert tip in {state.id for state in ada.states} and tip in {state.id for state in grace.states}
    assert members(ada) == members(grace) == {ada.id, grace.id}
    assert cluster.one_chain(ada, grace)
    cluster.check()


def test_a_group_cut_in_two_halves_is_one_again_when_the_link_is_back() -> None:
    cluster = Cluster()
    peers = cluster.group(4)
    cluster.split(peers[:2], peers[2:])
    cluster.run(60)
    cluster.heal()
    cluster.run(80)
    assert cluster.one_chain(*peers)
    assert members(peers[0]) == {peer.id for peer in peers}
    cluster.check()


def test_totals_never_shrink() -> None:
    cluster = Cluster()
    peers = cluster.group(3)
    cluster.split(peers[:1], peers[1:])
    totals = [peer.head.total for peer in peers]
    for second in range(120):
        if second == 50:
            cluster.heal()
        cluster.run(1)
        now = [peer.head.total for peer in peers]
        assert all(after >= before for before, after in zip(totals, now, strict=True))
        totals = now


def test_a_peer_that_says_goodbye_is_not_waited_for() -> None:
    cluster = Cluster()
    ada, grace, linus = cluster.group(3)
    cluster.until(lambda: ada.machine.shape is not None and ada.head.round == grace.head.round == linus.head.round, 10)
    cluster.leave(linus)
    number = ada.head.round
    seconds = cluster.until(lambda: ada.head.round > number, 60)
    assert seconds < RULES["max_seconds"] + RULES["reply_timeout_seconds"] + RULES["seal_timeout_seconds"]


def test_a_contribution_is_refused_with_a_reason() -> None:
    cluster = Cluster()
    ada, grace = cluster.group(2)
    cluster.until(lambda: ada.head.id == grace.head.id, 5)
    shape, key = ada.machine.shape, ada.machine.exchange_key
    assert shape is not None and key is not None
    mine = next(n for n, part in enumerate(shape.parts) if shape.members[part.reducer].peer_id == ada.id)
    stranger = cluster.add("z")
    assert ada.machine.refusal(key, mine, stranger.id) == "not a member"
    assert ada.machine.refusal(key, 1 - mine, grace.id) == "not the reducer"
    assert ada.machine.refusal(Key(key.round - 1, key.base), mine, grace.id) == "late"
    assert ada.machine.refusal(Key(key.round, bytes(32)), mine, grace.id) == "foreign"
    assert ada.machine.refusal(Key(key.round + 5, key.base), mine, grace.id) == "too early"
    ada.hears(ContributionReceived(key, mine, grace.id, Row(1, 1, 1), 0, b"", b"x", b""))
    assert ada.machine.refusal(key, mine, grace.id) == "twice"


def test_what_comes_one_round_early_is_kept_and_used() -> None:
    cluster = Cluster()
    ada, grace = cluster.group(2)
    cluster.until(lambda: ada.head.id == grace.head.id, 5)
    early = Key(ada.head.round + 2, ada.head.id)
    assert ada.machine.refusal(early, 0, grace.id) is None
    ada.hears(ContributionReceived(early, 0, grace.id, Row(1, 1, 1), 0, b"", b"grace, early", b""))
    assert ada.machine.refusal(early, 0, grace.id) == "twice"
    cluster.until(lambda: ada.head.round == early.round, 30)
    shape = chain.shape_of(ada.states[-2], RULES["chunks"])
    if shape.members[shape.parts[0].reducer].peer_id == ada.id:
        assert b"grace, early" in (ada.rounds[-1].replies[0] or b"")


def test_after_a_timer_that_fired_late_a_peer_asks_before_it_seals() -> None:
    cluster = Cluster()
    ada, grace = cluster.group(2)
    cluster.split([ada], [grace])
    cluster.run(RULES["max_seconds"] + RULES["reply_timeout_seconds"])
    number = ada.head.round
    ada.hears(Tick(late=True))
    cluster.run(RULES["seal_timeout_seconds"] - 0.1)
    assert ada.head.round == number


def test_a_replica_that_differs_from_the_sealed_root_starts_anew_from_the_others() -> None:
    cluster = Cluster(root_interval=4)
    ada, grace, linus = cluster.group(3)
    base = (ada.head.round // 4 + 1) * 4
    cluster.until(lambda: min(p.head.round for p in (ada, grace, linus)) >= base, 30)
    for peer, root in ((ada, b"r" * 32), (grace, b"r" * 32), (linus, b"x" * 32)):
        roots(peer, base, root)
    cluster.run(12)
    assert [effect.why for effect in linus.resyncs]
    assert not ada.resyncs and not grace.resyncs


def test_a_peer_that_nobody_can_dial_trains_with_the_others_and_reduces_nothing() -> None:
    cluster = Cluster()
    ada, grace, linus = cluster.group(3, dialable=False)
    cluster.run(10)
    shape = ada.machine.shape
    assert shape is not None
    assert {shape.members[part.reducer].peer_id for part in shape.parts} == {ada.id}
    assert included(ada, -2) == {ada.id, grace.id, linus.id}


def test_the_others_go_on_when_the_only_reducer_dies() -> None:
    cluster = Cluster()
    ada = cluster.add("a", founder=True)
    cluster.run(3)
    grace = cluster.add("b", dialable=False)
    cluster.until(lambda: members(grace) == {ada.id, grace.id}, 30)
    linus = cluster.add("c")
    everyone = {ada.id, grace.id, linus.id}
    cluster.until(lambda: members(grace) == members(linus) == everyone, 30)
    assert grace.machine.shape is not None and len(grace.machine.shape.parts) == 1
    cluster.kill(ada)
    number = grace.head.round
    cluster.until(lambda: min(grace.head.round, linus.head.round) >= number + 3, 60)
    assert any(not any(sealed.seal.parts) and not sealed.seal.solo for sealed in grace.rounds)
    cluster.until(lambda: included(grace) == {grace.id, linus.id}, 60)
    assert cluster.one_chain(grace, linus)
    cluster.check()


def test_a_run_ends_with_its_last_round() -> None:
    cluster = Cluster(last_round=20)
    ada, grace = cluster.group(2)
    cluster.run(60)
    assert ada.head.round == 20 and grace.head.id == ada.head.id


@pytest.mark.parametrize("seed", range(40))
def test_any_history_of_cuts_deaths_and_stalls_ends_on_one_chain(seed: int) -> None:
    choose = random.Random(seed)
    cluster = Cluster(alone_after_seconds=choose.choice([3.0, 6.0, 9.0]))
    peers = [cluster.add("a", founder=True)]
    cluster.run(choose.uniform(0, 5))
    peers += [cluster.add(name) for name in "bcde"[: choose.randrange(1, 5)]]
    cluster.until(lambda: all(peer.head.round for peer in peers), 10)
    cluster.run(choose.uniform(0, 15))
    for _ in range(choose.randrange(1, 8)):
        _misfortune(cluster, choose)
        cluster.run(choose.uniform(0, 25))
    cluster.heal()
    live = [peer for peer in peers if peer.alive]
    for peer in live:
        peer.replies_left = None
    everyone = {peer.id for peer in live}
    cluster.until(lambda: cluster.one_chain(*live) and all(members(peer) == everyone for peer in live), 200)
    number = live[0].head.round
    cluster.run(30)
    assert live[0].head.round > number
    cluster.check()


def _misfortune(cluster: Cluster, choose: random.Random) -> None:
    live = [peer for peer in cluster.peers if peer.alive]
    kind = choose.random()
    if kind < 0.35 and len(live) > 1:
        side = choose.sample(live, choose.randrange(1, len(live)))
        cluster.split(side, [peer for peer in live if peer not in side])
    elif kind < 0.6:
        cluster.heal()
    elif kind < 0.75 and len(live) > 2:
        cluster.kill(choose.choice(live))
    elif kind < 0.85 and len(live) > 2:
        choose.choice(live).replies_left = choose.randrange(3)
    elif kind < 0.95:
        choose.choice(live).slowness = choose.choice([1.0, 2.0, 5.0, 15.0])
    else:
        choose.choice(live).hears(Tick(late=True))
