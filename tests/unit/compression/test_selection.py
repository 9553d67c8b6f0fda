"""Top-k against a full sort, and values against the codec's own quantising."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from plain_codec import quantised
from torch import Tensor

from p2ptrain.compression import selection
from p2ptrain.compression.layout import CHUNK_SIZE

CHUNKS = 7


def normal() -> Tensor:
    return torch.randn(CHUNKS, CHUNK_SIZE, generator=torch.Generator().manual_seed(0))


MADE: dict[str, Callable[[], Tensor]] = {
    "normal": normal,
    "zeros": lambda: torch.zeros(CHUNKS, CHUNK_SIZE),
    "few distinct sizes": lambda: normal().round(),
    "zeros but for the beginning": lambda: normal() * (torch.arange(CHUNK_SIZE) < 400),
    "signs and zeros": lambda: (normal() * 0.7).round().sign(),
    "the largest side by side": lambda: normal() + 9 * (torch.arange(CHUNK_SIZE) // 40 == 50),
    "the largest 256 apart": lambda: normal() - 9 * (torch.arange(CHUNK_SIZE) % 256 == 3),
    "tiny": lambda: normal() * 2.0**-140,
}


def taken_places(chunks: Tensor, count: int) -> Tensor:
    return selection.take(chunks.clone(), count, 32)[0]


@pytest.mark.parametrize("count", [1, 5, 32, 48, 100, 255, 256, 300, 1024, CHUNK_SIZE])
@pytest.mark.parametrize("search", [taken_places, selection.largest_by_passes])
@pytest.mark.parametrize("made", list(MADE))
def test_no_entry_left_is_larger_than_one_taken(made: str, search: Callable[[Tensor, int], Tensor], count: int) -> None:
    chunks = MADE[made]()
    index = search(chunks, count)
    assert index.shape == (CHUNKS, count)
    assert (index.diff(dim=1) > 0).all()
    taken = chunks.abs().gather(1, index).sort(dim=1, descending=True).values
    assert torch.equal(taken, chunks.abs().sort(dim=1, descending=True).values[:, :count])


def test_without_equals_all_ways_take_what_topk_takes() -> None:
    expected = normal().abs().topk(32, dim=1).indices.sort(dim=1).values
    for search in (taken_places, selection.largest_by_passes):
        assert torch.equal(search(normal(), 32), expected)


@pytest.mark.parametrize("search", [taken_places, selection.largest_by_passes])
def test_what_is_not_a_number_is_taken_first(search: Callable[[Tensor, int], Tensor]) -> None:
    chunks = normal()
    chunks[2, 1000], chunks[3, 5] = torch.nan, -torch.inf
    index = search(chunks, 4)
    assert 1000 in index[2]
    assert 5 in index[3]


@pytest.mark.parametrize("value_bits", [1, 2, 8, 32])
@pytest.mark.parametrize("count", [1, 32, 100])
@pytest.mark.parametrize("made", list(MADE))
def test_values_are_quantised_as_the_codec_says(made: str, count: int, value_bits: int) -> None:
    value = MADE[made]()[:, :count]
    expected = quantised(np.repeat(np.arange(CHUNKS), count), value.flatten().numpy(), value_bits)
    assert np.array_equal(selection.quantise(value, value_bits).flatten().numpy(), expected)


@pytest.mark.parametrize("value_bits", [1, 2, 8, 32])
@pytest.mark.parametrize("count", [1, 32, 300])
@pytest.mark.parametrize("made", list(MADE))
def test_what_is_taken_leaves_the_chunks_as_the_codec_says(made: str, count: int, value_bits: int) -> None:
    before = MADE[made]()
    after = before.clone()
    place, sent = selection.take(after, count, value_bits)
    value = before.gather(1, place)
    expected = quantised(np.repeat(np.arange(CHUNKS), count), value.flatten().numpy(), value_bits)
    assert np.array_equal(sent.flatten().numpy(), expected)
    assert torch.equal(after, before.scatter(1, place, value - sent))
