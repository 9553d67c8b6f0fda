"""What a reducer computes: clip, cap, sum, keep the largest, quantise. Pure, and bounded whatever arrives.

The sum is divided by the weight included, not by the number of peers that happened to pick a coefficient: the latter
measured worse, and it hands every lone coefficient to its sender. The reply is frozen as bytes, and replicas apply
those. Still every machine makes the same bytes of the same contributions, because an auditor repeats the sum
(chain/evidence.py): floats are added one after the other, by compiled loops or by `_total`, never by numpy, whose
order of additions follows the processor, nor by `sum`, which newer Pythons compensate.

A member counts for more the longer it has been there: for an eighth when it comes, in full once seven seals have had
work of it. So identities that are made anew, as liars that were expelled may make them, weigh little for a while. A
group of which all have come at once is summed as if none had.

There are four ways to sum, by `codec.robust`. `mean` bounds a sender's norm by `clip_ratio` times the median. `bounded`
bounds besides what a sender counts for, weight times norm, by the median of all: a claim of much work is worth no more
than the work of the member in the middle. And it leaves out who points against the sum of the others, or is more like
some of them than honest members are: a quarter of all at most. `centered_clip` bounds how far a contribution lies from
a center of all (Karimireddy et al., "Learning from History for Byzantine Robust Optimization", arXiv 2012.10333).
`trimmed` leaves out the largest and the smallest quarter of each entry (Yin et al., arXiv 1803.01498), where a member
that did not send an entry counts as a zero: what a quarter of the members or fewer send alone, in concert or not,
changes nothing. What honest members lose by being left out returns to their momenta, like all that a reply does not
keep, and is sent again.

Cost: a few passes over the coefficients that came, members * topk a chunk; of the part's entries, those of one chunk at
a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2ptrain.compression import coding, decoded, wire
from p2ptrain.compression.codec import STANDING_FULL, Codec
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.compression.wire import Coefficients, Kept, ReplyContent
from p2ptrain.native.compiled import compiled

CLIP_UNIT = 256
TRIMMED = 4
"""One in so many members is left out of an entry's sum at each end, or of a bounded mean at most."""
CENTERINGS = 3
"""Steps towards the center; the first is from zero."""
OPPOSED, IN_CONCERT = 3.0, 6.0
"""How many median distances below the median agreement, and above it, a part is left out."""
LOOKS = 2
"""How often agreement is measured."""
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
"""Times a power of two, its upper six bits tell which (Leiserson, Prokop and Randall, 1998): `_BIT` has it."""
_BIT = np.zeros(64, np.int64)
_BIT[[(int(_DE_BRUIJN) << bit) % 2**64 >> 58 for bit in range(64)]] = np.arange(64)
_Numbers = NDArray[np.int64]
_Values = NDArray[np.float32]


def reduce_part(
    contributions: Sequence[tuple[int, int, bytes]],
    codec: Codec,
    start: int,
    end: int,
    members: int,
    standing: Sequence[int] = (),
) -> bytes:
    """Freeze the reply for chunks [start, end) of a round with `members` members.

    Args:
        contributions: (member index, weight in sequences, payload) in member order; an empty payload with weight 0
            says "still here, nothing yet". Payloads must have passed `wire.decode_contribution`.
        standing: of each member, from 1 to `STANDING_FULL`; empty: all have come long ago.
    """
    included = frozenset(member for member, _, _ in contributions)
    work = [
        (member, weight, decoded.contribution(payload, codec, start, end))
        for member, weight, payload in contributions
        if weight > 0
    ]
    clips: dict[int, int] = {}
    shares: list[float] = []
    parts = [part for _, _, part in work]
    if work:
        cap = codec.weight_cap_ratio * _median([float(weight) for _, weight, _ in work])
        capped = [min(float(weight), cap) for _, weight, _ in work]
        if codec.robust == "bounded":
            capped = _bounded(parts, capped, codec.clip_ratio)
        if standing:
            # Of what its claim is cut to: a claim may be as large as one likes.
            capped = [of * standing[member] / STANDING_FULL for of, (member, _, _) in zip(capped, work, strict=True)]
        factors = _centered(parts, capped) if codec.robust == "centered_clip" else _clipped(parts, codec.clip_ratio)
        if codec.robust == "bounded":
            for number in _outsiders(parts, capped, factors):
                capped[number], factors[number] = 0.0, 0
        weight_included = _total(capped)
        clips = {member: factor for (member, _, _), factor in zip(work, factors, strict=True) if factor < CLIP_UNIT}
        # Shares of one, not weights divided afterwards: a mean of what float32 holds cannot become inf - inf.
        shares = [weight / weight_included * factor / CLIP_UNIT for weight, factor in zip(capped, factors, strict=True)]
    trimmed = len(work) // TRIMMED if codec.robust == "trimmed" else 0
    kept = _frozen(parts, np.array(shares, np.float32), codec, start, end, trimmed)
    reply = wire.encode_reply(kept, codec, start, members, included, clips)
    decoded.wrote_reply(reply, codec, members, wire.reply_content(kept, start, included, clips))
    return reply


