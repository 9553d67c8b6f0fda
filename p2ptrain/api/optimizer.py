"""The optimizer that a loop of somebody's own steps: torch's interface, and the swarm behind it.

Rates follow from the run's manifest, because all replicas have to take the same step. Each group's `lr` shows the rate
of the round under way; what a scheduler writes there changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from p2ptrain.config.manifest import Manifest
from p2ptrain.models.task import TrainedParameter

SAMPLES_MAX = 2**20


class SwarmOptimizer(torch.optim.Optimizer):
    """See the module docstring; made by a `Peer`, whose `step` does the work.

    Args:
        parameters: what is trained.
        hand: takes the number of samples, and their mean loss or NaN.
    """

    def __init__(
        self, parameters: Sequence[TrainedParameter], manifest: Manifest, hand: Callable[[int, float], None]
    ) -> None:
        kinds = dict.fromkeys(parameter.kind for parameter in parameters)
        groups: list[dict[str, Any]] = [
            {
                "params": [parameter.tensor for parameter in parameters if parameter.kind == kind],
                "kind": kind,
                "learning_rate_scale": getattr(manifest.optimizer, kind).learning_rate_scale,
            }
            for kind in kinds
        ]
        super().__init__(groups, {"lr": 0.0})
        #: how many samples a `step` counts for that does not say
        self.samples_per_step = 1
        #: the loss that a `step` shows that is not told one
        self.loss_to_show: float | None = None
        self._hand = hand

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, samples: int | None = None, loss: float | None = None
    ) -> float | None:
        """Take the gradients, and do what the swarm asks for until there is a batch to compute for it.

        The gradients leave `grad`, also where they count for a later round. Parameters are where the swarm's newest
        round, of those known here, has brought them.

        Args:
            closure: computes loss and gradients.
            samples: how many the gradients are the mean of; default `samples_per_step`.
            loss: mean loss of these samples, to show; default what `closure` returns, or else `loss_to_show`.

        Raises:
            ValueError: `samples` is no number of samples.
            ModelError: a forward pass changes running statistics, or another saved buffer.
            RuntimeError: this peer's part in the run is over, as `Peer.ended` says.
            HomeError, RevokedError, UnreachableError: why it cannot go on.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        count = self.samples_per_step if samples is None else samples
        if not 1 <= count <= SAMPLES_MAX:
            raise ValueError(f"samples={count!r} is out of range: it is a whole number from 1 to {SAMPLES_MAX}")
        shown = next((one for one in (loss, value, self.loss_to_show) if one is not None), math.nan)
        self._hand(int(count), float(shown))
        return value

    def show_rate(self, rate: float) -> None:
        """Show the manifest's learning rate, with each kind's scale, in `param_groups`."""
        for group in self.param_groups:
            group["lr"] = rate * group["learning_rate_scale"]
