"""The reducer's arithmetic against a dense sum in float64, and its bounds against hostile members."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from plain_codec import quantised

from p2ptrain.compression import coding, decoded, reduce, wire
from p2ptrain.compression.codec import Codec, Robust
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.compression.reduce import reduce_part, reply_to_one
from p2ptrain.compression.wire import Coefficients, Kept, ReplyContent

TOPK = (6, 6, 3, 10)
START, END, MEMBERS = 1, 4, 7
SMALLEST_SCALE, SCALE_RATIO = 2.0**-28, 2.0 ** (1 / 8)

Sent = tuple[int, int, Coefficients]
"""Member, weight, what it sent."""


def coefficients(seed: int, value_bits: int = 32, size: float = 1.0) -> Coefficients:
    """What a member might send for chunks [START, END), from few enough indices that members collide."""
    rng = np.random.default_rng(seed)
    counts = TOPK[START:END]
    chunk = np.repeat(np.arange(START, END), counts)
    index = np.concatenate([np.sort(rng.choice(np.arange(20, 4000, 199), count, replace=False)) for count in counts])
    value = (rng.standard_normal(len(chunk)) * size).astype(np.float32)
    return Coefficients(START, END, chunk, index, quantised(chunk, value, value_bits))


def apart(member: int, seed: int = 0, size: float = 1.0) -> Coefficients:
    """What a member might send where no other sends anything; of seed 0 ones."""
    counts = TOPK[START:END]
    chunk = np.repeat(np.arange(START, END), counts)
    index = np.concatenate([np.arange(count) for count in counts]) + 100 * member
    value = np.random.default_rng((seed, member)).standard_normal(len(chunk)) if seed else np.ones(len(chunk))
    return Coefficients(START, END, chunk, index, (value * size).astype(np.float32))


def reduced(
    sent: list[Sent],
    *,
    value_bits: int = 32,
    reply_topk: int = CHUNK_SIZE,
    clip_ratio: float = 1000.0,
    weight_cap_ratio: float = 1000.0,
    robust: Robust = "mean",
    standing: Sequence[int] = (),
) -> ReplyContent:
    codec = Codec(TOPK, (reply_topk,) * END, value_bits, clip_ratio, weight_cap_ratio, robust)
    contributions = [
        (member, weight, wire.encode_contribution(part, codec) if weight else b"") for member, weight, part in sent
    ]
    data = reduce_part(contributions, codec, START, END, MEMBERS, standing)
    return wire.decode_reply(data, codec, START, END, MEMBERS)


def assert_same(one: ReplyContent, other: ReplyContent) -> None:
    assert (one.included, one.clips) == (other.included, other.clips)
    assert (one.coefficients.start, one.coefficients.end) == (other.coefficients.start, other.coefficients.end)
    for ours, theirs in (
        (one.byte, other.byte),
        (one.scale, other.scale),
        (one.coefficients.chunk, other.coefficients.chunk),
        (one.coefficients.index, other.coefficients.index),
        (one.coefficients.value, other.coefficients.value),
    ):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


def dense(part: Coefficients) -> NDArray[np.float64]:
    out = np.zeros((END - START, CHUNK_SIZE))
    out[part.chunk - START, part.index] = part.value
    return out


def reference(
    sent: list[Sent],
    clip_ratio: float = 1000.0,
    cap_ratio: float = 1000.0,
    robust: Robust = "mean",
    standing: Sequence[int] = (8,) * 16,
) -> tuple[NDArray[np.float64], dict[int, int]]:
    """The weighted mean of clipped contributions [chunks, 4096], and the clip factors in 256ths."""
    size = dict(zip((member for member, _, _ in sent), norms([part for _, _, part in sent]), strict=True))
    limit = clip_ratio * np.median(list(size.values()))
    clips = {member: int(256 * limit / norm) for member, norm in size.items() if norm > limit}
    cap = cap_ratio * np.median([weight for _, weight, _ in sent])
    weights = {member: min(weight, cap) for member, weight, _ in sent}
    if robust == "bounded":
        most = np.median([weight * min(size[member], limit) for member, weight in weights.items()])
        weights = {member: min(weight, most / min(size[member], limit)) for member, weight in weights.items()}
    weights = {member: weight * standing[member] / 8 for member, weight in weights.items()}
    if robust == "bounded":
        held = [weights[member] * clips.get(member, 256) / 256 for member, _, _ in sent]
        for place in outsiders([dense(part) for _, _, part in sent], held):
            weights[sent[place][0]] = clips[sent[place][0]] = 0
    total = sum(weights[member] * clips.get(member, 256) / 256 * dense(part) for member, _, part in sent)
    return total / sum(weights.values()), clips


def outsiders(parts: list[NDArray[np.float64]], held: list[float]) -> list[int]:
    """The places of those that point against the sum of the others, or in concert, by way of every entry: by their
    products over their norms, six median distances above the median, or three below it and below zero; a quarter at
    most. Twice, the second time without those found."""
    found: list[int] = []
    for _ in range(2):
        agreement = np.zeros(len(parts))
        for place, part in enumerate(parts):
            others = np.zeros_like(part)
            for other, (one, weight) in enumerate(zip(parts, held, strict=True)):
                if other != place and other not in found:
                    others += weight * one
            agreement[place] = np.vdot(part, others) / max(np.linalg.norm(part), 1e-300)
        middle = np.median(agreement)
        distance = np.median(abs(agreement - middle))
        high = [int(place) for place in np.argsort(-agreement) if agreement[place] > middle + 6 * distance]
        low = [int(place) for place in np.argsort(agreement) if agreement[place] < min(middle - 3 * distance, 0)]
        new = [place for place in (*high, *low) if place not in found]
        found += new[: len(parts) // 4 - len(found)]
    return found


def one_by_one(numbers: Iterable[float]) -> float:
    """Their sum, each addition rounded, from the first to the last."""
    total = 0.0
    for number in numbers:
        total = total + number
    return total


def norms(parts: list[Coefficients]) -> list[float]:
    """Of squares that are summed float by float."""
    return [math.sqrt(one_by_one(float(value) * float(value) for value in part.value)) for part in parts]


def clip_factors(parts: list[Coefficients], ratio: float) -> list[int]:
    limit = ratio * statistics.median(norms(parts))
    return [int(256 * limit / norm) if norm > limit else 256 for norm in norms(parts)]


def centering_factors(parts: list[Coefficients], weights: list[float]) -> list[int]:
    """As docs/protocol.md describes the center, by Python's floats and dictionaries alone."""
    whole = one_by_one(weights)
    shares = [weight / whole for weight in weights]
    entries = [
        list(zip(part.chunk.tolist(), part.index.tolist(), map(float, part.value), strict=True)) for part in parts
    ]
    squares = [one_by_one(value * value for _, _, value in one) for one in entries]
    held = [0.0] * len(parts)
    for step in range(3):
        dots, own = [0.0] * len(parts), 0.0
        for chunk in range(START, END) if step else ():
            center: dict[int, float] = {}
            for one, much in zip(entries, held, strict=True):
                for at, index, value in one:
                    if at == chunk:
                        center[index] = center.get(index, 0.0) + value * much
            for number, one in enumerate(entries):
                for at, index, value in one:
                    if at == chunk:
                        dots[number] = dots[number] + value * center[index]
            # `center` has its entries in the order in which they first came.
            for value in center.values():
                own = own + value * value
        norms = [math.sqrt(max(square - 2 * dot + own, 0.0)) for square, dot in zip(squares, dots, strict=True)]
        limit = statistics.median(norms)
        used = [share * (limit / norm if norm > limit else 1) for share, norm in zip(shares, norms, strict=True)]
        left = 1 - min(one_by_one(used), 1.0)
        held = [before * left + now for before, now in zip(held, used, strict=True)]
    return [min(int(256 * (much / share)), 256) for much, share in zip(held, shares, strict=True)]


