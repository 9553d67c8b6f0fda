"""This home's checkpoint, read for `sample` and `eval`, also while its peer trains: the file is replaced whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from p2ptrain.config.home import Home
from p2ptrain.config.manifest import Manifest, open_manifest
from p2ptrain.errors import HomeError
from p2ptrain.models.gpt import GPT
from p2ptrain.models.of_manifest import task_of
from p2ptrain.state.checkpoint import load_checkpoint
from p2ptrain.training.device import choose_device
from p2ptrain.training.replica import Replica
from p2ptrain.training.standing import checkpoint_shapes


@dataclass(frozen=True, slots=True)
class Trained:
    """A checkpoint's model and where it comes from."""

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
    hint = f"train first: p2ptrain join ADDR --home {home.path}"
    try:
        manifest, run_id = open_manifest(home.manifest.read_bytes())
    except OSError as error:
        raise HomeError(f"home {home.path} is in no run", hint=hint) from error
    task = manifest.task_config
    if manifest.own_model is not None:
        raise HomeError(
            f"the run {manifest.name!r} trains a model of its owner's own, which is not here",
            hint="docs/own-model.md says how to load its parameters in Python",
        )
    values = None if task is None else home.values(task.values.root)
    if values is not None and not values.exists():
        raise HomeError(f"home {home.path} lacks the first values of its run", hint="p2ptrain join ADDR fetches them")
    replica = Replica(manifest, run_id, choose_device(device), task_of(manifest, values))
    checkpoint = load_checkpoint(home.checkpoints, checkpoint_shapes(replica))
    if checkpoint is None:
        raise HomeError(f"home {home.path} has no checkpoint yet", hint=hint)
    arrays = dict(checkpoint.arrays)
    del arrays["momentum"]
    replica.load_arrays(arrays, checkpoint.meta.chain)
    return Trained(manifest, replica)
