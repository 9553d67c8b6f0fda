"""Which piece of a file to ask of which donor next. Decides only: no sockets, no clock, no files.

Each donor has at most one piece to hand out at a time, and at most `DONORS_MAX` donors have one. Among the next pieces
in an order of our own, a donor is asked for the one that the fewest hold: learners that come together fetch different
pieces, and then have something for each other. A piece that takes several times the median is asked of a second donor
too, and towards the end one that takes longer than the median; the first to arrive counts.

Cost: O(pieces) memory, O(pieces) steps a decision at worst (a donor that holds next to nothing), some dozens as a rule.
Given up: two pieces at once from one donor, which would hide the round trip between pieces where donors are few.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import deque
from dataclasses import dataclass
from itertools import islice

from p2ptrain.state.pieces import bit

DONORS_MAX = 8
"""Donors that have something to hand out at a time, and so the pieces in memory."""
DONORS_KNOWN_MAX = 64
ASKED_AT_ONCE = 2
"""Donors that are asked for the same piece at a time."""
PATIENCE_MEDIANS = 4.0
"""A piece that takes this many times the median crawls."""
FIRST_PATIENCE_SECONDS = 8.0
"""What crawls while nothing has arrived yet."""
DEADLINE_MEDIANS = 16.0
DEADLINE_SECONDS = (10.0, 60.0)
"""Within these bounds, and by the median, a piece is waited for at all; the latter while nothing has arrived yet."""
FAILURES_MAX = 3
"""A donor that failed so often in a row is not counted on."""
PAUSE_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""How long a donor is left alone after its first, second, ... disappointment in a row."""
_WINDOW = 64
"""Pieces among which the rarest is looked for."""


@dataclass(slots=True)
class _Donor:
    #: bitmap of the pieces it holds; empty: all
    held: bytes
    #: what it is asked for, and since when
    piece: int | None = None
    since: float = 0.0
    paused_until: float = 0.0
    #: pauses and failures since the last piece that came
    pauses: int = 0
    failures: int = 0


