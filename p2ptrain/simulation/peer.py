"""One simulated peer: the real driver, machine, journal, trainer and optimizer over modelled lines, on a virtual clock.

Only the model is a toy: a few vectors of eight entries, whose "gradients" are small integers from a counter. Sent
unquantised and never decayed (beta = 1), every coefficient can be accounted for to the last unit.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from p2ptrain.calls.uplink import UplinkMeter
from p2ptrain.chain import ChainState, RoundShape
from p2ptrain.chain.sealed import Key, SealedRound
from p2ptrain.compression import wire
from p2ptrain.config.home import Home
from p2ptrain.models.task import gpt_task
from p2ptrain.observe.status import Status
from p2ptrain.optim.settling import PartReply
from p2ptrain.peer.assembly import Link, Run, driver_parts
from p2ptrain.peer.driver import RoundDriver
from p2ptrain.peer.sealing import SealKeeper
from p2ptrain.rounds.events import Audited, ContributionReady, Effect, Event, ReplyHeld, Rollback, StartRound, Synced
from p2ptrain.rounds.inbox import Restore, TrainerMessage
from p2ptrain.rounds.machine import RoundMachine
from p2ptrain.simulation.loop import Actor
from p2ptrain.simulation.network import Line, SimNode
from p2ptrain.simulation.toy import ENTRIES, PeerCrashed, Rows, ToyModel, ViolationError, dense, identity_of
from p2ptrain.state.checkpoint import SentUnsettled
from p2ptrain.state.failpoints import watcher
from p2ptrain.state.files import remove_unfinished
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import Outcome, OwnLog
from p2ptrain.state.seals import SealLog
from p2ptrain.state.snapshot import piece_hashes, root_of
from p2ptrain.swarm.identity import verify
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.training.replica import Replica
from p2ptrain.training.standing import Books
from p2ptrain.training.trainer import Trainer

if TYPE_CHECKING:
    from p2ptrain.simulation.world import World

RECORD_SECONDS = 2.0
RECORD_FRESH_SECONDS = 8.0


class SimReplica(Replica):
    """The real replica of the toy, watched at each change."""

    def __init__(self, peer: SimPeer) -> None:
        self._peer, self._world = peer, peer.world
        super().__init__(
            peer.world.manifest,
            peer.world.run_id,
            torch.device("cpu"),
            gpt_task(ToyModel(peer.world.chunks), bytes.fromhex(peer.world.manifest.nonce)),
        )

    @property
    def parameters(self) -> NDArray[np.float32]:
        """[chunks, ENTRIES]"""
        return np.stack([parameter.detach().numpy() for parameter in self.model.parameters()])

    def go_wrong(self) -> None:
        """One bit too many."""
        self._peer.corrupt = True
        with torch.no_grad():
            next(self.model.parameters())[0] += 1.0

    def _check(self) -> None:
        try:
            self._world.oracle.check_parameters(self.chain.id, self.parameters)
        except ViolationError:
            if not self._peer.corrupt:
                raise
        else:
            self._peer.corrupt = False

    def apply(self, sealed: SealedRound, shape: RoundShape, state: ChainState) -> list[PartReply]:
        self._world.oracle.learn(sealed, self.chain, state)
        replies = super().apply(sealed, shape, state)
        self._check()
        return replies

    def snapshot(self) -> bytes:
        data = super().snapshot()
        if self._peer.corrupt:
            self._peer.corrupt_roots.add(root_of(len(data), piece_hashes(data)))
        return data

    def load_snapshot(self, data: bytes) -> None:
        # Only its own disk may give it back what went wrong.
        self._peer.corrupt = root_of(len(data), piece_hashes(data)) in self._peer.corrupt_roots
        super().load_snapshot(data)

    def load_arrays(self, arrays: dict[str, NDArray[np.float32]], chain: ChainState) -> None:
        super().load_arrays(arrays, chain)
        self._check()

    def undo(self) -> None:
        super().undo()
        self._check()

    def reset(self) -> None:
        super().reset()
        self._check()


class SimBooks(Books):
    """The real books, which also know what the disk retained of all gradients."""

    def __init__(self, peer: SimPeer, replica: SimReplica, own_log: OwnLog) -> None:
        super().__init__(replica, peer.id, peer.home / "checkpoints", own_log)
        self._peer = peer
        #: [chunks, ENTRIES] what the disk retained of them, at a start
        self.retained: Rows = np.zeros_like(peer.lost)

    def replay_own_log(self, outcomes: tuple[Outcome, ...], unsettled: tuple[SentUnsettled, ...]) -> None:
        saved = self.replica.optimizer.decays
        self.retained = self._peer.retained_at[saved].copy()
        for entry in self.own_log.all():
            if not entry.stood_in and entry.decays > saved:
                # Of the coefficients that it sends nothing was lost by then. Where it sends zero, nothing leaves.
                sent = self.sent_by(entry)
                inside = (sent.index < ENTRIES) & (sent.value != 0)
                place = sent.chunk[inside], sent.index[inside]
                self.retained[place] = self._peer.retained_at[entry.decays][place]
        super().replay_own_log(outcomes, unsettled)


class _NothingComputed:
    """In place of what a peer does on its own: the trainer sets the gradients itself."""

    def compute(self, loss: Callable[[], torch.Tensor], sequences: int, rate: float) -> float:
        return 0.0

    def gather(self) -> None:
        pass


class SimTrainer(Trainer):
    """The real trainer, with integers for gradients and a count of them."""

    books: SimBooks
    replica: SimReplica

    def begin_life(self, peer: SimPeer) -> None:
        """Of this peer."""
        self.peer, self._local = peer, _NothingComputed()
        self.batch_seconds = peer.batch_seconds
        #: [chunks, ENTRIES] all gradients ever made
        self.produced: Rows = np.zeros_like(peer.lost)

    def _micro_batch(self) -> None:
        self.books.sequences_read += self._rules.micro_batch
        self._sequences += self._rules.micro_batch
        self._micro_batches += 1

    def _timed_batch(self) -> None:
        self._micro_batch()
        self._micro_batch_seconds = self.batch_seconds
        self._computing_seconds += self.batch_seconds

    def _contribute(self, start: StartRound, swarm: object) -> None:
        if self._micro_batches or self._overdue:
            self.peer.retained_at[self.replica.optimizer.decays + 1] = self.produced - self.peer.lost
        if self._micro_batches:
            counter = hashlib.shake_128(self._peer_id + self.books.sequences_read.to_bytes(8, "little"))
            integers = np.frombuffer(counter.digest(self.replica.layout.chunks * ENTRIES), np.uint8)
            gradient = integers.astype(np.float64).reshape(-1, ENTRIES) % 7 - 3
            for parameter, row in zip(self.replica.model.parameters(), gradient, strict=True):
                parameter.grad = torch.from_numpy(row.astype(np.float32))
            self.produced = self.produced + gradient
            self.peer.retained_at[self.replica.optimizer.decays + 1] = self.produced - self.peer.lost
        super()._contribute(start, swarm)  # type: ignore[arg-type]

    def momentum_rows(self) -> NDArray[np.float64]:
        """[chunks, ENTRIES]"""
        return self.replica.optimizer.momentum[:, :ENTRIES].numpy().astype(np.float64)

    def at_stake(self) -> Rows:
        """[chunks, ENTRIES] the most that a change of chains which gives up what was sent can change."""
        settled = [entry.settled.pending for entry in self.ledger._settled]
        return self._sum([p.sent for p in (*self.ledger.pending.values(), *settled)]) + self.given_up()

    def given_up(self) -> Rows:
        """[chunks, ENTRIES] sum of the sizes of what is in doubt."""
        entries = (self.books.own_log.find(key) for key in self.ledger.given_up)
        return self._sum([self.books.sent_by(entry) for entry in entries if entry is not None])

    def _sum(self, contributions: list[wire.Coefficients]) -> Rows:
        rows = (abs(dense(sent.chunk, sent.index, sent.value, len(self.produced))) for sent in contributions)
        return sum(rows, np.zeros_like(self.produced))

    def pending_rows(self) -> NDArray[np.float64]:
        """[chunks, ENTRIES] sum of what is sent and not settled."""
        total = np.zeros((self.replica.layout.chunks, ENTRIES))
        for pending in self.ledger.pending.values():
            total += dense(pending.sent.chunk, pending.sent.index, pending.sent.value, len(total))
        return total


class SimInbox:
    """The trainer's queue, awaited."""

    def __init__(self) -> None:
        self._messages: deque[TrainerMessage | None] = deque()
        self._there = asyncio.Event()

    def put(self, message: TrainerMessage | None, /) -> None:
        self._messages.append(message)
        self._there.set()

    def empty(self) -> bool:
        return not self._messages

    async def get(self) -> TrainerMessage | None:
        while not self._messages:
            self._there.clear()
            await self._there.wait()
        return self._messages.popleft()


