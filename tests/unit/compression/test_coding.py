"""Bits on the wire: indices, flags and scales come back as they went."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain.compression import coding


@given(st.lists(st.integers(0, 4095), max_size=50))
def test_indices_come_back(values: list[int]) -> None:
    data = coding.pack_indices(np.array(values, np.int64))
    assert len(data) == coding.packed_indices_bytes(len(values)) == math.ceil(len(values) / 2) * 3
    assert coding.unpack_indices(data, len(values)).tolist() == values


def test_two_indices_lie_in_three_bytes_low_bits_first() -> None:
    assert coding.pack_indices(np.array([0xABC, 0x123])) == bytes([0xBC, 0x3A, 0x12])


@given(st.binary(max_size=60))
def test_no_bytes_give_an_index_beyond_the_chunk(data: bytes) -> None:
    data = data[: len(data) // 3 * 3]
    found = coding.unpack_indices(data, len(data) // 3 * 2)
    assert ((found >= 0) & (found < 4096)).all()


@given(st.lists(st.booleans(), max_size=70))
def test_flags_come_back(flags: list[bool]) -> None:
    data = coding.pack_bits(np.array(flags, np.bool_))
    assert len(data) == math.ceil(len(flags) / 8)
    assert coding.unpack_bits(data, len(flags)).tolist() == flags


def test_scales_are_the_nearest_floats_to_eighth_octaves() -> None:
    table = coding.scale_table()
    assert table[0] == 0
    for code in range(1, 256):
        exact = 2.0 ** ((code - 1) / 8 - 28)
        assert abs(float(table[code]) / exact - 1) < 2.0**-24
    assert (np.diff(table) > 0).all()


@given(st.floats(2.0**-29, 20.0, width=32))
@settings(max_examples=200)
def test_an_encoded_scale_is_the_smallest_not_below(value: float) -> None:
    table = coding.scale_table()
    code = int(coding.encode_scale(np.array([value], np.float32))[0])
    assert table[code] >= value or code == 255
    assert table[code - 1] < value


@given(st.floats(0, 20.0, width=32))
@settings(max_examples=200)
def test_the_nearest_scale_is_the_nearest(value: float) -> None:
    table = coding.scale_table().astype(np.float64)
    code = int(coding.nearest_scale(np.array([value], np.float32))[0])
    if value == 0:
        assert code == 0
    else:
        assert abs(table[code] - value) <= np.abs(table[1:] - value).min() * (1 + 1e-6)


def test_scales_are_fixed_points_of_their_codes() -> None:
    codes = np.arange(256)
    assert np.array_equal(coding.encode_scale(coding.scale_table()), codes)
    assert np.array_equal(coding.nearest_scale(coding.scale_table()), codes)
