"""Codecs, and what of values a receiver sees, as tests want them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from p2ptrain.compression.codec import Codec
from p2ptrain.optim import reference


def sending(topk: Sequence[int], value_bits: int) -> Codec:
    """For contributions of `topk` [chunks]; replies may hold as much."""
    return Codec(tuple(topk), tuple(topk), value_bits)


def replying(reply_topk: Sequence[int]) -> Codec:
    """For replies of at most `reply_topk` [chunks]."""
    return sending(reply_topk, 2)


def quantised(chunk: NDArray[np.int64], value: NDArray[np.float32], value_bits: int) -> NDArray[np.float32]:
    """What a receiver sees of values [n], by the reference; `chunk` [n] is theirs, non-decreasing."""
    of_chunks = np.split(value, np.flatnonzero(np.diff(chunk)) + 1)
    return np.concatenate([reference.quantise(one, value_bits) for one in of_chunks]).astype(np.float32)