def reply_to_one(sent: Coefficients, codec: Codec) -> ReplyContent:
    """Return what a group of one gets back for its contribution, as by way of `reduce_part` and the bytes of both."""
    kept = _frozen([sent], np.ones(1, np.float32), codec, sent.start, sent.end)
    return wire.reply_content(kept, sent.start, frozenset({0}), {})


def _clipped(parts: Sequence[Coefficients], ratio: float) -> list[int]:
    """Return factors in 256ths that bring each norm to `ratio` times the median norm or below."""
    norms = [math.sqrt(_square(part.value)) for part in parts]
    limit = ratio * _median(norms)
    return [int(CLIP_UNIT * limit / norm) if norm > limit else CLIP_UNIT for norm in norms]


def _total(numbers: Sequence[float]) -> float:
    """Add from the first to the last, each addition rounded."""
    total = 0.0
    for number in numbers:
        total += number
    return total


def _bounded(parts: Sequence[Coefficients], weights: Sequence[float], ratio: float) -> list[float]:
    """Return weights of which none, times its part's norm after clipping, is above the median of these products.

    A weight that is cut takes nothing from what its sender has sent, as it does where it is capped: the share of others
    becomes larger, and nothing returns to a momentum that would grow by it.
    """
    norms = [math.sqrt(_square(part.value)) for part in parts]
    limit = ratio * _median(norms)
    pulls = [weight * min(norm, limit) for weight, norm in zip(weights, norms, strict=True)]
    most = _median(pulls)
    return [weight * (most / pull) if pull > most else weight for weight, pull in zip(weights, pulls, strict=True)]


