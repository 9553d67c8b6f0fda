"""Keeps a peer's records in the DHT up to date, and finds others by theirs.

Every `PUBLISH_SECONDS` a peer says how it is, so that one who was killed is missed within seconds. Others of the run
are followed as soon as their record is seen: two parts of a run that know nothing of each other meet here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

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
        finished: Callable[[], bool],
    ) -> None:
        self._node, self._driver, self._status = node, driver, status
        self._run_id, self._run_name, self._signed_manifest = run_id, run_name, signed_manifest
        self._name, self._device, self._addresses, self._finished = name, device, addresses, finished

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
        self.refresh()
        status = self._status
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

    def refresh(self) -> None:
        """Bring the status up to date with the machine."""
        machine, status = self._driver.machine, self._status
        members = machine.shape.members if machine.shape else ()
        if not self._finished():
            # After the last round there is no group; the last one stays on show.
            status.members = len(members)
            status.role = "member" if machine.is_member else "learner"
        status.bytes_sent_per_round, status.bytes_received_per_round = self._driver.last_round_bytes
        behind = max((tip.round for tip in self._driver.feed.tips.values()), default=0) > machine.head.round + 1
        if self._driver.leaving:
            status.state = "leaving"
        elif self._finished():
            status.state = "finished"
        elif machine.is_member:
            status.state = "solo" if len(members) == 1 else "training"
        else:
            status.state = "syncing" if self._driver.syncing or behind else "joining"

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
