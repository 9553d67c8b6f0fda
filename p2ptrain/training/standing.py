"""Where a home stands: its replica, and its account of what it sent, in memory and on disk.

After a crash it stands where it stood before, but for the gradients gathered since. First comes the checkpoint, over it
go the sends and outcomes of the own log, in their order, and then the rounds that the journal has beyond it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from p2ptrain import chain
from p2ptrain.chain import RoundShape, Row
from p2ptrain.chain.sealed import Key, SealedRound
from p2ptrain.compression import wire
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.optim.demo import Pending
from p2ptrain.optim.settling import products
from p2ptrain.state.checkpoint import (
    MOMENTUM,
    CheckpointMeta,
    Kept,
    SentUnsettled,
    load_checkpoint,
    write_checkpoint,
)
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import Outcome, OwnEntry, OwnLog
from p2ptrain.state.snapshot import SnapshotFile, SnapshotStore
from p2ptrain.training.ledger import Ledger
from p2ptrain.training.replica import Replica, fill

_logger = logging.getLogger(__name__)


T = TypeVar("T")


class Written(NamedTuple):
    """A checkpoint that is on disk."""

    round: int
    bytes: int
    seconds: float
    """That another thread has computed for it."""


class Write(Protocol):
    """Does what writes to the disk: on this thread, or on another while this one goes on."""

    def __call__(self, work: Callable[[], T], /) -> Future[T]: ...


def at_once(work: Callable[[], T]) -> Future[T]:
    """Do it now, on this thread."""
    done: Future[T] = Future()
    try:
        done.set_result(work())
    except OSError as error:
        done.set_exception(error)
    return done


class Books:
    """Keeps the books of one home; for the trainer's thread.

    Args:
        replica: at the run's beginning; `restore` takes it to where this home stands.
        peer_id: ours.
        checkpoints: folder of the checkpoint and the snapshots.
        own_log: to read; the network thread writes it.
        write: does what writes a checkpoint or a snapshot; default: at once, on this thread.
        kept: which checkpoints stay.
    """

    def __init__(
        self,
        replica: Replica,
        peer_id: bytes,
        checkpoints: Path,
        own_log: OwnLog,
        write: Write = at_once,
        kept: Kept = Kept(),
    ) -> None:
        self._write, self._kept = write, kept
        self.replica, self.peer_id, self.own_log = replica, peer_id, own_log
        self.ledger = Ledger(replica.optimizer)
        #: by this home, in all
        self.sequences_read = 0
        #: share of our contribution to the round applied last that was consumed
        self.consumed_share = 0.0
        #: parts of the round applied last whose replies point against what we sent for them, of each reducer the worst
        self.opposing: list[int] = []
        self._checkpoints, self._snapshots = checkpoints, SnapshotStore(checkpoints)
        #: what the contribution handed over last takes into the own log: its round, its decays, outcomes
        self._carried: tuple[Key, int, tuple[Outcome, ...]] | None = None

    # ---- from disk --------------------------------------------------------------------------------------------

    def restore(self, journal: Journal) -> None:
        """Go to the checkpoint, account for what was sent since, and apply what the journal has beyond it.

        Raises:
            HomeError: the checkpoint is damaged, or of another model.
        """
        checkpoint = load_checkpoint(self._checkpoints, checkpoint_shapes(self.replica))
        outcomes: tuple[Outcome, ...] = ()
        unsettled: tuple[SentUnsettled, ...] = ()
        if checkpoint is not None:
            meta = checkpoint.meta
            self.replica.load_arrays(checkpoint.arrays, meta.chain)
            fill(self.replica.optimizer.momentum, checkpoint.arrays[MOMENTUM])
            self.replica.optimizer.decays = meta.decays
            self.sequences_read = meta.sequences_read
            outcomes, unsettled = meta.outcomes, meta.pending
        self.replay_own_log(outcomes, unsettled)
        self.ledger.undo_off(journal.ids)
        if journal.position(self.replica.chain.id) is None:
            if journal.last:
                _logger.warning("the journal does not continue the checkpoint; going back to a snapshot")
            self._restore_from_snapshot(journal)
        for number in range(self.replica.chain.round + 1, journal.last + 1):
            self.apply(journal.read(number))
        if self.sequences_read:
            _logger.info("back at round %d with %d sequences read", self.replica.chain.round, self.sequences_read)

    def replay_own_log(self, outcomes: tuple[Outcome, ...], unsettled: tuple[SentUnsettled, ...]) -> None:
        """Replay sends and outcomes in order over the momentum of the checkpoint, which has some of them already.

        Args:
            outcomes: of the checkpoint, since the last entry before it.
            unsettled: of the checkpoint.
        """
        ledger, saved = self.ledger, self.replica.optimizer.decays
        entries = [entry for entry in self.own_log.all() if not entry.stood_in]
        for entry in entries:
            if entry.decays <= saved:
                for outcome in entry.outcomes:
                    ledger.replay(outcome, in_momentum=True)
                ledger.send(entry.key, Pending(self.sent_by(entry), entry.decays))
        for outcome in outcomes:
            ledger.replay(outcome, in_momentum=True)
        left = {(entry.key, entry.decays) for entry in entries}
        for sent in unsettled:
            if (Key(sent.round, sent.base), sent.decays) not in left:
                coefficients = wire.decode_contribution(sent.payload, self.replica.codec, 0, self.replica.codec.chunks)
                self.replica.optimizer.give_back(Pending(coefficients, sent.decays))
        ledger.outcomes = list(outcomes)
        for entry in entries:
            if entry.decays > saved:
                known = _overlap(tuple(ledger.outcomes), entry.outcomes)
                for number, outcome in enumerate(entry.outcomes):
                    ledger.replay(outcome, in_momentum=number < known)
                ledger.send(entry.key, self.replica.optimizer.restore_sent(self.sent_by(entry), entry.decays))
                ledger.outcomes = []
                self.sequences_read = max(self.sequences_read, entry.sequences_read)

    def _restore_from_snapshot(self, journal: Journal) -> None:
        """Start from what the journal reaches back to: the checkpoint is of a branch that was left, or gone."""
        # From before what is pending, so that the journal's rounds can settle it.
        oldest_pending = min((key.round for key in self.ledger.pending), default=journal.last + 1)
        usable = [snapshot for snapshot in self._snapshots.all() if journal.position(snapshot.id) is not None]
        if usable:
            before = (snapshot for snapshot in usable if snapshot.round < oldest_pending)
            snapshot = next(before, usable[-1])
            self.replica.load_snapshot(snapshot.read())
            # Died while it changed to a chain that came without its past.
            self.ledger.give_up_until(snapshot.round, snapshot.id)
            return
        if journal.position(self.replica.run_id) is None:
            journal.restart_at(self.replica.run_id)
            # Whatever settled these is gone with the journal: on this chain nothing is settled.
            self.ledger.undo_after(0)
        self.replica.reset()

    def sent_by(self, entry: OwnEntry) -> wire.Coefficients:
        """Return what an entry's payloads say."""
        codec, parts = self.replica.codec, zip(entry.payloads, entry.ranges, strict=True)
        return wire.join([wire.decode_contribution(payload, codec, *piece) for payload, piece in parts])

    # ---- round by round ---------------------------------------------------------------------------------------

    def apply(self, sealed: SealedRound) -> None:
        """Take the step of one sealed round and settle what we sent for it."""
        self.replica.momentum_changes()
        chunks = self.replica.layout.chunks
        shape = chain.shape_of(self.replica.chain, chunks)
        state = chain.extend(self.replica.chain, sealed.id, sealed.seal, chunks)
        key = Key(shape.round, shape.base)
        replies = self.replica.apply(sealed, shape, state)
        index = shape.index(self.peer_id)
        if not self._has_sent(key):
            index = None
        pending = self.ledger.pending.get(key)
        self.opposing = [] if pending is None else _worst(products(pending, replies, index), shape)
        self.consumed_share = self.ledger.settle(shape.round, sealed.id, key, replies, index)

    def _has_sent(self, key: Key) -> bool:
        """Say whether a contribution of ours can be in the replies of a round, on whichever branch.

        Only what the own log has ever leaves for a round, and it outlives this process.
        """
        entry = self.own_log.find(key)
        return entry is not None and not entry.stood_in

    def send(
        self,
        key: Key,
        pending: Pending,
        row: Row,
        ranges: tuple[tuple[int, int], ...],
        payloads: tuple[bytes, ...],
    ) -> OwnEntry:
        """Note that a contribution left the momentum, and return what the own log is to say of it."""
        self.ledger.send(key, pending)
        outcomes, self.ledger.outcomes = tuple(self.ledger.outcomes), []
        decays = self.replica.optimizer.decays
        self._carried = (key, decays, outcomes)
        return OwnEntry(key.round, key.base, row, ranges, payloads, decays, self.sequences_read, outcomes)

    def take_back(self, key: Key, decays: int) -> None:
        """Return a contribution that never left to the momentum, and its outcomes to those not logged."""
        self.replica.momentum_changes()
        self.ledger.give_back(key, decays)
        if self._carried is not None and self._carried[:2] == (key, decays):
            self.ledger.outcomes = [*self._carried[2], *self.ledger.outcomes]
            self._carried = None

    # ---- to disk ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint now, and return when it is on disk. Raises OSError."""
        self.begin_save().result()

    def begin_save(self) -> Future[Written]:
        """Begin to write the checkpoint, as all is now; the result may be an OSError."""
        optimizer = self.replica.optimizer
        codec = self.replica.codec
        pending = tuple(
            SentUnsettled(
                key.round,
                key.base,
                sent.decays,
                wire.encode_contribution(sent.sent.cut(0, codec.chunks), codec),
            )
            for key, sent in self.ledger.pending.items()
        )
        meta = CheckpointMeta(
            self.replica.run_id,
            self.replica.chain,
            optimizer.decays,
            self.sequences_read,
            pending,
            self._outcomes_not_logged(),
        )
        frozen = self.replica.freeze(momentum=True)
        shapes, beginner = checkpoint_shapes(self.replica), threading.get_ident()

        def write() -> Written:
            began = time.thread_time()
            try:
                length = write_checkpoint(self._checkpoints, meta, shapes, frozen, self._kept)
            finally:
                frozen.let_go()
            # On the thread that waits for it, the time is that one's to count.
            there = threading.get_ident() == beginner
            return Written(meta.chain.round, length, 0.0 if there else time.thread_time() - began)

        return self._write(write)

    def _outcomes_not_logged(self) -> tuple[Outcome, ...]:
        """Return the outcomes since the last entry of the own log, as far as it is known to be there."""
        later = tuple(self.ledger.outcomes)
        if self._carried is None:
            return later
        key, decays, outcomes = self._carried
        entry = self.own_log.find(key)
        return later if entry is not None and entry.decays == decays else outcomes + later

    def save_snapshot(self, round: int, id: bytes) -> Future[SnapshotFile]:
        """Begin to write a snapshot of the replica, which is at this round and state; the result may be an OSError."""
        head, rest = self.replica.freeze_snapshot()

        def write() -> SnapshotFile:
            try:
                return self._snapshots.save(round, id, itertools.chain((head,), () if rest is None else rest.parts()))
            finally:
                if rest is not None:
                    rest.let_go()

        return self._write(write)


def _worst(products: dict[int, float], shape: RoundShape) -> list[int]:
    """Return of each reducer the part with the lowest product, if that is below zero."""
    worst: dict[int, int] = {}
    for number in sorted(products, key=products.__getitem__):
        if products[number] < 0:
            worst.setdefault(shape.parts[number].reducer, number)
    return list(worst.values())


def _overlap(known: tuple[Outcome, ...], logged: tuple[Outcome, ...]) -> int:
    """Count the outcomes that are both at the end of `known` and at the beginning of `logged`."""
    return next(n for n in range(len(known), -1, -1) if known[len(known) - n :] == logged[:n])


def checkpoint_shapes(replica: Replica) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of what a checkpoint of this replica holds."""
    return {MOMENTUM: (replica.layout.chunks, CHUNK_SIZE)} | replica.shapes
