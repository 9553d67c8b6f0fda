"""A peer's two threads at work side by side: neither touches what is the other's, however often they take turns."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from p2ptrain.calls import client
from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import CallError, Tip, Traffic
from p2ptrain.calls.news import NewsFeed
from p2ptrain.calls.uplink import CAREFUL_KBIT, UplinkMeter
from p2ptrain.config.manifest import EvaluationConfig, Manifest, ModelConfig, RoundConfig
from p2ptrain.config.node import NodeSettings
from p2ptrain.data.text import Part, embedded_text
from p2ptrain.history.catching_up import CatchingUp
from p2ptrain.peer import session as session_module
from p2ptrain.peer.answering import Answering
from p2ptrain.peer.auditing import Auditing
from p2ptrain.peer.driver import RoundDriver
from p2ptrain.peer.presence import Presence
from p2ptrain.peer.progress import Display
from p2ptrain.peer.sending import Sending
from p2ptrain.peer.session import PeerSession
from p2ptrain.rounds.machine import RoundMachine
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import OwnLog
from p2ptrain.swarm.identity import verify
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.thread import NetworkThread
from p2ptrain.training import trainer as trainer_module
from p2ptrain.training.ledger import Ledger
from p2ptrain.training.replica import Replica
from p2ptrain.training.standing import Books
from p2ptrain.training.trainer import Trainer

MANIFEST = Manifest(
    name="test",
    nonce="0" * 32,
    model=ModelConfig(layers=1, heads=1, embedding=16, context=16),
    round=RoundConfig(pace="fixed", sequences_per_peer=4, micro_batch=4, root_interval=4),
    evaluation=EvaluationConfig(every_rounds=3, tokens=64),
)


class Observer:
    """Somebody who calls a peer as fast as it answers, and follows it, from a network thread of its own."""

    def __init__(self) -> None:
        self.answers = 0
        self._network = NetworkThread("observer")
        self._node: SwarmNode | None = None
        self._work: Future[None] | None = None

    def begin(self, addresses: list[str]) -> None:
        self._work = self._network.spawn(self._call(addresses))

    async def _call(self, addresses: list[str]) -> None:
        self._node = await SwarmNode.create(None, addresses, observer=True)
        (peer,) = self._node.known_peers
        run_id = (await client.hello(self._node, peer)).run_id
        calls = Client(self._node, Traffic(), run_id)

        async def follow() -> None:
            while True:
                with contextlib.suppress(CallError):
                    async for _ in calls.follow(peer, Tip(0, run_id, 0)):
                        self.answers += 1

        async def ask() -> None:
            while True:
                with contextlib.suppress(CallError):
                    for _ in range(8):
                        head = (await client.hello(self._node, peer)).tip
                        self.answers += 1
                    answer, _ = await calls.rounds(peer, (head.id, run_id), 1_000_000)
                    for offer in answer.snapshots[:1]:
                        await calls.snapshot(peer, offer, 0, 1)

        await asyncio.gather(follow(), ask())

    def close(self) -> None:
        if self._work is not None:
            self._work.cancel()
        if self._node is not None:
            self._network.run(self._node.close(), 10)
        self._network.stop()


class Watched(PeerSession):
    """A session with an observer from the moment that others may dial it."""

    observer: Observer

    def _print_join_line(self, addresses: list[str]) -> None:
        self.observer.begin(addresses)


@pytest.fixture
def observer(sockets_in: Path) -> Iterator[Observer]:
    made = Observer()
    yield made
    made.close()


def train(home: Path, observer: Observer, rounds: int) -> list[Any]:
    """Take part in so many rounds of a new run, alone; returns the sealed rounds that the journal keeps."""
    settings = NodeSettings(home=home, origins={}, host="127.0.0.1", threads=1, name="ada")
    with Watched(settings, Display(quiet=True), rounds) as session:
        session.observer = observer
        session.connect([])
        run = session.found_run(MANIFEST)
        session.enter_run(run)
        text = embedded_text(session.home.data)
        session.train(run, text.with_train(Part(text.train.tokens[:30_000], 100_000)), None)
        path, run_id = session.home.journal, run.run_id
    journal = Journal(path, run_id, verify)
    return [journal.read(number) for number in range(journal.first, journal.last + 1)]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a peer does now and then, it does all the time."""
    monkeypatch.setattr(trainer_module, "CHECKPOINT_SECONDS", 0.2)
    monkeypatch.setattr(session_module, "PEERS_SECONDS", 0.05)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_peer_trains_200_rounds_beside_a_busy_network_thread(
    tmp_path: Path, observer: Observer, often: None, caplog: pytest.LogCaptureFixture
) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    began = time.monotonic()
    try:
        rounds = train(tmp_path / "ada", observer, 200)
    finally:
        sys.setswitchinterval(before)
    print(f"{len(rounds)} rounds kept, {observer.answers} answers, {time.monotonic() - began:.1f} s")
    assert errors(caplog) == []
    assert rounds[-1].seal.round >= 200
    assert observer.answers > 100, "the network thread was busy"


NETWORKS = frozenset({"network", "observer"})


def test_neither_thread_touches_what_is_the_others(
    tmp_path: Path,
    observer: Observer,
    often: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun = threading.Event()
    trespasses: set[tuple[str, str, str]] = set()

    def belongs(kind: type, mine: Callable[[str], bool], shared: frozenset[str] = frozenset()) -> None:
        """From the first round on, objects of this kind are for threads of these names, but for what is `shared`."""

        def look_up(self: Any, name: str) -> Any:
            thread = threading.current_thread().name
            if begun.is_set() and not mine(thread) and name not in shared and not name.startswith("__"):
                trespasses.add((kind.__name__, name, thread))
            return object.__getattribute__(self, name)

        monkeypatch.setattr(kind, "__getattribute__", look_up, raising=False)

    messages = frozenset(
        {"contribute", "root_computed", "prune_own_log", "doubt", "others_reach", "stop", "retire", "standing"}
    )
    belongs(RoundDriver, NETWORKS.__contains__, messages)
    belongs(Presence, NETWORKS.__contains__, frozenset({"hear", "say_leaving", "said", "rest"}))
    for kind in (Answering, Auditing, Sending, RoundMachine, NewsFeed, CatchingUp, Journal, UplinkMeter, Traffic):
        belongs(kind, NETWORKS.__contains__)
    fixed = frozenset({"peer_id", "identity", "port", "observer", "dialable", "close", "on_restart"})
    belongs(SwarmNode, NETWORKS.__contains__, fixed)
    # Worker threads read files through them, and the trainer reads what the network thread has written.
    belongs(OwnLog, NETWORKS.__contains__, frozenset({"find", "all", "_folder", "_path", "_read"}))

    for kind in (Trainer, Ledger, Replica):
        belongs(kind, "MainThread".__eq__)
    # What never changes: where the thread that writes files puts them.
    belongs(Books, "MainThread".__eq__, frozenset({"_checkpoints", "_kept", "_snapshots"}))

    run, say_end = Trainer.run, Watched._say_end

    def begin(self: Trainer, *arguments: Any) -> None:
        begun.set()
        run(self, *arguments)

    def end(self: Watched, *arguments: Any) -> None:
        say_end(self, *arguments)
        begun.clear()

    monkeypatch.setattr(Trainer, "run", begin)
    monkeypatch.setattr(Watched, "_say_end", end)
    rounds = train(tmp_path / "ada", observer, 12)
    assert trespasses == set()
    assert errors(caplog) == []
    # The trainer does not know the line; what it hands over says what the network thread knows.
    assert rounds[-1].seal.rows[0].uplink_kbit == CAREFUL_KBIT