def dense_reply(sent: list[Sent], codec: Codec, standing: Sequence[int] = (8,) * MEMBERS) -> bytes:
    """The same reply float by float, by way of every entry of the part: added in the order sent, one sort a chunk."""
    work = [(member, float(weight), part) for member, weight, part in sent if weight]
    cap = codec.weight_cap_ratio * statistics.median([weight for _, weight, _ in work])
    weights, parts = [min(weight, cap) for _, weight, _ in work], [part for _, _, part in work]
    if codec.robust == "bounded":
        limit = codec.clip_ratio * statistics.median(norms(parts))
        pulls = [weight * min(norm, limit) for weight, norm in zip(weights, norms(parts), strict=True)]
        most = statistics.median(pulls)
        weights = [
            weight * (most / pull) if pull > most else weight for weight, pull in zip(weights, pulls, strict=True)
        ]
    weights = [weight * standing[member] / 8 for weight, (member, _, _) in zip(weights, work, strict=True)]
    centered = codec.robust == "centered_clip"
    factors = centering_factors(parts, weights) if centered else clip_factors(parts, codec.clip_ratio)
    if codec.robust == "bounded":
        held = [weight * factor / 256 for weight, factor in zip(weights, factors, strict=True)]
        for place in outsiders([dense(part) for part in parts], held):
            weights[place], factors[place] = 0.0, 0
    clips = {member: factor for (member, _, _), factor in zip(work, factors, strict=True) if factor < 256}
    whole = one_by_one(weights)
    products = np.zeros((len(work), END - START, CHUNK_SIZE), np.float32)
    for number, (part, weight, factor) in enumerate(zip(parts, weights, factors, strict=True)):
        share = np.float32(weight / whole * factor / 256)
        for chunk, index, value in zip(part.chunk, part.index, part.value, strict=True):
            products[number, chunk - START, index] = value * share
    left_out = len(work) // 4 if codec.robust == "trimmed" else 0
    if left_out:
        products = np.sort(products, axis=0)[left_out : len(work) - left_out]
    total = np.zeros((END - START, CHUNK_SIZE), np.float32)
    for one in products:
        total = total + one
    if left_out:
        total = total * (np.float32(len(work)) / np.float32(len(work) - 2 * left_out))
    counts, indices, values, codes = [], [], [], []
    for row, one in enumerate(total):
        code = min(int(np.searchsorted(coding.scale_table(), np.float32(np.abs(one).max() / 127))), 255)
        scale = coding.scale_table()[code]
        byte = np.clip(np.rint(one / scale if scale else one * 0), -127, 127).astype(np.int64)
        order = np.argsort(-np.abs(one), kind="stable")
        kept = np.sort([index for index in order if byte[index]][: codec.reply_topk[START + row]]).astype(np.int64)
        counts.append(len(kept))
        indices.append(kept)
        values.append(byte[kept])
        codes.append(code)
    kept = Kept(np.asarray(counts), np.concatenate(indices), np.concatenate(values), np.asarray(codes, np.uint8))
    included = frozenset(member for member, _, _ in sent)
    return wire.encode_reply(kept, codec, START, MEMBERS, included, clips)


