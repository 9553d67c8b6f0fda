"""A string of bits, the low bit of a byte first, written and read by compiled loops.

A *sieve* says which of n things are of the rarer of two kinds, in about their entropy: the runs between these in Rice's
code (1979), whose parameter follows from how many there are. *Symbols* are small integers, a sieve for each bit among
those that share the bits above it: about the entropy of their histogram, without a table. Both adapt to their content,
have exactly one form for it, and are never longer than the plain bits and the counts. What is read is checked against
what is left before it is used.

The compiled functions take the string as 64-bit words, two more than it fills, and the bit that they begin `at`; they
return the bit after their own. Those that read return one of `REFUSALS`, negated, in place of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from p2ptrain.native.compiled import compiled

FIELD_MAX_BITS = 16
SYMBOLS_SIEVED_FROM = 32
"""Fewer symbols that share their upper bits have the others plain: a count would cost more than it saves."""
TOO_SHORT, TOO_MANY, UNEVEN, TOO_LONG = 1, 2, 3, 4
REFUSALS = {
    TOO_SHORT: "payload ends too early",
    TOO_MANY: "more flags set than there are",
    UNEVEN: "flags do not add up",
    TOO_LONG: "runs are too long",
}

Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]


class WireError(ValueError):
    """Bytes that are not a payload of the expected form."""


def sieve_max_bits(length: int) -> int:
    """No sieve of `length` flags is longer."""
    return length + length.bit_length()


def symbols_max_bits(length: int, bits: int) -> int:
    """No `length` symbols of `bits` bits are longer."""
    sieves = sum(min(1 << level, length // SYMBOLS_SIEVED_FROM) for level in range(bits))
    return length * bits + sieves * length.bit_length()


# ---- compiled -------------------------------------------------------------------------------------------------------


@compiled
def put(words: Words, at: int, value: int, width: int) -> int:
    """Write an integer below 2**width, of up to 32 bits."""
    word, shift, held = at >> 6, np.uint64(at & 63), np.uint64(value)
    words[word] |= held << shift
    words[word + 1] |= held >> np.uint64(1) >> (np.uint64(63) - shift)
    return at + width


@compiled
def get(words: Words, at: int, width: int) -> int:
    """An integer of up to 32 bits; whether they are there is the caller's to know."""
    word, shift = at >> 6, np.uint64(at & 63)
    window = words[word] >> shift | words[word + 1] << np.uint64(1) << (np.uint64(63) - shift)
    # Not `int`, which numba has keep its type, and of whose sum with a signed one it makes a float.
    return np.int64(window & ((np.uint64(1) << np.uint64(width)) - np.uint64(1)))  # type: ignore[return-value]


@compiled
def bit_length(value: int) -> int:
    """As of Python's integers."""
    bits = 0
    while value:
        value >>= 1
        bits += 1
    return bits


