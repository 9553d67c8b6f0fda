"""A whole round of DeMo as slowly and as plainly as it can be said: what the fast path is held to.

Peng et al., "DeMo: Decoupled Momentum Optimization", arXiv 2411.19870, Algorithm 1, with what this network adds: values
quantised, a reply of signed bytes, an inverse transform in integers, and more directions than the sign. Muon is that of
Jordan et al. (2024), by blocks; `compression/layout.py` says why chunks are cut as they are. A peer's own momentum is
float64 here, as nobody else sees how it is rounded. What replicas must agree on is int64 where it is a sum, and float32
where it is one operation on one entry, which IEEE 754 defines to the bit. Of the fast path only a file is used, that of
the integer basis.

A round is `accumulate`, `select`, `shares`, `reduce`, `step`, `settle`. `m` is a momentum [chunks, 4096].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE, ENTRIES, f32 = 64, 4096, np.float32
Array = NDArray[Any]
Reply = tuple[list[Array], list[Array], Array]
"""Of each chunk where its coefficients are, ascending, and their signed bytes; and the scale codes of all chunks."""
SCALES = np.array([0.0] + [2.0 ** (code / 8 - 28) for code in range(255)]).astype(f32)
"""The 256 scales of a chunk: steps of 2**(1/8) from 2**-28 on, and code 0 for a chunk of zeros."""
COSINES = np.cos(math.pi / SIDE * np.outer(np.arange(SIDE), np.arange(SIDE) + 0.5)) * math.sqrt(2 / SIDE)
COSINES[0] /= math.sqrt(2)
"""The orthonormal DCT-II: row k holds frequency k."""
with resources.files("p2ptrain.compression").joinpath("basis.npz").open("rb") as _file:
    INTEGERS: Array = np.load(_file, allow_pickle=False)["basis"].astype(np.int64)
"""The same times 2**10, rounded: no two machines need agree on a cosine."""


@dataclass(frozen=True)
class Chunks:
    """How a parameter of this shape lies in chunks of 64 by 64, which are transformed in `both` dimensions, in `rows`
    of 64 (a vector), or not at all (`none`)."""

    shape: tuple[int, ...]
    form: str

    def cut(self, tensor: Array) -> Array:
        """[chunks, 4096], with zeros around the tensor. Rows that are not transformed are dealt out among bands."""
        if len(self.shape) < 2:
            return np.pad(tensor.reshape(-1), (0, -tensor.size % ENTRIES)).reshape(-1, ENTRIES)
        matrix = tensor.reshape(self.shape[0], -1)
        padded = np.pad(matrix, [(0, -size % SIDE) for size in matrix.shape])
        bands, wide = (size // SIDE for size in padded.shape)
        if self.form == "none":
            return padded.reshape(SIDE, bands, wide, SIDE).transpose(1, 2, 0, 3).reshape(-1, ENTRIES)
        return padded.reshape(bands, SIDE, wide, SIDE).transpose(0, 2, 1, 3).reshape(-1, ENTRIES)

    def joined(self, chunks: Array) -> Array:
        """The inverse of `cut`: says of each entry of the tensor which of the chunks' entries it is."""
        places = self.cut(np.arange(1, 1 + math.prod(self.shape)).reshape(self.shape))
        return chunks[places > 0][np.argsort(places[places > 0])].reshape(self.shape)


def accumulate(of: Chunks, m: Array, gradient: Array, beta: float) -> Array:
    """The momentum after a decay and the transformed gradient."""
    blocks = of.cut(gradient.astype(np.float64)).reshape(-1, SIDE, SIDE)
    blocks = blocks if of.form == "none" else blocks @ COSINES.T
    return beta * m.astype(np.float64) + (COSINES @ blocks if of.form == "both" else blocks).reshape(-1, ENTRIES)


def nearest_scale(size: np.float32) -> np.float32:
    """The scale nearest to this size; of a size above zero never zero."""
    above = min(int(np.searchsorted(SCALES, size)), 255)
    below = max(above - 1, 1)
    return SCALES[below] if above > 1 and size - SCALES[below] < SCALES[above] - size else SCALES[above]