def assert_quantises(content: ReplyContent, exact: NDArray[np.float64], reply_topk: int = CHUNK_SIZE) -> None:
    """The reply holds the largest entries of `exact`, each within half a step of its chunk's scale."""
    part = content.coefficients
    for row in range(END - START):
        here = part.chunk == START + row
        magnitude, scale = np.abs(exact[row]), float(content.scale[row])
        tolerance = 1e-6 * magnitude.max()
        assert scale <= max(magnitude.max() / 127 * SCALE_RATIO, SMALLEST_SCALE) * (1 + 1e-6)
        kept = part.index[here]
        assert (np.abs(part.value[here] - exact[row, kept]) <= scale / 2 + tolerance).all()
        left = np.delete(magnitude, kept)
        assert len(kept) <= reply_topk
        if len(kept) < reply_topk:
            assert left.max() <= scale / 2 + tolerance
        else:
            assert left.max() <= magnitude[kept].min() + tolerance


@pytest.mark.parametrize("value_bits", [1, 2, 32])
def test_a_reply_is_the_weighted_mean(value_bits: int) -> None:
    sent = [(member, weight, coefficients(member, value_bits)) for member, weight in ((0, 3), (2, 1), (5, 8))]
    content = reduced(sent, value_bits=value_bits)
    exact, clips = reference(sent)
    assert not clips
    assert content.included == {0, 2, 5}
    assert_quantises(content, exact)


