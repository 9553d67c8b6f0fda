"""Claims: however many ask for the text, it is packed once at a time, beside the threads that reduce."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from p2ptrain.calls.downloads import DOWNLOADS_MAX, DOWNLOADS_PER_PEER
from p2ptrain.calls.messages import TOO_MANY_CALLS, DataRequest, FrameReader, RefusedError, Traffic
from p2ptrain.calls.servicer import CALLS_PER_PEER, PeerServicer

RUN_ID = bytes(32)


class Packer:
    """The peer behind the calls: packs until it is let go on."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.packings = self.at_once = self.most_at_once = 0

    def wrong_run(self, run_id: bytes) -> str | None:
        return None

    def admits(self, peer: bytes) -> bool:
        return True

    def packed_corpus(self) -> bytes | None:
        self.packings += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.release.wait(10)
        self.at_once -= 1
        return b"the text"


async def asks(servicer: PeerServicer, peer: bytes) -> bytes | str:
    """The text, or the refusal."""
    context: Any = SimpleNamespace(remote_id=SimpleNamespace(to_bytes=lambda: peer))
    frames = servicer.rpc_data(Traffic().message(DataRequest(RUN_ID)), context)
    reader = FrameReader(frames, Traffic(), 10)
    try:
        await reader.accepted()
        text = await reader.blob(100)
        assert [frame async for frame in frames] == []
        return text
    except RefusedError as error:
        return str(error)


def test_many_who_ask_for_the_text_are_few_and_leave_the_threads_that_reduce_alone() -> None:
    async def scenario() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        packer = Packer()
        servicer = PeerServicer(packer, Traffic())  # type: ignore[arg-type]
        peers = [bytes([number]) * 38 for number in range(16)]
        calls = [asyncio.create_task(asks(servicer, peer)) for peer in peers for _ in range(CALLS_PER_PEER)]
        try:
            # Reducing goes on meanwhile.
            assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 2) == 1
        finally:
            packer.release.set()
        answers = await asyncio.gather(*calls)
        assert answers.count(b"the text") == DOWNLOADS_MAX
        assert set(answers) == {b"the text", TOO_MANY_CALLS}
        assert all(
            answers[n * CALLS_PER_PEER :][:CALLS_PER_PEER].count(b"the text") <= DOWNLOADS_PER_PEER for n in range(16)
        )
        assert packer.packings == packer.most_at_once == 1
        assert await asks(servicer, peers[0]) == b"the text", "places are free again"

    asyncio.run(scenario())


def test_a_text_that_cannot_be_packed_is_an_end_and_the_next_asks_anew() -> None:
    async def scenario() -> None:
        packer = Packer()
        servicer = PeerServicer(packer, Traffic())  # type: ignore[arg-type]
        packer.packed_corpus = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        with pytest.raises(ZeroDivisionError):
            await asks(servicer, bytes(38))
        del packer.packed_corpus
        packer.release.set()
        assert await asks(servicer, bytes(38)) == b"the text"

    asyncio.run(scenario())
