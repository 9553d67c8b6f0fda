"""Where the peers of a run keep their records: cheap to write and to read, however many there are.

A record is written to the few nodes nearest to its key and read from one of them, another one each time, so neither
takes a search through the DHT as long as the routing table has everybody. A run of more than `SHELF_RECORDS` members
spreads its records over shelves, each a key of its own: their number is a power of two that the members derive from
their chain, and a peer's shelf follows from its id. On the first key, where everyone looks first, peers then write now
and then only; what they write there says how many shelves there are.

Ids lie unevenly, so some nodes are near to many keys. Each therefore keeps a few shelves more than an even share and
refuses others, which then go to the next nearest node. It refuses none of those that it is the nearest to, so that all
records of a shelf are together at one node, which readers find however full others are.

Whoever looks at a large run reads one shelf after another, which takes minutes. Those that store a shelf see at once
who does not renew its record, and say so on one key that is read every time. That is believed from nobody: it says
which shelf to look at next.

Cost for each peer: `REPLICAS` small calls for each writing, and as many of others' to answer; and one for a shelf of a
few records every `READ_SECONDS`, in a large run more rarely.
What a node that lies leaves out, the next one shows; who has all nodes near a key in hand hides it from everybody.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hivemind.dht import DHTID
from hivemind.p2p import PeerID

from p2ptrain.swarm.limits import Allowance
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import (
    MISSING_MAX,
    MISSING_RECORD_SECONDS,
    PEER_RECORD_SECONDS,
    RUN_RECORD_SECONDS,
    RUNS_KEY,
    SHELVES_MAX,
    MissingRecord,
    PeerRecord,
    Record,
    RunRecord,
    encode_record,
    key_id_of,
    missing_key,
    peers_key,
    subkey_of,
)
from p2ptrain.swarm.tasks import cancel_and_wait, failure_logged

REPLICAS = 3
ONE_SHELF_MEMBERS = 6
"""So many have one."""
SHELF_RECORDS = 3
"""With more members for each of several shelves there are twice as many; with a third of them half as many."""
READ_SECONDS, READ_SECONDS_MANY = 8.0, 32.0
"""Between two shelves that others are asked for; where there are many."""
HOPS_MAX, HOPS_MAX_FEW = 10, 2
"""Nodes asked for one shelf; where there are few shelves."""
READ_AT_ONCE = 8
SHELF_LOOK_SECONDS = 0.25
"""Between two looks of an observer at the only shelf."""
LOOKS_PER_SECOND, LOOKS_BURST = 1.0, 3.0
"""Shelves that it reads where there are several: those first of which somebody says that a peer is missing."""
MANY_SHELVES, SEARCH_AGAIN_SECONDS = 8, 900.0
"""With so many the routing table may lack who is nearest to a key: it is searched for, and again after a while. And
nodes refuse shelves that are too many for them."""
SPREAD = 1.5
"""Once a node has so many times an even share of all records it takes no other shelf."""
DROPPED_SECONDS = 600.0
"""So long it takes none of one that it has dropped."""
REFUSED_SECONDS = 60.0
"""A node that refused a shelf is left alone so long."""
SUSPECT_SECONDS, GONE_SECONDS = 5.0, 7.1
"""A record so old should have been renewed; and when it is so old that views call its peer lost."""
HINTS_PER_SECOND, HINTS_BURST = 0.5, 8.0
"""Shelves that an observer reads beyond that because a peer is missing."""
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


_logger = logging.getLogger(__name__)
_failure_logged = failure_logged(_logger, "saying who is missing has failed")


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
        #: by key that is read: nodes near to it
        self._met: dict[str, dict[DHTID, PeerID]] = {}
        #: (key, node): until when it is brought nothing of that shelf, since it has refused it
        self._full: dict[tuple[str, PeerID], float] = {}
        #: the shelves' keys by their ids, and how many records of them this node keeps; None: all that it is brought
        self._keys: dict[DHTID, str] = {}
        self._room: int | None = None
        #: key: until when none of that shelf is taken, since it was one too many
        self._dropped: dict[str, float] = {}
        #: peers that this node has said to be missing, until their records are renewed or gone
        self._told: frozenset[bytes] = frozenset()
        self._telling: asyncio.Task[None] | None = None
        #: somebody is said to be missing, and no look has shown yet whether it is
        self.someone_missing = False
        self._looks, self._hints = Allowance(LOOKS_PER_SECOND, LOOKS_BURST), Allowance(HINTS_PER_SECOND, HINTS_BURST)

    async def close(self) -> None:
        """Say nothing any more."""
        if self._telling is not None:
            await cancel_and_wait([self._telling])

    def sized_for(self, members: int, nodes: int = 0) -> None:
        """Take the number of shelves from that of the members, and from that of nodes among them how much one keeps."""
        self._set_count(shelves_for(members, self.count))
        many = self.count >= MANY_SHELVES
        self._room = math.ceil(SPREAD * REPLICAS * members / nodes) if many and nodes else None
        if self.count > 1 and not self._keys:
            self._keys = {DHTID.from_bytes(key_id_of(key)): key for key in self._all_keys()}
            self._node.spare(self._is_full)

    def _all_keys(self) -> list[str]:
        return [shelf_key(self._run_id, self.count, shelf) for shelf in range(self.count)]

    def _is_full(self, key_id: DHTID) -> bool:
        """Say whether a shelf that is not here yet would be one too many."""
        if self._room is None or key_id not in self._keys:
            return False
        key = self._keys[key_id]
        dropped = self._dropped.get(key, 0.0) > time.monotonic()
        return (dropped or self._load(self._stored()) >= self._room) and not self._is_nearest(key)

    def _is_nearest(self, key: str) -> bool:
        """Say whether no other node that this one knows is nearer to a key."""
        return next(iter(self._node.nearest(key, {}).values()), None) == self._node.peer

    def _load(self, stored: Mapping[str, int]) -> int:
        """How many records, renewed as often as they are, cost as much as what is stored here."""
        return sum(stored.values()) + bool(self._node.stored(peers_key(self._run_id)))

    def _stored(self) -> dict[str, int]:
        """Count the records of each shelf that this node stores any of."""
        return {self._keys[key_id]: len(until) for key_id, until in self._node.stored_until(self._keys).items()}

    def make_room(self) -> None:
        """Drop a shelf where those that were taken while they were small have become too much for this node."""
        if self._room is None:
            return
        stored = self._stored()
        if self._load(stored) <= self._room + 1:
            return
        if spare := [key for key in stored if not self._is_nearest(key)]:
            # The one that others are nearest to.
            far = max(spare, key=lambda key: DHTID.from_bytes(key_id_of(key)).xor_distance(self._node.dht.node_id))
            self._node.drop(far)
            self._dropped[far] = time.monotonic() + DROPPED_SECONDS

    def _set_count(self, count: int) -> None:
        if count != self.count:
            self.count = count
            self._keys, self._full, self._dropped, self._met = {}, {}, {}, {}
            keep = {shelf_key(self._run_id, count, shelf) for shelf in range(count)} | {peers_key(self._run_id)}
            self._known = {key: known for key, known in self._known.items() if key in keep}
            self._searched = {key: found for key, found in self._searched.items() if key in keep}

    # ---- writing ----------------------------------------------------------------------------------------------

    async def publish(self, record: PeerRecord) -> bool:
        """Say how this peer is, on its shelf; return whether any node took it."""
        record = msgspec.structs.replace(record, shelves=self.count)
        first, own = peers_key(self._run_id), shelf_key(self._run_id, self.count, shelf_of(record.peer_id, self.count))
        if own != first and random.random() * SHOWN_EVERY * self.count < 1:
            await self._write(first, record, PEER_RECORD_SECONDS)
        return await self._write(own, record, PEER_RECORD_SECONDS)

    async def publish_run(self, record: RunRecord) -> bool:
        """List the run in the DHT's index, which everybody reads; return whether any node took it.

        Without a search, which would bring all that is listed along each time.
        """
        return await self._write(RUNS_KEY, record, RUN_RECORD_SECONDS, plain=True)

    async def _write(self, key: str, record: Record, seconds: float, *, plain: bool = False) -> bool:
        await self._search(key)
        expires = time.time() + seconds
        data = encode_record(self._node.identity, key, record, expires, b"" if plain else self._secret)
        subkey, near, taken = subkey_of(record.peer_id), self._near(key), 0
        if not self._node.stored(key) and self._is_full(DHTID.from_bytes(key_id_of(key))):
            near = [node for node in near if node != self._node.peer]
        while near and taken < REPLICAS:
            now, near = near[: REPLICAS - taken], near[REPLICAS - taken :]
            took = await asyncio.gather(*(self._node.store_at(node, key, data, expires, subkey) for node in now))
            for node in (node for node, took_it in zip(now, took, strict=True) if not took_it):
                self._note_full(key, node)
            taken += sum(took)
        return taken > 0

    async def _search(self, key: str) -> None:
        if self.count < MANY_SHELVES and self._node.knows_everybody:
            return
        at, _ = self._searched.get(key, (-math.inf, {}))
        if time.monotonic() - at >= SEARCH_AGAIN_SECONDS:
            self._searched[key] = time.monotonic(), await self._node.search(key, 2 * REPLICAS)

    def _near(self, key: str) -> list[PeerID]:
        """Nodes to bring records under a key to, the nearest first; those that have refused it last."""
        near = self._node.nearest(key, self._searched.get(key, (0.0, {}))[1]).values()
        now = time.monotonic()
        return sorted(dict.fromkeys(near), key=lambda node: self._full.get((key, node), 0.0) > now)

    def _note_full(self, key: str, node: PeerID) -> None:
        if self.count >= MANY_SHELVES:
            now = time.monotonic()
            self._full = {known: until for known, until in self._full.items() if until > now}
            self._full[key, node] = now + REFUSED_SECONDS

    # ---- who is missing ---------------------------------------------------------------------------------------

    def tell_missing(self) -> None:
        """Say who does not renew its record on the shelves that are here, where there are several and it is news."""
        if self.count == 1 or (self._telling is not None and not self._telling.done()):
            return
        now = time.time()
        missing = {
            peer: expires - PEER_RECORD_SECONDS
            for until in self._node.stored_until(self._keys).values()
            for peer, expires in until.items()
            if expires - PEER_RECORD_SECONDS < now - SUSPECT_SECONDS
        }
        news, self._told = missing.keys() - self._told, frozenset(missing)
        if news:
            peers = {peer: missing[peer] for peer in [*news, *(missing.keys() - news)][:MISSING_MAX]}
            record = MissingRecord(peer_id=self._node.peer_id, run_id=self._run_id, time=now, peers=peers)
            self._telling = asyncio.create_task(self._tell(record))
            self._telling.add_done_callback(_failure_logged)

    async def _tell(self, record: MissingRecord) -> None:
        await self._write(missing_key(self._run_id), record, MISSING_RECORD_SECONDS)

    async def _hear_missing(self) -> list[str]:
        """Return shelves to look at, because somebody says that a peer is missing, whom nobody says to be back."""
        key = missing_key(self._run_id)
        await self._search(key)
        near = [node for node in self._near(key) if node != self._node.peer][:REPLICAS]
        found: Mapping[Any, Any] | None = None
        while near and found is None:
            found, _ = await self._node.stored_at(near.pop(random.randrange(len(near))), key)
        said = self._node.open_records(key, found or {}, MissingRecord, self._secret).values()
        shelves, now = [], time.time()
        self.someone_missing = False
        for last, peer in sorted((last, peer) for record in said for peer, last in record.peers.items()):
            shelf = shelf_key(self._run_id, self.count, shelf_of(peer, self.count))
            known = self._known.get(shelf, {}).get(peer)
            if (
                known is None
                or known.time > last + SUSPECT_SECONDS
                or self._looked_at.get(shelf, 0.0) - known.time > GONE_SECONDS
            ):
                continue  # It is back, or a look has shown already that it is not.
            self.someone_missing = True
            # So that one look is enough.
            ripe = now - last > GONE_SECONDS and shelf not in shelves
            if ripe and (self._looks.take() or self._hints.take()):
                shelves.append(shelf)
        return shelves

    # ---- reading ----------------------------------------------------------------------------------------------

    async def look(self) -> Looked:
        """Look at the shelves that are here and, every `READ_SECONDS`, at any one of all."""
        # All keys are many, and few of them are stored here.
        keys = self._all_keys() if not self._keys else list(self._stored())
        looked = [key for key in keys if self._look_here(key)]
        if time.monotonic() >= self._read_due:
            key = shelf_key(self._run_id, self.count, random.randrange(self.count))
            await self._look_elsewhere(key)
            looked.append(key)
            many = self.count >= MANY_SHELVES
            self._read_due = time.monotonic() + (READ_SECONDS_MANY if many else READ_SECONDS)
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
        keys = self._all_keys()
        due: list[str] = []
        if self.count > 1:
            due = await self._hear_missing() + [key for key in keys if key not in self._looked_at]
            rest = sorted((key for key in keys if key not in due), key=lambda key: self._looked_at[key])
            due += [key for key in rest if self._looks.take()]
        for begin in range(0, len(due), READ_AT_ONCE):
            await asyncio.gather(*(self._look_elsewhere(key) for key in due[begin : begin + READ_AT_ONCE]))
        return self._looked(dict.fromkeys([first, *keys]))

    def _is_due(self, key: str) -> bool:
        seconds = SHELF_LOOK_SECONDS if self.count == 1 else self.count / LOOKS_PER_SECOND
        return time.time() - self._looked_at.get(key, 0.0) >= seconds

    def _look_here(self, key: str) -> bool:
        """Look at what this node stores; say whether it stores any of it."""
        found = self._node.stored(key)
        if found:
            self._take(key, found)
        return bool(found)

    async def _look_elsewhere(self, key: str) -> None:
        """Look at what one of the nearest nodes stores, or the nearest that those know who store nothing."""
        if self.count >= MANY_SHELVES:
            await self._ask_the_nearest(key)
            return
        near = [node for node in self._near(key) if node != self._node.peer][:REPLICAS]
        random.shuffle(near)
        asked, found = set[PeerID](), None
        while near and len(asked) < HOPS_MAX_FEW and not found:
            node = near.pop(0)
            if node in asked:
                continue
            asked.add(node)
            answer, nearer = await self._node.stored_at(node, key)
            found = answer or found
            place = DHTID.from_bytes(key_id_of(key))
            near = [nearer[one] for one in sorted(nearer, key=place.xor_distance)] or near
        self._take(key, found)

    async def _ask_the_nearest(self, key: str) -> None:
        """Look at what the nearest node stores, which refuses nothing, and others where that leaves doubts."""
        place = DHTID.from_bytes(key_id_of(key))
        near = self._node.nearest(key, self._met.get(key, {}))
        # What it leaves out if it lies, or has come just now, others show sooner or later.
        wanted = 1 if key in self._looked_at and random.random() * REPLICAS > 1 else 2
        asked, answers, beyond, closest = {self._node.peer}, 0, 0, math.inf
        while len(asked) <= HOPS_MAX and (left := [node for node, peer in near.items() if peer not in asked]):
            node = min(left, key=place.xor_distance)
            beyond += place.xor_distance(node) > closest
            if beyond and (
                answers >= REPLICAS
                or (answers >= wanted and not self._is_anyone_suspect(key))
                or (not answers and beyond >= REPLICAS)
            ):
                break
            closest = min(closest, place.xor_distance(node))
            asked.add(near[node])
            found, nearer = await self._node.stored_at(near[node], key)
            near |= nearer
            answers += bool(found)
            self._take(key, found)
        self._met[key] = {node: near[node] for node in sorted(near, key=place.xor_distance)[: 2 * REPLICAS]}

    def _is_anyone_suspect(self, key: str) -> bool:
        """Say whether a record there should have been renewed."""
        now = time.time()
        # There may be other shelves since it was looked at.
        return any(record.last_seen_seconds(now) > SUSPECT_SECONDS for record in self._known.get(key, {}).values())

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
            for peer, record in self._known.get(key, {}).items():
                # The first key shows what peers of a large run have said some time ago.
                if peer not in looked.records or looked.records[peer].time < record.time:
                    own = shelf_key(self._run_id, self.count, shelf_of(peer, self.count))
                    looked.records[peer] = record
                    looked.at[peer] = self._looked_at.get(own, self._looked_at.get(key, 0.0))
        return looked


async def find_peer(node: SwarmNode, run_id: bytes, secret: bytes, peer_id: bytes) -> PeerRecord | None:
    """Return the newest record of one peer, of all that keep it; None where there is none."""
    records = await node.read_peers(run_id, secret)
    shelves = agreed([record for record in records.values() if record.peer_id != peer_id])
    if shelves > 1:
        records |= await node.read(shelf_key(run_id, shelves, shelf_of(peer_id, shelves)), PeerRecord, secret)
    return records.get(peer_id)
