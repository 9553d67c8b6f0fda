"""What becomes of tasks that nobody awaits: none may fail in silence, and none may outlive what it belongs to."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable, Collection
from typing import Any

_CANCEL_AGAIN_SECONDS = 1.0


def failure_logged(
    logger: logging.Logger, what: str, then: Callable[[BaseException], None] | None = None
) -> Callable[[asyncio.Task[None] | concurrent.futures.Future[None]], None]:
    """Return a callback for `add_done_callback`: it logs a failure as `what`; a task that was cancelled has none.

    Args:
        then: hears of the failure after it was logged.
    """

    def done(task: asyncio.Task[None] | concurrent.futures.Future[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error(what, exc_info=error)
            if then is not None:
                then(error)

    return done


async def cancel_and_wait(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel `tasks` and return when all have ended, however they ended; a failure of theirs is not raised.

    One cancellation may be lost: until Python 3.12 `asyncio.wait_for`, which hivemind calls, drops one that comes just
    as the awaited work is done. A task that goes on all the same is cancelled again, each second.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_SECONDS)
    # What is never looked at, asyncio would complain about.
    for task in tasks:
        if not task.cancelled():
            task.exception()
