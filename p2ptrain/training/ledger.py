"""What became of this peer's contributions: pending until a seal settles them, and undone when its branch is left.

The ledger keeps what it takes to undo for `WINDOW` rounds, within `WINDOW_BYTES`; what a chain of more rounds took is
settled for good, and a branch left later than that is reported as discarded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from p2ptrain.averaging.events import Key
from p2ptrain.optim.demo import DeMo, PartReply, Pending, Settled

WINDOW = 128
WINDOW_BYTES = 256 * 1024 * 1024


class _Entry(NamedTuple):
    """A contribution settled by the seal of `at`."""

    at: int
    key: Key
    settled: Settled


class Ledger:
    """Keeps account for one optimizer."""

    def __init__(self, optimizer: DeMo) -> None:
        self._optimizer = optimizer
        #: sent and not settled
        self.pending: dict[Key, Pending] = {}
        self._settled: deque[_Entry] = deque()
        #: settled contributions that a branch's end found beyond the window
        self.discarded = 0

    def send(self, key: Key, pending: Pending) -> None:
        """A contribution left the momentum."""
        self.pending[key] = pending

    def give_back(self, key: Key) -> None:
        """A contribution that never left: all of it returns to the momentum."""
        self._optimizer.give_back(self.pending.pop(key))

    def settle(self, key: Key, replies: Sequence[PartReply], index: int | None) -> float:
        """The seal of round `key` was applied: settle its contribution, and return all that came too late for any.

        Args:
            replies: the sealed ones.
            index: our place among that round's members; None: nothing of ours can be in the replies.

        Returns:
            The share of this round's contribution that was consumed.
        """
        share = 0.0
        for sent in sorted((k for k in self.pending if k.round <= key.round), key=lambda k: k.round):
            ours = sent == key
            settled = self._optimizer.settle(self.pending.pop(sent), replies if ours else (), index if ours else None)
            self._settled.append(_Entry(key.round, sent, settled))
            share = settled.consumed_share if ours else share
        while self._settled and (self._settled[0].at <= key.round - WINDOW or self._bytes() > WINDOW_BYTES):
            self._settled.popleft()
        return share

    def undo_after(self, round: int, applied: int) -> None:
        """The branch after `round` was left, `applied` being the last round applied on it: all is pending again."""
        while self._settled and self._settled[-1].at > round:
            entry = self._settled.pop()
            self.pending[entry.key] = self._optimizer.unsettle(entry.settled)
        self.discarded += max(0, applied - round - WINDOW)

    def _bytes(self) -> int:
        if not self._settled:
            return 0
        sent = self._settled[0].settled.pending.sent
        return len(self._settled) * len(sent.value) * (sent.chunk.itemsize + sent.index.itemsize + 2 * 4)
