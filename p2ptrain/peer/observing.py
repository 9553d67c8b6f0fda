"""Looks at a swarm from outside: an observer, which trains nothing and is listed nowhere.

It reads the run's records every time, and of seals only those that it has not got. Nodes are counted beside that, so
that one which does not answer holds up no look. Cost of a look: one read in the DHT and one call to one peer. In a run
that is not open peers hand out no seals to an observer, whom nobody has let in: it reads those of a member's home.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import CallError, Traffic
from p2ptrain.chain import SealError, SignedSeal
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import Manifest, open_manifest
from p2ptrain.data.tokenizer import tokenizer_of_run
from p2ptrain.errors import UnreachableError
from p2ptrain.observe.census import LOST_SECONDS, Inspection, inspect_run
from p2ptrain.observe.credit import Count, count_for
from p2ptrain.observe.events import Sealed
from p2ptrain.observe.projection import RoundsOfHome
from p2ptrain.observe.rounds import sealed_event
from p2ptrain.peer.joining import find_run
from p2ptrain.state.seals import Opening, SealedStep, SealLog, Walk, answer_after, read_opening
from p2ptrain.swarm.addresses import parse_addresses
from p2ptrain.swarm.crawl import Census
from p2ptrain.swarm.identity import verify
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import PeerRecord
from p2ptrain.swarm.shelves import Shelves
from p2ptrain.swarm.tasks import cancel_and_wait

FIRST_CENSUS_SECONDS = 0.6
"""How long the first look waits for nodes to answer."""
CENSUS_SECONDS = 8.0
COUNT_AGAIN_SECONDS, COUNT_NODE_SECONDS = 15.0, 0.5
"""Before the nodes are counted again, and that much for each: each has to answer."""
LATE_SECONDS, COUNT_IN_HASTE_SECONDS = 4.5, 2.0
"""A peer whose record is older may be lost: nodes are counted at once, unless they just were; so they are when
somebody has come or said that it leaves."""
LOOK_SECONDS, LOOK_IN_HASTE_SECONDS = 3.0, 1.0
"""Between two looks: peers say every three seconds how they are. The shorter one while somebody may be lost."""
GONE = ("leaving", "finished")
"""Peers that have said that they go are never lost."""
SEALS_SECONDS = 3.0
"""How long a look waits for seals; it goes on without."""
ROUNDS_KEPT = 512
NEWEST_ROUNDS = 40
"""Asked for at first; more may come."""

_logger = logging.getLogger(__name__)


class Observer:
    """Made by `create`, ended by `close`; methods are for the loop that made it.

    Args:
        node: an observer's.
        introducers: peers whose addresses a person gave, asked for seals first.
        home: of a peer of this run, whose seals count where the run is not open; None: there is none.
    """

    def __init__(
        self,
        node: SwarmNode,
        manifest: Manifest,
        run_id: bytes,
        introducers: frozenset[bytes],
        home: Home | None = None,
    ) -> None:
        self.node, self.manifest, self.run_id = node, manifest, run_id
        self.traffic = Traffic()
        self._client = Client(node, self.traffic, run_id)
        self._introducers = introducers
        self.home = home
        #: of a run that is not open
        self._kept = RoundsOfHome(home.events) if home is not None and manifest.access.mode != "open" else None
        self._kept_rounds: tuple[Sealed, ...] = ()
        #: who did how much, as far as it was counted
        self._tally: Tally | None = None
        self._census = Census(frozenset(), frozenset())
        self._shelves = Shelves(node, run_id, manifest.records_key)
        self._counting: asyncio.Task[None] | None = None
        self._counted_at, self._count_due = 0.0, 0.0
        #: peers that were there when nodes were counted last
        self._present: frozenset[bytes] = frozenset()
        #: before the next look
        self.pause_seconds = LOOK_SECONDS
        self._walk: Walk | None = None
        #: rounds too far back to be undone, and those after them
        self._settled: deque[Sealed] = deque(maxlen=ROUNDS_KEPT)
        self._newest: dict[bytes, Sealed] = {}
        #: peers that keep no seals or did not answer, until when they are left alone
        self._silent: dict[bytes, float] = {}
        #: the newest round that a record named, and since when (monotonic); infinity: since before the first look
        self._furthest = (0, float("-inf"))

    @classmethod
    async def create(cls, addresses: list[str], choice: str | None = None, home: Home | None = None) -> Observer:
        """Meet a swarm at `addresses`, and find the run that `choice` names, or theirs.

        Args:
            home: of the person who looks.

        Raises:
            UnreachableError, AccessError, RunChoiceError, ManifestError, ClockSkewError, DaemonError
        """
        try:
            node = await SwarmNode.create(None, addresses, observer=True)
        except UnreachableError as error:
            raise UnreachableError(str(error), hint="is a peer running there? Try the address of another") from error
        own = home.manifest.read_bytes() if home is not None and home.manifest.exists() else None
        try:
            found = await find_run(node, addresses, choice, own)
            manifest, run_id = open_manifest(found)
            of_the_run = own is not None and open_manifest(own)[1] == run_id
        except BaseException:
            await node.close()
            raise
        introducers = frozenset(parse_addresses(addresses, own_peer_id=node.peer_id))
        return cls(node, manifest, run_id, introducers, home if of_the_run else None)

    async def close(self) -> None:
        """End it. Idempotent."""
        if self._counting is not None:
            await cancel_and_wait([self._counting])
        await self.node.close()

    async def look(self, *, seals: bool = True, whole_dht: bool = False) -> Inspection:
        """Return how the run is now.

        Args:
            seals: whether to ask for those that are new, too.
            whole_dht: whether to wait for all nodes, some of which may not answer.
        """
        looked = await self._shelves.look_at_all()
        records = looked.records
        first = self._counting is None
        hasty = self._shelves.someone_missing or self._may_be_lost(records, looked.at)
        self.pause_seconds = LOOK_IN_HASTE_SECONDS if hasty else LOOK_SECONDS
        present = frozenset(peer for peer, record in records.items() if record.state not in GONE)
        soon = self._counted_at + COUNT_IN_HASTE_SECONDS
        due = min(self._count_due, soon) if hasty or present != self._present else self._count_due
        if self._counting is None or (self._counting.done() and (whole_dht or time.monotonic() >= due)):
            self._present = present
            self._counting = asyncio.create_task(self._count(CENSUS_SECONDS if not first else 2 * FIRST_CENSUS_SECONDS))
        waits: list[asyncio.Task[None]] = [asyncio.create_task(self._hear_seals(records))] if seals else []
        if whole_dht:
            await self._counting
        elif first:
            await asyncio.wait([self._counting, *waits], timeout=FIRST_CENSUS_SECONDS)
        if waits:
            await asyncio.wait(waits, timeout=SEALS_SECONDS)
            await cancel_and_wait(waits)
        now = time.monotonic()
        furthest = max((record.round for record in records.values()), default=0)
        if furthest > self._furthest[0]:
            self._furthest = furthest, now if self._furthest[0] else float("-inf")
        since = self._furthest[1]
        return inspect_run(
            self.run_id,
            self.manifest.name,
            records,
            self._census,
            tokenizer_sha256=tokenizer_of_run(self.manifest),
            looked_at=looked.at,
            rounds=self.rounds,
            last_round=self.manifest.last_round,
            since_seal_seconds=now - since if since > 0 else None,
        )

    @property
    def rounds(self) -> tuple[Sealed, ...]:
        """The newest rounds, as far as seals are at hand, oldest first."""
        return self._kept_rounds or (*self._settled, *self._newest.values())

    def _may_be_lost(self, records: Mapping[bytes, PeerRecord], looked_at: Mapping[bytes, float]) -> bool:
        """Say whether somebody's record is older than it should be, and not so old that it is lost anyway."""
        return any(
            LATE_SECONDS < record.last_seen_seconds(looked_at[peer]) <= LOST_SECONDS and record.state not in GONE
            for peer, record in records.items()
        )

    async def _count(self, seconds: float) -> None:
        self._census = await self.node.crawl(timeout_seconds=seconds)
        nodes = len(self._census.alive) + len(self._census.dead)
        self._counted_at = time.monotonic()
        self._count_due = self._counted_at + max(COUNT_AGAIN_SECONDS, COUNT_NODE_SECONDS * nodes)

    # ---- seals ------------------------------------------------------------------------------------------------

    def _donors(self, records: Mapping[bytes, PeerRecord]) -> list[bytes]:
        """Peers to ask for seals, the likeliest first: one who is asked again and again has a connection already."""
        now = time.time()
        fresh = [peer for peer, record in records.items() if record.last_seen_seconds(now) < LOST_SECONDS]
        patient = [peer for peer in fresh if self._silent.get(peer, 0.0) < now]
        return sorted(
            patient, key=lambda peer: (peer not in self._introducers, not records[peer].addresses, -records[peer].round)
        )

    async def _hear_seals(self, records: Mapping[bytes, PeerRecord]) -> None:
        if self._kept is not None:
            self._kept_rounds = await asyncio.to_thread(self._kept.read)
            return
        for donor in self._donors(records)[:3]:
            if self._walk is not None and records[donor].round <= self._walk.head.round:
                return
            try:
                await self._hear_seals_of(donor)
                return
            except (CallError, UnreachableError, SealError) as error:
                _logger.debug("no seals from a peer: %s", error)
                self._silent[donor] = time.time() + 60.0

    async def _hear_seals_of(self, donor: bytes) -> None:
        while True:
            walk = self._walk
            known, at = (b"", 0) if walk is None else (walk.head.id, walk.head.round)
            with contextlib.suppress(UnreachableError):
                await self.node.connect(donor)
            header, seals = await self._client.seals(donor, at, known, NEWEST_ROUNDS)
            if header.opening:
                opening = read_opening(header.opening)
                if opening.state.run_id != self.run_id:
                    raise CallError("seals of another run")
                walk = self._walk = Walk(opening, verify)
                self._settled.clear()
                self._newest.clear()
            if walk is None:
                raise CallError("no seals")
            for signed in seals:
                for step in walk.take(signed):
                    self._settled.append(self._newest.get(step.id) or _sealed(step))
            # Those that were undone are none of the rest any more.
            self._newest = {step.id: self._newest.get(step.id) or _sealed(step) for step in walk.pending}
            if not seals or walk.head.round >= header.tip.round:
                return

    async def credit(self, progress: Callable[[int, int], None] = lambda done, of: None) -> Count:
        """Count who did how much, from all seals that some peer keeps: all at first, then those that are new.

        Args:
            progress: hears of rounds counted, of how many.

        Raises:
            CallError: nobody hands out seals.
            SealError: those of the home are none of this run.
        """
        if self.home is not None and self._kept is not None:
            return await asyncio.to_thread(self._credit_of_home, SealLog(self.home.seals))
        records = (await self._shelves.look_at_all()).records
        failure: Exception = CallError("no peer of this run is there")
        for donor in self._donors(records)[:4]:
            try:
                return await self._credit_of(donor, progress)
            except (CallError, UnreachableError, SealError) as error:
                failure = error
        raise CallError(f"nobody hands out seals: {failure}")

    def _credit_of_home(self, log: SealLog) -> Count:
        while True:
            known, at = self._counted
            opening, seals = answer_after(log, at, known if self._tally else b"", 0, at)
            if not (opening or seals):
                return self._tally.now() if self._tally else count_for(self.manifest)
            self._tally = tally_on(self._tally, self.manifest, read_opening(opening) if opening else None, seals)
            if not seals:
                return self._tally.now()

    async def _credit_of(self, donor: bytes, progress: Callable[[int, int], None]) -> Count:
        while True:
            known, at = self._counted
            with contextlib.suppress(UnreachableError):
                await self.node.connect(donor)
            header, seals = await self._client.seals(donor, at, known, 0)
            opening = read_opening(header.opening) if header.opening else None
            if opening is None and self._tally is None and seals:
                # From the run's beginning on, which follows from the manifest: nobody's word is needed.
                opening = Opening(header.chunks, self.manifest.beginning(self.run_id))
            if opening is None and self._tally is None:
                raise CallError("no seals")
            tally = self._tally = tally_on(self._tally, self.manifest, opening, seals)
            progress(tally.walk.head.round, header.tip.round)
            if not seals or tally.walk.head.round >= header.tip.round:
                return tally.now()

    @property
    def _counted(self) -> tuple[bytes, int]:
        """The state up to which seals are counted, and its round."""
        return (self.run_id, 0) if self._tally is None else (self._tally.walk.head.id, self._tally.walk.head.round)


