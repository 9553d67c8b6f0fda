"""Where the peers of a run keep their records: cheap to write and to read, however many there are.

A record is written to the few nodes nearest to its key and read from one of them, another one each time, so neither
takes a search through the DHT as long as the routing table has everybody. A run of more than `SHELF_RECORDS` members
spreads its records over shelves, each a key of its own: their number is a power of two that the members derive from
their chain, and a peer's shelf follows from its id. On the first key, where everyone looks first, peers then write now
and then only; what they write there says how many shelves there are.

Cost for each peer: `REPLICAS` small calls for each writing, and as many of others' to answer; and one for a shelf of a
few records every `READ_SECONDS`.
What a node that lies leaves out, the next one shows; who has all nodes near a key in hand hides it from everybody.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hivemind.dht import DHTID
from hivemind.p2p import PeerID

from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import (
    PEER_RECORD_SECONDS,
    SHELVES_MAX,
    PeerRecord,
    encode_record,
    peers_key,
    subkey_of,
)

REPLICAS = 3
ONE_SHELF_MEMBERS = 6
"""So many have one."""
SHELF_RECORDS = 3
"""With more members for each of several shelves there are twice as many; with a third of them half as many."""
READ_SECONDS = 8.0
"""Between two shelves that others are asked for."""
HOPS_MAX, HOPS_MAX_KNOWN = 6, 2
"""Nodes asked for one shelf; where the routing table has everybody."""
READ_AT_ONCE = 8
SHELF_LOOK_SECONDS = 0.25
SEARCHED_SHELVES, SEARCH_AGAIN_SECONDS = 8, 300.0
"""With so many shelves the routing table may lack who is nearest: they are searched for, and again after a while."""
SHOWN_EVERY = 3
"""A peer's record is on the first key, too, once in so many times the number of shelves."""


def shelves_for(members: int, before: int = 1) -> int:
    """Return how many shelves a run of so many members has, where it had `before`.

    Twice as many are wanted sooner than they are given up, so that members who come and go change nothing.
    """
    shelves = before
    while members > max(ONE_SHELF_MEMBERS, SHELF_RECORDS * shelves) and shelves < SHELVES_MAX:
        shelves *= 2
    while shelves > 1 and 3 * members <= SHELF_RECORDS * shelves:
        shelves //= 2
    return shelves


def shelf_of(peer_id: bytes, shelves: int) -> int:
    """Return the shelf of a peer, of `shelves` (a power of two)."""
    return int.from_bytes(hashlib.sha256(peer_id).digest()[:4], "big") % shelves


def shelf_key(run_id: bytes, shelves: int, shelf: int) -> str:
    """Return the key of a shelf; the only one is where all peers of a run are looked for."""
    return peers_key(run_id) if shelves == 1 else f"{peers_key(run_id)}/{shelves}/{shelf}"


