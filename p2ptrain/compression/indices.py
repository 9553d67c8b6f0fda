"""Ascending indices inside chunks, near their entropy: binary interpolative coding (Moffat and Stuiver, 2000).

The middle index of a chunk comes first, then the middles of what lies to its left and right, and so on, each within the
room that its neighbours leave: any bits at all mean ascending indices, and none takes more than 12 of them. Which
middles lie outside the middle half of their room is told level by level in a sieve, which follows the data: few where
indices are spread evenly, many where they cluster.

What other codes take for the same indices is in docs/log.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from p2ptrain.compression.bits import (
    TOO_SHORT,
    BitReader,
    BitWriter,
    Words,
    get,
    read_sieve,
    write_sieve,
)
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.native.compiled import compiled

Numbers = NDArray[np.int64]
Gaps = NDArray[np.int32]
_FLOOR_LOG2 = np.array([0] + [size.bit_length() - 1 for size in range(1, CHUNK_SIZE + 1)])
FIRST, COUNT, LOW, HIGH = range(4)
"""Of a gap: `count` indices (1 or more), from number `first` on, lie in [low, high]."""


def indices_max_bits(count: int, most: int) -> int:
    """No `count` indices are longer, at most `most` in a chunk."""
    return 12 * count + most.bit_length() * count.bit_length()


def write_indices(writer: BitWriter, counts: NDArray[np.integer], index: NDArray[np.integer]) -> None:
    """Write indices [n] in [0, 4096), strictly ascending in each chunk; `counts` [chunks] of them, 0 or more."""
    words = writer.room(indices_max_bits(len(index), int(counts.max())))
    writer.length = _write(words, writer.length, counts.astype(np.int64), index.astype(np.int64))


def read_indices(reader: BitReader, counts: NDArray[np.integer]) -> Numbers:
    """Inverse of `write_indices`. Raises WireError."""
    index = np.empty(int(counts.sum()), np.int64)
    reader.advance(_read(reader.words, reader.at, reader.end, counts.astype(np.int64), index))
    return index


@compiled
def _whole_chunks(counts: Numbers, gaps: Gaps) -> int:
    """The gaps of the first level; how many."""
    number, first = 0, 0
    for count in counts:
        if count:
            gaps[number, FIRST], gaps[number, COUNT] = first, count
            gaps[number, LOW], gaps[number, HIGH] = 0, CHUNK_SIZE - 1
            number += 1
            first += count
    return number


@compiled
def _room(gaps: Gaps, number: int) -> int:
    """How many places the middle index of a gap may take, in [1, 4096]."""
    return gaps[number, HIGH] - gaps[number, LOW] - gaps[number, COUNT] + 2


@compiled
def _halve(gaps: Gaps, number: int, middle: int, below: Gaps, following: int) -> int:
    """Put what lies left and right of the middle index of a gap into `below`, from `following` on; the number after."""
    first, count = gaps[number, FIRST], gaps[number, COUNT]
    left = count >> 1
    right = count - left - 1
    # Written in any case, and written over where it is empty: whether it is, no processor can foresee.
    below[following, FIRST], below[following, COUNT] = first, left
    below[following, LOW], below[following, HIGH] = gaps[number, LOW], middle - 1
    following += left > 0
    below[following, FIRST], below[following, COUNT] = first + left + 1, right
    below[following, LOW], below[following, HIGH] = middle + 1, gaps[number, HIGH]
    return following + (right > 0)


@compiled
def _put_fields(words: Words, at: int, codes: NDArray[np.int32], column: int, count: int) -> int:
    """`put` of the first `count` values in a column, whose widths are in the next."""
    word, used = at >> 6, at & 63
    held = words[word]
    for number in range(count):
        value, width = np.uint64(codes[number, column]), codes[number, column + 1]
        held |= value << np.uint64(used)
        used += width
        if used >= 64:
            words[word] = held
            word, used = word + 1, used - 64
            held = value >> np.uint64(width - used)
    words[word] = held
    return (word << 6) + used


@compiled
def _write(words: Words, at: int, counts: Numbers, index: Numbers) -> int:
    gaps, below = np.empty((len(index) + 1, 4), np.int32), np.empty((len(index) + 1, 4), np.int32)
    flags = np.empty(len(index) + 1, np.bool_)
    #: of each gap: a field and its bits, another and its bits that follows when all gaps had their first
    codes = np.empty((len(index), 4), np.int32)
    level = _whole_chunks(counts, gaps)
    while level:
        free, following = 0, 0
        for number in range(level):
            room = _room(gaps, number)
            inner = room >> 1
            edge = (room - inner) >> 1
            left = gaps[number, COUNT] >> 1
            middle = index[gaps[number, FIRST] + left]
            place = middle - gaps[number, LOW] - left
            outside = 1 if place < edge or place >= edge + inner else 0
            flags[free] = outside
            free += room > 1
            within = 1 - outside
            size = inner + outside * (room - 2 * inner)
            bits = _FLOOR_LOG2[size]
            short = (2 << bits) - size
            place -= outside * (place >= edge) * inner + within * (edge + ((size - short) >> 1))
            place += (place < 0) * size
            long = 1 if place >= short else 0
            place += long * short
            codes[number, 0], codes[number, 1] = place >> long, bits
            codes[number, 2], codes[number, 3] = place & long, long
            following = _halve(gaps, number, middle, below, following)
        at = write_sieve(words, at, flags[:free])
        at = _put_fields(words, at, codes, 0, level)
        at = _put_fields(words, at, codes, 2, level)
        gaps, below, level = below, gaps, following
    return at


@compiled
def _read(words: Words, at: int, end: int, counts: Numbers, index: Numbers) -> int:
    gaps, below = np.empty((len(index) + 1, 4), np.int32), np.empty((len(index) + 1, 4), np.int32)
    flags = np.empty(len(index) + 1, np.bool_)
    #: of each gap: the code so far, how many codes are short, how many there are, whether it is outside
    codes = np.empty((len(index), 4), np.int32)
    level = _whole_chunks(counts, gaps)
    while level:
        free, following = 0, 0
        for number in range(level):
            free += _room(gaps, number) > 1
        at = read_sieve(words, at, end, flags[:free])
        if at < 0:
            return at
        free = 0
        for number in range(level):
            room = _room(gaps, number)
            outside = 1 if flags[free] or room == 1 else 0
            free += room > 1
            inner = room >> 1
            size = inner + outside * (room - 2 * inner)
            bits = _FLOOR_LOG2[size]
            if bits > end - at:
                return -TOO_SHORT
            codes[number, 0], codes[number, 1] = get(words, at, bits), (2 << bits) - size
            codes[number, 2], codes[number, 3] = size, outside
            at += bits
        for number in range(level):
            room = _room(gaps, number)
            inner = room >> 1
            edge = (room - inner) >> 1
            place, short, size = codes[number, 0], codes[number, 1], codes[number, 2]
            long = 1 if place >= short else 0
            if long > end - at:
                return -TOO_SHORT
            place += long * (place - short + get(words, at, 1))
            at += long
            outside = codes[number, 3]
            within = 1 - outside
            place += within * ((size - short) >> 1)
            place -= (place >= size) * size
            place += outside * (place >= edge) * inner + within * edge
            left = gaps[number, COUNT] >> 1
            middle = place + gaps[number, LOW] + left
            index[gaps[number, FIRST] + left] = middle
            following = _halve(gaps, number, middle, below, following)
        gaps, below, level = below, gaps, following
    return at
