"""Deadlines: what is learned stays within bounds, and what that costs and saves on real machines."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from cluster import DELAY, RULES, RUN_ID, Cluster, Peer, identity_of

from p2ptrain import chain
from p2ptrain.chain import ChainState, Member, Row
from p2ptrain.rounds.deadlines import FLOOR_SECONDS, ROUNDS_LEARNING, Deadlines, HeadStart, Lateness, StandIn
from p2ptrain.rounds.events import CameLate, ContributionReady, ContributionReceived, Tick
from p2ptrain.rounds.machine import RoundMachine
from p2ptrain.rounds.rules import RoundRules

DURATIONS = st.floats(-1.0, 1000.0)
OBSERVATIONS = st.lists(st.tuples(st.sampled_from([bytes([n]) for n in range(8)]), DURATIONS), max_size=60)
BOUNDS = st.floats(0.001, 60.0)
ROUND_SECONDS = st.floats(0.0, 100.0)
ROW = Row(4, 16_000, 1000)

# ---- what is learned ------------------------------------------------------------------------------------------


def lateness_of(observations: list[tuple[bytes, float]], bound: float) -> Lateness:
    lateness = Lateness(bound)
    for member, seconds in observations:
        lateness.observe(member, seconds)
    return lateness


@given(OBSERVATIONS, BOUNDS, ROUND_SECONDS)
def test_no_wait_is_longer_than_the_manifest_allows_or_shorter_than_the_floor(
    observations: list[tuple[bytes, float]], bound: float, round_seconds: float
) -> None:
    seconds = lateness_of(observations, bound).wait_seconds(round_seconds)
    assert min(FLOOR_SECONDS, bound) <= seconds <= bound


@given(OBSERVATIONS, st.data(), BOUNDS, ROUND_SECONDS)
def test_whoever_comes_later_is_never_waited_for_less(
    observations: list[tuple[bytes, float]], data: st.DataObject, bound: float, round_seconds: float
) -> None:
    later = [(member, seconds + data.draw(st.floats(0.0, 10.0))) for member, seconds in observations]
    before = lateness_of(observations, bound).wait_seconds(round_seconds)
    assert lateness_of(later, bound).wait_seconds(round_seconds) >= before - 1e-9


@given(OBSERVATIONS, st.lists(DURATIONS, min_size=1, max_size=60), ROUND_SECONDS)
def test_one_member_alone_costs_the_others_half_of_what_its_work_is_worth_at_most(
    observations: list[tuple[bytes, float]], alone: list[float], round_seconds: float
) -> None:
    bound = 10.0
    others = max((min(max(seconds, 0.0), bound) for _, seconds in observations), default=0.0)
    lateness = lateness_of(observations + [(b"alone", seconds) for seconds in alone], bound)
    worth = round_seconds / (2 * (len(lateness) + 1))
    assert lateness.wait_seconds(round_seconds) <= FLOOR_SECONDS + max(1.5 * others, worth) + 1e-9


@given(OBSERVATIONS)
def test_only_members_are_remembered(observations: list[tuple[bytes, float]]) -> None:
    lateness = lateness_of(observations, 5.0)
    assert len(lateness) <= 8
    lateness.keep_only({b"\x00", b"\x01"})
    assert len(lateness) <= 2


@given(st.integers(2, 12), st.floats(0.1, 0.6))
def test_a_group_that_becomes_slower_is_waited_for_again_after_two_rounds(count: int, seconds: float) -> None:
    lateness = Lateness(2.0)
    members = [bytes([n]) for n in range(count)]
    for _ in range(20):
        for member in members:
            lateness.observe(member, 0.0)
    assert lateness.wait_seconds(1.0) == FLOOR_SECONDS
    for _ in range(2):
        for member in members:
            lateness.observe(member, seconds)
    assert lateness.wait_seconds(1.0) >= seconds


def test_a_group_a_quarter_of_which_is_new_is_learned_anew() -> None:
    """Three peers whose one newcomer is fast: the others are as late as that, and were not before."""
    for count, newcomers, again in ((2, 1, True), (6, 2, True), (6, 1, False), (30, 9, False)):
        deadlines, members = Deadlines(2.0, 2.0), [bytes([n]) for n in range(count)]
        deadlines.keep_only(members)
        for _ in range(ROUNDS_LEARNING):
            deadlines.observe_round(1.0)
            for member in members:
                deadlines.contributions.observe(member, 0.0)
        assert deadlines.grace_seconds == FLOOR_SECONDS
        deadlines.keep_only([*members, *(bytes([100 + n]) for n in range(newcomers))])
        worth = 1.0 / (2 * (count + newcomers + 1))
        assert deadlines.grace_seconds == (2.0 if again else FLOOR_SECONDS + worth)
        deadlines.keep_only(members[:1])
        assert deadlines.grace_seconds == (2.0 if again else FLOOR_SECONDS), "who leaves makes nobody late"


def test_who_learns_and_is_not_waited_for_hurries_until_it_has_learned() -> None:
    """A reducer among others who have learned longer: its first wait is the manifest's, its second is a share."""
    deadlines, members = Deadlines(2.0, 2.0), [bytes([n]) for n in range(3)]
    deadlines.keep_only(members)
    deadlines.keep_only(members)  # none of them is new any more
    waits = []
    for _ in range(ROUNDS_LEARNING + 1):
        waits.append(deadlines.wait_seconds(members[:1]))
        deadlines.observe_round(1.0)
        for member in members[1:]:
            deadlines.contributions.observe(member, 0.0)
        deadlines.observe_own_part(sealed=len(waits) > 1)
    share = FLOOR_SECONDS + 1.0 / 8
    assert waits == [2.0, *[pytest.approx(share)] * ROUNDS_LEARNING], "the last is what it learned"
    deadlines.keep_only([*members, bytes([9])])
    assert deadlines.wait_seconds(members[:1]) == 2.0, "another group, which learns as we do"


