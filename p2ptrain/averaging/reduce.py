"""What a reducer computes: clip, cap, sum, keep the largest, quantise. Pure, and bounded whatever arrives.

The sum is divided by the weight included, not by the number of peers that happened to pick a coefficient: the latter
measured worse, and it hands every lone coefficient to its sender. The reply is frozen as bytes, so this arithmetic
need not agree with anybody else's; only its decoding must (dct.decode_exact).

Cost: all of it over the coefficients that came, sorted by place, and never over the part's entries: members * topk a
chunk, in time (but for the sort's logarithm) and memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from p2ptrain.compression import coding, decoded, wire
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.compression.wire import Coefficients, ReplyContent

CLIP_UNIT = 256
CHUNK_BITS = CHUNK_SIZE.bit_length() - 1
_POSITION_BITS = 31
_Places = NDArray[np.int64]
_Values = NDArray[np.float32]


def reduce_part(
    contributions: Sequence[tuple[int, int, bytes]],
    *,
    topk: tuple[int, ...],
    reply_topk: tuple[int, ...],
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
        (member, weight, decoded.contribution(payload, topk, start, end, value_bits))
        for member, weight, payload in contributions
        if weight > 0
    ]
    clips: dict[int, int] = {}
    place, total = np.zeros(0, np.int64), np.zeros(0, np.float32)
    if work:
        norms = [float(np.sqrt(np.square(part.value, dtype=np.float64).sum())) for _, _, part in work]
        limit = clip_ratio * float(np.median(norms))
        cap = weight_cap_ratio * float(np.median([weight for _, weight, _ in work]))
        capped = [min(float(weight), cap) for _, weight, _ in work]
        weight_included = sum(capped)
        values = []
        for (member, _, part), norm, weight in zip(work, norms, capped, strict=True):
            factor = CLIP_UNIT
            if norm > limit:
                factor = int(CLIP_UNIT * limit / norm)
                clips[member] = factor
            # Shares of one, not weights divided afterwards: a mean of what float32 holds cannot become inf - inf.
            values.append(part.value * np.float32(weight / weight_included * factor / CLIP_UNIT))
        place, total = _summed([(part.chunk - start) * CHUNK_SIZE + part.index for _, _, part in work], values)
    counts, index, byte, codes = _freeze(place, total, np.asarray(reply_topk[start:end]))
    reply = wire.encode_reply(start, end, members, included, clips, reply_topk, counts, index, byte, codes)
    decoded.wrote_reply(
        reply, reply_topk, members, wire.reply_content(start, included, clips, counts, index, byte, codes)
    )
    return reply


def reply_to_one(sent: Coefficients, reply_topk: Sequence[int]) -> ReplyContent:
    """What a group of one gets back for its contribution: as by way of `reduce_part` and the bytes of both."""
    place = (sent.chunk - sent.start) * CHUNK_SIZE + sent.index
    frozen = _freeze(place, sent.value, np.asarray(reply_topk[sent.start : sent.end]))
    return wire.reply_content(sent.start, frozenset({0}), {}, *frozen)


def _summed(places: list[_Places], values: list[_Values]) -> tuple[_Places, _Values]:
    """Distinct places [n], ascending, and the sums there, added in the order given; each of `places` ascends."""
    if len(places) == 1:
        return places[0], values[0]
    # Sorted with its position beside it, a place sorts fast and stays in order among its equals.
    key = np.sort(np.concatenate(places) << _POSITION_BITS | np.arange(sum(map(len, places))))
    place, value = key >> _POSITION_BITS, np.concatenate(values)[key & (1 << _POSITION_BITS) - 1]
    first = np.flatnonzero(np.r_[True, place[1:] != place[:-1]])
    total = np.zeros(len(first), np.float32)
    # One after the other: `add.reduceat` adds in an order of its own.
    np.add.at(total, np.repeat(np.arange(len(first)), np.diff(np.r_[first, len(place)])), value)
    return place[first], total


def _freeze(
    place: _Places, total: _Values, limits: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """Keep at most `limits` [chunks] coefficients a chunk, as signed bytes with one scale; none that round to zero.

    Returns:
        How many are kept of each chunk [chunks], their indices and bytes [kept], and the chunks' scale codes [chunks].
    """
    chunk, index = place >> CHUNK_BITS, place & CHUNK_SIZE - 1
    magnitude = np.abs(total)
    largest = np.zeros(len(limits), np.float32)
    if len(chunk):
        first = np.flatnonzero(np.r_[True, chunk[1:] != chunk[:-1]])
        largest[chunk[first]] = np.maximum.reduceat(magnitude, first)
    codes = coding.encode_scale((largest / coding.BYTE_MAX).astype(np.float32))
    scale = coding.scale_table()[codes][chunk]
    with np.errstate(divide="ignore", invalid="ignore"):
        byte = np.rint(np.where(scale > 0, total / scale, 0))
    byte = np.clip(byte, -coding.BYTE_MAX, coding.BYTE_MAX).astype(np.int64)
    kept = np.flatnonzero(byte)
    kept = kept[_largest_of_each(chunk[kept], magnitude[kept], limits)]
    return np.bincount(chunk[kept], minlength=len(limits)), index[kept], byte[kept], codes


def _largest_of_each(chunk: _Places, magnitude: _Values, limits: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each of these [n], in order of chunk, is among the `limits` [chunks] largest of its chunk; of equal ones,
    those that come first."""
    counts = np.bincount(chunk, minlength=len(limits))
    if (counts <= limits).all():
        return np.ones(len(chunk), np.bool_)
    starts = np.cumsum(counts) - counts
    table = np.full((len(limits), counts.max()), -1, np.float32)
    table[chunk, np.arange(len(chunk)) - starts[chunk]] = magnitude
    table.sort(axis=1)
    least = table[np.arange(len(limits)), np.maximum(table.shape[1] - limits, 0)][chunk]
    above, equal = magnitude > least, magnitude == least
    room: _Places = limits - np.bincount(chunk[above], minlength=len(limits))
    before = np.cumsum(equal) - equal
    kept: NDArray[np.bool_] = above | equal & (before - before[np.minimum(starts, len(chunk) - 1)][chunk] < room[chunk])
    return kept
