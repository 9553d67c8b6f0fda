"""Tensors survive the file; anything else is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.state.tensors import TensorFileError, pack_tensors, packed_bytes, unpack_tensors

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([[-1.5]]), "c": np.zeros(0, np.float32)}
SHAPES = {name: array.shape for name, array in ARRAYS.items()}
DATA = pack_tensors(b"meta", ARRAYS)


def test_arrays_and_meta_come_back_bit_for_bit() -> None:
    meta, arrays = unpack_tensors(DATA, SHAPES)
    assert meta == b"meta" and len(DATA) == packed_bytes(SHAPES, 4)
    assert {name: array.tobytes() for name, array in arrays.items()} == {n: a.tobytes() for n, a in ARRAYS.items()}


def test_arrays_of_another_model_are_refused() -> None:
    for other in (SHAPES | {"a": (3, 2)}, {"x": (2, 3), "b": (1, 1), "c": (0,)}, dict(reversed(SHAPES.items()))):
        with pytest.raises(TensorFileError, match="another model"):
            unpack_tensors(DATA, other)


@given(st.integers(0, len(DATA) - 1))
def test_a_file_cut_short_is_refused(length: int) -> None:
    with pytest.raises(TensorFileError):
        unpack_tensors(DATA[:length], SHAPES)


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(TensorFileError):
        unpack_tensors(data, SHAPES)


def test_a_longer_file_is_refused() -> None:
    with pytest.raises(TensorFileError):
        unpack_tensors(DATA + b"\0", SHAPES)
