"""What peers say to each other, as msgpack in frames of at most `PIECE_BYTES` and a header.

Every stream is frames; a frame is a message or a piece of a blob. A blob is announced with its length and SHA-256, so a
stream that ends early, which libp2p does not tell from one that ends well, is noticed. Nothing is buffered beyond the
length that the reader allows, and no reader waits for a frame longer than its timeout.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from msgspec import Meta

from p2ptrain.chain import ChainState, Hash, OptionalHash, Row, SignedSeal
from p2ptrain.chain.admission import AMENDMENTS_MAX, Revocation, Statement
from p2ptrain.chain.signatures import Signature
from p2ptrain.swarm.line import Line

NAMESPACE = "p2ptrain"
PIECE_BYTES = 256 * 1024
LOCATOR_MAX = 16
ROUNDS_MAX = 64
"""Sealed rounds in one answer."""
SNAPSHOTS_MAX = 8
PIECES_MAX = 2**20
"""Of a snapshot, or of a file of the run."""
HASHES_MAX = 16 * 1024
"""Hashes of pieces in one answer: as long as a piece."""
TOO_MANY_CALLS = "too many calls at once"
TOO_MANY_FOLLOWERS = "too many follow this peer already"
"""The refusal that means: later."""
NOT_LISTED = "this run is for listed peers only"
"""The refusal of every call of an outsider: of a peer that the run is not for, or that its owner has revoked."""
REVOKED = "the run's owner has revoked this peer"
"""The same in the answer to `hello`, where a revocation is the reason."""
KNOWN_ALREADY = "the chain has this already"
"""The answer to statements that are all on the chain."""
SEALS_OPENING_MAX_BYTES = 200 * 1024
"""Of the state of a chain: more than one of a thousand members takes, and less than a frame."""
SEALS_MAX_BYTES = 1024 * 1024
"""Of seals in one answer."""
STATEMENTS_MAX_BYTES = 8 * 1024
"""In one `amend`; more than `AMENDMENTS_MAX` grants take."""
_FRAME_OVERHEAD_BYTES = 9  # length and marker that hivemind puts before each message

TRANSPORT_FAILURES = (
    P2PHandlerError,
    P2PDaemonError,
    OSError,
    EOFError,
    TimeoutError,
    ValueError,
    TypeError,
    DecodeError,
)
"""What hivemind, its daemon and our limits raise when a call fails, or when what comes is no frame.

Caught around hivemind's own operations alone, so that a fault of our own is never taken for a bad peer."""

Round = Annotated[int, Meta(ge=0, le=2**48)]
Total = Annotated[int, Meta(ge=0, le=2**62)]


class CallError(Exception):
    """A call that failed: nobody there, silence, or nonsense."""


class RefusedError(CallError):
    """The other side says no, and why."""


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages: arrays, of exactly their fields."""


class Tip(_Message, frozen=True):
    """Where a peer's chain stands."""

    round: Round
    id: Hash
    total: Total

    @classmethod
    def of(cls, head: ChainState) -> Tip:
        """Return the tip of a peer whose chain is at `head`."""
        return cls(head.round, head.id, head.total)


class Hello(_Message, frozen=True):
    """What a peer is asked first."""

    protocol: int


class Welcome(_Message, frozen=True):
    """Answer to `Hello`: the run that this peer is in; with a refusal neither manifest nor tip.

    Whoever is refused because of a revocation is shown it, as no peer but the owner can make that up.
    """

    protocol: int
    run_id: Hash
    manifest: Annotated[bytes, Meta(max_length=16 * 1024)]
    tip: Tip | None
    refusal: Annotated[str, Meta(max_length=200)]
    revocation: Revocation | None = None


class ContributionHeader(_Message, frozen=True):
    """First frame of a contribution; a blob, the payload, follows where the weight is above 0."""

    run_id: Hash
    round: Round
    base: Hash
    part: Annotated[int, Meta(ge=0, le=1024)]
    row: Row
    signature: Signature
    root_round: Round
    root: OptionalHash
    tip: Tip


class Answer(_Message, frozen=True):
    """Accepted where `refusal` is empty."""

    refusal: Annotated[str, Meta(max_length=200)]


class Arrived(_Message, frozen=True):
    """The answer to a contribution, when it is refused or there."""

    refusal: Annotated[str, Meta(max_length=200)]
    #: from header to payload, by the receiver's clock
    microseconds: Annotated[int, Meta(ge=0, le=2**40)] = 0


