"""From a decoded update to a step of about unit size: the direction.

To add one: write a class with `step_chunks` and, if it keeps replicated state, `moments`, and list it in `DIRECTIONS`.
Every device takes the same step to the bit: of floats there are only elementwise IEEE operations (add, multiply,
divide, `correctly_rounded_root`, each rounded on its own), and sums are of integers that float32 holds exactly.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from p2ptrain.compression.layout import CHUNK_SIZE, SIDE, ChunkLayout, Segment

MOMENTUM = 0.9
"""Decay of the first moment, where a direction has one, unless told otherwise."""


def correctly_rounded_root(x: Tensor) -> Tensor:
    """Square root of float32, as IEEE 754 rounds it.

    Torch's own is not on a CPU: it goes through MKL's vector library, which errs by a unit in the last place and, in a
    race at its first call, by far more (pytorch issues 31250 and 188792). NumPy's and CUDA's are.
    """
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


class _Moment:
    """A running mean of what entries were [chunks, 64 * 64], and what corrects it for its beginning at zero.

    Both are there twice: those from before a step stay until the next one, which overwrites them.
    """

    def __init__(self, chunks: int, beta: float, device: torch.device) -> None:
        self._beta = beta
        self.value = torch.zeros(chunks, CHUNK_SIZE, device=device)
        #: beta**steps per chunk [chunks, 1], by repeated multiplication: a power function may differ between machines
        self.decayed = torch.ones(chunks, 1, device=device)
        self._before = torch.empty_like(self.value), torch.empty_like(self.decayed)

    def begin(self) -> None:
        (self.value, self.decayed), self._before = self._before, (self.value, self.decayed)

    def decay(self, first: int, live: Tensor) -> tuple[Tensor, Tensor]:
        """These chunks after their decay, to be added to, and the divisor [chunks, 1] for their beginning at zero."""
        piece = slice(first, first + len(live))
        before, decayed_before = (tensor[piece] for tensor in self._before)
        value = torch.mul(before, self._beta, out=self.value[piece])
        decayed = torch.mul(decayed_before, self._beta, out=self.decayed[piece])
        if not live.all():
            value.copy_(torch.where(live.unsqueeze(1), value, before))
            decayed.copy_(torch.where(live.unsqueeze(1), decayed, decayed_before))
        return value, (1 - decayed).clamp(min=1e-6)

    def load(self, value: Tensor, decayed: Tensor) -> None:
        self.value = value.to(self.value.device, copy=True)
        self.decayed = decayed.to(self.decayed.device, copy=True)


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

    def step_entries(self, first: int, place: Tensor, update: Tensor, live: Tensor) -> Tensor:
        """`step_chunks` where `update` [n] holds all that is not zero, at `place` [n] of the chunks flattened.

        The rest takes no step, and of its moment a multiplication is all: adding zero changes no bit.
        """
        moment, corrected_by = self._moments["second"].decay(first, live)
        flat = moment.view(-1)
        flat.index_add_(0, place, (update * update).mul_(1 - self._beta).mul_(live[place // CHUNK_SIZE]))
        corrected = flat[place] / corrected_by.view(-1)[place // CHUNK_SIZE]
        return update / correctly_rounded_root(corrected).add_(self._epsilon)


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

    Three Newton-Schulz steps, from a bound of the spectral norm that is nearer than Frobenius', bring all singular
    values but small ones to within about 0.7 and 1.2. They are taken in integers: products of floats would round
    differently on different devices, and a matrix's own would cost as much more as the matrix is wider than a block.
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
        total, _ = self._moments["first"].decay(first, live)
        total.add_(_alive(update, live))
        blocks = update.add_(total * self._momentum).view(-1, SIDE, SIDE)
        return _alive(orthogonal(blocks).mul_(SIDE**0.5).view(update.shape), live)


_X_MAX, _GRAM_MAX, _FACTOR_MAX = 511, 500, 500
"""Of integers. Products of 64 and what is added to them then stay below 2**24, where float32 holds integers, and their
quotients by powers of two, exactly: they come out alike in whichever order they are added."""
_X_UNIT, _GRAM_UNIT, _FACTOR_UNIT = 256, 128, 64
"""What stands for 1 in a block, in its Gram matrix and in the factor made of that."""
_A, _B, _C = 3.4375, -301 / 64, 2.0
"""Muon's 3.4445, -4.775, 2.0315, as integers and powers of two have them."""
_ITERATIONS = 3
_CPU_BLOCKS = 64
"""Worked on at once: fewer stay in a core's cache, more leave Python's lock alone. With two threads 64 take least."""


def orthogonal(blocks: Tensor) -> Tensor:
    """Near the closest orthogonal matrix of each block [n, 64, 64], and the same on every device; zeros stay zeros."""
    count = _CPU_BLOCKS if blocks.device.type == "cpu" else max(1, len(blocks))
    out = torch.empty_like(blocks)
    scratch = torch.empty(4, min(count, len(blocks)), SIDE, SIDE, device=blocks.device)
    for some, into in zip(blocks.split(count), out.split(count), strict=True):
        torch.mul(_orthogonal(some, scratch[:, : len(some)]), 1 / _X_UNIT, out=into)
    return out


def _orthogonal(blocks: Tensor, scratch: Tensor) -> Tensor:
    """`orthogonal`, in integers, somewhere in `scratch` [4, n, 64, 64].

    Divisions are tensor by tensor: a number takes part in one as its rounded reciprocal, on some devices.
    """
    x, gram, factor, spare = scratch
    largest = torch.abs(blocks, out=spare).flatten(1).amax(1).view(-1, 1, 1)
    most = torch.full_like(largest, _X_MAX)
    torch.mul(blocks, most / torch.where(largest > 0, largest, 1), out=spare).round_()
    # No singular value's square exceeds the largest row sum of the Gram matrix, here in units of 512, each entry within
    # a half of what it is.
    torch.bmm(spare, spare.transpose(1, 2), out=gram)
    sums = torch.mul(gram, 1 / 512, out=factor).round_().abs_().sum(2).amax(1).view(-1, 1, 1).add_(SIDE / 2)
    scale = torch.full_like(sums, _X_UNIT).div_(correctly_rounded_root(sums.mul_(512)))
    torch.mul(spare, scale, out=x).round_()
    _integers(gram.mul_((scale * scale).mul_(_GRAM_UNIT / _X_UNIT**2)), _GRAM_MAX)
    unit = _C * _FACTOR_UNIT / _GRAM_UNIT**2
    for iteration in range(_ITERATIONS):
        if iteration:
            torch.baddbmm(gram, x, x.transpose(1, 2), beta=0, alpha=_GRAM_UNIT / _X_UNIT**2, out=gram)
            _integers(gram, _GRAM_MAX)
        torch.baddbmm(gram, gram, gram, beta=_B * _FACTOR_UNIT / _GRAM_UNIT, alpha=unit, out=factor)
        torch.baddbmm(x, _integers(factor, _FACTOR_MAX), x, beta=_A, alpha=1 / _FACTOR_UNIT, out=spare)
        x, spare = _integers(spare, _X_MAX), x
    return x


def _integers(x: Tensor, most: int) -> Tensor:
    """Rounded; in place."""
    return x.round_().clamp_(-most, most)


DIRECTIONS: dict[str, type[Direction]] = {
    "sign": Sign,
    "rms": Rms,
    "muon": Muon,
    "sgd": Sgd,
    "nesterov": Nesterov,
    "adam": Adam,
}
