"""The training loop: computes gradients, hands contributions over, applies what was sealed.

Runs in the main thread and hears of the swarm through a queue only. Seals are applied between micro-batches; a gradient
that came too late for its round stays where it is and counts in the next. Nothing here decides anything about rounds.
"""

from __future__ import annotations

import logging
import math
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from p2ptrain.averaging import chain
from p2ptrain.averaging.catching_up import Restore
from p2ptrain.averaging.chain import THROUGHPUT_MAX_MILLI, RoundShape, Row
from p2ptrain.averaging.driver import TrainerMessage
from p2ptrain.averaging.events import Apply, ContributionReady, Key, Rollback, SealedRound, StartRound, StoodIn
from p2ptrain.compression import wire
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.data.assignment import sequence_offsets
from p2ptrain.observe.status import Status
from p2ptrain.optim.demo import Pending
from p2ptrain.state.checkpoint import Checkpoint, CheckpointMeta, SentUnsettled, load_checkpoint, save_checkpoint
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import OwnEntry, OwnLog
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.training.ledger import WINDOW, Ledger
from p2ptrain.training.replica import Replica

CHECKPOINT_SECONDS = 60.0
CAREFUL_ROUNDS = 16
"""After it was too late for a round, a trainer begins no micro-batch that may end too late, for this many."""
_WEIGHT_MAX = 1_000_000

_logger = logging.getLogger(__name__)


class Swarm(Protocol):
    """What the trainer tells the network thread; both return at once."""

    def contribute(self, ready: ContributionReady, entry: OwnEntry) -> None: ...

    def root_computed(self, round: int, root: bytes) -> None: ...


