"""A newcomer waits for the run's rounds while anybody has them, and for no single peer that it was told."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from google.protobuf.wrappers_pb2 import BytesValue

sys.path.insert(0, str(Path(__file__).parents[1]))

import virtual
from lone import MANIFEST, identity_of

from p2ptrain.calls.client import SECONDS
from p2ptrain.calls.messages import Traffic, Welcome
from p2ptrain.config.manifest import PROTOCOL_VERSION, open_manifest, sign_manifest
from p2ptrain.errors import UnreachableError
from p2ptrain.peer.joining import SILENCE_SECONDS, await_chain, find_run
from p2ptrain.swarm.identity import format_peer_id


class Newcomer:
    """What it hears, and what it shows."""

    def __init__(self) -> None:
        self.feed: Any = SimpleNamespace(heard_at=-math.inf, furthest=0)
        self.round, self.fetched_at = 0, -math.inf
        #: virtual seconds, and the line shown then
        self.said: list[tuple[float, str]] = []

    async def wait(self, last_round: int = 0) -> float:
        """Wait for the chain, and return how long it took or what ended it and when."""
        now = asyncio.get_running_loop().time
        manifest = msgspec.structs.replace(MANIFEST, last_round=last_round)
        await await_chain(
            manifest,
            self.feed,
            lambda: self.round,
            lambda: self.fetched_at,
            lambda line: self.said.append((round(now()), line)),
        )
        return now()

    async def gives_up(self, last_round: int = 0) -> tuple[float, UnreachableError]:
        with pytest.raises(UnreachableError) as caught:
            await self.wait(last_round)
        return asyncio.get_running_loop().time(), caught.value


def at(seconds: float, what: Any) -> None:
    asyncio.get_running_loop().call_later(seconds, what)


def test_where_nobody_has_a_round_it_says_so_and_gives_up() -> None:
    newcomer = Newcomer()
    ended, error = virtual.run(newcomer.gives_up())
    assert SILENCE_SECONDS <= ended < SILENCE_SECONDS + 2
    assert [when for when, _ in newcomer.said] == [10, 40, 70, 100, 130, 160]
    assert "no answer for 40 s" in newcomer.said[1][1] and "after 180 s" in newcomer.said[1][1]
    assert error.exit_code == 5
    assert "no answer from" in str(error) and "p2ptrain join ADDR" in error.hint


def test_with_the_first_round_it_waits_no_more_and_has_said_nothing() -> None:
    newcomer = Newcomer()

    async def scenario() -> float:
        at(5, lambda: setattr(newcomer, "round", 7))
        return await newcomer.wait()

    assert 5 <= virtual.run(scenario()) < 7
    assert newcomer.said == []


def test_silence_counts_from_the_last_sign_of_life() -> None:
    newcomer = Newcomer()

    def hear() -> None:
        newcomer.feed.heard_at, newcomer.feed.furthest = asyncio.get_running_loop().time(), 57

    async def scenario() -> tuple[float, UnreachableError]:
        for seconds in range(1, 401):
            at(seconds, hear)
        return await newcomer.gives_up()

    ended, _ = virtual.run(scenario())
    assert 400 + SILENCE_SECONDS <= ended < 402 + SILENCE_SECONDS
    assert "up to round 57" in newcomer.said[0][1]


def test_a_slow_download_is_a_sign_of_life_and_speaks_for_itself() -> None:
    newcomer = Newcomer()

    def piece() -> None:
        newcomer.fetched_at = asyncio.get_running_loop().time()

    async def scenario() -> float:
        for seconds in range(2, 1000, 8):
            at(seconds, piece)
        at(1000, lambda: setattr(newcomer, "round", 7))
        return await newcomer.wait()

    assert 1000 <= virtual.run(scenario()) < 1002
    assert newcomer.said == []


@pytest.mark.parametrize(("furthest", "finished"), [(7, False), (8, True)])
def test_that_a_run_had_ended_is_said(furthest: int, finished: bool) -> None:
    newcomer = Newcomer()
    newcomer.feed.furthest = furthest
    _, error = virtual.run(newcomer.gives_up(last_round=8))
    assert ("is finished" in str(error)) == finished
    assert error.hint


class Network:
    """A node whose calls are answered by one honest peer, and by nobody else for as long as the caller waits."""

    peer_id = identity_of("newcomer").peer_id

    def __init__(self, honest: bytes, welcome: Welcome) -> None:
        self._honest, self._welcome = honest, welcome

    async def connect(self, peer: bytes, addresses: list[str]) -> None:
        pass

    async def read_runs(self) -> dict[bytes, Any]:
        return {}

    def stub(self, servicer: type, peer: bytes, namespace: str) -> Any:
        async def hello(request: BytesValue, timeout: float) -> BytesValue:
            async with asyncio.timeout(timeout):
                if peer != self._honest:
                    await asyncio.Event().wait()
                return Traffic().message(self._welcome)

        return SimpleNamespace(rpc_hello=hello)


def test_addresses_of_silent_peers_keep_a_newcomer_waiting_no_longer_than_one_does() -> None:
    peers = [identity_of(f"peer {number}").peer_id for number in range(8)]
    addresses = [f"/ip4/127.0.0.1/tcp/9/p2p/{format_peer_id(peer)}" for peer in peers]
    owner = identity_of("owner")
    signed = sign_manifest(MANIFEST, owner.key, format_peer_id(owner.peer_id))
    welcome = Welcome(PROTOCOL_VERSION, open_manifest(signed)[1], signed, None, "")
    node: Any = Network(peers[-1], welcome)

    async def joins() -> tuple[bytes, float]:
        return await find_run(node, addresses, None), asyncio.get_running_loop().time()

    assert virtual.run(joins()) == (signed, SECONDS)
