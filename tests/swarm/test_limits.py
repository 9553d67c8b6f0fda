"""An upload limit on a real daemon, measured by what `ss` says of its sockets and by what arrives at the other side."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, AsyncIterator  # noqa: UP035 - hivemind knows a stream by this type alone

import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2PContext, ServicerBase

from p2ptrain.state.transfer import MonthlyTransfer
from p2ptrain.swarm.line import Allowed, Line

if TYPE_CHECKING:
    from conftest import Swarm

LIMIT_BYTES = 125_000  # a second: 1Mbit
FRAME_BYTES = 12_000
"""As long as a line with this limit has its frames, see `FRAME_SECONDS`."""
WINDOW_SECONDS = 10.0
SECONDS = 15.0


class Calls(ServicerBase):
    """Calls by the names that peers use, without end."""

    def __init__(self, frame_bytes: int) -> None:
        self.frame_bytes = frame_bytes
        #: bytes that came
        self.contributed = 0

    async def rpc_contribute(self, stream: AsyncIterator[BytesValue], context: P2PContext) -> AsyncIterator[BytesValue]:
        async for frame in stream:
            self.contributed += len(frame.value)
        yield BytesValue()

    async def rpc_snapshot(self, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        while True:
            yield BytesValue(value=bytes(self.frame_bytes))


def wire_sent(pid: int) -> int:
    """What a process's TCP sockets have sent, headers included, in the words of iproute2."""
    sent = 0
    for line in subprocess.run(["ss", "-tinpHO"], check=True, capture_output=True, text=True).stdout.splitlines():
        if f"pid={pid}," in line:
            found = {key: int(value) for key, value in re.findall(r"\b(bytes_sent|segs_out):(\d+)", line)}
            sent += found.get("bytes_sent", 0) + 52 * found.get("segs_out", 0)
    return sent


@pytest.mark.skipif(shutil.which("ss") is None, reason="needs ss of iproute2")
@pytest.mark.parametrize("late", [False, pytest.param(True, marks=pytest.mark.long)])
def test_an_upload_limit_holds_on_the_wire_and_contributions_go_before_downloads(
    swarm: Swarm, tmp_path: Path, late: bool
) -> None:
    """`late`: the owner sets it while the streams are open."""

    async def scenario() -> None:
        transfer = MonthlyTransfer(tmp_path / "transfer.json", time.time())
        line = Line(Allowed(upload_rate=0 if late else LIMIT_BYTES), transfer)
        limited = await swarm.node(line=line)
        other = await swarm.node(limited)
        here, there = Calls(FRAME_BYTES), Calls(FRAME_BYTES)
        await limited.add_servicer(here, "run")
        await other.add_servicer(there, "run")

        async def contribution() -> AsyncIterator[BytesValue]:
            yield BytesValue()  # a header is short
            while True:
                yield BytesValue(value=bytes(FRAME_BYTES))

        async def contribute() -> None:
            answers = await limited.stub(Calls, other.peer_id, "run").rpc_contribute(contribution())
            async for _ in answers:
                pass

        downloaded = 0

        async def download() -> None:
            nonlocal downloaded
            async for frame in await other.stub(Calls, limited.peer_id, "run").rpc_snapshot(BytesValue()):
                downloaded += len(frame.value)

        tasks = [asyncio.create_task(contribute()), asyncio.create_task(download())]
        if late:
            while not downloaded or not there.contributed:
                await asyncio.sleep(0.05)
            line.limit(Allowed(upload_rate=LIMIT_BYTES))
            # What the daemon and the kernel have taken goes out, and counts for the first window.
            await asyncio.sleep(WINDOW_SECONDS)
            downloaded = there.contributed = transfer.sent_bytes = 0
        seen: list[tuple[float, int]] = []
        began = time.monotonic()
        while time.monotonic() < began + SECONDS:
            seen.append((time.monotonic(), await asyncio.to_thread(wire_sent, limited.daemon_pid)))
            assert not any(task.done() for task in tasks), tasks
            await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

        rates = [
            (sent - before) / (when - since)
            for i, (since, before) in enumerate(seen)
            for when, sent in seen[i:]
            if when - since >= WINDOW_SECONDS
        ]
        assert max(rates) <= 1.05 * LIMIT_BYTES
        assert max(rates) >= 0.8 * LIMIT_BYTES  # and it is used
        # A frame of what others download waits eight seconds, where a round's go on.
        assert 0 < downloaded < 0.1 * there.contributed
        counted_from = seen[0][1] if late else 0
        assert transfer.sent_bytes == pytest.approx(seen[-1][1] - counted_from, rel=0.05)

    swarm.run(scenario())
