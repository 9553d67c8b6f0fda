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
from importlib import import_module, resources
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression.layout import CHUNK_SIZE, SIDE, ChunkLayout, Form
from p2ptrain.native import vectors
from p2ptrain.native.compiled import compiled, vectorised

Floats = NDArray[np.float32]
BASIS_BITS, VALUE_MAX, MIDDLE_BITS = 10, 255, 11
_HALF = SIDE // 2


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
    """Passes made one on a device of this type (`kernels/cpu.py`, `kernels/cuda.py`); None: there are none, as on CUDA
    without Triton."""
    if device not in ("cpu", "cuda"):
        return None
    try:
        return import_module(f"p2ptrain.compression.kernels.{device}")
    except ImportError:
        return None


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

    On a CPU the first of the two products, or the only one, is over those entries alone, and the second over columns
    that hold any.

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
    unit, squares = torch.empty(len(chunks)), chunks.view(-1, SIDE, SIDE)
    _squares(place.numpy(), value.numpy(), basis.numpy(), squares.numpy(), unit.numpy())
    return chunks, unit


def subtract_signs(place: Tensor, value: Tensor, parameter: Tensor, rate: float) -> None:
    """Take `rate` times the signs of what `decode_exact_entries` gives off a parameter, on a CPU.

    Args:
        place, value: as there, of chunks that are transformed in both dimensions.
        parameter: [tall, wide, 64, 64], in place, neighbours in the last dimension next to each other.
    """
    entries, basis = entries_of(parameter).numpy(), integer_basis(parameter.device).numpy()
    _signs(place.numpy(), value.numpy(), basis, entries, strides_of(parameter), rate)


class Strides(NamedTuple):
    """How blocks [tall, wide, 64, 64] lie in memory, neighbours in the last dimension next to each other."""

    tall: int
    wide: int
    band: int
    """Floats from a chunk to the one below it."""
    apart: int
    """Floats from a chunk to the one on its right."""
    row: int
    """Floats from a row of a chunk to the next."""


Plain = tuple[int, int, int, int, int]
"""Strides on their way to compiled code, which gives them their names: from Python it takes a plain tuple in a third
of the time."""


def strides_of(blocks: Tensor) -> Plain:
    """The `Strides` of `blocks` [tall, wide, 64, 64], on a CPU."""
    (tall, wide, _, _), (band, apart, row, _) = blocks.shape, blocks.stride()
    return tall, wide, band, apart, row


