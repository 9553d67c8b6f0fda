"""A network thread for each test, and proof that the test left neither daemons nor sockets behind."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.thread import NetworkThread


class Swarm:
    """Nodes on the loopback of one network thread; all are closed at the end of the test."""

    def __init__(self, network: NetworkThread) -> None:
        self.network = network
        self.nodes: list[SwarmNode] = []

    def run(self, scenario: Coroutine[Any, Any, None]) -> None:
        self.network.run(scenario, 90)

    async def eventually(self, condition: Callable[[], bool], seconds: float = 15.0) -> None:
        """Waits until `condition` holds; fails after `seconds`."""

        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.02)

        await asyncio.wait_for(poll(), seconds)

    async def node(self, *initial: SwarmNode, identity_path: Path | None = None, **settings: Any) -> SwarmNode:
        addresses = [address for peer in initial for address in await peer.join_addresses()]
        node = await SwarmNode.create(identity_path, addresses, **settings)
        self.nodes.append(node)
        return node

    async def close(self) -> None:
        for node in self.nodes:
            await node.close()


class PeerProcess:
    """`peer_process.py`, with what it reported in `report`."""

    def __init__(self, *arguments: str) -> None:
        script = Path(__file__).with_name("peer_process.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.report = json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate(timeout=20)


@pytest.fixture
def sockets_in(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    # pytest makes its own directory when first asked: not inside ours, which goes with the test.
    tmp_path_factory.getbasetemp()
    # Short, as sockets need it, and for this test alone.
    directory = Path(tempfile.mkdtemp(prefix="p2ptest-", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def swarm(sockets_in: Path) -> Iterator[Swarm]:
    network = NetworkThread()
    swarm = Swarm(network)
    yield swarm
    try:
        network.run(swarm.close(), 60)
    finally:
        network.stop()
        left_behind = [
            child
            for child in psutil.Process().children(recursive=True)
            if child.status() != psutil.STATUS_ZOMBIE and child.name() in ("p2pd", "sh")
        ]
        command_lines = [child.cmdline() for child in left_behind]
        # The next test is not to blame for them.
        for child in left_behind:
            child.kill()
    assert command_lines == []
    assert list(sockets_in.glob("p2ptrain-*")) == []


@pytest.fixture
def peer_process(sockets_in: Path) -> Iterator[Callable[..., PeerProcess]]:
    started: list[PeerProcess] = []

    def start(*arguments: str) -> PeerProcess:
        started.append(PeerProcess(*arguments))
        return started[-1]

    yield start
    for peer in started:
        peer.close()
