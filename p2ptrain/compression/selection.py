"""Top-k of every chunk, and what of it a receiver will see.

Selection is exact. Of the groups that a chunk's entries are divided into, those with the k largest maxima hold the k
largest entries, so most entries are looked at once, in a maximum, and only those of some groups again. On a CPU a
compiled loop takes all groups whose maxima reach a bound below the k-th largest, from their histogram; elsewhere
`torch.topk` finds k groups, in passes over 4096, 1024 and 256 entries for k = 32. Which of equal entries is taken is
not specified, but no smaller one is; what is not a number comes first.

Cost on one core, k = 32: 3 us a chunk, against 6 with numpy's partition, 12 for `torch.topk` over all entries and 9 for
its passes.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression import coding
from p2ptrain.compression.compiled import compiled, vectorised
from p2ptrain.compression.layout import CHUNK_SIZE

_GROUPS = 256
"""On a CPU: fewer leave more entries to the second search, more take longer in the first."""
_MAGNITUDE = np.int32(0x7FFFFFFF)
_BUCKET_BITS, _BUCKETS = 15, 1024
"""Of maxima as integers, whose order is that of magnitudes: 256 in an octave, and four octaves below the largest. What
is left after many rounds is flat at the top: with 32 in an octave, half as many again reach the bound."""
_GROUPS_PER_PICK = 4
"""Elsewhere, in each pass; a power of two."""

_LOW, _HIGH = coding.LEVELS_2BIT

Floats = NDArray[np.float32]
Magnitudes = NDArray[np.int32]
Places = NDArray[np.int64]


def take(chunks: Tensor, count: int, value_bits: int) -> tuple[Tensor, Tensor]:
    """Move the `count` largest magnitudes of each of `chunks` [n, 64 * 64], as quantised, out of them.

    Returns:
        Their indices [n, count], ascending, and the values [n, count] that left, each the nearest that `value_bits`
        allow: `wire.quantise`.
    """
    if chunks.device.type == "cpu":
        place, sent = torch.empty(len(chunks), count, dtype=torch.int64), torch.empty(len(chunks), count)
        values = chunks.numpy()
        _take(values, values.view(np.int32), count, value_bits, coding.scale_table(), place.numpy(), sent.numpy())
        return place, sent
    place = largest_by_passes(chunks, count)
    held = chunks.gather(1, place)
    sent = quantise(held, value_bits)
    chunks.scatter_(1, place, held - sent)
    return place, sent


@compiled
def _take(
    chunks: Floats, bits: Magnitudes, count: int, value_bits: int, table: Floats, place: Places, sent: Floats
) -> None:
    """`take`; `bits` are those of `chunks`."""
    maxima, picked = np.empty(_GROUPS, np.int32), np.empty(_GROUPS + 1, np.int64)
    histogram = np.empty(_BUCKETS, np.int32)
    #: of what reaches the bound, index and magnitude, and room for what does not
    where, size = np.empty(CHUNK_SIZE + 1, np.int64), np.empty(CHUNK_SIZE + 1, np.int32)
    for chunk in range(len(chunks)):
        _group_maxima(bits[chunk], maxima)
        found = _reaching(bits[chunk], maxima, _bound(maxima, count, histogram), picked, where, size)
        if found > count:
            _keep_largest(where, size, found, count)
        for number in range(count):
            place[chunk, number] = where[number]
            sent[chunk, number] = chunks[chunk, where[number]]
        _quantise(sent[chunk], value_bits, table)
        for number in range(count):
            chunks[chunk, where[number]] -= sent[chunk, number]


@vectorised
def _group_maxima(bits: Magnitudes, maxima: Magnitudes) -> None:
    """Each group's largest magnitude; entry e is in group e % groups, so that rows are compared, not neighbours."""
    for group in range(_GROUPS):
        maxima[group] = bits[group] & _MAGNITUDE
    for row in range(1, CHUNK_SIZE // _GROUPS):
        for group in range(_GROUPS):
            maxima[group] = max(maxima[group], bits[row * _GROUPS + group] & _MAGNITUDE)


@vectorised
def _reaching(bits: Magnitudes, maxima: Magnitudes, bound: int, picked: Places, where: Places, size: Magnitudes) -> int:
    """How many magnitudes reach `bound`; `where` they are, ascending, and their `size`."""
    groups, found = 0, 0
    for group in range(_GROUPS):
        picked[groups] = group
        groups += maxima[group] >= bound
    for row in range(CHUNK_SIZE // _GROUPS):
        for number in range(groups):
            entry = row * _GROUPS + picked[number]
            magnitude = bits[entry] & _MAGNITUDE
            where[found], size[found] = entry, magnitude
            found += magnitude >= bound
    return found


@compiled
def _bound(maxima: Magnitudes, count: int, histogram: Magnitudes) -> int:
    """What at least `count` entries of a chunk reach, since so many `maxima` do; 0 where the histogram cannot tell."""
    top = 0
    for maximum in maxima:
        top = max(top, int(maximum >> _BUCKET_BITS))
    histogram[:] = 0
    for maximum in maxima:
        histogram[min(top - (maximum >> _BUCKET_BITS), _BUCKETS - 1)] += 1
    reached = 0
    for bucket in range(_BUCKETS - 1):
        reached += histogram[bucket]
        if reached >= count:
            return (top - bucket) << _BUCKET_BITS
    return 0


@compiled
def _keep_largest(where: Places, size: Magnitudes, found: int, count: int) -> None:
    """Of the first `found`, keep the `count` largest, in their order; of equal ones those that come first."""
    least = np.partition(size[:found], found - count)[found - count]
    equal = count
    for number in range(found):
        equal -= size[number] > least
    kept = 0
    for number in range(found):
        of_equal = size[number] == least and equal > 0
        equal -= of_equal
        where[kept] = where[number]
        kept += size[number] > least or of_equal


@compiled
def _quantise(values: Floats, value_bits: int, table: Floats) -> None:
    """`wire.quantise` of one chunk's values [count], in place."""
    if value_bits == 32:
        return
    largest, total = np.float32(0), 0.0
    for value in values:
        largest = max(largest, abs(value))
        total += abs(value)
    if value_bits == 8:
        scale = _nearest_scale(largest / np.float32(coding.BYTE_MAX), table)
        for number in range(len(values)):
            byte = np.rint(values[number] / scale) if scale > 0 else np.float32(0)
            values[number] = min(max(byte, np.float32(-coding.BYTE_MAX)), np.float32(coding.BYTE_MAX)) * scale
        return
    scale = _nearest_scale(np.float32(total / len(values)), table)
    low, high, split = scale, scale, scale
    if value_bits == 2:
        low, high, split = scale * _LOW, scale * _HIGH, scale * coding.LEVEL_SPLIT_2BIT
    for number in range(len(values)):
        level = high if abs(values[number]) > split else low
        values[number] = -level if values[number] < 0 else level


@compiled
def _nearest_scale(size: np.float32, table: Floats) -> np.float32:
    upper = min(int(np.searchsorted(table, size)), len(table) - 1)
    lower = max(upper - 1, 1)
    nearest: np.float32 = table[lower] if upper > 1 and size - table[lower] < table[upper] - size else table[upper]
    return nearest


def largest_by_passes(chunks: Tensor, count: int) -> Tensor:
    """Indices [n, count] of the largest magnitudes of each of `chunks` [n, 64 * 64], ascending, on any device."""
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
        scale = _nearest_scales(magnitude.amax(1) / coding.BYTE_MAX)
        byte = torch.where(scale > 0, value / scale, 0).round_().clamp_(-coding.BYTE_MAX, coding.BYTE_MAX)
        return byte.mul_(scale)
    scale = _nearest_scales(magnitude.mean(1, dtype=torch.float64).float())
    if value_bits == 1:
        level = scale.expand_as(value)
    else:
        low, high = (scale * float(level) for level in coding.LEVELS_2BIT)
        level = torch.where(magnitude > scale * float(coding.LEVEL_SPLIT_2BIT), high, low)
    return torch.where(value < 0, -level, level)


def _nearest_scales(size: Tensor) -> Tensor:
    """[n, 1] the scales nearest to `size` [n]."""
    table = scale_table(size.device)
    upper = torch.searchsorted(table, size).clamp_(max=len(table) - 1)
    lower = (upper - 1).clamp_(min=1)
    closer = (upper > 1) & (size - table[lower] < table[upper] - size)
    return table[torch.where(closer, lower, upper)].unsqueeze(1)


@functools.cache
def scale_table(device: torch.device) -> Tensor:
    """`coding.scale_table` on a device [256]."""
    return torch.from_numpy(coding.scale_table()).to(device)
