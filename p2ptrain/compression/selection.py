"""Top-k of every chunk, and what of it a receiver will see.

Selection is exact. A chunk's entries are divided into groups, and what k of the groups' maxima reach, k entries do. On
a CPU a compiled loop finds such a bound by halving, asks of all entries whether they reach it, and drops the few that
are too many; elsewhere `torch.topk` finds the k groups with the largest maxima, which hold the k largest entries, in
passes over 4096, 1024 and 256 entries for k = 32. Which of equal entries is taken is not specified, but no smaller one
is; what is not a number comes first.

Cost on a CPU: a few passes over the entries of a chunk that a cache holds.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression import coding
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.native import vectors
from p2ptrain.native.compiled import compiled, vectorised

_GROUPS = 256
"""On a CPU: with fewer, more entries than needed reach the bound; more take longer to find it."""
_MAGNITUDE = np.int32(0x7FFFFFFF)
_ENOUGH = 8
"""The bound is good enough where maxima that reach it are more than needed by one in so many."""
_GROUPS_PER_PICK = 4
"""Elsewhere, in each pass; a power of two."""

_LOW, _HIGH = coding.LEVELS_2BIT

Floats = NDArray[np.float32]
Magnitudes = NDArray[np.int32]
Places = NDArray[np.int64]
Room = tuple[Magnitudes, NDArray[np.uint64], Places, Magnitudes]


def take(chunks: Tensor, count: int, value_bits: int) -> tuple[Tensor, Tensor]:
    """Move the `count` largest magnitudes of each of `chunks` [n, 64 * 64], as quantised, out of them.

    Returns:
        Their indices [n, count], ascending, and the values [n, count] that left, each the nearest that `value_bits`
        allow: see `quantise`.
    """
    if chunks.device.type == "cpu":
        place, sent = torch.empty(len(chunks), count, dtype=torch.int64), torch.empty(len(chunks), count)
        values = chunks.numpy()
        _take(values, values.view(np.int32), value_bits, coding.scale_table(), place.numpy(), sent.numpy())
        return place, sent
    place = largest_by_passes(chunks, count)
    held = chunks.gather(1, place)
    sent = quantise(held, value_bits)
    chunks.scatter_(1, place, held - sent)
    return place, sent


@compiled
def _take(chunks: Floats, bits: Magnitudes, value_bits: int, table: Floats, place: Places, sent: Floats) -> None:
    """`take`; `bits` are those of `chunks`."""
    scratch = room()
    for chunk in range(len(chunks)):
        take_from(chunks[chunk], bits[chunk], value_bits, table, place[chunk], sent[chunk], scratch)


@compiled
def room() -> Room:
    """For `take_from`: maxima of groups, which entries reach a bound, and their indices and magnitudes."""
    return (
        np.empty(_GROUPS, np.int32),
        np.empty(CHUNK_SIZE // vectors.WORD, np.uint64),
        np.empty(CHUNK_SIZE, np.int64),
        np.empty(CHUNK_SIZE, np.int32),
    )


@compiled
def take_from(
    chunk: Floats, bits: Magnitudes, value_bits: int, table: Floats, place: Places, sent: Floats, scratch: Room
) -> None:
    """`take` from one chunk [64 * 64], whose `bits` are these, to `place` and `sent` [count]."""
    (maxima, words, where, size), count = scratch, len(place)
    _group_maxima(bits, maxima)
    bound = _reached_by(maxima, count, 0, count // _ENOUGH) if count <= _GROUPS else 0
    vectors.reaching(bits.ctypes.data, bound, words.ctypes.data, len(words))
    found = _listed(bits, words, where, size)
    if found > count:
        _keep_largest(where, size, found, count, bound)
    for number in range(count):
        place[number] = where[number]
        sent[number] = chunk[where[number]]
    _quantise(sent, value_bits, table)
    for number in range(count):
        chunk[where[number]] -= sent[number]


@vectorised
def _group_maxima(bits: Magnitudes, maxima: Magnitudes) -> None:
    """Each group's largest magnitude; entry e is in group e % groups, so that rows are compared, not neighbours."""
    for group in range(_GROUPS):
        largest = bits[group] & _MAGNITUDE
        for row in range(1, CHUNK_SIZE // _GROUPS):
            largest = max(largest, bits[row * _GROUPS + group] & _MAGNITUDE)
        maxima[group] = largest


@vectorised
def _reached_by(numbers: Magnitudes, count: int, low: int, more: int) -> int:
    """What at least `count` of `numbers` reach, and at most so many `more`, or as few as there are; by halving.

    Args:
        numbers: [n], n a multiple of 64.
        low: what at least `count` reach.
    """
    bound, most, words = low, int(_MAGNITUDE), len(numbers) // vectors.WORD
    while bound < most:
        middle = most - (most - bound) // 2
        reach = vectors.how_many_reach(numbers.ctypes.data, middle, words)
        if reach < count:
            most = middle - 1
            continue
        bound = middle
        if reach <= count + more:
            break
    return bound


@vectorised
def _listed(bits: Magnitudes, words: NDArray[np.uint64], where: Places, size: Magnitudes) -> int:
    """How many entries `words` has a bit for; `where` they are, ascending, and their `size`."""
    found = 0
    for number in range(len(words)):
        word = words[number]
        while word:
            entry = vectors.WORD * number + vectors.lowest_bit(word)
            word &= word - np.uint64(1)
            where[found], size[found] = entry, bits[entry] & _MAGNITUDE
            found += 1
    return found


@compiled
def _keep_largest(where: Places, size: Magnitudes, found: int, count: int, bound: int) -> None:
    """Of the first `found`, which reach `bound`, keep the `count` largest, in their order; of equal ones those that
    come first."""
    padded = -(-found // vectors.WORD) * vectors.WORD
    size[found:padded] = 0
    least = _reached_by(size[:padded], count, bound, 0)
    equal = count
    for number in range(found):
        equal -= size[number] > least
    kept = 0
    for number in range(found):
        of_equal = size[number] == least and equal > 0
        equal -= of_equal
        if size[number] > least or of_equal:
            where[kept] = where[number]
            kept += 1


@compiled
def _quantise(values: Floats, value_bits: int, table: Floats) -> None:
    """`quantise` of one chunk's values [count], in place."""
    if value_bits == 32:
        return
    largest, total = np.float32(0), 0.0
    for value in values:
        largest = max(largest, abs(value))
        total += abs(value)
    if value_bits == 8:
        scale = table[coding.nearest_code(largest / np.float32(coding.BYTE_MAX), table)]
        for number in range(len(values)):
            byte = np.rint(values[number] / scale) if scale > 0 else np.float32(0)
            values[number] = min(max(byte, np.float32(-coding.BYTE_MAX)), np.float32(coding.BYTE_MAX)) * scale
        return
    scale = table[coding.nearest_code(np.float32(total / len(values)), table)]
    low, high, split = scale, scale, scale
    if value_bits == 2:
        low, high, split = scale * _LOW, scale * _HIGH, scale * coding.LEVEL_SPLIT_2BIT
    for number in range(len(values)):
        level = high if abs(values[number]) > split else low
        values[number] = -level if values[number] < 0 else level


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
    """Return what receivers will see of float32 values [n, count] of n chunks, on their device. 32 bits: all of it."""
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
