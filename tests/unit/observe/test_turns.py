"""Whose turn it is to measure: the same for all, in rotation, and never a dead member's twice."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import ROW, RUN_ID, identity_of

from p2ptrain.chain import ChainState, Member, genesis
from p2ptrain.observe.turns import turn_at

PEERS = {name: identity_of(name).peer_id for name in ("ada", "grace", "linus", "edsger")}


def state(round: int, *names: str, dead: tuple[str, ...] = (), new: tuple[str, ...] = (), id: int = 0) -> ChainState:
    members = tuple(
        Member(PEERS[name], ROW, absent=-1 if name in new else int(name in dead), included=name not in (*dead, *new))
        for name in names
    )
    made = genesis(RUN_ID)
    return msgspec.structs.replace(made, round=round, id=bytes([id]) * 32, now=members, following=members)


def whose(state: ChainState, every: int = 10) -> str:
    turn = turn_at(state, every)
    assert turn is not None and (turn.round, turn.state_id) == (state.round, state.id)
    return next(name for name, peer in PEERS.items() if peer == turn.peer_id)


def test_each_of_four_members_has_every_fourth_turn() -> None:
    turns = [whose(state(10 * n, *PEERS)) for n in range(1, 41)]
    assert all(len({*four}) == 4 for four in zip(*(turns[n:] for n in range(4)), strict=False))
    assert set(Counter(turns).values()) == {10}


def test_nothing_that_a_sealer_chooses_changes_a_turn() -> None:
    for names in itertools.permutations(PEERS):
        assert whose(state(20, *names)) == whose(state(20, *PEERS, id=7)) == whose(state(20, *PEERS))


def test_whom_the_last_seal_left_out_has_no_turn_nor_has_who_was_never_in_one() -> None:
    for round in range(10, 200, 10):
        gone = whose(state(round, *PEERS))
        assert whose(state(round, *PEERS, dead=(gone,))) != gone
        assert whose(state(round, *PEERS, new=(gone,))) != gone
    # A member that dies in its turn costs that turn: the next interval is another's.
    assert all(whose(state(round, *PEERS)) != whose(state(round + 10, *PEERS)) for round in range(10, 200, 10))


def test_a_round_without_any_work_is_still_somebodys() -> None:
    assert whose(state(10, "ada", "grace", dead=("ada", "grace"))) in ("ada", "grace")
    assert turn_at(msgspec.structs.replace(state(10), following=()), 10) is None


@pytest.mark.parametrize(("round", "every"), [(0, 10), (5, 10), (11, 10), (10, 0)])
def test_between_turns_nothing_is_due(round: int, every: int) -> None:
    assert turn_at(state(round, *PEERS), every) is None
