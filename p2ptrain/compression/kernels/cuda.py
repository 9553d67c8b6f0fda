# mypy: disable-error-code="no-untyped-def"
"""Accumulating and selecting as one pass over a CUDA device's memory, by Triton, which comes with torch there.

A program takes a chunk: it reads the gradient where it lies, transforms it, adds it to the momentum, finds the largest
entries and writes the momentum back without what is sent of them. That is 12 bytes a parameter, where separate
operations move 40. The k-th largest magnitude is found bit by bit: of floats that are not negative, their bits as
integers have the same order. `dct.accumulate` and `selection.take` do the same on any device, one after the other.

Of the exact decode, what lies between its products is one pass too; it shifts integers, so that its bits are the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from p2ptrain.compression import coding, dct, selection
from p2ptrain.compression.layout import CHUNK_SIZE, SIDE, Form

_FORMS: dict[Form, int] = {"none": 0, "rows": 1, "both": 2}
VALUE_BITS = (1, 2, 32)
"""Those that can be selected here."""
_WARPS = 4
_PRECISION = "tf32x3"
"""Of the transform: three products of tensor cores, which err about as float32 does."""
_SIDE: tl.constexpr = tl.constexpr(SIDE)
_CHUNK: tl.constexpr = tl.constexpr(CHUNK_SIZE)
_BASIS_BITS: tl.constexpr = tl.constexpr(dct.BASIS_BITS)
_MIDDLE_BITS: tl.constexpr = tl.constexpr(dct.MIDDLE_BITS)
_LOW: tl.constexpr = tl.constexpr(float(coding.LEVELS_2BIT[0]))
_HIGH: tl.constexpr = tl.constexpr(float(coding.LEVELS_2BIT[1]))
_SPLIT: tl.constexpr = tl.constexpr(float(coding.LEVEL_SPLIT_2BIT))


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
    """`kernels.cpu.accumulate_and_take`, on the device where its arguments are."""
    _accumulate_and_take[(len(momentum),)](
        gradient,
        gradient.stride(0),
        gradient.stride(2),
        gradient.shape[1],
        gradient.stride(1),
        momentum,
        dct.float_basis(momentum.device),
        beta,
        selection.scale_table(momentum.device),
        index,
        sent,
        count,
        FORM=_FORMS[form],
        BITS=value_bits,
        PRECISION=_PRECISION,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )


@triton.jit
def _accumulate_and_take(
    gradient,
    band_stride,
    row_stride,
    wide,
    chunk_stride,
    momentum,
    basis,
    beta,
    table,
    index_out,
    sent_out,
    count,
    FORM: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    side = tl.arange(0, _SIDE)
    inside = side[:, None] * _SIDE + side[None, :]
    start = gradient + (chunk // wide) * band_stride + (chunk % wide) * chunk_stride
    entries = tl.load(start + side[:, None].to(tl.int64) * row_stride + side[None, :])
    if FORM != 0:
        transposed = tl.load(basis + side[None, :] * _SIDE + side[:, None])
        entries = tl.dot(entries, transposed, input_precision=PRECISION)
    if FORM == 2:
        entries = tl.dot(tl.load(basis + inside), entries, input_precision=PRECISION)
    held = tl.load(momentum + chunk * _CHUNK + inside) * beta + entries
    values = tl.reshape(held, (_CHUNK,))
    size = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF

    # The largest number that at least `count` magnitudes reach; done as soon as exactly so many do.
    least = tl.full((), 0, tl.int32)
    reached, bit = least + _CHUNK, least + 30
    while (bit >= 0) & (reached != count):
        candidate = least | (1 << bit)
        those = tl.sum((size >= candidate).to(tl.int32), 0)
        enough = those >= count
        least = tl.where(enough, candidate, least)
        reached = tl.where(enough, those, reached)
        bit -= 1
    above, equal = size > least, size == least
    # How many of both kinds there are up to an entry, in the halves of a number.
    before = tl.cumsum(above.to(tl.int32) * 65536 + equal.to(tl.int32), 0)
    wanted = count - tl.sum(above.to(tl.int32), 0)
    taken = above | (equal & ((before & 0xFFFF) <= wanted))
    place = (before >> 16) + tl.minimum(before & 0xFFFF, wanted) - 1

    sent = values
    if BITS != 32:
        magnitude = tl.abs(values)
        total = tl.sum(tl.where(taken, magnitude, 0.0).to(tl.float64), 0)
        mean = (total / count).to(tl.float32)
        scales = tl.load(table + tl.arange(0, 256))
        upper = tl.minimum(tl.sum((scales < mean).to(tl.int32), 0), 255)
        lower = tl.maximum(upper - 1, 1)
        below, beyond = tl.load(table + lower), tl.load(table + upper)
        scale = tl.where((upper > 1) & (mean - below < beyond - mean), below, beyond)
        level = scale
        if BITS == 2:
            level = tl.where(magnitude > scale * _SPLIT, scale * _HIGH, scale * _LOW)
        sent = tl.where(values < 0, -level, level)
    entry = tl.arange(0, _CHUNK)
    tl.store(momentum + chunk * _CHUNK + entry, tl.where(taken, values - sent, values))
    tl.store(index_out + chunk * count + place, entry.to(tl.int64), mask=taken)
    tl.store(sent_out + chunk * count + place, sent, mask=taken)


def shift_to_middle(first: Tensor) -> Tensor:
    """`dct._shift_to_middle`: the same integers and units."""
    unit = torch.empty(len(first), device=first.device)
    _shift_to_middle[(len(first),)](first, unit, num_warps=_WARPS)
    return unit


@triton.jit
def _shift_to_middle(first, unit):
    chunk = tl.program_id(0).to(tl.int64)
    there = first + chunk * _CHUNK + tl.arange(0, _CHUNK)
    values = tl.load(there)
    largest = tl.max(tl.abs(values), 0)
    # The exponent of an integer below 2**24 gives its bit length exactly.
    shift = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 126 - _MIDDLE_BITS, 0)
    tl.store(there, tl.floor(values * ((127 - shift) << 23).to(tl.float32, bitcast=True) + 0.5))
    tl.store(unit + chunk, ((shift + (127 - 2 * _BASIS_BITS)) << 23).to(tl.float32, bitcast=True))
