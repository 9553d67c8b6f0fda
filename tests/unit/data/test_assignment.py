"""Which sequences a peer reads."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.data.assignment import sequence_offset, sequence_offsets
from p2ptrain.errors import DataError

NONCE = bytes(range(16))


@given(st.binary(min_size=1, max_size=40), st.integers(0, 2**40), st.integers(2, 10_000), st.integers(1, 600))
def test_every_sequence_lies_inside_the_text(peer: bytes, count: int, tokens: int, context: int) -> None:
    if tokens <= context:
        with pytest.raises(DataError, match=f"{tokens} tokens"):
            sequence_offset(NONCE, peer, count, tokens, context)
        return
    offset = sequence_offset(NONCE, peer, count, tokens, context)
    assert offset >= 0 and offset + context + 1 <= tokens


def test_a_text_of_exactly_one_sequence_gives_that_one() -> None:
    assert sequence_offsets(NONCE, b"peer", 0, 5, 129, 128) == [0] * 5


def test_a_peer_that_restarts_from_its_count_reads_on() -> None:
    whole = sequence_offsets(NONCE, b"peer", 0, 20, 100_000, 128)
    assert sequence_offsets(NONCE, b"peer", 13, 7, 100_000, 128) == whole[13:]


def test_run_peer_and_count_each_change_what_is_read() -> None:
    base = sequence_offsets(NONCE, b"peer", 0, 50, 10**9, 128)
    assert len(set(base)) == 50
    assert not set(base) & set(sequence_offsets(NONCE, b"reep", 0, 50, 10**9, 128))
    assert not set(base) & set(sequence_offsets(NONCE[::-1], b"peer", 0, 50, 10**9, 128))


def test_all_of_the_text_is_read_alike() -> None:
    offsets = np.array(sequence_offsets(NONCE, b"peer", 0, 20_000, 1_000_128, 128))
    counts = np.histogram(offsets, bins=20, range=(0, 1_000_000))[0]
    chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_squared < 43.8  # 99.9 % quantile with 19 degrees of freedom


def test_the_assignment_is_as_specified() -> None:
    message = b"p2ptrain data 1\0" + (7).to_bytes(8, "little") + b"\x10\x00" + NONCE + b"peer"
    expected = int.from_bytes(hashlib.sha256(message).digest()[:16], "little") % (5000 - 128)
    assert sequence_offset(NONCE, b"peer", 7, 5000, 128) == expected
