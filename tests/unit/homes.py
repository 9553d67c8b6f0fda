"""Homes of runs that were never on a network: a signed manifest, snapshots and a checkpoint of made-up rounds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import torch
from lone import identity_of
from torch import nn

from p2ptrain.chain import Member, Row
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import Manifest, open_manifest, sign_manifest
from p2ptrain.models.of_manifest import task_of
from p2ptrain.models.own import beginning_of, own_task
from p2ptrain.state.checkpoint import Checkpoint, CheckpointMeta, save_checkpoint
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.training.replica import Replica
from p2ptrain.training.standing import checkpoint_shapes

MEMBERS = ("ada", "grace")
SEQUENCES_READ = 480


def made_home(
    folder: Path,
    manifest: Manifest,
    snapshots: tuple[int, ...],
    checkpoint: int | None,
    module: nn.Module | None = None,
) -> tuple[Home, dict[int, Replica]]:
    """A home, and the replica of each round that it holds: parameters are drawn anew for each.

    Args:
        folder: has the first values of a model that the manifest describes, where it describes one.
        module: what is trained in place of the GPT, a model of somebody's own.
    """
    home = Home(folder)
    home.create()
    if module is not None:
        config, _ = beginning_of(module).write(home.beginning)
        manifest = msgspec.structs.replace(manifest, task=config)
    owner, founder = identity_of("owner"), identity_of(MEMBERS[0])
    home.manifest.write_bytes(sign_manifest(manifest, owner.key, format_peer_id(founder.peer_id)))
    manifest, run_id = open_manifest(home.manifest.read_bytes())
    held: dict[int, Replica] = {}
    for round in sorted({*snapshots, *([] if checkpoint is None else [checkpoint])}):
        values = None if manifest.task_config is None else home.values(manifest.task_config.values.root)
        task = task_of(manifest, values) if module is None else own_task(module, home.beginning, manifest.task_config)
        replica = held[round] = Replica(manifest, run_id, torch.device("cpu"), task)
        generator = torch.Generator().manual_seed(round)
        with torch.no_grad():
            for parameter in replica.task.parameters:
                parameter.tensor.add_(0.3 * torch.randn(parameter.tensor.shape, generator=generator))
        members = tuple(Member(identity_of(name).peer_id, Row(4, 1000, 100), 0, True) for name in MEMBERS)
        identifier = hashlib.sha256(b"%d" % round).digest()
        replica.chain = msgspec.structs.replace(
            replica.chain, round=round, id=identifier, total=2 * round, now=members, following=members
        )
        if round in snapshots:
            SnapshotStore(home.checkpoints).save(round, identifier, replica.snapshot())
        if round == checkpoint:
            shape = checkpoint_shapes(replica)["momentum"]
            arrays = replica.arrays() | {"momentum": torch.zeros(shape).numpy()}
            save_checkpoint(
                home.checkpoints, Checkpoint(CheckpointMeta(run_id, replica.chain, 0, SEQUENCES_READ, ()), arrays)
            )
    return home, held
