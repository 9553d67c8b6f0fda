"""The calls that this peer makes. Every one ends: with what was asked for, or with CallError within its deadline."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from google.protobuf.wrappers_pb2 import BytesValue

from p2ptrain.calls.handout import Handout
from p2ptrain.calls.messages import (
    NAMESPACE,
    NOT_LISTED,
    PIECE_BYTES,
    SEALS_MAX_BYTES,
    TRANSPORT_FAILURES,
    Amend,
    Answer,
    Arrived,
    AuditRequest,
    CallError,
    ContributionHeader,
    Dial,
    Dialled,
    FileRequest,
    Follow,
    FrameReader,
    Hello,
    JoinRequest,
    News,
    PiecesHeld,
    ProofHeader,
    RefusedError,
    Relay,
    RoundsHeader,
    RoundsRequest,
    SealsHeader,
    SealsRequest,
    SnapshotOffer,
    SnapshotRequest,
    Tip,
    Traffic,
    Welcome,
    decode_message,
)
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.calls.uplink import Burst
from p2ptrain.chain import Row, SignedSeal
from p2ptrain.chain.admission import Grant, Statement
from p2ptrain.chain.seal import proof_digest
from p2ptrain.config.manifest import PROTOCOL_VERSION
from p2ptrain.errors import P2PTrainError
from p2ptrain.state.pieces import piece_length
from p2ptrain.state.run_files import RunFile
from p2ptrain.swarm.limits import Backoff, loop_time
from p2ptrain.swarm.node import SwarmNode

SECONDS = 8.0
"""For an answer, and for each frame of a stream."""
NEWS_SECONDS = 5.0
"""Silence of a peer we follow after which we hang up; it says something every second or two."""
PRESENT_AGAIN_SECONDS = 1.0, 60.0
"""The first and the longest pause after a grant that did not help with a peer."""
PROOF_SECONDS = 60.0
"""For a proof to get there and to be checked."""
_SEALED_ROUND_SLACK_BYTES = 512 * 1024
_seals = msgspec.msgpack.Decoder(tuple[SignedSeal, ...])

_FAILURES = (*TRANSPORT_FAILURES, P2PTrainError)
"""What opening a stream, or a call of one answer, may raise: the node's own refusals too."""


@dataclass(frozen=True, slots=True)
class PiecesAnswer:
    """What a donor says and hands out."""

    held: bytes
    hashes: bytes
    pieces: list[bytes]


