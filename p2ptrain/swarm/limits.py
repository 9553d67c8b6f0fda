"""How often something may happen: a token bucket for each peer, or for each kind of line in a log.

Cost: two numbers a key, of the `KEYS_MAX` keys used last; a key that was pushed out begins with a full bucket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from contextvars import ContextVar

KEYS_MAX = 4096

caller: ContextVar[bytes | None] = ContextVar("caller", default=None)
"""The peer whose unary call is being answered; None: what happens is our own doing."""


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


def once_a_minute() -> Allowance:
    """An allowance for lines in a log, by peer and kind."""
    return Allowance(1 / 60, 1)
