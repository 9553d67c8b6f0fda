"""What the records of a run cost each of many peers: real nodes of the DHT and real presence, on a virtual clock.

    python scripts/bench/lab/many_nodes.py --peers 1000 --seconds 120

All peers are in this process. Presence, shelves, records and their signatures, hivemind's nodes, routing tables and
storage are the real ones; only the daemon is replaced, by one that hands each call to the node it is for after
`DELAY_SECONDS`. A call counts with its messages and `CALL_BYTES` each way: what libp2p, TCP and IP put around them, as
counted for small calls between two real nodes. News are added by the number of those who follow each other, a frame
with `FRAME_BYTES`. Then an observer looks as often as one does, and some peers are killed: how long
it takes to show each as lost. One JSON object on stdout.
"""

# ruff: noqa: E402 - the clock is replaced before hivemind takes it

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from p2ptrain.simulation.loop import VirtualLoop

LOOP, BEGAN_AT = VirtualLoop(), time.time()
# hivemind takes its clock when it is imported.
time.time, time.monotonic = lambda: BEGAN_AT + LOOP.time(), LOOP.time

import base58
from hivemind.dht import DHTNode
from hivemind.p2p import P2PContext, PeerID
from lab.report import note, say

from p2ptrain.calls.messages import News, Tip, Traffic
from p2ptrain.calls.news import pause_of
from p2ptrain.chain import Member, Row, relay
from p2ptrain.config.manifest import Manifest, open_manifest, sign_manifest
from p2ptrain.observe.census import LOST_SECONDS
from p2ptrain.observe.status import Status
from p2ptrain.peer.observing import LOOK_IN_HASTE_SECONDS, LOOK_SECONDS
from p2ptrain.peer.presence import Presence
from p2ptrain.simulation.toy import identity_of
from p2ptrain.swarm import records
from p2ptrain.swarm.guards import install_guards
from p2ptrain.swarm.limits import caller
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.shelves import Looked, Shelves
from p2ptrain.swarm.validator import SignedRecordValidator

OWNER = identity_of("owner", 0)
SIGNED = sign_manifest(Manifest(name="many", nonce="0" * 32), OWNER.key, str(PeerID(OWNER.peer_id)))
RUN_ID = open_manifest(SIGNED)[1]
DELAY_SECONDS = 0.04
CALL_BYTES, FRAME_BYTES = 600, 200
"""Around the messages of a unary call, each way; around a frame of a stream that stands, with what acknowledges it."""
CONTACTS = 3
"""Peers that each one meets the swarm by."""
OBSERVED_SECONDS = 30.0
KILLED_WITHIN_SECONDS, LOST_SECONDS_MAX = 3.0, 120.0


class Wires:
    """Hands calls from node to node, and counts their bytes."""

    def __init__(self) -> None:
        self.handlers: dict[tuple[bytes, str], Any] = {}
        self.sent: Counter[bytes] = Counter()
        self.received: Counter[bytes] = Counter()
        self.calls: Counter[str] = Counter()
        self.gone: set[bytes] = set()

    def carry(self, sender: bytes, receiver: bytes, size_bytes: int) -> None:
        """Count one message."""
        self.sent[sender] += size_bytes + CALL_BYTES
        self.received[receiver] += size_bytes + CALL_BYTES


class MemoryP2P:
    """The little of hivemind's P2P that a node of the DHT uses."""

    def __init__(self, peer_id: PeerID, wires: Wires) -> None:
        self.peer_id, self._wires = peer_id, wires

    async def add_protobuf_handler(self, name: str, handler: Any, *_: Any, **__: Any) -> None:
        """Answer calls of this name."""
        self._wires.handlers[self.peer_id.to_bytes(), name] = handler

    async def call_protobuf_handler(self, peer: PeerID, name: str, message: Any, output_type: Any) -> Any:
        """Call another node, if it is there."""
        me, other = self.peer_id.to_bytes(), peer.to_bytes()
        self._wires.carry(me, other, message.ByteSize())
        self._wires.calls[name] += 1
        await asyncio.sleep(DELAY_SECONDS)
        handler = self._wires.handlers.get((other, name))
        if handler is None or other in self._wires.gone:
            raise ConnectionError("gone")
        token = caller.set(me)
        try:
            answer = await handler(message, P2PContext(handle_name=name, local_id=peer, remote_id=self.peer_id))
        finally:
            caller.reset(token)
        self._wires.carry(other, me, answer.ByteSize())
        await asyncio.sleep(DELAY_SECONDS)
        return answer

    async def list_peers(self) -> list[Any]:
        """Connections, which are not modelled."""
        return []