@dataclass(frozen=True, slots=True)
class Client:
    """Calls in the name of one peer, for one run; `handout` lets contributions go before what others download.

    A guest has a `grant`. It shows it to each peer that refuses it as an outsider, which may not have come to the seal
    that lets it in; the call that was refused fails, and is good when it is made again.
    """

    node: SwarmNode
    traffic: Traffic
    run_id: bytes
    handout: Handout = field(default_factory=Handout)
    grant: Grant | None = None
    _shown: Backoff = field(default_factory=lambda: Backoff(*PRESENT_AGAIN_SECONDS, loop_time))

    async def amend(self, peer: bytes, statements: tuple[Statement, ...]) -> None:
        """Hand `peer` statements for the chain. Raises RefusedError, CallError."""
        await amend(self.node, peer, self.run_id, statements)

    async def _is_let_in_now(self, peer: bytes, refusal: str) -> bool:
        """After a refusal: whether `peer` has taken our grant, so that the same call is worth another try."""
        if refusal != NOT_LISTED or self.grant is None or not self._shown.ready(peer):
            return False
        self._shown.failed(peer)
        try:
            await self.amend(peer, (self.grant,))
        except CallError:
            return False
        return True

    async def join(self, peer: bytes, row: Row) -> None:
        """Ask `peer` to admit us by its next seal. Raises RefusedError, CallError."""
        answer = await self._unary(peer, "rpc_join", self.traffic.message(JoinRequest(self.run_id, row)), Answer)
        if answer.refusal:
            raise RefusedError(answer.refusal)

    async def relay(self, peer: bytes, tip: Tip, seal: SignedSeal) -> None:
        """Pass a seal on. Raises RefusedError, CallError."""
        answer = await self._unary(peer, "rpc_relay", self.traffic.message(Relay(self.run_id, tip, seal)), Answer)
        if answer.refusal:
            raise RefusedError(answer.refusal)

    async def contribute(
        self,
        peer: bytes,
        header: ContributionHeader,
        payload: bytes,
        reply_max_bytes: int,
        reply_seconds: float,
        turn: asyncio.Lock,
        burst: Burst,
    ) -> bytes:
        """Send a contribution and wait for the reply of its part, at most `reply_seconds`.

        Args:
            turn: held while it is sent, so that the first of several parts is there before the others.
            burst: hears when it is there.

        Raises:
            RefusedError: with the reducer's reason.
            CallError: no answer, or no reply.
        """

        clock = asyncio.get_running_loop().time
        began = clock()

        async def frames() -> AsyncIterator[BytesValue]:
            nonlocal began
            began = clock()
            yield self.traffic.message(header)
            if header.row.weight:
                for frame in self.traffic.blob(payload):
                    yield frame
            sending.close()

        await turn.acquire()
        # Whatever becomes of the frames, the call's end is the end of sending too.
        with contextlib.ExitStack() as sending:
            sending.callback(turn.release)
            sending.enter_context(self.handout.urgent())
            async with self._stream(peer, "rpc_contribute", frames()) as reader:
                arrived = await reader.message(Arrived, reply_seconds)
                if arrived.refusal:
                    raise RefusedError(arrived.refusal)
                if header.row.weight:
                    burst.arrived(peer, len(payload), began, clock(), arrived.microseconds / 1e6)
                return await reader.blob(reply_max_bytes, reply_seconds)

    async def follow(self, peer: bytes, tip: Tip) -> AsyncIterator[News]:
        """News of `peer` for as long as it gives any. Raises RefusedError, CallError."""
        async with self._stream(peer, "rpc_follow", self.traffic.message(Follow(self.run_id, tip))) as reader:
            await reader.accepted()
            while True:
                yield await reader.message(News, NEWS_SECONDS)

    async def rounds(
        self, peer: bytes, locator: tuple[bytes, ...], round_max_bytes: int
    ) -> tuple[RoundsHeader, list[bytes]]:
        """Sealed rounds, still encoded, after the newest id of `locator` that `peer` keeps. Raises CallError."""
        request = self.traffic.message(RoundsRequest(self.run_id, locator))
        await self.traffic.admit(PIECE_BYTES)  # how much will come is not known before
        async with self._stream(peer, "rpc_rounds", request) as reader:
            await reader.accepted()
            header = await reader.message(RoundsHeader)
            limit = round_max_bytes + _SEALED_ROUND_SLACK_BYTES
            return header, [await reader.blob(limit) for _ in range(header.count)]

    async def seals(
        self, peer: bytes, round: int, known: bytes, newest: int
    ) -> tuple[SealsHeader, tuple[SignedSeal, ...]]:
        """Seals after a state that we know, or of the newest rounds, unchecked; not more than one answer takes.

        Raises:
            RefusedError: it keeps none.
            CallError: no answer, or nonsense.
        """
        request = self.traffic.message(SealsRequest(self.run_id, round, known, newest))
        async with self._stream(peer, "rpc_seals", request) as reader:
            await reader.accepted()
            header = await reader.message(SealsHeader)
            data = await reader.blob(SEALS_MAX_BYTES)
        try:
            return header, _seals.decode(data)
        except msgspec.MsgspecError as error:
            raise CallError(f"not seals: {error}") from error

    async def snapshot(
        self,
        peer: bytes,
        offer: SnapshotOffer,
        first: int = 0,
        end: int = 0,
        *,
        hashes: bool = False,
        timeout_seconds: float = SECONDS,
    ) -> PiecesAnswer:
        """What `peer` holds of a snapshot, and its pieces [first, end), or their hashes in place of them.

        Nothing of it is checked but its length.

        Raises:
            RefusedError: it has not got them, or has too much to do (`TOO_MANY_CALLS`).
            CallError: no answer, or not all of it within `timeout_seconds`.
        """
        request = self.traffic.message(SnapshotRequest(self.run_id, offer.id, offer.root, first, end, hashes))
        lengths = [piece_length(offer.length, number) for number in range(first, end)]
        return await self._pieces(peer, "rpc_snapshot", request, lengths, hashes, timeout_seconds)

    async def file(
        self,
        peer: bytes,
        file: RunFile,
        first: int = 0,
        end: int = 0,
        *,
        hashes: bool = False,
        timeout_seconds: float = SECONDS,
    ) -> PiecesAnswer:
        """Pieces of a file of the run, as `snapshot` does for a snapshot. Raises RefusedError, CallError."""
        request = self.traffic.message(FileRequest(self.run_id, file.root, first, end, hashes))
        lengths = [piece_length(file.length, number) for number in range(first, end)]
        return await self._pieces(peer, "rpc_file", request, lengths, hashes, timeout_seconds)

    async def _pieces(
        self, peer: bytes, name: str, request: BytesValue, lengths: list[int], hashes: bool, timeout_seconds: float
    ) -> PiecesAnswer:
        await self.traffic.admit(32 * len(lengths) if hashes else sum(lengths))
        async with self._stream(peer, name, request) as reader, asyncio.timeout(timeout_seconds):
            await reader.accepted()
            held = (await reader.message(PiecesHeld)).held
            if hashes:
                # The donor may have to read all of it first.
                return PiecesAnswer(held, await reader.blob(32 * len(lengths), timeout_seconds), [])
            pieces = [await reader.blob(length, timeout_seconds) for length in lengths]
        return PiecesAnswer(held, b"", pieces)

    async def audit(self, peer: bytes, reply: bytes, max_bytes: int) -> bytes:
        """What `peer` summed for the reply of this digest; nothing of it is checked but its length.

        Raises:
            RefusedError: it does not show it.
            CallError: no answer.
        """
        async with self._stream(peer, "rpc_audit", self.traffic.message(AuditRequest(self.run_id, reply))) as reader:
            await reader.accepted()
            return await reader.blob(max_bytes)

    async def prove(self, peer: bytes, proof: bytes) -> None:
        """Hand `peer` a proof. Raises RefusedError, CallError."""
        wanted = asyncio.Event()

        async def frames() -> AsyncIterator[BytesValue]:
            yield self.traffic.message(ProofHeader(self.run_id, proof_digest(proof)))
            # What is refused, as it is known already, is not sent.
            await wanted.wait()
            for frame in self.traffic.blob(proof):
                yield frame

        async with self._stream(peer, "rpc_prove", frames()) as reader:
            await reader.accepted()
            wanted.set()
            await reader.accepted(PROOF_SECONDS)

    async def _unary(self, peer: bytes, name: str, request: BytesValue, kind: type[Any]) -> Any:
        answer = await unary(self.node, peer, name, request, kind, self.traffic)
        if await self._is_let_in_now(peer, answer.refusal):
            answer = await unary(self.node, peer, name, request, kind, self.traffic)
        return answer

    @contextlib.asynccontextmanager
    async def _stream(
        self, peer: bytes, name: str, request: BytesValue | AsyncIterator[BytesValue]
    ) -> AsyncIterator[FrameReader]:
        """Open a stream to `peer`, and close it whatever happens.

        Raises:
            CallError: the call failed, or took too long. What else the caller's own block raises passes as it is.
        """
        try:
            async with asyncio.timeout(SECONDS):
                stub = self.node.stub(PeerServicer, peer, NAMESPACE)
                frames: Any = await getattr(stub, name)(request)
        except _FAILURES as error:
            raise CallError(str(error) or type(error).__name__) from error
        try:
            yield FrameReader(frames, self.traffic, SECONDS)
        except TimeoutError as error:
            raise CallError("it takes too long") from error
        except RefusedError as error:
            if await self._is_let_in_now(peer, str(error)):
                raise CallError("it did not know that we were let in") from error
            raise
        finally:
            with contextlib.suppress(*_FAILURES, RuntimeError):
                await frames.aclose()


