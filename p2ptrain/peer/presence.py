"""Keeps a peer's records in the DHT up to date, and finds others by theirs.

Every `PUBLISH_SECONDS` a peer says how it is, so that one who was killed is missed within seconds. Others of the run
are followed as soon as their record is seen: two parts of a run that know nothing of each other meet here.

Lives on the network thread. What the trainer's thread knows comes in `hear`, as a copy that is nobody else's.
"""

from __future__ import annotations

import asyncio
import logging
import time

from p2ptrain import __version__
from p2ptrain.config.manifest import PROTOCOL_VERSION
from p2ptrain.observe.status import Status
from p2ptrain.peer.driver import RoundDriver
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import PeerRecord, RunRecord

PUBLISH_SECONDS = 2.0
RUN_SECONDS = 15.0
MANIFEST_SECONDS = 600.0
FRESH_SECONDS = 8.0
"""A record older than this is of a peer that is gone."""

_logger = logging.getLogger(__name__)


class Presence:
    """One peer's records.

    Args:
        status: for this object alone.
        run_name: for the index of runs.
        name, device: what this peer calls itself and computes on.
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
    ) -> None:
        self._node, self._driver, self._status = node, driver, status
        self._run_id, self._run_name, self._signed_manifest = run_id, run_name, signed_manifest
        self._name, self._device, self._addresses = name, device, addresses

    def hear(self, status: Status) -> None:
        """The trainer's thread says how it is, in a copy for this object alone."""
        self._status = status

    async def run(self) -> None:
        """Until cancelled."""
        run_due = manifest_due = 0.0
        while True:
            began = time.monotonic()
            await self.publish()
            if began >= run_due:
                await self._node.publish_run(self._run_record())
                run_due = began + RUN_SECONDS
            if began >= manifest_due:
                await self._node.store_manifest(self._signed_manifest)
                manifest_due = began + MANIFEST_SECONDS
            await self._meet()
            await asyncio.sleep(max(0.2, PUBLISH_SECONDS - (time.monotonic() - began)))

    async def publish(self) -> None:
        """Say how this peer is, once."""
        status = self._status
        self._driver.publish_standing()
        status.take(self._driver.standing)
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
            device=self._device,
            version=__version__,
            addresses=self._addresses[:8],
        )
        await self._node.publish_peer(record)

    async def say_leaving(self) -> None:
        """Take no part any more, and have others know."""
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
        """Follow whoever is alive in this run."""
        now = time.time()
        for peer, record in (await self._node.read_peers(self._run_id)).items():
            if peer != self._node.peer_id and record.last_seen_seconds(now) < FRESH_SECONDS and record.addresses:
                self._driver.feed.follow(peer)
