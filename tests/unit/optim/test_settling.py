"""The product of a contribution and the replies, against numpy's over all entries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.compression.wire import Coefficients, ReplyContent
from p2ptrain.optim.settling import Pending, products

CHUNKS, EDGE = 6, 4


def some(seed: int, start: int, end: int) -> Coefficients:
    """At most five coefficients a chunk, in some chunks none."""
    generator = np.random.default_rng(seed)
    places = [
        (chunk, index)
        for chunk in range(start, end)
        for index in sorted(generator.choice(40, generator.integers(0, 6), replace=False))
    ]
    chunk, index = np.array(places, np.int64).reshape(-1, 2).T
    value = generator.standard_normal(len(places)).astype(np.float32)
    return Coefficients(
        start=start, end=end, chunk=np.ascontiguousarray(chunk), index=np.ascontiguousarray(index), value=value
    )


def dense(part: Coefficients) -> NDArray[np.float64]:
    whole = np.zeros((CHUNKS, CHUNK_SIZE))
    whole[part.chunk, part.index] = part.value
    return whole


def reply(part: Coefficients, included: frozenset[int], clips: dict[int, int]) -> ReplyContent:
    scale = np.ones(part.end - part.start, np.float32)
    return ReplyContent(included, clips, part, np.zeros(len(part.value), np.int64), scale)


@given(seed=st.integers(0, 2**32 - 1))
def test_each_reply_that_includes_us_has_its_product(seed: int) -> None:
    sent, left, right = some(seed, 0, CHUNKS), some(seed + 1, 0, EDGE), some(seed + 2, EDGE, CHUNKS)
    everybody, others = frozenset({0, 1}), frozenset({1})
    found = products(
        Pending(sent, 0),
        [(0, EDGE, reply(left, everybody, {})), (EDGE, CHUNKS, reply(right, everybody, {0: 128}))],
        0,
    )
    whole = dense(sent)
    assert found == pytest.approx({0: np.vdot(whole, dense(left)), 1: np.vdot(whole, dense(right))}, abs=1e-5)
    nothing = [(0, EDGE, reply(left, others, {})), (EDGE, CHUNKS, reply(right, everybody, {0: 0}))]
    assert products(Pending(sent, 0), nothing, 0) == {}, "left out of the one, and clipped to nothing in the other"
    assert products(Pending(sent, 0), [(0, EDGE, None)], 0) == {}
    assert products(Pending(sent, 0), [(0, EDGE, reply(left, everybody, {}))], None) == {}