def _outsiders(parts: Sequence[Coefficients], weights: Sequence[float], factors: Sequence[int]) -> list[int]:
    """Return the places of those parts that point against what the others add up to, or in concert; a quarter at most.

    A part's agreement is its product with the sum of the others, over its norm. It is against them if this is below
    zero, and below the median of all by more than `OPPOSED` times the median distance from that median; in concert with
    some of them if it is above by more than `IN_CONCERT` times that. Honest contributions have little in common in a
    round, since what was used has left their momenta: a few that are alike stand out. Who was found is left out of the
    sum that the second look is by.
    """
    if len(parts) < TRIMMED:
        return []
    coming = np.bincount(parts[0].chunk - parts[0].start, minlength=parts[0].end - parts[0].start)
    index, value = _stacked([part.index for part in parts]), _stacked([part.value for part in parts])
    norms = [math.sqrt(_square(part.value)) for part in parts]
    held = np.array([weight * (factor / CLIP_UNIT) for weight, factor in zip(weights, factors, strict=True)])
    found: list[int] = []
    for _ in range(LOOKS):
        held[found] = 0
        products = _with_others(coming, index, value, held)
        agreement = [product / norm if norm else 0.0 for product, norm in zip(products.tolist(), norms, strict=True)]
        middle = _median(agreement)
        distance = _median([abs(one - middle) for one in agreement])
        low, high = min(middle - OPPOSED * distance, 0.0), middle + IN_CONCERT * distance
        ascending = [number for number in sorted(range(len(parts)), key=agreement.__getitem__) if number not in found]
        outside = [number for number in reversed(ascending) if agreement[number] > high]
        outside += [number for number in ascending if agreement[number] < low]
        found += outside[: len(parts) // TRIMMED - len(found)]
    return found


def _median(numbers: Sequence[float]) -> float:
    """Return the middle one, or the mean of the two in the middle."""
    ascending = sorted(numbers)
    middle = len(ascending) // 2
    return ascending[middle] if len(ascending) % 2 else (ascending[middle - 1] + ascending[middle]) / 2


@compiled
def _with_others(coming: _Numbers, index: _Numbers, value: _Values, held: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each part's product with the sum of the others, each times its `held`: exactly 0 where no other sends
    anything. In float64, one operation after the other in members' order."""
    total, products = np.zeros(CHUNK_SIZE), np.zeros(len(index))
    start = 0
    for chunk in range(len(coming)):
        end = start + coming[chunk]
        for part in range(len(index)):
            for number in range(start, end):
                total[index[part, number]] += np.float64(value[part, number]) * held[part]
        for part in range(len(index)):
            for number in range(start, end):
                own = np.float64(value[part, number])
                products[part] += own * (total[index[part, number]] - own * held[part])
        for part in range(len(index)):
            for number in range(start, end):
                total[index[part, number]] = 0
        start = end
    return products


@compiled
def _square(value: _Values) -> float:
    """Add the squares of `value` [n] in float64, in order."""
    total = 0.0
    for number in range(len(value)):
        total += np.float64(value[number]) * np.float64(value[number])
    return total


def _centered(parts: Sequence[Coefficients], weights: Sequence[float]) -> list[int]:
    """Return factors in 256ths: how much of each part is in the center that `CENTERINGS` steps lead to.

    A step adds to the center the weighted mean of all differences from it, each clipped to the median of their norms.
    So the center is a sum of `parts` times `held`, which add up to 1 or less.

    It starts at zero, not at the last update: a coefficient that was used has left its sender's momentum, so what comes
    next is no nearer to the last update than to zero.
    """
    share = np.array(weights) / _total(weights)
    coming = np.bincount(parts[0].chunk - parts[0].start, minlength=parts[0].end - parts[0].start)
    index, value = _stacked([part.index for part in parts]), _stacked([part.value for part in parts])
    squares, held, dots = np.zeros(len(parts)), np.zeros(len(parts)), np.zeros(len(parts))
    for step in range(CENTERINGS):
        center = _toward(coming, index, value, held, squares if step == 0 else dots, step == 0)
        norms = np.sqrt(np.maximum(squares - 2 * dots + center, 0))
        limit = _median(norms.tolist())
        used = share * np.where(norms > limit, limit / np.maximum(norms, np.finfo(np.float64).tiny), 1)
        held = held * (1 - min(_total(used.tolist()), 1.0)) + used
    return [min(int(CLIP_UNIT * of), CLIP_UNIT) for of in held / share]


@compiled
def _toward(
    coming: _Numbers,
    index: _Numbers,
    value: _Values,
    held: NDArray[np.float64],
    dots: NDArray[np.float64],
    squares: bool,
) -> float:
    """Write each part's product with the center, the sum of all parts times `held`; return that of the center with
    itself. With `squares` each part's is with itself, and the center is zero.

    In float64, one operation after the other in members' order, so that every machine gets the same.
    """
    center = np.zeros(CHUNK_SIZE)
    start, own = 0, 0.0
    dots[:] = 0
    for chunk in range(len(coming)):
        end = start + coming[chunk]
        if squares:
            for part in range(len(index)):
                for number in range(start, end):
                    dots[part] += np.float64(value[part, number]) * np.float64(value[part, number])
        else:
            for part in range(len(index)):
                for number in range(start, end):
                    center[index[part, number]] += np.float64(value[part, number]) * held[part]
            for part in range(len(index)):
                for number in range(start, end):
                    dots[part] += np.float64(value[part, number]) * center[index[part, number]]
            for part in range(len(index)):
                for number in range(start, end):
                    place = index[part, number]
                    own += center[place] * center[place]
                    center[place] = 0
        start = end
    return own


def _frozen(
    parts: Sequence[Coefficients], shares: _Values, codec: Codec, start: int, end: int, trimmed: int = 0
) -> Kept:
    """Sum `parts`, each times its share, without the `trimmed` smallest and largest of each entry, and keep at most
    `reply_topk` coefficients a chunk, as signed bytes with one scale; none that round to zero, and of equal ones those
    that come first."""
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
            trimmed,
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
def _add_trimmed(
    start: int,
    end: int,
    index: _Numbers,
    value: _Values,
    shares: _Values,
    trimmed: int,
    total: _Values,
    came: NDArray[np.uint64],
) -> None:
    """Sum one chunk's entries from the smallest up, without the `trimmed` smallest and largest of what all parts have
    there, zeros where nothing came; times what makes up for those left out. In whichever order parts come."""
    parts = len(index)
    makes_up = np.float32(parts) / np.float32(parts - 2 * trimmed)
    #: where the numbers that came for an entry begin among all
    begin = np.zeros(CHUNK_SIZE + 1, np.int64)
    for part in range(parts):
        for number in range(start, end):
            begin[index[part, number] + 1] += 1
    for place in range(CHUNK_SIZE):
        begin[place + 1] += begin[place]
    filled, added = begin.copy(), np.empty(parts * (end - start), np.float32)
    for part in range(parts):
        for number in range(start, end):
            place = index[part, number]
            added[filled[place]] = value[part, number] * shares[part]
            filled[place] += 1
            came[place >> 6] |= np.uint64(1) << np.uint64(place & 63)
    for place in range(CHUNK_SIZE):
        # What no more than `trimmed` have sent is left out at either end.
        if begin[place + 1] - begin[place] <= trimmed:
            continue
        here = added[begin[place] : begin[place + 1]]
        here.sort()
        zeros = parts - len(here)
        for number in range(len(here)):
            rank = number if here[number] < 0 else number + zeros
            if trimmed <= rank < parts - trimmed:
                total[place] += here[number]
        total[place] *= makes_up


@compiled
def _freeze(
    coming: _Numbers,
    index: _Numbers,
    value: _Values,
    shares: _Values,
    trimmed: int,
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
        if trimmed:
            _add_trimmed(start, end, index, value, shares, trimmed, total, came)
        else:
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
