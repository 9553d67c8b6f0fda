"""What each of two ranks does for test_ranks.py, as `torchrun` starts it; rank 0 prints what it found as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import identity_of

from p2ptrain.config.manifest import Manifest, ModelConfig, OptimizerConfig, sign_manifest
from p2ptrain.models.of_manifest import task_of
from p2ptrain.models.task import Task
from p2ptrain.optim.local import Local
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.training.passes import Passes
from p2ptrain.training.ranks import Beginning, Ranks
from p2ptrain.training.replica import build_local

CONTEXT, ROWS, RATE = 16, 4, 1e-3
OPTIMIZERS = {
    "mean gradient": OptimizerConfig(),
    "inner steps": OptimizerConfig(strategy="diloco", inner_batch=8),
    "look ahead": OptimizerConfig(look_ahead=1.0, inner_batch=8),
}
MASKED = [True, False, True, True]
"""Which of the rows have something to learn, where not all have."""


def drawn(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 4096, (ROWS, CONTEXT + 1))


def begun(manifest: Manifest) -> Task:
    """A model that is not where the run begins."""
    task = task_of(manifest, None)
    task.begin()
    with torch.no_grad():
        for parameter in task.parameters:
            parameter.tensor.mul_(1.25)
    return task


def loss_of(task: Task, batch: np.ndarray[Any, Any], counted: np.ndarray[Any, Any] | None) -> Callable[[], Tensor]:
    return lambda: task.module.loss(torch.from_numpy(np.asarray(batch, np.int64)), counted)


def gathered(task: Task, local: Local) -> list[Tensor]:
    local.gather()
    return [parameter.tensor.grad for parameter in task.parameters if parameter.tensor.grad is not None]


def apart(ones: list[Tensor], others: list[Tensor]) -> float:
    """How far one list is from the other, over the norm of the other."""
    one, other = (torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in (ones, others))
    return ((one - other).norm() / other.norm()).item()


def main() -> None:
    ranks = Ranks.of_environment("cpu")
    assert ranks is not None
    torch.manual_seed(ranks.rank)
    if ranks.rank:
        ranks.follow(1)
        return
    torch.set_num_threads(1)
    found = {}
    for name, optimizer in OPTIMIZERS.items():
        manifest = Manifest(
            name="ranks",
            nonce="0" * 32,
            model=ModelConfig(layers=1, heads=2, embedding=16, context=CONTEXT),
            optimizer=optimizer,
        )
        signed = sign_manifest(manifest, Ed25519PrivateKey.generate(), format_peer_id(identity_of("ada").peer_id))
        ranks.begin(Beginning(signed, "", "cpu", recompute=False))
        led, alone = begun(manifest), begun(manifest)
        trained = torch.nn.ParameterList([parameter.tensor for parameter in led.parameters])
        local = ranks.lead(build_local(trained, manifest, ranks), list(trained))
        plain = build_local(torch.nn.ParameterList([p.tensor for p in alone.parameters]), manifest)
        for contribution in range(2):
            for seed in range(3):
                batch = drawn(10 * contribution + seed)
                share = ranks.deal(batch, None, Passes(ROWS // 2), RATE, b"after %d" % contribution)
                assert share is not None
                local.compute(loss_of(led, *share), ROWS // 2, RATE)
                plain.compute(loss_of(alone, batch, None), ROWS, RATE)
            found[f"{name} {contribution}"] = apart(gathered(led, local), gathered(alone, plain))
            for task in (led, alone):
                for parameter in task.parameters:
                    parameter.tensor.grad = None
                    with torch.no_grad():
                        parameter.tensor.add_(0.01)  # as a sealed round does
        if name == "mean gradient":
            batch, counted = drawn(99), np.ones((ROWS, CONTEXT + 1), bool)
            counted[[not teaches for teaches in MASKED]] = False
            share = ranks.deal(batch, counted, Passes(ROWS // 2), RATE, b"masked")
            assert share is not None
            local.compute(loss_of(led, *share), ROWS // 2, RATE)
            for rows in ([0, 3], [2, 1]):  # those that teach something are dealt first
                plain.compute(loss_of(alone, batch[rows], counted[rows]), ROWS // 2, RATE)
            found["masked"] = apart(gathered(led, local), gathered(alone, plain))
            counted[1:] = False
            found["too little"] = ranks.deal(batch, counted, Passes(ROWS // 2), RATE, b"masked")
            for parameter in led.parameters:
                parameter.tensor.grad = None
        ranks.rest()
    ranks.close()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
