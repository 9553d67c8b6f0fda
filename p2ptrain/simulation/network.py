"""Modelled links and streams: what `SwarmNode` and libp2p are to the driver, with delay, bandwidth, loss and cuts.

A stream carries frames in order, as libp2p's do. A frame leaves when its sender's uplink is free, takes the link's
delay, and arrives when the receiver's downlink is free; a lost one comes a retransmission later. Across a cut link
frames wait, and after `RESET_SECONDS` the stream breaks. The stream of a peer that dies ends as if all were well, as
libp2p's does. Streams may be cut short, calls repeated; what arrives is whole frames, as libp2p authenticates each.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError

from p2ptrain.errors import UnreachableError
from p2ptrain.simulation.loop import Actor, VirtualLoop
from p2ptrain.swarm.identity import Identity

RESET_SECONDS = 12.0
FRAME_OVERHEAD_BYTES = 9
_TICK = 1e-9
"""Between two frames of a stream: timers that are due at once are in no order."""
_NOBODY = Context()
_UNARY = ("rpc_hello", "rpc_join", "rpc_relay", "rpc_amend")


@dataclass(slots=True)
class Link:
    """From one peer to another."""

    delay_seconds: float
    jitter_seconds: float = 0.0
    #: share of frames that take a retransmission, of twice the delay and 0.2 s, longer
    loss: float = 0.0


@dataclass(slots=True)
class Line:
    """A peer's line: rates in bytes a second, and until when each direction is busy."""

    up: float
    down: float
    up_free_at: float = 0.0
    down_free_at: float = 0.0


@dataclass(slots=True)
class Faulty:
    """Shares of streams that meet a fault."""

    #: end early, as if all were well
    truncated: float = 0.0
    #: requests that are served twice, as when an answer is lost
    repeated: float = 0.0
    #: frames that come seconds late
    late: float = 0.0


class Pipe:
    """One direction of a stream."""

    def __init__(self, network: Network, sender: SimNode, receiver: SimNode) -> None:
        self._network, self._sender, self._receiver = network, sender, receiver
        self._queue: asyncio.Queue[BytesValue | Exception | None] = asyncio.Queue()
        self._last_arrival = 0.0
        self._frames_left = network.frames_until_truncated()
        self._ended = False
        self.log: list[BytesValue] = []

    async def send(self, frame: BytesValue) -> None:
        """Returns once the frame has left the line."""
        if self._ended:
            raise P2PDaemonError("the stream is closed")
        self.log.append(frame)
        left, arrival = self._network.timing(self._sender, self._receiver, frame.ByteSize() + FRAME_OVERHEAD_BYTES)
        if self._frames_left is not None:
            self._frames_left -= 1
            if self._frames_left < 0:
                self.end(None)
                raise P2PDaemonError("the stream is closed")
        self._last_arrival = max(self._last_arrival + _TICK, arrival)
        self._network.at(self._last_arrival, self._deliver, frame, self._network.loop.time())
        wait = left - self._network.loop.time()
        # A frame on an idle line leaves in no time that matters.
        if wait > 1e-4:
            await asyncio.sleep(wait)

    def end(self, error: Exception | None) -> None:
        """What was sent arrives; then the reader finds the end, or the error."""
        if self._ended:
            return
        self._ended = True
        link = self._network.link(self._sender, self._receiver)
        self._last_arrival = max(self._last_arrival + _TICK, self._network.loop.time() + link.delay_seconds)
        self._network.at(self._last_arrival, self._deliver, error, self._network.loop.time())

    def _deliver(self, item: BytesValue | Exception | None, sent_at: float) -> None:
        if not self._network.passes(self._sender, self._receiver):
            now = self._network.loop.time()
            if now - sent_at > RESET_SECONDS:
                self._queue.put_nowait(P2PDaemonError("stream reset"))
            else:
                self._network.at(now + 0.5, self._deliver, item, sent_at)
            return
        self._queue.put_nowait(item)

    def __aiter__(self) -> AsyncIterator[BytesValue]:
        return self

    async def __anext__(self) -> BytesValue:
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        if item is None:
            self._queue.put_nowait(None)
            raise StopAsyncIteration
        return item


class Answers:
    """What a caller reads of a stream; `aclose` hangs up."""

    def __init__(self, pipe: Pipe, hang_up: Callable[[], None]) -> None:
        self._pipe, self._hang_up = pipe, hang_up

    def __aiter__(self) -> AsyncIterator[BytesValue]:
        return self

    async def __anext__(self) -> BytesValue:
        return await self._pipe.__anext__()

    async def aclose(self) -> None:
        self._hang_up()


