"""The transform of chunks: a real DCT for what a peer keeps to itself, an integer one for what all must agree on.

Forward, in float32, on one's own gradients: two batched matrix products over all chunks. Nobody else sees its rounding.
Inverse, of replies, exactly: the basis is rounded to 10 bits, values are integers of at most 255, and between the two
passes each chunk is shifted, by its own integer bit length, to 11 bits. Every partial sum then stays below 2**24, where
float32 holds integers exactly, so any device, thread count and summation order gives the same integers, whatever
arrives (bound: 64 * 255 * largest basis entry, then 2**11 * the largest column sum of the basis).
The integer basis is shipped in `basis.npz`, because no two machines need agree on a cosine.
"""

from __future__ import annotations

import functools
import math
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from p2ptrain.compression.layout import SIDE, ChunkLayout

BASIS_BITS, VALUE_MAX, MIDDLE_BITS = 10, 255, 11


@functools.cache
def float_basis(device: torch.device) -> Tensor:
    """Orthonormal DCT-II basis [64, 64] in float32; row = frequency."""
    n = torch.arange(SIDE, dtype=torch.float64)
    basis = torch.cos(math.pi / SIDE * (n[None, :] + 0.5) * n[:, None]) * math.sqrt(2 / SIDE)
    basis[0] /= math.sqrt(2)
    return basis.to(torch.float32).to(device)


@functools.cache
def integer_basis(device: torch.device) -> Tensor:
    """The shipped basis times 2**10, rounded, as float32 [64, 64]."""
    with resources.files("p2ptrain.compression").joinpath("basis.npz").open("rb") as file:
        basis = np.load(file, allow_pickle=False)["basis"]
    return torch.from_numpy(basis.astype(np.float32)).to(device)


def _select(blocks: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of `blocks`, without a copy when that is all of them."""
    return blocks if len(index) == len(blocks) else blocks.index_select(0, index)


def encode(layout: ChunkLayout, blocks: Tensor) -> Tensor:
    """Transform chunks [chunks, 64 * 64] of float32 in place, each as its kind wants; returns them."""
    basis = float_basis(blocks.device)
    for index, both in ((layout.matrix_chunks, True), (layout.row_chunks, False)):
        if len(index):
            index = index.to(blocks.device)
            part = _select(blocks, index).view(-1, SIDE, SIDE)
            part = part @ basis.T
            if both:
                part = basis @ part
            blocks.index_copy_(0, index, part.reshape(len(index), -1))
    return blocks


def decode_float(layout: ChunkLayout, blocks: Tensor) -> Tensor:
    """Inverse of `encode` in float32; used where bits need not agree (a lone optimizer, tests)."""
    basis = float_basis(blocks.device)
    out = blocks.clone()
    for index, both in ((layout.matrix_chunks, True), (layout.row_chunks, False)):
        if len(index):
            index = index.to(blocks.device)
            part = _select(blocks, index).view(-1, SIDE, SIDE)
            part = part @ basis
            if both:
                part = basis.T @ part
            out.index_copy_(0, index, part.reshape(len(index), -1))
    return out


def decode_exact(layout: ChunkLayout, values: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse transform of integers, exact on every device.

    Args:
        values: [chunks, 64 * 64] float32 holding integers in [-255, 255].

    Returns:
        integers as float32 [chunks, 64 * 64], and for each chunk [chunks] the power of two that one unit of it is
        worth relative to the values (so that integers * unit approximates the real inverse DCT).
    """
    allow = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return _decode_exact(layout, values)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent as float32 for int32 exponents in [-126, 127], by its bits: a device's power function may round."""
    return ((exponent + 127) << 23).view(torch.float32)


def _decode_exact(layout: ChunkLayout, values: Tensor) -> tuple[Tensor, Tensor]:
    basis = integer_basis(values.device)
    out = values.clone()
    unit = torch.ones(len(values), device=values.device)
    if len(layout.row_chunks):
        index = layout.row_chunks.to(values.device)
        part = _select(values, index).view(-1, SIDE, SIDE) @ basis
        out.index_copy_(0, index, part.reshape(len(index), -1))
        unit[index] = 2.0**-BASIS_BITS
    if len(layout.matrix_chunks):
        index = layout.matrix_chunks.to(values.device)
        first = basis.T @ _select(values, index).view(-1, SIDE, SIDE)
        # frexp of an integer below 2**24 gives its bit length exactly.
        largest = first.abs().amax((1, 2))
        bits = torch.frexp(largest).exponent
        shift = (bits - MIDDLE_BITS).clamp(min=0)
        step = _power_of_two(shift).view(-1, 1, 1)
        # Dividing by a power of two is exact, and so is a floor, unlike a division that rounds.
        middle = torch.floor(first / step + 0.5).clamp(-(2.0**MIDDLE_BITS), 2.0**MIDDLE_BITS)
        part = middle @ basis
        out.index_copy_(0, index, part.reshape(len(index), -1))
        unit[index] = _power_of_two(shift - 2 * BASIS_BITS)
    return out, unit
