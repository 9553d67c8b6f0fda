"""Orthogonal blocks in numpy: 64-bit integers for sums, one rounding an operation of float32 for the rest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def orthogonal_block(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """What `orthogonal.make_orthogonal` makes of a block [64, 64] that is not zero."""
    one = np.float32

    def integers(x: NDArray[np.int64], divisor: int, most: int) -> NDArray[np.int64]:
        assert np.abs(x).max() < 2**24
        return np.clip(np.rint(x / divisor), -most, most).astype(np.int64)

    y = np.rint(block * (one(511) / np.abs(block).max())).astype(np.int64)
    gram = y @ y.T
    largest_sum = np.abs(integers(gram, 512, 2**24)).sum(1).max() + 32
    scale = one(256) / np.sqrt(one(largest_sum * 512))
    x = np.rint(y.astype(np.float32) * scale).astype(np.int64)
    gram = np.clip(np.rint(gram.astype(np.float32) * (scale * scale * one(1 / 512))), -500, 500).astype(np.int64)
    for iteration in range(3):
        if iteration:
            gram = integers(x @ x.T, 512, 500)
        factor = integers(gram @ gram - 301 * gram, 128, 500)
        x = integers(factor @ x + 220 * x, 64, 511)
    return x.astype(np.float32) * one(1 / 256)
