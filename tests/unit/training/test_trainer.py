"""The trainer between a queue and a swarm: late seals, repeated rounds, crashes. Nothing is counted twice or lost."""

from __future__ import annotations

import dataclasses
import math
import queue
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import MANIFEST, ROW, RUN_ID, Lone, replica, seal

from p2ptrain import chain
from p2ptrain.chain.sealed import SealedRound
from p2ptrain.data.assignment import sequence_offsets
from p2ptrain.data.text import Part
from p2ptrain.errors import DataError
from p2ptrain.observe.diverging import NOT_FINITE
from p2ptrain.observe.status import Status
from p2ptrain.rounds.events import Apply, ContributionReady, Doubted, Rollback, StartRound, StoodIn
from p2ptrain.rounds.inbox import Restore, TrainerMessage
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import OwnEntry, OwnLog
from p2ptrain.swarm.identity import verify
from p2ptrain.training.standing import Books
from p2ptrain.training.trainer import OwnLoop, Trainer, ranges_of

TOKENS = np.random.default_rng(0).integers(0, 4096, 5000).astype(np.uint16)


class Swarm:
    """The network thread's side: keeps what it is handed, in the own log as the driver does."""

    def __init__(self, log: OwnLog) -> None:
        self.log = log
        self.handed: list[ContributionReady] = []
        self.roots: list[tuple[int, bytes]] = []
        self.doubted: list[Doubted] = []

    def contribute(self, ready: ContributionReady, entry: OwnEntry) -> None:
        self.handed.append(ready)
        self.log.write(entry)

    def doubt(self, doubted: Doubted) -> None:
        self.doubted.append(doubted)

    def root_computed(self, round: int, id: bytes, root: bytes) -> None:
        self.roots.append((round, root))

    def prune_own_log(self, before: int) -> None:
        self.log.prune(before)


class Home:
    """One peer's disk, and a trainer over it."""

    def __init__(self, folder: Path, lone: Lone, *, overlap: int = 0) -> None:
        for name in ("journal", "own", "checkpoints"):
            (folder / name).mkdir(exist_ok=True)
        self.lone = lone
        self.journal = Journal(folder / "journal", RUN_ID, verify)
        self.log = OwnLog(folder / "own")
        self.swarm = Swarm(self.log)
        self.inbox: queue.SimpleQueue[TrainerMessage | None] = queue.SimpleQueue()
        #: seconds, for the trainer
        self.now = 0.0
        rounds = msgspec.structs.replace(MANIFEST.round, overlap=overlap)
        self.trainer = Trainer(
            Books(
                replica(msgspec.structs.replace(MANIFEST, round=rounds)),
                lone.identity.peer_id,
                folder / "checkpoints",
                self.log,
            ),
            TOKENS,
            3.5,
            self.inbox,
            Status(),
            lambda: self.now,
        )

    @property
    def momentum(self) -> torch.Tensor:
        return self.trainer.replica.optimizer.momentum

    def hand(self, *messages: TrainerMessage) -> None:
        """Let the trainer work through these, and through what it has to compute for them."""
        for message in messages:
            self.inbox.put(message)
        while not self.inbox.empty() or self.trainer.has_work:
            if self.trainer.has_work and self.inbox.empty():
                if self.trainer.needs_batch:
                    self.trainer.compute()
                else:
                    self.trainer.hand_over(self.swarm)
            else:
                taken = self.inbox.get()
                assert taken is not None
                self.trainer.take(taken, self.swarm)

    def start(self) -> StartRound:
        shape = chain.shape_of(self.lone.states[-1], self.lone.chunks)
        return StartRound(self.lone.key, shape, 0, 0.0, 10.0)

    def apply(self, sealed: SealedRound, *, contributed: bool) -> Apply:
        """Journal a sealed round, and the message about it."""
        self.journal.append(sealed)
        shape = chain.shape_of(self.lone.states[-1], self.lone.chunks)
        self.lone.seal(sealed)
        return Apply(sealed, self.lone.states[-1], shape, 0, contributed)

    def sealed(self) -> SealedRound:
        """The next round, of what was handed over last."""
        sent = self.trainer.ledger.pending[self.lone.key]
        return seal(self.lone.states[-1], self.lone.identity, self.lone.chunks, (self.lone.reply(sent),))

    def first_round(self) -> None:
        """The founder's first seal."""
        first = self.lone.rounds[0]
        self.journal.append(first)
        self.hand(Apply(first, self.lone.states[1], chain.shape_of(self.lone.states[0], self.lone.chunks), None, False))


