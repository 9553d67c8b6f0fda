"""A census of the DHT: who is listed in anyone's routing table, and which of those answer.

Breadth first over FIND requests for each node's own id, and, of a node that knows more than a bucket of others (20),
for ids that differ in one of the leading bits as well, so that the answers cover the whole id space. Cost: a request
a node, or two, `PARALLEL` at a time. In DHTs far larger than a bucket it sees a sample.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hivemind.dht import DHTID, DHTNode
from hivemind.p2p import PeerID

from p2ptrain.errors import UnreachableError
from p2ptrain.swarm.meeting import dial

PARALLEL = 16
DIAL_SECONDS = 3.0
MAX_NODES = 4096
"""Where it stops: a node may answer with peers that it made up."""
_LEADING_BITS = 6
_ID_BITS = 160


@dataclass(frozen=True)
class Census:
    """Peer ids [38 bytes each] of the nodes seen."""

    alive: frozenset[bytes]
    dead: frozenset[bytes]
    """Still listed by someone, but without an answer."""


async def crawl(node: DHTNode, routes: Mapping[bytes, Sequence[str]], timeout_seconds: float) -> Census:
    """Asks every node that `node` can learn of. `node` itself is neither asked nor counted.

    FIND names peers without their addresses: `routes` {peer id: multiaddrs without /p2p/ID} are tried first, as libp2p
    finds no way to peers whose addresses it takes for neither public nor private.

    What has not answered when the time is over counts as dead, if it was asked, and is left out otherwise.
    """
    seen: set[DHTID] = {node.node_id}
    asked: dict[bytes, bool] = {}
    slots = asyncio.Semaphore(PARALLEL)

    async def visit(node_id: DHTID, peer_id: PeerID) -> list[tuple[DHTID, PeerID]]:
        async with slots:
            asked.setdefault(peer_id.to_bytes(), False)
            if peer_id.to_bytes() in routes:
                with contextlib.suppress(UnreachableError):
                    await dial(node.p2p, peer_id.to_bytes(), routes[peer_id.to_bytes()], DIAL_SECONDS)
            answer = await node.protocol.call_find(peer_id, [node_id])
            if answer is None:
                return []
            asked[peer_id.to_bytes()] = True
            if any(len(nearest) >= node.protocol.bucket_size for _, nearest in answer.values()):
                # What it knows does not go into one answer.
                others = [DHTID(int(node_id) ^ (1 << (_ID_BITS - 1 - bit))) for bit in range(_LEADING_BITS)]
                answer |= await node.protocol.call_find(peer_id, others) or {}
        return [item for _, nearest in answer.values() for item in nearest.items()]

    async def spread() -> None:
        found = list(node.protocol.routing_table.uid_to_peer_id.items())
        while found and len(asked) < MAX_NODES:
            fresh = {node_id: peer_id for node_id, peer_id in found if node_id not in seen and peer_id != node.peer_id}
            seen.update(fresh)
            answers = await asyncio.gather(*(visit(*item) for item in fresh.items()))
            found = [item for answer in answers for item in answer]

    # When the time is over, what has been seen so far is the answer.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_seconds):
            await spread()
    return Census(
        frozenset(peer_id for peer_id, answered in asked.items() if answered),
        frozenset(peer_id for peer_id, answered in asked.items() if not answered),
    )