@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=MEMBERS),
    reply_topk=st.integers(1, 12),
    clip_ratio=st.floats(1, 3),
    cap_ratio=st.floats(1, 3),
    robust=st.sampled_from(["mean", "bounded"]),
    standing=st.lists(st.integers(1, 8), min_size=MEMBERS, max_size=MEMBERS),
)
@settings(max_examples=80, deadline=None)
def test_a_reply_is_the_mean_of_clipped_and_capped_contributions(
    seed: int,
    weights: list[int],
    reply_topk: int,
    clip_ratio: float,
    cap_ratio: float,
    robust: Robust,
    standing: list[int],
) -> None:
    sizes = np.exp2(np.random.default_rng(seed).integers(-6, 3, len(weights)))
    sent = [
        (member, weight, coefficients(seed + member, size=size))
        for member, (weight, size) in enumerate(zip(weights, sizes, strict=True))
    ]
    content = reduced(
        sent,
        reply_topk=reply_topk,
        clip_ratio=clip_ratio,
        weight_cap_ratio=cap_ratio,
        robust=robust,
        standing=standing,
    )
    exact, clips = reference(sent, clip_ratio, cap_ratio, robust, standing)
    assert content.clips == clips
    assert_quantises(content, exact, reply_topk)


@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=MEMBERS),
    value_bits=st.sampled_from([1, 2, 32]),
    reply_topk=st.integers(1, 12),
    ratio=st.sampled_from([1.0, 1.5, 1000.0]),
    robust=st.sampled_from(get_args(Robust)),
    standing=st.lists(st.integers(1, 8), min_size=MEMBERS, max_size=MEMBERS) | st.just(()),
)
@settings(max_examples=80, deadline=None)
def test_a_reply_is_the_bytes_that_a_dense_sum_gives(
    seed: int,
    weights: list[int],
    value_bits: int,
    reply_topk: int,
    ratio: float,
    robust: Robust,
    standing: Sequence[int],
) -> None:
    """An auditor repeats it, on another machine. Equal magnitudes, which 1 and 2 bits make many of, are kept from the
    first on."""
    sent = [(member, weight, coefficients(seed + member, value_bits)) for member, weight in enumerate(weights)]
    codec = Codec(TOPK, (reply_topk,) * END, value_bits, ratio, ratio, robust)
    contributions = [(member, weight, wire.encode_contribution(part, codec)) for member, weight, part in sent]
    data = reduce_part(contributions, codec, START, END, MEMBERS, standing)
    assert data == dense_reply(sent, codec, standing or (8,) * MEMBERS)
    # Its reducer reads it without decoding it.
    assert_same(decoded.reply(data, codec, START, END, MEMBERS), wire.decode_reply(data, codec, START, END, MEMBERS))


@given(seed=st.integers(0, 2**32 - 1), value_bits=st.sampled_from([1, 2, 32]), reply_topk=st.integers(1, 12))
@settings(max_examples=30)
def test_a_group_of_one_gets_the_reply_that_bytes_would_carry(seed: int, value_bits: int, reply_topk: int) -> None:
    part = coefficients(seed, value_bits)
    direct, through = (
        reply_to_one(part, Codec(TOPK, (reply_topk,) * END, value_bits)),
        reduced([(0, 1, part)], value_bits=value_bits, reply_topk=reply_topk),
    )
    assert_same(direct, through)


def test_norms_are_summed_float_by_float() -> None:
    """Never in an order that follows the processor: numpy's own differs in the last bits here."""
    value = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    exact = one_by_one(float(one) * float(one) for one in value)
    assert reduce._square(value) == exact
    assert reduce._total([0.1] * 10) == one_by_one([0.1] * 10) != math.fsum([0.1] * 10)


def test_the_sum_is_divided_by_all_the_weight_not_by_who_picked_a_coefficient() -> None:
    counts = TOPK[START:END]
    chunk = np.repeat(np.arange(START, END), counts)
    one = Coefficients(START, END, chunk, np.concatenate([np.arange(c) for c in counts]), np.ones(19, np.float32))
    other = Coefficients(START, END, chunk, one.index + 100, np.ones(19, np.float32))
    content = reduced([(0, 1, one), (1, 3, other)])
    of_one = content.coefficients.value[content.coefficients.index < 100]
    of_other = content.coefficients.value[content.coefficients.index >= 100]
    np.testing.assert_allclose(of_one, 1 / 4, rtol=0.02)
    np.testing.assert_allclose(of_other, 3 / 4, rtol=0.01)


