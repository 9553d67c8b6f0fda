"""What became of this peer's contributions: pending until a seal settles them, and undone when its branch is left.

The ledger keeps what it takes to undo for `WINDOW` rounds, within `WINDOW_BYTES`; what a chain of more rounds took is
settled for good. Each outcome is also noted for the own log, so that after a crash `replay` gives the same ledger and
the same momentum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from p2ptrain.chain.sealed import Key
from p2ptrain.optim.demo import DeMo
from p2ptrain.optim.settling import PartReply, Pending, Settled
from p2ptrain.state.own_log import Outcome

WINDOW = 128
WINDOW_BYTES = 256 * 1024 * 1024


class _Entry(NamedTuple):
    """A contribution settled by the seal `id` of round `at`."""

    at: int
    id: bytes
    key: Key
    settled: Settled


class Ledger:
    """Keeps account for one optimizer."""

    def __init__(self, optimizer: DeMo) -> None:
        self._optimizer = optimizer
        #: sent and not settled
        self.pending: dict[Key, Pending] = {}
        self._settled: deque[_Entry] = deque()
        #: since the last entry of the own log
        self.outcomes: list[Outcome] = []
        #: contributions whose fate cannot be known, since the chain between is no longer to be had
        self.given_up: set[Key] = set()

    def send(self, key: Key, pending: Pending) -> None:
        """A contribution left the momentum."""
        self.pending[key] = pending

    def give_back(self, key: Key, decays: int) -> None:
        """A contribution that never left: all of it returns to the momentum, if it is not there yet."""
        pending = self.pending.get(key)
        if pending is not None and pending.decays == decays:
            self._optimizer.give_back(self.pending.pop(key))
        self._settled = deque(e for e in self._settled if (e.key, e.settled.pending.decays) != (key, decays))

    def settle(self, round: int, id: bytes, key: Key, replies: Sequence[PartReply], index: int | None) -> float:
        """A seal was applied: settle the contribution to its round, and return all that came too late for any.

        Args:
            round, id: of the seal.
            key: of its round.
            replies: the sealed ones.
            index: our place among that round's members; None: nothing of ours can be in the replies.

        Returns:
            The share of this round's contribution that was consumed.
        """
        share = 0.0
        for sent in sorted((k for k in self.pending if k.round <= key.round), key=lambda k: k.round):
            ours = sent == key
            settled = self._optimizer.settle(self.pending.pop(sent), replies if ours else (), index if ours else None)
            self._note("settled", _Entry(round, id, sent, settled))
            self._settled.append(_Entry(round, id, sent, settled))
            share = settled.consumed_share if ours else share
        while self._settled and (self._settled[0].at <= round - WINDOW or self._bytes() > WINDOW_BYTES):
            self._settled.popleft()
        return share

    def undo_after(self, round: int) -> None:
        """The branch after `round` was left: all that it settled is pending again."""
        while self._settled and self._settled[-1].at > round:
            entry = self._settled.pop()
            self.pending[entry.key] = self._optimizer.unsettle(entry.settled)
            self._note("undone", entry)

    def give_up_until(self, round: int, id: bytes) -> None:
        """The chain goes on at `id`, and what it holds up to `round` is not to be had.

        Whether it used what was sent for those rounds cannot be known: it counts as used, so that nothing counts twice,
        and what was settled stays so.
        """
        for key in sorted((k for k in self.pending if k.round <= round), key=lambda k: k.round):
            pending = self.pending.pop(key)
            whole = Settled(pending, np.ones(len(pending.sent.value), bool), ())
            self._note("given up", _Entry(round, id, key, whole))
            self.given_up.add(key)

    def replay(self, outcome: Outcome, *, in_momentum: bool) -> None:
        """After a crash: what the own log says became of a contribution.

        Args:
            in_momentum: the momentum at hand was saved after it.
        """
        match outcome.kind:
            case "given up":
                self.pending.pop(outcome.key, None)
                self.given_up.add(outcome.key)
            case "settled":
                pending = self.pending.pop(outcome.key, None)
                if pending is None:
                    return
                count = len(pending.sent.value)
                kept = np.unpackbits(np.frombuffer(outcome.kept, np.uint8), count=count).astype(bool)
                settled = Settled(pending, kept, outcome.clips)
                if not in_momentum:
                    self._optimizer.settle_again(settled)
                self._settled.append(_Entry(outcome.round, outcome.id, outcome.key, settled))
            case "undone":
                position = next((n for n, e in enumerate(self._settled) if e.key == outcome.key), None)
                if position is None:
                    return
                entry = self._settled[position]
                del self._settled[position]
                self.pending[outcome.key] = entry.settled.pending
                if not in_momentum:
                    self._optimizer.unsettle(entry.settled)

    def undo_off(self, ids: dict[int, bytes]) -> None:
        """After a crash: undo what seals have settled that are not in the journal, `ids` {round: id} without gaps."""
        oldest = min(ids, default=1)
        off = [entry.at for entry in self._settled if entry.at >= oldest and ids.get(entry.at) != entry.id]
        if off:
            self.undo_after(min(off) - 1)

    def _note(self, kind: str, entry: _Entry) -> None:
        settled = entry.settled
        kept = np.packbits(settled.kept).tobytes() if kind == "settled" else b""
        clips = settled.clips if kind == "settled" else ()
        self.outcomes.append(Outcome(kind, entry.at, entry.id, entry.key.round, entry.key.base, kept, clips))  # type: ignore[arg-type]

    def _bytes(self) -> int:
        if not self._settled:
            return 0
        sent = self._settled[0].settled.pending.sent
        return len(self._settled) * len(sent.value) * (sent.chunk.itemsize + sent.index.itemsize + 4 + 1)
