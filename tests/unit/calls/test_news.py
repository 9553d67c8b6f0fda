"""Claims: whoever hears a peer's news can count on being heard by it, and nobody takes the dead for living."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import virtual

from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import TOO_MANY_CALLS, TOO_MANY_FOLLOWERS, Tip, Traffic
from p2ptrain.calls.news import ATTEMPTS, RETRY_SECONDS, SEALS_BURST, NewsFeed
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.chain import SealError, SignedSeal
from p2ptrain.rounds.events import TipHeard

RUN_ID = bytes(32)


class Peer:
    """A peer's share in news: the real servicer, client and feed, without rounds."""

    def __init__(self, network: virtual.Network, number: int) -> None:
        self.id, self.round = virtual.name_of(number), 0
        self.heard: list[Any] = []
        traffic, node = Traffic(), virtual.FakeNode(network, self.id)
        client = Client(node, traffic, RUN_ID)  # type: ignore[arg-type]
        self.feed = NewsFeed(client, lambda: Tip(self.round, RUN_ID, self.round), self.heard.append, lambda *_: ())
        self.servicer = PeerServicer(self, traffic)  # type: ignore[arg-type]

    def admits(self, peer: bytes) -> bool:
        return True

    def wrong_run(self, run_id: bytes) -> str | None:
        return None

    def hear_tip(self, peer: bytes, tip: Tip) -> None:
        self.feed.follow(peer)
        self.feed.hear_tip(peer, tip)


def test_a_follower_that_could_not_be_reached_is_heard_once_it_can_be() -> None:
    async def scenario() -> None:
        network = virtual.Network()
        hub, solitary = Peer(network, 1), Peer(network, 2)
        network.servicers[hub.id] = hub.servicer
        solitary.feed.follow(hub.id)
        # Longer than what a peer tries to listen for.
        await asyncio.sleep(2 * sum(RETRY_SECONDS) + ATTEMPTS)
        assert TipHeard(hub.id, 0, RUN_ID, 0) in solitary.heard
        # From now on it can be reached, has gone on alone, and calls nobody.
        network.servicers[solitary.id] = solitary.servicer
        solitary.round = 7
        await asyncio.sleep(2 * sum(RETRY_SECONDS) + ATTEMPTS)
        assert TipHeard(solitary.id, 7, RUN_ID, 7) in hub.heard
        await asyncio.gather(hub.feed.close(), solitary.feed.close())

    virtual.run(scenario())


def test_a_peer_that_is_given_up_stands_nowhere_and_was_last_heard_when_it_was_there() -> None:
    async def scenario() -> None:
        now = asyncio.get_running_loop().time
        network = virtual.Network()
        hub, newcomer = Peer(network, 1), Peer(network, 2)
        network.servicers = {peer.id: peer.servicer for peer in (hub, newcomer)}
        newcomer.feed.follow(hub.id)
        await asyncio.sleep(5)
        assert newcomer.feed.tips and newcomer.feed.heard_at == -math.inf, "who has no round is none to wait for"
        hub.round = 7
        await asyncio.sleep(5)
        assert newcomer.feed.furthest == 7 and now() - newcomer.feed.heard_at < 2
        # It dies: what it listened to and what it told ends, and it answers nobody.
        died_at = now()
        del network.servicers[hub.id]
        for listening in hub.feed._followed.values():
            listening.cancel()
        for follower in hub.feed._followers.values():
            follower.put_nowait(None)
        await asyncio.sleep(2 * sum(RETRY_SECONDS) + ATTEMPTS)
        assert newcomer.feed.tips == {}
        assert newcomer.feed.heard_at <= died_at
        await asyncio.gather(hub.feed.close(), newcomer.feed.close())

    virtual.run(scenario())


@pytest.mark.parametrize(
    ("refusal", "alive"), [("this peer is in another run", False), (TOO_MANY_FOLLOWERS, True), (TOO_MANY_CALLS, True)]
)
def test_who_refuses_is_alive_for_a_newcomer_only_if_it_is_in_this_run(refusal: str, alive: bool) -> None:
    async def scenario() -> None:
        network = virtual.Network()
        hub, newcomer = Peer(network, 1), Peer(network, 2)
        hub.wrong_run = lambda run_id: refusal  # type: ignore[method-assign]
        network.servicers = {peer.id: peer.servicer for peer in (hub, newcomer)}
        newcomer.feed.follow(hub.id)
        await asyncio.sleep(5)
        assert (newcomer.feed.heard_at > -math.inf) == alive
        await asyncio.gather(hub.feed.close(), newcomer.feed.close())

    virtual.run(scenario())


def test_bad_seals_without_end_are_verified_seldom_and_logged_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[SignedSeal] = []

    def bad(signed: SignedSeal, *_: object) -> None:
        opened.append(signed)
        raise SealError("bad")

    monkeypatch.setattr("p2ptrain.chain.open_seal", bad)
    caplog.set_level("INFO", "p2ptrain.calls.news")
    seal = SignedSeal(b"", bytes(64))

    async def scenario() -> None:
        network = virtual.Network()
        hub, other = Peer(network, 1), virtual.name_of(3)
        for _ in range(5000):
            hub.feed.take_relayed(virtual.name_of(2), Tip(1, RUN_ID, 1), seal)
        assert 0 < len(opened) < 2 * SEALS_BURST and len(caplog.records) == 1
        hub.feed.take_relayed(other, Tip(1, RUN_ID, 1), seal)
        assert len(caplog.records) == 2, "of another peer it is heard at once"

    virtual.run(scenario())
