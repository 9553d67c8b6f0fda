"""How fast this peer's line is, measured by what it sends anyway.

The messages of one round leave together and fill the line. Each receiver says, with its answer, how long the payload
came after its header, by its own clock. Messages to one receiver go one after the other; so if all receivers were
served at once, the line was busy for as long as the slowest of them saw payloads come, and if one after the other, for
as long as all of them did together. In between, the answers tell: by each answer the line has carried what was
answered until then, since the first byte left, less the shortest way there and back. The highest such rate counts,
from half of the bytes on, since answers may wait for seconds in the line of who answers, if that is slow.

Busy machines and other traffic make rounds look slow, so of the last ones the upper quartile counts. A receiver that
reads late makes a round look fast, but not all of them do so at the same time. One that lies can make our line look
slower by no more than a late answer does, and faster by what went to it; where it is the only receiver, as fast as it
likes. What we say of our line counts within limits (docs/rounds.md, rule 4). Beyond `MOST_KBIT` a line is not what
limits a round, and its measured rate would be noise: all such peers say the same.

Cost: a number a round, three a message while they are on their way, and a few bytes of each answer.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable

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
"""Less says nothing: it is timers that take the time."""


class UplinkMeter:
    """What to say of our line.

    Args:
        dialable: whether others can dial us; who cannot be dialled reduces nothing, and says 0.
        ceiling_kbit: the most that the owner allows now [kbit/s]; a line is said to be no faster, and used no faster.
    """

    def __init__(self, *, dialable: bool, ceiling_kbit: Callable[[], int] = lambda: MOST_KBIT) -> None:
        #: whether others can dial us, as far as is known now
        self.dialable = dialable
        self._ceiling_kbit = ceiling_kbit
        #: kbit/s in each round remembered
        self._rates: deque[float] = deque(maxlen=ROUNDS_REMEMBERED)
        #: the shortest way there and back
        self.way_seconds = math.inf

    @property
    def declared_kbit(self) -> int:
        """What to say of it, for parts in proportion [kbit/s]."""
        if not self.dialable:
            return 0
        return self.line_kbit if self._measured else min(CAREFUL_KBIT, self._most_kbit)

    @property
    def line_kbit(self) -> int:
        """What it is, as far as we know [kbit/s]."""
        most = self._most_kbit
        if not self._measured:
            return min(USUAL_KBIT, most)
        return int(min(max(statistics.quantiles(self._rates, n=4, method="inclusive")[2], LEAST_KBIT), most))

    @property
    def _most_kbit(self) -> int:
        """Return the most that the owner allows to be said; 0 would mean that nobody can dial us."""
        return min(MOST_KBIT, max(self._ceiling_kbit(), 1))

    @property
    def _measured(self) -> bool:
        return len(self._rates) >= ROUNDS_NEEDED

    def observe(self, size_bytes: int, seconds: float, way_seconds: float) -> None:
        """So many bytes went out in `seconds`, and the shortest way there and back was this long."""
        self.way_seconds = min(WAY_GROWS * self.way_seconds, way_seconds)
        if size_bytes >= BURST_MIN_BYTES:
            self._rates.append(size_bytes * 8 / 1000 / max(seconds, 1e-4))

    def burst(self, messages: int) -> Burst:
        """As many messages are about to leave together."""
        return Burst(self, messages)


class Burst:
    """The messages of one round on their way. Counts once all have arrived, each at the first try."""

    def __init__(self, meter: UplinkMeter, messages: int) -> None:
        self._meter, self._missing = meter, messages
        self._began = self._way_seconds = math.inf
        #: of each answer: when it came, and the bytes answered until then
        self._answers: list[tuple[float, int]] = []
        #: receiver -> seconds for which payloads came
        self._seconds = defaultdict[bytes, float](float)

    def arrived(self, receiver: bytes, size_bytes: int, began: float, now: float, seconds: float) -> None:
        """A message that was begun at `began` is answered: its payload came in `seconds` after its header."""
        self._missing -= 1
        seconds = min(seconds, now - began)
        self._began = min(self._began, began)
        self._way_seconds = min(self._way_seconds, now - began - seconds)
        self._seconds[receiver] += seconds
        self._answers.append((now, size_bytes + (self._answers[-1][1] if self._answers else 0)))
        if not self._missing:
            self._meter.observe(self._answers[-1][1], self._busy_seconds(), self._way_seconds)

    def _busy_seconds(self) -> float:
        """How long the line took for all payloads; see the module docstring."""
        whole = self._answers[-1][1]
        way = min(WAY_GROWS * self._meter.way_seconds, self._way_seconds)
        ends = (max(when - self._began - way, 0.0) * whole / size for when, size in self._answers if 2 * size >= whole)
        at_once, in_turn = max(self._seconds.values()), sum(self._seconds.values())
        return min(max(min(ends), at_once), in_turn)

    def spoil(self) -> None:
        """A message has to be sent again."""
        self._missing = -1
