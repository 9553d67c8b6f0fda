"""Top-k of every chunk, and what of it a receiver will see.

Selection is exact. Of the groups that a chunk's entries are divided into, those with the k largest maxima hold the k
largest entries, so most entries are looked at once, in a maximum, and only those of k groups again. On a CPU the k-th
largest is found by numpy's vectorised partition of magnitudes as integers, whose order is the same; elsewhere
`torch.topk` finds groups, in passes over 4096, 1024 and 256 entries for k = 32. Which of equal entries is taken is not
specified, but no smaller one is.

Cost on one core, k = 32: 4 us a chunk, against 12 for `torch.topk` over all entries and 9 for its passes.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression import coding
from p2ptrain.compression.layout import CHUNK_SIZE

_GROUPS = 256
"""On a CPU: fewer leave more entries to the second search, more take longer in the first."""
_GROUPS_PER_PICK = 4
"""Elsewhere, in each pass; a power of two."""


def largest(chunks: Tensor, count: int) -> Tensor:
    """Indices [n, count] of the largest magnitudes of each of `chunks` [n, 64 * 64], ascending."""
    return largest_by_partition(chunks, count) if chunks.device.type == "cpu" else largest_by_passes(chunks, count)


def largest_by_partition(chunks: Tensor, count: int) -> Tensor:
    """`largest`, on a CPU."""
    if count >= _GROUPS:
        return torch.from_numpy(_at_least(_ordered(chunks.abs()), count))
    # Entry e is in group e % groups: its maximum then compares rows, not neighbours.
    grouped = chunks.view(-1, CHUNK_SIZE // _GROUPS, _GROUPS)
    group = _at_least(_ordered(torch.maximum(grouped.amax(1), grouped.amin(1).neg_()).abs_()), count)
    picked = torch.from_numpy(group).unsqueeze(1).expand(-1, grouped.shape[1], -1)
    place = _at_least(_ordered(grouped.gather(2, picked).abs_().flatten(1)), count)
    # Entry e of what was picked is in its row e // count, in the group picked in place e % count. Ascending in e is
    # ascending in the chunk.
    row, place = np.divmod(place.astype(np.int32), np.int32(count))
    row *= _GROUPS
    return torch.from_numpy(row + np.take_along_axis(group, place, 1))


def _ordered(magnitude: Tensor) -> NDArray[np.int32]:
    """Floats that are not negative, as integers in the same order; what is not a number comes last."""
    bits: NDArray[np.int32] = magnitude.numpy().view(np.int32)
    return bits


def _at_least(values: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Indices [n, count], ascending, of the `count` largest of each row of `values`."""
    rows, columns = values.shape
    least = np.partition(values, columns - count, axis=1)[:, columns - count]
    found = values >= least[:, None]
    flat = np.flatnonzero(found)
    if len(flat) != rows * count:
        # Several equal the k-th largest: the last of them are left out.
        for row in np.flatnonzero(np.count_nonzero(found, axis=1) > count):
            equal = np.flatnonzero(values[row] == least[row])
            found[row, equal[count - np.count_nonzero(found[row]) :]] = False
        flat = np.flatnonzero(found)
    return flat.reshape(rows, count) - columns * np.arange(rows)[:, None]


def largest_by_passes(chunks: Tensor, count: int) -> Tensor:
    """`largest`, on any device."""
    keep = 1 << (count - 1).bit_length()
    groups, held = keep * _GROUPS_PER_PICK, chunks
    kept: list[Tensor] = []
    while held.shape[1] > groups:
        grouped = held.unflatten(1, (-1, groups))
        maxima = torch.maximum(grouped.amax(1), grouped.amin(1).neg_())
        best = maxima.topk(keep, dim=1, sorted=False).indices
        kept.append(best)
        held = grouped.gather(2, best.unsqueeze(1).expand(-1, grouped.shape[1], -1)).flatten(1)
    index = held.abs().topk(count, dim=1, sorted=False).indices
    for best in reversed(kept):
        # Of what was held then, entry e is the one in row e // keep of the group that was kept in place e % keep.
        index = (index >> keep.bit_length() - 1) * groups + best.gather(1, index & keep - 1)
    return index.sort(dim=1).values


def quantise(value: Tensor, value_bits: int) -> Tensor:
    """`wire.quantise` of float32 values [n, count], of n chunks, on their device."""
    if value_bits == 32:
        return value
    magnitude = value.abs()
    if value_bits == 8:
        scale = _nearest_scale(magnitude.amax(1) / coding.BYTE_MAX)
        byte = torch.where(scale > 0, value / scale, 0).round_().clamp_(-coding.BYTE_MAX, coding.BYTE_MAX)
        return byte.mul_(scale)
    scale = _nearest_scale(magnitude.mean(1, dtype=torch.float64).float())
    if value_bits == 1:
        level = scale.expand_as(value)
    else:
        low, high = (scale * float(level) for level in coding.LEVELS_2BIT)
        level = torch.where(magnitude > scale * float(coding.LEVEL_SPLIT_2BIT), high, low)
    return torch.where(value < 0, -level, level)


def _nearest_scale(size: Tensor) -> Tensor:
    """[n, 1] the scales nearest to `size` [n]."""
    table = _scale_table(size.device)
    upper = torch.searchsorted(table, size).clamp_(max=len(table) - 1)
    lower = (upper - 1).clamp_(min=1)
    closer = (upper > 1) & (size - table[lower] < table[upper] - size)
    return table[torch.where(closer, lower, upper)].unsqueeze(1)


@functools.cache
def _scale_table(device: torch.device) -> Tensor:
    return torch.from_numpy(coding.scale_table()).to(device)
