"""Keeps a peer's records in the DHT up to date, and finds others by theirs.

Every `PUBLISH_SECONDS` a peer says how it is, so that one who was killed is missed within seconds. Others of the run
are dialled when their record is seen and followed when they answer: two parts of a run that know nothing of each other
meet here. Whoever makes up records chooses what we dial, so we dial few of them at once, and leave alone what fails.

Lives on the network thread. What the trainer's thread knows comes in `hear`, as a copy that is nobody else's.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence

from p2ptrain import __version__
from p2ptrain.config.manifest import PROTOCOL_VERSION
from p2ptrain.errors import P2PTrainError
from p2ptrain.observe.status import Status
from p2ptrain.peer.driver import RoundDriver
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.invitations import decode_grant
from p2ptrain.swarm.limits import Allowance, Backoff
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import EvaluationRecord, PeerRecord, RoundTime, RunRecord
from p2ptrain.swarm.shelves import Looked, Shelves
from p2ptrain.swarm.tasks import cancel_and_wait, failure_logged

PUBLISH_SECONDS = 3.0
TELL_SECONDS = 0.5
"""How often it looks whether somebody whose record it keeps is missing."""
RUN_SECONDS = 15.0
MANIFEST_SECONDS = 600.0
SPEAKERS = 4
"""So many of a run's peers, whoever it is each time, list it and keep its manifest in the DHT."""
FRESH_SECONDS = 8.0
"""A record older than this is of a peer that is gone."""

DIALS_AT_ONCE = 8
DIAL_SECONDS = 3.0
DIAL_AGAIN_SECONDS = 15.0, 600.0
"""The first and the longest pause after a peer, or an address, did not answer."""
DIALS_PER_SECOND, DIALS_BURST = 1.0, 16.0
"""To one host, for peers that are no members."""
ADDRESSES_DIALLED = 4
"""Of one record, at a time."""

_logger = logging.getLogger(__name__)
_failure_logged = failure_logged(_logger, "dialling peers has failed")


