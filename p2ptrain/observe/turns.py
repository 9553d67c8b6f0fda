"""Whose turn it is to measure the model: a member each interval, in an order that all work out alike from the chain.

The order is of hashes over the run's id and the peers' ids, and the turn follows from the round's number. So nothing
that a member or a sealer chooses brings a turn to it or takes one from another, and each of n members has every n-th
turn. Members that the last seal left out have none: a dead one loses the turn in which it died, and the next interval
is another's. Nobody waits for a figure that does not come.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from p2ptrain.chain import ChainState


@dataclass(frozen=True, slots=True)
class Turn:
    """Who is to measure which state of the model."""

    round: int
    state_id: bytes
    peer_id: bytes


def turn_at(state: ChainState, every_rounds: int) -> Turn | None:
    """Return who is to measure the model at `state`; None: no measurement is due there.

    Args:
        every_rounds: between two measurements; 0: there are none.
    """
    if not every_rounds or not state.round or state.round % every_rounds:
        return None
    members = [member.peer_id for member in state.following if member.included]
    order = sorted(members or (member.peer_id for member in state.following), key=lambda peer: _place(state, peer))
    if not order:
        return None
    return Turn(state.round, state.id, order[state.round // every_rounds % len(order)])


def _place(state: ChainState, peer_id: bytes) -> bytes:
    return hashlib.sha256(b"p2ptrain turn 1\0" + state.run_id + peer_id).digest()
