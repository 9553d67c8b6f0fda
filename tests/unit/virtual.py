"""A loop whose time passes only when nothing else can happen, and peers that call each other within it."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError

from p2ptrain import chain
from p2ptrain.calls.client import Client
from p2ptrain.calls.handout import Handout
from p2ptrain.calls.messages import Traffic
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.compression.codec import Codec
from p2ptrain.errors import P2PTrainError
from p2ptrain.history.catching_up import CatchingUp
from p2ptrain.state.journal import Journal
from p2ptrain.state.pieces import Partials, PieceFile
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.swarm.identity import verify

FAST_KBIT = 10**6


class VirtualLoop(asyncio.SelectorEventLoop):
    """Threads' work is done at once, in no time."""

    #: in the middle of what a worker thread would do
    working = False

    def __init__(self) -> None:
        super().__init__()
        self._ahead = 0.0

    def time(self) -> float:
        return self._ahead

    def run_in_executor(self, executor: Any, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        done = self.create_future()
        VirtualLoop.working = True
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        finally:
            VirtualLoop.working = False
        return done

    def _run_once(self) -> None:
        # A timer that was cancelled is nothing to wait for, in no time.
        while self._scheduled and self._scheduled[0].cancelled():
            self._timer_cancelled_count -= 1
            heapq.heappop(self._scheduled)._scheduled = False
        if not self._ready and self._scheduled:
            self._ahead = max(self._ahead, self._scheduled[0].when())
        super()._run_once()


def run(scenario: Coroutine[Any, Any, Any]) -> Any:
    """In virtual time, of which no scenario takes an hour."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(asyncio.wait_for(scenario, 3600.0))


def name_of(number: int) -> bytes:
    """A peer id."""
    return hashlib.sha256(bytes([number])).digest() + bytes(6)


@dataclass
class Network:
    """Who answers whom; `touch` may change what a peer sends: it gets the frames of one call."""

    servicers: dict[bytes, PeerServicer] = field(default_factory=dict)
    touch: dict[bytes, Callable[[AsyncIterator[BytesValue]], AsyncIterator[BytesValue]]] = field(default_factory=dict)


@dataclass
class FakeNode:
    """As much of a node as the client needs."""

    network: Network
    peer_id: bytes

    def stub(self, servicer: type, peer: bytes, namespace: str) -> Any:
        return _Stub(self.network, self.peer_id, peer)

    async def read_peers(self, run_id: bytes, records_key: bytes) -> list[bytes]:
        return list(self.network.servicers)

    async def connect(self, peer: bytes, timeout_seconds: float = 5.0) -> None:
        if peer not in self.network.servicers:
            raise P2PTrainError("nobody there")


@dataclass
class _Stub:
    network: Network
    caller: bytes
    peer: bytes

    def __getattr__(self, name: str) -> Any:
        async def call(request: Any) -> AsyncIterator[BytesValue]:
            servicer = self.network.servicers.get(self.peer)
            if servicer is None:
                raise P2PDaemonError("nobody there")
            context = SimpleNamespace(remote_id=SimpleNamespace(to_bytes=lambda: self.caller))
            frames = getattr(servicer, name)(request, context)
            touch = self.network.touch.get(self.peer)
            return touch(frames) if touch else frames

        return call


class Peer:
    """A peer's share in handing out and fetching: the real servicer, client and files, without rounds."""

    def __init__(
        self,
        network: Network,
        number: int,
        folder: Path,
        run_id: bytes,
        codec: Codec,
        *,
        snapshot_chain: Callable[[bytes], Any],
        kbit: int = FAST_KBIT,
        root_interval: int = 4,
    ) -> None:
        self.id = name_of(number)
        for part in ("checkpoints", "journal"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self.store, self.journal = SnapshotStore(folder / "checkpoints"), Journal(folder / "journal", run_id, verify)
        self.partials = Partials(folder / "checkpoints")
        #: by root, files of the run that it has
        self.files: dict[bytes, PieceFile] = {}
        #: whom it knows
        self.knows: list[bytes] = []
        self.handout = Handout(lambda: kbit)
        self.traffic = Traffic()
        #: (what, done, of), as it was told
        self.progress: list[tuple[str, int, int]] = []
        node: Any = FakeNode(network, self.id)
        self.client = Client(node, self.traffic, run_id, self.handout)
        self.catching_up = CatchingUp(
            self.client,
            codec,
            self.journal,
            self.store,
            self.partials,
            lambda: self.knows,
            chain.genesis(run_id),
            root_interval,
            2**40,
            snapshot_chain,
            lambda *heard: self.progress.append(heard),
        )
        self.tip: Any = None
        answering: Any = self
        network.servicers[self.id] = PeerServicer(answering, self.traffic)

    def admits(self, peer: bytes) -> bool:
        return True

    def open_file(self, root: bytes) -> PieceFile | None:
        return self.files.get(root)

    def wrong_run(self, run_id: bytes) -> str | None:
        return None

    def parted_at(self, locator: tuple[bytes, ...]) -> bytes:
        return b""
