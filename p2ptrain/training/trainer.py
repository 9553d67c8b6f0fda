"""The training loop: computes gradients, hands contributions over, applies what was sealed.

Runs in one thread and hears of the swarm through a queue only. Seals are applied between micro-batches; a gradient
that came too late for its round stays where it is and counts in the next. With overlap it computes on for the next
round as soon as it has handed over, and hands that over when the next round has begun. Nothing here decides anything
about rounds.

`Participant` does all but computing: `until_batch` returns when there is a micro-batch to compute, by whoever has the
data. `Trainer` computes them from the run's text; `OwnLoop` takes them from a loop of somebody's own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import math
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, assert_never, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.chain import SEQUENCES_PER_KILOSECOND_MAX, RoundShape, Row
from p2ptrain.chain.sealed import Key, SealedRound
from p2ptrain.compression import decoded
from p2ptrain.config.node import NodeSettings
from p2ptrain.data.assignment import sequence_offsets
from p2ptrain.data.text import Part
from p2ptrain.errors import DataError, HomeError
from p2ptrain.models.gpt import GPT
from p2ptrain.models.of_manifest import recompute_activations
from p2ptrain.observe.diverging import LossWatch
from p2ptrain.observe.status import Status
from p2ptrain.optim.local import ALONE, Gathers, HandedGradients, Local
from p2ptrain.rounds import events
from p2ptrain.rounds.inbox import Dropped, Restore, TrainerMessage
from p2ptrain.state import files
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import OwnEntry
from p2ptrain.state.snapshot import SnapshotFile
from p2ptrain.training.ledger import WINDOW
from p2ptrain.training.machine import Machine
from p2ptrain.training.measuring import Measuring
from p2ptrain.training.needs import CHECKPOINT_BYTES_A_DAY, needs_of
from p2ptrain.training.passes import Passes, choose, let_go, out_of_memory
from p2ptrain.training.ranks import Ranks
from p2ptrain.training.replica import build_local
from p2ptrain.training.standing import Books, Written

CHECKPOINT_SECONDS = 60.0
"""No sooner after another, unless this peer's owner says so."""
CHECKPOINT_SHARE = 0.01
"""Of the time, for checkpoints at most."""
DAY_SECONDS = 86_400.0
CAREFUL_ROUNDS = 16
"""After it was too late for a round, a trainer begins no micro-batch that may end too late, for this many."""
LET_GO_SEQUENCES = 1024
"""So often memory of text that was read is given back: some 64 KiB a sequence."""
_WEIGHT_MAX = 1_000_000

T = TypeVar("T")
_logger = logging.getLogger(__name__)


class Swarm(Protocol):
    """What the trainer tells the network thread, in values that nobody changes any more; all return at once."""

    def contribute(self, ready: events.ContributionReady, entry: OwnEntry) -> None:
        """Hand over a round's contribution; the network thread fills in the uplink of its row."""

    def root_computed(self, round: int, id: bytes, root: bytes) -> None:
        """Say that the snapshot of a round is on disk."""

    def doubt(self, doubted: events.Doubted) -> None:
        """Say that a sealed reply points against what we sent for it."""

    def prune_own_log(self, before: int) -> None:
        """Say that no restart needs the own log's entries of rounds before this one."""