class SimDriver(RoundDriver):
    """The real driver; its effects are seen, and may be where the peer dies."""

    peer: SimPeer

    def dispatch(self, event: Event) -> None:
        shape = self.machine.shape
        if isinstance(event, ContributionReady) and shape is not None and self.machine.awaits(event.key):
            self.peer.world.sends(self.peer, event, shape)
        if isinstance(event, Synced):
            self.peer.held.clear()  # it left that chain, and begins its round anew if it comes back
        if isinstance(event, Audited):
            self.peer.world.report.coverage[f"audits_{event.verdict}"] += 1
        super().dispatch(event)
        if isinstance(event, ReplyHeld) and self.machine.held_reply(event.key, event.part) is not None:
            held = self.peer.held
            held[event.key, event.part] = cast(RoundShape, self.machine.shape)
            while len(held) > 64:
                del held[next(iter(held))]

    def _perform(self, effect: Effect) -> None:
        self.peer.watch("before_effect")
        self.peer.world.saw(self.peer, effect)
        super()._perform(effect)
        self.peer.watch("after_effect")

    def write_decisions(self, why: str) -> None:
        """Nothing: the report of a violation has them."""

    def _do(self, effects: list[Effect]) -> None:
        super()._do(effects)
        if not self._performing:
            self.peer.world.after_event(self.peer)


