"""This home's model, read for `sample` and `eval`, also while its peer trains.

The checkpoint's file is replaced whole. An earlier or later round is replayed from a snapshot, or from the checkpoint,
over the journal's rounds. Nothing is written and nothing removed, as the files are a living peer's; one that goes
meanwhile is said to be gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from p2ptrain import chain
from p2ptrain.chain.sealed import SealedRound, SealedRoundError, decode_sealed
from p2ptrain.chain.signatures import verify
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import Manifest, open_manifest
from p2ptrain.errors import HomeError
from p2ptrain.models.gpt import GPT
from p2ptrain.models.of_manifest import task_of
from p2ptrain.state.checkpoint import load_checkpoint
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.state.tensors import TensorFileError
from p2ptrain.training.device import choose_device
from p2ptrain.training.replica import Replica
from p2ptrain.training.standing import checkpoint_shapes


@dataclass(frozen=True, slots=True)
class Trained:
    """A model and where it comes from."""

    manifest: Manifest
    replica: Replica

    @property
    def model(self) -> GPT:
        """The replica's, which is, or is used as, the built-in GPT."""
        return cast(GPT, self.replica.model)


def load_trained(home: Home, device: str) -> Trained:
    """The model of this home's checkpoint.

    Raises:
        HomeError: this home has none yet, or its run trains a model of somebody's own.
        ModelError: this machine cannot build the model.
    """
    begun = _begun(home, device)
    if not _to_checkpoint(home, begun.replica):
        raise HomeError(f"home {home.path} has no checkpoint yet", hint=_train_first(home))
    return begun


def load_round(
    home: Home, device: str, round: int, progress: Callable[[int, int], None] = lambda done, of: None
) -> Trained:
    """The model of one round that this home holds.

    Args:
        progress: hears (rounds replayed, of).

    Raises:
        HomeError: it does not hold that round, or its run trains a model of somebody's own.
    """
    begun = _begun(home, device)
    replica = begun.replica
    for _ in _starts(home, replica, round):
        if _replay(home, replica, round, progress):
            return begun
    numbers = sorted(int(path.name.partition("-")[2]) for path in home.journal.glob("round-*"))
    held = f"it holds rounds {numbers[0]} to {numbers[-1]}" if numbers else "it holds none"
    raise HomeError(f"home {home.path} does not hold round {round}: {held}", hint="p2ptrain eval --history")


def _train_first(home: Home) -> str:
    return f"train first: p2ptrain join ADDR --home {home.path}"


def _begun(home: Home, device: str) -> Trained:
    """The run of a home at its beginning. Raises HomeError."""
    try:
        manifest, run_id = open_manifest(home.manifest.read_bytes())
    except OSError as error:
        raise HomeError(f"home {home.path} is in no run", hint=_train_first(home)) from error
    task = manifest.task_config
    if manifest.own_model is not None:
        raise HomeError(
            f"the run {manifest.name!r} trains a model of its owner's own, which is not here",
            hint="docs/own-model.md says how to load its parameters in Python",
        )
    values = None if task is None else home.values(task.values.root)
    if values is not None and not values.exists():
        raise HomeError(f"home {home.path} lacks the first values of its run", hint="p2ptrain join ADDR fetches them")
    return Trained(manifest, Replica(manifest, run_id, choose_device(device), task_of(manifest, values)))


def _to_checkpoint(home: Home, replica: Replica) -> bool:
    """Take a replica to where the checkpoint stands; False: there is none. Raises HomeError."""
    checkpoint = load_checkpoint(home.checkpoints, checkpoint_shapes(replica))
    if checkpoint is None:
        return False
    replica.load_arrays(checkpoint.arrays, checkpoint.meta.chain)
    return True


def _starts(home: Home, replica: Replica, round: int) -> Iterator[None]:
    """Take a replica to one place after another from which `round` may be reached, the nearest first."""
    if _to_checkpoint(home, replica) and replica.chain.round == round:
        yield
    for snapshot in SnapshotStore(home.checkpoints).all():
        if snapshot.round <= round:
            try:
                replica.load_snapshot(snapshot.read())
            except (OSError, TensorFileError):
                continue
            yield
    if _to_checkpoint(home, replica) and replica.chain.round < round:
        yield
    replica.reset()
    yield


def _replay(home: Home, replica: Replica, round: int, progress: Callable[[int, int], None]) -> bool:
    """Apply the journal's rounds up to `round`; False: they do not lead there from where the replica stands."""
    chunks, start = replica.layout.chunks, replica.chain.round
    for number in range(start + 1, round + 1):
        sealed = _sealed(home, number)
        if sealed is None:
            return False
        try:
            state = chain.extend(replica.chain, sealed.id, sealed.seal, chunks)
        except chain.SealError:
            # Of another branch than the snapshot.
            return False
        replica.apply(sealed, chain.shape_of(replica.chain, chunks), state)
        progress(number - start, round - start)
    return True


def _sealed(home: Home, number: int) -> SealedRound | None:
    try:
        return decode_sealed((home.journal / f"round-{number:012d}").read_bytes(), verify)
    except (OSError, SealedRoundError):
        return None
