"""Accumulate and select in one pass over a CPU's memory.

A thread takes a chunk: it reads the gradient where it lies, transforms it, adds it to the momentum and takes the
largest entries out, all of which a core's own cache holds, while the next chunk is on its way there. Even rows of the
basis mirror themselves and odd ones do so with the other sign, so the transform is of sums and differences of what is
mirrored, in half the operations. `dct.accumulate` and `selection.take` do the same, one after the other.

Cost: a third of what those two take one after the other, as gradient and momentum come from memory once.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression import coding, dct, selection
from p2ptrain.compression.layout import SIDE, Form
from p2ptrain.native import vectors
from p2ptrain.native.compiled import compiled, vectorised

VALUE_BITS = (1, 2, 8, 32)
"""Those that can be selected here."""
_FORMS: dict[Form, int] = {"none": 0, "rows": 1, "both": 2}
_HALF = SIDE // 2
_TILE = vectors.ROWS

Floats = NDArray[np.float32]


def accumulate_and_take(
    form: Form,
    gradient: Tensor,
    momentum: Tensor,
    beta: float,
    count: int,
    value_bits: int,
    index: Tensor,
    sent: Tensor,
) -> None:
    """`dct.accumulate` of chunks of one form, then `selection.take`.

    Args:
        gradient: [tall, wide, 64, 64], neighbours in the last dimension next to each other, and chunks of a row too.
        momentum: [tall * wide, 64 * 64], in place.
        count: how many are taken of a chunk.
        value_bits: one of VALUE_BITS.
        index, sent: [tall * wide * count], int64 and float32, written: what `selection.take` returns.
    """
    _pass(form, gradient, momentum, beta, value_bits, index.view(len(momentum), count), sent.view(len(momentum), count))


def accumulate(form: Form, gradient: Tensor, momentum: Tensor, beta: float) -> None:
    """That alone; its bits are the same."""
    none = torch.empty(len(momentum), 0)
    _pass(form, gradient, momentum, beta, 32, none.long(), none)


def _pass(
    form: Form, gradient: Tensor, momentum: Tensor, beta: float, value_bits: int, index: Tensor, sent: Tensor
) -> None:
    values = momentum.numpy()
    _accumulate_and_take(
        _FORMS[form],
        dct.entries_of(gradient).numpy(),
        dct.strides_of(gradient),
        values,
        values.view(np.int32),
        np.float32(beta),
        _halves() if form == "both" else _columns(),
        value_bits,
        coding.scale_table(),
        index.numpy(),
        sent.numpy(),
    )


@functools.cache
def _halves() -> Floats:
    """Of even rows of the basis and of odd ones the first halves [2, 64 / 2, 64 / 2], transposed."""
    basis = dct.float_basis(torch.device("cpu")).numpy()
    return np.stack([np.ascontiguousarray(basis[parity::2, :_HALF].T) for parity in range(2)])


@functools.cache
def _columns() -> Floats:
    """The basis transposed, in its left half and its right one [2, 64, 64 / 2]."""
    basis = dct.float_basis(torch.device("cpu")).numpy().T
    return np.stack([np.ascontiguousarray(basis[:, :_HALF]), np.ascontiguousarray(basis[:, _HALF:])])


@compiled
def _accumulate_and_take(
    form: int,
    gradient: Floats,
    plain: dct.Plain,
    momentum: Floats,
    bits: NDArray[np.int32],
    beta: np.float32,
    basis: Floats,
    value_bits: int,
    table: Floats,
    place: NDArray[np.int64],
    sent: Floats,
) -> None:
    """As above, of the `gradient` that has these `dct.Strides`."""
    folded, half = np.empty((4, _HALF, _HALF), np.float32), np.empty((4, _HALF, _HALF), np.float32)
    strides, room, chunks = dct.Strides(*plain), selection.room(), len(momentum)
    row = strides.row
    for chunk in range(chunks):
        following = min(chunk + 1, chunks - 1)
        here, there = dct.start_of(strides, chunk), dct.start_of(strides, following)
        assert here + (SIDE - 1) * row + SIDE <= len(gradient)
        if form == 2:
            _both(gradient, here, there, row, momentum, chunk, following, beta, basis, folded, half)
        elif form == 1:
            _rows(gradient, here, row, momentum[chunk], beta, basis, folded)
        else:
            _none(gradient, here, there, row, momentum, chunk, following, beta)
        if place.shape[1]:
            selection.take_from(momentum[chunk], bits[chunk], value_bits, table, place[chunk], sent[chunk], room)


@vectorised
def _both(
    gradient: Floats,
    here: int,
    there: int,
    row: int,
    momentum: Floats,
    chunk: int,
    following: int,
    beta: np.float32,
    basis: Floats,
    folded: Floats,
    half: Floats,
) -> None:
    """Of a chunk transformed in both dimensions; quarters of `folded` and `half` are even or odd in rows, then in
    columns."""
    start, next_start = gradient[here:].ctypes.data, gradient[there:].ctypes.data
    next_momentum = momentum[following].ctypes.data
    into, between, even = folded.ctypes.data, half.ctypes.data, basis.ctypes.data
    quarter = 4 * _HALF * _HALF
    for number in range(_HALF):
        vectors.fold(start + 4 * number * row, start + 4 * (SIDE - 1 - number) * row, into + 4 * _HALF * number)
    tiles, done = 8 * _HALF // _TILE, 0
    for which in range(4):
        for first in range(0, _HALF, _TILE):
            of = even + (which >> 1) * quarter + 4 * first
            here_out = between + which * quarter + 4 * _HALF * first
            vectors.tile(of, _HALF, 1, into + which * quarter, _HALF, here_out, _HALF, _HALF)
            _fetch(next_start, row, next_momentum, SIDE * done // tiles, SIDE * (done + 1) // tiles)
            done += 1
    for which in range(4):
        for first in range(0, _HALF, _TILE):
            of = between + which * quarter + 4 * _HALF * first
            here_out = into + which * quarter + 4 * _HALF * first
            vectors.tile(of, 1, _HALF, even + (which & 1) * quarter, _HALF, here_out, _HALF, _HALF)
            _fetch(next_start, row, next_momentum, SIDE * done // tiles, SIDE * (done + 1) // tiles)
            done += 1
    target = momentum[chunk]
    for parity in range(2):
        for number in range(_HALF):
            start_of_row = SIDE * (2 * number + parity)
            for column in range(_HALF):
                one = start_of_row + 2 * column
                target[one] = target[one] * beta + folded[2 * parity, number, column]
                target[one + 1] = target[one + 1] * beta + folded[2 * parity + 1, number, column]


@vectorised
def _fetch(gradient: int, row: int, momentum: int, first: int, end: int) -> None:
    """Have these rows of the next chunk, whose gradient and momentum are at these addresses, come nearer."""
    for number in range(first, end):
        for line in range(0, 4 * SIDE, vectors.LINE):
            vectors.prefetch(gradient + 4 * number * row + line)
            vectors.prefetch(momentum + 4 * number * SIDE + line)


@vectorised
def _rows(gradient: Floats, here: int, row: int, target: Floats, beta: np.float32, basis: Floats, out: Floats) -> None:
    """Of a chunk transformed in rows."""
    start, into, of = gradient[here:].ctypes.data, out.ctypes.data, basis.ctypes.data
    for half in range(2):
        for first in range(0, SIDE, _TILE):
            here_out = into + 4 * _HALF * (SIDE * half + first)
            vectors.tile(start + 4 * row * first, 1, row, of + 4 * _HALF * SIDE * half, _HALF, here_out, _HALF, SIDE)
    for half in range(2):
        for number in range(SIDE):
            for column in range(_HALF):
                entry = SIDE * number + _HALF * half + column
                made = out[2 * half + number // _HALF, number % _HALF, column]
                target[entry] = target[entry] * beta + made


@vectorised
def _none(
    gradient: Floats, here: int, there: int, row: int, momentum: Floats, chunk: int, following: int, beta: np.float32
) -> None:
    """Of a chunk that is not transformed."""
    target = momentum[chunk]
    next_start, next_momentum = gradient[there:].ctypes.data, momentum[following].ctypes.data
    for number in range(SIDE):
        _fetch(next_start, row, next_momentum, number, number + 1)
        of = gradient[here + number * row :]
        for column in range(SIDE):
            target[number * SIDE + column] = target[number * SIDE + column] * beta + of[column]
