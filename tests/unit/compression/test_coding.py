"""Scales come back as they went, and are the nearest there are."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_reader import Bits

from p2ptrain.compression import coding
from p2ptrain.compression.bits import BitReader, BitWriter


@given(st.lists(st.integers(0, 255), max_size=100))
def test_scales_come_back(codes: list[int]) -> None:
    writer = BitWriter()
    coding.write_scales(writer, np.array(codes, np.uint8))
    data = writer.to_bytes()
    reader = BitReader(data, 0)
    found = coding.read_scales(reader, len(codes))
    reader.close()
    assert found.dtype == np.uint8
    assert found.tolist() == codes == Bits(data, 0).scale_codes(len(codes))


def test_scales_that_hardly_change_cost_little() -> None:
    codes = 100 + np.cumsum(np.random.default_rng(1).integers(-1, 2, 2000))
    writer = BitWriter()
    coding.write_scales(writer, codes.astype(np.uint8))
    assert writer.length / len(codes) < 1.9


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
    code = coding.code_not_below(np.float32(value), table)
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
    assert [coding.code_not_below(scale, coding.scale_table()) for scale in coding.scale_table()] == codes.tolist()
    assert np.array_equal(coding.nearest_scale(coding.scale_table()), codes)