def agreed(records: Sequence[PeerRecord]) -> int:
    """Return how many shelves there are, by the one in the middle of those who say so; 1 where nobody does."""
    said = sorted(record.shelves for record in records)
    # A power of two, whatever they say.
    return 1 << (said[len(said) // 2].bit_length() - 1) if said else 1


@dataclass(slots=True)
class Looked:
    """What one look has shown."""

    records: dict[bytes, PeerRecord] = field(default_factory=dict)
    """By peer, of the shelves that were looked at."""
    at: dict[bytes, float] = field(default_factory=dict)
    """When the peer's shelf was looked at, in Unix seconds: how old its record was then says whether it is lost."""


class Shelves:
    """The records of one run, for one node.

    Args:
        secret: the manifest's `records_key`.
    """

    def __init__(self, node: SwarmNode, run_id: bytes, secret: bytes) -> None:
        self._node, self._run_id, self._secret = node, run_id, secret
        #: how many there are
        self.count = 1
        #: by key that is written to: when the nodes nearest to it were searched for, and which they are
        self._searched: dict[str, tuple[float, dict[DHTID, PeerID]]] = {}
        #: by key: the newest record of each peer, and when it was looked at
        self._known: dict[str, dict[bytes, PeerRecord]] = {}
        self._looked_at: dict[str, float] = {}
        self._read_due = 0.0

    def sized_for(self, members: int) -> None:
        """Take the number of shelves from that of the members."""
        self._set_count(shelves_for(members, self.count))

    def _set_count(self, count: int) -> None:
        if count != self.count:
            self.count = count
            keep = {shelf_key(self._run_id, count, shelf) for shelf in range(count)} | {peers_key(self._run_id)}
            self._known = {key: known for key, known in self._known.items() if key in keep}
            self._searched = {key: found for key, found in self._searched.items() if key in keep}

    # ---- writing ----------------------------------------------------------------------------------------------

    async def publish(self, record: PeerRecord) -> bool:
        """Say how this peer is, on its shelf; return whether any node took it."""
        record = msgspec.structs.replace(record, shelves=self.count)
        first, own = peers_key(self._run_id), shelf_key(self._run_id, self.count, shelf_of(record.peer_id, self.count))
        if own != first and random.random() * SHOWN_EVERY * self.count < 1:
            await self._write(first, record)
        return await self._write(own, record)

    async def _write(self, key: str, record: PeerRecord) -> bool:
        if self.count >= SEARCHED_SHELVES:
            await self._search(key)
        expires = time.time() + PEER_RECORD_SECONDS
        data = encode_record(self._node.identity, key, record, expires, self._secret)
        subkey, near, taken = subkey_of(record.peer_id), self._near(key), 0
        while near and taken < REPLICAS:
            now, near = near[: REPLICAS - taken], near[REPLICAS - taken :]
            taken += sum(await asyncio.gather(*(self._node.store_at(node, key, data, expires, subkey) for node in now)))
        return taken > 0

    async def _search(self, key: str) -> None:
        at, _ = self._searched.get(key, (-math.inf, {}))
        if time.monotonic() - at >= SEARCH_AGAIN_SECONDS:
            self._searched[key] = time.monotonic(), await self._node.search(key, 2 * REPLICAS)

    def _near(self, key: str) -> list[PeerID]:
        """Nodes to turn to for a key, the nearest first."""
        return self._node.nearest(key, self._searched.get(key, (0.0, {}))[1])

    # ---- reading ----------------------------------------------------------------------------------------------

    async def look(self) -> Looked:
        """Look at the shelves that are here and, every `READ_SECONDS`, at any one of all."""
        keys = [shelf_key(self._run_id, self.count, shelf) for shelf in range(self.count)]
        looked = [key for key in keys if self._look_here(key)]
        if time.monotonic() >= self._read_due:
            key = random.choice(keys)
            await self._look_elsewhere(key)
            looked.append(key)
            self._read_due = time.monotonic() + READ_SECONDS
        return self._looked(dict.fromkeys(looked))

    async def look_at_all(self) -> Looked:
        """Look at all shelves that were not looked at just now, at the first key before the others."""
        first = shelf_key(self._run_id, 1, 0)
        if first not in self._looked_at:
            self._take(first, await self._node.get(first, latest=True))
        elif self._is_due(first):
            await self._look_elsewhere(first)
        now = time.time()
        shown = [r for r in self._known.get(first, {}).values() if r.last_seen_seconds(now) < PEER_RECORD_SECONDS]
        if shown:
            self._set_count(agreed(shown))
        keys = [shelf_key(self._run_id, self.count, shelf) for shelf in range(self.count)]
        due = [key for key in keys if key != first and self._is_due(key)]
        for begin in range(0, len(due), READ_AT_ONCE):
            await asyncio.gather(*(self._look_elsewhere(key) for key in due[begin : begin + READ_AT_ONCE]))
        return self._looked(dict.fromkeys([first, *keys]))

    def _is_due(self, key: str) -> bool:
        # The more there are, the less often: at each of 64 every 16 s.
        return time.time() - self._looked_at.get(key, 0.0) >= SHELF_LOOK_SECONDS * self.count

    def _look_here(self, key: str) -> bool:
        """Look at what this node stores; say whether it stores any of it."""
        found = self._node.stored(key)
        if found:
            self._take(key, found)
        return bool(found)

    async def _look_elsewhere(self, key: str) -> None:
        """Look at what one of the nearest nodes stores, or the nearest that those know who store nothing."""
        asked: set[PeerID] = {self._node.peer}
        near = [node for node in self._near(key) if node != self._node.peer][:REPLICAS]
        random.shuffle(near)
        while near and len(asked) <= (HOPS_MAX if self.count >= SEARCHED_SHELVES else HOPS_MAX_KNOWN):
            node = near.pop(0)
            if node in asked:
                continue
            asked.add(node)
            found, nearer = await self._node.stored_at(node, key)
            if found:
                self._take(key, found)
                return
            near = nearer or near
        self._take(key, {} if len(asked) > 1 else None)

    def _take(self, key: str, found: Mapping[Any, Any] | None) -> None:
        """Note what was found; None: nobody has answered."""
        if found is None:
            return
        now = time.time()
        known = self._known.setdefault(key, {})
        for peer, record in self._node.open_records(key, found, PeerRecord, self._secret).items():
            # Nodes may be behind each other.
            if peer not in known or known[peer].time < record.time:
                known[peer] = record
        for peer in [peer for peer, record in known.items() if record.last_seen_seconds(now) > PEER_RECORD_SECONDS]:
            del known[peer]
        self._looked_at[key] = now

    def _looked(self, keys: Iterable[str]) -> Looked:
        looked = Looked()
        for key in keys:
            at = self._looked_at.get(key, 0.0)
            for peer, record in self._known.get(key, {}).items():
                # The first key shows what peers of a large run have said some time ago.
                if peer not in looked.records or looked.records[peer].time < record.time:
                    looked.records[peer], looked.at[peer] = record, at
        return looked


async def find_peer(node: SwarmNode, run_id: bytes, secret: bytes, peer_id: bytes) -> PeerRecord | None:
    """Return the newest record of one peer, of all that keep it; None where there is none."""
    records = await node.read_peers(run_id, secret)
    shelves = agreed([record for record in records.values() if record.peer_id != peer_id])
    if shelves > 1:
        records |= await node.read(shelf_key(run_id, shelves, shelf_of(peer_id, shelves)), PeerRecord, secret)
    return records.get(peer_id)
