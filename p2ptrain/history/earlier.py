"""The seals of a chain before the snapshot that a peer starts from.

A snapshot says nothing of how its chain came there. If nobody kept the seals since two groups parted, because all who
had them are gone, each group would take the other for strangers for ever. So whoever starts from a snapshot also takes
over its donor's seals, from a state that both have or from the run's beginning, keeps them and hands them out.

Each seal is signed and names the one before it, and all of them have to lead to the very state of the snapshot, so a
donor can make up nothing. It can hand out none; then the peer knows as much as the snapshot says.

Cost: as much as `ANSWERS_MAX` answers hold at most, some 8 MiB; nothing where a run has more seals than that.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import CallError
from p2ptrain.chain import ChainState, SealError, SignedSeal
from p2ptrain.chain.forks import PAST_MAX, Mark
from p2ptrain.state.seals import SEGMENT_ROUNDS, Opening, Walk
from p2ptrain.swarm.identity import verify

ANSWERS_MAX = 16
ALL_SECONDS = 20.0
"""For all these answers, and for checking them."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Earlier:
    """How a chain came to a state."""

    entries: tuple[ChainState | SignedSeal, ...] = ()
    """What files of a `SealLog` begin with, and the seals after each."""
    marks: tuple[Mark, ...] = ()
    """The last ones, that of the state at the end."""


NOTHING = Earlier()


async def seals_before(client: Client, donor: bytes, start: Opening, end: ChainState) -> Earlier:
    """Return the donor's seals from a state that is known up to the state of a snapshot; nothing, if it has not all.

    Raises:
        CallError: they lead elsewhere, so what the snapshot says is made up.
    """
    path = _Path(start, end)
    try:
        async with asyncio.timeout(ALL_SECONDS):
            for _ in range(ANSWERS_MAX):
                header, seals = await client.seals(donor, path.walk.head.round, path.walk.head.id, 1)
                rounds = end.round - path.walk.head.round
                if header.opening or not seals or rounds > ANSWERS_MAX * len(seals):
                    return NOTHING
                if await asyncio.to_thread(path.take, seals):
                    break
    except (CallError, SealError, OSError) as error:  # that it took too long is an OSError
        _logger.debug("no seals from before a snapshot: %s", error)
        return NOTHING
    return path.earlier()


class _Path:
    """The way from one state to another."""

    def __init__(self, start: Opening, end: ChainState) -> None:
        self.walk, self._start, self._end = Walk(start, verify), start, end
        #: each seal, the mark of what it leads to and, where a file of the log begins, the state
        self._steps: list[tuple[SignedSeal, Mark, ChainState | None]] = []

    def take(self, seals: Sequence[SignedSeal]) -> bool:
        """Go on by these seals; return whether the end is reached.

        Raises:
            SealError: malformed, or none that continues the way.
        """
        for signed in seals:
            deque(self.walk.take(signed), maxlen=0)
            seal, state = self.walk.pending[-1].seal, self.walk.head
            while self._steps and self._steps[-1][1].id != seal.parent:
                self._steps.pop()
            before = self._steps[-1][1] if self._steps else Mark.of(self._start.state)
            if seal.parent != before.id:
                raise SealError("its chain parts from ours before it says that it does")
            begins = state if state.round % SEGMENT_ROUNDS == 0 else None
            self._steps.append((signed, Mark.of(state, seal, before), begins))
            if state.id == self._end.id:
                return True
        return False

    def earlier(self) -> Earlier:
        """Return what was found; nothing, if the end was not reached. Raises CallError: it is another one."""
        if self.walk.head.id != self._end.id:
            return NOTHING
        if self.walk.head != self._end:
            raise CallError("the state of its snapshot is not what its seals lead to")
        entries: list[ChainState | SignedSeal] = [self._start.state]
        for signed, _, begins in self._steps:
            entries += [signed] if begins is None else [signed, begins]
        # All chains share the run's beginning, and nobody is a member there.
        marks = [Mark.of(self._start.state), *(mark for _, mark, _ in self._steps)]
        return Earlier(tuple(entries), tuple(mark for mark in marks[-PAST_MAX:] if mark.round))
