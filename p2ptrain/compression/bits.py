"""A string of bits, written and read thousands of fields at a time.

A *sieve* says which of n things are of the rarer of two kinds, in about their entropy: the runs between these in Rice's
code (1979), whose parameter follows from how many there are. *Symbols* are small integers, a sieve for each bit among
those that share the bits above it: about the entropy of their histogram, without a table. Both adapt to their content,
have exactly one form for it, and are never longer than the plain bits and the counts. What is read is checked against
what is left before it is used.

Cost: some ten passes over the fields each way, no loop over them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FIELD_MAX_BITS = 16
SYMBOLS_SIEVED_FROM = 32
"""Fewer symbols that share their upper bits have the others plain: a count would cost more than it saves."""


class WireError(ValueError):
    """Bytes that are not a payload of the expected form."""


def rice_parameter(length: int, rare: int) -> int:
    """Low bits of each run between `rare` flags among `length`; 0: plain flags are as short.

    The one with the least bound on what the runs take, rare * (k + 1) + floor((length - rare) / 2**k); the smaller at
    a tie.
    """
    # Where 2**k exceeds the mean run, another bit costs more than it can save.
    last = min(((length - rare) // rare).bit_length(), FIELD_MAX_BITS)
    return min(range(last + 1), key=lambda k: rare * (k + 1) + ((length - rare) >> k))


def _runs(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many places lie before each of these, ascending, and after the one before it."""
    runs = places.copy()
    runs[1:] -= places[:-1] + 1
    return runs


def sieve_max_bits(length: int) -> int:
    """No sieve of `length` flags is longer."""
    return length + length.bit_length()