def quantise(value: Array, bits: int) -> Array:
    """What of one chunk's values [topk] a receiver sees: 32 bits all, 8 a signed byte, 2 and 1 a sign and a level."""
    if bits == 32:
        return value
    size = np.abs(value)
    if bits == 8:
        scale = nearest_scale(f32(size.max() / f32(127)))
        return np.clip(np.rint(value / scale), -127, 127).astype(f32) * scale if scale else np.zeros_like(value)
    scale = nearest_scale(f32(size.astype(np.float64).mean()))
    level = np.full_like(value, scale)
    if bits == 2:
        level = np.where(size > scale * f32(1.125), scale * f32(1.375), scale * f32(0.875))
    return np.where(value < 0, -level, level)


def select(m: Array, topk: int, bits: int) -> tuple[Array, Array, Array]:
    """The momentum without what is sent of it; where that is, ascending [chunks, topk]; and its values, quantised."""
    left, index = m.copy(), np.sort(np.argsort(-np.abs(m), axis=1, kind="stable")[:, :topk], axis=1)
    value = np.array([quantise(chunk[place].astype(f32), bits) for chunk, place in zip(m, index, strict=True)])
    np.put_along_axis(left, index, np.take_along_axis(m, index, 1) - value, 1)
    return left, index, value


def shares(sent: list[Array], weights: list[int], clip_ratio: float, cap_ratio: float) -> tuple[Array, dict[int, int]]:
    """Each member's factor in the mean, and who is clipped by what factor, in 256ths: a weight counts for at most
    `cap_ratio` times the median, a norm for `clip_ratio` times the median. Squares are added one after the other."""
    norms = [math.sqrt(np.square(value, dtype=np.float64).cumsum()[-1]) for value in sent]
    limit, cap = clip_ratio * float(np.median(norms)), cap_ratio * float(np.median(weights))
    clips = {member: int(256 * limit / norm) for member, norm in enumerate(norms) if norm > limit}
    capped = [min(float(weight), cap) for weight in weights]
    return np.array([w / sum(capped) * clips.get(i, 256) / 256 for i, w in enumerate(capped)], f32), clips


def reduce(index: Array, value: Array, share: Array, limit: int) -> Reply:
    """The reply to members' coefficients [members, chunks, topk]: at most `limit` a chunk, and none that is zero."""
    places, bytes_, codes = [], [], np.zeros(index.shape[1], np.uint8)
    for chunk in range(index.shape[1]):
        total, byte = np.zeros(ENTRIES, f32), np.zeros(ENTRIES, np.int64)
        for member in range(len(index)):
            total[index[member, chunk]] += value[member, chunk] * share[member]
        came = np.unique(index[:, chunk])
        codes[chunk] = code = min(int(np.searchsorted(SCALES, f32(np.abs(total).max() / f32(127)))), 255)
        largest = came[np.argsort(-np.abs(total[came]), kind="stable")[:limit]]
        if code:
            byte[largest] = np.clip(np.rint(total[largest] / SCALES[code]), -127, 127).astype(np.int64)
        places.append(np.flatnonzero(byte))
        bytes_.append(byte[byte != 0])
    return places, bytes_, codes


def decode(form: str, byte: Array) -> tuple[Array, Array]:
    """The inverse transform of bytes [chunks, 4096], in integers, and what a unit of each chunk is worth [chunks].

    Between the products each chunk is shifted to 11 bits: to the nearest integer, halves upwards."""
    blocks = byte.reshape(-1, SIDE, SIDE)
    if form != "both":
        integers = byte if form == "none" else (blocks @ INTEGERS).reshape(byte.shape)
        return integers, np.full(len(byte), 1 if form == "none" else 2.0**-10, f32)
    middle = INTEGERS.T @ blocks
    shift = np.array([max(int(np.abs(block).max()).bit_length() - 11, 0) for block in middle])
    middle = np.array([(block + (1 << s >> 1)) >> s for block, s in zip(middle, shift, strict=True)])
    return (middle @ INTEGERS).reshape(byte.shape), (2.0 ** (shift - 20)).astype(f32)