class Settled(Status):
    """A peer that trains with so many others."""

    def take(self, standing: Any) -> None:
        """Nothing changes."""


def nobody_is_followed() -> Any:
    """A driver to whom nothing happens: connections, and what is followed, are not modelled."""
    feed = SimpleNamespace(would_follow=lambda peer: False, is_member=lambda peer: True)
    standing = SimpleNamespace(refused=None)
    return SimpleNamespace(feed=feed, standing=standing, publish_standing=lambda: None, leave=lambda: None)


async def node_of(number: int, wires: Wires, observer: bool = False) -> SwarmNode:
    """A node that knows nobody yet."""
    identity = identity_of(str(number), 0)
    p2p = MemoryP2P(PeerID(identity.peer_id), wires)
    settings: Any = SimpleNamespace(listen=not observer, port=0, line=None)
    node = SwarmNode(identity, settings, None, SimpleNamespace(p2p=p2p))  # type: ignore[arg-type]
    node.dht = await DHTNode.create(
        p2p=p2p,
        client_mode=observer,
        record_validator=SignedRecordValidator(),
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
    )
    return node


def presence_of(node: SwarmNode, number: int, peers: int) -> Presence:
    """What keeps the records of one of so many members."""
    address = f"/ip4/192.0.2.{number % 250}/tcp/31337/p2p/{PeerID(node.peer_id)}"
    return Presence(
        node,
        nobody_is_followed(),
        Settled(
            state="training",
            role="member",
            round=1000 + number % 2,
            state_id=RUN_ID,
            members=peers,
            dialable=peers,
            loss=3.21,
        ),
        run_id=RUN_ID,
        run_name="many",
        signed_manifest=SIGNED,
        name=f"peer-{number}",
        device="cpu, 4 threads",
        addresses=[address, address.replace("192.0.2", "198.51.100")],
    )


def news_bytes_per_second(ids: list[bytes]) -> dict[bytes, float]:
    """What each sends to those who follow it; it receives about as much from those whom it follows."""
    members = [Member(peer_id, Row(4, 1000, 100), 0, True) for peer_id in ids]
    followers: Counter[bytes] = Counter(peer for me in ids for peer in relay.neighbours(members, me))
    tip = Tip(1000, RUN_ID, 1000)
    frame = len(Traffic().message(News(tip, None, False)).value) + FRAME_BYTES
    return {peer_id: followers[peer_id] * frame / pause_of(followers[peer_id]) for peer_id in ids}


def pause_seconds(shelves: Shelves) -> float:
    """As an observer waits before it looks again."""
    return LOOK_IN_HASTE_SECONDS if shelves.someone_missing else LOOK_SECONDS


def is_lost(looked: Looked, peer_id: bytes) -> bool:
    """Say whether a look shows a peer as lost, whose node is not asked: 2 s later than where it is."""
    record = looked.records.get(peer_id)
    return record is None or record.last_seen_seconds(looked.at[peer_id]) > LOST_SECONDS


async def kill(
    victims: Sequence[bytes], wires: Wires, tasks: dict[bytes, list[asyncio.Task[None]]], shelves: Shelves
) -> list[float]:
    """Kill peers within some seconds, and return after how many seconds an observer shows each as lost."""
    killed_at: dict[bytes, float] = {}

    def end(victim: bytes) -> None:
        killed_at[victim] = time.monotonic()
        wires.gone.add(victim)
        for task in tasks.pop(victim):
            task.cancel()

    for victim in victims:
        asyncio.get_running_loop().call_later(random.uniform(0, KILLED_WITHIN_SECONDS), end, victim)
    at, lost_after = time.monotonic(), dict.fromkeys(victims, LOST_SECONDS_MAX)
    while LOST_SECONDS_MAX in lost_after.values() and time.monotonic() - at < LOST_SECONDS_MAX:
        await asyncio.sleep(pause_seconds(shelves))
        looked = await shelves.look_at_all()
        for victim, killed in killed_at.items():
            if lost_after[victim] == LOST_SECONDS_MAX and is_lost(looked, victim):
                lost_after[victim] = time.monotonic() - killed
    return list(lost_after.values())