class BlobHeader(_Message, frozen=True):
    """Announces a blob."""

    length: Annotated[int, Meta(ge=0, le=2**40)]
    sha256: Hash


class Follow(_Message, frozen=True):
    """Asks for news until the caller hangs up."""

    run_id: Hash
    tip: Tip


class News(_Message, frozen=True):
    """The tip, at each change and at least once a second; with the seal where the sender made it."""

    tip: Tip
    seal: SignedSeal | None
    leaving: bool


class Relay(_Message, frozen=True):
    """A seal on its way down its sealer's tree."""

    run_id: Hash
    tip: Tip
    """Of whoever passes it on."""
    seal: SignedSeal


class RoundsRequest(_Message, frozen=True):
    """Asks for the sealed rounds after the first of these ids that the donor keeps."""

    run_id: Hash
    locator: Annotated[tuple[Hash, ...], Meta(max_length=LOCATOR_MAX)]


class SnapshotOffer(_Message, frozen=True):
    """A snapshot that the donor has, whose root is sealed."""

    round: Round
    id: Hash
    root: Hash
    length: Annotated[int, Meta(ge=0, le=2**40)]


class RoundsHeader(_Message, frozen=True):
    """Answer to `RoundsRequest`; `count` blobs follow, each a sealed round."""

    ancestor: OptionalHash
    count: Annotated[int, Meta(ge=0, le=ROUNDS_MAX)]
    tip: Tip
    snapshots: Annotated[tuple[SnapshotOffer, ...], Meta(max_length=SNAPSHOTS_MAX)]
    parted_at: OptionalHash = b""
    """Without an ancestor: the first of the ids asked with that the donor's chain went through, as it remembers."""


class JoinRequest(_Message, frozen=True):
    """Asks to be admitted by the next seal."""

    run_id: Hash
    row: Row


class Dial(_Message, frozen=True):
    """Asks to be dialled, at the address that this connection comes from, by a connection of its own."""

    port: Annotated[int, Meta(ge=1, le=65535)]


class Dialled(_Message, frozen=True):
    """Answer to `Dial`: where, and why nobody greets there, or ""."""

    address: Annotated[str, Meta(max_length=64)]
    failure: Annotated[str, Meta(max_length=200)]


class Amend(_Message, frozen=True):
    """Hands over statements for the chain: whom to let in, or to shut out. Each is checked by itself."""

    run_id: Hash
    statements: Annotated[tuple[Statement, ...], Meta(min_length=1, max_length=AMENDMENTS_MAX)]


class SnapshotRequest(_Message, frozen=True):
    """Asks for pieces [first, end) of a snapshot, or for their hashes; without any, which pieces the donor holds."""

    run_id: Hash
    id: Hash
    root: Hash
    first: Annotated[int, Meta(ge=0, le=PIECES_MAX)]
    end: Annotated[int, Meta(ge=0, le=PIECES_MAX)]
    hashes: bool


class FileRequest(_Message, frozen=True):
    """Asks for pieces [first, end) of a file of the run, or for their hashes; without any, whether the donor has it."""

    run_id: Hash
    root: Hash
    first: Annotated[int, Meta(ge=0, le=PIECES_MAX)]
    end: Annotated[int, Meta(ge=0, le=PIECES_MAX)]
    hashes: bool