def test_members_of_whom_nothing_is_known_are_waited_for_as_the_slowest_are() -> None:
    """They may have been here before, and forgotten since."""
    deadlines = Deadlines(2.0, 2.0)
    members = [bytes([n]) for n in range(6)]
    deadlines.keep_only(members)
    for _ in range(ROUNDS_LEARNING):
        deadlines.observe_round(1.2)
        for member in members:
            deadlines.contributions.observe(member, 0.0)
    deadlines.keep_only(members[:1])
    deadlines.keep_only(members[:2])
    assert deadlines.grace_seconds == pytest.approx(FLOOR_SECONDS + 1.2 / 6)
    deadlines.keep_only(members)
    assert deadlines.grace_seconds == 2.0
    for member in members:
        deadlines.contributions.observe(member, 0.0)
    assert deadlines.grace_seconds == FLOOR_SECONDS


@given(st.lists(st.booleans(), max_size=60), st.floats(0.1, 60.0))
def test_who_is_left_out_computes_less_but_never_under_half_until_its_last_chance(
    outcomes: list[bool], length: float
) -> None:
    head_start = HeadStart()
    for included in outcomes:
        before = head_start.computing_seconds(length, last_chance=False)
        head_start.observe(included)
        after = head_start.computing_seconds(length, last_chance=False)
        assert length / 2 <= after <= length
        assert after >= before if included else after == pytest.approx(max(before - length / 8, length / 2))
        assert head_start.computing_seconds(length, last_chance=True) == 3 / 8 * length
    assert Deadlines(2.0, 2.0, learns=False).computing_seconds(length, last_chance=True) == length


def test_until_enough_was_observed_the_manifest_decides_and_with_fixed_pace_always() -> None:
    for learns in (True, False):
        deadlines = Deadlines(2.0, 4.0, learns=learns)
        for number in range(20):
            if number < ROUNDS_LEARNING or not learns:
                assert (deadlines.grace_seconds, deadlines.reply_seconds) == (2.0, 4.0)
            else:
                assert deadlines.grace_seconds == FLOOR_SECONDS and deadlines.reply_seconds == 2 * FLOOR_SECONDS
            deadlines.observe_round(1.0)
            for member in (b"a", b"b"):
                deadlines.contributions.observe(member, 0.0)
                deadlines.replies.observe(member, 0.0)


@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 10.0)), max_size=60), st.floats(0.001, 60.0))
def test_a_late_trainer_is_given_half_of_the_grace_at_most_and_ever_less_in_a_row(
    outcomes: list[tuple[bool, float]], grace: float
) -> None:
    stand_in = StandIn(2.0)
    for included, waited in outcomes:
        before = stand_in.wait_seconds(grace)
        assert 0 < before <= grace / 2
        stand_in.observe(included, waited)
        assert stand_in.wait_seconds(grace) <= 1.01 * before
    stand_in.observe_ready()
    assert stand_in.wait_seconds(grace) <= grace / 2