@pytest.fixture
def lone() -> Lone:
    torch.manual_seed(0)
    return Lone()


@pytest.fixture
def home(tmp_path: Path, lone: Lone) -> Home:
    made = Home(tmp_path, lone)
    made.first_round()
    return made


def test_a_round_is_computed_handed_over_applied_and_settled(home: Home) -> None:
    home.hand(home.start())
    (ready,) = home.swarm.handed
    assert ready.key == home.lone.key and ready.row.weight == 4 and ready.row.sequences_per_kilosecond > 0
    assert ready.row.uplink_kbit == 0, "the network thread knows the line"
    home.hand(home.apply(home.sealed(), contributed=True))
    assert not home.trainer.ledger.pending
    assert home.trainer.replica.snapshot() == home.lone.replica.snapshot()
    assert home.trainer.status.consumed_share > 0.5


def test_a_number_that_is_no_token_ends_the_peer_with_a_message(home: Home) -> None:
    home.trainer._text = Part(np.full(5000, 4096, np.uint16))
    with pytest.raises(DataError, match="holds 4096, which is no token of 4,096"):
        home.hand(home.start())


def test_a_batch_of_prompts_alone_teaches_nothing(home: Home) -> None:
    home.trainer._text = Part(TOKENS, mask=np.zeros(len(TOKENS) // 8 + 1, np.uint8))
    home.trainer._micro_batch()
    assert home.trainer.books.sequences_read == home.trainer._rules.micro_batch
    assert all(parameter.grad is None for parameter in home.trainer.replica.model.parameters())


def test_a_reply_that_points_against_what_was_sent_is_doubted(home: Home) -> None:
    home.hand(home.start())
    home.hand(home.apply(home.sealed(), contributed=True))
    assert home.swarm.doubted == []
    home.hand(home.start())
    key, pending = home.lone.key, home.trainer.ledger.pending[home.lone.key]
    shape = chain.shape_of(home.lone.states[-1], home.lone.chunks)
    opposite = dataclasses.replace(pending.sent, value=-pending.sent.value)
    lie = home.lone.reply(dataclasses.replace(pending, sent=opposite))
    home.hand(home.apply(seal(home.lone.states[-1], home.lone.identity, home.lone.chunks, (lie,)), contributed=True))
    assert home.swarm.doubted == [Doubted(key, 0, shape, lie)]


def test_a_gradient_that_came_too_late_counts_in_the_next_contribution(home: Home) -> None:
    skip = seal(home.lone.states[-1], home.lone.identity, home.lone.chunks, (None,))
    start = dataclasses.replace(home.start(), seconds=1000.0)
    late = home.apply(skip, contributed=False)
    # The seal is there when the first micro-batch is done: applied between micro-batches, never inside one.
    home.trainer.take(start, home.swarm)
    home.inbox.put(late)
    home.trainer.compute()
    assert home.swarm.handed == []
    home.hand(home.start())
    (ready,) = home.swarm.handed
    assert ready.row.weight == 8


def test_who_is_too_slow_for_one_round_hands_over_as_soon_as_the_next_begins(home: Home) -> None:
    first, skip = home.start(), seal(home.lone.states[-1], home.lone.identity, home.lone.chunks, (None,))
    sealed = home.apply(skip, contributed=False)
    # By the end of its only micro-batch, a message of weight 0 has been sent, and the round is sealed.
    home.trainer.take(first, home.swarm)
    home.inbox.put(StoodIn(first.key))
    home.trainer.compute()
    assert home.swarm.handed == []
    home.hand(sealed, home.start())
    (ready,) = home.swarm.handed
    assert ready.key == home.lone.key and ready.row.weight == 4, "one more micro-batch would be too late again"


def own_loop(home: Home, folder: Path, *messages: TrainerMessage) -> tuple[OwnLoop, Swarm]:
    """A loop of somebody's own over another home at the same place, with messages in its queue."""
    (folder / "checkpoints").mkdir(parents=True)
    log = OwnLog(folder / "own")
    (folder / "own").mkdir()
    inbox: queue.SimpleQueue[TrainerMessage | None] = queue.SimpleQueue()
    made = OwnLoop(Books(replica(), home.lone.identity.peer_id, folder / "checkpoints", log), inbox, Status())
    first = home.lone.rounds[0]
    inbox.put(Apply(first, home.lone.states[1], chain.shape_of(home.lone.states[0], home.lone.chunks), None, False))
    for message in messages:
        inbox.put(message)
    return made, Swarm(log)


def batch_of(home: Home, loop: OwnLoop) -> torch.Tensor:
    """What the built-in trainer reads next."""
    context, count = MANIFEST.model.context, MANIFEST.round.micro_batch
    nonce, read = bytes.fromhex(MANIFEST.nonce), loop.books.sequences_read
    places = sequence_offsets(nonce, home.lone.identity.peer_id, read, count, len(TOKENS), context)
    return torch.from_numpy(np.stack([TOKENS[n : n + context + 1] for n in places]).astype(np.int64))


def test_a_loop_of_ones_own_that_computes_what_the_built_in_one_does_hands_over_the_same_bytes(
    home: Home, tmp_path: Path
) -> None:
    start = home.start()
    loop, swarm = own_loop(home, tmp_path / "own loop", start)
    model: Any = loop.replica.model
    assert loop.until_batch(swarm, lambda: True)
    loss = model.loss(batch_of(home, loop))
    loss.backward()
    loop.handed(MANIFEST.round.micro_batch, loss.item())
    assert all(parameter.grad is None for parameter in model.parameters())
    loop.hand_over(swarm)
    home.hand(start)
    (ours,), (builtin,) = swarm.handed, home.swarm.handed
    assert ours.payloads == builtin.payloads and ours.row.weight == builtin.row.weight == 4
    assert loop.status.loss == home.trainer.status.loss


def test_a_loop_of_ones_own_is_asked_for_batches_until_its_round_is_due(home: Home, tmp_path: Path) -> None:
    loop, swarm = own_loop(home, tmp_path / "own loop", home.start())
    model: Any = loop.replica.model
    applied: list[bool] = []
    assert loop.until_batch(swarm, lambda: not applied.append(True))
    assert applied == [True] and swarm.handed == []
    model.loss(batch_of(home, loop)).backward()
    model.get_parameter("head.weight").grad[0, 0] = math.nan
    loop.handed(3, math.nan)
    assert loop.needs_batch, "a gradient that is not finite does not count"
    for samples in (1, 2):
        model.loss(batch_of(home, loop)[:samples]).backward()
        loop.handed(samples, math.nan)
    assert not loop.needs_batch
    loop.hand_over(swarm)
    (ready,) = swarm.handed
    assert ready.row.weight == 3 and loop.status.loss is None


def test_a_loop_of_ones_own_ends_when_it_is_told_to(home: Home, tmp_path: Path) -> None:
    loop, swarm = own_loop(home, tmp_path / "own loop")
    assert not loop.until_batch(swarm, lambda: False)
    loop._inbox.put(None)
    assert not loop.until_batch(swarm, lambda: True)


def in_company(start: StartRound, seconds: float) -> StartRound:
    """The same round with one more member, and so much time left to compute for it."""
    (member,) = start.shape.members
    other = msgspec.structs.replace(member, peer_id=Lone("grace").identity.peer_id)
    return dataclasses.replace(start, shape=dataclasses.replace(start.shape, members=(member, other)), seconds=seconds)


def test_with_overlap_a_trainer_computes_on_while_the_exchange_is_under_way(tmp_path: Path, lone: Lone) -> None:
    home = Home(tmp_path, lone, overlap=1)
    home.first_round()
    trainer = home.trainer
    trainer.take(in_company(home.start(), 10.0), home.swarm)
    trainer.compute()
    home.now = 10.0
    assert not trainer.needs_batch
    trainer.hand_over(home.swarm)
    assert trainer.has_work and trainer.needs_batch, "it need not wait for the seal"
    trainer.compute()
    home.now = 14.0
    trainer.take(home.apply(home.sealed(), contributed=True), home.swarm)  # between two micro-batches
    trainer.compute()
    home.now = 20.0
    assert not trainer.has_work, "as long as for any round, and no longer"
    assert len(home.swarm.handed) == 1, "not before its round has begun"
    trainer.take(in_company(home.start(), 0.0), home.swarm)
    assert trainer.has_work and not trainer.needs_batch, "its time was over when the round began"
    trainer.hand_over(home.swarm)
    assert [ready.row.weight for ready in home.swarm.handed] == [4, 8]
    assert home.swarm.handed[1].key == home.lone.key


def test_alone_there_is_nothing_to_overlap_with(tmp_path: Path, lone: Lone) -> None:
    home = Home(tmp_path, lone, overlap=1)
    home.first_round()
    home.hand(home.start())
    assert len(home.swarm.handed) == 1 and not home.trainer.has_work


def test_what_was_not_sent_after_all_returns_to_the_momentum(home: Home) -> None:
    home.hand(home.start())
    for path in home.log._folder.iterdir():
        path.unlink()
    before = home.momentum.clone()
    sent = home.trainer.ledger.pending[home.lone.key].sent
    home.hand(home.apply(home.sealed(), contributed=False))
    whole = before.clone()
    whole[torch.from_numpy(sent.chunk), torch.from_numpy(sent.index)] += torch.from_numpy(sent.value)
    assert torch.allclose(home.momentum, whole)


def test_for_the_same_round_on_another_branch_nothing_else_is_made(home: Home) -> None:
    home.hand(home.start())
    base, start = home.lone.states[-1], home.start()
    momentum = home.momentum.clone()
    skip = seal(base, home.lone.identity, home.lone.chunks, (None,))
    shape = chain.shape_of(base, home.lone.chunks)
    after = chain.extend(base, skip.id, skip.seal, home.lone.chunks)
    home.hand(Apply(skip, after, shape, 0, True), Rollback(base), start)
    assert len(home.swarm.handed) == 1, "the network thread sends the same bytes again"
    assert home.lone.key in home.trainer.ledger.pending
    assert torch.allclose(home.momentum, momentum)


def test_a_gradient_in_hand_is_kept_through_a_pause_as_if_it_had_been_sent_in_vain(tmp_path: Path, home: Home) -> None:
    home.hand(home.start())
    home.hand(home.apply(home.sealed(), contributed=True))
    home.trainer.save()
    other = Home(tmp_path, home.lone)
    other.trainer.restore(other.journal)
    for trainer in (home.trainer, other.trainer):
        trainer.take(dataclasses.replace(home.start(), seconds=1000.0), home.swarm)
        trainer.compute()
    before = home.momentum.clone()
    assert home.trainer.keep_gradient() == 4 and home.trainer.keep_gradient() == 0
    assert not torch.equal(home.momentum, before)
    # Of the other one, what it handed over returns whole: nothing of it is consumed.
    other.trainer.hand_over(other.swarm)
    other.trainer.books.take_back(home.lone.key, other.trainer.replica.optimizer.decays)
    assert torch.allclose(home.momentum, other.momentum, atol=1e-7)
    home.log.prune(10**9)
    home.trainer.save()
    again = Home(tmp_path, home.lone)
    again.trainer.restore(again.journal)
    assert torch.equal(again.momentum, home.momentum)
    again.hand(again.start())
    (ready,) = again.swarm.handed
    assert ready.key == home.lone.key


def test_after_a_crash_what_was_sent_is_settled_once_and_the_replica_is_the_same(tmp_path: Path, home: Home) -> None:
    for _ in range(2):
        home.hand(home.start())
        home.hand(home.apply(home.sealed(), contributed=True))
    home.trainer.save()
    for _ in range(3):
        home.hand(home.start())
        home.hand(home.apply(home.sealed(), contributed=True))
    home.hand(home.start())
    waiting = home.trainer.ledger.pending[home.lone.key].sent.value
    again = Home(tmp_path, home.lone)
    again.trainer.restore(again.journal)
    assert again.trainer.replica.snapshot() == home.trainer.replica.snapshot()
    # What waits for its seal waits still, as the same values, and nothing else is made for that round.
    assert np.array_equal(again.trainer.ledger.pending[home.lone.key].sent.value, waiting)
    again.hand(again.start())
    assert again.swarm.handed == []
    again.hand(again.apply(again.sealed(), contributed=True))
    assert again.trainer.replica.snapshot() == home.lone.replica.snapshot()
    assert not again.trainer.ledger.pending


def test_after_a_crash_the_seal_of_a_round_sent_before_still_consumes(tmp_path: Path, home: Home) -> None:
    home.trainer.save()
    home.hand(home.start())
    sealed = home.sealed()
    again = Home(tmp_path, home.lone)
    again.trainer.restore(again.journal)
    # The machine of the new process has sent nothing: only the own log knows.
    again.hand(again.apply(sealed, contributed=False))
    assert again.trainer.status.consumed_share > 0.5


def test_after_a_crash_what_a_seal_off_the_chain_consumed_is_not_settled(tmp_path: Path, home: Home) -> None:
    home.trainer.save()
    home.hand(home.start())
    before, key = home.lone.states[-1], home.lone.key
    home.hand(home.apply(home.sealed(), contributed=True))
    # The next contribution takes along what became of the first. Then the group's chain turns out to be another, whose
    # journal begins right after the fork, and the process dies before it has written down what that undoes.
    home.hand(home.start())
    assert home.trainer.status.consumed_share > 0.5
    skip = seal(before, home.lone.identity, home.lone.chunks, (None,))
    other = chain.extend(before, skip.id, skip.seal, home.lone.chunks)
    after = seal(other, home.lone.identity, home.lone.chunks, (None,))
    home.journal.restart_at(skip.id)
    home.journal.append(after)
    again = Home(tmp_path, home.lone)
    again.trainer.books.replay_own_log((), ())
    assert key not in again.trainer.ledger.pending, "as the own log knows it"
    again.trainer.ledger.undo_off(again.journal.ids)
    assert key in again.trainer.ledger.pending


def test_a_message_of_weight_zero_in_the_trainers_stead_consumes_nothing(tmp_path: Path, home: Home) -> None:
    home.trainer.save()
    home.hand(home.start())
    sealed, key = home.sealed(), home.lone.key
    home.log.write(OwnEntry(key.round, key.base, ROW, (), (), 0, 0))
    again = Home(tmp_path, home.lone)
    again.trainer.restore(again.journal)
    assert key not in again.trainer.ledger.pending
    again.hand(again.apply(sealed, contributed=False))
    assert again.trainer.status.consumed_share == 0


def test_a_restored_replica_is_where_the_fetched_rounds_lead(home: Home) -> None:
    other = Lone("grace")
    other.train(6)
    home.hand(home.start())
    home.hand(Restore(None, other.states[0], tuple(other.rounds)))
    assert home.trainer.replica.snapshot() == other.replica.snapshot()
    # On the way it has made the snapshot of round 4, and its own work waits no longer: no such round is on this chain.
    assert [number for number, _ in home.swarm.roots] == [4]
    assert not home.trainer.ledger.pending


def test_a_restored_replica_may_be_where_the_run_ends(home: Home) -> None:
    other = Lone("grace")
    other.train(6)
    home.inbox.put(Restore(None, other.states[0], tuple(other.rounds)))
    home.inbox.put(None)  # for who does not stop there
    heard: list[int] = []

    def after_round() -> bool:
        heard.append(home.trainer.replica.chain.round)
        return False

    home.trainer.run(home.swarm, after_round)
    assert heard == [7]


def test_the_parts_of_a_round_name_all_chunks(home: Home) -> None:
    assert ranges_of(home.start().shape) == ((0, home.lone.chunks),)


def test_parameters_that_are_past_help_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = Home(tmp_path, Lone())
    with torch.no_grad():
        home.trainer.replica.task.parameters[0].tensor.fill_(math.nan)
    for _ in range(3 * NOT_FINITE):
        home.trainer.compute()
    assert len([r for r in caplog.records if "left out" in r.message]) == 1
    assert len([r for r in caplog.records if "the run has diverged" in r.message]) == 1
    assert home.trainer.status.diverged


def test_out_of_memory_it_goes_on_with_half_as_many_sequences_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = Home(tmp_path, Lone())
    plain = home.trainer._model.loss

    def loss(tokens: torch.Tensor, counted: Any = None) -> torch.Tensor:
        if len(tokens) > 1:
            torch.empty(2**60)
        return plain(tokens, counted)

    home.trainer._model.loss = loss  # type: ignore[method-assign]
    home.hand(home.start())
    (ready,) = home.swarm.handed
    assert home.trainer.passes.sequences == 1
    assert ready.row.weight == 1, "what came of the passes that were broken off does not count"
    assert "out of memory: from now on 1 sequences at once" in caplog.messages
    assert home.momentum.isfinite().all() and home.momentum.any()
