"""How much of its line and its time a peer gives to those who fetch snapshots and files of the run: what is left over.

A few streams at once, in the order in which their frames are ready. A contribution or a reply that is being sent goes
first: frames of pieces wait for it, `URGENT_SECONDS` each at most, so that a peer that reads slowly does not stop them.
What has been let through waits in buffers that nothing can overtake, so the pace stays `SHARE` of the line as it was
measured; where no message of a round needs the line, as in a group of one, the line itself says how much goes through.

Handing out takes processor time too, some 0.02 cores for 1 MB/s. So while a trainer computes here, `BUSY_BYTES_A_CORE`
is the most, which is under a twentieth of each core; while none does there is no such bound. A limit of the owner's on
all that this peer sends is never exceeded.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator

from p2ptrain.calls.uplink import MOST_KBIT

STREAMS_MAX = 4
"""Streams of pieces at once; more are told to come later."""
STREAMS_PER_PEER = 2
"""Of these for one peer: one, and one that it has given up and that has not ended here yet."""
STREAM_SECONDS = 60.0
"""A stream not done by then ends, and its place is free: a peer that does not read must not keep it."""
SHARE = 0.9
RATE_MIN_BYTES = 64 * 1024
BUSY_BYTES_A_CORE = 2 * 1024 * 1024
BURST_SECONDS = 0.25
URGENT_SECONDS = 0.5


class Handout:
    """See the module docstring. For the network thread.

    Args:
        uplink_kbit: the uplink as far as it is known now [kbit/s]; from `MOST_KBIT` on it bounds nothing.
        shared: whether messages of rounds need the line, too.
        busy: whether a trainer computes here.
        most_bytes: what the owner lets this peer send, as of now [bytes/s]; infinite: no limit.
        cores: that this process may use.
    """

    def __init__(
        self,
        uplink_kbit: Callable[[], int] = lambda: 0,
        *,
        shared: Callable[[], bool] = lambda: True,
        busy: Callable[[], bool] = lambda: False,
        most_bytes: Callable[[], float] = lambda: math.inf,
        cores: int = 1,
    ) -> None:
        self._uplink_kbit, self._shared, self._busy = uplink_kbit, shared, busy
        self._most_bytes, self._cores = most_bytes, cores
        #: streams -> whose, and until when
        self._streams: dict[object, tuple[bytes, float]] = {}
        self._urgent = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._turn = asyncio.Lock()
        #: when the line has sent what was let through
        self._free_at = 0.0

    @property
    def rate(self) -> float:
        """Bytes a second, as of now; infinite: as fast as they are taken."""
        most = math.inf
        if self._shared() and (line_kbit := self._uplink_kbit()) < MOST_KBIT:
            most = SHARE * line_kbit * 125
        if self._busy():
            most = min(most, self._cores * BUSY_BYTES_A_CORE)
        return min(max(most, RATE_MIN_BYTES), self._most_bytes())

    @contextlib.contextmanager
    def urgent(self) -> Iterator[None]:
        """Something that a round needs is being sent."""
        self._urgent += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._urgent -= 1
            if not self._urgent:
                self._quiet.set()

    @contextlib.contextmanager
    def stream(self, peer: bytes) -> Iterator[Callable[[], bool] | None]:
        """A place for a stream to `peer`: tells whether it may go on; None: there is no place."""
        now = asyncio.get_running_loop().time()
        live = [whose for whose, until in self._streams.values() if until > now]
        if len(live) >= STREAMS_MAX or live.count(peer) >= STREAMS_PER_PEER:
            yield None
            return
        place, until = object(), now + STREAM_SECONDS
        self._streams[place] = peer, until
        try:
            yield lambda: asyncio.get_running_loop().time() < until
        finally:
            del self._streams[place]

    async def pace(self, size: int) -> None:
        """Wait until so many bytes may leave."""
        async with self._turn:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(URGENT_SECONDS):
                    await self._quiet.wait()
            now = asyncio.get_running_loop().time()
            self._free_at = max(self._free_at, now - BURST_SECONDS) + size / self.rate
            await asyncio.sleep(self._free_at - now)
