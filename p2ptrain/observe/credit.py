"""Who did how much for a run, counted from its seals.

Each seal is signed by its sealer, names the one before, and lists what each member sent. So whoever has them from the
run's beginning counts the same, and no peer can add to its credit afterwards. What a member says of its own work is its
word; as in a round's sum, it counts up to `weight_cap_ratio` times the median of the round. Seals bear no times, so
how long a peer was there is counted in rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2ptrain import chain
from p2ptrain.config.manifest import Manifest
from p2ptrain.state.seals import SealedStep, SealLog, steps
from p2ptrain.swarm.identity import format_peer_id, verify


@dataclass(slots=True)
class Credit:
    """What one peer did."""

    sequences: float = 0.0
    rounds: int = 0
    """That have work of it."""
    present: int = 0
    """That included it, with work or without."""
    member: int = 0
    """That it was a member of."""
    sealed: int = 0
    reduced: int = 0
    """Parts whose replies it made."""
    owed: int = 0
    """Parts whose replies it owes."""
    first: int = 0
    last: int = 0
    """Rounds: the first and the last that included it."""


@dataclass(slots=True)
class Count:
    """Credit of all peers, as far as seals were counted.

    Args:
        cap_ratio: of the manifest.
        tokens_per_sequence: of the manifest.
    """

    cap_ratio: float
    tokens_per_sequence: int
    peers: dict[bytes, Credit] = field(default_factory=dict)
    first: int = 0
    """The first round that was counted; 0: none yet."""
    last: int = 0
    gaps: int = 0
    """Rounds in between whose seals were not at hand."""

    def add(self, step: SealedStep) -> None:
        """Count one round more, the next one as a rule."""
        number = step.seal.round
        if not self.first:
            self.first = number
        elif number > self.last + 1:
            self.gaps += number - self.last - 1
        self.last = number
        members = step.shape.members
        included = chain.bits(step.seal.included, len(members))
        weights = [step.seal.rows[index].weight for index in included if step.seal.rows[index].weight]
        cap = self.cap_ratio * statistics.median(weights) if weights else 0.0
        for index, member in enumerate(members):
            credit = self.peers.setdefault(member.peer_id, Credit())
            credit.member += 1
            if index in included:
                credit.present += 1
                credit.first = credit.first or number
                credit.last = number
                weight = step.seal.rows[index].weight
                credit.sequences += min(weight, cap)
                credit.rounds += weight > 0
        for part, reply in zip(step.shape.parts, step.seal.parts, strict=True):
            credit = self.peers[members[part.reducer].peer_id]
            credit.reduced += bool(reply)
            credit.owed += not reply
        self.peers.setdefault(step.seal.sealer, Credit()).sealed += 1

    def add_all(self, steps: Iterable[SealedStep]) -> Count:
        """Count all of these rounds, in order."""
        for step in steps:
            self.add(step)
        return self

    def as_json(self, names: Mapping[str, str] = {}) -> dict[str, Any]:
        """For programs and views.

        Args:
            names: of peers, by their ids.
        """
        work = sum(credit.sequences for credit in self.peers.values())
        rows = []
        for peer, credit in sorted(self.peers.items(), key=lambda item: (-item[1].sequences, item[0])):
            peer_id = format_peer_id(peer)
            rows.append(
                {
                    "peer_id": peer_id,
                    "name": names.get(peer_id, ""),
                    "tokens": round(credit.sequences * self.tokens_per_sequence),
                    "share": round(credit.sequences / work, 6) if work else 0.0,
                    "rounds": credit.rounds,
                    "present_rounds": credit.present,
                    "member_rounds": credit.member,
                    "uptime": round(credit.present / credit.member, 4) if credit.member else 0.0,
                    "sealed": credit.sealed,
                    "parts_reduced": credit.reduced,
                    "parts_owed": credit.owed,
                    "first_round": credit.first,
                    "last_round": credit.last,
                }
            )
        return {
            "first_round": self.first,
            "last_round": self.last,
            "missing_rounds": self.gaps,
            "complete": self.first == 1 and not self.gaps,
            "tokens": round(work * self.tokens_per_sequence),
            "peers": rows,
        }


def count_for(manifest: Manifest) -> Count:
    """Return an empty count for a run."""
    return Count(manifest.round.weight_cap_ratio, manifest.context)


def count_in(folder: Path, manifest: Manifest) -> Count:
    """Return the count of all seals in a home's folder of them.

    Raises:
        SealError: something in it is no seal of this run.
    """
    return count_for(manifest).add_all(steps(SealLog(folder).since(1), verify))
