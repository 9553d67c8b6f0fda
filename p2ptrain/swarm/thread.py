"""The one network thread of a process: a uvloop loop that holds the DHT node, libp2p and the servicer.

The trainer owns the main thread and calls in with `run`, `spawn` or the loop's `call_soon_threadsafe`; what crosses the
border is handed over whole, so the code on the loop needs no locks. Cost: one thread hop a call. What
was given up: the loop shares the interpreter lock with the trainer, so work on it must stay short.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

from p2ptrain.swarm.tasks import cancel_and_wait

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class _Loop(uvloop.Loop):  # type: ignore[misc, unused-ignore]
    """A uvloop whose child processes get a session of their own.

    Ctrl-C in a terminal signals the whole foreground group: without this the libp2p daemon would die at once, before
    the peer has said goodbye or stored what it owes.
    """

    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> Any:
        return await super().subprocess_exec(*args, start_new_session=True, **kwargs)


def new_network_loop() -> asyncio.AbstractEventLoop:
    """A loop as the network thread uses it, for tests and tools that run everything in one thread."""
    return _Loop()


class NetworkThread:
    """A daemon thread that runs one loop from construction until `stop`."""

    def __init__(self, name: str = "network") -> None:
        self.loop = new_network_loop()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def run(self, work: Coroutine[Any, Any, T], timeout_seconds: float | None = None) -> T:
        """Runs `work` on the loop and returns its result; TimeoutError, with the work cancelled, when it takes longer.

        Must not be called from the loop's own thread, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("NetworkThread.run called from the network thread itself: await the coroutine instead")
        future = self.spawn(work)
        try:
            return future.result(timeout_seconds)
        except BaseException:
            # Also KeyboardInterrupt: whoever waited is gone, so the work has no reader left.
            future.cancel()
            raise

    def spawn(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Starts `work` on the loop and returns at once; RuntimeError after `stop`."""
        if self.loop.is_closed() or not self._thread.is_alive():
            work.close()
            raise RuntimeError("the network thread has stopped")
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """Cancels what still runs, ends the loop and joins the thread. Idempotent."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self.loop)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            _logger.warning("the network thread did not stop within %.0f s", timeout_seconds)

    async def _cancel_all(self) -> None:
        mine = asyncio.current_task()
        await cancel_and_wait([task for task in asyncio.all_tasks() if task is not mine])
        self.loop.call_soon(self.loop.stop)