# ---- what a machine lets count --------------------------------------------------------------------------------


def test_only_members_and_each_once_a_round_can_stretch_a_deadline() -> None:
    names = ("a", "b", "c", "d")
    group = tuple(Member(identity_of(name).peer_id, ROW, 0, True) for name in names)
    state = ChainState(RUN_ID, 10, b"h" * 32, b"p" * 32, 20, group, group)
    identity = identity_of("a")
    machine = RoundMachine(identity.peer_id, RoundRules(**RULES), state, identity.sign, ROW)
    machine.start(0.0)
    key, shape = machine.exchange_key, machine.shape
    assert key is not None and shape is not None
    part = next(n for n, part in enumerate(shape.parts) if shape.members[part.reducer].peer_id == identity.peer_id)
    machine.handle(ContributionReady(key, ROW, (b"x",) * len(shape.parts)), 1.0)
    for name in "bc":
        machine.handle(ContributionReceived(key, part, identity_of(name).peer_id, ROW, 0, b"", b"x", b""), 1.0)
    machine.handle(Tick(), 1.0 + RULES["grace_seconds"])
    lateness = machine._deadlines.contributions
    machine.handle(CameLate(key, part, identity_of("z").peer_id), 2.1)
    machine.handle(CameLate(key, part, identity_of("b").peer_id), 2.1)
    machine.handle(CameLate(key, part + 1, identity_of("d").peer_id), 2.1)
    assert lateness.wait_seconds(100.0) == FLOOR_SECONDS
    machine.handle(CameLate(key, part, identity_of("d").peer_id), 1.4)
    once = lateness.wait_seconds(100.0)
    assert once == pytest.approx(FLOOR_SECONDS + 1.5 * 0.4)
    machine.handle(CameLate(key, part, identity_of("d").peer_id), 9.0)
    assert lateness.wait_seconds(100.0) == once and len(lateness) == 3


# ---- what it costs and saves ----------------------------------------------------------------------------------


def links(cluster: Cluster, seed: int) -> list[float]:
    """Give each link a delay of its own, 10 to 60 ms, and jitter; returns a list whose only entry scales all."""
    choose = random.Random(seed)
    bases: dict[frozenset[str], float] = {}
    scale = [1.0]

    def delay(sender: Peer, receiver: Peer) -> float:
        base = bases.setdefault(frozenset((sender.name, receiver.name)), choose.uniform(0.01, 0.06))
        return scale[0] * (base + choose.expovariate(50.0))

    cluster.delay = delay
    return scale


def rounds_on(cluster: Cluster, peer: Peer, count: int) -> float:
    """Run until `peer` has applied `count` more rounds; returns seconds per round."""
    end = peer.head.round + count
    return cluster.until(lambda: peer.head.round >= end, 20.0 * count) / count


