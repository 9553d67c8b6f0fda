"""What the owner allows this peer's line to carry: frames wait here for their turn, and the wire is watched.

Every stream's frames leave through `leave`, and what is asked of others is announced by `admit`, so that both wait
while a limit is used up. What a round needs goes before news, and news before what others download: a frame's turn
comes by when it was ready, plus a delay by its kind (`DELAYS_SECONDS`), so that nothing waits for ever. Unary calls and
the DHT's are short; they are not held back but counted with the daemon's overhead, as `Wire` sees it, and later frames
wait for them.

What others send unasked cannot be refused on the wire. Contributions are read no faster than the limit allows, so that
their senders' streams fill up; and a peer with a limit says that its line is no faster (`ceiling_kbit`), so that it is
dealt fewer parts.

Where the kernel does not tell of the daemon's sockets, the wire is estimated from the frames, rather too much.

Cost: without a limit nothing. With one, a look at the wire every `LOOK_SECONDS`.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from p2ptrain.config.amounts import format_amount, format_rate
from p2ptrain.state.transfer import MonthlyTransfer, month_ends_at
from p2ptrain.swarm.limits import Allowance, loop_time
from p2ptrain.swarm.pacing import WINDOW_SECONDS, Budget, spread_rate
from p2ptrain.swarm.wire import Wire

LOOK_SECONDS = 0.25
DELAYS_SECONDS = {"rpc_follow": 2.0, "rpc_rounds": 4.0, "rpc_snapshot": 8.0, "rpc_file": 8.0, "rpc_audit": 8.0}
"""How much later a frame of a call has its turn than one that a round needs."""
FRAME_SECONDS = 0.1
"""A frame is no longer than the line takes for it in this time, so that many streams share it evenly."""
FRAME_MIN_BYTES, FRAME_MAX_BYTES = 1024, 256 * 1024
NEXT_SECONDS = 0.005
"""For a stream whose frame was let go to have the next one ready."""
READ_SECONDS = 4.0
"""The longest that a frame of others is left unread; they give up after twice as long."""
HEADROOM = 0.97
"""Of a limit that is used; the rest is for what the wire carries between two looks."""
DECLARED_SHARE = 0.8
"""Of a limit that is declared as the line; the rest is overhead, news and the DHT."""
MONTH_BURST_SECONDS = 600.0
"""Of the month's even rate, that may be used at once: a round is short, and a newcomer has much to fetch."""
MONTH_RATE_MIN_BYTES = 2_000
"""A second. With less left a peer does not follow the chain, and leaves until the month is over."""
TOLD_AGAIN_SECONDS = 3600.0
SLOW_SECONDS = 2.0
"""A frame of a round that waits longer is worth telling the owner."""
ESTIMATED_OVERHEAD, ESTIMATED_UPKEEP_BYTES = 1.12, 1_500
"""Where the wire is not seen: of what frames have, and bytes a second besides."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the owner allows, in bytes a second and bytes a month; 0: all."""

    upload_rate: float = 0.0
    download_rate: float = 0.0
    monthly_bytes: int = 0

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return bool(self.upload_rate or self.download_rate or self.monthly_bytes)