async def play(options: argparse.Namespace) -> dict[str, Any]:
    """The swarm comes together, stands for a while, and one of it is killed."""
    wires = Wires()
    nodes = [await node_of(number, wires) for number in range(options.peers)]
    draw = random.Random(options.seed)
    began = len(nodes)
    for number, node in enumerate(nodes):
        for contact in draw.sample(range(number), min(number, CONTACTS)):
            await node.dht.protocol.call_ping(nodes[contact].dht.protocol.p2p.peer_id)
        await node._explore(30.0)
        if number % 100 == 99:
            note(f"{number + 1} of {began} nodes know each other")
    # All have met everyone who is near: what a network has that has stood for a while.
    await asyncio.gather(*(node._explore(30.0) for node in nodes))
    shows = [presence_of(node, number, options.peers) for number, node in enumerate(nodes)]
    tasks = {}
    for node, presence in zip(nodes, shows, strict=True):
        await asyncio.sleep(2.5 / options.peers)
        tasks[node.peer_id] = [asyncio.create_task(presence.run()), asyncio.create_task(node._keep_up())]
        for task in tasks[node.peer_id]:
            task.add_done_callback(lambda task: None if task.cancelled() else task.result())
    observer = await node_of(options.peers, wires, observer=True)
    for node in draw.sample(nodes, CONTACTS):
        await observer.dht.protocol.call_ping(node.dht.protocol.p2p.peer_id)
    await observer._explore(30.0)
    await asyncio.sleep(options.seconds / 2)
    note("records stand")
    for counter in (wires.sent, wires.received, wires.calls):
        counter.clear()
    at = time.monotonic()
    await asyncio.sleep(options.seconds)
    seconds = time.monotonic() - at
    ids = [node.peer_id for node in nodes]
    news = news_bytes_per_second(ids)
    sent = [wires.sent[peer_id] / seconds + news[peer_id] for peer_id in ids]
    received = [wires.received[peer_id] / seconds + news[peer_id] for peer_id in ids]
    calls = {name.rpartition(".")[2]: round(count / seconds / options.peers, 2) for name, count in wires.calls.items()}

    shelves = Shelves(observer, RUN_ID, b"")
    observed = wires.received[observer.peer_id]
    looked = await shelves.look_at_all()
    first_look_bytes = wires.received[observer.peer_id] - observed
    seen = len(looked.records)
    observed, at = wires.received[observer.peer_id], time.monotonic()
    while time.monotonic() - at < OBSERVED_SECONDS:
        await asyncio.sleep(pause_seconds(shelves))
        looked = await shelves.look_at_all()
    observer_bytes = (wires.received[observer.peer_id] - observed) / (time.monotonic() - at)
    wrongly_lost = sum(is_lost(looked, peer_id) for peer_id in ids)
    victims = draw.sample(ids, max(1, min(options.killed, len(ids) // 8)))
    lost_after = await kill(victims, wires, tasks, shelves)
    for task in [task for both in tasks.values() for task in both]:
        task.cancel()
    quantiles = statistics.quantiles(sent, n=20)
    return {
        "peers": options.peers,
        "shelves": shelves.count,
        "sent_bytes_per_second": {
            "median": round(statistics.median(sent)),
            "p95": round(quantiles[-1]),
            "most": round(max(sent)),
        },
        "received_bytes_per_second": {"median": round(statistics.median(received)), "most": round(max(received))},
        "news_bytes_per_second": round(statistics.median(news.values())),
        "calls_per_second": calls,
        "observer_sees": seen,
        "wrongly_lost": wrongly_lost,
        "first_look_bytes": first_look_bytes,
        "observer_received_bytes_per_second": round(observer_bytes),
        "lost_after_seconds": {
            "median": round(statistics.median(lost_after), 1),
            "most": round(max(lost_after), 1),
            "killed": len(lost_after),
        },
    }


def main() -> None:
    """Read the command line, and play."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="virtual seconds that are counted")
    parser.add_argument("--killed", type=int, default=8, help="peers that are killed, at most an eighth of all")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.getLogger("hivemind").setLevel(logging.ERROR)
    random.seed(options.seed)
    install_guards()
    # All nodes are in one process: what is the same for each is worked out once.
    base58.b58encode = functools.lru_cache(2**16)(base58.b58encode)
    records.verify = functools.lru_cache(2**16)(records.verify)
    asyncio.set_event_loop(LOOP)
    say(**LOOP.run_until_complete(play(options)))


if __name__ == "__main__":
    main()