@compiled
def start_of(strides: Strides, chunk: int) -> int:
    """Which of `entries_of` is the first of a chunk."""
    return (chunk // strides.wide) * strides.band + (chunk % strides.wide) * strides.apart


def entries_of(blocks: Tensor) -> Tensor:
    """All memory from the first to the last entry of `blocks` [tall, wide, 64, 64], where neighbours in the last
    dimension are next to each other."""
    (tall, wide, _, _), (band, apart, row, _) = blocks.shape, blocks.stride()
    return blocks.as_strided(((tall - 1) * band + (wide - 1) * apart + (SIDE - 1) * row + SIDE,), (1,))


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
def _squares(place: NDArray[np.int64], value: Floats, basis: Floats, integers: Floats, unit: Floats) -> None:
    """Both passes, to `integers` [chunks, 64, 64] and `unit` [chunks]."""
    room, sums, entry = _room(), np.empty((2, SIDE, _HALF), np.float32), 0
    for chunk in range(len(integers)):
        entry, shift = _sums(place, value, entry, chunk, basis, room, sums)
        _unfold(sums, integers[chunk])
        unit[chunk] = math.ldexp(1.0, shift - 2 * BASIS_BITS)


@compiled
def _signs(
    place: NDArray[np.int64],
    value: Floats,
    basis: Floats,
    parameter: Floats,
    plain: Plain,
    rate: float,
) -> None:
    """`subtract_signs` from the `parameter` that has these `Strides`."""
    strides, room, sums, entry = Strides(*plain), _room(), np.empty((2, SIDE, _HALF), np.float32), 0
    for chunk in range(strides.tall * strides.wide):
        start = start_of(strides, chunk)
        _fetch(parameter, start, strides.row)
        entry, _ = _sums(place, value, entry, chunk, basis, room, sums)
        _subtract_signs(sums, parameter, start, strides.row, np.float32(rate))


@compiled
def _room() -> tuple[Floats, Floats, NDArray[np.int64], NDArray[np.int64]]:
    """For `_sums`: what lies between the passes, column by column of those that are not zero, even ones and odd ones;
    of each the first half of its row of the basis; how many there are; where each column of a chunk is among them."""
    middle, half = np.empty((2, _HALF, SIDE), np.float32), np.empty((2, _HALF, _HALF), np.float32)
    return middle, half, np.empty(2, np.int64), np.empty(SIDE, np.int64)


@compiled
def _sums(
    place: NDArray[np.int64],
    value: Floats,
    entry: int,
    chunk: int,
    basis: Floats,
    room: tuple[Floats, Floats, NDArray[np.int64], NDArray[np.int64]],
    sums: Floats,
) -> tuple[int, int]:
    """Both passes of the chunk whose entries begin at `entry`, but for `_unfold`: the second's `sums` [2, 64, 32] over
    even columns and over odd ones, for the first half of a row. Columns that are zero add nothing and are left out:
    sums of fewer integers are as exact.

    Returns:
        Where the entries of the next chunk begin, and by how much was shifted between the passes.
    """
    middle, half, columns, number_of = room
    columns[:] = 0
    number_of[:] = -1
    while entry < len(place) and place[entry] < (chunk + 1) * CHUNK_SIZE:
        inside = place[entry] % CHUNK_SIZE
        frequency, column = inside // SIDE, inside % SIDE
        parity, number = column & 1, number_of[column]
        if number < 0:
            number = columns[parity]
            columns[parity] += 1
            number_of[column] = number
            middle[parity, number] = 0
            half[parity, number] = basis[column, :_HALF]
        _add_times(middle[parity, number], basis[frequency], value[entry])
        entry += 1
    bits = middle.view(np.int32)
    largest = max(_largest_bits(bits[0, : columns[0]]), _largest_bits(bits[1, : columns[1]]))
    # The exponent of an integer below 2**24 gives its bit length exactly.
    shift = max(int(largest >> 23) - 126 - MIDDLE_BITS, 0)
    for parity in range(2):
        _shift(middle[parity, : columns[parity]], np.float32(math.ldexp(1.0, -shift)))
        _products(middle[parity, : columns[parity]], half[parity, : columns[parity]], sums[parity])
    return entry, shift


@vectorised
def _add_times(row: Floats, of: Floats, factor: np.float32) -> None:
    for column in range(SIDE):
        row[column] += factor * of[column]


@vectorised
def _largest_bits(bits: NDArray[np.int32]) -> np.int32:
    """Of the magnitudes: of floats that are not negative, their bits as integers have the same order."""
    largest = np.int32(0)
    for column in range(len(bits)):
        for row in range(SIDE):
            largest = max(largest, bits[column, row] & np.int32(0x7FFFFFFF))
    return largest


@vectorised
def _shift(middle: Floats, factor: np.float32) -> None:
    for column in range(len(middle)):
        for row in range(SIDE):
            middle[column, row] = np.floor(middle[column, row] * factor + np.float32(0.5))


@vectorised
def _products(columns: Floats, half: Floats, out: Floats) -> None:
    """out [64, 32] = the transpose of `columns` [n, 64] times `half` [n, 32]."""
    of, by, into = columns.ctypes.data, half.ctypes.data, out.ctypes.data
    for row in range(0, SIDE, vectors.ROWS):
        vectors.tile(of + 4 * row, SIDE, 1, by, _HALF, into + 4 * _HALF * row, _HALF, len(columns))


@vectorised
def _fetch(entries: Floats, start: int, row: int) -> None:
    """Have the rows of a chunk come nearer."""
    address = entries[start:].ctypes.data
    for number in range(SIDE):
        for line in range(0, 4 * SIDE, vectors.LINE):
            vectors.prefetch(address + 4 * number * row + line)


@vectorised
def _unfold(sums: Floats, out: Floats) -> None:
    """[64, 64] of the sums over even columns and over odd ones [2, 64, 32]: those mirror the first half of a row in the
    second, these do so with the other sign."""
    for row in range(SIDE):
        for near in range(_HALF):
            out[row, near] = sums[0, row, near] + sums[1, row, near]
            out[row, SIDE - 1 - near] = sums[0, row, near] - sums[1, row, near]


@vectorised
def _subtract_signs(sums: Floats, parameter: Floats, start: int, row: int, rate: np.float32) -> None:
    """Of what `_unfold` makes of `sums`."""
    for number in range(SIDE):
        # Unsigned: of other indices it is asked whether they count from the end, for each entry apart.
        there = np.uintp(start + number * row)
        for near in range(_HALF):
            even, odd = sums[0, number, near], sums[1, number, near]
            parameter[there + np.uintp(near)] -= _times_sign(rate, even + odd)
            parameter[there + np.uintp(SIDE - 1 - near)] -= _times_sign(rate, even - odd)


@vectorised
def _times_sign(rate: np.float32, of: np.float32) -> np.float32:
    step = rate if of > 0 else np.float32(0)
    return -rate if of < 0 else step


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
    fused = kernels_for("cuda") if values.device.type == "cuda" else None
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
