"""What a reducer computes: clip, cap, sum, keep the largest, quantise. Pure, and bounded whatever arrives.

The sum is divided by the weight included, not by the number of peers that happened to pick a coefficient: the latter
measured worse, and it hands every lone coefficient to its sender. The reply is frozen as bytes, so this arithmetic
need not agree with anybody else's; only its decoding must (dct.decode_exact).

Cost: O(members * topk + reply_topk * log) a chunk and one dense float32 part in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from p2ptrain.compression import coding, wire
from p2ptrain.compression.layout import CHUNK_SIZE

CLIP_UNIT = 256


def reduce_part(
    contributions: Sequence[tuple[int, int, bytes]],
    *,
    topk: Sequence[int],
    reply_topk: Sequence[int],
    start: int,
    end: int,
    members: int,
    value_bits: int,
    clip_ratio: float,
    weight_cap_ratio: float,
) -> bytes:
    """Freeze the reply for chunks [start, end).

    Args:
        contributions: (member index, weight in sequences, payload) in member order; an empty payload with weight 0
            says "still here, nothing yet". Payloads must have passed `wire.decode_contribution`.
        clip_ratio: a sender's norm is clipped to this many times the median norm.
        weight_cap_ratio: a sender's weight is capped at this many times the median weight.
    """
    included = frozenset(member for member, _, _ in contributions)
    work = [
        (member, weight, wire.decode_contribution(payload, topk, start, end, value_bits))
        for member, weight, payload in contributions
        if weight > 0
    ]
    chunks = end - start
    total = np.zeros(chunks * CHUNK_SIZE, np.float32)
    clips: dict[int, int] = {}
    if work:
        norms = [float(np.sqrt(np.square(part.value, dtype=np.float64).sum())) for _, _, part in work]
        limit = clip_ratio * float(np.median(norms))
        cap = weight_cap_ratio * float(np.median([weight for _, weight, _ in work]))
        capped = [min(float(weight), cap) for _, weight, _ in work]
        weight_included = sum(capped)
        for (member, _, part), norm, weight in zip(work, norms, capped, strict=True):
            factor = CLIP_UNIT
            if norm > limit:
                factor = int(CLIP_UNIT * limit / norm)
                clips[member] = factor
            # Indices are unique within one sender, so plain fancy addition is a correct scatter-add. Shares of one,
            # not weights divided afterwards: a mean of what float32 holds does not overflow into inf - inf.
            flat = (part.chunk - start) * CHUNK_SIZE + part.index
            total[flat] += part.value * np.float32(weight / weight_included * factor / CLIP_UNIT)
    return _freeze(total.reshape(chunks, CHUNK_SIZE), reply_topk, start, end, members, included, clips)


def _freeze(
    total: np.ndarray,
    reply_topk: Sequence[int],
    start: int,
    end: int,
    members: int,
    included: frozenset[int],
    clips: dict[int, int],
) -> bytes:
    """Keep at most `reply_topk` coefficients a chunk, as signed bytes with one scale; none that round to zero."""
    magnitude = np.abs(total)
    largest = magnitude.max(1) if len(total) else np.zeros(0, np.float32)
    codes = coding.encode_scale((largest / coding.REPLY_VALUE_MAX).astype(np.float32))
    scale = coding.scale_table()[codes]
    with np.errstate(divide="ignore", invalid="ignore"):
        byte = np.rint(np.where(scale[:, None] > 0, total / scale[:, None], 0))
    byte = np.clip(byte, -coding.REPLY_VALUE_MAX, coding.REPLY_VALUE_MAX).astype(np.int64)
    keep = byte != 0
    limits = np.asarray(reply_topk[start:end])
    for row in np.flatnonzero(keep.sum(1) > limits):
        limit = int(limits[row])
        dropped = np.argpartition(magnitude[row], CHUNK_SIZE - limit)[: CHUNK_SIZE - limit]
        keep[row, dropped] = False
    _, index = np.nonzero(keep)
    counts = keep.sum(1)
    return wire.encode_reply(start, end, members, included, clips, reply_topk, counts, index, byte[keep], codes)
