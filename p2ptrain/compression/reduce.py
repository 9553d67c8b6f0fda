"""What a reducer computes: clip, cap, sum, keep the largest, quantise. Pure, and bounded whatever arrives.

The sum is divided by the weight included, not by the number of peers that happened to pick a coefficient: the latter
measured worse, and it hands every lone coefficient to its sender. The reply is frozen as bytes, so this arithmetic
need not agree with anybody else's; only its decoding must (dct.decode_exact).

Cost: a few passes over the coefficients that came, members * topk a chunk; of the part's entries, those of one chunk at
a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2ptrain.compression import coding, decoded, wire
from p2ptrain.compression.codec import Codec
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.compression.wire import Coefficients, Kept, ReplyContent
from p2ptrain.native.compiled import compiled

CLIP_UNIT = 256
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
"""Times a power of two, its upper six bits tell which (Leiserson, Prokop and Randall, 1998): `_BIT` has it."""
_BIT = np.zeros(64, np.int64)
_BIT[[(int(_DE_BRUIJN) << bit) % 2**64 >> 58 for bit in range(64)]] = np.arange(64)
_Numbers = NDArray[np.int64]
_Values = NDArray[np.float32]


def reduce_part(
    contributions: Sequence[tuple[int, int, bytes]], codec: Codec, start: int, end: int, members: int
) -> bytes:
    """Freeze the reply for chunks [start, end) of a round with `members` members.

    Args:
        contributions: (member index, weight in sequences, payload) in member order; an empty payload with weight 0
            says "still here, nothing yet". Payloads must have passed `wire.decode_contribution`.
    """
    included = frozenset(member for member, _, _ in contributions)
    work = [
        (member, weight, decoded.contribution(payload, codec, start, end))
        for member, weight, payload in contributions
        if weight > 0
    ]
    clips: dict[int, int] = {}
    shares = []
    if work:
        norms = [float(np.sqrt(np.square(part.value, dtype=np.float64).sum())) for _, _, part in work]
        limit = codec.clip_ratio * float(np.median(norms))
        cap = codec.weight_cap_ratio * float(np.median([weight for _, weight, _ in work]))
        capped = [min(float(weight), cap) for _, weight, _ in work]
        weight_included = sum(capped)
        for (member, _, _), norm, weight in zip(work, norms, capped, strict=True):
            factor = CLIP_UNIT
            if norm > limit:
                factor = int(CLIP_UNIT * limit / norm)
                clips[member] = factor
            # Shares of one, not weights divided afterwards: a mean of what float32 holds cannot become inf - inf.
            shares.append(weight / weight_included * factor / CLIP_UNIT)
    kept = _frozen([part for _, _, part in work], np.array(shares, np.float32), codec, start, end)
    reply = wire.encode_reply(kept, codec, start, members, included, clips)
    decoded.wrote_reply(reply, codec, members, wire.reply_content(kept, start, included, clips))
    return reply


def reply_to_one(sent: Coefficients, codec: Codec) -> ReplyContent:
    """Return what a group of one gets back for its contribution, as by way of `reduce_part` and the bytes of both."""
    kept = _frozen([sent], np.ones(1, np.float32), codec, sent.start, sent.end)
    return wire.reply_content(kept, sent.start, frozenset({0}), {})


def _frozen(parts: Sequence[Coefficients], shares: _Values, codec: Codec, start: int, end: int) -> Kept:
    """Sum `parts`, each times its share, and keep at most `reply_topk` coefficients a chunk, as signed bytes with one
    scale; none that round to zero, and of equal ones those that come first."""
    coming, most = np.array(codec.topk[start:end], np.int64), np.array(codec.reply_topk[start:end], np.int64)
    room = int(np.minimum(coming * len(parts), most).sum())
    counts, codes = np.zeros(len(most), np.int64), np.zeros(len(most), np.uint8)
    index, byte = np.empty((2, room), np.int64)
    if parts:
        kept = _freeze(
            coming,
            _stacked([part.index for part in parts]),
            _stacked([part.value for part in parts]),
            shares,
            most,
            coding.scale_table(),
            counts,
            index,
            byte,
            codes,
        )
        index, byte = index[:kept], byte[:kept]
    return Kept(counts, index, byte, codes)


def _stacked(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """[parts, n], without a copy where there is one."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


@compiled
def _freeze(
    coming: _Numbers,
    index: _Numbers,
    value: _Values,
    shares: _Values,
    limits: _Numbers,
    table: _Values,
    counts: _Numbers,
    kept_index: _Numbers,
    kept_byte: _Numbers,
    codes: NDArray[np.uint8],
) -> int:
    """`_frozen` of `index` and `value` [parts, n], `coming` [chunks] of each part; how many are kept in all."""
    total = np.zeros(CHUNK_SIZE, np.float32)
    #: whether something came for an entry, 64 in a word
    came = np.zeros(CHUNK_SIZE // 64, np.uint64)
    places, magnitude = np.empty(CHUNK_SIZE, np.int64), np.empty(CHUNK_SIZE, np.float32)
    start, kept = 0, 0
    for chunk in range(len(coming)):
        end = start + coming[chunk]
        for part in range(len(index)):
            for number in range(start, end):
                place = index[part, number]
                total[place] += value[part, number] * shares[part]
                came[place >> 6] |= np.uint64(1) << np.uint64(place & 63)
        start = end
        found, largest = 0, np.float32(0)
        for word in range(len(came)):
            bits = came[word]
            came[word] = 0
            while bits:
                lowest = bits & (~bits + np.uint64(1))
                place = (word << 6) + _BIT[(lowest * _DE_BRUIJN) >> np.uint64(58)]
                places[found], magnitude[found] = place, abs(total[place])
                largest = max(largest, magnitude[found])
                found += 1
                bits ^= lowest
        code = coding.code_not_below(np.float32(largest / np.float32(coding.BYTE_MAX)), table)
        codes[chunk] = code
        # What rounds to zero is smaller than all that does not: dropping it last leaves the same as dropping it first.
        least, equal = np.float32(0), 0
        if found > limits[chunk]:
            least = np.partition(magnitude[:found], found - limits[chunk])[found - limits[chunk]]
            equal = limits[chunk]
            for number in range(found):
                equal -= magnitude[number] > least
        for number in range(found):
            place = places[number]
            take = magnitude[number] > least
            if equal and magnitude[number] == least:
                take = True
                equal -= 1
            if take and code:
                byte = np.rint(total[place] / table[code])
                if byte:
                    kept_index[kept] = place
                    kept_byte[kept] = min(max(byte, np.float32(-coding.BYTE_MAX)), np.float32(coding.BYTE_MAX))
                    counts[chunk] += 1
                    kept += 1
            total[place] = 0
    return kept
