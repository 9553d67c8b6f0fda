"""Frames, blobs and messages: what does not add up ends the call, in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import BytesValue
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.calls import messages
from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import PIECE_BYTES, CallError, FrameReader, Hello, RefusedError, Tip, Traffic
from p2ptrain.swarm.node import SwarmNode

KINDS = [kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, messages._Message)]


async def stream(frames: Iterable[BytesValue], *, hangs: bool = False) -> AsyncIterator[BytesValue]:
    for frame in frames:
        yield frame
    if hangs:
        await asyncio.Event().wait()


def read(frames: Iterable[BytesValue], what: str, *arguments: Any, hangs: bool = False) -> Any:
    """Call one of the reader's methods on these frames."""

    async def main() -> Any:
        return await getattr(FrameReader(stream(frames, hangs=hangs), Traffic(), 0.05), what)(*arguments)

    return asyncio.run(main())


@given(st.integers(0, 3 * PIECE_BYTES), st.integers(1, 4))
def test_a_blob_survives_in_at_least_as_many_pieces_as_asked(length: int, pieces: int) -> None:
    data = bytes(length)
    frames = list(Traffic().blob(data, pieces=pieces))
    assert len(frames) > min(pieces, length)
    assert read(frames, "blob", length) == data


def test_a_blob_that_does_not_add_up_ends_the_call() -> None:
    data = b"x" * (PIECE_BYTES + 5)
    header, *pieces = Traffic().blob(data)
    wrong = BytesValue(value=b"y" * len(pieces[-1].value))
    for frames, why in (
        ([header, pieces[0]], "ended early"),
        ([header, pieces[0], wrong], "hash"),
        ([header, pieces[0], BytesValue(value=b"")], "add up"),
        ([header, pieces[0], pieces[0]], "add up"),
        ([], "ended early"),
    ):
        with pytest.raises(CallError, match=why):
            read(frames, "blob", len(data))


def test_a_blob_longer_than_is_taken_is_refused_by_its_header() -> None:
    with pytest.raises(CallError, match="at most 9"):
        read(list(Traffic().blob(b"x" * 10))[:1], "blob", 9)


def test_silence_ends_the_call() -> None:
    header, *_ = Traffic().blob(b"x" * 10)
    with pytest.raises(CallError, match="silence"):
        read([header], "blob", 10, hangs=True)


def test_a_refusal_names_its_reason() -> None:
    with pytest.raises(RefusedError, match="too late"):
        read([Traffic().message(messages.Answer("too late"))], "accepted")


def test_what_is_sent_and_received_is_counted_alike() -> None:
    sender, receiver = Traffic(), Traffic()
    frames = [sender.message(Hello(1)), *sender.blob(b"x" * 1000)]

    async def main() -> None:
        reader = FrameReader(stream(frames), receiver, 1.0)
        await reader.message(Hello)
        await reader.blob(1000)

    asyncio.run(main())
    assert sender.sent == receiver.received > 1000


@given(st.sampled_from(KINDS), st.binary(max_size=300))
def test_noise_is_no_message(kind: type[Any], data: bytes) -> None:
    try:
        messages.decode_message(data, kind)
    except CallError:
        return
    assert kind is messages._Message or len(data) > 0


def test_out_of_bounds_is_no_message() -> None:
    for bad in ([-1, bytes(32), 0], [0, bytes(31), 0], [0, bytes(32)], [0, bytes(32), 0, 0], {"round": 1}):
        with pytest.raises(CallError):
            messages.decode_message(messages._encoder.encode(bad), Tip)


class _Node:
    """A node whose only call is answered by `frames`."""

    def __init__(self, frames: AsyncIterator[BytesValue]) -> None:
        self._frames = frames

    def stub(self, *_: object) -> Any:
        async def rpc_rounds(request: BytesValue) -> AsyncIterator[BytesValue]:
            return self._frames

        return SimpleNamespace(rpc_rounds=rpc_rounds)


@pytest.mark.parametrize(
    "failure",
    [ValueError("a frame too long"), TypeError("Invalid Protobuf message type"), DecodeError("no frame"), EOFError()],
)
def test_whatever_a_stranger_sends_in_place_of_a_frame_is_a_failed_call(failure: Exception) -> None:
    async def frames() -> AsyncIterator[BytesValue]:
        raise failure
        yield BytesValue()

    async def main() -> None:
        await FrameReader(frames(), Traffic(), 1.0).frame()

    with pytest.raises(CallError):
        asyncio.run(main())


def test_a_fault_of_our_own_is_not_taken_for_a_bad_peer() -> None:
    async def main() -> None:
        calls = Client(cast(SwarmNode, _Node(stream([]))), Traffic(), bytes(32))
        async with calls._stream(b"", "rpc_rounds", BytesValue()):
            raise ValueError("a fault of our own")

    with pytest.raises(ValueError, match="of our own"):
        asyncio.run(main())


def test_a_call_that_takes_too_long_as_a_whole_is_a_failed_call() -> None:
    async def main() -> None:
        calls = Client(cast(SwarmNode, _Node(stream([], hangs=True))), Traffic(), bytes(32))
        async with calls._stream(b"", "rpc_rounds", BytesValue()) as reader, asyncio.timeout(0.01):
            await reader.frame()

    with pytest.raises(CallError):
        asyncio.run(main())


def test_a_text_that_is_no_utf8_is_no_message() -> None:
    for broken in (b"\x91\xa2\xff\xfe", b"\x91\xa1\x80", b"\x91\xa3\xed\xa0\x80"):
        with pytest.raises(CallError, match="not a Answer"):
            messages.decode_message(broken, messages.Answer)
