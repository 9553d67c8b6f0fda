"""Whose word on the model a peer takes: that of the member whose turn it was, of its own chain, and the first one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import RUN_ID, identity_of

from p2ptrain.observe.status import Status
from p2ptrain.observe.turns import Turn
from p2ptrain.peer.presence import Presence
from p2ptrain.swarm.records import EvaluationRecord, PeerRecord

A, B = bytes([1]) * 32, bytes([2]) * 32
ADA, GRACE = (identity_of(name).peer_id for name in ("ada", "grace"))


def says(round: int, bits: float, state_id: bytes = A) -> EvaluationRecord:
    return EvaluationRecord(round=round, state_id=state_id, figures={"bits_per_byte": bits}, tokens=64)


def record(peer_id: bytes, evaluation: EvaluationRecord | None) -> PeerRecord:
    return PeerRecord(
        peer_id=peer_id,
        run_id=RUN_ID,
        time=0.0,
        name="a",
        state="training",
        role="member",
        round=20,
        state_id=A,
        total=20,
        evaluation=evaluation,
    )


def presence(*turns: Turn) -> Presence:
    nobody = cast(Any, None)
    texts = {"run_name": "run", "name": "ada", "device": "cpu"}
    return Presence(
        nobody, nobody, Status(turns=turns), run_id=RUN_ID, signed_manifest=b"", addresses=[], **cast(Any, texts)
    )


def hears(of: Presence, **said: EvaluationRecord | None) -> list[tuple[bytes, float]]:
    peers = {identity_of(name).peer_id: one for name, one in said.items()}
    of._note_evaluations({peer: record(peer, one) for peer, one in peers.items()})
    return [(peer, one.figures["bits_per_byte"]) for peer, one in of.said]


def test_the_first_word_of_the_member_whose_turn_it_was_counts_and_no_other() -> None:
    one = presence(Turn(10, A, ADA), Turn(20, A, GRACE))
    assert hears(one, ada=None, grace=None) == []
    assert hears(one, grace=says(10, 0.1), linus=says(10, 0.1), mallory=says(20, 0.1)) == [], "not their turns"
    assert hears(one, ada=says(10, 0.1, B), grace=says(30, 0.1)) == [], "of another chain, and of no turn"
    assert hears(one, ada=says(10, 1.6)) == [(ADA, 1.6)]
    assert hears(one, ada=says(10, 0.1)) == [(ADA, 1.6)], "it has said something else before"
    assert hears(one, grace=says(20, 1.5)) == [(ADA, 1.6), (GRACE, 1.5)]


def test_what_is_of_a_branch_that_was_left_is_forgotten() -> None:
    one = presence(Turn(10, A, ADA))
    assert hears(one, ada=says(10, 1.6)) == [(ADA, 1.6)]
    one.hear(Status(turns=(Turn(10, B, ADA),)))
    assert hears(one, ada=says(10, 1.6)) == []
    assert hears(one, ada=says(10, 1.7, B)) == [(ADA, 1.7)]
