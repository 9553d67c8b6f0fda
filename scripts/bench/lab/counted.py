"""How much of a peer's work counted, by the seals that another peer has kept of the rounds it went through."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from p2ptrain import chain
from p2ptrain.config.home import Home
from p2ptrain.state.seals import SealLog, steps
from p2ptrain.swarm.identity import load_or_create_identity, verify


class Work(NamedTuple):
    """What one peer did in some rounds."""

    rounds: int
    """In all."""
    member: int
    """In which it was a member."""
    included: int
    """Which have its contribution."""

    @property
    def share(self) -> float:
        """Of the rounds in which it was a member, those that have its contribution."""
        return round(self.included / self.member, 4) if self.member else 0.0


def work_of(peer: Path, seals_of: Path, after: int, until: int) -> Work:
    """Count the rounds after one and up to another, by homes: of whom, and whose seals to read."""
    who = load_or_create_identity(Home(peer).identity).peer_id
    last: dict[int, tuple[bool, bool]] = {}
    for step in steps(SealLog(Home(seals_of).seals).since(after + 1), verify):
        if after < step.seal.round <= until:
            ids = [member.peer_id for member in step.shape.members]
            there = who in ids
            # A round that was sealed anew after the chain went back counts as it was in the end.
            last[step.seal.round] = (
                there,
                there and ids.index(who) in chain.bits(step.seal.included, len(ids)),
            )
    return Work(len(last), sum(there for there, _ in last.values()), sum(counts for _, counts in last.values()))
