"""Indices, values and scales as bits.

Indices inside a chunk take 12 bits. A contribution's value is a sign and, with 2 bits, one magnitude bit around the
chunk's scale; a reply's value is a signed byte. The scale of a chunk is one byte: scales are the powers of two and
seven steps between each (ratio 2**(1/8)), from a table of exact float32 values, so that none depends on a libm.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

INDEX_BITS = 12
REPLY_VALUE_MAX = 127
SCALE_STEPS = 8  # per octave
SCALE_LOWEST_EXPONENT = -28
# Nearest floats to 2**(i/8), as exact hexadecimal literals.
_MANTISSAS = tuple(
    float.fromhex(text)
    for text in (
        "0x1.000000p+0",
        "0x1.172b84p+0",
        "0x1.306fe0p+0",
        "0x1.4bfdaep+0",
        "0x1.6a09e6p+0",
        "0x1.8ace54p+0",
        "0x1.ae89fap+0",
        "0x1.d5818ep+0",
    )
)
# With 2 bits a value is one of these times the chunk's scale, which is the mean magnitude of what is sent. The largest
# of 4096 nearly Gaussian coefficients lie close together just above the threshold, with a thin tail; what two levels
# miss stays in the sender's momentum.
LEVELS_2BIT = (np.float32(0.875), np.float32(1.375))
LEVEL_SPLIT_2BIT = np.float32(1.125)


@functools.cache
def scale_table() -> NDArray[np.float32]:
    """The 256 scales [256]; code 0 is zero (an empty chunk)."""
    table = np.zeros(256, np.float32)
    for code in range(1, 256):
        octave, step = divmod(code - 1, SCALE_STEPS)
        table[code] = np.float32(_MANTISSAS[step] * 2.0 ** (octave + SCALE_LOWEST_EXPONENT))
    return table


def encode_scale(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes of the nearest scales not below `values` [n] (the largest scale for anything above it); 0 for zeros."""
    codes = np.searchsorted(scale_table(), values, side="left")
    return np.minimum(codes, 255).astype(np.uint8)


def nearest_scale(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes of the nearest scales to `values` [n]; 0 for zeros."""
    upper = encode_scale(values).astype(np.int64)
    table = scale_table()
    lower = np.maximum(upper - 1, 1)
    closer = (upper > 1) & (values - table[lower] < table[upper] - values)
    return np.where(closer, lower, upper).astype(np.uint8)


def pack_indices(indices: NDArray[np.int64]) -> bytes:
    """Pack indices [n] below 4096 into 12 bits each: two in three bytes, the low bits first."""
    flat = indices.astype(np.uint16)
    if len(flat) % 2:
        flat = np.append(flat, np.uint16(0))
    even, odd = flat[0::2], flat[1::2]
    packed = np.empty((len(even), 3), np.uint8)
    packed[:, 0] = even & 0xFF
    packed[:, 1] = (even >> 8) | ((odd & 0xF) << 4)
    packed[:, 2] = odd >> 4
    return packed.tobytes()


def packed_indices_bytes(count: int) -> int:
    """Bytes that `count` packed indices take."""
    return (count + 1) // 2 * 3


def unpack_indices(data: bytes, count: int) -> NDArray[np.int64]:
    """Inverse of `pack_indices`; `data` has `packed_indices_bytes(count)` bytes."""
    packed = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int64)
    flat = np.empty(len(packed) * 2, np.int64)
    flat[0::2] = packed[:, 0] | (packed[:, 1] & 0xF) << 8
    flat[1::2] = packed[:, 1] >> 4 | packed[:, 2] << 4
    return flat[:count]


def pack_bits(flags: NDArray[np.bool_]) -> bytes:
    """Pack booleans [n] eight to a byte, the low bit first."""
    return np.packbits(flags, bitorder="little").tobytes()


def unpack_bits(data: bytes, count: int) -> NDArray[np.bool_]:
    """Inverse of `pack_bits`; `data` has ceil(count / 8) bytes."""
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count, bitorder="little").astype(np.bool_)
