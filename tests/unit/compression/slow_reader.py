"""Payloads read bit by bit with Python's integers, written from docs/protocol.md, to check the fast reader against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from p2ptrain.compression import coding


class Refused(Exception):
    """Not a payload of this form."""


@dataclass
class Bits:
    data: bytes
    at: int

    def field(self, width: int) -> int:
        value = 0
        for number in range(width):
            if self.at >= 8 * len(self.data):
                raise Refused
            value |= (self.data[self.at // 8] >> self.at % 8 & 1) << number
            self.at += 1
        return value

    def sieve(self, n: int) -> list[int]:
        c = self.field(n.bit_length())
        if c > n:
            raise Refused
        r = min(c, n - c)
        if r == 0:
            return [int(c > 0)] * n
        lengths = [r * (k + 1) + ((n - r) >> k) for k in range(17)]
        k = lengths.index(min(lengths))
        if k == 0:
            flags = [self.field(1) for _ in range(n)]
            if sum(flags) != c:
                raise Refused
            return flags
        low = [self.field(k) for _ in range(r)]
        flags, rare = [], int(c == r)
        for part in low:
            upper = 0
            while not self.field(1):
                upper += 1
                if upper > n:
                    raise Refused
            flags += [1 - rare] * ((upper << k) + part) + [rare]
        if len(flags) > n:
            raise Refused
        return flags + [1 - rare] * (n - len(flags))

    def symbols(self, n: int, w: int) -> list[int]:
        if n == 0 or w == 0:
            return [0] * n
        if n < 32:
            return [self.field(w) for _ in range(n)]
        upper = self.sieve(n)
        rest = [self.symbols(upper.count(value), w - 1) for value in (0, 1)]
        return [(value << (w - 1)) + rest[value].pop(0) for value in upper]

    def indices(self, counts: Sequence[int]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in counts]
        gaps = [(chunk, m, 0, 4095) for chunk, m in enumerate(counts) if m]
        while gaps:
            rooms = [h - low - m + 2 for _, m, low, h in gaps]
            flags = iter(self.sieve(sum(s > 1 for s in rooms)))
            outside = [next(flags) if s > 1 else 1 for s in rooms]
            sizes = [s - (s >> 1) if out else s >> 1 for s, out in zip(rooms, outside, strict=True)]
            bits = [z.bit_length() - 1 for z in sizes]
            short = [2 ** (b + 1) - z for b, z in zip(bits, sizes, strict=True)]
            fields = [self.field(b) for b in bits]
            following = []
            for (chunk, m, low, h), s, out, z, t, value in zip(gaps, rooms, outside, sizes, short, fields, strict=True):
                y = value if value < t else 2 * value - t + self.field(1)
                i = s >> 1
                e = (s - i) >> 1
                place = (y if y < e else y + i) if out else (y + ((z - t) >> 1)) % z + e
                a = m >> 1
                middle = low + a + place
                found[chunk].append(middle)
                following += [(chunk, a, low, middle - 1), (chunk, m - a - 1, middle + 1, h)]
            gaps = [gap for gap in following if gap[1]]
        return [sorted(indices) for indices in found]

    def scale_codes(self, n: int) -> list[int]:
        codes, code = [], 0
        for folded in self.symbols(n, 8):
            code = (code + (-(folded + 1) // 2 if folded % 2 else folded // 2)) % 256
            codes.append(code)
        return codes

    def close(self) -> None:
        spare = 8 * len(self.data) - self.at
        if spare >= 8 or self.field(spare):
            raise Refused


@dataclass
class Contribution:
    index: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)


def number(data: bytes, at: int, size: int) -> int:
    if len(data) < at + size:
        raise Refused
    return int.from_bytes(data[at : at + size], "little")


def read_contribution(data: bytes, topk: Sequence[int], start: int, end: int, b: int) -> Contribution:
    """With 1, 2 or 8 bits a value."""
    counts = list(topk[start:end])
    told = [number(data, at, 4) for at in (6, 10, 14)]
    if data[:6] != b"P2Tc" + bytes([2, b]) or told != [start, end, sum(counts)]:
        raise Refused
    bits = Bits(data, 18 * 8)
    indices = bits.indices(counts)
    codes = bits.scale_codes(end - start)
    if b == 8:
        return read_bytes(bits, indices, codes)
    signs = [bits.field(1) for _ in range(sum(counts))]
    sizes = bits.sieve(sum(counts)) if b == 2 else [None] * sum(counts)
    bits.close()
    read = Contribution()
    for code, of_chunk in zip(codes, indices, strict=True):
        scale = coding.scale_table()[code]
        for index in of_chunk:
            sign, size = signs[len(read.index)], sizes[len(read.index)]
            if code == 0 and (sign or size):
                raise Refused
            read.index.append(index)
            read.value.append(
                float((-scale if sign else scale) * {None: 1, 0: coding.LEVELS_2BIT[0], 1: coding.LEVELS_2BIT[1]}[size])
            )
    return read


def read_bytes(bits: Bits, indices: list[list[int]], codes: list[int]) -> Contribution:
    sizes = bits.symbols(sum(map(len, indices)), 7)
    values = [-size if size and bits.field(1) else size for size in sizes]
    bits.close()
    read = Contribution()
    table = coding.scale_table()
    for code, of_chunk in zip(codes, indices, strict=True):
        value = [float(np.float32(q) * table[code]) for q in values[len(read.index) :][: len(of_chunk)]]
        wanted = np.float32(max(map(abs, value))) / np.float32(127)
        # The nearest; of two, the larger; none nearer to nothing than the smallest.
        nearest = min(range(1, 256), key=lambda k: (abs(float(table[k]) - float(wanted)), -k)) if wanted else 0
        if code != nearest:
            raise Refused
        read.index += of_chunk
        read.value += value
    return read


@dataclass
class Reply:
    included: set[int]
    clips: dict[int, int]
    counts: list[int]
    codes: list[int]
    index: list[int]
    q: list[int]


def read_reply(data: bytes, reply_topk: Sequence[int], start: int, end: int, members: int) -> Reply:
    limits = list(reply_topk[start:end])
    if data[:5] != b"P2Tr\2" or (number(data, 5, 4), number(data, 9, 4), number(data, 17, 2)) != (start, end, members):
        raise Refused
    kept, exceptions = number(data, 13, 4), number(data, 19, 2)
    map_bytes = (members + 7) // 8
    bitmap = number(data, 21, map_bytes)
    included = {member for member in range(8 * map_bytes) if bitmap >> member & 1}
    at = 21 + map_bytes
    pairs = [
        (number(data, at + 3 * e, 2), number(data, at + 3 * e + 2, 1)) for e in range(min(exceptions, members + 1))
    ]
    ordered = [member for member, _ in pairs]
    if exceptions > members or ordered != sorted(set(ordered)) or not set(ordered) <= included:
        raise Refused
    if included and max(included) >= members:
        raise Refused
    bits = Bits(data, 8 * (at + 3 * exceptions))
    dropped = bits.symbols(end - start, max(limits).bit_length())
    counts = [limit - less for limit, less in zip(limits, dropped, strict=True)]
    if min(counts) < 0 or sum(counts) != kept:
        raise Refused
    codes = bits.scale_codes(end - start)
    index = [index for of_chunk in bits.indices(counts) for index in of_chunk]
    signs = [bits.field(1) for _ in range(kept)]
    q = [-(size + 1) if sign else size + 1 for sign, size in zip(signs, bits.symbols(kept, 7), strict=True)]
    bits.close()
    return Reply(included, dict(pairs), counts, codes, index, q)