class Line:
    """See the module docstring. For one loop.

    Args:
        allowed: by the owner.
        transfer: of this month so far.
        on_spent: is told, once, that the month's transfer is used up.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        allowed: Allowed,
        transfer: MonthlyTransfer,
        on_spent: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.allowed, self.transfer = Allowed(), transfer
        self._on_spent, self._clock = on_spent, clock
        self._up: Budget | None = None
        self._down: Budget | None = None
        self._month: Budget | None = None
        #: is set while there is any limit
        self._limited = asyncio.Event()
        #: there was a limit, so that something was counted
        self._counted = False
        self._waiting: list[tuple[float, int, float, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._pump: asyncio.Task[None] | None = None
        self._asking = asyncio.Lock()
        self._told = Allowance(1 / TOLD_AGAIN_SECONDS, 1)
        self._spent_told = self._seen = False
        #: of frames, where the wire is not seen
        self._estimated_sent = self._estimated_received = 0.0
        saved = min(1.0, max(0.0, clock() - transfer.written_at) / MONTH_BURST_SECONDS)
        self._set(allowed, filled=1.0, month_filled=saved)

    def limit(self, allowed: Allowed) -> None:
        """Have other limits from now on. Nothing is saved up under them yet; what is on its way already is charged."""
        self._set(allowed, filled=0.0, month_filled=0.0)
        _logger.info("limits: %s", self.describe() or "none")

    def _set(self, allowed: Allowed, *, filled: float, month_filled: float) -> None:
        before, self.allowed = self.allowed, allowed
        now, up, down = time.monotonic(), allowed.upload_rate, allowed.download_rate
        if up != before.upload_rate:
            self._up = Budget(HEADROOM * up, now, filled=filled) if up else None
        if down != before.download_rate:
            # What is asked for comes in pieces, which may be longer than a window.
            burst = WINDOW_SECONDS * HEADROOM * down
            self._down = Budget(HEADROOM * down, now, burst_bytes=burst, filled=filled) if down else None
        if allowed.monthly_bytes != before.monthly_bytes:
            self._month, self._spent_told = None, False
            if allowed.monthly_bytes:
                rate = self._month_rate(self._clock())
                burst = MONTH_BURST_SECONDS * rate
                self._month = Budget(rate, now, burst_bytes=burst, filled=month_filled, windowed=False)
        if allowed.limited:
            self._counted = True
            self._limited.set()
        else:
            self._limited.clear()

    # ---- what is asked of it ----------------------------------------------------------------------------------

    @property
    def frame_bytes(self) -> int:
        """The length that a frame should not exceed."""
        if self._up is None:
            return FRAME_MAX_BYTES
        return int(min(max(FRAME_SECONDS * self._up.rate, FRAME_MIN_BYTES), FRAME_MAX_BYTES))

    @property
    def upload_rate(self) -> float:
        """What may leave in a second [bytes]; infinite: no limit."""
        return math.inf if self._up is None else self._up.rate

    @property
    def ceiling_kbit(self) -> int:
        """The most that may be declared as this peer's line [kbit/s]."""
        rates = [budget.rate for budget in (self._up, self._down) if budget is not None]
        if self._month is not None:
            rates.append(self._month.rate / 2)  # it counts both ways
        return int(DECLARED_SHARE * min(rates) * 8 / 1000) if rates else 2**31

    @property
    def spent(self) -> bool:
        """Whether too little is left of this month to take part."""
        return self.spends(self.allowed)

    def spends(self, allowed: Allowed) -> bool:
        """Say whether too little of this month would be left under these limits."""
        return bool(allowed.monthly_bytes) and self._month_rate(self._clock(), allowed) < MONTH_RATE_MIN_BYTES

    def summary(self) -> dict[str, Any]:
        """Return limits and what was carried, by names with units, for those who show them."""
        month = self._month
        return {
            "upload_limit_bytes_per_second": self.allowed.upload_rate or None,
            "download_limit_bytes_per_second": self.allowed.download_rate or None,
            "monthly_transfer_bytes": self.allowed.monthly_bytes or None,
            "month": self.transfer.month,
            "month_sent_bytes": self.transfer.sent_bytes,
            "month_received_bytes": self.transfer.received_bytes,
            "month_rate_bytes_per_second": None if month is None else round(month.rate),
            "wire_is": "seen" if self._seen else "estimated",
        }

    def describe(self) -> str:
        """Return the limits in force in one line, for the log."""
        said = []
        if self.allowed.upload_rate:
            said.append(f"at most {format_rate(self.allowed.upload_rate)} up")
        if self.allowed.download_rate:
            said.append(f"at most {format_rate(self.allowed.download_rate)} down")
        if self.allowed.monthly_bytes:
            now, whole = self._clock(), format_amount(self.allowed.monthly_bytes)
            used, rate = format_amount(self.transfer.used_bytes(now)), format_rate(self._month_rate(now))
            said.append(f"{used} of this month's {whole} used, so that {rate} are left for both ways together")
        return "; ".join(said)

    async def leave(self, call: str, size: int) -> None:
        """Wait until a frame of a call, `size` bytes long, may leave."""
        self._estimated_sent += ESTIMATED_OVERHEAD * size
        if self._up is None and self._month is None:
            return
        now = loop_time()
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (now + DELAYS_SECONDS.get(call, 0.0), next(self._numbers), size, turn))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._let_go())
        await turn
        waited = loop_time() - now
        if waited > SLOW_SECONDS and call not in DELAYS_SECONDS and self._told.take("slow"):
            _logger.warning(
                "what a round needs has waited %.1f s for the owner's limit (%s): this peer may come late",
                waited,
                self.describe(),
            )

    async def admit(self, size: int) -> None:
        """Wait until so many bytes may be asked for."""
        if self._down is None and self._month is None:
            return
        async with self._asking:
            while wait := self._wait_seconds((self._down, self._month), size):
                await asyncio.sleep(min(wait, 1.0))
            self._spend((self._down, self._month), size)

    def heard(self, size: int) -> None:
        """Count a frame that came."""
        self._estimated_received += ESTIMATED_OVERHEAD * size

    async def read(self, size: int) -> None:
        """Count a frame that others sent unasked, and wait, not too long, while more comes than may."""
        self.heard(size)
        if self._down is None:
            return
        until = loop_time() + READ_SECONDS
        while (wait := self._wait_seconds((self._down,), 0)) and loop_time() < until:
            await asyncio.sleep(min(wait, LOOK_SECONDS))

    # ---- upkeep -----------------------------------------------------------------------------------------------

    async def run(self, daemon_pid: Callable[[], int]) -> None:
        """Watch the wire while there are limits, until cancelled."""
        sent = received = 0
        if self.allowed.limited:
            _logger.info("limits: %s", self.describe())
        while True:
            late = not self._limited.is_set()
            await self._limited.wait()
            wire, told_at = Wire(daemon_pid), loop_time()
            if late:
                # What was carried while there was no limit counts for none.
                sent, received = self._look(wire)
            while self.allowed.limited:
                await asyncio.sleep(LOOK_SECONDS)
                new_sent, new_received = self._look(wire)
                self._observe(new_sent - sent, new_received - received)
                sent, received = new_sent, new_received
                if self.allowed.monthly_bytes and loop_time() - told_at > TOLD_AGAIN_SECONDS:
                    told_at = loop_time()
                    _logger.info("limits: %s", self.describe())

    def close(self) -> None:
        """Write down what was carried. Raises nothing: it was written seconds ago."""
        if self._pump is not None:
            self._pump.cancel()
        if not self._counted:
            return
        try:
            self.transfer.write(self._clock())
        except OSError as error:
            _logger.warning("cannot write down what this month has carried: %s", error)

    def _look(self, wire: Wire) -> tuple[int, int]:
        try:
            wire.look()
            self._seen = True
        except OSError as error:
            if self._seen:
                # The daemon is being started again.
                return wire.sent, wire.received
            if self._told.take("blind"):
                _logger.warning("the daemon's bytes are estimated: the kernel does not tell them (%s)", error)
            self._estimated_sent += ESTIMATED_UPKEEP_BYTES * LOOK_SECONDS
            self._estimated_received += ESTIMATED_UPKEEP_BYTES * LOOK_SECONDS
            return int(self._estimated_sent), int(self._estimated_received)
        return wire.sent, wire.received

    def _observe(self, sent: int, received: int) -> None:
        now, today = time.monotonic(), self._clock()
        if self._up is not None:
            self._up.observe(sent, now)
        if self._down is not None:
            self._down.observe(received, now)
        try:
            self.transfer.count(max(0, sent), max(0, received), today)
        except OSError as error:
            if self._told.take("unwritten"):
                _logger.warning("cannot write down what this month has carried: %s", error)
        if self._month is not None:
            self._month.observe(sent + received, now)
            self._month.set_rate(self._month_rate(today), now)
            if self.spent and not self._spent_told:
                self._spent_told = True
                self._on_spent()

    def _month_rate(self, today: float, allowed: Allowed | None = None) -> float:
        monthly_bytes = (allowed or self.allowed).monthly_bytes
        return spread_rate(monthly_bytes - self.transfer.used_bytes(today), month_ends_at(today) - today)

    def _wait_seconds(self, budgets: tuple[Budget | None, ...], size: float) -> float:
        now = time.monotonic()
        return max((budget.wait_seconds(size, now) for budget in budgets if budget is not None), default=0.0)

    def _spend(self, budgets: tuple[Budget | None, ...], size: float) -> None:
        now = time.monotonic()
        for budget in budgets:
            if budget is not None:
                budget.spend(size, now)

    async def _let_go(self) -> None:
        while self._waiting:
            budgets = self._up, self._month  # which the owner may change
            *_, size, turn = self._waiting[0]
            if turn.done():  # its stream has ended
                heapq.heappop(self._waiting)
            elif wait := self._wait_seconds(budgets, size):
                # What is seen, and what comes with less delay, may change whose turn it is.
                await asyncio.sleep(min(wait, LOOK_SECONDS))
            else:
                heapq.heappop(self._waiting)
                self._spend(budgets, size)
                turn.set_result(None)
                # Its stream may have the next frame at once, which goes before what else waits.
                await asyncio.sleep(NEXT_SECONDS)


def next_month(now: float) -> str:
    """Return the day on which the next month begins, for people."""
    return time.strftime("%d %B %Y", time.gmtime(month_ends_at(now)))