class Participant:
    """Takes part in rounds, for whoever computes gradients; see the module docstring.

    Args:
        books: of this home; `restore` takes them to where it stands.
        local: where gradients are until they are contributed.
        status: the trainer's thread's own.
        clock: seconds, monotonic.
        tokens_per_sequence: in which speed is shown.
        bytes_per_token: of the text; None: what is trained on is no text.
    """

    def __init__(
        self,
        books: Books,
        local: Gathers,
        inbox: queue.SimpleQueue[TrainerMessage | None],
        status: Status,
        clock: Callable[[], float] = time.monotonic,
        *,
        tokens_per_sequence: int = 1,
        bytes_per_token: float | None = None,
    ) -> None:
        replica = books.replica
        self.books, self.replica, self.ledger = books, replica, books.ledger
        self._local: Gathers = local
        self.status = status
        #: measures the model when it is this peer's turn; None: nobody does
        self.measuring: Measuring | None = None
        #: seconds of measuring since the round applied last
        self._measured_seconds = 0.0
        #: what checkpoint and snapshot took since the round applied last
        self._disk_seconds = 0.0
        #: rounds applied in which this peer had a part; those caught up on do not count
        self.rounds_applied = 0
        self._peer_id, self._inbox, self._clock = books.peer_id, inbox, clock
        self._tokens_per_sequence, self._bytes_per_token = tokens_per_sequence, bytes_per_token
        self._rules = replica.manifest.round
        self._sequences_per_second = 0.0
        #: the round to compute for, until its contribution is handed over
        self._current: events.StartRound | None = None
        #: a round whose contribution was handed over, and may have been dropped
        self._doubtful: events.StartRound | None = None
        #: sequences behind contributions that were dropped, for the next one
        self._overdue = 0
        #: since the last contribution: micro-batches, their sequences and summed loss, seconds
        self._micro_batches = 0
        self._sequences = 0
        self._loss_sum = 0.0
        self._computing_seconds = 0.0
        #: a micro-batch was computed for it
        self._begun = False
        #: when the time to compute, for the round under way or ahead of it, is over
        self._deadline = -math.inf
        #: with overlap: it computes for the round after the one that it has contributed to
        self._ahead = False
        #: how long members compute for a round
        self._length_seconds = 0.0
        #: a message of weight 0 went out in our stead since the last contribution
        self._stood_in = False
        #: contributions until it is not careful any more
        self._careful_rounds = 0
        #: by the losses of this process, whether the run has diverged
        self._watch = LossWatch()
        #: what the last micro-batch took
        self._micro_batch_seconds = 0.0
        self._tokens_sent = 0
        self._applied_at = self._contributed_at = self._saved_at = clock()
        #: there is a checkpoint, so `sample` and `eval` have one to read
        self._saved = False
        #: seconds between two checkpoints, where this peer's owner says so; None: by what they cost
        self.checkpoint_every: float | None = None
        self._checkpoint_seconds = CHECKPOINT_SECONDS
        #: the checkpoint that is being written, and what training has waited for it
        self._saving: tuple[Future[Written], float] | None = None
        #: snapshots that are being written
        self._snapshots: list[Future[SnapshotFile]] = []
        #: the disk has taken no checkpoint, or no snapshot, since
        self._disk_full = False

    # ---- where this home stands -------------------------------------------------------------------------------

    def restore(self, journal: Journal) -> None:
        """Go to where this home stands.

        Raises:
            HomeError: the checkpoint is damaged, or of another model.
        """
        self.books.restore(journal)
        self.status.consumed_share = self.books.consumed_share

    def save(self) -> None:
        """Write the checkpoint now, and return when it is on disk. Raises OSError."""
        if self._saving is not None:
            with contextlib.suppress(OSError):
                self._saving[0].result()
            self._saving = None
        self.books.save()
        self._saved_at, self._saved = self._clock(), True

    def _begin_save(self) -> None:
        """Begin to write the checkpoint; rounds go on meanwhile."""
        began = self._clock()
        writing = self.books.begin_save()
        self._saving = writing, self._clock() - began

    def _look_at_disk(self, swarm: Swarm) -> None:
        """Take note of what was written, and of what could not be.

        Raises:
            OSError: for another reason than that the disk is full; then it is tried again, and said once.
        """
        if self._saving is not None and self._saving[0].done():
            (writing, waited), self._saving = self._saving, None
            self._saved_at = self._clock()
            written = self._taken(writing)
            if written is not None:
                self._saved = True
                swarm.prune_own_log(written.round - WINDOW)
                self._checkpoint_seconds = max(
                    CHECKPOINT_SECONDS,
                    (waited + written.seconds) / CHECKPOINT_SHARE,
                    written.bytes / CHECKPOINT_BYTES_A_DAY * DAY_SECONDS,
                )
        for snapshot in [snapshot for snapshot in self._snapshots if snapshot.done()]:
            self._snapshots.remove(snapshot)
            self._taken(snapshot)

    def _taken(self, writing: Future[T]) -> T | None:
        """Return what was written; None: the disk is full."""
        try:
            found = writing.result()
        except OSError as error:
            if not files.is_full(error):
                raise
            if not self._disk_full:
                _logger.warning("the disk is full: no checkpoint is written until there is room; training goes on")
            self._disk_full = True
            self._checkpoint_seconds = CHECKPOINT_SECONDS
            return None
        if self._disk_full:
            _logger.info("there is room on the disk again: checkpoints are written")
        self._disk_full = False
        return found

    def _save_if_due(self, swarm: Swarm) -> None:
        every = self._checkpoint_seconds if self.checkpoint_every is None else self.checkpoint_every
        self._look_at_disk(swarm)
        if self._saving is None and (self._clock() - self._saved_at > every or not self._saved):
            self._begin_save()
            self._look_at_disk(swarm)

    # ---- the loop ---------------------------------------------------------------------------------------------

    def until_batch(self, swarm: Swarm, after_round: Callable[[], bool]) -> bool:
        """Do what the swarm asks for, and hand over what is due, until there is a micro-batch to compute.

        Args:
            after_round: called when rounds were applied.

        Returns:
            False: training ends, because `after_round` was false, or None was in the queue.
        """
        while True:
            if self.has_work and self._inbox.empty():
                if self.needs_batch:
                    if self.measure(waiting=False):
                        continue
                    return True
                self.hand_over(swarm)
                continue
            if self._inbox.empty() and self.measure(waiting=True):
                continue
            message = self._inbox.get()
            if message is None:
                return False
            self.take(message, swarm)
            # What was restored may be where the run ends, and no round comes after it.
            if isinstance(message, events.Apply | Restore) and not after_round():
                return False

    def measure(self, *, waiting: bool) -> bool:
        """Measure a slice of a round whose turn is this peer's; False: there is none to measure now.

        Args:
            waiting: whether there is nothing else to do.
        """
        if self.measuring is None or not self.measuring.under_way:
            return False
        began = self.measuring.seconds
        done = self.measuring.slice(waiting=waiting)
        self._measured_seconds += self.measuring.seconds - began
        self._show_measured()
        return done

    def finish_measuring(self, given_up: Callable[[], bool]) -> None:
        """Measure what is under way to its end, unless `given_up`, asked after each slice, says so."""
        while not given_up() and self.measure(waiting=True):
            pass

    def _show_measured(self) -> None:
        if self.measuring is not None:
            self.status.measured, self.status.turns = self.measuring.measured, self.measuring.turns
            self.status.measuring_share = self.measuring.share

    def take(self, message: TrainerMessage, swarm: Swarm) -> None:
        """Do what the network thread asks for."""
        match message:
            case events.StartRound():
                self._current, self._length_seconds = message, message.length_seconds
                self._begun = self._ahead and self._micro_batches > 0
                self._deadline = self._clock() + message.seconds
                self._ahead = False
                self._resume_sent(message)
            case events.StoodIn():
                if self._current is not None and self._current.key == message.key:
                    self._current = None
                    self._stood_in = True
                    self._careful_rounds = CAREFUL_ROUNDS
            case events.Apply():
                self._on_apply(message, swarm)
            case events.Rollback():
                self.replica.momentum_changes()
                self.ledger.undo_after(message.state.round)
                self.replica.undo()
                if self.measuring is not None:
                    self.measuring.back_to(message.state.round)
                self._show()
            case Restore():
                self._on_restore(message, swarm)
            case Dropped():
                self._on_dropped(message)
            case _:
                assert_never(message)

    def _resume_sent(self, start: events.StartRound) -> None:
        """What was sent for a round, before a restart or on a branch that was left, the network thread sends again."""
        self._doubtful = None
        pending = self.ledger.pending.get(start.key)
        if pending is not None:
            entry = self.books.own_log.find(start.key)
            if entry is None or entry.decays != pending.decays:
                # Handed over, and not logged: the network thread will say so if it drops it.
                self._doubtful = start
            self._current = None

    def _on_dropped(self, dropped: Dropped) -> None:
        self.books.take_back(dropped.key, dropped.decays)
        self._overdue += dropped.weight
        self._careful_rounds = CAREFUL_ROUNDS
        if self._doubtful is not None and self._doubtful.key == dropped.key:
            self._current, self._doubtful = self._doubtful, None

    def _on_apply(self, message: events.Apply, swarm: Swarm) -> None:
        sealed = message.sealed
        self._apply(sealed)
        for part in self.books.opposing:
            reply, shape = sealed.replies[part], message.shape
            if reply is not None:
                swarm.doubt(events.Doubted(Key(shape.round, shape.base), part, shape, reply))
        if message.index is not None or sealed.seal.sealer == self._peer_id:
            self.rounds_applied += 1
        if self._current is not None and self._current.key.round <= sealed.seal.round:
            self._current = None
        now = self._clock()
        busy_seconds = self.status.computing_seconds + self._measured_seconds
        self.status.waiting_seconds, self._measured_seconds = max(0.0, now - self._applied_at - busy_seconds), 0.0
        if message.contributed:
            # By the clock on the wall, waiting included: what the run gets of this machine.
            self.status.tokens_per_second = self._tokens_sent / max(now - self._contributed_at, 1e-6)
            self._contributed_at = now
        self._applied_at = now
        self.status.disk_seconds = self._disk_seconds
        if self.measuring is not None:
            self.measuring.reached(self.replica.chain)
        self._show()
        self._snapshot_if_due(sealed, swarm)
        now = self._clock()
        self._save_if_due(swarm)
        # It holds up the round that has begun, and is shown with that.
        self._disk_seconds = self._clock() - now

    def _on_restore(self, message: Restore, swarm: Swarm) -> None:
        self.replica.momentum_changes()
        self.ledger.undo_after(message.chain.round)
        if not message.common:
            self.status.snapshots_fetched += 1
            before = self.ledger.given_up.copy()
            self.ledger.give_up_until(message.chain.round, message.chain.id)
            entries = (self.books.own_log.find(key) for key in self.ledger.given_up - before)
            self.status.sequences_given_up += sum(entry.row.weight for entry in entries if entry is not None)
        if message.snapshot is not None:
            self.replica.load_snapshot(message.snapshot)
        else:
            self.replica.reset()
        self._current = None
        if self.measuring is not None:
            self.measuring.back_to(self.replica.chain.round)
        for sealed in message.rounds:
            self._apply(sealed)
            if self.measuring is not None:
                self.measuring.reached(self.replica.chain, measures=False)
            self._snapshot_if_due(sealed, swarm)
            # Steps follow each other faster than the disk takes snapshots, and nobody waits for a round here.
            concurrent.futures.wait(self._snapshots)
        # What this has undone must be known after a crash, when the journal may no longer reach back to the fork.
        self.save()
        swarm.prune_own_log(self.replica.chain.round - WINDOW)
        self._show()

    def _apply(self, sealed: SealedRound) -> None:
        self.books.apply(sealed)
        self.status.consumed_share = self.books.consumed_share

    def _snapshot_if_due(self, sealed: SealedRound, swarm: Swarm) -> None:
        if sealed.seal.round % self._rules.root_interval == 0:
            writing = self.books.save_snapshot(sealed.seal.round, sealed.id)

            def told(written: Future[SnapshotFile]) -> None:
                if written.exception() is None:
                    snapshot = written.result()
                    swarm.root_computed(snapshot.round, snapshot.id, snapshot.root)

            writing.add_done_callback(told)
            self._snapshots.append(writing)

    @property
    def has_work(self) -> bool:
        """Whether there is a round to compute for, or, with overlap, time until the next one begins."""
        if self._current is not None:
            return True
        return self._ahead and not self._computed_enough()

    @property
    def needs_batch(self) -> bool:
        """Whether to compute on before the contribution: at least one micro-batch for each round.

        But who was too late for the last one hands over what it has in hand, where no other fits in.
        """
        if not self._begun and self._rules.pace == "time" and not self._stood_in and not self._overdue:
            return True
        return not self._computed_enough()

    def hand_over(self, swarm: Swarm) -> None:
        """What was computed becomes the contribution of the round."""
        if self._current is not None:
            self._contribute(self._current, swarm)

    def _computed_enough(self) -> bool:
        if self._rules.pace == "fixed":
            return self._sequences >= self._rules.sequences_per_peer
        if not self._micro_batches and not self._overdue:
            return False
        spare_seconds = self._micro_batch_seconds if self._careful_rounds else 0.0
        return self._clock() + spare_seconds >= self._deadline

    @property
    def _rate(self) -> float:
        """The learning rate of the round that is computed for."""
        upcoming = self.replica.chain.round + 1 if self._current is None else self._current.key.round
        return self.replica.rate_at(upcoming)

    def _timed(self, seconds: float) -> None:
        """Account for what a micro-batch took."""
        self._micro_batch_seconds = seconds
        self._computing_seconds += seconds

    def _computed(self, sequences: int, nats: float) -> None:
        """Account for a micro-batch whose gradient counts; its loss is NaN where nobody says it."""
        self._sequences += sequences
        self._micro_batches += 1
        self._loss_sum += nats
        self._watch.micro_batch(True)

    def _left_out(self, what: str) -> None:
        """Say that what was computed has no finite loss or gradient and does not count: once for several in a row."""
        if self._watch.micro_batch(False):
            _logger.warning("%s that is not finite: the micro-batch is left out", what)
        self._say_if_diverged()

    def _say_if_diverged(self) -> None:
        self.status.diverged = self._watch.diverged
        news = self._watch.news()
        if news:
            _logger.warning("the run has diverged: %s; its owner may begin anew, with a smaller learning rate", news)

    def _contribute(self, start: events.StartRound, swarm: Swarm) -> None:
        """Gradients into the momentum, the largest of it out as a contribution."""
        began = self._clock()
        optimizer = self.replica.optimizer
        self._local.gather()
        self.replica.momentum_changes()
        pending = optimizer.accumulate_and_select()
        for parameter in self.replica.task.parameters:
            parameter.tensor.grad = None
        ranges = ranges_of(start.shape)
        payloads = optimizer.payloads(pending, ranges)
        for part, payload in zip(start.shape.parts, payloads, strict=True):
            if start.shape.members[part.reducer].peer_id == self._peer_id:
                sent = pending.sent.cut(part.start, part.end)
                decoded.wrote_contribution(payload, optimizer.codec, sent)
        seconds = self._computing_seconds + self._clock() - began
        if self._sequences:
            rate = self._sequences / max(seconds, 1e-6)
            before = self._sequences_per_second or rate
            self._sequences_per_second = 0.7 * before + 0.3 * rate
        # How fast the line is, the network thread knows, and says.
        row = Row(
            weight=min(self._sequences + self._overdue, _WEIGHT_MAX),
            sequences_per_kilosecond=min(int(1000 * self._sequences_per_second), SEQUENCES_PER_KILOSECOND_MAX),
            uplink_kbit=0,
        )
        entry = self.books.send(start.key, pending, row, ranges, payloads)
        swarm.contribute(events.ContributionReady(start.key, row, payloads), entry)
        if self._micro_batches:
            loss = self._loss_sum / self._micro_batches
            self.status.loss = loss if math.isfinite(loss) else None
            if math.isfinite(loss):
                self._watch.contribution(loss)
                self._say_if_diverged()
            if self._bytes_per_token is not None:
                self.status.bits_per_byte = loss / math.log(2) / self._bytes_per_token
        self._tokens_sent = row.weight * self._tokens_per_sequence
        self.status.computing_seconds = seconds
        self._current = None
        if self._rules.overlap and len(start.shape.members) > 1:
            # Alone there is no exchange to wait for.
            self._ahead = True
            self._deadline += self._length_seconds
        self._stood_in = False
        self._careful_rounds = max(self._careful_rounds - 1, 0)
        self._micro_batches = self._sequences = self._overdue = 0
        self._loss_sum = self._computing_seconds = 0.0

    def keep_gradient(self) -> int:
        """Add what was computed and is not contributed yet to the momentum, as in a round for which nothing is sent.

        A checkpoint written afterwards holds it, and later contributions take it along; no weight of theirs counts it.

        Returns:
            The sequences behind it.
        """
        sequences = self._sequences
        if self._micro_batches:
            self._local.gather()
            self.replica.momentum_changes()
            self.replica.optimizer.accumulate()
            for parameter in self.replica.task.parameters:
                parameter.tensor.grad = None
        self._micro_batches = self._sequences = 0
        self._loss_sum = self._computing_seconds = 0.0
        return sequences

    def _show(self) -> None:
        state = self.replica.chain
        self.status.round, self.status.state_id, self.status.total = state.round, state.id, state.total
        self.status.sequences_read = self.books.sequences_read
        self._show_measured()


