"""Whether this machine's clock goes wrong while a peer runs: decisions alone, without a clock and without sockets.

Records in the DHT carry times, and who is off by more than `WRONG_SECONDS` is not believed, and believes nobody. A
clock that was right at the start may drift, or be set; and a laptop that slept finds its clock ahead by the time that
it slept, while the monotonic clock stood still (clock_gettime(2)). Each is said once, and that it is over, too. Nothing
has to be done here for a peer to go on: its records are written anew all the time, and timers that fired late are known
as late. What others say counts by its median, so that single ones who are wrong, or lie, are outvoted.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WRONG_SECONDS = 3.0
"""hivemind's MAX_DHT_TIME_DISCREPANCY_SECONDS: beyond it two nodes do not believe each other."""
RIGHT_SECONDS = 2.0
"""Not before it is off by less is a clock called right again."""
JUMP_SECONDS = 5.0
"""A busy machine takes so long between two readings of two clocks at most."""


class ClockWatch:
    """See the module docstring. What is to be said comes back as text; empty: nothing is."""

    def __init__(self) -> None:
        #: the wall clock beside the monotonic one, at the last look
        self._apart: float | None = None
        #: as last said
        self._wrong = False

    def looked(self, wall: float, steady: float) -> str:
        """Take a reading of both clocks, read at the same time [s]."""
        before, self._apart = self._apart, wall - steady
        jump = 0.0 if before is None else self._apart - before
        if jump >= JUMP_SECONDS:
            return f"this machine has slept for {jump:.0f} s, or its clock was set forward by that: going on"
        if jump <= -JUMP_SECONDS:
            return f"this machine's clock was set back by {-jump:.0f} s"
        return ""

    def compared(self, ahead: Sequence[float]) -> str:
        """Hear by how much this machine's clock is ahead of those of others [s]; of nobody: nothing changes."""
        if not ahead:
            return ""
        off = statistics.median(ahead)
        if not self._wrong and abs(off) > WRONG_SECONDS:
            self._wrong = True
            return (
                f"this machine's clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the swarm's: others "
                "do not believe its records until it is set right, for example with: sudo timedatectl set-ntp true"
            )
        if self._wrong and abs(off) < RIGHT_SECONDS:
            self._wrong = False
            return "this machine's clock is right again"
        return ""
