"""Blocks of 64 by 64 made orthogonal, in integers: as Muon (Jordan et al., 2024) does it with floats, but for every
device alike.

Newton-Schulz steps from a bound of the spectral norm that is nearer than Frobenius'. Three of them bring all singular
values but small ones to within about 0.7 and 1.2. Of a block X, in units of 1/256, the Gram matrix G = X X', in units
of 1/128, and the factor (B G + C G G) are rounded to integers that float32 multiplies and adds without rounding.

Cost: nine products, 2**19 multiplications and additions each. On a CPU a core's own cache holds all of a block
(`vectors.tile`).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression.layout import SIDE
from p2ptrain.native import vectors
from p2ptrain.native.compiled import elementwise

Floats = NDArray[np.float32]
_X_MAX, _GRAM_MAX, _FACTOR_MAX = 511, 500, 500
"""Of integers. Products of 64 and what is added to them then stay below 2**24, where float32 holds integers, and their
quotients by powers of two, exactly: they come out alike in whichever order they are added."""
_X_UNIT, _GRAM_UNIT, _FACTOR_UNIT = 256, 128, 64
"""What stands for 1 in a block, in its Gram matrix and in the factor made of that."""
_A, _B, _C = 3.4375, -301 / 64, 2.0
"""Muon's 3.4445, -4.775, 2.0315, as integers and powers of two have them."""
_ITERATIONS = 3


def correctly_rounded_root(x: Tensor) -> Tensor:
    """Square root of float32, as IEEE 754 rounds it.

    Torch's own is not on a CPU: it goes through MKL's vector library, which errs by a unit in the last place and, in a
    race at its first call, by far more (pytorch issues 31250 and 188792). NumPy's and CUDA's are.
    """
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def orthogonal_by_operations(blocks: Tensor) -> Tensor:
    """Near the closest orthogonal matrix of each block [n, 64, 64], and the same on every device; zeros stay zeros."""
    scratch = torch.empty(4, *blocks.shape, device=blocks.device)
    return _by_operations(blocks, scratch).mul_(1 / _X_UNIT)


def _by_operations(blocks: Tensor, scratch: Tensor) -> Tensor:
    """`orthogonal_by_operations`, in integers, somewhere in `scratch` [4, n, 64, 64].

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


@elementwise
def make_orthogonal(of: Floats, out: Floats, size: np.float32, room: Floats) -> None:
    """`size`, a power of two, times what `orthogonal_by_operations` makes of one block [64, 64]; `room` is [4, 64, 64].

    X is held transposed: so both operands of a product lie in rows, as G and F are symmetric, and (F X)' = X' F.
    """
    x, gram, factor, spare = room[0], room[1], room[2], room[3]
    largest = _largest(of)
    by = np.float32(_X_MAX) / (largest if largest > 0 else np.float32(1))
    for row in range(SIDE):
        for column in range(SIDE):
            x[column, row] = np.rint(of[row, column] * by)
    _product(x, True, x, gram)
    scale = np.float32(_X_UNIT) / np.sqrt(_largest_row_sum(gram, factor[0]) * np.float32(512))
    _integers_of(x, scale, np.float32(_X_MAX))
    _integers_of(gram, scale * scale * np.float32(_GRAM_UNIT / _X_UNIT**2), np.float32(_GRAM_MAX))
    for iteration in range(_ITERATIONS):
        if iteration:
            _product(x, True, x, gram)
            _integers_of(gram, np.float32(_GRAM_UNIT / _X_UNIT**2), np.float32(_GRAM_MAX))
        _product(gram, True, gram, factor)
        _add(factor, gram, np.float32(_B * _GRAM_UNIT / _C))
        _integers_of(factor, np.float32(_C * _FACTOR_UNIT / _GRAM_UNIT**2), np.float32(_FACTOR_MAX))
        _product(x, False, factor, spare)
        _add(spare, x, np.float32(_A * _FACTOR_UNIT))
        _integers_of(spare, np.float32(1 / _FACTOR_UNIT), np.float32(_X_MAX))
        x, spare = spare, x
    for row in range(SIDE):
        for column in range(SIDE):
            out[row, column] = x[column, row] * (size * np.float32(1 / _X_UNIT))


@elementwise
def _product(a: Floats, transposed: bool, b: Floats, out: Floats) -> None:
    """out = a b, or a' b; all [64, 64]."""
    k_step, row_step = (SIDE, 1) if transposed else (1, SIDE)
    for half in range(0, SIDE, vectors.WIDTH):
        for row in range(0, SIDE, vectors.ROWS):
            vectors.tile(
                a.ctypes.data + 4 * row * row_step,
                k_step,
                row_step,
                b.ctypes.data + 4 * half,
                SIDE,
                out.ctypes.data + 4 * (SIDE * row + half),
                SIDE,
                SIDE,
            )


@elementwise
def _largest(of: Floats) -> np.float32:
    """Of all magnitudes; of floats that are not negative, their bits as integers have the same order."""
    bits, largest = of.view(np.int32), np.int32(0)
    for row in range(SIDE):
        for column in range(SIDE):
            largest = max(largest, bits[row, column] & np.int32(0x7FFFFFFF))
    found = np.empty(1, np.int32)
    found[0] = largest
    size: np.float32 = found.view(np.float32)[0]
    return size


@elementwise
def _largest_row_sum(gram: Floats, sums: Floats) -> np.float32:
    """Of a symmetric matrix, in units of 512 and not too small."""
    sums[:] = 0
    for row in range(SIDE):
        for column in range(SIDE):
            sums[column] += abs(np.rint(gram[row, column] * np.float32(1 / 512)))
    return np.float32(sums.max() + np.float32(SIDE / 2))


@elementwise
def _add(to: Floats, of: Floats, factor: np.float32) -> None:
    """Add `factor` times `of`, integers all of them."""
    for row in range(SIDE):
        for column in range(SIDE):
            to[row, column] += of[row, column] * factor


@elementwise
def _integers_of(of: Floats, factor: np.float32, most: np.float32) -> None:
    """`factor` times that, rounded, of magnitudes of `most` at most; in place."""
    for row in range(SIDE):
        for column in range(SIDE):
            of[row, column] = min(max(np.rint(of[row, column] * factor), -most), most)