class SimPeer:
    """One peer through all its lives.

    Args:
        batch_seconds: how long its machine takes for a micro-batch.
    """

    driver_type = SimDriver

    def __init__(self, world: World, name: str, *, batch_seconds: float, line: Line, dialable: bool) -> None:
        self.world, self.name = world, name
        self.identity = identity_of(name, world.seed)
        #: by which it is in the run, where that is not open and does not list it
        self.grant = world.grant_for(self.identity.peer_id, name)
        self.batch_seconds, self.line, self.dialable = batch_seconds, line, dialable
        self.home = world.folder / name
        self.lives = 0
        self.actor: Actor | None = None
        self.node: SimNode
        self.journal: Journal
        self.driver: SimDriver
        self.trainer: SimTrainer
        #: passes of failpoints until it dies; None: it lives on
        self.dies_after: int | None = None
        #: [chunks, ENTRIES] gradients that crashes, or changes of chain, have lost
        self.lost: Rows = np.zeros((world.chunks, ENTRIES))
        #: decays of the momentum -> [chunks, ENTRIES] gradients then produced and not lost
        self.retained_at: dict[int, Rows] = {0: self.lost}
        self.total = 0
        #: its head after the last event
        self.stood_at = world.oracle.state(world.run_id)
        #: the state id that its trainer is leaving, while it takes a message
        self.leaves = b""
        #: a change of chains has lost something
        self.has_given_up = False
        #: its replica went wrong, and nothing has mended it yet
        self.corrupt = False
        #: roots of the snapshots that it has written meanwhile
        self.corrupt_roots: set[bytes] = set()
        #: replies that it was given for the rounds under way
        self.held: dict[tuple[Key, int], RoundShape] = {}
        #: it was told to bootstrap the run, and is told so again when it comes back
        self.founder = False
        #: it never comes back
        self.gone = False

    @property
    def running(self) -> bool:
        """Alive, and past its start."""
        return self.alive and hasattr(self, "driver") and not cast(Actor, self.actor).frozen

    @property
    def id(self) -> bytes:
        return self.identity.peer_id

    @property
    def alive(self) -> bool:
        return self.actor is not None and self.actor.alive

    @property
    def machine(self) -> RoundMachine:
        return self.driver.machine

    @property
    def in_doubt(self) -> bool:
        """Whether what became of some contribution is not known, or was not at a time."""
        return self.has_given_up or bool(self.trainer.ledger.given_up)

    def start(self, *, founder: bool = False) -> None:
        """Begin to live, or again from disk."""
        self.lives += 1
        self.founder |= founder
        for folder in ("journal", "own", "checkpoints"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.home / folder)
        self.actor = Actor(self.world.loop)
        self.actor.context.run(watcher.set, self.watch)
        self.dies_after = None
        self.leaves = b""
        self.held.clear()
        # Those of the life before; `_live` makes new ones.
        self.__dict__.pop("driver", None)
        self.__dict__.pop("trainer", None)
        self.node = SimNode(self.world.network, self.identity, self.actor, self.line, dialable=self.dialable)
        self.world.network.add(self.node)
        self.actor.spawn(self._live())

    def watch(self, place: str) -> None:
        """A failpoint is passed."""
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                self.die()
                raise PeerCrashed(place)

    def freeze(self) -> None:
        """As by SIGSTOP."""
        cast(Actor, self.actor).freeze()

    def thaw(self) -> None:
        """As by SIGCONT."""
        cast(Actor, self.actor).thaw()

    def daemon_back(self) -> None:
        """The watchdog has restarted the libp2p daemon."""
        self.node.up = True

    def die(self) -> None:
        """As by SIGKILL. What the disk holds stays, under another name, where nothing that is left can write."""
        assert self.actor is not None
        self.world.died(self)
        self.actor.kill()
        self.world.network.remove(self.node)
        moved = self.home.with_name(f"{self.name}~{self.lives}")
        self.home.rename(moved)
        self.home = moved

    async def _live(self) -> None:
        world, manifest = self.world, self.world.manifest
        loop = asyncio.get_running_loop()
        replica = SimReplica(self)
        own_log = OwnLog(self.home / "own")
        self.journal = Journal(self.home / "journal", world.run_id, verify)
        inbox, status = SimInbox(), Status()
        uplink = UplinkMeter(dialable=self.dialable)
        self.trainer = SimTrainer(
            SimBooks(self, replica, own_log),
            np.zeros(1, np.uint16),
            1.0,
            inbox,  # type: ignore[arg-type]
            status,
            loop.time,
        )
        self.trainer.begin_life(self)
        self.trainer.restore(self.journal)
        world.restored(self, self.journal)
        keeper = SealKeeper(SealLog(self.home / "seals"), replica.codec.chunks)
        keeper.begin(replica.chain, self.journal)
        parts = driver_parts(
            Run(manifest, world.run_id, signed=b"", founder=self.founder, grant=self.grant),
            Home(self.home),
            cast(SwarmNode, self.node),
            replica,
            journal=self.journal,
            own_log=own_log,
            inbox=inbox,
            uplink=uplink,
            keeper=keeper,
        )
        self.driver = self.driver_type(parts)
        self.driver.peer = self
        self.total, self.stood_at = replica.chain.total, replica.chain
        await self.driver.start()
        meeting = loop.create_task(self._meet())
        await self._train(inbox)
        meeting.cancel()

    async def _meet(self) -> None:
        """What the records in the DHT do for a peer: it learns of the others."""
        while True:
            self.world.publish(self)
            for other, grant in self.world.others(self):
                if grant is not None:
                    self.driver.hear_grant(grant)
                self.driver.feed.follow(other)
            await asyncio.sleep(RECORD_SECONDS)

    async def _train(self, inbox: SimInbox) -> None:
        link = Link(asyncio.get_running_loop().call_soon, self.driver)
        trainer = self.trainer
        while True:
            if trainer.has_work and inbox.empty():
                if trainer.needs_batch:
                    await asyncio.sleep(self.batch_seconds)
                    trainer.compute()
                else:
                    trainer.hand_over(link)
                self.world.check_account(self)
                continue
            message = await inbox.get()
            if message is None:
                return
            await asyncio.sleep(self.world.apply_seconds())
            self.world.took(self, message)
            at_stake = trainer.at_stake()
            doubtful = trainer.given_up()
            self.leaves = trainer.replica.chain.id
            trainer.take(message, link)
            self.leaves = b""
            if isinstance(message, Restore) and not message.common:
                self.world.gave_up(self, at_stake)
            elif self.in_doubt:
                # What is in doubt may be on this chain after all.
                self.world.gave_up(self, at_stake if isinstance(message, Restore | Rollback) else doubtful)
            self.world.check_account(self)