def symbols_max_bits(length: int, bits: int) -> int:
    """No `length` symbols of `bits` bits are longer."""
    sieves = sum(min(1 << level, length // SYMBOLS_SIEVED_FROM) for level in range(bits))
    return length * bits + sieves * length.bit_length()


class BitWriter:
    """Appends to a string of bits, the low bit of a byte first."""

    def __init__(self) -> None:
        self._values: list[NDArray[np.uint32]] = []
        self._widths: list[NDArray[np.uint32]] = []
        #: bits written so far
        self.length = 0

    def fields(self, values: NDArray[np.integer], widths: NDArray[np.integer]) -> None:
        """Integers [n], each below 2**width, in `widths` [n] bits each (0 to 16), the low bit first."""
        self._values.append(values.astype(np.uint32))
        self._widths.append(widths.astype(np.uint32))
        self.length += int(widths.sum(dtype=np.int64))

    def number(self, value: int, width: int) -> None:
        """One integer in `width` bits (up to 32), the low bit first."""
        halves = np.array([value & 0xFFFF, value >> 16])
        self.fields(halves, np.array([min(width, 16), max(width - 16, 0)]))

    def flags(self, flags: NDArray[np.bool_]) -> None:
        """Booleans [n], a bit each."""
        values = np.packbits(flags, bitorder="little")
        widths = np.full(len(values), 8)
        if len(flags) % 8:
            widths[-1] = len(flags) % 8
        self.fields(values, widths)

    def sieve(self, flags: NDArray[np.bool_]) -> None:
        """Booleans [n] in about their entropy: how many are set, then runs up to each of the rarer kind."""
        length, count = len(flags), int(np.count_nonzero(flags))
        self.number(count, length.bit_length())
        rare = min(count, length - count)
        if not rare:
            return
        low = rice_parameter(length, rare)
        if not low:
            self.flags(flags)
            return
        places = np.flatnonzero(flags if count == rare else ~flags)
        runs = _runs(places)
        self.fields(runs & ((1 << low) - 1), np.full(rare, low))
        ends = np.cumsum((runs >> low) + 1) - 1
        unary = np.zeros(int(ends[-1]) + 1, np.bool_)
        unary[ends] = True
        self.flags(unary)

    def symbols(self, values: NDArray[np.integer], bits: int) -> None:
        """Integers [n] below 2**bits, in about the entropy of their histogram: the highest bits, and then, first for
        those where it is 0, all bits below."""
        if not bits or not len(values):
            return
        if len(values) < SYMBOLS_SIEVED_FROM:
            self.fields(values & ((1 << bits) - 1), np.full(len(values), bits))
            return
        upper = (values >> (bits - 1) & 1).astype(np.bool_)
        self.sieve(upper)
        self.symbols(values[~upper], bits - 1)
        self.symbols(values[upper], bits - 1)

    def to_bytes(self) -> bytes:
        """All of it, padded with zeros to a whole byte."""
        if not self._values:
            return b""
        spare = [np.zeros(-sum(map(len, self._values)) % 4, np.uint32)]
        values, widths = np.concatenate(self._values + spare), np.concatenate(self._widths + spare)
        for wider in (np.uint32, np.uint64):  # Two fields fit 32 bits, four fit 64.
            values, widths = values.astype(wider, copy=False), widths.astype(wider, copy=False)
            values = values[0::2] | values[1::2] << widths[0::2]
            widths = widths[0::2] + widths[1::2]
        starts = np.cumsum(widths) - widths
        word, shift = (starts >> 6).view(np.int64), starts & 63
        words = np.zeros((self.length >> 6) + 2, np.uint64)
        np.add.at(words, word, values << shift)
        np.add.at(words, word + 1, values >> 1 >> (63 - shift))
        return words.astype("<u8").tobytes()[: (self.length + 7) // 8]


class BitReader:
    """Reads what a `BitWriter` wrote. Every method raises `WireError` where the bytes end too early.

    Args:
        data: the whole payload.
        start: byte at which the string of bits begins.
    """

    def __init__(self, data: bytes, start: int) -> None:
        self._data = data
        self._end = 8 * len(data)
        self._at = 8 * start
        padded = np.frombuffer(data[start:] + b"\0\0\0", np.uint8).astype(np.int32)
        self._first = 8 * start
        #: the 24 bits from each byte on
        self._windows = padded[:-2] | padded[1:-1] << 8 | padded[2:] << 16

    def _take(self, bits: int) -> int:
        at = self._at
        if bits > self._end - at:
            raise WireError("payload ends too early")
        self._at = at + bits
        return at

    def fields(self, widths: NDArray[np.integer]) -> NDArray[np.int32]:
        """Integers [n] of `widths` [n] bits (0 to 16)."""
        if not len(widths):
            return np.zeros(0, np.int32)
        ends = np.cumsum(widths, dtype=np.int64)
        starts = ends - widths + (self._take(int(ends[-1])) - self._first)
        window = self._windows[starts >> 3] >> (starts & 7).astype(np.int32)
        found: NDArray[np.int32] = window & ((1 << widths.astype(np.int32)) - 1)
        return found

    def number(self, width: int) -> int:
        """One integer of `width` bits."""
        at = self._take(width)
        whole = int.from_bytes(self._data[at // 8 : (at + width + 7) // 8], "little")
        return whole >> at % 8 & ((1 << width) - 1)

    def flags(self, length: int) -> NDArray[np.bool_]:
        """Booleans [length], a bit each."""
        return self._bits(self._take(length), length)

    def _bits(self, at: int, length: int) -> NDArray[np.bool_]:
        some = np.frombuffer(self._data, np.uint8, (at + length + 7) // 8 - at // 8, at // 8)
        return np.unpackbits(some, bitorder="little")[at % 8 : at % 8 + length].view(np.bool_)

    def sieve(self, length: int) -> NDArray[np.bool_]:
        """Booleans [length]. Raises WireError also where counts and runs do not agree."""
        count = self.number(length.bit_length())
        if count > length:
            raise WireError("more flags set than there are")
        rare = min(count, length - count)
        if not rare:
            return np.full(length, count > 0)
        low = rice_parameter(length, rare)
        if not low:
            flags = self.flags(length)
            if np.count_nonzero(flags) != count:
                raise WireError("flags do not add up")
            return flags
        runs = self.fields(np.full(rare, low, np.int32)).astype(np.int64)
        longest = min(rare + ((length - rare) >> low), self._end - self._at)
        ends = np.flatnonzero(self._bits(self._at, longest))[:rare]
        if len(ends) < rare:
            raise WireError("runs do not end")
        self._take(int(ends[-1]) + 1)
        runs += _runs(ends) << low
        places = np.cumsum(runs + 1) - 1
        if places[-1] >= length:
            raise WireError("runs are too long")
        flags = np.full(length, count != rare)
        flags[places] = count == rare
        return flags

    def symbols(self, length: int, bits: int) -> NDArray[np.int32]:
        """Inverse of `BitWriter.symbols`."""
        if not bits or not length:
            return np.zeros(length, np.int32)
        if length < SYMBOLS_SIEVED_FROM:
            return self.fields(np.full(length, bits, np.int32))
        upper = self.sieve(length)
        count = int(np.count_nonzero(upper))
        values = np.empty(length, np.int32)
        values[~upper] = self.symbols(length - count, bits - 1)
        values[upper] = self.symbols(count, bits - 1) + np.int32(1 << (bits - 1))
        return values

    def close(self) -> None:
        """Raises WireError unless the end is reached but for the padding of the last byte, which is 0."""
        spare = self._end - self._at
        if spare >= 8 or self.number(spare):
            raise WireError("payload goes on beyond its end")
