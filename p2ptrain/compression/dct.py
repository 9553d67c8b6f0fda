"""The transform of chunks: a real DCT for what a peer keeps to itself, an integer one for what all must agree on.

Forward, in float32, on one's own gradients: two batched matrix products, the second of which adds to the momentum.
Nobody else sees its rounding.
Inverse, of replies, exactly: the basis is rounded to 10 bits, values are integers of at most 255, and between the two
passes each chunk is shifted, by its own integer bit length, to 11 bits. Every partial sum then stays below 2**24, where
float32 holds integers exactly, so any device, thread count and summation order gives the same integers, whatever
arrives (bound: 64 * 255 * largest basis entry, then 2**11 * the largest column sum of the basis).
The integer basis is shipped in `basis.npz`, because no two machines need agree on a cosine.

Cost: 2**20 floating-point operations a chunk and transform, where that is in two dimensions.
"""

from __future__ import annotations

import functools
import math
from importlib import resources
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression.compiled import compiled
from p2ptrain.compression.layout import CHUNK_SIZE, SIDE, ChunkLayout, Form

Floats = NDArray[np.float32]
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


@functools.cache
def kernels_for(device: str) -> ModuleType | None:
    """Passes made one on a CUDA device (`kernels.py`); None elsewhere, and where there is no Triton."""
    if device != "cuda":
        return None
    try:
        from p2ptrain.compression import kernels
    except ImportError:
        return None
    return kernels


def accumulate(form: Form, blocks: Tensor, momentum: Tensor, beta: float, scratch: Tensor) -> None:
    """momentum * beta + transform of `blocks`, in place; all three [chunks, 64 * 64] of float32, of chunks of one form.

    Args:
        scratch: overwritten.
    """
    if form == "none":
        torch.add(blocks, momentum, alpha=beta, out=momentum)
        return
    basis = float_basis(blocks.device)
    if form == "rows":
        held = momentum.view(-1, SIDE)
        torch.addmm(held, blocks.view(-1, SIDE), basis.T, beta=beta, out=held)
        return
    rows = torch.mm(blocks.view(-1, SIDE), basis.T, out=scratch.view(-1, SIDE)).view(-1, SIDE, SIDE)
    squares = momentum.view(-1, SIDE, SIDE)
    torch.baddbmm(squares, basis.expand_as(squares), rows, beta=beta, out=squares)


def encode(layout: ChunkLayout, blocks: Tensor) -> Tensor:
    """Transform chunks [chunks, 64 * 64] of float32 in place, each as its kind wants; returns them."""
    for form, start, end in layout.runs:
        part = blocks[start:end].clone()
        accumulate(form, part, blocks[start:end].zero_(), 0.0, torch.empty_like(part))
    return blocks


def decode_float(form: Form, blocks: Tensor) -> Tensor:
    """Inverse of `accumulate` in float32; used where bits need not agree (a lone optimizer, tests)."""
    basis = float_basis(blocks.device)
    if form == "none":
        return blocks
    part = (blocks.view(-1, SIDE) @ basis).view(-1, SIDE, SIDE)
    return (basis.T @ part if form == "both" else part).view(blocks.shape)


