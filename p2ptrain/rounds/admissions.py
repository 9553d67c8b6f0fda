"""Who asks to be admitted, and whom our next seal admits (docs/rounds.md, rule 3).

Memory: at most `JOINS_PENDING_MAX` of those who ask, of those who were admitted and have not answered, and of those
who held us up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from p2ptrain import chain
from p2ptrain.chain import ChainState, Join, RoundShape, Row, Seal

JOINS_PENDING_MAX = 256
MUTE_DOUBLINGS = 6
JOIN_ROUNDS = 3  # and as many more as there are members: rounds after which a join that was not repeated is forgotten


class Mute(NamedTuple):
    """A member that was there and sent nothing until we sealed without it."""

    until: float
    #: lately
    times: int


@dataclass(slots=True)
class Admissions:
    """Who asks, and who was admitted without answering since.

    None of those pending is ourselves, and each is forgotten after `JOIN_ROUNDS` rounds and one more for each member.
    """

    me: bytes
    #: peer id -> its row and our round when it last asked to be admitted; who asked first comes first
    pending: dict[bytes, tuple[Row, int]] = field(default_factory=dict)
    #: peer id -> how often it was admitted since a seal last included it; the one admitted last at the end
    admitted: dict[bytes, int] = field(default_factory=dict)
    #: peer id -> that it held us up; the latest at the end
    mute: dict[bytes, Mute] = field(default_factory=dict)

    def ask(self, peer: bytes, row: Row, head: ChainState) -> None:
        """Keep a peer's place among those who ask; where too many do, it is drawn by lot each round who may stay."""
        self.pending[peer] = (row, head.round)
        if len(self.pending) > JOINS_PENDING_MAX:
            del self.pending[max(self.pending, key=lambda one: hashlib.sha256(head.id + one).digest())]

    def withdraw(self, peer: bytes) -> None:
        """Forget that a peer asked."""
        self.pending.pop(peer, None)

    def forget_stale(self, round: int, members: int) -> None:
        """Forget who has not asked again for so long that it is gone."""
        self.pending = {
            peer: asked
            for peer, asked in self.pending.items()
            if round - asked[1] < JOIN_ROUNDS + members and peer != self.me
        }

    def note(self, seal: Seal, shape: RoundShape) -> None:
        """Remember whom a seal admitted, and who has answered by it."""
        for index in chain.bits(seal.included, len(shape.members)):
            self.admitted.pop(shape.members[index].peer_id, None)
        for join in seal.joins:
            self.pending.pop(join.peer_id, None)
            self.admitted[join.peer_id] = self.admitted.pop(join.peer_id, 0) + 1
        while len(self.admitted) > JOINS_PENDING_MAX:
            del self.admitted[next(iter(self.admitted))]

    def leave_out(self, peer: bytes, now: float, seconds: float) -> None:
        """Admit a peer that held us up no more for some seconds, and twice as long each further time."""
        before = self.mute.pop(peer, None)
        lately = before is not None and now < before.until + seconds * 2**MUTE_DOUBLINGS
        times = before.times + 1 if before is not None and lately else 0
        self.mute[peer] = Mute(now + seconds * 2 ** min(times, MUTE_DOUBLINGS), times)
        while len(self.mute) > JOINS_PENDING_MAX:
            del self.mute[next(iter(self.mute))]

    def choose(self, state: ChainState, listed: Collection[bytes], now: float) -> tuple[Join, ...]:
        """Return whom to admit by the seal that leads to `state`, of those that the run is for, but those `listed`.

        Who asked first comes first; in every other round those that have answered whenever they were admitted. So
        neither a flood nor bad luck keeps anybody out for ever.
        """
        asking = [
            peer
            for peer in self.pending
            if peer not in listed
            and state.access.admits(peer)
            and (peer not in self.mute or self.mute[peer].until <= now)
        ]
        if state.round % 2:
            asking.sort(key=lambda peer: self.admitted.get(peer, 0))
        chosen = asking[: chain.room_for_newcomers(state.following)]
        return tuple(Join(peer, self.pending[peer][0]) for peer in sorted(chosen))

    def invariants(self, round: int, members: int) -> Iterator[tuple[str, bool]]:
        """Yield what must hold between two events, and whether it does."""
        yield "pending joins are bounded", len(self.pending) <= JOINS_PENDING_MAX
        yield "no pending join is ours", self.me not in self.pending
        yield "pending joins are fresh", all(at > round - JOIN_ROUNDS - members for _, at in self.pending.values())
        yield "remembered admissions are bounded", max(len(self.admitted), len(self.mute)) <= JOINS_PENDING_MAX