class PiecesHeld(_Message, frozen=True):
    """Answer to `SnapshotRequest` and `FileRequest`; the hashes follow as one blob, or the pieces, a blob each."""

    held: Annotated[bytes, Meta(max_length=PIECES_MAX // 8)]
    """Bitmap, least significant bit first; empty: all."""


class SealsRequest(_Message, frozen=True):
    """Asks for seals without their replies: those after a state, or of the newest rounds."""

    run_id: Hash
    round: Round
    known: OptionalHash
    """Id of a state at `round` that the caller stands at; empty: none."""
    newest: Round
    """Rounds that are wanted where `known` is none of the donor's; 0: all."""


class SealsHeader(_Message, frozen=True):
    """Answer to `SealsRequest`; a blob follows: the seals, one msgpack array."""

    opening: Annotated[bytes, Meta(max_length=SEALS_OPENING_MAX_BYTES)]
    """The state that they continue, encoded; empty: the one that the caller named."""
    chunks: Annotated[int, Meta(ge=1, le=2**40)]
    """Of the model."""
    tip: Tip


class AuditRequest(_Message, frozen=True):
    """Asks a reducer for the contributions that it summed for one of its replies, as one blob."""

    run_id: Hash
    reply: Hash


class ProofHeader(_Message, frozen=True):
    """Announces a proof that convicts a reducer; a blob, the proof, follows once this is accepted."""

    run_id: Hash
    proof: Hash


M = TypeVar("M", bound=_Message)
_encoder = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class Traffic:
    """Bytes on the wire, framing included."""

    sent: int = 0
    received: int = 0
    line: Line | None = None
    """Limits the length of frames, and when much may be asked for; None: nothing does."""

    async def admit(self, size_bytes: int) -> None:
        """Wait until so many bytes may be asked for."""
        if self.line is not None:
            await self.line.admit(size_bytes)

    def frame(self, data: bytes) -> BytesValue:
        """A frame to be sent, counted."""
        frame = BytesValue(value=data)
        self.sent += frame.ByteSize() + _FRAME_OVERHEAD_BYTES
        return frame

    def message(self, message: _Message) -> BytesValue:
        """A message as a frame to be sent, counted."""
        return self.frame(_encoder.encode(message))

    def blob(self, data: bytes, *, pieces: int = 1) -> Iterator[BytesValue]:
        """A blob as frames to be sent: its header, then at least `pieces` pieces if it is long enough."""
        yield self.message(BlobHeader(len(data), hashlib.sha256(data).digest()))
        most = PIECE_BYTES if self.line is None else self.line.frame_bytes
        size = max(1, min(most, -(-len(data) // pieces)))
        for start in range(0, len(data), size):
            yield self.frame(data[start : start + size])


def decode_message(data: bytes, kind: type[M]) -> M:
    """Read one message. Raises CallError."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        # A text that is not UTF-8 is a ValueError.
        raise CallError(f"not a {kind.__name__}: {error}") from error


class FrameReader:
    """Reads frames that somebody else sends.

    Args:
        frames: hivemind's iterator.
        traffic: counts them.
        timeout_seconds: silence that ends the call.
    """

    def __init__(self, frames: AsyncIterator[BytesValue], traffic: Traffic, timeout_seconds: float) -> None:
        self._frames, self._traffic, self._timeout_seconds = frames, traffic, timeout_seconds

    async def frame(self, timeout_seconds: float | None = None) -> bytes:
        """The next frame. Raises CallError when none comes."""
        try:
            async with asyncio.timeout(timeout_seconds or self._timeout_seconds):
                frame = await anext(self._frames)
        except TimeoutError as error:
            raise CallError("silence") from error
        except StopAsyncIteration as error:
            raise CallError("the stream ended early") from error
        except TRANSPORT_FAILURES as error:
            raise CallError(str(error) or type(error).__name__) from error
        self._traffic.received += frame.ByteSize() + _FRAME_OVERHEAD_BYTES
        return frame.value

    async def message(self, kind: type[M], timeout_seconds: float | None = None) -> M:
        """The next frame as a message. Raises CallError."""
        return decode_message(await self.frame(timeout_seconds), kind)

    async def accepted(self, timeout_seconds: float | None = None) -> None:
        """The next frame as an answer. Raises RefusedError, CallError."""
        answer = await self.message(Answer, timeout_seconds)
        if answer.refusal:
            raise RefusedError(answer.refusal)

    async def blob(
        self, max_bytes: int, timeout_seconds: float | None = None, progress: Callable[[int, int], None] | None = None
    ) -> bytes:
        """The next blob. `timeout_seconds` is for its header alone; `progress` hears (bytes so far, of). CallError."""
        header = await self.message(BlobHeader, timeout_seconds)
        if header.length > max_bytes:
            raise CallError(f"{header.length} bytes announced, at most {max_bytes} are taken")
        data = bytearray()
        while len(data) < header.length:
            piece = await self.frame()
            if not piece or len(data) + len(piece) > header.length:
                raise CallError("pieces do not add up to what was announced")
            data += piece
            if progress is not None:
                progress(len(data), header.length)
        if hashlib.sha256(data).digest() != header.sha256:
            raise CallError("what came does not have the hash announced")
        return bytes(data)
