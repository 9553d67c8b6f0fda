"""From a decoded update to a step of about unit size: the direction.

To add one: write a class with `exact`, `step` and, if it keeps replicated state, `state`, and list it in `DIRECTIONS`.
An exact direction uses only elementwise IEEE operations (add, multiply, divide, `correctly_rounded_root`, each rounded
on its own), so every device takes the same step to the bit. One that cannot be exact says so, and roots hold replicas
together.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from p2ptrain.compression.layout import CHUNK_SIZE, ChunkLayout, Segment


def correctly_rounded_root(x: Tensor) -> Tensor:
    """Square root of float32, as IEEE 754 rounds it.

    Torch's own is not on a CPU: it goes through MKL's vector library, which errs by a unit in the last place and, in a
    race at its first call, by far more (pytorch issues 31250 and 188792). NumPy's and CUDA's are.
    """
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


class Direction(Protocol):
    """One parameter's direction: `update` is [its chunks, 64 * 64]; `live` [its chunks] is False for a SKIP."""

    exact: ClassVar[bool]

    def step(self, update: Tensor, live: Tensor) -> Tensor: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class Sign:
    """The sign of the update, as in DeMo (arXiv 2411.19870)."""

    exact: ClassVar[bool] = True

    def __init__(
        self, layout: ChunkLayout, segment: Segment, beta: float, epsilon: float, device: torch.device
    ) -> None:
        pass

    def step(self, update: Tensor, live: Tensor) -> Tensor:
        return update.sign()

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


class Rms:
    """The update over the root of its own running second moment, as in Adam, which every replica keeps alike.

    Suits parameters of which few entries matter in a round (embeddings, gains): an entry that rarely moves takes a full
    step when it does.
    """

    exact: ClassVar[bool] = True

    def __init__(
        self, layout: ChunkLayout, segment: Segment, beta: float, epsilon: float, device: torch.device
    ) -> None:
        self._beta, self._epsilon = beta, epsilon
        self._moment = torch.zeros(segment.end - segment.start, CHUNK_SIZE, device=device)
        #: beta**steps per chunk, by repeated multiplication: a power function may differ between machines
        self._decayed = torch.ones(segment.end - segment.start, 1, device=device)

    def step(self, update: Tensor, live: Tensor) -> Tensor:
        live = live.unsqueeze(1)
        square = update * update
        square = square * (1 - self._beta)
        moment = self._moment * self._beta
        moment = moment + square
        self._moment = torch.where(live, moment, self._moment)
        self._decayed = torch.where(live, self._decayed * self._beta, self._decayed)
        corrected = self._moment / (1 - self._decayed).clamp(min=1e-6)
        return update / (correctly_rounded_root(corrected) + self._epsilon)

    def state(self) -> dict[str, Tensor]:
        return {"moment": self._moment, "decayed": self._decayed}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._moment = state["moment"].to(self._moment.device, copy=True)
        self._decayed = state["decayed"].to(self._decayed.device, copy=True)


class Muon:
    """The nearest (semi-)orthogonal matrix by five Newton-Schulz steps (Jordan et al., 2024), scaled to sign's RMS.

    Matrix products of floats round differently on different devices: not exact.
    """

    exact: ClassVar[bool] = False

    def __init__(
        self, layout: ChunkLayout, segment: Segment, beta: float, epsilon: float, device: torch.device
    ) -> None:
        if segment.is_vector:
            raise ValueError(f"direction muon needs a matrix; {segment.spec.name} has shape {segment.spec.shape}")
        self._layout, self._segment, self._epsilon = layout, segment, epsilon

    def step(self, update: Tensor, live: Tensor) -> Tensor:
        segment = self._segment
        tall, wide = -(-segment.rows // 64), -(-segment.columns // 64)
        matrix = update.view(tall, wide, 64, 64).transpose(1, 2).reshape(tall * 64, wide * 64)
        matrix = matrix[: segment.rows, : segment.columns]
        x = matrix / (matrix.norm() + self._epsilon)
        transposed = x.shape[0] > x.shape[1]
        x = x.T if transposed else x
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        x = (x.T if transposed else x) * max(segment.rows, segment.columns) ** 0.5
        out = update.new_zeros(tall * 64, wide * 64)
        out[: segment.rows, : segment.columns] = x
        return out.view(tall, 64, wide, 64).transpose(1, 2).reshape(update.shape) * live.unsqueeze(1)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


DIRECTIONS: dict[str, type[Sign] | type[Rms] | type[Muon]] = {"sign": Sign, "rms": Rms, "muon": Muon}