def decode_exact(layout: ChunkLayout, values: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse transform of integers, exact on every device.

    Args:
        values: [chunks, 64 * 64] float32 holding integers in [-255, 255].

    Returns:
        integers as float32 [chunks, 64 * 64], and for each chunk [chunks] the power of two that one unit of it is
        worth relative to the values (so that integers * unit approximates the real inverse DCT).
    """
    runs = [decode_exact_form(form, values[start:end].clone()) for form, start, end in layout.runs]
    return torch.cat([integers for integers, _ in runs]), torch.cat([unit for _, unit in runs])


def decode_exact_form(form: Form, values: Tensor, scratch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`decode_exact` of chunks of one form.

    Args:
        values: overwritten.
        scratch: [chunks, 64 * 64], overwritten. The integers lie in one of the two.
    """
    if scratch is None:
        scratch = torch.empty_like(values)
    allow = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return _decode_exact(form, values, scratch)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow


def decode_exact_entries(
    form: Form, place: Tensor, value: Tensor, chunks: Tensor, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """`decode_exact` of chunks of one form, which are zero but for some entries.

    On a CPU the first of the two products, or the only one, is over those entries alone.

    Args:
        place: [n], ascending, of the chunks flattened.
        value: [n] integers as float32.
        chunks, scratch: [chunks, 64 * 64], overwritten. The integers lie in one of the two.
    """
    if form == "none" or chunks.device.type != "cpu":
        chunks.zero_().view(-1)[place] = value
        return decode_exact_form(form, chunks, scratch)
    basis, into = integer_basis(chunks.device), scratch.numpy()
    if form == "rows":
        _rows(place.numpy(), value.numpy(), basis.numpy(), into)
        return scratch, torch.full((len(chunks),), 2.0**-BASIS_BITS)
    unit, squares = torch.empty(len(chunks)), scratch.view(-1, SIDE, SIDE)
    _middle(place.numpy(), value.numpy(), basis.numpy(), squares.numpy(), into.view(np.int32), unit.numpy())
    integers = torch.bmm(squares.transpose(1, 2), basis.expand_as(squares), out=chunks.view(-1, SIDE, SIDE))
    return integers.view(chunks.shape), unit


@compiled
def _rows(place: NDArray[np.int64], value: Floats, basis: Floats, out: Floats) -> None:
    """out[row] = the sum of values of a row of 64 times theirs of the basis."""
    out[:] = 0
    for number in range(len(place)):
        chunk, inside = place[number] // CHUNK_SIZE, place[number] % CHUNK_SIZE
        frequency, start = inside % SIDE, inside - inside % SIDE
        for column in range(SIDE):
            out[chunk, start + column] += value[number] * basis[frequency, column]


@compiled
def _middle(
    place: NDArray[np.int64],
    value: Floats,
    basis: Floats,
    middle: Floats,
    bits: NDArray[np.int32],
    unit: Floats,
) -> None:
    """What lies between the two passes, `middle` [chunks, 64, 64], transposed; `bits` [chunks, 64 * 64] are its own."""
    number = 0
    touched = np.empty(SIDE, np.bool_)
    for chunk in range(len(middle)):
        middle[chunk] = 0
        touched[:] = False
        while number < len(place) and place[number] < (chunk + 1) * CHUNK_SIZE:
            inside = place[number] % CHUNK_SIZE
            frequency, column = inside // SIDE, inside % SIDE
            touched[column] = True
            for row in range(SIDE):
                middle[chunk, column, row] += value[number] * basis[frequency, row]
            number += 1
        # Of floats that are not negative, their bits as integers have the same order. Those are compared faster.
        largest: np.int32 = np.int32(0)
        for entry in range(CHUNK_SIZE):
            magnitude: np.int32 = bits[chunk, entry] & np.int32(0x7FFFFFFF)
            largest = magnitude if magnitude > largest else largest
        # The exponent of an integer below 2**24 gives its bit length exactly.
        shift = max(int(largest >> 23) - 126 - MIDDLE_BITS, 0)
        factor = np.float32(math.ldexp(1.0, -shift))
        for column in range(SIDE):
            if touched[column]:
                for row in range(SIDE):
                    middle[chunk, column, row] = np.floor(middle[chunk, column, row] * factor + np.float32(0.5))
        unit[chunk] = math.ldexp(1.0, shift - 2 * BASIS_BITS)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent as float32 for int32 exponents in [-126, 127], by its bits: a device's power function may round."""
    return ((exponent + 127) << 23).view(torch.float32)


def _decode_exact(form: Form, values: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    basis = integer_basis(values.device)
    if form == "none":
        return values, torch.ones(len(values), device=values.device)
    if form == "rows":
        rows = torch.mm(values.view(-1, SIDE), basis, out=scratch.view(-1, SIDE))
        return rows.view(values.shape), torch.full((len(values),), 2.0**-BASIS_BITS, device=values.device)
    squares = values.view(-1, SIDE, SIDE)
    first = torch.bmm(basis.T.expand_as(squares), squares, out=scratch.view(-1, SIDE, SIDE)).view(values.shape)
    fused = kernels_for(values.device.type)
    unit = _shift_to_middle(first) if fused is None else fused.shift_to_middle(first)
    integers = torch.mm(first.view(-1, SIDE), basis, out=values.view(-1, SIDE))
    return integers.view(values.shape), unit


def _shift_to_middle(first: Tensor) -> Tensor:
    """Shift integers [chunks, 64 * 64], in place, each chunk's by as much as leaves 11 bits; what a unit is worth then
    after both passes [chunks]."""
    # frexp of an integer below 2**24 gives its bit length exactly.
    bits = torch.frexp(torch.maximum(first.amax(1), -first.amin(1))).exponent
    shift = (bits - MIDDLE_BITS).clamp(min=0)
    # Below 2**24 both the product with a power of two and the sum with a half are exact, and so is a floor. What comes
    # of it is within 2**11, as `bits` is the bit length.
    first.mul_(_power_of_two(-shift).unsqueeze(1)).add_(0.5).floor_()
    return _power_of_two(shift - 2 * BASIS_BITS)
