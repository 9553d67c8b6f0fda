"""Places in the code where a test may have this process die, as a machine does that loses its power.

P2PTRAIN_FAILPOINT=NAME@FILE ends the process with SIGKILL at the place NAME once FILE exists. The simulator sets a
`watcher` for each of its peers instead. Without either a failpoint costs one look at the environment.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextvars import ContextVar

watcher: ContextVar[Callable[[str], None] | None] = ContextVar("watcher", default=None)
"""Hears of each failpoint that is passed, and may raise."""


def failpoint(name: str) -> None:
    """Die here if the environment, or the watcher, says so."""
    watch = watcher.get()
    if watch is not None:
        watch(name)
    wanted, _, file = os.environ.get("P2PTRAIN_FAILPOINT", "").partition("@")
    if wanted == name and os.path.exists(file):
        os.kill(os.getpid(), signal.SIGKILL)
