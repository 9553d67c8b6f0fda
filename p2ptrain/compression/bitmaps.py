"""Which of some members or pieces, as bytes: a bit for each, the low bit of a byte first."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def pack(numbers: Iterable[int], size: int) -> bytes:
    """Return `size` bits, of which those of `numbers` are set."""
    packed = bytearray((size + 7) // 8)
    for number in numbers:
        add(packed, number)
    return bytes(packed)


def unpack(packed: bytes, size: int) -> frozenset[int]:
    """Return which of `size` bits are set.

    Raises:
        ValueError: a bitmap of another length, or with a bit set beyond `size`.
    """
    if len(packed) != (size + 7) // 8:
        raise ValueError(f"a bitmap of {len(packed)} bytes for {size} members")
    found = np.flatnonzero(np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")).tolist()
    if max(found, default=-1) >= size:
        raise ValueError("a bitmap names members that are not there")
    return frozenset(found)


def has(packed: bytes | bytearray, number: int) -> bool:
    """Say whether a bit is set."""
    return bool(packed[number >> 3] >> (number & 7) & 1)


def add(packed: bytearray, number: int) -> None:
    """Set a bit."""
    packed[number >> 3] |= 1 << (number & 7)