class PiecePlan:
    """See the module docstring. `now` is any clock in seconds that does not go back.

    Args:
        pieces: of the file.
        salt: makes the order of pieces ours.
    """

    def __init__(self, pieces: int, salt: bytes) -> None:
        self._pieces = pieces
        order = sorted(range(pieces), key=lambda n: hashlib.sha256(salt + n.to_bytes(4, "little")).digest())
        #: pieces that are not there yet, in our order
        self._missing: dict[int, None] = dict.fromkeys(order)
        #: piece -> how many donors are asked for it now
        self._asked: dict[int, int] = {}
        self._donors: dict[bytes, _Donor] = {}
        self._liars: set[bytes] = set()
        #: how long the last pieces took
        self._seconds: deque[float] = deque(maxlen=32)

    @property
    def done(self) -> bool:
        """Whether every piece is there."""
        return not self._missing

    @property
    def missing(self) -> int:
        """How many pieces are not there."""
        return len(self._missing)

    @property
    def hopeless(self) -> bool:
        """Whether nobody is left to count on."""
        return all(donor.piece is None and donor.failures >= FAILURES_MAX for donor in self._donors.values())

    @property
    def deadline_seconds(self) -> float:
        """How long to wait for a piece."""
        low, high = DEADLINE_SECONDS
        return min(max(low, DEADLINE_MEDIANS * statistics.median(self._seconds)), high) if self._seconds else high

    def idle(self, now: float) -> list[bytes]:
        """Donors that may be asked for something."""
        return [name for name, donor in self._donors.items() if donor.piece is None and donor.paused_until <= now]

    def wants_news_of(self, name: bytes) -> bool:
        """Whether it is worth asking this peer what it holds."""
        donor = self._donors.get(name)
        return name not in self._liars and (donor is None or bool(donor.held))

    # ---- events -----------------------------------------------------------------------------------------------

    def have(self, number: int) -> None:
        """A piece was there before."""
        self._missing.pop(number, None)

    def holds(self, name: bytes, held: bytes) -> None:
        """A donor says which pieces it holds, by a bitmap; empty: all. A bitmap of another length is ignored."""
        if name in self._liars or (held and len(held) != -(-self._pieces // 8)):
            return
        if name in self._donors:
            self._donors[name].held = held
        elif len(self._donors) < DONORS_KNOWN_MAX:
            self._donors[name] = _Donor(held)

    def next_for(self, name: bytes, now: float) -> int | None:
        """The piece to ask of this donor now, which counts as asked; None: none."""
        donor = self._donors.get(name)
        busy = sum(other.piece is not None for other in self._donors.values())
        if donor is None or donor.piece is not None or donor.paused_until > now or busy >= DONORS_MAX:
            return None
        number = self._fresh(donor)
        if number is None:
            number = self._crawling(donor, now)
        if number is not None:
            donor.piece, donor.since = number, now
            self._asked[number] = self._asked.get(number, 0) + 1
        return number

    def arrived(self, name: bytes, now: float) -> bool:
        """The piece asked of a donor came and is the one under the root; whether it is the first to come."""
        donor = self._donors[name]
        number, seconds = self._let_go(donor), now - donor.since
        donor.pauses = donor.failures = 0
        if number not in self._missing:
            return False
        del self._missing[number]
        self._seconds.append(seconds)
        return True

    def asked_of(self, name: bytes) -> int | None:
        """The piece that a donor is asked for."""
        donor = self._donors.get(name)
        return donor.piece if donor else None

    def rivals(self, name: bytes) -> list[bytes]:
        """Other donors that are asked for the same piece as this one."""
        number = self.asked_of(name)
        return [other for other, donor in self._donors.items() if donor.piece == number is not None and other != name]

    def outrun(self, name: bytes, now: float) -> None:
        """A donor's piece came from another first: it crawls, and is left alone for a while."""
        self._pause(name, now)

    def later(self, name: bytes, now: float) -> None:
        """A donor has too much to do."""
        self._pause(name, now)

    def failed(self, name: bytes, now: float) -> None:
        """A donor went silent, broke off, or said what makes no sense; its piece is to be had from others."""
        donor = self._pause(name, now)
        if donor is not None:
            donor.failures += 1

    def gone(self, name: bytes) -> None:
        """A donor does not hand this file out any more."""
        donor = self._donors.pop(name, None)
        if donor is not None:
            self._let_go(donor)

    def lied(self, name: bytes) -> None:
        """What a donor handed out is not what the root says: nothing of it counts ever again."""
        self._liars.add(name)
        self.gone(name)

    # ---- choices ----------------------------------------------------------------------------------------------

    def _fresh(self, donor: _Donor) -> int | None:
        """The rarest of the next pieces that this donor holds and nobody is asked for."""
        wanted = (n for n in self._missing if n not in self._asked and bit(donor.held, n))
        partial = [other.held for other in self._donors.values() if other.held]
        return min(islice(wanted, _WINDOW), key=lambda n: sum(bit(held, n) for held in partial), default=None)

    def _crawling(self, donor: _Donor, now: float) -> int | None:
        """The piece longest asked of one donor alone, where that is too long."""
        patience = FIRST_PATIENCE_SECONDS
        if self._seconds:
            end_game = len(self._missing) <= len(self._asked)
            patience = statistics.median(self._seconds) * (1.0 if end_game else PATIENCE_MEDIANS)
        waiting = [
            (other.since, other.piece)
            for other in self._donors.values()
            if other.piece is not None
            and self._asked[other.piece] < ASKED_AT_ONCE
            and other.since + patience <= now
            and bit(donor.held, other.piece)
        ]
        return min(waiting)[1] if waiting else None

    def _let_go(self, donor: _Donor) -> int | None:
        number, donor.piece = donor.piece, None
        if number is not None:
            self._asked[number] -= 1
            if not self._asked[number]:
                del self._asked[number]
        return number

    def _pause(self, name: bytes, now: float) -> _Donor | None:
        donor = self._donors.get(name)
        if donor is not None:
            self._let_go(donor)
            donor.paused_until = now + PAUSE_SECONDS[min(donor.pauses, len(PAUSE_SECONDS) - 1)]
            donor.pauses += 1
        return donor