def test_a_member_without_work_is_included_and_changes_nothing() -> None:
    working = (2, 5, coefficients(1))
    alone, together = reduced([working]), reduced([(0, 0, coefficients(2)), working, (6, 0, coefficients(3))])
    assert together.included == {0, 2, 6}
    assert np.array_equal(alone.byte, together.byte)
    assert np.array_equal(alone.scale, together.scale)
    assert np.array_equal(alone.coefficients.index, together.coefficients.index)


@pytest.mark.parametrize("silent", [[], [3], [0, 1, 6]])
def test_without_any_work_the_reply_is_valid_and_empty(silent: list[int]) -> None:
    content = reduced([(member, 0, coefficients(0)) for member in silent])
    assert content.included == set(silent)
    assert not content.clips
    assert not len(content.byte)
    assert not content.scale.any()


def test_a_contribution_of_zeros_gives_an_empty_reply() -> None:
    assert not len(reduced([(0, 1, coefficients(0, size=0.0)), (1, 1, coefficients(1, size=0.0))]).byte)


def test_a_huge_sender_is_clipped_and_named() -> None:
    sent = [(0, 1, coefficients(0)), (3, 1, coefficients(3, size=1e6)), (4, 1, coefficients(4))]
    content = reduced(sent, clip_ratio=1.5)
    assert content.clips.keys() == {3}
    assert content.clips[3] == 0  # a millionth is less than one 256th
    honest, _ = reference([(0, 1, sent[0][2]), (4, 1, sent[2][2])])
    assert_quantises(content, honest * 2 / 3)


def test_nobody_moves_the_mean_further_than_the_limit() -> None:
    sent = [(0, 1, coefficients(0)), (3, 1, coefficients(3, size=4.0)), (4, 1, coefficients(4))]
    content = reduced(sent, clip_ratio=1.0)
    limit = np.median([np.linalg.norm(dense(part)) for _, _, part in sent])
    clipped = np.linalg.norm(dense(sent[1][2])) * content.clips[3] / 256
    assert 0.95 * limit < clipped <= limit


@pytest.mark.parametrize("claimed", [2, 1000, 10**6])
def test_a_claimed_weight_counts_in_a_bounded_mean_for_no_more_than_the_member_in_the_middle(claimed: int) -> None:
    sent = [(member, 1, apart(member)) for member in range(5)]
    boasting = [*sent[:4], (4, claimed, apart(4))]
    assert np.array_equal(reduced(boasting, robust="bounded").byte, reduced(sent, robust="bounded").byte)


