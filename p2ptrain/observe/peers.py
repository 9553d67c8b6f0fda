"""What is to be said of a peer besides its record: how others reach it, and how it did in the last rounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from p2ptrain.observe.events import Sealed
from p2ptrain.observe.rounds import faults_of

DIRECT, RELAYED, CLIENT = "direct", "relayed", "client"
ROUNDS = 32
"""The last rounds, which share of work and lateness are of."""


def path_of(addresses: Iterable[str]) -> str:
    """Say how others reach a peer, by the addresses that it hands out: `direct`, `relayed`, or `client`: not at all."""
    given = list(addresses)
    if not given:
        return CLIENT
    return RELAYED if all("/p2p-circuit" in address for address in given) else DIRECT


@dataclass(frozen=True, slots=True)
class Standing:
    """How a member did in the last rounds."""

    rounds: int
    """That it was a member of, of the last `ROUNDS`."""
    late: int
    """Of them those that were sealed without it."""
    share: float
    """Of the group's work in all of these rounds, from 0 to 1."""
    parts: int
    """It reduces, in the newest round."""
    fault: str
    """What a seal held against it last; empty: nothing."""
    fault_round: int
    """Of that seal; 0: none."""


def standings(rounds: Iterable[Sealed]) -> dict[str, Standing]:
    """Return by peer id how each member did in the last `ROUNDS` of `rounds`, which are in order."""
    last = list(rounds)[-ROUNDS:]
    work = sum(member.weight for sealed in last for member in sealed.members)
    counts: dict[str, list[int]] = {}
    faults: dict[str, tuple[str, int]] = {}
    for sealed in last:
        for member in sealed.members:
            count = counts.setdefault(member.peer_id, [0, 0, 0, 0])
            count[0] += 1
            count[1] += not member.included
            count[2] += member.weight
            count[3] = member.parts if sealed is last[-1] else 0
        faults.update({peer: (fault, sealed.round) for peer, fault in faults_of(sealed).items()})
    return {
        peer: Standing(
            rounds=member,
            late=late,
            share=weight / work if work else 0.0,
            parts=parts,
            fault=faults.get(peer, ("", 0))[0],
            fault_round=faults.get(peer, ("", 0))[1],
        )
        for peer, (member, late, weight, parts) in counts.items()
    }
