"""From a decoded update to a step of about unit size: the direction.

To add one: write a class with `step_chunks` and, if it keeps replicated state, `moments`, and list it in `DIRECTIONS`.
Every device takes the same step to the bit: of floats there are only elementwise IEEE operations (add, multiply,
divide, `correctly_rounded_root`, each rounded on its own), and sums are of integers that float32 holds exactly.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression.layout import CHUNK_SIZE, SIDE, ChunkLayout, Segment
from p2ptrain.native.compiled import compiled, elementwise
from p2ptrain.optim.orthogonal import correctly_rounded_root, make_orthogonal, orthogonal_by_operations

Floats = NDArray[np.float32]
MOMENTUM = 0.9
"""Decay of the first moment, where a direction has one, unless told otherwise."""


class _Moment:
    """A running mean of what entries were [chunks, 64 * 64], and what corrects it for its beginning at zero.

    Both are there twice: those from before a step stay until the next one, which overwrites them.
    """

    def __init__(self, chunks: int, beta: float, device: torch.device) -> None:
        self.beta = beta
        self.value = torch.zeros(chunks, CHUNK_SIZE, device=device)
        #: beta**steps per chunk [chunks, 1], by repeated multiplication: a power function may differ between machines
        self.decayed = torch.ones(chunks, 1, device=device)
        self._before = torch.empty_like(self.value), torch.empty_like(self.decayed)

    def begin(self) -> None:
        (self.value, self.decayed), self._before = self._before, (self.value, self.decayed)

    def piece(self, first: int, live: Tensor) -> tuple[Tensor, Tensor]:
        """What these chunks were before the step, and room for what they are after it; their `decayed` is done."""
        piece = slice(first, first + len(live))
        before, decayed = self._before[1][piece], self.decayed[piece]
        torch.mul(before, self.beta, out=decayed)
        if not live.all():
            decayed.copy_(torch.where(live.unsqueeze(1), decayed, before))
        return self._before[0][piece], self.value[piece]

    def decay(self, first: int, live: Tensor) -> tuple[Tensor, Tensor]:
        """These chunks after their decay, to be added to, and the divisor [chunks, 1] for their beginning at zero."""
        before, value = self.piece(first, live)
        torch.mul(before, self.beta, out=value)
        if not live.all():
            value.copy_(torch.where(live.unsqueeze(1), value, before))
        return value, self.corrected_by(first, live)

    def corrected_by(self, first: int, live: Tensor) -> Tensor:
        """What corrects these chunks for their beginning at zero: divisors [chunks, 1]."""
        return (1 - self.decayed[first : first + len(live)]).clamp(min=1e-6)

    def load(self, value: Tensor, decayed: Tensor) -> None:
        self.value = value.to(self.value, copy=True)
        self.decayed = decayed.to(self.decayed, copy=True)


def _alive(of: Tensor, live: Tensor) -> Tensor:
    """`of`, zero in chunks of a SKIP; in place."""
    return of if live.all() else of.mul_(live.unsqueeze(1))


class Direction:
    """One parameter's direction, and the running means, by name, that it keeps and every replica keeps alike.

    `update` is [chunks, 64 * 64] and `live` [chunks], False for a SKIP. A step is `begin`, then `step_chunks` for all
    of the parameter's chunks, in ranges, each once. A step replaces the state: what `state` gave before it stays as it
    is until the step after.
    """

    #: only the update's signs matter, and a step is -1, 0 or 1: its product with a rate is exact
    of_signs: ClassVar[bool] = False
    #: names of its running means; `first` decays by `momentum`, `second` by `beta`
    moments: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        layout: ChunkLayout,
        segment: Segment,
        beta: float,
        epsilon: float,
        device: torch.device,
        momentum: float = MOMENTUM,
    ) -> None:
        self._beta, self._epsilon, self._momentum = beta, epsilon, momentum
        decays = {"first": momentum, "second": beta}
        unknown = [name for name in self.moments if name not in decays]
        if unknown:
            raise ValueError(f"{type(self).__name__} keeps a mean {unknown[0]!r}; there are {', '.join(decays)}")
        chunks = segment.end - segment.start
        self._moments = {name: _Moment(chunks, decays[name], device) for name in self.moments}

    def begin(self) -> None:
        for moment in self._moments.values():
            moment.begin()

    def step_chunks(self, first: int, update: Tensor, live: Tensor) -> Tensor:
        """The step of the parameter's chunks from `first` on; it may overwrite `update` and lie there."""
        raise NotImplementedError

    def step(self, update: Tensor, live: Tensor) -> Tensor:
        """The step of all chunks; `update` stays as it is."""
        self.begin()
        return self.step_chunks(0, update.clone(), live)

    def state(self) -> dict[str, Tensor]:
        named = self._moments.items()
        return {n: m.value for n, m in named} | {f"{n}_decayed": m.decayed for n, m in named}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, moment in self._moments.items():
            moment.load(state[name], state[f"{name}_decayed"])