@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=MEMBERS),
    liars=st.integers(1, 3),
    claimed=st.integers(1, 2**20),
    size=st.floats(1e-3, 1e6),
)
@settings(max_examples=100, deadline=None)
def test_fewer_liars_than_half_each_move_a_bounded_mean_by_no_more_than_the_honest_member_that_moves_it_most(
    seed: int, weights: list[int], liars: int, claimed: int, size: float
) -> None:
    liars = min(liars, (len(weights) - 1) // 2)
    honest = len(weights) - liars
    sent = [
        (member, weight, apart(member, seed)) if member < honest else (member, claimed, apart(member, seed, size))
        for member, weight in enumerate(weights)
    ]
    content = reduced(sent, clip_ratio=3.0, weight_cap_ratio=4.0, robust="bounded")
    moved = dense(content.coefficients)
    rounding = np.linalg.norm(content.scale) * len(sent[0][2].value)
    norms = [float(np.linalg.norm(moved[part.chunk - START, part.index])) for _, _, part in sent]
    assert max(norms[honest:]) <= max(norms[:honest]) + rounding


def test_no_claim_makes_up_for_having_just_come() -> None:
    """A newcomer's share is at most an eighth of the middle one's, whatever it claims and however much it sends."""
    sent = [(member, 4, apart(member, 7)) for member in range(4)] + [(4, 2**20, apart(4, 7, 1000.0))]
    content = reduced(sent, clip_ratio=3.0, weight_cap_ratio=4.0, robust="bounded", standing=(8, 8, 8, 8, 1))
    moved = dense(content.coefficients)
    shares = [np.linalg.norm(moved[part.chunk - START, part.index]) for _, _, part in sent]
    assert shares[4] < 1.01 * np.median(shares[:4]) / 8


def agreeing(member: int, sign: float = 1.0) -> Coefficients:
    """What members send who have much in common, or its opposite, and something of their own."""
    common, own = apart(0), np.random.default_rng(member).standard_normal(19) / 4
    return Coefficients(START, END, common.chunk, common.index, ((common.value + own) * sign).astype(np.float32))


@pytest.mark.parametrize(("members", "liars"), [(4, 1), (5, 1), (7, 1)])
def test_who_points_against_the_others_counts_for_nothing_in_a_bounded_mean_and_all_of_it_returns(
    members: int, liars: int
) -> None:
    honest = [(member, 1, agreeing(member)) for member in range(members - liars)]
    lies = [(member, 9, agreeing(member, -2.0)) for member in range(members - liars, members)]
    content = reduced([*honest, *lies], weight_cap_ratio=4.0, robust="bounded")
    assert content.clips == {member: 0 for member, _, _ in lies}
    assert_quantises(content, reference([*honest, *lies], cap_ratio=4.0, robust="bounded")[0])
    assert (content.byte > 0).all()


def test_who_sends_the_same_as_another_counts_for_nothing_in_a_bounded_mean() -> None:
    """Where honest members have little in common: four of sixteen."""
    members = 16
    honest = [(member, 1, coefficients(member)) for member in range(members - 4)]
    lies = [(member, 1, apart(3, 5)) for member in range(members - 4, members)]
    codec = Codec(TOPK, (CHUNK_SIZE,) * END, 32, 3.0, 4.0, "bounded")
    contributions = [(member, weight, wire.encode_contribution(part, codec)) for member, weight, part in honest + lies]
    content = wire.decode_reply(reduce_part(contributions, codec, START, END, members), codec, START, END, members)
    assert content.clips == {member: 0 for member, _, _ in lies}
    assert_quantises(content, reference(honest + lies, 3.0, 4.0, "bounded")[0])


@given(seed=st.integers(0, 2**32 - 1), weights=st.lists(st.integers(1, 9), min_size=1, max_size=MEMBERS))
@settings(max_examples=60, deadline=None)
def test_no_more_than_a_quarter_is_left_out_of_a_bounded_mean_and_of_a_group_below_four_nobody(
    seed: int, weights: list[int]
) -> None:
    content = reduced(sent_by(seed, weights), robust="bounded")
    assert list(content.clips.values()) == [0] * len(content.clips)
    assert len(content.clips) <= len(weights) // 4


def test_what_nobody_else_sends_points_against_nobody() -> None:
    assert not reduced([(member, member + 1, apart(member, 7)) for member in range(MEMBERS)], robust="bounded").clips


@pytest.mark.parametrize("claimed", [1000, 10**6])
def test_a_claimed_weight_counts_up_to_the_cap(claimed: int) -> None:
    sent = [(0, 10, coefficients(0)), (1, 10, coefficients(1)), (2, claimed, coefficients(2))]
    capped = [*sent[:2], (2, 40, sent[2][2])]
    assert np.array_equal(reduced(sent, weight_cap_ratio=4.0).byte, reduced(capped, weight_cap_ratio=4.0).byte)


def test_the_order_of_arrival_changes_no_more_than_rounding() -> None:
    sent = [(member, member + 1, coefficients(member)) for member in range(5)]
    one, other = reduced(sent), reduced(sent[::-1])
    assert one.included == other.included
    for content in (one, other):
        assert_quantises(content, reference(sent)[0])


def test_values_at_the_end_of_float32_give_a_reply_in_bounds() -> None:
    huge = float(np.finfo(np.float32).max)
    up, down = coefficients(0), coefficients(0)
    up.value[:], down.value[:] = huge, -huge
    for sent, sign in (
        ([(0, 1000, up), (1, 1000, up)], 1),
        ([(0, 999, up), (1, 1000, down)], -1),
        ([(0, 1, down)], -1),
    ):
        content = reduced(sent)
        assert content.byte.tolist() == [127 * sign] * 19
        assert np.isfinite(content.coefficients.value).all()
    assert not len(reduced([(0, 1000, up), (1, 1000, down)]).byte)


def test_a_malformed_payload_is_not_summed() -> None:
    with pytest.raises(wire.WireError):
        reduce_part([(0, 1, b"nonsense")], Codec(TOPK, TOPK, 2), START, END, MEMBERS)


# ---- robust sums ----------------------------------------------------------------------------------------------------


def robustly(sent: list[Sent], robust: Robust, clip_ratio: float = 1000.0) -> bytes:
    codec = Codec(TOPK, (CHUNK_SIZE,) * END, 32, clip_ratio, 1000.0, robust)
    contributions = [(member, weight, wire.encode_contribution(part, codec)) for member, weight, part in sent]
    return reduce_part(contributions, codec, START, END, MEMBERS)


def read(data: bytes) -> ReplyContent:
    return wire.decode_reply(data, Codec(TOPK, (CHUNK_SIZE,) * END, 32), START, END, MEMBERS)


def trimmed_reference(sent: list[Sent]) -> NDArray[np.float64]:
    """Yin et al. (2018), over every entry of the part, zeros included."""
    total = sum(weight for _, weight, _ in sent)
    added = np.sort([dense(part) * (weight / total) for _, weight, part in sent], axis=0)
    left_out = len(sent) // 4
    kept = added[left_out : len(sent) - left_out]
    return kept.sum(0) * len(sent) / len(kept)


def centered_reference(sent: list[Sent]) -> tuple[NDArray[np.float64], dict[int, int]]:
    """Karimireddy et al. (2021), Algorithm 2 from zero with the median distance as radius, and what of each member is
    in the center, in 256ths and at most all of it: the sum that a reply freezes."""
    share = np.array([weight for _, weight, _ in sent]) / sum(weight for _, weight, _ in sent)
    parts = np.array([dense(part) for _, _, part in sent])
    center, held = np.zeros_like(parts[0]), np.zeros(len(sent))
    for _ in range(3):
        norms = np.maximum(np.linalg.norm((parts - center).reshape(len(sent), -1), axis=1), 1e-300)
        used = share * np.minimum(1, np.median(norms) / norms)
        center = center + np.tensordot(used, parts - center, 1)
        held = held * (1 - used.sum()) + used
        np.testing.assert_allclose(center, np.tensordot(held, parts, 1), atol=1e-12)
    factors = np.minimum(np.floor(256 * held / share), 256)
    clips = {member: int(factor) for (member, _, _), factor in zip(sent, factors, strict=True) if factor < 256}
    return np.tensordot(share * factors / 256, parts, 1), clips


def sent_by(seed: int, weights: list[int], spread: int = 3) -> list[Sent]:
    sizes = np.exp2(np.random.default_rng(seed).integers(-spread, spread, len(weights)))
    return [
        (member, weight, coefficients(seed + member, size=size))
        for member, (weight, size) in enumerate(zip(weights, sizes, strict=True))
    ]


some_weights = st.lists(st.integers(1, 9), min_size=1, max_size=MEMBERS)


@given(seed=st.integers(0, 2**32 - 1), weights=some_weights)
@settings(max_examples=60, deadline=None)
def test_trimmed_is_the_mean_of_each_entry_without_its_largest_and_smallest_quarter(
    seed: int, weights: list[int]
) -> None:
    sent = sent_by(seed, weights)
    content = read(robustly(sent, "trimmed"))
    assert not content.clips
    assert_quantises(content, trimmed_reference(sent))


@given(seed=st.integers(0, 2**32 - 1), weights=some_weights)
@settings(max_examples=60, deadline=None)
def test_centered_clip_is_the_sum_around_the_center_of_a_dense_iteration(seed: int, weights: list[int]) -> None:
    sent = sent_by(seed, weights)
    content = read(robustly(sent, "centered_clip"))
    exact, clips = centered_reference(sent)
    # A factor at the edge between two 256ths may fall to either side.
    assert all(abs(content.clips.get(member, 256) - clips.get(member, 256)) <= 1 for member, _, _ in sent)
    if content.clips == clips:
        assert_quantises(content, exact)


@given(seed=st.integers(0, 2**32 - 1), weights=some_weights)
@settings(max_examples=30, deadline=None)
def test_a_trimmed_sum_does_not_depend_on_the_order_of_members(seed: int, weights: list[int]) -> None:
    sent = [(0, weight, part) for _, weight, part in sent_by(seed, weights)]
    if len(sent) < 4:
        return  # as `mean`
    there, back = (
        [(member, weight, part) for member, (_, weight, part) in enumerate(order)] for order in (sent, sent[::-1])
    )
    assert robustly(there, "trimmed") == robustly(back, "trimmed")


@pytest.mark.parametrize("robust", get_args(Robust))
def test_a_reply_made_twice_is_the_same_bytes(robust: Robust) -> None:
    assert robustly(sent_by(7, [1, 2, 3, 4, 5]), robust) == robustly(sent_by(7, [1, 2, 3, 4, 5]), robust)


@given(seed=st.integers(0, 2**32 - 1), hostile=st.integers(0, 1), size=st.sampled_from([1e-3, 1.0, 1e6, 1e30]))
@settings(max_examples=40, deadline=None)
def test_a_quarter_of_the_members_moves_no_entry_of_a_trimmed_sum_beyond_what_honest_members_sent(
    seed: int, hostile: int, size: float
) -> None:
    sent = [(member, 1, coefficients(seed + member)) for member in range(MEMBERS)]
    for liar in range(hostile):
        sent[liar] = (liar, 1, coefficients(seed + 100 + liar, size=size))
    content = read(robustly(sent, "trimmed"))
    honest = np.array([dense(part) for _, _, part in sent[hostile:]])
    left_out = MEMBERS // 4
    # What is left of each entry has, number by number, an honest one above it and one below it.
    ranked = np.sort(honest, axis=0)
    kept = MEMBERS - 2 * left_out
    above, below = ranked[-kept:].mean(0), ranked[:kept].mean(0)
    part = content.coefficients
    row, scale = part.chunk - START, content.scale[part.chunk - START]
    assert (part.value <= above[row, part.index] + scale).all()
    assert (part.value >= below[row, part.index] - scale).all()


def test_what_a_quarter_sends_alone_is_left_out_by_trimming() -> None:
    sent = [(member, 1, coefficients(member)) for member in range(4)]
    alone = coefficients(9, size=1e6)
    alone.index[:] += 1  # where nobody else sends
    data = robustly([*sent[:3], (3, 1, alone)], "trimmed")
    assert not np.isin(read(data).coefficients.index, alone.index).any()


@given(seed=st.integers(0, 2**32 - 1), size=st.floats(0.01, 1e6))
@settings(max_examples=40, deadline=None)
def test_a_liar_has_no_more_than_twice_its_share_of_the_largest_honest_norm_in_a_centered_sum(
    seed: int, size: float
) -> None:
    sent = [(member, 1, coefficients(seed + member)) for member in range(MEMBERS)]
    sent[3] = (3, 1, coefficients(seed + 50, size=size))
    clips = read(robustly(sent, "centered_clip")).clips
    largest = max(np.linalg.norm(dense(part)) for member, _, part in sent if member != 3)
    assert clips.get(3, 256) / 256 * np.linalg.norm(dense(sent[3][2])) <= 2 * largest


@pytest.mark.parametrize("robust", get_args(Robust))
def test_a_group_of_one_gets_the_same_by_all_methods(robust: Robust) -> None:
    assert robustly([(2, 5, coefficients(1))], robust) == robustly([(2, 5, coefficients(1))], "mean")


@pytest.mark.parametrize("robust", get_args(Robust))
def test_zeros_and_the_end_of_float32_give_a_reply_in_bounds_by_all_methods(robust: Robust) -> None:
    up = coefficients(0)
    up.value[:] = np.finfo(np.float32).max
    sent = [(member, 1000, up) for member in range(MEMBERS)]
    assert np.isfinite(read(robustly(sent, robust)).coefficients.value).all()
    assert not len(read(robustly([(member, 1, coefficients(0, size=0.0)) for member in range(5)], robust)).byte)
