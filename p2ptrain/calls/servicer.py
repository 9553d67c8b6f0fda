"""The calls that this peer answers. Each checks who asks and how much, and hands the rest to `AnsweringPeer`.

All that an outsider ever gets is one refusal, but for `amend`: what that brings is checked by its signatures, whoever
brings it.

One leaf class with all `rpc_*`, because hivemind caches handlers by class hierarchy. A stream handler that raises would
leave the caller with a stream that ends as if all were well, so refusals are messages, and faults are logged here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, AsyncIterator, Protocol  # noqa: UP035 - hivemind knows a stream by this type alone

import msgspec
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2PContext, ServicerBase

from p2ptrain.calls.dialling import DialBack
from p2ptrain.calls.handout import Handout
from p2ptrain.calls.messages import (
    HASHES_MAX,
    NOT_LISTED,
    REVOKED,
    SEALS_OPENING_MAX_BYTES,
    STATEMENTS_MAX_BYTES,
    TOO_MANY_CALLS,
    Amend,
    Answer,
    Arrived,
    AuditRequest,
    CallError,
    ContributionHeader,
    Dial,
    FileRequest,
    Follow,
    FrameReader,
    Hello,
    JoinRequest,
    News,
    PiecesHeld,
    ProofHeader,
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
from p2ptrain.chain import SignedSeal
from p2ptrain.chain.admission import Revocation
from p2ptrain.chain.seal import PROOF_MAX_BYTES, Key
from p2ptrain.state.failpoints import failpoint
from p2ptrain.state.pieces import PieceFile
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.limits import Allowance, loop_time

if TYPE_CHECKING:
    from p2ptrain.chain.sealed import Reply

CALLS_PER_PEER = 32
PIECES_A_CALL = 16
PACED_BYTES = 64 * 1024
AMENDS_PER_SECOND, AMENDS_BURST = 4.0, 64.0
"""Of one peer, with statements whose signatures are to be checked."""
OUTSIDERS_AMENDS_PER_SECOND, OUTSIDERS_AMENDS_BURST = 10.0, 100.0
"""Of all outsiders together, who may have any number of identities."""
SEALS_PER_SECOND, SEALS_BURST = 2.0, 64.0
"""Answers with seals to one peer: each reads up to half a megabyte of a disk."""
SHOWING_SECONDS = 60.0
"""A stream that shows what was summed, and is not done by then, ends."""
FRAME_SECONDS = 15.0
"""Silence inside a request after which it is dropped."""

_logger = logging.getLogger(__name__)
Frames = AsyncGenerator[BytesValue, None]


class History(Protocol):
    """Where rounds and snapshots to hand out come from."""

    async def offer_rounds(self, locator: tuple[bytes, ...]) -> tuple[bytes, list[bytes], tuple[SnapshotOffer, ...]]:
        """Return (ancestor, encoded rounds after it, snapshots to start from instead)."""

    async def open_snapshot(self, identifier: bytes, root: bytes) -> PieceFile | None:
        """Open a snapshot, whole or as far as it was fetched; None where there is none."""

    async def hashes_of(self, file: PieceFile) -> list[bytes]:
        """Return the SHA-256 of each piece."""


class Feed(Protocol):
    """The news that followers of this peer hear."""

    def take_relayed(self, peer: bytes, tip: Tip, signed: SignedSeal) -> None:
        """Hear a seal that `peer` passes on."""

    def refusal(self, peer: bytes) -> str | None:
        """Return why `peer` may not follow now, or None."""

    def serve(self, peer: bytes) -> AsyncIterator[News]:
        """Yield news until the caller closes the stream."""


class AnsweringPeer(Protocol):
    """The peer behind the calls: what it says, takes and hands out. All of it is for the network thread."""

    handout: Handout
    handing_out: set[asyncio.Future[None]]
    """Replies that are being handed out, for which a peer that leaves waits."""

    @property
    def feed(self) -> Feed: ...

    @property
    def catching_up(self) -> History: ...

    @property
    def tip(self) -> Tip:
        """Where this peer's chain stands."""

    def admits(self, peer: bytes) -> bool:
        """Return whether `peer` may take part in the run and read anything of it."""

    def revocation(self, peer: bytes) -> Revocation | None:
        """Return the statement by which the run's owner has shut `peer` out, if there is one."""

    def take_statements(self, amend: Amend) -> str:
        """Hear whom to let in or to shut out; returns a refusal or ""."""

    async def seen_at(self, peer: bytes) -> str:
        """Return the IP address that `peer` is connected from, or ""."""

    def welcome(self) -> Welcome:
        """Answer to hello, for a peer that is admitted."""

    def wrong_run(self, run_id: bytes) -> str | None:
        """Return why a request for this run is refused, or None."""

    def take_join(self, wanted: JoinRequest, peer: bytes) -> str:
        """Hear that a peer asks to be admitted; returns a refusal or ""."""

    def refuse(self, header: ContributionHeader, peer: bytes) -> str | None:
        """Return why a contribution is refused before its payload is read, or None."""

    def contribution_max_bytes(self, header: ContributionHeader) -> int:
        """Return the length that no payload for that part exceeds."""

    def take_contribution(self, header: ContributionHeader, peer: bytes, payload: bytes) -> str | None:
        """Take a contribution that arrived whole; returns a refusal or None."""

    async def frozen_reply(self, key: Key, part: int) -> Reply | None:
        """Return the reply of a part reduced here, once it is frozen; None when the round ended without."""

    def parted_at(self, locator: tuple[bytes, ...]) -> bytes:
        """Return the first of these ids that our chain went through, or nothing."""

    def show_summed(self, wanted: AuditRequest, peer: bytes) -> bytes | str:
        """Return what a reply of ours is the sum of, or why it is refused."""

    def refuse_proof(self, header: ProofHeader, peer: bytes) -> str | None:
        """Return why a proof is refused before it is read, or None."""

    async def take_proof(self, header: ProofHeader, peer: bytes, read: Callable[[], Awaitable[bytes]]) -> None:
        """Read a proof and check it. Raises CallError when it does not come."""

    def hear_tip(self, peer: bytes, tip: Tip) -> None:
        """Hear where a peer stands."""

    async def offer_seals(self, wanted: SealsRequest) -> tuple[bytes, list[SignedSeal], int] | None:
        """Return what they continue, encoded, seals, and the chunks of the model; None: no seals are kept."""

    def open_file(self, root: bytes) -> PieceFile | None:
        """Return the file of the run that has this root, if it is here."""


