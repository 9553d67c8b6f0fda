"""How many shelves a run's records are on, and which is whose."""

from __future__ import annotations

import time
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.swarm.identity import new_identity
from p2ptrain.swarm.records import SHELVES_MAX, PeerRecord, peers_key
from p2ptrain.swarm.shelves import ONE_SHELF_MEMBERS, SHELF_RECORDS, agreed, shelf_key, shelf_of, shelves_for

POWERS = st.integers(0, SHELVES_MAX.bit_length() - 1).map(lambda power: 2**power)


@given(st.integers(0, 100_000), POWERS)
def test_no_shelf_of_several_is_crowded_and_none_is_there_for_nobody(members: int, before: int) -> None:
    shelves = shelves_for(members, before)
    assert 1 <= shelves <= SHELVES_MAX and shelves & (shelves - 1) == 0
    assert members <= max(ONE_SHELF_MEMBERS, SHELF_RECORDS * shelves) or shelves == SHELVES_MAX
    assert shelves == 1 or 3 * members > SHELF_RECORDS * shelves


@given(st.integers(ONE_SHELF_MEMBERS + 1, 500), POWERS)
def test_a_member_that_comes_and_goes_moves_no_records(members: int, before: int) -> None:
    shelves = shelves_for(members, before)
    # Where one more is too much, one less is no reason to go back.
    assert shelves_for(members, shelves_for(members + 1, shelves)) in (shelves, 2 * shelves)
    assert shelves_for(members + 1, shelves_for(members, shelves_for(members + 1, shelves))) == shelves_for(
        members + 1, shelves
    )


def test_peers_are_spread_evenly_whatever_their_ids() -> None:
    counted = Counter(shelf_of(new_identity().peer_id, 8) for _ in range(2000))
    assert set(counted) == set(range(8)) and max(counted.values()) < 2 * min(counted.values())


def test_one_shelf_is_where_a_runs_peers_are_looked_for_and_others_are_elsewhere() -> None:
    run = bytes(range(32))
    keys = {shelf_key(run, shelves, shelf) for shelves in (2, 4) for shelf in range(shelves)}
    assert shelf_key(run, 1, 0) == peers_key(run)
    assert len(keys) == 6 and peers_key(run) not in keys


def said(shelves: int) -> PeerRecord:
    identity = new_identity()
    return PeerRecord(
        peer_id=identity.peer_id,
        run_id=bytes(32),
        time=time.time(),
        name="peer",
        state="training",
        role="member",
        round=1,
        state_id=bytes(32),
        total=1,
        shelves=shelves,
    )


def test_a_few_who_lie_do_not_say_how_many_shelves_there_are() -> None:
    honest = [said(16) for _ in range(5)]
    assert agreed([*honest, said(1), said(256)]) == 16
    assert agreed([*honest, *(said(1) for _ in range(4))]) == 16
    assert agreed([said(13)]) == 8, "no number but a power of two is one of shelves"
    assert agreed([]) == 1