class Presence:
    """One peer's records.

    Args:
        status: for this object alone.
        run_name: for the index of runs.
        name, device: what this peer calls itself and computes on.
        secret: the manifest's `records_key`. With one nothing but encrypted peer records is published.
        grant: by which this peer is in the run, encoded, where it is a guest.
    """

    def __init__(
        self,
        node: SwarmNode,
        driver: RoundDriver,
        status: Status,
        *,
        run_id: bytes,
        run_name: str,
        signed_manifest: bytes,
        name: str,
        device: str,
        addresses: list[str],
        secret: bytes = b"",
        grant: bytes = b"",
    ) -> None:
        self._node, self._status = node, status
        #: None: this peer takes no part for a while
        self._driver: RoundDriver | None = driver
        self._run_id, self._run_name, self._signed_manifest = run_id, run_name, signed_manifest
        self._name, self._device, self._secret = name, device, secret
        #: for others to dial; replaced whole when they change
        self.addresses = addresses
        self._grant = grant
        self.shelves = Shelves(node, run_id, secret)
        #: of peers, and of addresses
        self._failures = Backoff(*DIAL_AGAIN_SECONDS)
        self._hosts = Allowance(DIALS_PER_SECOND, DIALS_BURST)
        self._meeting: asyncio.Task[None] | None = None
        self._leaving = False
        #: what peers say of the model, each in its turn: by round and peer, the first that it said
        self._said: dict[tuple[int, bytes], EvaluationRecord] = {}
        #: the same, never changed once made, for the trainer's thread
        self.said: tuple[tuple[bytes, EvaluationRecord], ...] = ()
        #: hears of each look what it has shown
        self.told: Callable[[Looked], None] = lambda looked: None

    def hear(self, status: Status) -> None:
        """The trainer's thread says how it is, in a copy for this object alone."""
        self._status = status

    def rest(self) -> None:
        """Take no part for a while: say so from now on, and dial nobody."""
        self._driver = None
        self._status.members = 0

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await self._run()
        finally:
            if self._meeting is not None:
                await cancel_and_wait([self._meeting])
            await self.shelves.close()

    async def _run(self) -> None:
        run_due = manifest_due = math.inf if self._secret else 0.0
        while True:
            began = time.monotonic()
            await self.publish()
            if began >= run_due:
                if self._is_speaker(first=run_due == 0.0):
                    await self.shelves.publish_run(self._run_record())
                run_due = began + RUN_SECONDS
            if began >= manifest_due:
                if self._is_speaker(first=manifest_due == 0.0):
                    await self._node.store_manifest(self._signed_manifest)
                manifest_due = began + MANIFEST_SECONDS
            await self._meet()
            due = max(time.monotonic() + 0.2, began + PUBLISH_SECONDS)
            while (left := due - time.monotonic()) > 0:
                await asyncio.sleep(min(left, TELL_SECONDS))
                self.shelves.tell_missing()
                self.shelves.make_room()

    def _is_speaker(self, first: bool) -> bool:
        """Say whether it is this peer's turn: the first time always, later as rarely as there are others."""
        return first or random.random() * self._status.members < SPEAKERS

    async def publish(self) -> None:
        """Say how this peer is, once."""
        status, driver = self._status, self._driver
        if driver is None:
            status.state, status.role, status.tokens_per_second = (
                "leaving" if self._leaving else "paused",
                "learner",
                0.0,
            )
        else:
            driver.publish_standing()
            status.take(driver.standing)
            self.shelves.sized_for(status.members, status.dialable)
        record = PeerRecord(
            peer_id=self._node.peer_id,
            run_id=self._run_id,
            time=time.time(),
            name=self._name,
            state=status.state,
            role="member" if status.role == "member" else "learner",
            round=status.round,
            state_id=status.state_id,
            total=status.total,
            tokens_per_second=status.tokens_per_second,
            bytes_sent_per_round=status.bytes_sent_per_round,
            bytes_received_per_round=status.bytes_received_per_round,
            loss=status.loss,
            evaluation=status.measured,
            round_time=_round_time(status),
            diverged=status.diverged,
            device=self._device,
            version=__version__,
            addresses=self.addresses[:8],
            grant=self._grant,
            refused=None if driver is None else driver.standing.refused,
        )
        await self.shelves.publish(record)

    async def say_leaving(self) -> None:
        """Take no part any more, and have others know."""
        self._leaving = True
        if self._driver is not None:
            self._driver.leave()
        await self.publish()

    def _run_record(self) -> RunRecord:
        return RunRecord(
            peer_id=self._node.peer_id,
            run_id=self._run_id,
            time=time.time(),
            name=self._run_name,
            protocol=PROTOCOL_VERSION,
            round=self._status.round,
            state_id=self._status.state_id,
            members=self._status.members,
        )

    async def _meet(self) -> None:
        """Dial some of those who seem alive in this run, members first, and follow who answers."""
        driver = self._driver
        if driver is None:
            return
        looked, feed = await self.shelves.look(), driver.feed
        records = looked.records
        self._note_evaluations(records)
        self.told(looked)
        for peer, record in records.items():
            # Neither of two peers that cannot know each other by their chains would call the other.
            grant = decode_grant(record.grant) if record.grant else None
            if grant is not None and grant.guest == peer:
                driver.hear_grant(grant)
        if self._meeting is not None and not self._meeting.done():
            return
        alive = [
            peer
            for peer, record in records.items()
            if record.last_seen_seconds(looked.at[peer]) < FRESH_SECONDS
            and record.state != "paused"
            and self._failures.ready(peer)
            and feed.would_follow(peer)
        ]
        random.shuffle(alive)
        alive.sort(key=lambda peer: not feed.is_member(peer))
        dials: dict[bytes, list[str]] = {}
        # Addresses that are chosen in this turn are not dialled twice in it either.
        chosen: set[str] = set()
        for peer in alive:
            routes = [address.rpartition("/p2p/")[0] for address in records[peer].addresses[:ADDRESSES_DIALLED]]
            routes = [route for route in routes if route and route not in chosen and self._failures.ready(route)]
            if not feed.is_member(peer):
                routes = [route for route in routes if self._hosts.take(route.split("/")[:3][-1])]
            if routes:
                chosen.update(routes)
                dials[peer] = routes
            if len(dials) == DIALS_AT_ONCE:
                break
        if dials:
            self._meeting = asyncio.create_task(self._dial(dials))
            self._meeting.add_done_callback(_failure_logged)

    def _note_evaluations(self, records: Mapping[bytes, PeerRecord]) -> None:
        """Take what peers say that they have measured, as far as it was their turn and is of our chain."""
        turns = {(turn.round, turn.peer_id): turn.state_id for turn in self._status.turns}
        known = {key: said for key, said in self._said.items() if turns.get(key) == said.state_id}
        for peer, record in records.items():
            said = record.evaluation
            if said is not None and turns.get((said.round, peer)) == said.state_id:
                known.setdefault((said.round, peer), said)
        if known != self._said:
            self._said = known
            self.said = tuple((peer, said) for (_, peer), said in sorted(known.items()))

    async def _dial(self, dials: Mapping[bytes, Sequence[str]]) -> None:
        await asyncio.gather(*(self._dial_one(peer, routes) for peer, routes in dials.items()))

    async def _dial_one(self, peer: bytes, routes: Sequence[str]) -> None:
        addresses = [f"{route}/p2p/{format_peer_id(peer)}" for route in routes]
        try:
            await self._node.connect(peer, addresses, timeout_seconds=DIAL_SECONDS)
        except P2PTrainError as error:
            _logger.debug("%s does not answer where its record says: %s", format_peer_id(peer)[-8:], error)
            for tried in (peer, *routes):
                self._failures.failed(tried)
        else:
            for tried in (peer, *routes):
                self._failures.succeeded(tried)
            if self._driver is not None:
                self._driver.feed.follow(peer)


def _round_time(status: Status) -> RoundTime | None:
    """Return where the last round went."""
    seconds = (status.computing_seconds, status.exchange_seconds, status.disk_seconds, status.idle_seconds)
    return RoundTime(*(int(1000 * one) for one in seconds)) if any(seconds) else None
