"""The float transform is scipy's DCT; the integer one is exact, whoever sums it in whatever order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from p2ptrain.compression import dct
from p2ptrain.compression.layout import CHUNK_SIZE, SIDE, ChunkLayout, Form, ParameterSpec, Treatment

CPU = torch.device("cpu")
EXACT_FLOAT32 = 2**24
"""Integers below this are held exactly in float32."""


def layout_of(matrices: int = 1, vectors: int = 0, plain: int = 0) -> ChunkLayout:
    """Chunks of each of the three forms, in this order."""
    counts = {"matrix": matrices, "vector": vectors, "embedding": plain}
    treatments = {
        kind: Treatment(
            transform="none" if kind == "embedding" else "dct",
            direction="sign",
            learning_rate_scale=1.0,
            topk=8,
            reply_topk=8,
        )
        for kind in counts
    }
    specs = [ParameterSpec("m", (SIDE * matrices, SIDE), "matrix")] if matrices else []
    specs += [ParameterSpec("v", (CHUNK_SIZE * vectors,), "vector")] if vectors else []
    specs += [ParameterSpec("e", (SIDE * plain, SIDE), "embedding")] if plain else []
    return ChunkLayout(specs, treatments)


def basis() -> NDArray[np.int64]:
    return dct.integer_basis(CPU).numpy().astype(np.int64)


def reference_matrix(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], float]:
    """The specified integer inverse of one chunk [64, 64], in 64-bit integers, and the worth of one unit."""
    first = basis().T @ values
    shift = max(int(np.abs(first).max()).bit_length() - 11, 0)
    middle = (first + (1 << shift >> 1)) >> shift
    return np.clip(middle, -2048, 2048) @ basis(), 2.0 ** (shift - 20)


def aligned_with_the_basis(magnitude: int) -> NDArray[np.int64]:
    """Chunks whose every product has the same sign at one place: the largest sums there can be."""
    signs = np.where(basis() < 0, -1, 1)
    return np.stack([np.outer(signs[:, i], signs[:, j]) * magnitude for i in (0, 1, 31, 63) for j in (0, 7, 63)])


ADVERSARIAL: dict[str, Callable[[], NDArray[np.int64]]] = {
    "all 127": lambda: np.full((1, SIDE, SIDE), 127),
    "all -128": lambda: np.full((1, SIDE, SIDE), -128),
    "all 255": lambda: np.full((1, SIDE, SIDE), 255),
    "dense": lambda: np.random.default_rng(1).integers(-127, 128, (24, SIDE, SIDE)),
    "extremes": lambda: np.random.default_rng(2).choice([-255, 255], (24, SIDE, SIDE)),
    "aligned 127": lambda: aligned_with_the_basis(127),
    "aligned 255": lambda: aligned_with_the_basis(255),
    "zero": lambda: np.zeros((1, SIDE, SIDE), np.int64),
    "one": lambda: np.eye(1, CHUNK_SIZE, 65, dtype=np.int64).reshape(1, SIDE, SIDE),
}


@pytest.fixture(params=list(ADVERSARIAL))
def adversarial(request: pytest.FixtureRequest) -> NDArray[np.int64]:
    return ADVERSARIAL[request.param]()


def as_chunks(values: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(values.reshape(-1, CHUNK_SIZE).astype(np.float32))


def test_matrix_chunks_are_transformed_as_scipy_does() -> None:
    real = np.random.default_rng(0).standard_normal((3, SIDE, SIDE))
    ours = dct.encode(layout_of(3), torch.from_numpy(real).float().view(3, -1))
    expected = scipy.fft.dctn(real, axes=(1, 2), norm="ortho").reshape(3, -1)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_vectors_are_transformed_in_segments_of_64() -> None:
    real = np.random.default_rng(0).standard_normal((2, SIDE, SIDE))
    ours = dct.encode(layout_of(0, 2), torch.from_numpy(real).float().view(2, -1))
    np.testing.assert_allclose(ours.numpy(), scipy.fft.dct(real, axis=2, norm="ortho").reshape(2, -1), atol=1e-5)


def test_a_kind_without_transform_is_left_alone() -> None:
    real = torch.randn(2, CHUNK_SIZE, generator=torch.Generator().manual_seed(0))
    layout = layout_of(0, 0, 2)
    assert torch.equal(dct.encode(layout, real.clone()), real)
    integers, unit = dct.decode_exact(layout, real.sign())
    assert torch.equal(integers, real.sign())
    assert torch.equal(unit, torch.ones(2))


def test_each_chunk_is_transformed_by_its_own_kind_in_a_mixed_layout() -> None:
    real = np.random.default_rng(3).standard_normal((4, SIDE, SIDE))
    ours = dct.encode(layout_of(2, 1, 1), torch.from_numpy(real).float().view(4, -1)).view(4, SIDE, SIDE).numpy()
    np.testing.assert_allclose(ours[:2], scipy.fft.dctn(real[:2], axes=(1, 2), norm="ortho"), atol=1e-5)
    np.testing.assert_allclose(ours[2], scipy.fft.dct(real[2], axis=1, norm="ortho"), atol=1e-5)
    np.testing.assert_array_equal(ours[3], real[3].astype(np.float32))


def test_decode_float_inverts_encode() -> None:
    real = torch.randn(5, CHUNK_SIZE, generator=torch.Generator().manual_seed(4))
    layout = layout_of(2, 2, 1)
    kept = real.clone()
    dct.encode(layout, kept)
    for form, start, end in layout.runs:
        torch.testing.assert_close(dct.decode_float(form, kept[start:end]), real[start:end], atol=1e-5, rtol=0)


def test_the_shipped_basis_is_the_dct_rounded_to_ten_bits() -> None:
    exact = scipy.fft.dct(np.eye(SIDE), axis=0, norm="ortho") * 2**10
    assert np.array_equal(basis(), np.rint(exact))


def test_no_partial_sum_leaves_what_float32_holds_exactly() -> None:
    first = int(np.abs(basis()).sum(0).max()) * dct.VALUE_MAX
    second = int(np.abs(basis()).sum(0).max()) * 2**dct.MIDDLE_BITS
    assert max(first, second, SIDE * dct.VALUE_MAX * int(basis().max())) < EXACT_FLOAT32


def test_exact_decode_equals_integer_arithmetic(adversarial: NDArray[np.int64]) -> None:
    integers, unit = dct.decode_exact(layout_of(len(adversarial)), as_chunks(adversarial))
    for chunk, (values, one, worth) in enumerate(zip(adversarial, integers.double().numpy(), unit, strict=True)):
        expected, expected_unit = reference_matrix(values)
        assert np.array_equal(one.reshape(SIDE, SIDE), expected), chunk
        assert worth == expected_unit
        assert np.abs(expected).max() < EXACT_FLOAT32


def test_exact_decode_of_vectors_equals_integer_arithmetic(adversarial: NDArray[np.int64]) -> None:
    integers, unit = dct.decode_exact(layout_of(0, len(adversarial)), as_chunks(adversarial))
    assert np.array_equal(integers.double().numpy().reshape(adversarial.shape), adversarial @ basis())
    assert torch.equal(unit, torch.full((len(adversarial),), 2.0**-10))


@given(st.integers(0, 2**32 - 1), st.integers(1, 255), st.floats(0.0005, 1))
@settings(max_examples=30)
def test_exact_decode_equals_integer_arithmetic_for_any_size_and_density(seed: int, largest: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-largest, largest + 1, (SIDE, SIDE)) * (rng.random((SIDE, SIDE)) < share)
    integers, unit = dct.decode_exact(layout_of(), as_chunks(values))
    expected, expected_unit = reference_matrix(values)
    assert np.array_equal(integers.double().numpy().reshape(SIDE, SIDE), expected)
    assert float(unit) == expected_unit


def test_the_order_and_precision_of_sums_do_not_matter(adversarial: NDArray[np.int64]) -> None:
    rng = np.random.default_rng(5)
    layout = layout_of(len(adversarial))
    ours, _ = dct.decode_exact(layout, as_chunks(adversarial))
    for values, one in zip(adversarial[:4], ours, strict=False):
        shift = max(int(np.abs(basis().T @ values).max()).bit_length() - 11, 0)
        order = rng.permutation(SIDE)
        # One term after the other, each sum rounded to float32: the least favourable way to add.
        first = np.zeros((SIDE, SIDE), np.float32)
        for k in order:
            first += np.outer(basis()[k], values[k]).astype(np.float32)
        middle = np.floor(first / np.float32(2**shift) + np.float32(0.5))
        out = np.zeros((SIDE, SIDE), np.float32)
        for k in order[::-1]:
            out += np.outer(middle[:, k], basis()[k]).astype(np.float32)
        assert np.array_equal(out, one.numpy().reshape(SIDE, SIDE))


@pytest.mark.parametrize("form", ["both", "rows", "none"])
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1), chunks=st.integers(1, 4))
@settings(max_examples=25)
def test_entries_alone_decode_to_the_same_integers(form: Form, seed: int, share: float, chunks: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-255, 256, (chunks, CHUNK_SIZE)) * (rng.random((chunks, CHUNK_SIZE)) < share * 0.1)
    dense = torch.from_numpy(values.astype(np.float32))
    place = dense.flatten().nonzero().flatten()
    scratch = torch.full((2, chunks, CHUNK_SIZE), torch.nan)
    integers, unit = dct.decode_exact_entries(form, place, dense.flatten()[place], *scratch)
    expected, expected_unit = dct.decode_exact_form(form, dense.clone())
    assert torch.equal(integers, expected)
    assert torch.equal(unit, expected_unit)


@pytest.mark.parametrize("form", ["both", "rows"])
def test_the_largest_there_can_be_decode_entry_by_entry_too(form: Form, adversarial: NDArray[np.int64]) -> None:
    dense = as_chunks(adversarial)
    place = dense.flatten().nonzero().flatten()
    integers, unit = dct.decode_exact_entries(
        form, place, dense.flatten()[place], torch.empty_like(dense), torch.empty_like(dense)
    )
    expected, expected_unit = dct.decode_exact_form(form, dense.clone())
    assert torch.equal(integers, expected)
    assert torch.equal(unit, expected_unit)


@given(st.integers(0, 2**31), st.sampled_from([0.0005, 0.008, 0.3, 1.0]))
@settings(max_examples=25, deadline=None)
def test_steps_of_signs_are_those_of_the_integers(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    tall, wide, rate = 3, 2, 0.0123
    columns = (wide + 1) * SIDE
    values = rng.integers(-dct.VALUE_MAX, dct.VALUE_MAX + 1, (tall * wide, CHUNK_SIZE))
    values[rng.random(values.shape) >= share] = 0
    dense = torch.from_numpy(values.astype(np.float32))
    place = torch.from_numpy(np.flatnonzero(values))
    before = torch.from_numpy(rng.standard_normal((tall * SIDE, columns), np.float32))
    after = before.clone()
    there = after[:, SIDE:].unflatten(1, (wide, SIDE)).unflatten(0, (tall, SIDE)).transpose(1, 2)
    dct.subtract_signs(place, dense.flatten()[place], there, rate)
    integers, _ = dct.decode_exact(layout_of(tall * wide), dense)
    signs = integers.sign().view(tall, wide, SIDE, SIDE).transpose(1, 2).reshape(tall * SIDE, wide * SIDE)
    assert torch.equal(after[:, :SIDE], before[:, :SIDE])
    assert torch.equal(after[:, SIDE:], before[:, SIDE:] - signs * rate)


def test_the_batch_a_chunk_is_in_does_not_matter() -> None:
    values = as_chunks(ADVERSARIAL["dense"]())
    whole, units = dct.decode_exact(layout_of(len(values)), values)
    for chunk in (0, 11, len(values) - 1):
        alone, unit = dct.decode_exact(layout_of(), values[chunk : chunk + 1])
        assert torch.equal(alone[0], whole[chunk])
        assert unit[0] == units[chunk]


@pytest.mark.parametrize("kept", [32, 128, CHUNK_SIZE])
def test_signs_agree_with_the_real_inverse(kept: int) -> None:
    rng = np.random.default_rng(6)
    values = rng.integers(-127, 128, (16, CHUNK_SIZE))
    values[rng.random(values.shape).argsort(1) >= kept] = 0
    values = values.reshape(16, SIDE, SIDE)
    integers, unit = dct.decode_exact(layout_of(16), as_chunks(values))
    real = scipy.fft.idctn(values.astype(np.float64), axes=(1, 2), norm="ortho")
    ours = (integers * unit[:, None]).double().numpy().reshape(real.shape)
    assert (np.sign(ours) == np.sign(real)).mean() >= 0.99
    assert np.abs(ours - real).max() < 0.01 * np.abs(real).max()


def test_decoding_does_not_change_its_argument_or_the_tf32_setting() -> None:
    values = as_chunks(ADVERSARIAL["dense"]())
    before, allowed = values.clone(), torch.backends.cuda.matmul.allow_tf32
    dct.decode_exact(layout_of(len(values)), values)
    assert torch.equal(values, before)
    assert torch.backends.cuda.matmul.allow_tf32 == allowed