class Trainer:
    """See the module docstring.

    Args:
        replica: at the run's beginning; `restore` takes it to where this home stands.
        peer_id: ours, which decides what we read.
        tokens: the training text [tokens].
        bytes_per_token: of that text.
        uplink_kbit: what we say of our line; 0: we cannot be dialled.
        checkpoints: folder of the checkpoint and the snapshots.
    """

    def __init__(
        self,
        replica: Replica,
        peer_id: bytes,
        tokens: NDArray[np.uint16],
        bytes_per_token: float,
        uplink_kbit: int,
        inbox: queue.SimpleQueue[TrainerMessage | None],
        checkpoints: Path,
        own_log: OwnLog,
        status: Status,
    ) -> None:
        self.replica = replica
        self.ledger = Ledger(replica.optimizer)
        self.status = status
        #: rounds applied in which this peer had a part; those caught up on do not count
        self.rounds_applied = 0
        self._peer_id, self._tokens, self._bytes_per_token = peer_id, tokens, bytes_per_token
        self._uplink_kbit = uplink_kbit
        self._inbox, self._own_log = inbox, own_log
        self._checkpoints, self._snapshots = checkpoints, SnapshotStore(checkpoints)
        self._device = next(replica.model.parameters()).device
        config = replica.manifest
        self._nonce, self._rules = bytes.fromhex(config.nonce), config.round
        self._sequences_read = 0
        self._sequences_per_second = 0.0
        #: the round to compute for, until its contribution is handed over
        self._current: StartRound | None = None
        #: since the last contribution: micro-batches, their sequences and summed loss, seconds
        self._micro_batches = 0
        self._sequences = 0
        self._loss_sum = 0.0
        self._computing_seconds = 0.0
        #: when the round's time to compute is over
        self._deadline = -math.inf
        #: a message of weight 0 went out in our stead since the last contribution
        self._stood_in = False
        #: contributions until it is not careful any more
        self._careful_rounds = 0
        #: what the last micro-batch took
        self._micro_batch_seconds = 0.0
        self._tokens_sent = 0
        self._applied_at = self._contributed_at = time.monotonic()
        self._saved_at = time.monotonic()
        #: there is a checkpoint, so `sample` and `eval` have one to read
        self._saved = False

    # ---- where this home stands -------------------------------------------------------------------------------

    def restore(self, journal: Journal) -> None:
        """Go to the checkpoint, account for what was sent since, and apply what the journal has beyond it.

        Raises:
            HomeError: the checkpoint is damaged, or of another model.
        """
        checkpoint = load_checkpoint(self._checkpoints, checkpoint_shapes(self.replica))
        if checkpoint is not None:
            meta = checkpoint.meta
            arrays = dict(checkpoint.arrays)
            momentum = arrays.pop("momentum")
            self.replica.load_arrays(arrays, meta.chain)
            self.replica.optimizer.momentum.copy_(torch.from_numpy(np.array(momentum)))
            self.replica.optimizer.decays = meta.decays
            self._sequences_read = meta.sequences_read
            for sent in meta.pending:
                coefficients = self._decode(sent.payload, 0, self.replica.layout.chunks)
                self.ledger.send(Key(sent.round, sent.base), Pending(coefficients, sent.decays))
        for entry in self._own_log.all():
            if not entry.stood_in and entry.decays > self.replica.optimizer.decays:
                self._resend(entry)
        if journal.position(self.replica.chain.id) is None:
            if journal.last:
                _logger.warning("the journal does not continue the checkpoint; going back to a snapshot")
            self._restore_from_snapshot(journal)
        for number in range(self.replica.chain.round + 1, journal.last + 1):
            self._apply(journal.read(number))

    def _restore_from_snapshot(self, journal: Journal) -> None:
        """The checkpoint is of a branch that was left, or gone: start from what the journal reaches back to."""
        for snapshot in self._snapshots.all():
            if journal.position(snapshot.id) is not None:
                self.replica.load_snapshot(snapshot.read())
                return
        if journal.position(self.replica.run_id) is None:
            journal.restart_at(self.replica.run_id)
        self.replica.reset()

    def _resend(self, entry: OwnEntry) -> None:
        parts = [self._decode(p, *r) for p, r in zip(entry.payloads, entry.ranges, strict=True)]
        whole = wire.Coefficients(
            0,
            self.replica.layout.chunks,
            np.concatenate([part.chunk for part in parts]),
            np.concatenate([part.index for part in parts]),
            np.concatenate([part.value for part in parts]),
        )
        self.ledger.send(entry.key, self.replica.optimizer.restore_sent(whole, entry.decays))
        self._sequences_read = max(self._sequences_read, entry.sequences_read)

    def _decode(self, payload: bytes, start: int, end: int) -> wire.Coefficients:
        bits = self.replica.manifest.codec.value_bits
        return wire.decode_contribution(payload, self.replica.layout.topk, start, end, bits)

    def save(self) -> None:
        """Write the checkpoint now."""
        optimizer = self.replica.optimizer
        bits, chunks = self.replica.manifest.codec.value_bits, self.replica.layout.chunks
        pending = tuple(
            SentUnsettled(
                key.round,
                key.base,
                sent.decays,
                wire.encode_contribution(sent.sent.cut(0, chunks), self.replica.layout.topk, bits),
            )
            for key, sent in self.ledger.pending.items()
        )
        meta = CheckpointMeta(self.replica.run_id, self.replica.chain, optimizer.decays, self._sequences_read, pending)
        momentum = optimizer.momentum.cpu().numpy()
        save_checkpoint(self._checkpoints, Checkpoint(meta, self.replica.arrays() | {"momentum": momentum}))
        self._own_log.prune(self.replica.chain.round - WINDOW)
        self._saved_at, self._saved = time.monotonic(), True

    # ---- the loop ---------------------------------------------------------------------------------------------

    def run(self, swarm: Swarm, after_round: Callable[[], bool]) -> None:
        """Train until `after_round`, called when a round was applied, is false, or None is in the queue."""
        going_on = True
        while going_on:
            work = self._current is not None and self._inbox.empty()
            if work:
                self._compute(swarm)
                continue
            message = self._inbox.get()
            if message is None:
                return
            self._take(message, swarm)
            if isinstance(message, Apply):
                going_on = after_round()

    def _take(self, message: TrainerMessage, swarm: Swarm) -> None:
        match message:
            case StartRound():
                self._current = message
                self._deadline = time.monotonic() + message.seconds
                self._resume_sent(message, swarm)
            case StoodIn():
                if self._current is not None and self._current.key == message.key:
                    self._current = None
                    self._stood_in = True
                    self._careful_rounds = CAREFUL_ROUNDS
            case Apply():
                self._on_apply(message, swarm)
            case Rollback():
                self.ledger.undo_after(message.state.round, self.replica.chain.round)
                self.replica.undo()
                self._show()
            case Restore():
                self._on_restore(message, swarm)

    def _resume_sent(self, start: StartRound, swarm: Swarm) -> None:
        """What was sent for a round, before a restart or on a branch that was left, is sent again as the same bytes."""
        pending = self.ledger.pending.get(start.key)
        if pending is None:
            return
        entry = self._own_log.find(start.key)
        if entry is None or entry.stood_in:
            # It came too late and never left.
            self.ledger.give_back(start.key)
            return
        payloads = tuple(self.replica.optimizer.payload(pending, p.start, p.end) for p in start.shape.parts)
        again = msgspec.structs.replace(entry, ranges=ranges_of(start.shape), payloads=payloads)
        swarm.contribute(ContributionReady(start.key, entry.row, payloads), again)
        self._current = None

    def _on_apply(self, message: Apply, swarm: Swarm) -> None:
        sealed = message.sealed
        self._apply(sealed, message)
        if message.index is not None or sealed.seal.sealer == self._peer_id:
            self.rounds_applied += 1
        if self._current is not None and self._current.key.round <= sealed.seal.round:
            self._current = None
        now = time.monotonic()
        self.status.waiting_seconds = max(0.0, now - self._applied_at - self.status.computing_seconds)
        if message.contributed:
            # By the clock on the wall, waiting included: what the run gets of this machine.
            self.status.tokens_per_second = self._tokens_sent / max(now - self._contributed_at, 1e-6)
            self._contributed_at = now
        self._applied_at = now
        self._show()
        if sealed.seal.round % self._rules.root_interval == 0:
            snapshot = self._snapshots.save(sealed.seal.round, sealed.id, self.replica.snapshot())
            swarm.root_computed(snapshot.round, snapshot.root)
        if now - self._saved_at > CHECKPOINT_SECONDS or not self._saved:
            self.save()

    def _on_restore(self, message: Restore, swarm: Swarm) -> None:
        self.ledger.undo_after(message.chain.round, self.replica.chain.round)
        if message.snapshot is not None:
            self.replica.load_snapshot(message.snapshot.read())
        else:
            self.replica.reset()
        self._current = None
        for sealed in message.rounds:
            self._apply(sealed)
            if sealed.seal.round % self._rules.root_interval == 0:
                snapshot = self._snapshots.save(sealed.seal.round, sealed.id, self.replica.snapshot())
                swarm.root_computed(snapshot.round, snapshot.root)
        self._show()

    def _apply(self, sealed: SealedRound, live: Apply | None = None) -> None:
        """Take the step of one sealed round and settle what we sent for it.

        Args:
            live: as the machine put it; None: from the journal or a donor, where the own log knows what we sent.
        """
        chunks = self.replica.layout.chunks
        shape = chain.shape_of(self.replica.chain, chunks)
        state = chain.extend(self.replica.chain, sealed.id, sealed.seal, chunks)
        key = Key(shape.round, shape.base)
        replies = self.replica.apply(sealed, shape, state)
        index = shape.index(self._peer_id)
        if not self._has_sent(key, shape, live):
            index = None
        self.status.consumed_share = self.ledger.settle(key, replies, index)

    def _has_sent(self, key: Key, shape: RoundShape, live: Apply | None) -> bool:
        """Whether a contribution of ours can be in the replies of a round: the own log outlives this process."""
        entry = self._own_log.find(key)
        if entry is None or entry.stood_in:
            return False
        # The log has the parts that it was cut for last; the machine knows of those before, on another branch.
        return entry.ranges == ranges_of(shape) or (live is not None and live.contributed)

    def _compute(self, swarm: Swarm) -> None:
        """Micro-batches until the round's time is over, then the contribution; or until a message arrives.

        A message may say that it is too late for this round: what was computed then goes into the next one's.
        """
        start = self._current
        assert start is not None
        # At least one for this round; but who was too late for the last one hands over what it has in hand.
        first = self._rules.pace == "time" and not self._stood_in
        while first or not self._computed_enough():
            first = False
            began = time.monotonic()
            self._micro_batch()
            self._micro_batch_seconds = time.monotonic() - began
            self._computing_seconds += self._micro_batch_seconds
            if not self._inbox.empty():
                return
        self._contribute(start, swarm)

    def _computed_enough(self) -> bool:
        if self._rules.pace == "fixed":
            return self._sequences >= self._rules.sequences_per_peer
        if not self._micro_batches:
            return False
        spare_seconds = self._micro_batch_seconds if self._careful_rounds else 0.0
        return time.monotonic() + spare_seconds >= self._deadline

    def _micro_batch(self) -> None:
        context, count = self.replica.manifest.model.context, self._rules.micro_batch
        offsets = sequence_offsets(self._nonce, self._peer_id, self._sequences_read, count, len(self._tokens), context)
        batch = np.stack([self._tokens[offset : offset + context + 1] for offset in offsets]).astype(np.int64)
        loss = self.replica.model.loss(torch.from_numpy(batch).to(self._device))
        self._sequences_read += count
        nats = loss.item()
        if not math.isfinite(nats):
            # One such gradient would be sent as the largest value there is.
            _logger.warning("a loss that is not finite: the micro-batch is left out")
            return
        loss.backward()
        self._sequences += count
        self._micro_batches += 1
        self._loss_sum += nats

    def _contribute(self, start: StartRound, swarm: Swarm) -> None:
        """Gradients into the momentum, the largest of it out as a contribution."""
        began = time.monotonic()
        optimizer = self.replica.optimizer
        for parameter in self.replica.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(self._micro_batches)
        optimizer.accumulate()
        optimizer.zero_grad(set_to_none=True)
        pending = optimizer.select()
        ranges = ranges_of(start.shape)
        payloads = tuple(optimizer.payload(pending, *piece) for piece in ranges)
        seconds = self._computing_seconds + time.monotonic() - began
        rate = self._sequences / max(seconds, 1e-6)
        before = self._sequences_per_second or rate
        self._sequences_per_second = 0.7 * before + 0.3 * rate
        row = Row(
            weight=min(self._sequences, _WEIGHT_MAX),
            throughput=min(int(1000 * self._sequences_per_second), THROUGHPUT_MAX_MILLI),
            uplink=self._uplink_kbit,
        )
        self.ledger.send(start.key, pending)
        entry = OwnEntry(start.key.round, start.key.base, row, ranges, payloads, optimizer.decays, self._sequences_read)
        swarm.contribute(ContributionReady(start.key, row, payloads), entry)
        loss = self._loss_sum / self._micro_batches
        self.status.loss = loss
        self.status.bits_per_byte = loss / math.log(2) / self._bytes_per_token
        self._tokens_sent = self._sequences * self.replica.manifest.model.context
        self.status.computing_seconds = seconds
        self._current = None
        self._stood_in = False
        self._careful_rounds = max(self._careful_rounds - 1, 0)
        self._micro_batches = self._sequences = 0
        self._loss_sum = self._computing_seconds = 0.0

    def _show(self) -> None:
        state = self.replica.chain
        self.status.round, self.status.state_id, self.status.total = state.round, state.id, state.total


def ranges_of(shape: RoundShape) -> tuple[tuple[int, int], ...]:
    """Chunks [start, end) of each part of a round."""
    return tuple((part.start, part.end) for part in shape.parts)


def checkpoint_shapes(replica: Replica) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint of this replica holds."""
    return replica.shapes | {"momentum": (replica.layout.chunks, CHUNK_SIZE)}
