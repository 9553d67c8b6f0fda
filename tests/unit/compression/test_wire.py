"""Payloads come back as they went, and whatever else arrives is refused or harmless."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from p2ptrain.compression import coding, wire
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.compression.wire import Coefficients, ReplyContent, WireError

LARGEST = float(coding.scale_table()[-1])
BITS = [1, 2, 32]

topks = st.lists(st.sampled_from([1, 2, 3, 5, 8, 33]), min_size=1, max_size=6)
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
    return Coefficients(0, len(topk), chunk, picked(rng, topk), wire.quantise(chunk, value, value_bits))


def reply(counts: list[int], members: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    included = frozenset(np.flatnonzero(rng.random(members) < 0.7).tolist())
    clips = {member: int(rng.integers(0, 256)) for member in included if rng.random() < 0.3}
    byte = rng.choice([-1, 1], sum(counts)) * rng.integers(1, 128, sum(counts))
    codes = rng.integers(0, 256, len(counts)).astype(np.uint8)
    index = picked(rng, counts) if sum(counts) else np.zeros(0, np.int64)
    return wire.encode_reply(10, 10 + len(counts), members, included, clips, np.array(counts), index, byte, codes)


def reply_topk(counts: list[int]) -> list[int]:
    return [0] * 10 + [count + 1 for count in counts]


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
        return is_in_bounds(content, 2 * LARGEST)
    small = bool((np.abs(content.byte) <= 128).all()) and all(0 <= factor < 256 for factor in content.clips.values())
    return small and content.clips.keys() <= content.included and is_in_bounds(content.coefficients, 128 * LARGEST)


@pytest.mark.parametrize("value_bits", BITS)
@given(topk=topks, seed=seeds)
@settings(max_examples=50)
def test_a_contribution_comes_back_exactly(value_bits: int, topk: list[int], seed: int) -> None:
    sent = contribution(topk, value_bits, seed)
    start, end = seed % len(topk), len(topk)
    data = wire.encode_contribution(sent.cut(start, end), topk, value_bits)
    assert len(data) == wire.contribution_bytes(topk, start, end, value_bits)
    got = wire.decode_contribution(data, topk, start, end, value_bits)
    expected = sent.cut(start, end)
    assert np.array_equal(got.chunk, expected.chunk)
    assert np.array_equal(got.index, expected.index)
    assert got.value.dtype == np.float32
    assert np.array_equal(got.value, expected.value)


@given(topk=topks, seed=seeds)
@settings(max_examples=50)
def test_32_bits_leave_values_alone(topk: list[int], seed: int) -> None:
    value = np.random.default_rng(seed).standard_normal(sum(topk)).astype(np.float32)
    assert np.array_equal(wire.quantise(np.repeat(np.arange(len(topk)), topk), value, 32), value)


@pytest.mark.parametrize("value_bits", [1, 2])
@given(topk=topks, seed=seeds)
@settings(max_examples=50)
def test_quantising_keeps_signs_and_takes_one_size_from_the_mean(value_bits: int, topk: list[int], seed: int) -> None:
    value = np.random.default_rng(seed).standard_normal(sum(topk)).astype(np.float32)
    chunk = np.repeat(np.arange(len(topk)), topk)
    got = wire.quantise(chunk, value, value_bits)
    assert np.array_equal(np.sign(got), np.sign(value))
    for one in range(len(topk)):
        mean = float(np.abs(value[chunk == one].astype(np.float64)).mean())
        levels = np.unique(np.abs(got[chunk == one]))
        allowed = [1.0] if value_bits == 1 else [0.875, 1.375]
        for level in levels:
            # Scales are an eighth of an octave apart, so the nearest is within a sixteenth or so.
            assert min(abs(np.log2(level / (factor * mean))) for factor in allowed) < 1 / 15


def test_a_chunk_of_zeros_stays_zero() -> None:
    chunk, zeros = np.zeros(4, np.int64), np.zeros(4, np.float32)
    for value_bits in BITS:
        sent = Coefficients(0, 1, chunk, np.arange(4), wire.quantise(chunk, zeros, value_bits))
        data = wire.encode_contribution(sent, [4], value_bits)
        assert not wire.decode_contribution(data, [4], 0, 1, value_bits).value.any()


@pytest.mark.parametrize("value_bits", BITS)
def test_every_length_but_one_is_refused(value_bits: int) -> None:
    topk = [3, 1, 4]
    data = wire.encode_contribution(contribution(topk, value_bits, 1), topk, value_bits)
    for length in range(len(data)):
        with pytest.raises(WireError):
            wire.decode_contribution(data[:length], topk, 0, 3, value_bits)
    for tail in (b"\0", b"\xff" * 3, data):
        with pytest.raises(WireError):
            wire.decode_contribution(data + tail, topk, 0, 3, value_bits)


@pytest.mark.parametrize("value_bits", [1, 2])
def test_a_flipped_bit_of_a_contribution_is_refused_or_harmless(value_bits: int) -> None:
    topk = [3, 1, 4]
    data = wire.encode_contribution(contribution(topk, value_bits, 1), topk, value_bits)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert is_refused_or_in_bounds(lambda d: wire.decode_contribution(d, topk, 0, 3, value_bits), bytes(flipped))


def test_a_flipped_bit_of_a_float_never_gives_something_not_finite() -> None:
    topk = [3, 1, 4]
    data = wire.encode_contribution(contribution(topk, 32, 1), topk, 32)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(WireError):
            assert np.isfinite(wire.decode_contribution(bytes(flipped), topk, 0, 3, 32).value).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    sent = Coefficients(0, 1, np.zeros(2, np.int64), np.arange(2), np.array([1, value], np.float32))
    with pytest.raises(WireError, match="not finite"):
        wire.decode_contribution(wire.encode_contribution(sent, [2], 32), [2], 0, 1, 32)


@pytest.mark.parametrize("value_bits", BITS)
def test_another_part_another_count_or_another_coding_is_refused(value_bits: int) -> None:
    topk = [2, 2, 2, 2]
    data = wire.encode_contribution(contribution(topk, value_bits, 1).cut(1, 3), topk, value_bits)
    wire.decode_contribution(data, topk, 1, 3, value_bits)
    for start, end in ((0, 2), (2, 4), (1, 2), (0, 4)):
        with pytest.raises(WireError):
            wire.decode_contribution(data, topk, start, end, value_bits)
    with pytest.raises(WireError):
        wire.decode_contribution(data, [2, 2, 3, 2], 1, 3, value_bits)
    for other in {*BITS} - {value_bits}:
        with pytest.raises(WireError):
            wire.decode_contribution(data, topk, 1, 3, other)


@pytest.mark.parametrize("index", [[3, 3], [4, 3]])
def test_indices_that_do_not_increase_are_refused(index: list[int]) -> None:
    sent = Coefficients(0, 1, np.zeros(2, np.int64), np.array(index), np.ones(2, np.float32))
    with pytest.raises(WireError, match="increasing"):
        wire.decode_contribution(wire.encode_contribution(sent, [2], 1), [2], 0, 1, 1)


@given(st.binary(max_size=120), st.sampled_from(BITS))
@settings(max_examples=200)
def test_random_bytes_are_no_contribution(data: bytes, value_bits: int) -> None:
    with pytest.raises(WireError):
        wire.decode_contribution(data, [3, 5], 0, 2, value_bits)


@given(seeds, st.sampled_from([1, 2]))
@settings(max_examples=100)
def test_random_bytes_under_a_good_header_are_refused_or_harmless(seed: int, value_bits: int) -> None:
    good = wire.encode_contribution(contribution([1, 2], value_bits, 1), [1, 2], value_bits)
    data = good[:18] + np.random.default_rng(seed).bytes(len(good) - 18)
    assert is_refused_or_in_bounds(lambda d: wire.decode_contribution(d, [1, 2], 0, 2, value_bits), data)


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=5), members=st.integers(1, 40), seed=seeds)
@settings(max_examples=100)
def test_a_reply_comes_back_exactly(counts: list[int], members: int, seed: int) -> None:
    end = 10 + len(counts)
    data = reply(counts, members, seed)
    assert len(data) <= wire.reply_max_bytes(reply_topk(counts), 10, end, members)
    got = wire.decode_reply(data, reply_topk(counts), 10, end, members)
    again = wire.encode_reply(
        10,
        end,
        members,
        got.included,
        got.clips,
        np.bincount(got.coefficients.chunk - 10, minlength=len(counts)),
        got.coefficients.index,
        got.byte,
        coding.encode_scale(got.scale),
    )
    assert again == data
    assert np.array_equal(got.coefficients.chunk, np.repeat(np.arange(10, end), counts))
    assert np.array_equal(got.coefficients.value, (got.byte * np.repeat(got.scale, counts)).astype(np.float32))
    assert wire.reply_members(data, members) == got.included


def test_the_longest_reply_has_the_longest_length() -> None:
    members, counts = 9, [4, 7]
    data = wire.encode_reply(
        10,
        12,
        members,
        frozenset(range(members)),
        {member: 1 for member in range(members)},
        np.array(counts),
        picked(np.random.default_rng(0), counts),
        np.ones(11, np.int64),
        np.ones(2, np.uint8),
    )
    assert len(data) == wire.reply_max_bytes([0] * 10 + counts, 10, 12, members)


def test_every_truncation_or_extension_of_a_reply_is_refused() -> None:
    counts = [3, 0, 4]
    data = reply(counts, 11, 1)
    for length in range(len(data)):
        with pytest.raises(WireError):
            wire.decode_reply(data[:length], reply_topk(counts), 10, 13, 11)
    for tail in (b"\0", b"\xff" * 3, data):
        with pytest.raises(WireError):
            wire.decode_reply(data + tail, reply_topk(counts), 10, 13, 11)
    for length in range(21 + 2):
        with pytest.raises(WireError):
            wire.reply_members(data[:length], 11)


def test_a_flipped_bit_of_a_reply_is_refused_or_harmless() -> None:
    counts = [3, 0, 4]
    data = reply(counts, 11, 1)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert is_refused_or_in_bounds(lambda d: wire.decode_reply(d, reply_topk(counts), 10, 13, 11), bytes(flipped))
        with contextlib.suppress(WireError):
            assert wire.reply_members(bytes(flipped), 11) <= set(range(11))


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_random_bytes_are_no_reply(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_reply(data, [40, 40], 0, 2, 3)


@given(seeds)
@settings(max_examples=100)
def test_random_bytes_under_a_good_reply_header_are_refused_or_harmless(seed: int) -> None:
    good = reply([1, 2], 3, 1)
    data = good[:21] + np.random.default_rng(seed).bytes(len(good) - 21)
    assert is_refused_or_in_bounds(lambda d: wire.decode_reply(d, reply_topk([1, 2]), 10, 12, 3), data)


def test_a_reply_that_keeps_too_much_is_refused() -> None:
    data = reply([3, 4], 2, 1)
    with pytest.raises(WireError):
        wire.decode_reply(data, [0] * 10 + [4, 3], 10, 12, 2)


def test_a_reply_naming_members_that_are_not_there_is_refused() -> None:
    none = np.zeros(0, np.int64)
    empty = (np.zeros(1, np.int64), none, none, np.zeros(1, np.uint8))
    beyond = wire.encode_reply(0, 1, 3, frozenset({5}), {}, *empty)
    with pytest.raises(WireError):
        wire.decode_reply(beyond, [4], 0, 1, 3)
    with pytest.raises(WireError):
        wire.reply_members(beyond, 3)
    clipped = wire.encode_reply(0, 1, 3, frozenset({1}), {2: 9}, *empty)
    with pytest.raises(WireError):
        wire.decode_reply(clipped, [4], 0, 1, 3)


def test_cutting_a_contribution_in_parts_loses_nothing() -> None:
    whole = contribution([3, 1, 4, 2], 2, 1)
    parts = [whole.cut(0, 1), whole.cut(1, 3), whole.cut(3, 4)]
    assert np.array_equal(np.concatenate([part.index for part in parts]), whole.index)
    assert [len(part.chunk) for part in parts] == [3, 5, 2]
