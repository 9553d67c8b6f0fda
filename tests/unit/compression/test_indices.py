"""Indices come back, cost little more than their entropy, and any bits at all are ascending indices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from slow_reader import Bits

from p2ptrain.compression.bits import BitReader, BitWriter, WireError
from p2ptrain.compression.indices import indices_max_bits, read_indices, write_indices

seeds = st.integers(0, 2**32 - 1)
CLUSTERS = ["even", "low", "high", "one run", "two runs", "one row", "stride"]


def chosen(kind: str, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` ascending indices of a chunk, clustered in one way or another."""
    place = int(rng.integers(0, 4097 - count))
    everywhere: dict[str, Sequence[int] | NDArray[np.int64]] = {
        "even": rng.permutation(4096),
        "low": range(4096),
        "high": range(4095, -1, -1),
        "one run": np.r_[place:4096, 0:place],
        "two runs": np.r_[0 : count // 2, 4095 : count // 2 - 1 : -1],
        "one row": np.r_[64 * 7 + rng.permutation(64), 0 : 64 * 7, 64 * 8 : 4096],
        "stride": np.r_[0:4096:128, 1:4096:128, rng.permutation(4096)],
    }
    listed = np.asarray(everywhere[kind])
    return np.sort(listed[np.sort(np.unique(listed, return_index=True)[1])][:count])


def written(counts: Sequence[int], index: NDArray[np.int64]) -> bytes:
    writer = BitWriter()
    write_indices(writer, np.array(counts), index)
    assert writer.length <= indices_max_bits(sum(counts), max(counts))
    return writer.to_bytes()


def assert_comes_back(counts: Sequence[int], index: NDArray[np.int64]) -> None:
    data = written(counts, index)
    reader = BitReader(data, 0)
    assert read_indices(reader, np.array(counts)).tolist() == index.tolist()
    reader.close()
    slow = Bits(data, 0)
    assert [i for of_chunk in slow.indices(counts) for i in of_chunk] == index.tolist()
    slow.close()


@given(
    chunks=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 40), st.sampled_from([1, 63, 64, 2048, 4095, 4096])), st.sampled_from(CLUSTERS)
        ),
        min_size=1,
        max_size=6,
    ),
    seed=seeds,
)
@settings(max_examples=60)
def test_indices_come_back_wherever_they_cluster(chunks: list[tuple[int, str]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    index = np.concatenate([chosen(kind, count, rng) for count, kind in chunks])
    assert_comes_back([count for count, _ in chunks], index)


@given(st.lists(st.sets(st.integers(0, 4095), max_size=12), min_size=1, max_size=4))
def test_any_sets_of_indices_come_back(sets: list[set[int]]) -> None:
    assert_comes_back([len(one) for one in sets], np.array([i for one in sets for i in sorted(one)], np.int64))


@pytest.mark.parametrize("count", [1, 8, 32, 64, 1024])
def test_even_indices_cost_little_more_than_their_entropy(count: int) -> None:
    rng = np.random.default_rng(1)
    index = np.concatenate([np.sort(rng.choice(4096, count, replace=False)) for _ in range(300)])
    bound = math.log2(math.comb(4096, count)) / count
    assert 8 * len(written([count] * 300, index)) / len(index) < bound + 0.25


def test_even_indices_at_32_cost_less_than_8_48_bits() -> None:
    rng = np.random.default_rng(1)
    index = np.sort(rng.random((2441, 4096)).argpartition(32, 1)[:, :32], 1).ravel()
    assert 8 * len(written([32] * 2441, index)) / len(index) < 8.48


def test_indices_that_cluster_in_a_row_cost_less() -> None:
    rng = np.random.default_rng(1)
    rows = [64 * rng.integers(0, 64) + np.sort(rng.choice(64, 32, replace=False)) for _ in range(300)]
    assert 8 * len(written([32] * 300, np.concatenate(rows))) / (300 * 32) < 5


@given(st.binary(max_size=200), st.lists(st.sampled_from([0, 1, 2, 3, 17, 64]), min_size=1, max_size=5))
@settings(max_examples=300)
def test_any_bits_are_ascending_indices_in_their_one_form_or_refused(data: bytes, counts: list[int]) -> None:
    reader = BitReader(data, 0)
    try:
        index = read_indices(reader, np.array(counts)).astype(np.int64)
        reader.close()
    except WireError:
        return
    assert ((index >= 0) & (index < 4096)).all()
    assert (np.diff(index + 4096 * np.repeat(np.arange(len(counts)), counts)) > 0).all()
    assert written(counts, index) == data


def test_a_chunk_sent_whole_costs_no_index() -> None:
    assert len(written([4096], np.arange(4096))) < 30
