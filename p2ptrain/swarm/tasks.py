"""What becomes of tasks that nobody awaits: none may fail in silence."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable


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
