"""Put the parts of a peer together: the same for a session, the simulator and benchmarks.

A peer is a trainer and, on the network thread, a driver around a machine. Both stand on one replica, one journal and
one own log; the trainer is restored from them before the driver begins where the replica then stands.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from p2ptrain.calls.messages import Traffic
from p2ptrain.calls.uplink import UplinkMeter
from p2ptrain.chain import ChainState, Row
from p2ptrain.chain.admission import Grant
from p2ptrain.chain.evidence import audits_a_part
from p2ptrain.compression.codec import Codec
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import Manifest, ModelConfig
from p2ptrain.history.remembered import past_of, read_company
from p2ptrain.models.gpt import GPT
from p2ptrain.peer.driver import RoundDriver
from p2ptrain.peer.parts import DriverParts
from p2ptrain.peer.reporting import Reporter
from p2ptrain.peer.room import Room
from p2ptrain.peer.sealing import SealKeeper
from p2ptrain.rounds.events import ContributionReady, Doubted
from p2ptrain.rounds.inbox import Inbox, TrainerMessage
from p2ptrain.rounds.machine import RoundMachine
from p2ptrain.rounds.rules import RoundRules
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import OwnEntry, OwnLog
from p2ptrain.state.pieces import PieceFile
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Run:
    """The run that a peer takes part in."""

    manifest: Manifest
    run_id: bytes
    signed: bytes
    founder: bool
    """Whether the first seal is this peer's to make."""
    introducers: frozenset[bytes] = frozenset()
    """Peers whose addresses a person gave."""
    grant: Grant | None = None
    """By which this peer is in the run, where it comes as a guest."""


@dataclass(frozen=True, slots=True)
class Make:
    """What a session is made of, where it is not what a run's manifest alone says: benchmarks measure with others."""

    trainer: Callable[..., Trainer] = Trainer
    """Called as `Trainer` is."""
    model: Callable[[ModelConfig], GPT] = GPT
    inbox: Callable[[], queue.SimpleQueue[TrainerMessage | None]] = queue.SimpleQueue


class Standpoint(Protocol):
    """Where a peer begins: what a driver needs of a replica."""

    @property
    def codec(self) -> Codec: ...

    @property
    def chain(self) -> ChainState: ...

    @property
    def snapshot_max_bytes(self) -> int: ...

    @property
    def snapshot_chain(self) -> Callable[[bytes], ChainState]: ...


def driver_parts(
    run: Run,
    home: Home,
    node: SwarmNode,
    replica: Standpoint,
    *,
    journal: Journal,
    own_log: OwnLog,
    inbox: Inbox,
    uplink: UplinkMeter,
    files: Mapping[bytes, PieceFile] = {},
    sync_progress: Callable[[str, int, int], None] = lambda what, done, of: None,
    traffic: Traffic | None = None,
    reporter: Reporter | None = None,
    keeper: SealKeeper | None = None,
    room: Room | None = None,
) -> DriverParts:
    """Return what the driver of a peer works with; its machine begins where `replica` stands.

    Args:
        files: by root, those of the run that are here whole.
        sync_progress: hears (what, bytes done, bytes in all) while a snapshot is fetched.
        traffic: counts what is sent and received.
        reporter: writes down what happens, and keeps seals; None: nobody does.
        keeper: keeps seals where there is no reporter.
        room: keeps the home to the size that its owner allows.
    """
    snapshots = SnapshotStore(home.checkpoints)
    listener = keeper if reporter is None else reporter
    keeper = keeper if reporter is None else reporter.keeper
    beginning = run.manifest.beginning(run.run_id)
    machine = RoundMachine(
        node.peer_id,
        rules_of(run.manifest, replica.codec),
        replica.chain,
        node.identity.sign,
        Row(0, 0, uplink.declared_kbit),
        founder=run.founder,
        past=past_of(
            replica.chain,
            beginning,
            journal,
            snapshots,
            replica.snapshot_chain,
            replica.codec.chunks,
            None if keeper is None else keeper.log,
        ),
        company=read_company(home.company),
        introducers=run.introducers,
    )
    return DriverParts(
        node=node,
        manifest=run.manifest,
        signed_manifest=run.signed,
        run_id=run.run_id,
        codec=replica.codec,
        machine=machine,
        journal=journal,
        own_log=own_log,
        snapshots=snapshots,
        inbox=inbox,
        uplink=uplink,
        traffic=Traffic() if traffic is None else traffic,
        beginning=beginning,
        grant=run.grant,
        introducers=run.introducers,
        snapshot_max_bytes=replica.snapshot_max_bytes,
        snapshot_chain=replica.snapshot_chain,
        files=dict(files),
        sync_progress=sync_progress,
        decisions_log=home.decisions,
        company=home.company,
        told=(lambda what: None) if listener is None else listener.hear,
        seals=None if keeper is None else keeper.log,
        room=room,
    )


@dataclass(frozen=True, slots=True)
class Link:
    """From the trainer to the driver: each call becomes one of the driver's loop, and returns at once.

    Args:
        call: `call_soon_threadsafe` of the driver's loop, or `call_soon` where both are on one.
    """

    call: Callable[..., Any]
    driver: RoundDriver

    def contribute(self, ready: ContributionReady, entry: OwnEntry) -> None:
        """Hand over the contribution to the round under way."""
        self.call(self.driver.contribute, ready, entry)

    def root_computed(self, round: int, id: bytes, root: bytes) -> None:
        """Say that the snapshot of a round, at state `id`, is written."""
        self.call(self.driver.root_computed, round, id, root)

    def doubt(self, doubted: Doubted) -> None:
        """Say that a sealed reply points against what we sent for it."""
        self.call(self.driver.doubt, doubted)

    def prune_own_log(self, before: int) -> None:
        """Say that no restart needs the own log's entries of rounds before this one."""
        self.call(self.driver.prune_own_log, before)


def rules_of(manifest: Manifest, codec: Codec) -> RoundRules:
    """What the state machine needs of a manifest."""
    config = manifest.round
    return RoundRules(
        chunks=codec.chunks,
        target_batch=config.target_batch,
        min_seconds=config.min_seconds,
        max_seconds=config.max_seconds,
        fixed_pace=config.pace == "fixed",
        overlap=config.overlap == 1,
        round_max_seconds=config.round_max_seconds,
        grace_seconds=config.grace_seconds,
        reply_timeout_seconds=config.reply_timeout_seconds,
        seal_timeout_seconds=config.seal_timeout_seconds,
        alone_after_seconds=config.alone_after_seconds,
        root_interval=config.root_interval,
        last_round=manifest.last_round,
        weight_cap_ratio=config.weight_cap_ratio,
        audits_a_part=audits_a_part(codec),
    )
