"""Whom this peer lets in at this moment: what its chain says, and guests whose grant is on its way there.

Lives on the network thread. Whoever is handed a grant judges by its own clock whether it has expired; the chain, which
knows no time, then lets the guest in for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from p2ptrain.chain import ChainState
from p2ptrain.chain.admission import Grant, Revocation, Statement, is_signed

PROVISIONAL_MAX = 64
PROVISIONAL_SECONDS = 300.0
"""A guest whose grant no seal has taken by then has to show it again."""

NO_ROOM = "too many guests wait to be let in"
EXPIRED = "the invitation has expired"


class Admission:
    """See the module docstring.

    Args:
        head: where this peer's chain stands.
        welcome: peers that this one goes by before it has the chain: those whose addresses a person gave it.
        wall_clock: Unix seconds.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        head: Callable[[], ChainState],
        welcome: frozenset[bytes] = frozenset(),
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._head, self._welcome = head, welcome
        self._wall_clock, self._clock = wall_clock, clock
        #: guest -> its grant and until when it is let in without the chain's word; the oldest first
        self._provisional: dict[bytes, tuple[Grant, float]] = {}

    def admits(self, peer: bytes) -> bool:
        """Say whether a peer may call, and be followed.

        Members of the round under way may to its end, those too that the last seal has shut out: the others need not
        wait for what they owe.
        """
        head = self._head()
        if head.access.admits(peer) or any(member.peer_id == peer for member in head.now):
            return True
        if head.access.revocation(peer) is not None:
            return False
        provisional = self._provisional.get(peer)
        return (provisional is not None and self._clock() < provisional[1]) or (
            peer in self._welcome and not head.round
        )

    def revocation(self, peer: bytes) -> Revocation | None:
        """Return the statement by which the owner has shut a peer out."""
        return self._head().access.revocation(peer)

    def take(self, statement: Statement) -> str:
        """Judge a statement; a good grant lets its guest in at once. Returns a refusal, or ""."""
        head = self._head()
        if head.access.has(statement):
            return ""
        if isinstance(statement, Revocation):
            return head.access.refusal(statement, head.run_id) or ""
        if statement.issued.expires < self._wall_clock():
            return EXPIRED
        self._forget_old()
        known = self._provisional.get(statement.guest)
        if known is None or known[0] != statement:
            refusal = head.access.refusal(statement, head.run_id) or self._no_room(statement)
            if refusal:
                return refusal
        self._provisional[statement.guest] = statement, self._clock() + PROVISIONAL_SECONDS
        return ""

    def _no_room(self, grant: Grant) -> str:
        """Count the guests that wait as the chain counts those let in; what is used twice at a time is used up."""
        waiting = [one for one, _ in self._provisional.values() if one.guest != grant.guest]
        if len(waiting) >= PROVISIONAL_MAX:
            return NO_ROOM
        access, run_id = self._head().access, self._head().run_id
        for one in waiting:
            if one.issued.token == grant.issued.token and access.refusal(one, run_id) is None:
                access = access.amended(one, run_id)
        return access.refusal(grant, run_id) or ""

    def _forget_old(self) -> None:
        head, now = self._head(), self._clock()
        self._provisional = {
            guest: (grant, until)
            for guest, (grant, until) in self._provisional.items()
            if now < until and not head.access.has(grant)
        }


def shuts_out(revocation: Revocation, peer: bytes, grant: Grant | None, beginning: ChainState) -> bool:
    """Say whether a revocation that somebody shows to `peer` is its owner's and means it.

    Args:
        grant: by which `peer` is in the run, if it is a guest.
        beginning: of the run's chain, which names the owner.
    """
    meant = {peer}
    if grant is not None and revocation.with_guests:
        meant |= {grant.issued.inviter, grant.issued.token}
    if revocation.run_id != beginning.run_id or revocation.subject not in meant:
        return False
    return is_signed(revocation, beginning.access.owner)