class Sign(Direction):
    """The sign of the update, as in DeMo (arXiv 2411.19870)."""

    of_signs: ClassVar[bool] = True

    def step_chunks(self, first: int, update: Tensor, live: Tensor) -> Tensor:
        return update.sign_()


class Sgd(Direction):
    """The update itself."""

    def step_chunks(self, first: int, update: Tensor, live: Tensor) -> Tensor:
        return update


class Nesterov(Direction):
    """The update with Nesterov momentum, as torch.optim.SGD takes it and DiLoCo (arXiv 2311.08105) its outer steps."""

    moments: ClassVar[tuple[str, ...]] = ("first",)

    def step_chunks(self, first: int, update: Tensor, live: Tensor) -> Tensor:
        total, _ = self._moments["first"].decay(first, live)
        total.add_(_alive(update, live))
        return _alive(update.add_(total * self._momentum), live)


class Rms(Direction):
    """The update over the root of its own running second moment, as in Adam.

    Suits parameters of which few entries matter in a round (embeddings, gains): an entry that rarely moves takes a full
    step when it does.
    """

    moments: ClassVar[tuple[str, ...]] = ("second",)

    def step_chunks(self, first: int, update: Tensor, live: Tensor) -> Tensor:
        square = _alive((update * update).mul_(1 - self._beta), live)
        moment, corrected_by = self._moments["second"].decay(first, live)
        corrected = torch.div(moment.add_(square), corrected_by, out=square)
        return update.div_(correctly_rounded_root(corrected).add_(self._epsilon))

    def step_entries(self, first: int, place: Tensor, value: Tensor, scale: Tensor, live: Tensor) -> Tensor:
        """`step_chunks` where `value` [n], each times its chunk's `scale` [chunks], is all of an update that is not
        zero, at `place` [n], ascending, of the chunks flattened.

        The rest takes no step, and of its moment a multiplication is all: adding zero changes no bit.
        """
        moment = self._moments["second"]
        if place.device.type != "cpu":
            return self.step_entries_by_operations(first, place, value, scale, live)
        step, (before, after) = torch.empty_like(value), moment.piece(first, live)
        _rms(
            before.numpy(),
            after.numpy(),
            live.numpy(),
            place.numpy(),
            value.numpy(),
            scale.numpy(),
            moment.corrected_by(first, live).view(-1).numpy(),
            step.numpy(),
            np.float32(moment.beta),
            np.float32(1 - moment.beta),
            np.float32(self._epsilon),
        )
        return step

    def step_entries_by_operations(
        self, first: int, place: Tensor, value: Tensor, scale: Tensor, live: Tensor
    ) -> Tensor:
        """`step_entries` on any device, to the same bits."""
        moment, corrected_by = self._moments["second"].decay(first, live)
        flat, chunk = moment.view(-1), place // CHUNK_SIZE
        update = value * scale[chunk]
        flat.index_add_(0, place, (update * update).mul_(1 - self._beta).mul_(live[chunk]))
        corrected = flat[place] / corrected_by.view(-1)[chunk]
        return update / correctly_rounded_root(corrected).add_(self._epsilon)


@compiled
def _rms(
    before: Floats,
    after: Floats,
    live: NDArray[np.bool_],
    place: NDArray[np.int64],
    value: Floats,
    scale: Floats,
    corrected_by: Floats,
    step: Floats,
    beta: np.float32,
    rest: np.float32,
    epsilon: np.float32,
) -> None:
    """`Rms.step_entries`, to `step` [n], from the moment `before` to the one `after` [chunks, 64 * 64]."""
    entry = 0
    for chunk in range(len(before)):
        _scaled(before[chunk], beta if live[chunk] else np.float32(1), after[chunk])
        while entry < len(place) and place[entry] < (chunk + 1) * CHUNK_SIZE:
            inside, update = place[entry] - chunk * CHUNK_SIZE, value[entry] * scale[chunk]
            if live[chunk]:
                after[chunk, inside] += update * update * rest
            step[entry] = update / (np.sqrt(after[chunk, inside] / corrected_by[chunk]) + epsilon)
            entry += 1


