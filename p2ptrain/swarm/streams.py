"""The calls of other peers on their way to our servicers: few streams and calls from each peer, and small requests.

hivemind reads a request, and up to five frames ahead, before the servicer is asked, and waits for it without end. Here
a stream is counted when it opens, its first frame may have `REQUEST_MAX_BYTES`, and of the streams that have said
nothing yet the oldest end first. What was given up: a peer that is refused here is told nothing; its stream just ends.

Cost: one task more for each open stream. Memory: `SILENT_MAX` * `REQUEST_MAX_BYTES` for all who have not asked for
anything yet, and two frames for each call that the servicer has accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

from google.protobuf.message import DecodeError, Message
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.utils.asyncio import asingle

from p2ptrain.swarm.guards import receive_message
from p2ptrain.swarm.limits import Allowance, caller
from p2ptrain.swarm.line import Line

REQUEST_MAX_BYTES = 4 * 1024
"""The first frame of a stream; the longest, a request for rounds, has 0.6 KiB."""
REQUEST_SECONDS = 15.0
"""For the whole request of a call that has only one."""
SEND_SECONDS = 60.0
"""For one frame of an answer to leave: a peer that does not read must not keep its stream."""
UNARY_SECONDS = 10.0
STREAMS_PER_PEER = 64
"""More than the servicer takes, which says so; beyond this the stream ends without a word."""
STREAMS_MAX = 1024
"""Of all peers; when there are more, the peer with the most streams loses its oldest one."""
SILENT_MAX = 128
"""Streams without a first frame; when there are more, the oldest ends."""
CALLS_PER_SECOND, CALLS_BURST = 100.0, 400.0
"""Of one peer, unary calls and streams together."""

_logger = logging.getLogger(__name__)


class TooManyCallsError(Exception):
    """A peer calls more often than it may."""


class Streams:
    """The streams that others have opened here. Each has a place: a future that is done when the stream has to end."""

    def __init__(self) -> None:
        #: {peer: its places}, the oldest first, as in all that follows
        self._open: dict[bytes, list[asyncio.Future[None]]] = {}
        self._silent: dict[asyncio.Future[None], None] = {}

    @contextlib.contextmanager
    def place(self, peer: bytes) -> Iterator[asyncio.Future[None] | None]:
        """A place for a stream of `peer`; None: there is none."""
        mine = self._open.get(peer, [])
        if len(mine) >= STREAMS_PER_PEER or not self._make_room(len(mine)):
            yield None
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open.setdefault(peer, mine).append(place)
        self._silent[place] = None
        if len(self._silent) > SILENT_MAX:
            self._end(next(iter(self._silent)))
        try:
            yield place
        finally:
            self.heard(place)
            mine.remove(place)
            if not mine:
                del self._open[peer]

    def heard(self, place: asyncio.Future[None]) -> None:
        """The first frame of a stream is there."""
        self._silent.pop(place, None)

    def _make_room(self, mine: int) -> bool:
        if sum(map(len, self._open.values())) < STREAMS_MAX:
            return True
        most = max(self._open.values(), key=len)
        if len(most) <= mine + 1:
            return False
        self._end(most[0])
        return True

    def _end(self, place: asyncio.Future[None]) -> None:
        self.heard(place)
        if not place.done():
            place.set_result(None)


class BoundedP2P(P2P):  # type: ignore[misc, unused-ignore]
    """hivemind's P2P, with the limits of this module on what others call, and those of the owner on all streams."""

    line: Line | None = None

    def __init__(self) -> None:
        super().__init__()
        self._streams = Streams()
        self._calls = Allowance(CALLS_PER_SECOND, CALLS_BURST)

    async def add_protobuf_handler(
        self,
        name: str,
        handler: Callable[..., Any],
        input_protobuf_type: type[Message],
        *,
        stream_input: bool = False,
        stream_output: bool = False,
        balanced: bool = False,
    ) -> None:
        """As in hivemind; a handler that takes a stream answers by one."""

        def context(peer: PeerID) -> P2PContext:
            return P2PContext(handle_name=name, local_id=self.peer_id, remote_id=peer)

        async def answer(request: bytes, peer: PeerID) -> bytes:
            if not self._calls.take(peer.to_bytes()):
                raise TooManyCallsError("too many calls")
            caller.set(peer.to_bytes())
            async with asyncio.timeout(UNARY_SECONDS):
                response = await handler(input_protobuf_type.FromString(request), context(peer))
            return bytes(response.SerializeToString())

        async def serve(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = info.peer_id.to_bytes()
            with contextlib.closing(writer), self._streams.place(peer) as place:
                if place is not None and self._calls.take(peer):
                    heard = functools.partial(self._streams.heard, place)
                    paced = _Paced(self.line, name)
                    stream = _Stream(reader, writer, input_protobuf_type, heard, paced, single=not stream_input)
                    await stream.serve(lambda requests: handler(requests, context(info.peer_id)), place)

        if stream_output:
            await self.add_binary_stream_handler(name, serve, balanced=balanced)
        else:
            await self._client.add_unary_handler(name, answer, balanced=balanced)

    async def _iterate_protobuf_stream_handler(
        self, peer_id: PeerID, name: str, requests: AsyncIterator[Message], output_protobuf_type: type[Message]
    ) -> AsyncIterator[Message]:
        """As in hivemind; frames wait until the owner's limits let them go."""
        # Where there is no limit, the owner may set one while the stream is open.
        if self.line is None:
            return await super()._iterate_protobuf_stream_handler(peer_id, name, requests, output_protobuf_type)  # type: ignore[no-any-return, unused-ignore]
        paced = _Paced(self.line, name)
        answers = await super()._iterate_protobuf_stream_handler(
            peer_id, name, paced.sent(requests), output_protobuf_type
        )
        return paced.received(answers)


class _Paced:
    """The owner's limits for the frames of one stream."""

    def __init__(self, line: Line | None, name: str) -> None:
        self._line, self._call = line, name.rpartition(".")[2]

    async def leave(self, frame: Message) -> None:
        if self._line is not None:
            await self._line.leave(self._call, frame.ByteSize())

    async def read(self, frame: Message | None) -> None:
        if self._line is not None and frame is not None:
            await self._line.read(frame.ByteSize())

    async def sent(self, frames: AsyncIterator[Message]) -> AsyncIterator[Message]:
        async for frame in frames:
            await self.leave(frame)
            yield frame

    async def received(self, frames: AsyncGenerator[Message]) -> AsyncIterator[Message]:
        async with contextlib.aclosing(frames):
            async for frame in frames:
                if self._line is not None:
                    self._line.heard(frame.ByteSize())
                yield frame


class _Stream:
    """One stream that another peer has opened.

    Args:
        kind: of the frames that come.
        heard: is told when the first frame is there.
        paced: holds frames back.
        single: whether the call has one request only, which the handler gets once it is there whole.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        kind: type[Message],
        heard: Callable[[], None],
        paced: _Paced,
        *,
        single: bool,
    ) -> None:
        self._reader, self._writer, self._kind, self._heard, self._single = reader, writer, kind, heard, single
        self._paced = paced
        self._frames: asyncio.Queue[Message | None] = asyncio.Queue(1)

    async def serve(self, handler: Callable[[Any], AsyncGenerator[Message]], ended: asyncio.Future[None]) -> None:
        """Answer until the handler has ended, the caller hangs up, or the stream has to end."""
        tasks = [asyncio.create_task(self._answer(handler)), asyncio.create_task(self._receive())]
        try:
            await asyncio.wait([*tasks, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for failure in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(failure, Exception):
                    _logger.debug("a stream has ended: %r", failure)

    async def _receive(self) -> None:
        limit: int | None = REQUEST_MAX_BYTES
        # The daemon closes the stream when the caller does, or when its line breaks.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ValueError, TypeError, DecodeError):
            while True:
                frame = await receive_message(self._kind, self._reader, limit)
                self._heard()
                limit = REQUEST_MAX_BYTES if self._single else None
                await self._frames.put(frame)
                await self._paced.read(frame)

    async def _requests(self) -> AsyncIterator[Message]:
        while (frame := await self._frames.get()) is not None:
            yield frame

    async def _answer(self, handler: Callable[[Any], AsyncGenerator[Message]]) -> None:
        requests: Any = self._requests()
        try:
            if self._single:
                async with asyncio.timeout(REQUEST_SECONDS):
                    requests = await asingle(requests)
            async with contextlib.aclosing(handler(requests)) as answers:
                async for answer in answers:
                    await self._paced.leave(answer)
                    await self._send(answer)
        except Exception as error:
            with contextlib.suppress(OSError, TimeoutError):
                await self._send(RPCError(message=repr(error)[:200]))
            raise

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await P2P.send_protobuf(message, self._writer)
        except TimeoutError:
            # Closed in good order it would wait for a reader who does not read.
            self._writer.transport.abort()
            raise
