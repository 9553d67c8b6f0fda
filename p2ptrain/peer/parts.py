"""The parts that a driver is made of, which all that lives on the network thread shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from p2ptrain.calls.messages import Traffic
from p2ptrain.calls.uplink import UplinkMeter
from p2ptrain.chain import ChainState
from p2ptrain.chain.admission import Grant
from p2ptrain.compression.codec import Codec
from p2ptrain.config.manifest import Manifest
from p2ptrain.peer.room import Room
from p2ptrain.rounds import events
from p2ptrain.rounds.inbox import Inbox, Restore
from p2ptrain.rounds.machine import RoundMachine
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import OwnLog
from p2ptrain.state.pieces import PieceFile
from p2ptrain.state.seals import SealLog
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.swarm.node import SwarmNode


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverParts:
    """What a driver works with."""

    node: SwarmNode
    manifest: Manifest
    signed_manifest: bytes
    run_id: bytes
    codec: Codec
    machine: RoundMachine
    journal: Journal
    own_log: OwnLog
    snapshots: SnapshotStore
    inbox: Inbox
    uplink: UplinkMeter
    traffic: Traffic
    beginning: ChainState
    grant: Grant | None
    """By which this peer is in the run, where it came as a guest."""
    introducers: frozenset[bytes]
    """Peers whose addresses a person gave."""
    snapshot_max_bytes: int
    snapshot_chain: Callable[[bytes], ChainState]
    """Any thread."""
    files: Mapping[bytes, PieceFile]
    """By root: the files of the run that this peer has, whole."""
    sync_progress: Callable[[str, int, int], None]
    company: Path
    """Keeps with whom this peer was last on one chain."""
    decisions_log: Path
    """Where a failure leaves what the machine heard and decided last."""
    told: Callable[[events.Event | events.Effect | Restore], None] = lambda what: None
    """Hears each event before the machine does, and each effect once it is carried out."""
    room: Room | None = None
    """Keeps the home to what its owner allows; None: the owner allows any size."""
    seals: SealLog | None = None
    """The seals of our chain, kept for longer than its rounds; None: none are."""
