"""Whether a run has diverged, by the train loss of one peer: said once, and not in every round.

Two things are taken for it. Micro-batch after micro-batch has a loss that is not finite: the parameters are past help.
Or the mean over the last contributions stays far above the lowest that it has been, for long: a spike of a few rounds,
which most runs get over, is none. What a peer remembers of the losses is lost when its process ends.
"""

from __future__ import annotations

import math
from collections import deque

NOT_FINITE = 16
"""Micro-batches in a row."""
MEAN_OF = 16
"""Contributions."""
FAR_NATS, FAR_SHARE = 1.0, 0.25
"""Above the lowest mean, at least, and as a share of it: a loss of 3 nats is far above at 4."""
LONG = 64
"""Contributions in a row."""


class LossWatch:
    """Hears of one peer's losses, and says when the run has diverged; see the module docstring."""

    def __init__(self) -> None:
        #: why, for people; empty while it has not
        self.diverged = ""
        self._recent: deque[float] = deque(maxlen=MEAN_OF)
        self._best = math.inf
        self._not_finite = self._far = 0
        self._said = False

    def micro_batch(self, finite: bool) -> bool:
        """Take in whether a micro-batch's loss is finite; True: it is not, and the one before was."""
        self._not_finite = 0 if finite else self._not_finite + 1
        if self._not_finite == NOT_FINITE:
            self.diverged = f"no loss of the last {NOT_FINITE} micro-batches is finite"
        return self._not_finite == 1

    def contribution(self, nats: float) -> None:
        """Take in the mean loss of a contribution, in nats."""
        self._recent.append(nats)
        if len(self._recent) < MEAN_OF:
            return
        mean = sum(self._recent) / MEAN_OF
        self._best = min(self._best, mean)
        far = max(FAR_NATS, FAR_SHARE * self._best)
        self._far = self._far + 1 if mean > self._best + far else 0
        if self._far >= LONG:
            self.diverged = (
                f"the train loss has been far above its best for {self._far} rounds: {mean:.2f} where it was "
                f"{self._best:.2f}"
            )
        elif mean < self._best + far / 2:
            self.diverged = ""

    def news(self) -> str:
        """Return why the run has diverged, the first time that it has; else nothing."""
        if not self.diverged or self._said:
            return ""
        self._said = True
        return self.diverged