@compiled
def rice_parameter(length: int, rare: int) -> int:
    """Low bits of each run between `rare` flags among `length`; 0: plain flags are as short.

    The one with the least bound on what the runs take, rare * (k + 1) + floor((length - rare) / 2**k); the smaller at
    a tie.
    """
    # Where 2**k exceeds the mean run, another bit costs more than it can save.
    last = min(bit_length((length - rare) // rare), FIELD_MAX_BITS)
    best, least = 0, length
    for low in range(1, last + 1):
        bound = rare * (low + 1) + ((length - rare) >> low)
        if bound < least:
            best, least = low, bound
    return best


@compiled
def write_flags(words: Words, at: int, flags: Flags) -> int:
    """Booleans [n], a bit each."""
    for flag in flags:
        words[at >> 6] |= np.uint64(flag) << np.uint64(at & 63)
        at += 1
    return at


@compiled
def read_flags(words: Words, at: int, end: int, flags: Flags) -> int:
    """Inverse of `write_flags`."""
    if len(flags) > end - at:
        return -TOO_SHORT
    for number in range(len(flags)):
        flags[number] = words[at >> 6] >> np.uint64(at & 63) & np.uint64(1)
        at += 1
    return at


@compiled
def write_sieve(words: Words, at: int, flags: Flags) -> int:
    """Booleans [n] in about their entropy: how many are set, then runs up to each of the rarer kind."""
    length, count = len(flags), 0
    for flag in flags:
        count += flag
    at = put(words, at, count, bit_length(length))
    rare = min(count, length - count)
    if not rare:
        return at
    low = rice_parameter(length, rare)
    if not low:
        return write_flags(words, at, flags)
    kind, unary, run = count == rare, at + rare * low, 0
    for flag in flags:
        if flag == kind:
            at = put(words, at, run & ((1 << low) - 1), low)
            unary = put(words, unary + (run >> low), 1, 1)
            run = 0
        else:
            run += 1
    return unary


@compiled
def read_sieve(words: Words, at: int, end: int, flags: Flags) -> int:
    """Inverse of `write_sieve`."""
    length = len(flags)
    width = bit_length(length)
    if width > end - at:
        return -TOO_SHORT
    count = get(words, at, width)
    at += width
    if count > length:
        return -TOO_MANY
    rare = min(count, length - count)
    if not rare:
        flags[:] = count > 0
        return at
    low = rice_parameter(length, rare)
    if not low:
        at = read_flags(words, at, end, flags)
        for flag in flags:
            count -= flag
        return -UNEVEN if at >= 0 and count else at
    if rare * low > end - at:
        return -TOO_SHORT
    kind, unary, place = count == rare, at + rare * low, -1
    flags[:] = not kind
    for _ in range(rare):
        upper = 0
        while unary < end and not words[unary >> 6] >> np.uint64(unary & 63) & np.uint64(1):
            upper += 1
            unary += 1
        if unary >= end:
            return -TOO_SHORT
        unary += 1
        place += (upper << low) + get(words, at, low) + 1
        at += low
        if place >= length:
            return -TOO_LONG
        flags[place] = kind
    return unary


@compiled
def write_symbols(words: Words, at: int, values: NDArray[np.int64], bits: int) -> int:
    """Integers [n] below 2**bits, in about the entropy of their histogram: the highest bits, and then, first for those
    where it is 0, all bits below."""
    held, ones, flags = values.copy(), np.empty_like(values), np.empty(len(values), np.bool_)
    #: first, end and bits of what shares the bits above and is still to be written, the last first
    todo = np.empty((bits + 2, 3), np.int64)
    todo[0, 0], todo[0, 1], todo[0, 2] = 0, len(values), bits
    left = 1
    while left:
        left -= 1
        first, end, width = todo[left]
        if not width or first == end:
            continue
        if end - first < SYMBOLS_SIEVED_FROM:
            for number in range(first, end):
                at = put(words, at, held[number] & ((1 << width) - 1), width)
            continue
        split, above = first, 0
        for number in range(first, end):
            # To both, and written over in one: which of them, no processor can foresee.
            value = held[number]
            flag = value >> (width - 1) & 1
            flags[number], ones[above], held[split] = flag, value, value
            above += flag
            split += 1 - flag
        held[split:end] = ones[:above]
        at = write_sieve(words, at, flags[first:end])
        todo[left, 0], todo[left, 1], todo[left, 2] = split, end, width - 1
        todo[left + 1, 0], todo[left + 1, 1], todo[left + 1, 2] = first, split, width - 1
        left += 2
    return at


@compiled
def read_symbols(words: Words, at: int, end: int, values: NDArray[np.int64], bits: int) -> int:
    """Inverse of `write_symbols`."""
    values[:] = 0
    #: which of them each place of the order in which bits come stands for
    order, ones, flags = np.arange(len(values)), np.empty_like(values), np.empty(len(values), np.bool_)
    todo = np.empty((bits + 2, 3), np.int64)
    todo[0, 0], todo[0, 1], todo[0, 2] = 0, len(values), bits
    left = 1
    while left:
        left -= 1
        first, last, width = todo[left]
        if not width or first == last:
            continue
        if last - first < SYMBOLS_SIEVED_FROM:
            if (last - first) * width > end - at:
                return -TOO_SHORT
            for number in range(first, last):
                values[order[number]] |= get(words, at, width)
                at += width
            continue
        at = read_sieve(words, at, end, flags[first:last])
        if at < 0:
            return at
        split, above = first, 0
        for number in range(first, last):
            place, flag = order[number], 1 if flags[number] else 0
            values[place] |= flag << (width - 1)
            ones[above], order[split] = place, place
            above += flag
            split += 1 - flag
        order[split:last] = ones[:above]
        todo[left, 0], todo[left, 1], todo[left, 2] = split, last, width - 1
        todo[left + 1, 0], todo[left + 1, 1], todo[left + 1, 2] = first, split, width - 1
        left += 2
    return at


# ---- for all else ---------------------------------------------------------------------------------------------------


class BitWriter:
    """Appends to a string of bits."""

    def __init__(self) -> None:
        self._words: Words = np.zeros(64, np.uint64)
        #: bits written so far
        self.length = 0

    def room(self, bits: int) -> Words:
        """The words, with room for so many bits more. What is written there is to be told to `length`."""
        wanted = ((self.length + bits) >> 6) + 2
        if wanted > len(self._words):
            grown = np.zeros(max(wanted, 2 * len(self._words)), np.uint64)
            grown[: len(self._words)] = self._words
            self._words = grown
        return self._words

    def number(self, value: int, width: int) -> None:
        """One integer in `width` bits (up to 32), the low bit first."""
        self.length = put(self.room(width), self.length, value, width)

    def flags(self, flags: Flags) -> None:
        """Booleans [n], a bit each."""
        self.length = write_flags(self.room(len(flags)), self.length, flags)

    def sieve(self, flags: Flags) -> None:
        """Booleans [n]; see `write_sieve`."""
        self.length = write_sieve(self.room(sieve_max_bits(len(flags))), self.length, flags)

    def symbols(self, values: NDArray[np.integer], bits: int) -> None:
        """Integers [n] below 2**bits; see `write_symbols`."""
        words = self.room(symbols_max_bits(len(values), bits))
        self.length = write_symbols(words, self.length, values.astype(np.int64), bits)

    def to_bytes(self) -> bytes:
        """All of it, padded with zeros to a whole byte."""
        return self._words.astype("<u8", copy=False).tobytes()[: (self.length + 7) // 8]


class BitReader:
    """Reads what a `BitWriter` wrote. Every method raises `WireError` where the bytes end too early or are not what a
    writer would have written.

    Args:
        data: the whole payload.
        start: byte at which the string of bits begins.
    """

    def __init__(self, data: bytes, start: int) -> None:
        self.words: Words = np.frombuffer(data + bytes(16 + -len(data) % 8), "<u8").astype(np.uint64, copy=False)
        #: bit after the last
        self.end = 8 * len(data)
        #: next bit
        self.at = 8 * start

    def advance(self, at: int) -> None:
        """To where a compiled function came. Raises WireError where it refused."""
        if at < 0:
            raise WireError(REFUSALS[-at])
        self.at = at

    def number(self, width: int) -> int:
        """One integer of `width` bits (up to 32)."""
        if width > self.end - self.at:
            raise WireError(REFUSALS[TOO_SHORT])
        self.at += width
        return get(self.words, self.at - width, width)

    def flags(self, length: int) -> Flags:
        """Booleans [length], a bit each."""
        flags = np.empty(length, np.bool_)
        self.advance(read_flags(self.words, self.at, self.end, flags))
        return flags

    def sieve(self, length: int) -> Flags:
        """Booleans [length]; inverse of `BitWriter.sieve`."""
        flags = np.empty(length, np.bool_)
        self.advance(read_sieve(self.words, self.at, self.end, flags))
        return flags

    def symbols(self, length: int, bits: int) -> NDArray[np.int64]:
        """Integers [length]; inverse of `BitWriter.symbols`."""
        values = np.empty(length, np.int64)
        self.advance(read_symbols(self.words, self.at, self.end, values, bits))
        return values

    def close(self) -> None:
        """Raises WireError unless the end is reached but for the padding of the last byte, which is 0."""
        spare = self.end - self.at
        if spare >= 8 or self.number(spare):
            raise WireError("payload goes on beyond its end")
