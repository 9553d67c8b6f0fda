"""The run's text from whichever peers hand it out. Anyone may say that it is one, so none of them is waited for alone.

Donors are asked one after the other: another one as soon as one has failed, sent another text, or all together have
become slow. Of `DONORS_AT_ONCE` the slowest gives way. Cost: a slow line brings the beginning of the text more than
once. Given up: a text is not put together from several donors, as a snapshot is; most runs have a small one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import CallError
from p2ptrain.errors import DataError, P2PTrainError
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.tasks import cancel_and_wait

DONORS_AT_ONCE = 3
LOOK_SECONDS = 15.0
SLOW_BYTES = 15 * 32 * 1024
"""Donors that together bring less between two looks are slow; the slowest line hands out twice as much."""

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Donor:
    """One that has been asked."""

    peer: bytes
    #: bytes that have come
    came: int = 0


class CorpusDownload:
    """See the module docstring.

    Args:
        reach: opens a connection to a peer; raises P2PTrainError where it cannot.
        max_bytes: of the packed text.
        check: raises DataError where what came is not the run's text.
        progress: hears how much of it the furthest donor has sent.
    """

    def __init__(
        self,
        calls: Client,
        reach: Callable[[bytes], Awaitable[None]],
        max_bytes: int,
        check: Callable[[bytes], object],
        progress: Callable[[int, int], None],
    ) -> None:
        self._calls, self._reach = calls, reach
        self._max_bytes, self._check, self._progress = max_bytes, check, progress
        self._asked: dict[asyncio.Task[bytes], _Donor] = {}
        #: what was wrong with the text that somebody sent last
        self._wrong: DataError | None = None

    async def run(self, peers: Collection[bytes]) -> bytes | None:
        """The packed text from the first of these that has it all; None: none of them does.

        Raises:
            DataError: what they have is not the run's text.
        """
        waiting = list(peers)
        try:
            while waiting or self._asked:
                if waiting:
                    if len(self._asked) >= DONORS_AT_ONCE:
                        await self._leave_slowest()
                    self._ask(waiting.pop(0))
                found = await self._found(last=not waiting)
                if found is not None:
                    return found
        finally:
            await cancel_and_wait(list(self._asked))
        if self._wrong is not None:
            raise self._wrong
        return None

    def _ask(self, peer: bytes) -> None:
        donor = _Donor(peer)
        self._asked[asyncio.create_task(self._fetch(donor))] = donor

    async def _fetch(self, donor: _Donor) -> bytes:
        def progress(done: int, total: int) -> None:
            donor.came = done
            self._progress(max(other.came for other in self._asked.values()), total)

        await self._reach(donor.peer)
        packed = await self._calls.data(donor.peer, self._max_bytes, progress)
        await asyncio.to_thread(self._check, packed)
        return packed

    async def _found(self, *, last: bool) -> bytes | None:
        """The text; None once one of the donors has failed, or, if there are more to ask, all have become slow."""
        while True:
            before = sum(donor.came for donor in self._asked.values())
            ended, _ = await asyncio.wait(self._asked, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                donor = self._asked.pop(task)
                try:
                    return task.result()
                except DataError as error:
                    self._wrong = error
                    _logger.warning("%s sends another text: %s", format_peer_id(donor.peer)[-8:], error)
                except (CallError, P2PTrainError) as error:
                    _logger.info("no data from %s: %s", format_peer_id(donor.peer)[-8:], error)
            if ended:
                return None
            if not last and sum(donor.came for donor in self._asked.values()) - before < SLOW_BYTES:
                return None

    async def _leave_slowest(self) -> None:
        slowest = min(self._asked, key=lambda task: self._asked[task].came)
        del self._asked[slowest]
        await cancel_and_wait([slowest])
