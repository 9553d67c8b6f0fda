"""Who gets the run's text from this peer: a few at a time, and whoever is first has it packed for the others too.

Packing reads and compresses the whole text, for seconds and more. It has a thread of its own, because the threads that
the rest of a peer shares reduce the parts of rounds. All who wait for it get the same bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator

DOWNLOADS_MAX = 8
DOWNLOADS_PER_PEER = 2
"""One, and one that it has given up and that has not ended here yet."""


class Downloads:
    """See the module docstring. For the network thread."""

    def __init__(self) -> None:
        self._under_way: list[bytes] = []
        self._packing: asyncio.Future[bytes | None] | None = None

    @contextlib.contextmanager
    def place(self, peer: bytes) -> Iterator[bool]:
        """A place for a download by `peer`; False: there is none."""
        if len(self._under_way) >= DOWNLOADS_MAX or self._under_way.count(peer) >= DOWNLOADS_PER_PEER:
            yield False
            return
        self._under_way.append(peer)
        try:
            yield True
        finally:
            self._under_way.remove(peer)

    async def packed(self, pack: Callable[[], bytes | None]) -> bytes | None:
        """What `pack` returns; called once for all who ask before it has returned. Raises what it raises."""
        if self._packing is None:
            self._packing = _in_its_own_thread(pack)
            self._packing.add_done_callback(self._packing_ended)
        return await asyncio.shield(self._packing)

    def _packing_ended(self, packing: asyncio.Future[bytes | None]) -> None:
        self._packing = None
        # Who waited may be gone.
        if not packing.cancelled():
            packing.exception()


def _in_its_own_thread(work: Callable[[], bytes | None]) -> asyncio.Future[bytes | None]:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bytes | None] = loop.create_future()

    def deliver(result: bytes | None, error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as failure:
            error = failure
        # A loop that has ended has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=run, name="packing", daemon=True).start()
    return done