def orthogonal(block: Array) -> Array:
    """Near the closest orthogonal matrix, in 256ths: three steps of Newton-Schulz in integers (`orthogonal.py`)."""
    x = np.rint(block * (f32(511) / (np.abs(block).max() or f32(1)))).astype(np.int64)
    gram = x @ x.T
    bound = f32(np.abs(np.rint(gram / 512)).sum(1).max() + 32)  # no singular value's square is larger, in units of 512
    scale = f32(256) / np.sqrt(bound * f32(512))
    x = np.rint(x.astype(f32) * scale).astype(np.int64)
    gram = np.rint(gram.astype(f32) * (scale * scale * f32(128 / 256**2)))
    for iteration in range(3):
        gram = np.clip(np.rint(x @ x.T / 512) if iteration else gram, -500, 500).astype(np.int64)
        factor = np.clip(np.rint((gram @ gram - 301 * gram) / 128), -500, 500).astype(np.int64)
        x = np.clip(np.rint((220 * x + factor @ x) / 64), -511, 511).astype(np.int64)
    return x


def directed(way: str, u: Array, state: dict[str, Array], constants: tuple[float, float, float]) -> Array:
    """The step [chunks, 4096] that a direction makes of an update, all in float32; `state` goes on to the next step.

    A mean begins at zero, for which its divisor makes up. `constants`: decay of squares, epsilon, decay of updates.
    Raises ValueError for a direction that is not here.
    """
    beta, epsilon, momentum = constants

    def mean(name: str, decay: float, of: Array) -> tuple[Array, Array]:
        state[name] = state.get(name, np.zeros_like(u)) * f32(decay) + of
        state[f"{name}_decayed"] = state.get(f"{name}_decayed", np.ones((len(u), 1), f32)) * f32(decay)
        return state[name], np.maximum(f32(1) - state[f"{name}_decayed"], f32(1e-6))

    if way in ("sign", "sgd"):
        return np.sign(u) if way == "sign" else u
    if way in ("nesterov", "muon"):
        ahead = u + mean("first", momentum, u)[0] * f32(momentum)
        if way == "muon":
            ahead = np.array([orthogonal(block) * f32(8 / 256) for block in ahead.reshape(-1, SIDE, SIDE)], f32)
        return ahead.reshape(u.shape)
    if way not in ("rms", "adam"):
        raise ValueError(f"the reference has no direction {way!r}")
    second, second_by = mean("second", beta, u * u * f32(1 - beta))
    root = np.sqrt(second / second_by) + f32(epsilon)
    if way == "rms":
        return u / root
    first, first_by = mean("first", momentum, u * f32(1 - momentum))
    return first / first_by / root


def step(of: Chunks, parameter: Array, reply: Reply, direct: Any, rate: float, decay: float) -> Array:
    """The parameter after the step that `direct` makes of a reply's update, with weight decay: `rate` times `decay`."""
    byte = np.zeros((len(reply[2]), ENTRIES), np.int64)
    for chunk, (place, number) in enumerate(zip(reply[0], reply[1], strict=True)):
        byte[chunk, place] = number
    integers, unit = decode(of.form, byte)
    update = integers.astype(f32) * (unit * SCALES[reply[2]])[:, None]
    return (parameter * f32(1 - rate * decay) - of.joined(direct(update)) * f32(rate)).astype(f32)


def settle(m: Array, index: Array, value: Array, places: list[Array], clip: int) -> Array:
    """The momentum with all of what was sent [chunks, topk] back in it that the reply did not use."""
    returned = np.zeros_like(m)
    for chunk, (place, sent) in enumerate(zip(index, value, strict=True)):
        returned[chunk, place] = sent - np.where(np.isin(place, places[chunk]), sent * f32(clip / 256), f32(0))
    return m + returned
