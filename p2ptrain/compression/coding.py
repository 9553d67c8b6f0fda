"""Scales and levels: what values are quantised to.

A contribution's value is a sign and, with 2 bits, one magnitude bit around the chunk's scale; with 8 bits, and in a
reply, a signed byte. The scale of a chunk is one of 256: scales are the powers of two and seven steps between each
(ratio 2**(1/8)), from a table of exact float32 values, so that none depends on a libm. Neighbours have similar scales,
so a scale is coded as its difference from the one before: 4 to 5 bits in training."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from p2ptrain.compression.bits import BitReader, BitWriter
from p2ptrain.native.compiled import compiled

SCALE_BITS = 8
BYTE_MAX = 127
"""Largest magnitude of a value of 8 bits, in units of its chunk's scale."""
MAGNITUDE_BITS = 7
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


@compiled
def code_not_below(size: np.float32, table: NDArray[np.float32]) -> int:
    """Code of the smallest scale of `table` not below `size`, or of the largest; 0 for zero."""
    return min(int(np.searchsorted(table, size)), len(table) - 1)


@compiled
def nearest_code(size: np.float32, table: NDArray[np.float32]) -> int:
    """Code of the scale of `table` nearest to `size`; 0 for zero alone."""
    upper = code_not_below(size, table)
    lower = max(upper - 1, 1)
    return lower if upper > 1 and size - table[lower] < table[upper] - size else upper


@compiled
def _nearest_codes(sizes: NDArray[np.float32], table: NDArray[np.float32], codes: NDArray[np.uint8]) -> None:
    for number in range(len(sizes)):
        codes[number] = nearest_code(sizes[number], table)


def nearest_scale(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the codes [n] of the scales nearest to `values` [n]; 0 for zeros."""
    codes = np.empty(len(values), np.uint8)
    _nearest_codes(values, scale_table(), codes)
    return codes


def byte_scale(largest: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes of the scales of 8-bit values for chunks with these largest magnitudes [n].

    What becomes of the largest by rounding has the same code again: 122 to 127 scales, or less of the smallest one.
    """
    return nearest_scale((largest / np.float32(BYTE_MAX)).astype(np.float32))


def write_scales(writer: BitWriter, codes: NDArray[np.uint8]) -> None:
    """Write scale codes [n] as differences from the one before (the first from 0), modulo 256, small ones first."""
    step = np.diff(codes, prepend=np.uint8(0)).view(np.int8).astype(np.int32)
    writer.symbols(np.where(step < 0, -2 * step - 1, 2 * step), SCALE_BITS)


def read_scales(reader: BitReader, count: int) -> NDArray[np.uint8]:
    """Inverse of `write_scales`. Raises WireError."""
    folded = reader.symbols(count, SCALE_BITS)
    step = np.where(folded & 1, -((folded + 1) >> 1), folded >> 1)
    return np.cumsum(step).astype(np.uint8)