async def unary(node: SwarmNode, peer: bytes, name: str, request: BytesValue, kind: type[Any], traffic: Traffic) -> Any:
    """One request and one answer of type `kind`. Raises CallError."""
    try:
        stub = node.stub(PeerServicer, peer, NAMESPACE)
        answer = await getattr(stub, name)(request, timeout=SECONDS)
    except _FAILURES as error:
        raise CallError(str(error) or type(error).__name__) from error
    traffic.received += answer.ByteSize()
    return decode_message(answer.value, kind)


async def hello(node: SwarmNode, peer: bytes) -> Welcome:
    """Ask a peer which run it is in. Raises CallError, also when it is no p2ptrain peer at all."""
    traffic = Traffic()
    return await unary(node, peer, "rpc_hello", traffic.message(Hello(PROTOCOL_VERSION)), Welcome, traffic)


async def dialled(node: SwarmNode, peer: bytes, port: int) -> Dialled:
    """Have `peer` try whether this port can be reached where it sees us. Raises CallError, also when it does not."""
    traffic = Traffic()
    return await unary(node, peer, "rpc_dial", traffic.message(Dial(port)), Dialled, traffic)


async def amend(node: SwarmNode, peer: bytes, run_id: bytes, statements: tuple[Statement, ...]) -> None:
    """Hand a peer statements for the chain. Raises RefusedError, CallError."""
    traffic = Traffic()
    answer = await unary(node, peer, "rpc_amend", traffic.message(Amend(run_id, statements)), Answer, traffic)
    if answer.refusal:
        raise RefusedError(answer.refusal)
