"""Claims: what is decoded twice is what was decoded once, and nothing else, within bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_codec import quantised, sending

from p2ptrain.compression import decoded, wire
from p2ptrain.compression.bits import WireError
from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.compression.wire import Coefficients


def payload(topk: tuple[int, ...], seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    chunk = np.repeat(np.arange(len(topk)), topk)
    index = np.concatenate([np.sort(rng.choice(CHUNK_SIZE, count, replace=False)) for count in topk])
    value = quantised(chunk, rng.normal(size=len(chunk)).astype(np.float32), 2)
    return wire.encode_contribution(Coefficients(0, len(topk), chunk, index, value), sending(topk, 2))


def reply(limits: tuple[int, ...]) -> bytes:
    index, byte = np.arange(len(limits)), np.full(len(limits), -5)
    codes = np.full(len(limits), 100, np.uint8)
    counts = np.ones(len(limits), np.int64)
    return wire.encode_reply(wire.Kept(counts, index, byte, codes), sending(limits, 2), 0, 2, frozenset({1}), {})


def test_the_second_time_gives_the_first_ones_arrays_which_nobody_can_change() -> None:
    topk = (4, 7)
    data, codec = payload(topk, 1), sending(topk, 2)
    first = decoded.contribution(data, codec, 0, 2)
    assert decoded.contribution(bytes(bytearray(data)), codec, 0, 2) is first
    plain = wire.decode_contribution(data, codec, 0, 2)
    for ours, theirs in ((first.chunk, plain.chunk), (first.index, plain.index), (first.value, plain.value)):
        assert np.array_equal(ours, theirs)
        with pytest.raises(ValueError, match="read-only"):
            ours[0] = 0
    answer = reply(topk)
    content = decoded.reply(answer, codec, 0, 2, 2)
    assert decoded.reply(answer, codec, 0, 2, 2) is content
    assert np.array_equal(content.byte, wire.decode_reply(answer, codec, 0, 2, 2).byte)
    with pytest.raises(ValueError, match="read-only"):
        content.coefficients.value[0] = 0


@given(seed=st.integers(0, 2**32 - 1), value_bits=st.sampled_from([1, 2, 32]), exponent=st.integers(-40, 6))
@settings(max_examples=30)
def test_what_a_peer_wrote_it_reads_without_decoding_and_as_others_do(
    seed: int, value_bits: int, exponent: int
) -> None:
    rng, topk = np.random.default_rng(seed), (4, 7, 1)
    chunk = np.repeat(np.arange(3), topk)
    index = np.concatenate([np.sort(rng.choice(CHUNK_SIZE, count, replace=False)) for count in topk])
    value = quantised(chunk, (rng.normal(size=len(chunk)) * 2.0**exponent).astype(np.float32), value_bits)
    sent = Coefficients(0, 3, chunk, index, value).cut(1, 3)
    codec = sending(topk, value_bits)
    data = wire.encode_contribution(sent, codec)
    decoded.wrote_contribution(data, codec, sent)
    read, plain = (f(data, sending(topk, value_bits), 1, 3) for f in (decoded.contribution, wire.decode_contribution))
    assert read is sent
    for ours, theirs in ((read.chunk, plain.chunk), (read.index, plain.index), (read.value, plain.value)):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


def test_what_was_well_formed_as_one_thing_is_refused_as_another() -> None:
    topk = (4, 4)
    data, answer, codec = payload(topk, 2), reply(topk), sending(topk, 2)
    decoded.contribution(data, codec, 0, 2)
    decoded.reply(answer, codec, 0, 2, 2)
    for _ in range(2):
        with pytest.raises(WireError):
            decoded.reply(data, codec, 0, 2, 2)
        with pytest.raises(WireError):
            decoded.contribution(answer, codec, 0, 2)
        with pytest.raises(WireError):
            decoded.contribution(data, sending((4, 5), 2), 0, 2)
        with pytest.raises(WireError):
            decoded.contribution(data[:-1], codec, 0, 2)


def test_it_keeps_no_more_than_it_says() -> None:
    topk = (CHUNK_SIZE,) * 64
    codec = sending(topk, 2)
    first = decoded.contribution(payload(topk, 0), codec, 0, 64)
    assert decoded.contribution(payload(topk, 0), codec, 0, 64) is first
    for seed in range(1, decoded.MEMORY_BYTES // (20 * sum(topk)) + 2):
        decoded.contribution(payload(topk, seed), codec, 0, 64)
        assert sum(map(decoded._bytes, decoded._kept.values())) <= decoded.MEMORY_BYTES
    assert decoded.contribution(payload(topk, 0), codec, 0, 64) is not first