class PeerServicer(ServicerBase):
    """What others may call."""

    def __init__(self, answering: AnsweringPeer, traffic: Traffic) -> None:
        self._answering, self._traffic = answering, traffic
        self._calls: Counter[bytes] = Counter()
        self._dial_back = DialBack(lambda peer: answering.seen_at(peer))
        self._amends = Allowance(AMENDS_PER_SECOND, AMENDS_BURST, loop_time)
        self._readers = Allowance(SEALS_PER_SECOND, SEALS_BURST, loop_time)
        self._outsiders_amends = Allowance(OUTSIDERS_AMENDS_PER_SECOND, OUTSIDERS_AMENDS_BURST, loop_time)

    async def rpc_hello(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """Which run this peer is in, and its manifest."""
        welcome = self._answering.welcome()
        if not self._admits(context):
            revocation = self._answering.revocation(context.remote_id.to_bytes())
            refusal = NOT_LISTED if revocation is None else REVOKED
            welcome = msgspec.structs.replace(welcome, manifest=b"", tip=None, refusal=refusal, revocation=revocation)
        else:
            decode_message(request.value, Hello)
        return self._traffic.message(welcome)

    async def rpc_dial(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """Try whether the caller can be dialled: where it calls from, and nowhere else."""
        if not self._admits(context):
            return self._traffic.message(Answer(NOT_LISTED))
        wanted, peer = decode_message(request.value, Dial), context.remote_id.to_bytes()
        return self._traffic.message(await self._dial_back.answer(peer, wanted))

    async def rpc_join(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """Ask to be admitted by the next seal."""
        if not self._admits(context):
            return self._traffic.message(Answer(NOT_LISTED))
        wanted = decode_message(request.value, JoinRequest)
        return self._traffic.message(Answer(self._answering.take_join(wanted, context.remote_id.to_bytes())))

    async def rpc_relay(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """Hear a seal, and pass it on."""
        if not self._admits(context):
            return self._traffic.message(Answer(NOT_LISTED))
        relay = decode_message(request.value, Relay)
        refusal = self._answering.wrong_run(relay.run_id)
        if refusal is None:
            self._answering.feed.take_relayed(context.remote_id.to_bytes(), relay.tip, relay.seal)
        return self._traffic.message(Answer(refusal or ""))

    async def rpc_amend(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """Hear whom the chain is to let in or to shut out."""
        peer = context.remote_id.to_bytes()
        free = self._amends.take(peer) and (self._admits(context) or self._outsiders_amends.take())
        if not free or len(request.value) > STATEMENTS_MAX_BYTES:
            return self._traffic.message(Answer(TOO_MANY_CALLS))
        return self._traffic.message(Answer(self._answering.take_statements(decode_message(request.value, Amend))))

    async def rpc_contribute(self, stream: AsyncIterator[BytesValue], context: P2PContext) -> AsyncIterator[BytesValue]:
        """A contribution for one part, answered with that part's reply once it is frozen."""
        async for frame in self._serve(context, lambda peer: self._contribute(stream, peer)):
            yield frame

    async def rpc_follow(self, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        """News of this peer's chain."""
        async for frame in self._serve(context, lambda peer: self._follow(request.value, peer)):
            yield frame

    async def rpc_rounds(self, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        """Sealed rounds from the journal."""
        async for frame in self._serve(context, lambda peer: self._rounds(request.value)):
            yield frame

    async def rpc_seals(self, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        """Seals without their replies, for observers."""
        async for frame in self._serve(context, lambda peer: self._seals(request.value, peer)):
            yield frame

    async def rpc_snapshot(self, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        """Pieces of a snapshot."""
        async for frame in self._serve(context, lambda peer: self._snapshot(request.value, peer)):
            yield frame

    async def rpc_file(self, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        """Pieces of a file of the run."""
        async for frame in self._serve(context, lambda peer: self._file(request.value, peer)):
            yield frame

    async def rpc_audit(self, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        """What this peer summed for a reply."""
        async for frame in self._serve(context, lambda peer: self._audit(request.value, peer)):
            yield frame

    async def rpc_prove(self, stream: AsyncIterator[BytesValue], context: P2PContext) -> AsyncIterator[BytesValue]:
        """A proof that a reducer lied."""
        async for frame in self._serve(context, lambda peer: self._prove(stream, peer)):
            yield frame

    # ---- what they do -----------------------------------------------------------------------------------------

    def _admits(self, context: P2PContext) -> bool:
        """Say whether the caller may have an answer; asked in every call but `amend`, before its request is read."""
        return self._answering.admits(context.remote_id.to_bytes())

    async def _serve(self, context: P2PContext, work: Callable[[bytes], Frames]) -> Frames:
        """Run one streaming call, of a peer that is admitted, within its share of calls."""
        if not self._admits(context):
            yield self._traffic.message(Answer(NOT_LISTED))
            return
        peer = context.remote_id.to_bytes()
        if self._calls[peer] >= CALLS_PER_PEER:
            yield self._traffic.message(Answer(TOO_MANY_CALLS))
            return
        self._calls[peer] += 1
        try:
            async for frame in work(peer):
                yield frame
        except (CallError, OSError) as error:
            _logger.debug("a call by %s came to nothing: %s", format_peer_id(peer), error)
        finally:
            self._calls[peer] -= 1
            if not self._calls[peer]:
                del self._calls[peer]

    async def _contribute(self, stream: AsyncIterator[BytesValue], peer: bytes) -> Frames:
        reader = FrameReader(stream, self._traffic, FRAME_SECONDS)
        header = await reader.message(ContributionHeader)
        clock = asyncio.get_running_loop().time
        began, seconds = clock(), 0.0
        refusal = self._answering.refuse(header, peer)
        if refusal is None and not header.row.weight:
            refusal = self._answering.take_contribution(header, peer, b"")
        # Who was late or came twice may still have the reply.
        if header.row.weight and not _unless_late(refusal):
            payload = await reader.blob(self._answering.contribution_max_bytes(header))
            seconds = clock() - began
            if refusal is None:
                refusal = self._answering.take_contribution(header, peer, payload)
        yield self._traffic.message(Arrived(_unless_late(refusal), int(1e6 * seconds)))
        if _unless_late(refusal):
            return
        reply = await self._answering.frozen_reply(Key(header.round, header.base), header.part)
        if reply is None:
            return
        done = asyncio.get_running_loop().create_future()
        self._answering.handing_out.add(done)
        try:
            with self._answering.handout.urgent():
                for number, frame in enumerate(self._traffic.blob(reply.data, pieces=2)):
                    if number == 2:
                        failpoint("reply_half_sent")
                    yield frame
        finally:
            self._answering.handing_out.discard(done)
            done.set_result(None)

    async def _follow(self, request: bytes, peer: bytes) -> Frames:
        wanted = decode_message(request, Follow)
        refusal = self._answering.wrong_run(wanted.run_id)
        if refusal is None:
            refusal = self._answering.feed.refusal(peer)
        yield self._traffic.message(Answer(refusal or ""))
        if refusal is None:
            self._answering.hear_tip(peer, wanted.tip)
            async for news in self._answering.feed.serve(peer):
                yield self._traffic.message(news)

    async def _rounds(self, request: bytes) -> Frames:
        wanted = decode_message(request, RoundsRequest)
        refusal = self._answering.wrong_run(wanted.run_id)
        yield self._traffic.message(Answer(refusal or ""))
        if refusal is not None:
            return
        ancestor, rounds, snapshots = await self._answering.catching_up.offer_rounds(wanted.locator)
        parted_at = b"" if ancestor else self._answering.parted_at(wanted.locator)
        yield self._traffic.message(RoundsHeader(ancestor, len(rounds), self._answering.tip, snapshots, parted_at))
        for encoded in rounds:
            for frame in self._traffic.blob(encoded):
                yield frame

    async def _seals(self, request: bytes, peer: bytes) -> Frames:
        wanted = decode_message(request, SealsRequest)
        refusal = self._answering.wrong_run(wanted.run_id)
        if refusal is None and not self._readers.take(peer):
            refusal = TOO_MANY_CALLS
        answer = None if refusal else await self._answering.offer_seals(wanted)
        if answer is None or len(answer[0]) > SEALS_OPENING_MAX_BYTES:
            yield self._traffic.message(Answer(refusal or "no seals are kept here"))
            return
        opening, seals, chunks = answer
        yield self._traffic.message(Answer(""))
        yield self._traffic.message(SealsHeader(opening, chunks, self._answering.tip))
        for frame in self._traffic.blob(msgspec.msgpack.encode(seals)):
            yield frame

    async def _snapshot(self, request: bytes, peer: bytes) -> Frames:
        wanted = decode_message(request, SnapshotRequest)
        refusal = self._answering.wrong_run(wanted.run_id)
        found = None
        if refusal is None:
            found = await self._answering.catching_up.open_snapshot(wanted.id, wanted.root)
        if found is None:
            yield self._traffic.message(Answer(refusal or "no such snapshot here any more"))
            return
        async for frame in self._pieces(found, wanted, peer):
            yield frame

    async def _file(self, request: bytes, peer: bytes) -> Frames:
        wanted = decode_message(request, FileRequest)
        refusal = self._answering.wrong_run(wanted.run_id)
        found = None if refusal else self._answering.open_file(wanted.root)
        if found is None:
            yield self._traffic.message(Answer(refusal or "no such file here"))
            return
        async for frame in self._pieces(found, wanted, peer):
            yield frame

    async def _pieces(self, found: PieceFile, wanted: SnapshotRequest | FileRequest, peer: bytes) -> Frames:
        numbers = range(wanted.first, wanted.end)
        at_once = HASHES_MAX if wanted.hashes else PIECES_A_CALL
        there = wanted.end <= found.pieces and len(numbers) <= at_once
        if not there or not (wanted.hashes or all(map(found.has, numbers))):
            yield self._traffic.message(Answer("not all of these pieces are here"))
            return
        held = self._traffic.message(PiecesHeld(found.held))
        if not numbers:
            yield self._traffic.message(Answer(""))
            yield held
            return
        with self._answering.handout.stream(peer) as going_on:
            yield self._traffic.message(Answer("" if going_on else TOO_MANY_CALLS))
            if going_on is None:
                return
            yield held
            if wanted.hashes:
                hashes = await self._answering.catching_up.hashes_of(found)
                async for frame in self._paced(b"".join(hashes[wanted.first : wanted.end]), going_on):
                    yield frame
                return
            for number in numbers:
                async for frame in self._paced(await asyncio.to_thread(found.read, number), going_on):
                    yield frame

    async def _audit(self, request: bytes, peer: bytes) -> Frames:
        wanted = decode_message(request, AuditRequest)
        shown = self._answering.show_summed(wanted, peer)
        yield self._traffic.message(Answer(shown if isinstance(shown, str) else ""))
        if isinstance(shown, str):
            return
        clock = asyncio.get_running_loop().time
        until = clock() + SHOWING_SECONDS
        async for frame in self._paced(shown, lambda: clock() < until):
            yield frame

    async def _prove(self, stream: AsyncIterator[BytesValue], peer: bytes) -> Frames:
        reader = FrameReader(stream, self._traffic, FRAME_SECONDS)
        header = await reader.message(ProofHeader)
        refusal = self._answering.refuse_proof(header, peer)
        yield self._traffic.message(Answer(refusal or ""))
        if refusal is None:
            await self._answering.take_proof(header, peer, lambda: reader.blob(PROOF_MAX_BYTES))
            yield self._traffic.message(Answer(""))

    async def _paced(self, data: bytes, going_on: Callable[[], bool]) -> Frames:
        """A blob at the pace of the handout, in frames small enough that none is long in coming."""
        for frame in self._traffic.blob(data, pieces=max(1, -(-len(data) // PACED_BYTES))):
            await self._answering.handout.pace(frame.ByteSize())
            if not going_on():
                raise CallError("it takes too long")
            yield frame


def _unless_late(refusal: str | None) -> str:
    """The refusal as it is answered: who comes late, or twice, is heard out."""
    return "" if refusal in (None, "late", "twice") else str(refusal)
