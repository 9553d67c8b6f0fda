"""When bytes may leave or be asked for, so that a limit holds: decisions alone, without a clock and without sockets.

What counts is what is seen on the wire. A message is charged when it is let go, as credit that the wire's bytes use up
when they appear; what appears beyond it is overhead (encryption, multiplexing, TCP and IP, the DHT, what others send
unasked) and is charged then. A message that never reaches the wire, because its stream was reset, gives its credit back
after `CREDIT_SECONDS`. Given up: what the daemon sends on its own while all messages are held up uses up their credit.

Two rules hold at once. A bucket keeps the flow even: it holds `BURST_SECONDS` of the rate, and a message leaves when
the bucket is not in debt. A window keeps the promise: in any `WINDOW_SECONDS` the wire carries what the rate allows,
so what it carried in that time, what is let go and not seen yet, and the next message must fit in. A message that takes
most of a window, or more, waits until the window is nearly empty, and the next one until the bucket is out of debt.

Cost: a pair of numbers for each look at the wire within the window, and for each message that is on its way.
"""

from __future__ import annotations

import math
from collections import deque

WINDOW_SECONDS = 10.0
BURST_SECONDS = 0.2
"""Of the rate: 2 % of a window."""
CREDIT_SECONDS = 20.0
"""Longer than a message waits in the daemon for a receiver that reads slowly and has not been given up."""
LONG_SHARE = 0.8
"""Of a window, that a long message is taken for: the rest always carries the DHT's messages."""
_NEVER_SECONDS = 3600.0


class Budget:
    """What one direction may carry; see the module docstring. Times are seconds of any one clock.

    Args:
        rate: bytes a second; may be changed at any time.
        burst_bytes: what the bucket holds; None: `BURST_SECONDS` of the rate.
        filled: the share of the bucket that is there at the beginning.
        windowed: whether the window's rule holds.
    """

    def __init__(
        self,
        rate: float,
        now: float,
        *,
        burst_bytes: float | None = None,
        filled: float = 1.0,
        windowed: bool = True,
    ) -> None:
        self.rate = rate
        self._burst_bytes, self._windowed = burst_bytes, windowed
        self._tokens, self._at = filled * self.burst_bytes, now
        #: (when, bytes) seen on the wire, and let go but not seen yet
        self._seen: deque[tuple[float, float]] = deque()
        self._credits: deque[tuple[float, float]] = deque()
        self._in_window = self._on_the_way = 0.0

    @property
    def burst_bytes(self) -> float:
        """What the bucket holds when it is full."""
        return BURST_SECONDS * self.rate if self._burst_bytes is None else self._burst_bytes

    def set_rate(self, rate: float, now: float) -> None:
        """Change the rate from now on; what was refilled until now is not changed."""
        self._advance(now)
        self.rate = rate

    def wait_seconds(self, size: float, now: float) -> float:
        """Return how long to wait before `size` bytes may go, as far as is known now; 0: they may now."""
        self._advance(now)
        if self.rate <= 0:
            return _NEVER_SECONDS
        wait = max(0.0, -self._tokens / self.rate)
        if self._windowed:
            wait = max(wait, self._window_seconds(size, now))
        return wait

    def spend(self, size: float, now: float) -> None:
        """So many bytes are let go."""
        self._advance(now)
        self._tokens -= size
        self._credits.append((now, size))
        self._on_the_way += size

    def observe(self, size: float, now: float) -> None:
        """So many more bytes were on the wire since the last look."""
        self._advance(now)
        if size <= 0:
            return
        self._seen.append((now, size))
        self._in_window += size
        while size > 0 and self._credits:
            when, credit = self._credits.popleft()
            used = min(credit, size)
            size -= used
            self._on_the_way -= used
            if credit > used:
                self._credits.appendleft((when, credit - used))
        self._tokens -= size

    def _advance(self, now: float) -> None:
        self._tokens = min(self.burst_bytes, self._tokens + self.rate * max(0.0, now - self._at))
        self._at = max(self._at, now)
        while self._credits and self._credits[0][0] <= now - CREDIT_SECONDS:
            _, credit = self._credits.popleft()
            self._on_the_way -= credit
            self._tokens = min(self.burst_bytes, self._tokens + credit)
        while self._seen and self._seen[0][0] <= now - WINDOW_SECONDS:
            self._in_window -= self._seen.popleft()[1]
        if not self._credits:
            self._on_the_way = 0.0  # and no rest of rounding
        if not self._seen:
            self._in_window = 0.0

    def _window_seconds(self, size: float, now: float) -> float:
        room = WINDOW_SECONDS * self.rate
        over = self._in_window + self._on_the_way + min(size, LONG_SHARE * room) - room
        if over <= 0:
            return 0.0
        for when, seen in self._seen:
            over -= seen
            if over <= 0:
                return max(0.0, when + WINDOW_SECONDS - now) or 1e-3
        # Messages on their way leave the window only after they were seen, or given up.
        return WINDOW_SECONDS / 10


def spread_rate(left_bytes: float, left_seconds: float) -> float:
    """Return the rate at which what is left of a month's transfer lasts to its end [bytes/s]."""
    return max(0.0, left_bytes) / max(left_seconds, 1.0) if math.isfinite(left_bytes) else math.inf
