"""A newcomer gets the run's text while one honest peer hands it out, whatever the others do."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

sys.path.insert(0, str(Path(__file__).parents[1]))

import virtual
from virtual import FakeNode, Network, name_of

from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import Answer, BlobHeader, Traffic
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.errors import DataError
from p2ptrain.peer.corpus_download import DONORS_AT_ONCE, LOOK_SECONDS, CorpusDownload

RUN_ID = bytes(32)
TEXT = bytes(range(256)) * 8000
MAX_BYTES = len(TEXT)
Frames = AsyncIterator[BytesValue]
HONEST, OTHERS = name_of(99), [name_of(number) for number in range(6)]


class Donor:
    """What stands behind a servicer."""

    def __init__(self, text: bytes | None) -> None:
        self.text = text

    def admits(self, peer: bytes) -> bool:
        return True

    def wrong_run(self, run_id: bytes) -> str | None:
        return None

    def packed_corpus(self) -> bytes | None:
        return self.text


async def trickles(frames: Frames) -> Frames:
    """Half of its deadline for each byte: never silent for long enough, and never done."""
    await frames.aclose()  # type: ignore[attr-defined]
    yield Traffic().message(Answer(""))
    yield Traffic().message(BlobHeader(len(TEXT), bytes(32)))
    while True:
        await asyncio.sleep(4.0)
        yield BytesValue(value=b"x")


async def is_silent(frames: Frames) -> Frames:
    await asyncio.sleep(10_000)
    yield BytesValue()


async def hangs_up(frames: Frames) -> Frames:
    await frames.aclose()  # type: ignore[attr-defined]
    return
    yield


async def never_ends(frames: Frames) -> Frames:
    """More than it has announced."""
    await frames.aclose()  # type: ignore[attr-defined]
    yield Traffic().message(Answer(""))
    yield Traffic().message(BlobHeader(len(TEXT), bytes(32)))
    while True:
        await asyncio.sleep(0.01)
        yield BytesValue(value=bytes(256 * 1024))


async def announces_everything(frames: Frames) -> Frames:
    await frames.aclose()  # type: ignore[attr-defined]
    yield Traffic().message(Answer(""))
    yield Traffic().message(BlobHeader(2**40, bytes(32)))
    await asyncio.sleep(10_000)


def same_text(packed: bytes) -> None:
    if packed != TEXT:
        raise DataError("another text")


async def download(donors: dict[bytes, bytes | None], touch: dict[bytes, Callable[[Frames], Frames]]) -> Any:
    """(the text, seconds) of a newcomer that asks these in order."""
    network = Network(touch=touch)
    for peer, text in donors.items():
        donor: Any = Donor(text)
        network.servicers[peer] = PeerServicer(donor, Traffic())
    node: Any = FakeNode(network, name_of(50))

    async def reach(peer: bytes) -> None:
        await node.connect(peer, 5.0)

    calls = Client(node, Traffic(), RUN_ID)
    found = await CorpusDownload(calls, reach, MAX_BYTES, same_text, lambda done, of: None).run(list(donors))
    asking = [task for task in asyncio.all_tasks() if "CorpusDownload" in repr(task.get_coro())]
    assert asking == [], "nobody is asked any more"
    return found, asyncio.get_running_loop().time()


@pytest.mark.parametrize("misbehaves", [trickles, is_silent, hangs_up, never_ends, announces_everything])
def test_however_many_misbehave_the_honest_one_is_asked(misbehaves: Callable[[Frames], Frames]) -> None:
    donors = {**dict.fromkeys(OTHERS, TEXT), HONEST: TEXT}
    found, seconds = virtual.run(download(donors, dict.fromkeys(OTHERS, misbehaves)))
    assert found == TEXT
    assert seconds <= (len(OTHERS) + 1) * (LOOK_SECONDS + 1), "a moment for each of them"


def test_who_sends_another_text_is_passed_over() -> None:
    found, seconds = virtual.run(download({**dict.fromkeys(OTHERS, TEXT[:-1] + b"!"), HONEST: TEXT}, {}))
    assert found == TEXT and seconds < 1


def test_where_all_send_another_text_that_is_said() -> None:
    with pytest.raises(DataError, match="another text"):
        virtual.run(download(dict.fromkeys(OTHERS, b"another"), {}))


def test_where_nobody_has_it_nobody_is_blamed() -> None:
    assert virtual.run(download(dict.fromkeys(OTHERS), {}))[0] is None


def test_a_slow_honest_donor_is_waited_for_when_it_is_the_last() -> None:
    async def slow(frames: Frames) -> Frames:
        async for frame in frames:
            await asyncio.sleep(7.0)
            yield frame

    found, _ = virtual.run(download({**dict.fromkeys(OTHERS[:DONORS_AT_ONCE], None), HONEST: TEXT}, {HONEST: slow}))
    assert found == TEXT