class Tally:
    """A count that goes on: of what is too far back to be undone once, of the rest whenever it is asked for."""

    def __init__(self, manifest: Manifest, opening: Opening) -> None:
        self.walk = Walk(opening, verify)
        self.settled = count_for(manifest)

    def now(self) -> Count:
        """Return the count up to the newest seal."""
        return copy.deepcopy(self.settled).add_all(self.walk.pending)


def tally_on(tally: Tally | None, manifest: Manifest, opening: Opening | None, seals: Sequence[SignedSeal]) -> Tally:
    """Count on, or anew where what comes is not what follows.

    Args:
        opening: what the seals continue; None: what was counted last.
    """
    if opening is not None and (tally is None or opening.state.round <= tally.settled.last):
        tally = Tally(manifest, opening)
    elif opening is not None and tally is not None:
        tally.walk.restart(opening)
    if tally is None:
        raise SealError("seals of which nobody knows what they continue")
    for signed in seals:
        tally.settled.add_all(tally.walk.take(signed))
    return tally


def _sealed(step: SealedStep) -> Sealed:
    return sealed_event(step.shape, step.id, step.seal)


def names_in(seen: Inspection) -> dict[str, str]:
    """Return the names of peers by their ids."""
    return {peer["peer_id"]: peer["name"] for peer in seen.peers}


def peer_named(seen: Inspection, wanted: str) -> dict[str, Any] | None:
    """Return the one peer that a name, an id or an id's end means; None: none, or several."""
    found = [peer for peer in seen.peers if wanted in (peer["name"], peer["peer_id"])] or [
        peer for peer in seen.peers if len(wanted) >= 4 and peer["peer_id"].endswith(wanted)
    ]
    return found[0] if len(found) == 1 else None
