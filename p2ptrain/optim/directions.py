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
    """One parameter's direction.

    `update` is [chunks, 64 * 64] and `live` [chunks], False for a SKIP. A step is `begin`, then `step_chunks` for all
    of the parameter's chunks, in ranges, each once. A step replaces the state: what `state` gave before it stays as it
    is until the step after.
    """

    #: every device takes the same step to the bit
    exact: ClassVar[bool]
    #: only the update's signs matter, and a step is -1, 0 or 1: its product with a rate is exact
    of_signs: ClassVar[bool]
    #: `step_chunks` needs all of a parameter at once
    whole: ClassVar[bool]

    def begin(self) -> None: ...

    def step_chunks(self, first: int, update: Tensor, live: Tensor) -> Tensor:
        """The step of the parameter's chunks from `first` on; it may overwrite `update` and lie there."""
        ...

    def step(self, update: Tensor, live: Tensor) -> Tensor:
        """The step of all chunks; `update` stays as it is."""
        ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class Sign:
    """The sign of the update, as in DeMo (arXiv 2411.19870)."""

    exact: ClassVar[bool] = True
    of_signs: ClassVar[bool] = True
    whole: ClassVar[bool] = False

    def __init__(
        self, layout: ChunkLayout, segment: Segment, beta: float, epsilon: float, device: torch.device
    ) -> None:
        pass

    def begin(self) -> None:
        pass

    def step_chunks(self, first: int, update: Tensor, live: Tensor) -> Tensor:
        return update.sign_()

    def step(self, update: Tensor, live: Tensor) -> Tensor:
        """The step of all chunks; `update` stays as it is."""
        return self.step_chunks(0, update.clone(), live)

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
    of_signs: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    def __init__(
        self, layout: ChunkLayout, segment: Segment, beta: float, epsilon: float, device: torch.device
    ) -> None:
        self._beta, self._epsilon = beta, epsilon
        self._moment = torch.zeros(segment.end - segment.start, CHUNK_SIZE, device=device)
        #: beta**steps per chunk, by repeated multiplication: a power function may differ between machines
        self._decayed = torch.ones(segment.end - segment.start, 1, device=device)
        #: both from before the step, which the next step overwrites
        self._before = torch.empty_like(self._moment), torch.empty_like(self._decayed)

    def begin(self) -> None:
        (self._moment, self._decayed), self._before = self._before, (self._moment, self._decayed)

    def step_chunks(self, first: int, update: Tensor, live: Tensor) -> Tensor:
        square = (update * update).mul_(1 - self._beta)
        moment, corrected_by = self._decay(first, live)
        if not live.all():
            square.mul_(live.unsqueeze(1))
        corrected = torch.div(moment.add_(square), corrected_by, out=square)
        return update.div_(correctly_rounded_root(corrected).add_(self._epsilon))

    def step_entries(self, first: int, place: Tensor, update: Tensor, live: Tensor) -> Tensor:
        """`step_chunks` where `update` [n] holds all that is not zero, at `place` [n] of the chunks flattened.

        The rest takes no step, and of its moment a multiplication is all: adding zero changes no bit.
        """
        moment, corrected_by = self._decay(first, live)
        flat = moment.view(-1)
        flat.index_add_(0, place, (update * update).mul_(1 - self._beta).mul_(live[place // CHUNK_SIZE]))
        corrected = flat[place] / corrected_by.view(-1)[place // CHUNK_SIZE]
        return update / correctly_rounded_root(corrected).add_(self._epsilon)

    def _decay(self, first: int, live: Tensor) -> tuple[Tensor, Tensor]:
        """The moment of these chunks after its decay, and what corrects it for its beginning at zero [chunks, 1]."""
        piece = slice(first, first + len(live))
        before, decayed_before = (tensor[piece] for tensor in self._before)
        moment = torch.mul(before, self._beta, out=self._moment[piece])
        decayed = torch.mul(decayed_before, self._beta, out=self._decayed[piece])
        if not live.all():
            moment.copy_(torch.where(live.unsqueeze(1), moment, before))
            decayed.copy_(torch.where(live.unsqueeze(1), decayed, decayed_before))
        return moment, (1 - decayed).clamp(min=1e-6)

    def step(self, update: Tensor, live: Tensor) -> Tensor:
        """The step of all chunks; `update` stays as it is."""
        self.begin()
        return self.step_chunks(0, update.clone(), live)

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
    of_signs: ClassVar[bool] = False
    whole: ClassVar[bool] = True

    def __init__(
        self, layout: ChunkLayout, segment: Segment, beta: float, epsilon: float, device: torch.device
    ) -> None:
        if segment.is_vector:
            raise ValueError(f"direction muon needs a matrix; {segment.spec.name} has shape {segment.spec.shape}")
        self._layout, self._segment, self._epsilon = layout, segment, epsilon

    def begin(self) -> None:
        pass

    def step_chunks(self, first: int, update: Tensor, live: Tensor) -> Tensor:
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

    def step(self, update: Tensor, live: Tensor) -> Tensor:
        """The step of all chunks."""
        return self.step_chunks(0, update, live)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


DIRECTIONS: dict[str, type[Sign] | type[Rms] | type[Muon]] = {"sign": Sign, "rms": Rms, "muon": Muon}
