"""Flags and small integers in about their entropy: they come back, in one form, and nothing else does."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from slow_reader import Bits

from p2ptrain.compression import bits
from p2ptrain.compression.bits import BitReader, BitWriter, WireError

seeds = st.integers(0, 2**32 - 1)
SHARES = [0.0, 0.001, 0.02, 0.1, 0.3, 0.5, 0.8, 0.99, 1.0]


def written(write: Callable[[BitWriter], None]) -> bytes:
    writer = BitWriter()
    write(writer)
    data = writer.to_bytes()
    assert len(data) == math.ceil(writer.length / 8)
    return data


def entropy_bits(values: NDArray[np.integer]) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / len(values))).sum())


@given(st.lists(st.tuples(st.integers(0, 32), st.integers(0, 2**32 - 1)), max_size=80))
def test_numbers_come_back_and_lie_low_bit_first(pairs: list[tuple[int, int]]) -> None:
    fields = [(value & ((1 << width) - 1), width) for width, value in pairs]

    def write(writer: BitWriter) -> None:
        for value, width in fields:
            writer.number(value, width)

    data = written(write)
    whole, at = 0, 0
    for value, width in fields:
        whole |= value << at
        at += width
    assert int.from_bytes(data, "little") == whole
    reader = BitReader(data, 0)
    assert [reader.number(width) for _, width in fields] == [value for value, _ in fields]
    reader.close()


@given(st.lists(st.booleans(), max_size=70), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_what_follows_other_bits_comes_back(flags: list[bool], before: int, number: int) -> None:
    def write(writer: BitWriter) -> None:
        writer.number(0, before)
        writer.flags(np.array(flags, np.bool_))
        writer.number(number, 32)

    reader = BitReader(b"head" + written(write), 4)
    assert reader.number(before) == 0
    assert reader.flags(len(flags)).tolist() == flags
    assert reader.number(32) == number
    reader.close()


@pytest.mark.parametrize("share", SHARES)
@given(length=st.integers(0, 3000), seed=seeds)
@settings(max_examples=30)
def test_a_sieve_comes_back_and_is_never_longer_than_its_flags(share: float, length: int, seed: int) -> None:
    flags = np.random.default_rng(seed).random(length) < share
    data = written(lambda writer: writer.sieve(flags))
    assert len(data) <= math.ceil(bits.sieve_max_bits(length) / 8)
    reader = BitReader(data, 0)
    assert np.array_equal(reader.sieve(length), flags)
    reader.close()
    assert Bits(data, 0).sieve(length) == flags.tolist()


@pytest.mark.parametrize("share", [0.002, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.95])
def test_a_sieve_is_within_six_percent_of_the_entropy(share: float) -> None:
    flags = np.random.default_rng(1).random(100_000) < share
    assert 8 * len(written(lambda writer: writer.sieve(flags))) < 1.06 * entropy_bits(flags) + 24


def test_a_sieve_is_short_even_where_runs_are_as_long_as_they_can_be() -> None:
    for length in (10, 1000, 2**18):
        for place in (0, length - 1):
            flags = np.arange(length) == place
            assert 8 * len(written(lambda writer, f=flags: writer.sieve(f))) < 2 * length.bit_length() + 16


@given(
    bits_=st.integers(0, 13),
    length=st.one_of(st.integers(0, 70), st.integers(0, 2000)),
    seed=seeds,
    power=st.floats(0, 9),
)
@settings(max_examples=100)
def test_symbols_come_back_whatever_their_histogram(bits_: int, length: int, seed: int, power: float) -> None:
    values = np.floor(np.random.default_rng(seed).random(length) ** power * ((1 << bits_) - 1)).astype(np.int64)
    data = written(lambda writer: writer.symbols(values, bits_))
    assert len(data) <= math.ceil(bits.symbols_max_bits(length, bits_) / 8)
    reader = BitReader(data, 0)
    assert reader.symbols(length, bits_).tolist() == values.tolist()
    reader.close()
    assert Bits(data, 0).symbols(length, bits_) == values.tolist()


def test_symbols_take_about_their_entropy() -> None:
    rng = np.random.default_rng(1)
    for values in (
        rng.geometric(0.1, 50_000).clip(0, 127),
        rng.choice([3, 60, 61, 127], 50_000, p=[0.4, 0.3, 0.2, 0.1]),
    ):
        assert 8 * len(written(lambda writer, v=values: writer.symbols(v, 7))) < 1.06 * entropy_bits(values) + 2000


@given(st.binary(max_size=60), st.integers(0, 400), st.sampled_from(["sieve", "symbols"]))
@settings(max_examples=300)
def test_random_bits_are_refused_or_have_that_one_form(data: bytes, length: int, what: str) -> None:
    reader = BitReader(data, 0)
    again = BitWriter()
    try:
        if what == "sieve":
            again.sieve(reader.sieve(length))
        else:
            again.symbols(reader.symbols(length, 5), 5)
        reader.close()
    except WireError:
        return
    assert again.to_bytes() == data


def test_padding_that_is_not_zero_and_a_byte_too_many_are_refused() -> None:
    for data in (b"\x08", b"\x00\x00"):
        reader = BitReader(data, 0)
        reader.number(3)
        with pytest.raises(WireError):
            reader.close()
