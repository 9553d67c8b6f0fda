"""How often something may happen: a token bucket for each peer or kind of line in a log, and pauses after failures.

Cost: two numbers a key, of the `KEYS_MAX` keys used last; a key that was pushed out begins with a full bucket.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from contextvars import ContextVar

KEYS_MAX = 4096

caller: ContextVar[bytes | None] = ContextVar("caller", default=None)
"""The peer whose unary call is being answered; None: what happens is our own doing."""


def loop_time() -> float:
    """Monotonic seconds by the running loop's clock."""
    return asyncio.get_running_loop().time()


class Allowance:
    """A bucket of `burst` tokens for each key, refilled with `rate` tokens a second."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        #: {key: tokens left, and when}, the key used last at the end
        self._buckets: dict[Hashable, tuple[float, float]] = {}

    def take(self, key: Hashable = None) -> bool:
        """Take one token of `key`; returns False when there is none."""
        now = self._clock()
        left, at = self._buckets.pop(key, (self._burst, now))
        left = min(self._burst, left + self._rate * (now - at))
        enough = left >= 1
        self._buckets[key] = left - enough, now
        if len(self._buckets) > KEYS_MAX:
            del self._buckets[next(iter(self._buckets))]
        return enough


class Backoff:
    """Who is left alone after a failure: for `first_seconds`, and twice as long after each further one."""

    def __init__(self, first_seconds: float, most_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._first, self._most, self._clock = first_seconds, most_seconds, clock
        #: {key: the last pause, and its end}
        self._pauses: dict[Hashable, tuple[float, float]] = {}

    def ready(self, key: Hashable) -> bool:
        """Whether `key` may be tried."""
        return key not in self._pauses or self._clock() >= self._pauses[key][1]

    def failed(self, key: Hashable) -> None:
        """It was tried in vain."""
        pause, _ = self._pauses.pop(key, (self._first / 2, 0.0))
        pause = min(2 * pause, self._most)
        self._pauses[key] = pause, self._clock() + pause
        if len(self._pauses) > KEYS_MAX:
            del self._pauses[next(iter(self._pauses))]

    def succeeded(self, key: Hashable) -> None:
        """It was not in vain."""
        self._pauses.pop(key, None)


def once_a_minute() -> Allowance:
    """An allowance for lines in a log, by peer and kind."""
    return Allowance(1 / 60, 1)
