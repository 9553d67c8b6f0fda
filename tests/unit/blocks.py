"""Orthogonal blocks in numpy: 64-bit integers for sums, one rounding an operation of float32 for the rest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def orthogonal_block(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """What `directions.orthogonal` makes of a block [64, 64] that is not zero."""
    one = np.float32

    def integers(x: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.clip(np.rint(x), -511, 511).astype(np.int64)

    def floats(x: NDArray[np.int64]) -> NDArray[np.float32]:
        assert np.abs(x).max() < 2**24
        return x.astype(np.float32)

    shares = block / np.abs(block).max()
    coarse = np.rint(shares * one(63)).astype(np.int64)
    x = integers(shares * (one(63 * 384) / np.sqrt(floats((coarse**2).sum()[None]))))
    for _ in range(5):
        gram = integers(floats(x @ x.T) * one(256 / 384**2))
        square = floats(gram @ gram) * one(2.0315 * 128 / 256**2)
        factor = integers(square + floats(gram) * one(-4.7750 * 128 / 256))
        x = integers(floats(factor @ x) * one(1 / 128) + floats(x) * one(3.4445))
    return floats(x) * one(1 / 384)