class Trainer(Participant):
    """Trains the built-in model on the run's text.

    Args:
        books: of this home, whose peer id decides what we read.
        tokens: the training text [tokens].
        bytes_per_token: of that text.
        mask: a bit for each token, least significant first, that says whether it counts in the loss; None: all do.
        ranks: the processes that this peer is; None: it is one.
    """

    _local: Local

    def __init__(
        self,
        books: Books,
        tokens: NDArray[Any],
        bytes_per_token: float,
        inbox: queue.SimpleQueue[TrainerMessage | None],
        status: Status,
        clock: Callable[[], float] = time.monotonic,
        *,
        mask: NDArray[np.uint8] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        replica = books.replica
        self._context = replica.manifest.context
        # Without what is held fixed, which no step of this peer's own may move.
        trained = torch.nn.ParameterList([parameter.tensor for parameter in replica.task.parameters])
        local: Local = build_local(trained, replica.manifest, ALONE if ranks is None else ranks)
        if ranks is not None:
            local = ranks.lead(local, list(trained))
        self._ranks = ranks
        super().__init__(
            books,
            local,
            inbox,
            status,
            clock,
            tokens_per_sequence=self._context,
            bytes_per_token=bytes_per_token,
        )
        self._model = cast(GPT, replica.model)
        self._text, self._nonce = Part(tokens, mask=mask), bytes.fromhex(replica.manifest.nonce)
        self._device = next(replica.model.parameters()).device
        self._vocabulary = replica.manifest.vocabulary
        #: how a micro-batch is computed
        self.passes = Passes(replica.manifest.round.micro_batch)

    def run(self, swarm: Swarm, after_round: Callable[[], bool]) -> None:
        """Train until `after_round`, called when rounds were applied, is false, or None is in the queue."""
        while self.until_batch(swarm, after_round):
            self.compute()

    def compute(self) -> None:
        """One micro-batch.

        A message after it may say that it is too late for this round: it then goes into the next one's contribution.
        """
        self._begun = True
        self._timed_batch()

    def _timed_batch(self) -> None:
        began = self._clock()
        self._micro_batch()
        self._timed(self._clock() - began)

    def _micro_batch(self) -> None:
        ranks = 1 if self._ranks is None else self._ranks.size
        count, text = ranks * self.passes.sequences, self._text
        offsets = sequence_offsets(
            self._nonce, self._peer_id, self.books.sequences_read, count, len(text.tokens), self._context
        )
        batch = text.batch(offsets, self._context + 1)
        if batch.max() >= self._vocabulary:
            raise DataError(
                f"the run's text holds {batch.max()}, which is no token of {self._vocabulary:,}",
                hint="its owner has to make it anew: p2ptrain init --data",
            )
        counted = text.counted(offsets, self._context + 1)
        self.books.sequences_read += count
        if self.books.sequences_read % LET_GO_SEQUENCES < count:
            text.let_go()
        if counted is not None and not counted[:, 1:].any():
            # Prompts alone: there is nothing to learn here.
            return
        if self._ranks is not None:
            share = self._ranks.deal(batch, counted, self.passes, self._rate, self.replica.chain.id)
            if share is None:
                return
            batch, counted = share
        tokens = torch.from_numpy(batch).to(self._device)
        try:
            nats = self._local.compute(lambda: self._loss(tokens, counted), self.passes.sequences, self._rate)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._halve(error)
            return
        if not math.isfinite(nats):
            # One such gradient would be sent as the largest value there is.
            self._left_out("a loss")
            return
        self._computed(count, nats)

    def _loss(self, tokens: Tensor, counted: NDArray[np.bool_] | None = None) -> Tensor:
        with self.passes.precision(self._device):
            return self._model.loss(tokens, counted)

    def _halve(self, error: BaseException) -> None:
        """Go on with half as many sequences at once; what was gathered since the last contribution is computed anew.

        Raises:
            HomeError: it is one sequence already.
        """
        if self._ranks is not None:
            # The others are in the middle of a step that all take.
            raise HomeError(
                f"out of memory: a process of this peer has none for {self.passes.sequences} sequences: {error}",
                hint="again with --micro-batch N, a smaller number, or --recompute",
            ) from error
        try:
            self.passes = self.passes.halved()
        except MemoryError:
            raise HomeError(
                f"this machine has no memory for a single sequence of {self._context} tokens: {error}",
                hint="again with --recompute, or --device cpu",
            ) from error
        # Micro-batches of one mean are of one size.
        self._local.gather()
        let_go(self._model, self._device)
        self._micro_batches = self._sequences = 0
        self._loss_sum = 0.0
        _logger.warning("out of memory: from now on %d sequences at once", self.passes.sequences)

    def try_out(self, settings: NodeSettings, machine: Machine) -> None:
        """Settle how micro-batches are computed here, before the first one."""
        rules, said = self._rules, str(settings.micro_batch)
        if settings.recompute:
            recompute_activations(self._model)
        needs = needs_of(self.replica.manifest)
        ranks = 1 if self._ranks is None else self._ranks.size
        most = rules.sequences_per_peer if rules.pace == "fixed" else max(rules.target_batch, rules.micro_batch)
        # Zeros take no memory before something is written there, so momentum and directions are yet to come.
        held = ("libraries", "parameters", "activations", "text")
        tokens = torch.zeros(1, self._context + 1, dtype=torch.int64, device=self._device)
        self.passes = choose(
            self._model,
            lambda count: self._model.loss(tokens.expand(count, -1)),
            self._device,
            wanted=int(said) if said.isdigit() else rules.micro_batch,
            most=max(1, most // ranks),
            grow=said == "auto",
            precision=settings.precision,
            machine=machine,
            reserved_bytes=sum(count for name, count in needs.memory_bytes.items() if name not in held),
        )


class OwnLoop(Participant):
    """Takes gradients from a loop of somebody's own, which computes them where `until_batch` has returned True.

    Args:
        books: of this home.
    """

    def __init__(self, books: Books, inbox: queue.SimpleQueue[TrainerMessage | None], status: Status) -> None:
        self._handed = HandedGradients([parameter.tensor for parameter in books.replica.task.parameters])
        super().__init__(books, self._handed, inbox, status)
        #: when it was last told to compute
        self._told_at = self._clock()

    def until_batch(self, swarm: Swarm, after_round: Callable[[], bool]) -> bool:
        going_on = super().until_batch(swarm, after_round)
        self._begun = self._begun or going_on
        self._told_at = self._clock()
        return going_on

    def handed(self, samples: int, nats: float) -> None:
        """Take what lies in each parameter's `grad`: a mean over `samples`, whose mean loss is `nats`, or NaN where it
        is not known. No gradient is left there."""
        self._timed(self._clock() - self._told_at)
        self.books.sequences_read += samples
        if self._handed.take(samples):
            self._computed(samples, nats)
        else:
            self._left_out("a gradient")


def ranges_of(shape: RoundShape) -> tuple[tuple[int, int], ...]:
    """Chunks [start, end) of each part of a round."""
    return tuple((part.start, part.end) for part in shape.parts)
