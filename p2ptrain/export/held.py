"""A round's parameters, read from the home of a peer: from its checkpoint, or from one of its snapshots.

A model of somebody's own is read without its code: names and shapes are in the run's beginning, which every home keeps.
One that the manifest describes is built, so that it can be measured and written as the libraries do it.
Cost: what a peer holds of the model, and the array that is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor, nn

from p2ptrain.chain import ChainState
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import Manifest, open_manifest
from p2ptrain.errors import HomeError
from p2ptrain.models.of_manifest import task_of
from p2ptrain.models.own import FixedEntry, check_beginning
from p2ptrain.models.task import Task, TrainedParameter
from p2ptrain.state.checkpoint import load_checkpoint
from p2ptrain.state.run_files import named
from p2ptrain.state.snapshot import SnapshotFile, SnapshotStore
from p2ptrain.state.tensors import TensorFileError, bytes_of, pack_head
from p2ptrain.training.device import choose_device
from p2ptrain.training.replica import Replica
from p2ptrain.training.standing import checkpoint_shapes


@dataclass(frozen=True, slots=True)
class Held:
    """What a home holds of one round."""

    manifest: Manifest
    run_id: bytes
    replica: Replica
    root: bytes
    """Over the snapshot of this state [32 bytes]; the same on every peer."""
    sequences_read: int | None
    """By this home until then; None: a snapshot does not say."""
    fixed: tuple[FixedEntry, ...] = ()
    """What a model of somebody's own has beside the parameters that are trained."""

    @property
    def chain(self) -> ChainState:
        """Where on the chain the parameters stand."""
        return self.replica.chain

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All parameters that are trained, float32, by their names in the module, on the CPU."""
        return {p.name: p.tensor.detach().cpu() for p in self.replica.task.parameters}


def load_held(home: Home, round: int | None = None, device: str = "cpu") -> Held:
    """Return the parameters of one round of the run that this home is in.

    Args:
        round: default: the newest that the home holds.
        device: where the model is to compute, where that is wanted.

    Raises:
        HomeError: the home is in no run or has no such round, or its file is damaged.
        ModelError: this machine cannot build the model, or the home's first values are those of another.
    """
    hint = f"train first: p2ptrain join ADDR --home {home.path}"
    try:
        manifest, run_id = open_manifest(home.manifest.read_bytes())
    except OSError as error:
        raise HomeError(f"home {home.path} is in no run", hint=hint) from error
    task, fixed = _task(home, manifest)
    replica = Replica(manifest, run_id, choose_device(device), task)
    snapshots = {snapshot.round: snapshot for snapshot in reversed(SnapshotStore(home.checkpoints).all())}
    if round in snapshots:
        return Held(manifest, run_id, replica, _load_snapshot(replica, snapshots[round]), None, fixed)
    checkpoint = load_checkpoint(home.checkpoints, checkpoint_shapes(replica))
    rounds = [*snapshots, *([checkpoint.meta.chain.round] if checkpoint else [])]
    if not rounds:
        raise HomeError(f"home {home.path} has no checkpoint yet", hint=hint)
    wanted = max(rounds) if round is None else round
    if checkpoint is None or checkpoint.meta.chain.round != wanted:
        if wanted in snapshots:
            return Held(manifest, run_id, replica, _load_snapshot(replica, snapshots[wanted]), None, fixed)
        held = ", ".join(f"{number:,}" for number in sorted(set(rounds)))
        raise HomeError(
            f"home {home.path} does not hold round {wanted:,}; it holds {held}",
            hint=f"--round {max(rounds)}, or the home of another peer: --home DIR",
        )
    meta = checkpoint.meta
    replica.load_arrays(checkpoint.arrays, meta.chain)
    return Held(manifest, run_id, replica, _root_at(replica), meta.sequences_read, fixed)


def _root_at(replica: Replica) -> bytes:
    """Return the root of `replica.snapshot()`, without a copy of it."""
    arrays = replica.arrays()
    head = pack_head(msgspec.msgpack.encode(replica.chain), replica.shapes)
    return named([head, *map(bytes_of, arrays.values())]).root


def _load_snapshot(replica: Replica, file: SnapshotFile) -> bytes:
    """Bring a replica to where a snapshot stands; returns its root. Raises HomeError."""
    try:
        data = file.read()
        if named([data]).root != file.root:
            raise TensorFileError("damaged")
        replica.load_snapshot(data)
    except FileNotFoundError as error:
        raise HomeError(
            f"round {file.round:,} was replaced by a newer one meanwhile", hint="the same command again"
        ) from error
    except TensorFileError as error:
        raise HomeError(
            f"{file.path} cannot be used: {error}", hint=f"set it aside: mv {file.path} {file.path}.old"
        ) from error
    return file.root


def _task(home: Home, manifest: Manifest) -> tuple[Task, tuple[FixedEntry, ...]]:
    """Return what the replica is to hold, and what a model of somebody's own has fixed beside it."""
    config = manifest.task_config
    if config is None:
        return task_of(manifest, None), ()
    values = home.beginning if config.kind == "code" else home.values(config.values.root)
    try:
        if config.kind != "code":
            return task_of(manifest, values), ()
        header = check_beginning(values, config)
    except FileNotFoundError as error:
        raise HomeError(
            f"home {home.path} lacks the first values of its run", hint="it fetches them when it joins the run"
        ) from error
    trained = tuple(TrainedParameter(e.name, nn.Parameter(torch.empty(e.shape)), e.kind) for e in header.trained)
    # No value is read before it is loaded.
    return Task(nn.Module(), trained, lambda: None), header.fixed
