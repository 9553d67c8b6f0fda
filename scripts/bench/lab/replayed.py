"""What a home's disk holds: a replica computed anew from a snapshot and the journal after it."""

from __future__ import annotations

from pathlib import Path

import torch

from p2ptrain import chain
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import open_manifest
from p2ptrain.state.journal import Journal
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.swarm.identity import verify
from p2ptrain.training.replica import Replica


def replayed(path: Path, round: int) -> tuple[str, str]:
    """(state id, parameter hash) at a round, from this home's disk alone: a snapshot and the journal after it."""
    home = Home(path)
    manifest, run_id = open_manifest(home.manifest.read_bytes())
    replica = Replica(manifest, run_id, torch.device("cpu"))
    journal = Journal(home.journal, run_id, verify)
    snapshots = [
        s for s in SnapshotStore(home.checkpoints).all() if s.round <= round and journal.position(s.id) is not None
    ]
    if snapshots:
        replica.load_snapshot(max(snapshots, key=lambda s: s.round).read())
    else:
        replica.reset()
    for number in range(replica.chain.round + 1, round + 1):
        sealed = journal.read(number)
        shape = chain.shape_of(replica.chain, replica.layout.chunks)
        replica.apply(sealed, shape, chain.extend(replica.chain, sealed.id, sealed.seal, replica.layout.chunks))
    return replica.chain.id.hex(), replica.parameters_sha256()
