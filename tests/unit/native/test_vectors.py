"""Loops with unchecked addresses read and write what they are given and nothing beside it.

Every buffer lies within a larger one: around what is read are NaNs, which would show in the result, and around what is
written a sentinel, which stays.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression import coding, dct, selection
from p2ptrain.compression.kernels import cpu
from p2ptrain.compression.layout import CHUNK_SIZE, SIDE, Form
from p2ptrain.native import vectors
from p2ptrain.optim.orthogonal import make_orthogonal, orthogonal_by_operations
from p2ptrain.optim.stepping import _subtract_at

MARGIN = 4 * CHUNK_SIZE
"""Entries on each side: more than a wrong stride or index of a tile reaches."""
SENTINEL = 123.25
LANES = vectors.LANES
FORMS: tuple[Form, ...] = ("none", "rows", "both")
rng = np.random.default_rng(0)


class Guarded:
    """An array within a larger one."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, fill: float = SENTINEL) -> None:
        """Of a shape and, in entries, strides: what lies in gaps between is guarded as well."""
        strides = strides or tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
        size = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True)) + 1
        self.whole = np.full(size + 2 * MARGIN, fill, np.float32)
        of_bytes = tuple(4 * stride for stride in strides)
        self.view = np.lib.stride_tricks.as_strided(self.whole[MARGIN:], shape, of_bytes)
        self._outside = np.ones(len(self.whole), bool)
        np.lib.stride_tricks.as_strided(self._outside[MARGIN:], shape, strides)[...] = False
        self._before = self.whole.copy()

    @property
    def tensor(self) -> Tensor:
        return torch.from_numpy(self.whole).as_strided(
            self.view.shape, tuple(stride // 4 for stride in self.view.strides), MARGIN
        )

    @property
    def untouched(self) -> bool:
        """Whether all around it is as it was, to the bit."""
        one, other = self.whole[self._outside], self._before[self._outside]
        return one.tobytes() == other.tobytes()


def read(values: NDArray[Any], strides: tuple[int, ...] | None = None) -> Guarded:
    """`values` with NaNs around them."""
    made = Guarded(values.shape, strides, np.nan)
    made.view[...] = values
    return made


def written(values: NDArray[Any], strides: tuple[int, ...] | None = None) -> Guarded:
    made = Guarded(values.shape, strides)
    made.view[...] = values
    return made


def normal(*shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape, np.float32)


def integers(*shape: int) -> NDArray[np.float32]:
    """Whose products float32 sums exactly, in whichever order."""
    return rng.integers(-50, 51, shape).astype(np.float32)


@numba.njit
def tile(a, k_step, row_step, b, b_step, out, out_step, count):  # type: ignore[no-untyped-def]
    vectors.tile(a.ctypes.data, k_step, row_step, b.ctypes.data, b_step, out.ctypes.data, out_step, count)


@numba.njit
def fold(top, bottom, out):  # type: ignore[no-untyped-def]
    vectors.fold(top.ctypes.data, bottom.ctypes.data, out.ctypes.data)


@numba.njit
def reaching(entries, bound, words):  # type: ignore[no-untyped-def]
    vectors.reaching(entries.ctypes.data, bound, words.ctypes.data, len(words))


@numba.njit
def how_many_reach(entries, bound, count):  # type: ignore[no-untyped-def]
    return vectors.how_many_reach(entries.ctypes.data, bound, count)


@numba.njit
def lowest_bit(word):  # type: ignore[no-untyped-def]
    return vectors.lowest_bit(word)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gap", [0, 1, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 32, 64])
def test_a_tile_is_a_product_of_what_it_is_given(transposed: bool, gap: int, count: int) -> None:
    rows, width = vectors.ROWS, vectors.WIDTH
    k_step, row_step = (rows + gap, 1) if transposed else (1, count + gap + 1)
    a = read(integers(rows, max(count, 1)), (row_step, k_step))
    b = read(integers(max(count, 1), width), (width + gap, 1))
    out = written(np.full((rows, width), np.nan), (width + gap, 1))
    tile(a.view, k_step, row_step, b.view, width + gap, out.view, width + gap, count)
    assert np.array_equal(out.view, a.view[:, :count] @ b.view[:count])
    assert a.untouched and b.untouched and out.untouched


@pytest.mark.parametrize("gap", [0, 1, 5])
def test_a_fold_is_of_two_rows(gap: int) -> None:
    width = vectors.WIDTH
    both, out = read(integers(2, 2 * width), (2 * width + gap, 1)), written(np.zeros((4, width)), (width * width, 1))
    fold(both.view[0], both.view[1], out.view)
    near, far = both.view[:, :width], both.view[:, : width - 1 : -1]
    (e, f), (o, p) = near + far, near - far
    assert np.array_equal(out.view, [e + f, o + p, e - f, o - p])
    assert both.untouched and out.untouched


@pytest.mark.parametrize("count", [0, 1, 3, 64])
def test_bits_say_which_magnitudes_reach_a_bound(count: int) -> None:
    # Around them are NaNs, which reach every bound.
    entries = read(normal(vectors.WORD * count + 1)[:-1] if count else normal(0).reshape(0))
    bits, bound = entries.view.view(np.int32), int(np.float32(0.5).view(np.int32))
    room = np.full(count + 64, 0x5A5A5A5A5A5A5A5A, np.uint64)
    words = room[32 : 32 + count]
    reaching(bits, bound, words)
    expected = np.abs(entries.view) >= 0.5
    assert np.array_equal(np.unpackbits(words.view(np.uint8), bitorder="little"), expected)
    assert how_many_reach(bits, bound, count) == expected.sum()
    assert (np.delete(room, range(32, 32 + count)) == 0x5A5A5A5A5A5A5A5A).all()
    assert entries.untouched


def test_the_lowest_bit_of_each_word() -> None:
    for bit in range(64):
        assert lowest_bit(np.uint64((1 << 63 | 1 << bit) & 2**64 - 1)) == bit


def strides_for(lying: str, tall: int, wide: int) -> tuple[int, ...]:
    """Of [tall, wide, 64, 64] in a matrix, in a slice of one, and with rows and chunks anywhere."""
    columns = {"dense": SIDE * wide, "wider": SIDE * wide + 37, "apart": 5 * SIDE * wide + 1, "chunks": SIDE}[lying]
    if lying == "chunks":
        return (wide * CHUNK_SIZE, CHUNK_SIZE, SIDE, 1)
    return (SIDE * columns + (11 if lying == "apart" else 0), SIDE + (3 if lying == "apart" else 0), columns, 1)


LYING = ("dense", "wider", "apart", "chunks")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lying", LYING)
@pytest.mark.parametrize("tall, wide", [(1, 1), (3, 2), (1, 3)])
def test_a_pass_keeps_to_its_buffers(form: Form, lying: str, tall: int, wide: int) -> None:
    chunks, count = tall * wide, 33
    gradient = read(normal(tall, wide, SIDE, SIDE), strides_for(lying, tall, wide))
    for value_bits, alone in product((8, 32), (False, True)):
        start = normal(chunks, CHUNK_SIZE)
        momentum, sent = written(start), written(np.full(chunks * count, np.nan))
        index = torch.full((2 * MARGIN + chunks * count,), -7)
        inside = index[MARGIN:-MARGIN]
        expected, blocks = torch.from_numpy(start.copy()), gradient.tensor.reshape(chunks, -1).contiguous()
        dct.accumulate(form, blocks, expected, 0.9, torch.empty_like(blocks))
        if alone:
            cpu.accumulate(form, gradient.tensor, momentum.tensor, 0.9)
        else:
            cpu.accumulate_and_take(form, gradient.tensor, momentum.tensor, 0.9, count, value_bits, inside, sent.tensor)
            place, values = selection.take(expected, count, value_bits)
            assert torch.equal(inside.view(chunks, count), place)
            torch.testing.assert_close(sent.tensor.view(chunks, count), values, rtol=0, atol=2e-5)
        torch.testing.assert_close(momentum.tensor, expected, rtol=0, atol=2e-5)
        assert gradient.untouched and momentum.untouched and sent.untouched
        assert (index[:MARGIN] == -7).all() and (index[-MARGIN:] == -7).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lying", LYING)
def test_a_pass_keeps_to_its_own_room(form: Form, lying: str) -> None:
    half = SIDE // 2
    gradient, start = read(normal(2, 2, SIDE, SIDE), strides_for(lying, 2, 2)), normal(4, CHUNK_SIZE)
    entries, strides = dct.entries_of(gradient.tensor).numpy(), dct.Strides(*dct.strides_of(gradient.tensor))
    momentum, beta = written(start), np.float32(0.9)
    basis = read(cpu._halves() if form == "both" else cpu._columns())
    folded, between = (written(np.full((4, half, half), np.nan)) for _ in range(2))
    expected = torch.from_numpy(start.copy())
    cpu.accumulate(form, gradient.tensor.clone(), expected, 0.9)
    for chunk in range(4):
        following = min(chunk + 1, 3)
        here, there = dct.start_of(strides, chunk), dct.start_of(strides, following)
        if form == "both":
            room = basis.view, folded.view, between.view
            cpu._both(entries, here, there, strides.row, momentum.view, chunk, following, beta, *room)
        elif form == "rows":
            cpu._rows(entries, here, strides.row, momentum.view[chunk], beta, basis.view, folded.view)
        else:
            cpu._none(entries, here, there, strides.row, momentum.view, chunk, following, beta)
    assert torch.equal(momentum.tensor, expected)
    assert all(one.untouched for one in (gradient, momentum, basis, folded, between))


@pytest.mark.parametrize("count", [0, 1, 7, 32])
def test_a_product_of_columns_keeps_to_them(count: int) -> None:
    columns, half = integers(count + 1, SIDE), integers(count + 1, SIDE // 2)
    of, by = read(columns), read(half)
    of.view[count], by.view[count] = np.nan, np.nan
    out = written(np.full((SIDE, SIDE // 2), np.nan))
    dct._products(of.view[:count], by.view[:count], out.view)
    assert np.array_equal(out.view, columns[:count].T @ half[:count])
    assert of.untouched and by.untouched and out.untouched


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("count", [1, 52, 300, CHUNK_SIZE])
def test_a_selection_keeps_to_its_own_room(count: int, equal: bool) -> None:
    chunk = written(np.ones(CHUNK_SIZE, np.float32) if equal else normal(CHUNK_SIZE))
    expected_place, expected_sent = selection.take(torch.from_numpy(chunk.view.copy()).view(1, -1), count, 32)
    wholes, room = [], []
    for array in (*selection.room(), np.empty(count, np.int64)):
        whole = np.full(len(array) + 2 * MARGIN, 77, array.dtype)
        wholes.append(whole)
        room.append(whole[MARGIN:-MARGIN])
    *scratch, place = room
    sent, table = written(np.full(count, np.nan)), coding.scale_table()
    selection.take_from(chunk.view, chunk.view.view(np.int32), 32, table, place, sent.view, tuple(scratch))
    assert np.array_equal(place, expected_place[0].numpy()) and np.array_equal(sent.view, expected_sent[0].numpy())
    assert chunk.untouched and sent.untouched
    assert all((whole[:MARGIN] == 77).all() and (whole[-MARGIN:] == 77).all() for whole in wholes)


@pytest.mark.parametrize("count", [1, 52, 300, CHUNK_SIZE])
@pytest.mark.parametrize("value_bits", cpu.VALUE_BITS)
def test_taking_from_chunks_keeps_to_them(count: int, value_bits: int) -> None:
    chunks = written(normal(3, CHUNK_SIZE))
    before = chunks.view.copy()
    place, sent = selection.take(chunks.tensor, count, value_bits)
    assert chunks.untouched
    alone = torch.from_numpy(before.copy())
    expected_place, expected_sent = selection.take(alone, count, value_bits)
    assert torch.equal(place, expected_place) and torch.equal(sent, expected_sent)
    assert np.array_equal(chunks.view, alone.numpy())


def coefficients(chunks: int) -> tuple[Tensor, Tensor]:
    place = np.sort(rng.choice(chunks * CHUNK_SIZE, 20 * chunks, replace=False))
    return torch.from_numpy(place), torch.from_numpy(integers(len(place)))


@pytest.mark.parametrize("form", FORMS)
def test_a_decode_keeps_to_its_buffers(form: Form) -> None:
    (place, value), blank = coefficients(5), np.full((5, CHUNK_SIZE), np.nan)
    chunks, scratch = written(blank), written(blank)
    made, unit = dct.decode_exact_entries(form, place, read(value.numpy()).tensor, chunks.tensor, scratch.tensor)
    dense = torch.zeros(5 * CHUNK_SIZE)
    dense[place] = value
    expected, expected_unit = dct.decode_exact_form(form, dense.view(5, CHUNK_SIZE), torch.empty(5, CHUNK_SIZE))
    assert torch.equal(made * unit.unsqueeze(1), expected * expected_unit.unsqueeze(1))
    assert chunks.untouched and scratch.untouched


@pytest.mark.parametrize("lying", LYING)
@pytest.mark.parametrize("tall, wide", [(1, 1), (3, 2)])
def test_steps_keep_to_a_parameter_wherever_it_lies(lying: str, tall: int, wide: int) -> None:
    chunks, (place, value) = tall * wide, coefficients(tall * wide)
    before = normal(tall, wide, SIDE, SIDE)
    parameter = written(before, strides_for(lying, tall, wide))
    dct.subtract_signs(place, value, parameter.tensor, 0.125)
    room = torch.empty(2, chunks, CHUNK_SIZE)
    made, _ = dct.decode_exact_entries("both", place, value, *room)
    signs = made.sign().numpy().reshape(before.shape)
    assert np.array_equal(parameter.view, before - np.float32(0.125) * signs)
    assert parameter.untouched

    parameter = written(before, strides_for(lying, tall, wide))
    entries, strides = dct.entries_of(parameter.tensor).numpy(), dct.strides_of(parameter.tensor)
    _subtract_at(place.numpy(), value.numpy(), np.float32(0.125), entries, strides)
    expected = before.copy()
    expected.reshape(-1)[place.numpy()] -= value.numpy() * np.float32(0.125)
    assert np.array_equal(parameter.view, expected)
    assert parameter.untouched


def test_a_block_is_made_orthogonal_within_its_buffers() -> None:
    block, out, room = read(normal(SIDE, SIDE)), written(np.zeros((SIDE, SIDE))), written(np.zeros((4, SIDE, SIDE)))
    make_orthogonal(block.view, out.view, np.float32(1), room.view)
    expected = orthogonal_by_operations(torch.from_numpy(block.view.copy()).unsqueeze(0))[0]
    assert np.array_equal(out.view, expected.numpy())
    assert block.untouched and out.untouched and room.untouched


def test_a_guard_sees_what_is_touched() -> None:
    made = written(np.zeros((2, 3)), (5, 1))
    assert made.untouched
    made.view[1] = 7
    assert made.untouched
    made.whole[MARGIN + 4] = 0  # in the gap between rows
    assert not made.untouched
