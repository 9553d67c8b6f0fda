"""Payloads come back as they went, and whatever else arrives is refused or harmless."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import slow_reader
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from plain_codec import quantised, replying, sending

from p2ptrain.compression import coding, wire
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.compression.wire import Coefficients, Kept, ReplyContent, WireError

LARGEST = float(coding.scale_table()[-1])
BITS = [1, 2, 8, 32]

topks = st.lists(st.sampled_from([1, 2, 3, 5, 8, 33, 4096]), min_size=1, max_size=6)
seeds = st.integers(0, 2**32 - 1)


def picked(rng: np.random.Generator, counts: list[int]) -> NDArray[np.int64]:
    """Ascending indices, `counts` of them from each chunk."""
    return np.concatenate([np.sort(rng.choice(CHUNK_SIZE, count, replace=False)) for count in counts])


def contribution(topk: list[int], value_bits: int, seed: int, largest_exponent: int = 6) -> Coefficients:
    """Coefficients of all chunks as a peer would send them, of sizes from far below to far above the scales."""
    rng = np.random.default_rng(seed)
    chunk = np.repeat(np.arange(len(topk)), topk)
    size = np.exp2(rng.integers(-40, largest_exponent, len(topk)))[chunk]
    value = (rng.standard_normal(len(chunk)) * size).astype(np.float32)
    value[rng.random(len(value)) < 0.05] = 0
    return Coefficients(0, len(topk), chunk, picked(rng, topk), quantised(chunk, value, value_bits))


def reply(counts: list[int], members: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    included = frozenset(np.flatnonzero(rng.random(members) < 0.7).tolist())
    clips = {member: int(rng.integers(0, 256)) for member in included if rng.random() < 0.3}
    byte = rng.choice([-1, 1], sum(counts)) * rng.integers(1, 128, sum(counts))
    codes = rng.integers(0, 256, len(counts)).astype(np.uint8)
    index = picked(rng, counts) if sum(counts) else np.zeros(0, np.int64)
    limits = reply_topk(counts)
    return wire.encode_reply(Kept(np.array(counts), index, byte, codes), replying(limits), 10, members, included, clips)


def reply_topk(counts: list[int]) -> list[int]:
    return [0] * 10 + [count + 1 for count in counts]


def encoded_again(content: Coefficients | ReplyContent, topk: list[int], value_bits: int, members: int) -> bytes:
    """What an encoder makes of something decoded."""
    if isinstance(content, Coefficients):
        return wire.encode_contribution(content, sending(topk, value_bits))
    start, end = content.coefficients.start, content.coefficients.end
    counts = np.bincount(content.coefficients.chunk - start, minlength=end - start)
    kept = Kept(counts, content.coefficients.index, content.byte, coding.nearest_scale(content.scale))
    return wire.encode_reply(kept, replying(topk), start, members, content.included, content.clips)


def is_in_bounds(part: Coefficients, largest: float) -> bool:
    ordered = (np.diff(part.chunk * CHUNK_SIZE + part.index) > 0).all()
    inside = ((part.index >= 0) & (part.index < CHUNK_SIZE)).all()
    return bool(ordered and inside and (np.abs(part.value) <= largest).all() and np.isfinite(part.value).all())


def is_refused_or_in_bounds(decode: Callable[[bytes], Coefficients | ReplyContent], data: bytes) -> bool:
    """Whether these bytes do no harm. An exception other than WireError fails the test."""
    try:
        content = decode(data)
    except WireError:
        return True
    if isinstance(content, Coefficients):
        return is_in_bounds(content, 127 * LARGEST)
    small = bool(((content.byte != 0) & (np.abs(content.byte) <= 128)).all()) and all(
        0 <= factor < 256 for factor in content.clips.values()
    )
    return small and content.clips.keys() <= content.included and is_in_bounds(content.coefficients, 128 * LARGEST)


@pytest.mark.parametrize("value_bits", BITS)
@given(topk=topks, seed=seeds)
@settings(max_examples=50)
def test_a_contribution_comes_back_exactly(value_bits: int, topk: list[int], seed: int) -> None:
    sent = contribution(topk, value_bits, seed)
    start, end = seed % len(topk), len(topk)
    data = wire.encode_contribution(sent.cut(start, end), sending(topk, value_bits))
    assert len(data) <= wire.contribution_max_bytes(sending(topk, value_bits), start, end)
    got = wire.decode_contribution(data, sending(topk, value_bits), start, end)
    expected = sent.cut(start, end)
    assert np.array_equal(got.chunk, expected.chunk)
    assert np.array_equal(got.index, expected.index)
    assert got.value.dtype == np.float32
    assert np.array_equal(got.value, expected.value)


@given(topk=topks, seed=seeds)
@settings(max_examples=50)
def test_32_bits_leave_values_alone(topk: list[int], seed: int) -> None:
    value = np.random.default_rng(seed).standard_normal(sum(topk)).astype(np.float32)
    assert np.array_equal(quantised(np.repeat(np.arange(len(topk)), topk), value, 32), value)


@pytest.mark.parametrize("value_bits", [1, 2])
@given(topk=topks, seed=seeds)
@settings(max_examples=50)
def test_quantising_keeps_signs_and_takes_one_size_from_the_mean(value_bits: int, topk: list[int], seed: int) -> None:
    value = np.random.default_rng(seed).standard_normal(sum(topk)).astype(np.float32)
    chunk = np.repeat(np.arange(len(topk)), topk)
    got = quantised(chunk, value, value_bits)
    assert np.array_equal(np.sign(got), np.sign(value))
    for one in range(len(topk)):
        mean = float(np.abs(value[chunk == one].astype(np.float64)).mean())
        levels = np.unique(np.abs(got[chunk == one]))
        allowed = [1.0] if value_bits == 1 else [0.875, 1.375]
        for level in levels:
            # Scales are an eighth of an octave apart, so the nearest is within a sixteenth or so.
            assert min(abs(np.log2(level / (factor * mean))) for factor in allowed) < 1 / 15


@given(topk=topks, seed=seeds, exponent=st.integers(-20, 6))
@settings(max_examples=50)
def test_eight_bits_are_within_half_a_step_of_the_largest(topk: list[int], seed: int, exponent: int) -> None:
    value = (np.random.default_rng(seed).standard_normal(sum(topk)) * 2.0**exponent).astype(np.float32)
    chunk = np.repeat(np.arange(len(topk)), topk)
    got = quantised(chunk, value, 8)
    for one in range(len(topk)):
        wanted, error = np.abs(value[chunk == one]), np.abs(got[chunk == one] - value[chunk == one])
        # A scale is within a twenty-third of what the largest wants, so as much of the largest may be cut off.
        assert error.max() <= 0.05 * wanted.max()
        assert (error[wanted < 0.95 * wanted.max()] <= 0.53 * wanted.max() / 127).all()


def test_a_chunk_of_zeros_stays_zero() -> None:
    chunk, zeros = np.zeros(4, np.int64), np.zeros(4, np.float32)
    for value_bits in BITS:
        sent = Coefficients(0, 1, chunk, np.arange(4), quantised(chunk, zeros, value_bits))
        data = wire.encode_contribution(sent, sending([4], value_bits))
        assert not wire.decode_contribution(data, sending([4], value_bits), 0, 1).value.any()


@pytest.mark.parametrize("value_bits", BITS)
def test_every_length_but_one_is_refused(value_bits: int) -> None:
    topk = [3, 1, 4]
    data = wire.encode_contribution(contribution(topk, value_bits, 1), sending(topk, value_bits))
    for length in range(len(data)):
        with pytest.raises(WireError):
            wire.decode_contribution(data[:length], sending(topk, value_bits), 0, 3)
    for tail in (b"\0", b"\xff" * 3, data):
        with pytest.raises(WireError):
            wire.decode_contribution(data + tail, sending(topk, value_bits), 0, 3)


@pytest.mark.parametrize("value_bits", [1, 2, 8])
def test_a_flipped_bit_of_a_contribution_is_refused_or_harmless(value_bits: int) -> None:
    topk = [3, 1, 4]
    data = wire.encode_contribution(contribution(topk, value_bits, 1), sending(topk, value_bits))
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert is_refused_or_in_bounds(
            lambda d: wire.decode_contribution(d, sending(topk, value_bits), 0, 3), bytes(flipped)
        )


def test_a_flipped_bit_of_a_float_never_gives_something_not_finite() -> None:
    topk = [3, 1, 4]
    data = wire.encode_contribution(contribution(topk, 32, 1), sending(topk, 32))
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(WireError):
            assert np.isfinite(wire.decode_contribution(bytes(flipped), sending(topk, 32), 0, 3).value).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    sent = Coefficients(0, 1, np.zeros(2, np.int64), np.arange(2), np.array([1, value], np.float32))
    with pytest.raises(WireError, match="not finite"):
        wire.decode_contribution(wire.encode_contribution(sent, sending([2], 32)), sending([2], 32), 0, 1)


@pytest.mark.parametrize("value_bits", BITS)
def test_another_part_another_count_or_another_coding_is_refused(value_bits: int) -> None:
    topk = [2, 2, 2, 2]
    data = wire.encode_contribution(contribution(topk, value_bits, 1).cut(1, 3), sending(topk, value_bits))
    wire.decode_contribution(data, sending(topk, value_bits), 1, 3)
    for start, end in ((0, 2), (2, 4), (1, 2), (0, 4)):
        with pytest.raises(WireError):
            wire.decode_contribution(data, sending(topk, value_bits), start, end)
    with pytest.raises(WireError):
        wire.decode_contribution(data, sending([2, 2, 3, 2], value_bits), 1, 3)
    for other in {*BITS} - {value_bits}:
        with pytest.raises(WireError):
            wire.decode_contribution(data, sending(topk, other), 1, 3)


@given(st.binary(max_size=120), st.sampled_from(BITS))
@settings(max_examples=200)
def test_random_bytes_are_no_contribution(data: bytes, value_bits: int) -> None:
    with pytest.raises(WireError):
        wire.decode_contribution(data, sending([3, 5], value_bits), 0, 2)


@given(seeds, st.sampled_from([1, 2]))
@settings(max_examples=100)
def test_random_bytes_under_a_good_header_are_refused_or_harmless(seed: int, value_bits: int) -> None:
    good = wire.encode_contribution(contribution([1, 2], value_bits, 1), sending([1, 2], value_bits))
    data = good[:18] + np.random.default_rng(seed).bytes(len(good) - 18)
    assert is_refused_or_in_bounds(lambda d: wire.decode_contribution(d, sending([1, 2], value_bits), 0, 2), data)


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=5), members=st.integers(1, 40), seed=seeds)
@settings(max_examples=100)
def test_a_reply_comes_back_exactly(counts: list[int], members: int, seed: int) -> None:
    end = 10 + len(counts)
    data = reply(counts, members, seed)
    assert len(data) <= wire.reply_max_bytes(replying(reply_topk(counts)), 10, end, members)
    got = wire.decode_reply(data, replying(reply_topk(counts)), 10, end, members)
    again = encoded_again(got, reply_topk(counts), 0, members)
    assert again == data
    assert np.array_equal(got.coefficients.chunk, np.repeat(np.arange(10, end), counts))
    assert np.array_equal(got.coefficients.value, (got.byte * np.repeat(got.scale, counts)).astype(np.float32))
    assert wire.reply_members(data, members) == got.included


def test_every_truncation_or_extension_of_a_reply_is_refused() -> None:
    counts = [3, 0, 4]
    data = reply(counts, 11, 1)
    for length in range(len(data)):
        with pytest.raises(WireError):
            wire.decode_reply(data[:length], replying(reply_topk(counts)), 10, 13, 11)
    for tail in (b"\0", b"\xff" * 3, data):
        with pytest.raises(WireError):
            wire.decode_reply(data + tail, replying(reply_topk(counts)), 10, 13, 11)
    for length in range(21 + 2):
        with pytest.raises(WireError):
            wire.reply_members(data[:length], 11)


def test_a_flipped_bit_of_a_reply_is_refused_or_harmless() -> None:
    counts = [3, 0, 4]
    data = reply(counts, 11, 1)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert is_refused_or_in_bounds(
            lambda d: wire.decode_reply(d, replying(reply_topk(counts)), 10, 13, 11), bytes(flipped)
        )
        with contextlib.suppress(WireError):
            assert wire.reply_members(bytes(flipped), 11) <= set(range(11))


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_random_bytes_are_no_reply(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_reply(data, replying([40, 40]), 0, 2, 3)


@given(seeds)
@settings(max_examples=100)
def test_random_bytes_under_a_good_reply_header_are_refused_or_harmless(seed: int) -> None:
    good = reply([1, 2], 3, 1)
    data = good[:21] + np.random.default_rng(seed).bytes(len(good) - 21)
    assert is_refused_or_in_bounds(lambda d: wire.decode_reply(d, replying(reply_topk([1, 2])), 10, 12, 3), data)


def test_a_reply_that_keeps_too_much_is_refused() -> None:
    data = reply([3, 4], 2, 1)
    with pytest.raises(WireError):
        wire.decode_reply(data, replying([0] * 10 + [4, 3]), 10, 12, 2)


def test_a_reply_naming_members_that_are_not_there_is_refused() -> None:
    none = np.zeros(0, np.int64)
    empty, four = Kept(np.zeros(1, np.int64), none, none, np.zeros(1, np.uint8)), replying([4])
    beyond = wire.encode_reply(empty, four, 0, 3, frozenset({5}), {})
    with pytest.raises(WireError):
        wire.decode_reply(beyond, four, 0, 1, 3)
    with pytest.raises(WireError):
        wire.reply_members(beyond, 3)
    clipped = wire.encode_reply(empty, four, 0, 3, frozenset({1}), {2: 9})
    with pytest.raises(WireError):
        wire.decode_reply(clipped, four, 0, 1, 3)


def test_cutting_a_contribution_in_parts_loses_nothing() -> None:
    whole = contribution([3, 1, 4, 2], 2, 1)
    parts = [whole.cut(0, 1), whole.cut(1, 3), whole.cut(3, 4)]
    assert np.array_equal(np.concatenate([part.index for part in parts]), whole.index)
    assert [len(part.chunk) for part in parts] == [3, 5, 2]


# ---- against a reader written from the specification ----------------------------------------------------------------


@pytest.mark.parametrize("value_bits", [1, 2, 8])
@given(topk=topks, seed=seeds)
@settings(max_examples=30)
def test_a_reader_from_the_specification_reads_the_same_contribution(
    value_bits: int, topk: list[int], seed: int
) -> None:
    sent = contribution(topk, value_bits, seed)
    start, end = seed % len(topk), len(topk)
    part = sent.cut(start, end)
    read = slow_reader.read_contribution(
        wire.encode_contribution(part, sending(topk, value_bits)), topk, start, end, value_bits
    )
    assert read.index == part.index.tolist()
    assert read.value == part.value.tolist()


@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=40), members=st.integers(1, 40), seed=seeds)
@settings(max_examples=30)
def test_a_reader_from_the_specification_reads_the_same_reply(counts: list[int], members: int, seed: int) -> None:
    data, limits, end = reply(counts, members, seed), reply_topk(counts), 10 + len(counts)
    fast = wire.decode_reply(data, replying(limits), 10, end, members)
    slow = slow_reader.read_reply(data, limits, 10, end, members)
    assert (slow.included, slow.clips, slow.counts) == (fast.included, fast.clips, counts)
    assert slow.codes == coding.nearest_scale(fast.scale).tolist()
    assert slow.index == fast.coefficients.index.tolist()
    assert slow.q == fast.byte.tolist()


def damaged(data: bytes, rng: np.random.Generator, header: int) -> bytes:
    """Some bits flipped, a stretch overwritten, moved or cut out, mostly behind the header."""
    changed = bytearray(data)
    at = int(rng.integers(0 if rng.random() < 0.1 else header, len(data)))
    length = int(rng.integers(1, 9))
    match int(rng.integers(0, 4)):
        case 0:
            changed[at] ^= 1 << int(rng.integers(0, 8))
        case 1:
            changed[at : at + length] = rng.bytes(len(changed[at : at + length]))
        case 2:
            del changed[at : at + length]
        case _:
            changed[at:at] = rng.bytes(length)
    return bytes(changed)


@given(
    topk=st.lists(st.sampled_from([1, 2, 5, 33]), min_size=1, max_size=50),
    seed=seeds,
    value_bits=st.sampled_from([1, 2, 8]),
)
@settings(max_examples=150)
def test_both_readers_refuse_the_same_damage_to_a_contribution(topk: list[int], seed: int, value_bits: int) -> None:
    rng, end = np.random.default_rng(seed), len(topk)
    data = damaged(wire.encode_contribution(contribution(topk, value_bits, seed), sending(topk, value_bits)), rng, 18)
    try:
        fast = wire.decode_contribution(data, sending(topk, value_bits), 0, end)
    except WireError:
        with pytest.raises(slow_reader.Refused):
            slow_reader.read_contribution(data, topk, 0, end, value_bits)
        return
    slow = slow_reader.read_contribution(data, topk, 0, end, value_bits)
    assert (slow.index, slow.value) == (fast.index.tolist(), fast.value.tolist())
    assert is_in_bounds(fast, 127 * LARGEST if value_bits == 8 else 2 * LARGEST)
    assert encoded_again(fast, topk, value_bits, 0) == data


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=40), seed=seeds)
@settings(max_examples=150)
def test_both_readers_refuse_the_same_damage_to_a_reply(counts: list[int], seed: int) -> None:
    limits, end = reply_topk(counts), 10 + len(counts)
    data = damaged(reply(counts, 9, seed), np.random.default_rng(seed), 21)
    try:
        fast = wire.decode_reply(data, replying(limits), 10, end, 9)
    except WireError:
        with pytest.raises(slow_reader.Refused):
            slow_reader.read_reply(data, limits, 10, end, 9)
        return
    slow = slow_reader.read_reply(data, limits, 10, end, 9)
    assert (slow.included, slow.clips, slow.index, slow.q) == (
        fast.included,
        fast.clips,
        fast.coefficients.index.tolist(),
        fast.byte.tolist(),
    )
    assert encoded_again(fast, limits, 0, 9) == data


# ---- what it costs ------------------------------------------------------------------------------------------------


def gaussian(chunks: int, topk: int, value_bits: int) -> Coefficients:
    """The largest of each chunk of Gaussian coefficients."""
    everything = np.random.default_rng(1).standard_normal((chunks, CHUNK_SIZE), np.float32)
    index = np.sort(np.argpartition(-np.abs(everything), topk, 1)[:, :topk], 1)
    value = np.take_along_axis(everything, index, 1).ravel() * np.float32(0.01)
    chunk = np.repeat(np.arange(chunks), topk)
    return Coefficients(0, chunks, chunk, index.ravel(), quantised(chunk, value, value_bits))


@pytest.mark.parametrize(("value_bits", "at_most"), [(1, 9.6), (2, 10.2)])
def test_a_coefficient_costs_less_than(value_bits: int, at_most: float) -> None:
    part = gaussian(610, 32, value_bits)
    data = wire.encode_contribution(part, sending([32] * 610, value_bits))
    assert 8 * len(data) / len(part.index) < at_most
    sections = wire.section_bits(part, sending([32] * 610, value_bits))
    assert sum(sections.values()) == 8 * len(data)
    assert sections["header"] < 8 * (wire.header_bytes(data) + 1)


@pytest.mark.parametrize("value_bits", [1, 2])
def test_the_worst_content_costs_what_plain_bits_would_and_a_small_header(value_bits: int) -> None:
    """Indices that jump between the ends of their room, scales and sizes that follow no pattern."""
    rng, chunks, topk = np.random.default_rng(1), 610, [32] * 610
    index = np.tile(np.r_[0:16, 4080:4096], chunks)
    size = np.repeat(rng.permutation(np.linspace(-27, 3, chunks)), 32)
    level = np.where(rng.random(len(index)) < 0.5, 1, 0.1)
    value = (np.exp2(size) * level * rng.choice([-1, 1], len(index))).astype(np.float32)
    chunk = np.repeat(np.arange(chunks), 32)
    sent = Coefficients(0, chunks, chunk, index, quantised(chunk, value, value_bits))
    plain = 18 + chunks * (1 + 32 * (12 + value_bits) // 8)
    assert len(wire.encode_contribution(sent, sending(topk, value_bits))) < wire.contribution_max_bytes(
        sending(topk, value_bits), 0, chunks
    )
    assert wire.contribution_max_bytes(sending(topk, value_bits), 0, chunks) < 1.01 * plain


def test_hostile_bytes_take_no_more_memory_than_what_is_expected() -> None:
    topk, chunks = [32] * 100, 100
    count = sum(topk)
    good = wire.encode_contribution(contribution(topk, 2, 1), sending(topk, 2))
    rng = np.random.default_rng(1)
    tracemalloc.start()
    for _ in range(20):
        data = good[:18] + rng.bytes(len(good) - 18)
        with contextlib.suppress(WireError):
            wire.decode_contribution(data, sending(topk, 2), 0, chunks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * count