@dataclass(frozen=True, slots=True)
class _PeerId:
    data: bytes

    def to_bytes(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class _Context:
    """What a handler learns of its caller."""

    remote_id: _PeerId


class SimNode:
    """A peer's node: what the driver and its client use of `SwarmNode`."""

    def __init__(self, network: Network, identity: Identity, actor: Actor, line: Line, *, dialable: bool) -> None:
        self.network, self.identity, self.actor, self.line, self.dialable = network, identity, actor, line, dialable
        self.peer_id = identity.peer_id
        #: its libp2p daemon runs
        self.up = True
        self.servicer: Any = None
        #: streams that end with this node: (pipe, who reads it)
        self.open: dict[Pipe, None] = {}

    @property
    def reachable(self) -> bool:
        """Whether anybody is there at all."""
        return self.up and self.actor.alive

    async def add_servicer(self, servicer: Any, namespace: str | None = None) -> None:
        self.servicer = servicer

    async def connect(self, peer_id: bytes, addresses: Sequence[str] = (), *, timeout_seconds: float = 5.0) -> None:
        """Raises UnreachableError."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.network.dial(self, peer_id)
        except (P2PDaemonError, TimeoutError) as error:
            raise UnreachableError(str(error) or "no answer") from error

    def stub(self, servicer_type: type, peer_id: bytes, namespace: str | None = None) -> Any:
        return _Stub(self.network, self, peer_id)


class _Stub:
    def __init__(self, network: Network, caller: SimNode, callee: bytes) -> None:
        self._network, self._caller, self._callee = network, caller, callee

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(request: Any, timeout: float | None = None) -> Any:
            async with asyncio.timeout(timeout):
                answers = await self._network.call(self._caller, self._callee, name, request)
                if name not in _UNARY:
                    return answers
                try:
                    return await anext(answers)
                except StopAsyncIteration as error:
                    raise P2PDaemonError("no answer") from error
                finally:
                    await answers.aclose()

        return call


@dataclass
class Network:
    """All links between all nodes."""

    loop: VirtualLoop
    random: random.Random
    delay_seconds: float = 0.04
    jitter_seconds: float = 0.01
    loss: float = 0.0
    faulty: Faulty = field(default_factory=Faulty)
    nodes: dict[bytes, SimNode] = field(default_factory=dict)
    links: dict[tuple[bytes, bytes], Link] = field(default_factory=dict)
    #: (from, to) that nothing passes
    cut: set[tuple[bytes, bytes]] = field(default_factory=set)
    connections: set[frozenset[bytes]] = field(default_factory=set)
    #: bytes, messages that left a peer's line, by peer
    bytes_sent: dict[bytes, int] = field(default_factory=dict)
    frames_sent: dict[bytes, int] = field(default_factory=dict)

    def add(self, node: SimNode) -> None:
        """A peer starts, or starts again."""
        self.nodes[node.peer_id] = node
        self._forget_connections(node.peer_id)

    def remove(self, node: SimNode) -> None:
        """A node dies: its streams end, at the other side as if all were well."""
        node.up = False
        self._forget_connections(node.peer_id)
        for pipe in list(node.open):
            pipe.end(None if self.random.random() < 0.5 else P2PDaemonError("connection closed"))
        node.open.clear()

    def _forget_connections(self, peer: bytes) -> None:
        self.connections = {pair for pair in self.connections if peer not in pair}

    def at(self, when: float, action: Callable[..., None], *arguments: Any) -> None:
        """Have the network do something, in nobody's name."""
        self.loop.call_at(when, action, *arguments, context=_NOBODY)

    def link(self, sender: SimNode, receiver: SimNode) -> Link:
        """The link from one to the other."""
        key = (sender.peer_id, receiver.peer_id)
        if key not in self.links:
            delay = self.delay_seconds * self.random.uniform(0.5, 1.5)
            self.links[key] = Link(delay, self.jitter_seconds, self.loss)
        return self.links[key]

    def passes(self, sender: SimNode, receiver: SimNode) -> bool:
        """Whether a frame gets from one to the other now."""
        return receiver.reachable and (sender.peer_id, receiver.peer_id) not in self.cut

    def timing(self, sender: SimNode, receiver: SimNode, size_bytes: int) -> tuple[float, float]:
        """When a frame will have left, and when it arrives."""
        now, link = self.loop.time(), self.link(sender, receiver)
        self.bytes_sent[sender.peer_id] = self.bytes_sent.get(sender.peer_id, 0) + size_bytes
        self.frames_sent[sender.peer_id] = self.frames_sent.get(sender.peer_id, 0) + 1
        left = max(now, sender.line.up_free_at) + size_bytes / sender.line.up
        sender.line.up_free_at = left
        arrival = left + link.delay_seconds + self.random.random() * link.jitter_seconds
        if self.random.random() < link.loss:
            arrival += 2 * link.delay_seconds + 0.2
        if self.random.random() < self.faulty.late:
            arrival += self.random.uniform(0.5, 6.0)
        begins = max(arrival, receiver.line.down_free_at + size_bytes / receiver.line.down)
        receiver.line.down_free_at = max(receiver.line.down_free_at, left + link.delay_seconds) + (
            size_bytes / receiver.line.down
        )
        return left, begins

    def frames_until_truncated(self) -> int | None:
        """How many frames a new pipe carries; None: all."""
        return self.random.randrange(4) if self.random.random() < self.faulty.truncated else None

    async def dial(self, caller: SimNode, callee: bytes) -> SimNode:
        """A connection; hangs across a cut link. Raises P2PDaemonError."""
        node = self.nodes.get(callee)
        if not caller.up:
            raise P2PDaemonError("the libp2p daemon has ended")
        if node is None or node is caller:
            raise P2PDaemonError("routing: not found")
        pair = frozenset((caller.peer_id, callee))
        if pair in self.connections and node.up:
            return node
        there, back = self.link(caller, node), self.link(node, caller)
        await asyncio.sleep(2 * (there.delay_seconds + back.delay_seconds))
        if not node.reachable or not node.dialable:
            raise P2PDaemonError("failed to dial: connection refused")
        while not (self.passes(caller, node) and self.passes(node, caller)):
            await asyncio.sleep(1.0)
        if not caller.up:
            raise P2PDaemonError("the libp2p daemon has ended")
        self.connections.add(pair)
        return node

    async def call(self, caller: SimNode, callee: bytes, name: str, request: Any) -> Answers:
        """Open a stream and have the callee serve it. Raises P2PDaemonError."""
        node = await self.dial(caller, callee)
        if node.servicer is None:
            raise P2PDaemonError("protocol not supported")
        there, back = Pipe(self, caller, node), Pipe(self, node, caller)
        for end in (caller, node):
            end.open[there] = end.open[back] = None
        handling: list[asyncio.Task[Any]] = []

        def serve() -> None:
            if node.reachable and node.servicer is not None:
                handling.append(node.actor.spawn(self._serve(node, caller, name, there, back)))

        # The handler starts with the first byte, so after one delay.
        self.at(self.loop.time() + self.link(caller, node).delay_seconds, serve)
        sending = asyncio.get_running_loop().create_task(self._send(request, there))

        def hang_up() -> None:
            sending.cancel()
            there.end(None)
            for end in (caller, node):
                end.open.pop(there, None)
                end.open.pop(back, None)

            def cancel() -> None:
                for task in handling:
                    task.cancel()

            self.at(self.loop.time() + self.link(caller, node).delay_seconds, cancel)

        return Answers(back, hang_up)

    async def _send(self, request: Any, there: Pipe) -> None:
        try:
            if isinstance(request, BytesValue):
                await there.send(request)
            else:
                async for frame in request:
                    await there.send(frame)
        except P2PDaemonError:
            return
        there.end(None)

    async def _serve(self, node: SimNode, caller: SimNode, name: str, there: Pipe, back: Pipe) -> None:
        """The callee's side of one call."""
        handler = getattr(node.servicer, name)
        context = _Context(_PeerId(caller.peer_id))
        try:
            if name == "rpc_contribute":
                async for frame in handler(there, context):
                    await back.send(frame)
            else:
                request = await anext(there)
                if name in _UNARY:
                    await back.send(await handler(request, context))
                else:
                    async for frame in handler(request, context):
                        await back.send(frame)
        except (P2PDaemonError, StopAsyncIteration):
            pass
        finally:
            back.end(None)
        if name == "rpc_contribute" and self.random.random() < self.faulty.repeated:
            await self._repeat(node, there.log, context)

    async def _repeat(self, node: SimNode, frames: list[BytesValue], context: _Context) -> None:
        """The same request once more, whose answers nobody reads."""

        async def again() -> AsyncIterator[BytesValue]:
            for frame in frames:
                yield frame

        async for _ in node.servicer.rpc_contribute(again(), context):
            pass
