"""How fast this peer's line is, measured by what it sends anyway.

The messages of one round leave together and fill the line. A reducer answers twice: to a message's header, which tells
how long the way there and back is, and when the payload is there. From the first byte to the last answer, less the
shortest way, the line has carried the payloads: bytes over that time is its rate, as far as receivers take it. An
answer may wait long in its sender's own line, if that is slow. But by each answer the line has carried what was
answered until then, and perhaps more, so the highest of these rates counts, from half of the bytes on. The shortest way
is remembered for much longer than rates: most answers wait in a line that is busy with its owner's own payloads, and
with too long a way whoever sends less than the rest looks faster, is given more to reduce, and so sends still less.
With too short a way the opposite happens, which finds its balance. Busy machines and other traffic make rounds look
slow and never fast, so of the last ones the upper quartile counts. Beyond `MOST_KBIT` a line is not what limits a
round, and its measured rate would be noise: all such peers say the same.

Cost: two numbers a round and two a message; an answer of 30 bytes more a message.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

LEAST_KBIT, MOST_KBIT = 100, 100_000
USUAL_KBIT = 10_000
"""What a line is taken for before it was measured."""
CAREFUL_KBIT = 1_000
"""What a peer says of a line that it has not measured: it reduces little, and holds up nobody if the line is slow."""
ROUNDS_REMEMBERED = 25
ROUNDS_NEEDED = 3
WAY_GROWS = 1.01
"""A round: where the way has become longer for good, this is known after some dozens of rounds."""
BURST_MIN_BYTES = 4096
"""Less says nothing: it is timers and the way there that take the time."""


def rate(seconds: float, size_bytes: int, way_seconds: float) -> float:
    """Return the rate at which so many bytes are answered after `seconds`, of which the way takes some [kbit/s]."""
    return size_bytes * 8 / 1000 / max(seconds - way_seconds, 1e-4)


class UplinkMeter:
    """What to say of our line.

    Args:
        dialable: whether others can dial us; who cannot be dialled reduces nothing, and says 0.
    """

    def __init__(self, *, dialable: bool) -> None:
        self._dialable = dialable
        #: of each round remembered: bytes, seconds until all were answered
        self._rounds: deque[tuple[int, float]] = deque(maxlen=ROUNDS_REMEMBERED)
        self._way_seconds = math.inf

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
        rates = [rate(seconds, size, self._way_seconds) for size, seconds in self._rounds]
        return int(min(max(statistics.quantiles(rates, n=4, method="inclusive")[2], LEAST_KBIT), MOST_KBIT))

    @property
    def _measured(self) -> bool:
        return len(self._rounds) >= ROUNDS_NEEDED

    def observe(self, size_bytes: int, seconds: float, way_seconds: float) -> None:
        """So many bytes were all answered after `seconds`, and the first header after `way_seconds`."""
        if size_bytes >= BURST_MIN_BYTES:
            self._rounds.append((size_bytes, seconds))
            self._way_seconds = self.way_seconds(way_seconds)

    def way_seconds(self, measured: float) -> float:
        """Return the shortest way there and back, where the newest round's was as `measured`."""
        return min(WAY_GROWS * self._way_seconds, measured)

    def burst(self, messages: int) -> Burst:
        """As many messages are about to leave together."""
        return Burst(self, messages)


class Burst:
    """The messages of one round on their way. Counts once all have arrived, each at the first try."""

    def __init__(self, meter: UplinkMeter, messages: int) -> None:
        self._meter, self._missing = meter, messages
        self._began: float | None = None
        self._way_seconds = float("inf")
        #: of each answer: when it came, and the bytes answered until then
        self._answers: list[tuple[float, int]] = []

    def heard(self, began: float, now: float) -> None:
        """A message's header, sent when it `began`, was answered."""
        self._began = began if self._began is None else min(self._began, began)
        self._way_seconds = min(self._way_seconds, now - began)

    def arrived(self, now: float, size_bytes: int) -> None:
        """A message's payload was answered."""
        self._missing -= 1
        whole = size_bytes + (self._answers[-1][1] if self._answers else 0)
        self._answers.append((now, whole))
        if self._missing or self._began is None:
            return
        began, way_seconds = self._began, self._meter.way_seconds(self._way_seconds)
        answers = [(when - began, carried) for when, carried in self._answers if 2 * carried >= whole]
        seconds, carried = max(answers, key=lambda answer: rate(answer[0], answer[1], way_seconds))
        self._meter.observe(carried, seconds, self._way_seconds)

    def spoil(self) -> None:
        """A message has to be sent again."""
        self._missing = -1