def left_out(peer: Peer, other: Peer, since: int) -> list[bool]:
    """For each round of `peer`'s chain after round `since`, whether its seal leaves `other` out."""
    absences = []
    for sealed, before in zip(peer.rounds[since:], peer.states[since:], strict=False):
        place = chain.shape_of(before, RULES["chunks"]).index(other.id)
        assert place is not None, "dropped from the group"
        absences.append(not sealed.seal.included[place // 8] >> place % 8 & 1)
    return absences


def rounds_with_work_of(peer: Peer, other: Peer, since: int) -> int:
    """Rounds of `peer`'s chain after round `since` in whose replies a gradient of `other` is."""
    work = f'"{other.name}/'.encode()
    return sum(any(work in reply for reply in sealed.replies if reply) for sealed in peer.rounds[since:])


def seconds_a_round(count: int, seed: int | None) -> float:
    """Of a group in which nobody is slow."""
    cluster = Cluster()
    if seed is not None:
        links(cluster, seed)
    return rounds_on(cluster, cluster.group(count)[0], 80)


@pytest.mark.parametrize(("count", "seed"), [(6, None), (6, 1), (6, 2), (3, 1)])
def test_a_straggler_costs_the_others_little_and_its_gradient_still_counts(count: int, seed: int | None) -> None:
    cluster = Cluster()
    if seed is not None:
        links(cluster, seed)
    peers = cluster.group(count)
    rounds_on(cluster, peers[0], 16)  # those who joined last are known by then
    peers[-1].slowness = 50.0
    since = peers[0].head.round
    seconds = rounds_on(cluster, peers[0], 240)
    assert seconds <= 1.1 * seconds_a_round(count, seed)
    if count > 3:  # two alone have no deadlines
        assert seconds <= 1.1 * seconds_a_round(count - 1, seed)
    assert rounds_with_work_of(peers[0], peers[-1], since) >= 4
    assert sum(left_out(peers[0], peers[-1], since)) <= 2
    cluster.check()


@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize("slow_seconds", [0.1, 0.2, 0.3])
def test_a_member_on_a_slow_line_computes_less_and_is_in_time(count: int, slow_seconds: float) -> None:
    """Twice its delay, late to hear of a seal and late to answer, is up to three fifths of the time to compute."""
    cluster = Cluster()
    links(cluster, 1)
    peers = cluster.group(count)
    usual = cluster.delay
    assert usual is not None
    cluster.delay = lambda a, b: usual(a, b) + (slow_seconds if peers[-1] in (a, b) else 0.0)
    rounds_on(cluster, peers[0], 16)
    since = peers[0].head.round
    rounds_on(cluster, peers[0], 120)
    absences = "".join("x" if out else "." for out in left_out(peers[0], peers[-1], since))
    assert "xxx" not in absences
    assert rounds_with_work_of(peers[0], peers[-1], since) >= 90
    cluster.check()


def test_even_when_half_of_the_others_are_stragglers_the_rest_goes_on_at_its_pace() -> None:
    cluster = Cluster()
    links(cluster, 1)
    peers = cluster.group(6)
    alone = rounds_on(cluster, peers[0], 60)
    for peer in peers[3:]:
        peer.slowness = 50.0
    since = peers[0].head.round
    assert rounds_on(cluster, peers[0], 120) <= 1.15 * alone
    for peer in peers[3:]:
        assert rounds_with_work_of(peers[0], peer, since) >= 2
        assert sum(left_out(peers[0], peer, since)) <= 3


def test_a_dead_reducer_costs_less_than_the_reply_timeout_of_the_manifest() -> None:
    cluster = Cluster()
    links(cluster, 1)
    peers = cluster.group(6)
    usual = rounds_on(cluster, peers[0], 30)
    shape = peers[0].machine.shape
    assert shape is not None
    # The last in the order: not a sealer that is waited for as well.
    dead = cluster.by_id[shape.members[shape.sealer_order[-1]].peer_id]
    other = next(peer for peer in peers if peer is not dead)
    cluster.kill(dead)
    owing = 0
    for _ in range(4):
        assert rounds_on(cluster, other, 1) < usual + RULES["reply_timeout_seconds"] / 4
        owing += b"" in other.rounds[-1].seal.parts
    assert owing >= 2
    assert cluster.one_chain(*[peer for peer in peers if peer.alive])


@pytest.mark.parametrize(("count", "seed"), [(6, 1), (6, 2), (6, 3), (4, 4), (3, 4), (3, 3)])
def test_when_the_network_becomes_ten_times_slower_nobody_is_left_out_for_long(count: int, seed: int) -> None:
    cluster = Cluster()
    scale = links(cluster, seed)
    peers = cluster.group(count)
    rounds_on(cluster, peers[0], 40)
    since = peers[0].head.round
    scale[0] = 10.0
    rounds_on(cluster, peers[0], 60)
    for peer in peers:
        absences = left_out(peers[0], peer, since)
        assert sum(absences[:8]) <= 3
        assert sum(absences[8:]) <= 1, "the others have adapted"
        assert rounds_with_work_of(peers[0], peer, since) >= 55
    cluster.check()


def test_with_fixed_pace_all_are_waited_for() -> None:
    cluster = Cluster(fixed_pace=True)
    peers = cluster.group(4)
    rounds_on(cluster, peers[0], 10)
    peers[-1].slowness = 3.0
    since = peers[0].head.round
    assert rounds_on(cluster, peers[0], 20) >= 3.0 * RULES["min_seconds"] - DELAY
    assert rounds_with_work_of(peers[0], peers[-1], since) == 20
