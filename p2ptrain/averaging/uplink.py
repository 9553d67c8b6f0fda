"""How fast this peer's line is, measured by what it sends anyway.

The messages of one round leave together and fill the line. A reducer answers twice: to a message's header, which tells
how long the way there and back is, and when the payload is there. From the first of the former to the last of the
latter the line has carried the payloads, so bytes over that time is its rate, as far as receivers take it. Busy
machines and other traffic make single rounds look slow, so the median of the last ones counts. Beyond `MOST_KBIT` a
line is not what limits a round, and its measured rate would be noise: all such peers say the same.

Cost: two numbers a round; an answer of 30 bytes more a message.
"""

from __future__ import annotations

import statistics
from collections import deque

LEAST_KBIT, MOST_KBIT = 100, 100_000
USUAL_KBIT = 10_000
"""What a line is taken for before it was measured."""
CAREFUL_KBIT = 1_000
"""What a peer says of a line that it has not measured: it reduces little, and holds up nobody if the line is slow."""
ROUNDS_REMEMBERED = 25
ROUNDS_NEEDED = 3
BURST_MIN_BYTES = 4096
"""Less says nothing: it is timers and the way there that take the time."""


class UplinkMeter:
    """What to say of our line.

    Args:
        dialable: whether others can dial us; who cannot be dialled reduces nothing, and says 0.
    """

    def __init__(self, *, dialable: bool) -> None:
        self._dialable = dialable
        self._seen_kbit: deque[float] = deque(maxlen=ROUNDS_REMEMBERED)

    @property
    def declared_kbit(self) -> int:
        """What to say of it, for parts in proportion [kbit/s]."""
        if not self._dialable:
            return 0
        return self.line_kbit if self._measured else CAREFUL_KBIT

    @property
    def line_kbit(self) -> int:
        """What it is, as far as we know [kbit/s]."""
        if not self._measured:
            return USUAL_KBIT
        return int(min(max(statistics.median(self._seen_kbit), LEAST_KBIT), MOST_KBIT))

    @property
    def _measured(self) -> bool:
        return len(self._seen_kbit) >= ROUNDS_NEEDED

    def observe(self, size_bytes: int, seconds: float) -> None:
        """So many bytes were carried in so long a time."""
        if size_bytes >= BURST_MIN_BYTES:
            self._seen_kbit.append(size_bytes * 8 / 1000 / max(seconds, 1e-4))

    def burst(self, messages: int) -> Burst:
        """As many messages are about to leave together."""
        return Burst(self, messages)


class Burst:
    """The messages of one round on their way. Counts once all have arrived, each at the first try."""

    def __init__(self, meter: UplinkMeter, messages: int) -> None:
        self._meter, self._missing = meter, messages
        self._since: float | None = None
        self._bytes = 0

    def heard(self, now: float) -> None:
        """A message's header was answered."""
        if self._since is None:
            self._since = now

    def arrived(self, now: float, size_bytes: int) -> None:
        """A message's payload was answered."""
        self._missing -= 1
        self._bytes += size_bytes
        if not self._missing and self._since is not None:
            self._meter.observe(self._bytes, now - self._since)

    def spoil(self) -> None:
        """A message has to be sent again."""
        self._since = None
        self._missing = -1
