"""Keeps the seals of a peer's chain: for whoever counts who did what, and for whoever judges a fork by them.

The driver tells it each effect once it is carried out. No fault of a disk passes from here: from the first seal that
cannot be written on some may be missing, with one warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from p2ptrain.chain import ChainState, SealError
from p2ptrain.rounds import events
from p2ptrain.rounds.inbox import Restore
from p2ptrain.state.journal import Journal
from p2ptrain.state.seals import SealLog

_logger = logging.getLogger(__name__)


class SealKeeper:
    """See the module docstring.

    Args:
        log: where seals go.
        chunks: of the model.
    """

    def __init__(self, log: SealLog, chunks: int) -> None:
        self.log, self._chunks = log, chunks
        self._fails = False

    def begin(self, head: ChainState, journal: Journal) -> None:
        """Take up the seals where this peer stands; those that the journal has beyond them are added."""
        self._guarded(lambda: self._begin(head, journal))

    def _begin(self, head: ChainState, journal: Journal) -> None:
        kept = self.log.resume(head.run_id, self._chunks)
        if head.id in kept:
            return
        place = next((at for at in map(journal.position, reversed(kept)) if at is not None), None)
        if place is None or journal.last != head.round:
            self.log.begin(head, self._chunks)
            return
        for number in range(place + 1, head.round + 1):
            self.log.append(journal.read(number).signed)

    def hear(self, what: events.Event | events.Effect | Restore) -> None:
        """Hear an event of the machine, or an effect that was carried out; on the network thread."""
        if isinstance(what, events.Apply):
            apply = what
            self._guarded(lambda: self._applied(apply))
        elif isinstance(what, Restore):
            restore = what
            self._guarded(lambda: self._restored(restore))

    def _applied(self, apply: events.Apply) -> None:
        self.log.append(apply.sealed.signed)
        if self.log.full:
            self.log.begin(apply.state, self._chunks)

    def _restored(self, restore: Restore) -> None:
        for entry in restore.earlier:
            if isinstance(entry, ChainState):
                self.log.begin(entry, self._chunks)
            else:
                self.log.append(entry)
        self.log.begin(restore.chain, self._chunks)
        for sealed in restore.rounds:
            self.log.append(sealed.signed)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, SealError, AssertionError) as error:
            if not self._fails:
                _logger.warning("seals are not kept any more, so this home cannot count who did what: %r", error)
            self._fails = True
