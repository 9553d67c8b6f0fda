"""Statements that wait for a seal: whom to let into the run, and whom to shut out (docs/rounds.md, rule 3).

Memory: at most `PENDING_MAX` of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from p2ptrain.chain import ChainState
from p2ptrain.chain.admission import AMENDMENTS_MAX, Access, AdmissionError, Grant, Revocation, Statement

PENDING_MAX = 64
GRANT_ROUNDS = 64  # after which a grant that no sealer took, as their clocks say that it has expired, is forgotten


@dataclass(slots=True)
class Statements:
    """What the chain lacks: it has none of those pending, nor another that says as much."""

    me: bytes
    #: statement -> our round when we heard it
    pending: dict[Statement, int] = field(default_factory=dict)

    def hear(self, heard: Iterable[Statement], head: ChainState) -> bool:
        """Keep what counts and the chain lacks; where there are too many, grants give way to revocations.

        Returns:
            Whether there is anything new.
        """
        new = False
        for statement in heard:
            if statement in self.pending or head.access.refusal(statement, head.run_id) is not None:
                continue
            if len(self.pending) >= PENDING_MAX:
                grants = [one for one in self.pending if isinstance(one, Grant)]
                if isinstance(statement, Grant) or not grants:
                    continue
                del self.pending[grants[-1]]
            self.pending[statement] = head.round
            new = True
        return new

    def keep_lost(self, before: Access, head: ChainState) -> None:
        """What was on a chain that we have left, and is not on this one, is for this one too."""
        if before is not head.access:
            self.hear([one for one in before.amendments if not head.access.has(one)], head)

    def forget_stale(self, head: ChainState) -> None:
        """Forget what the chain has by now, and grants that no sealer takes."""
        self.pending = {
            one: heard
            for one, heard in self.pending.items()
            if not head.access.has(one) and (isinstance(one, Revocation) or head.round - heard < GRANT_ROUNDS)
        }

    def choose(self, head: ChainState, *, solo: bool = False) -> tuple[Statement, ...]:
        """Return what the seal after `head` may hold, revocations first.

        Args:
            solo: the seal is our solo seal, which a statement that shuts us out would make void.
        """
        access, chosen = head.access, list[Statement]()
        for statement in sorted(self.pending, key=lambda one: isinstance(one, Grant)):
            if len(chosen) == AMENDMENTS_MAX:
                break
            try:
                amended = access.amended(statement, head.run_id)
            except AdmissionError:
                continue
            if not solo or amended.admits(self.me):
                access = amended
                chosen.append(statement)
        return tuple(chosen)

    def invariants(self, head: ChainState) -> Iterator[tuple[str, bool]]:
        """Yield what must hold between two events, and whether it does."""
        yield "pending statements are bounded", len(self.pending) <= PENDING_MAX
        yield "pending statements are not on the chain", not any(map(head.access.has, self.pending))