@elementwise
def _scaled(of: Floats, factor: np.float32, out: Floats) -> None:
    for entry in range(CHUNK_SIZE):
        out[entry] = of[entry] * factor


class Adam(Direction):
    """Adam's step (Kingma and Ba, 2014) from the update."""

    moments: ClassVar[tuple[str, ...]] = ("first", "second")

    def step_chunks(self, first: int, update: Tensor, live: Tensor) -> Tensor:
        square = _alive((update * update).mul_(1 - self._beta), live)
        second, second_by = self._moments["second"].decay(first, live)
        root = correctly_rounded_root(torch.div(second.add_(square), second_by, out=square))
        mean, mean_by = self._moments["first"].decay(first, live)
        mean.add_(_alive(update.mul_(1 - self._momentum), live))
        return _alive(torch.div(mean, mean_by, out=update).div_(root.add_(self._epsilon)), live)


class Muon(Direction):
    """Nesterov momentum of the update, made orthogonal chunk by chunk, of sign's size: Muon (Jordan et al., 2024) in
    blocks of 64 by 64 (Khaled et al., arXiv 2510.16981, alternate such steps with those of whole matrices).

    In integers (`orthogonal.py`): products of floats would round differently on different devices, and a matrix's own
    would cost as much more as the matrix is wider than a block.
    """

    moments: ClassVar[tuple[str, ...]] = ("first",)

    def __init__(
        self,
        layout: ChunkLayout,
        segment: Segment,
        beta: float,
        epsilon: float,
        device: torch.device,
        momentum: float = MOMENTUM,
    ) -> None:
        if segment.is_vector:
            raise ValueError(f"direction muon needs a matrix; {segment.spec.name} has shape {segment.spec.shape}")
        super().__init__(layout, segment, beta, epsilon, device, momentum)

    def step_chunks(self, first: int, update: Tensor, live: Tensor) -> Tensor:
        if update.device.type != "cpu":
            return self.step_by_operations(first, update, live)
        moment = self._moments["first"]
        now, before, after = (chunks.view(-1, SIDE, SIDE).numpy() for chunks in (update, *moment.piece(first, live)))
        _muon(now, before, after, live.numpy(), moment.beta, self._momentum)
        return update

    def step_by_operations(self, first: int, update: Tensor, live: Tensor) -> Tensor:
        """`step_chunks` on any device, to the same bits."""
        total, _ = self._moments["first"].decay(first, live)
        total.add_(_alive(update, live))
        blocks = update.add_(total * self._momentum).view(-1, SIDE, SIDE)
        return _alive(orthogonal_by_operations(blocks).mul_(SIDE**0.5).view(update.shape), live)


@compiled
def _muon(update: Floats, before: Floats, after: Floats, live: NDArray[np.bool_], beta: float, momentum: float) -> None:
    """`Muon.step_chunks`, in place of `update`, from the moment `before` to the one `after`; all three [n, 64, 64]."""
    room = np.empty((4, SIDE, SIDE), np.float32)
    for number in range(len(update)):
        if not live[number]:
            after[number] = before[number]
            update[number] = 0
            continue
        _look_ahead(update[number], before[number], after[number], np.float32(beta), np.float32(momentum))
        make_orthogonal(update[number], update[number], np.float32(SIDE**0.5), room)


@elementwise
def _look_ahead(update: Floats, before: Floats, after: Floats, beta: np.float32, momentum: np.float32) -> None:
    """Nesterov's update [64, 64], in place of `update`."""
    for row in range(SIDE):
        for column in range(SIDE):
            total = before[row, column] * beta + update[row, column]
            after[row, column] = total
            update[row, column] += total * momentum


DIRECTIONS: dict[str, type[Direction]] = {
    "sign": Sign,
    "rms": Rms,
    "muon": Muon,
    "sgd": Sgd,
    "nesterov": Nesterov,
    "adam": Adam,
}
