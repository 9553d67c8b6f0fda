"""Directions against numpy: a step of about unit size from any update."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from blocks import orthogonal_block

from p2ptrain.compression.layout import CHUNK_SIZE, ChunkLayout, ParameterSpec, Treatment
from p2ptrain.optim.directions import DIRECTIONS, MOMENTUM, Direction, Muon, Rms, Sgd
from p2ptrain.optim.orthogonal import correctly_rounded_root, make_orthogonal, orthogonal_by_operations

CPU = torch.device("cpu")
BETA, EPSILON = 0.9, 1e-8


def layout_of(shape: tuple[int, ...]) -> ChunkLayout:
    one = Treatment(transform="dct", direction="sign", learning_rate_scale=1.0, topk=8, reply_topk=8)
    return ChunkLayout([ParameterSpec("p", shape, "matrix")], {"matrix": one})


def direction(name: str, shape: tuple[int, ...] = (64, 128)) -> tuple[Direction, ChunkLayout]:
    layout = layout_of(shape)
    return DIRECTIONS[name](layout, layout.segments[0], BETA, EPSILON, CPU), layout


def update(seed: int, chunks: int = 2) -> torch.Tensor:
    """Numbers of which some are zero and whose sizes lie far apart."""
    rng = np.random.default_rng(seed)
    sizes = np.exp2(rng.integers(-20, 4, (chunks, CHUNK_SIZE)))
    sizes[rng.random(sizes.shape) < 0.2] = 0
    return torch.from_numpy((rng.standard_normal(sizes.shape) * sizes).astype(np.float32))


def all_live(chunks: int = 2) -> torch.Tensor:
    return torch.ones(chunks, dtype=torch.bool)


def test_sign_is_the_sign() -> None:
    sign, _ = direction("sign")
    assert np.array_equal(sign.step(update(0), all_live()).numpy(), np.sign(update(0).numpy()))


def test_rms_divides_by_the_root_of_the_corrected_second_moment() -> None:
    rms, _ = direction("rms")
    moment = np.zeros((2, CHUNK_SIZE))
    for step in range(1, 9):
        got = rms.step(update(step), all_live()).double().numpy()
        values = update(step).double().numpy()
        moment = BETA * moment + (1 - BETA) * values**2
        expected = values / (np.sqrt(moment / (1 - BETA**step)) + EPSILON)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_an_rms_step_is_numpys_to_the_bit() -> None:
    rms, _ = direction("rms")
    one, moment, decayed = np.float32, np.zeros((2, CHUNK_SIZE), np.float32), np.float32(1)
    for step in range(1, 5):
        values = update(step).numpy()
        moment = moment * one(BETA) + values * values * one(1 - BETA)
        decayed = decayed * one(BETA)
        expected = values / (np.sqrt(moment / (one(1) - decayed)) + one(EPSILON))
        assert np.array_equal(rms.step(update(step), all_live()).numpy(), expected)


def test_roots_are_rounded_as_ieee_says() -> None:
    rng = np.random.default_rng(0)
    values = (rng.random(1 << 16) * np.exp2(rng.integers(-120, 120, 1 << 16))).astype(np.float32)
    values[:1000] = np.arange(1000) * np.float32(2.0**-149)
    # The root in long double is so much finer that rounding it once more changes nothing.
    expected = np.sqrt(values.astype(np.longdouble)).astype(np.float32)
    assert np.array_equal(correctly_rounded_root(torch.from_numpy(values)).numpy(), expected)


def test_the_first_rms_step_is_the_sign() -> None:
    rms, _ = direction("rms")
    values = update(0)
    got = rms.step(values, all_live())
    large = values.abs() > 1e-3
    torch.testing.assert_close(got[large], values.sign()[large], rtol=1e-4, atol=0)
    assert not got[values == 0].any()


def test_a_skipped_chunk_leaves_the_second_moment_alone() -> None:
    rms, _ = direction("rms")
    lone, _ = direction("rms", (64, 64))
    for step in range(4):
        values, live = update(step), torch.tensor([True, step != 1])
        got = rms.step(torch.where(live.unsqueeze(1), values, 0), live)
        if live[1]:
            assert torch.equal(got[1:], lone.step(values[1:], all_live(1)))
        else:
            assert not got[1].any()
    assert torch.equal(rms.state()["second"][1:], lone.state()["second"])


@pytest.mark.parametrize("way", [Rms.step_entries, Rms.step_entries_by_operations])
def test_an_rms_step_of_entries_is_the_step_of_chunks_to_the_bit(way: Callable[..., torch.Tensor]) -> None:
    (dense, _), (sparse, _) = direction("rms"), direction("rms")
    assert isinstance(sparse, Rms)
    scale = torch.tensor([0.3, 0.7])
    for step in range(5):
        values, live = update(step), torch.tensor([True, step != 2])
        values = torch.where(live.unsqueeze(1) & (torch.rand(values.shape) < 0.05), values, 0)
        place = torch.nonzero(values.flatten()).flatten()
        sparse.begin()
        got = torch.zeros_like(values)
        for first in (0, 1):
            here = place[place // CHUNK_SIZE == first]
            flat = values.flatten()[here]
            inside, one = here - first * CHUNK_SIZE, slice(first, first + 1)
            got.view(-1)[here] = way(sparse, first, inside, flat, scale[one], live[one])
        assert torch.equal(dense.step(values * scale.unsqueeze(1), live), got)
        for key, tensor in dense.state().items():
            assert torch.equal(tensor, sparse.state()[key])


def test_rms_continues_alike_from_its_state() -> None:
    one, _ = direction("rms")
    for step in range(3):
        one.step(update(step), all_live())
    saved = {key: tensor.clone() for key, tensor in one.state().items()}
    other, _ = direction("rms")
    other.load_state(saved)
    assert torch.equal(one.step(update(9), all_live()), other.step(update(9), all_live()))
    assert not torch.equal(other.state()["second"], saved["second"]), "a loaded state must not be shared"


def newton_schulz(block: NDArray[np.float64]) -> NDArray[np.float64]:
    """Muon's, of floats; three times, from the largest row sum of the Gram matrix on."""
    x = block / np.sqrt(np.abs(block @ block.T).sum(1).max())
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other)))


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (60, 64), (64, 100), (96, 2, 32)])
def test_muon_steps_are_nearly_orthogonal_blocks_as_large_as_signs(shape: tuple[int, ...]) -> None:
    muon, layout = direction("muon", shape)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    chunks = layout.gather([gradient], torch.empty(layout.chunks, CHUNK_SIZE))
    step = muon.step(chunks, all_live(layout.chunks)).view(-1, 64, 64).double().numpy()
    for block, of in zip(step, chunks.view(-1, 64, 64).double().numpy(), strict=True):
        singular, rank = np.linalg.svd(block / 8, compute_uv=False), np.linalg.matrix_rank(of)
        # Steps with these coefficients bring singular values to within [0.7, 1.2]; the smallest take longest.
        assert singular.max() < 1.25
        assert np.quantile(singular[:rank], 0.15) > 0.6
        # The same singular vectors: the step lies close to the polar factor.
        u, _, vt = np.linalg.svd(of)
        assert cosine(u[:, :rank] @ vt[:rank], block) > 0.9
        assert cosine(newton_schulz(of), block) > 0.99


def test_muon_follows_nesterov_momentum() -> None:
    muon, _ = direction("muon")
    total = np.zeros((2, 64, 64))
    for number in range(6):
        held = update(number)
        step = muon.step(held, all_live()).view(-1, 64, 64).double().numpy()
        total = MOMENTUM * total + held.view(-1, 64, 64).double().numpy()
        ahead = held.view(-1, 64, 64).double().numpy() + MOMENTUM * total
        assert all(cosine(newton_schulz(one), other) > 0.99 for one, other in zip(ahead, step, strict=True))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.9, 0.99]), st.sampled_from([1e-30, 1.0, 1e30]))
def test_orthogonal_blocks_are_integer_sums_to_the_bit(seed: int, zeros: float, size: float) -> None:
    rng = np.random.default_rng(seed)
    held = (rng.standard_normal((64, 64)) * size * (rng.random((64, 64)) >= zeros)).astype(np.float32)
    if seed % 3 == 0:
        # One direction alone: sums as large as they can be.
        held = np.full((64, 64), size, np.float32) * rng.choice(np.float32([-1, 1]), 64)
    expected, ours = orthogonal_block(held), np.empty_like(held)
    assert np.array_equal(orthogonal_by_operations(torch.from_numpy(held)[None])[0].numpy(), expected)
    make_orthogonal(held, ours, np.float32(1), np.empty((4, 64, 64), np.float32))
    assert np.array_equal(ours, expected)


def test_muon_by_operations_takes_the_same_steps() -> None:
    (one, _), (other, _) = direction("muon"), direction("muon")
    assert isinstance(one, Muon)
    for step in range(4):
        live = torch.tensor([True, step != 2])
        one.begin()
        assert torch.equal(one.step_by_operations(0, update(step), live), other.step(update(step), live))
        for key, tensor in one.state().items():
            assert torch.equal(tensor, other.state()[key])


def test_muon_takes_no_step_where_there_is_no_update() -> None:
    muon, _ = direction("muon")
    assert not muon.step(torch.zeros(2, CHUNK_SIZE), all_live()).any()
    assert not muon.step(update(0), torch.tensor([True, False]))[1].any()


def test_muon_refuses_a_vector() -> None:
    with pytest.raises(ValueError, match="matrix"):
        direction("muon", (64,))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("sgd", lambda p: torch.optim.SGD([p], lr=1.0)),
        ("nesterov", lambda p: torch.optim.SGD([p], lr=1.0, momentum=MOMENTUM, nesterov=True)),
        ("adam", lambda p: torch.optim.Adam([p], lr=1.0, betas=(MOMENTUM, BETA), eps=EPSILON)),
    ],
)
def test_steps_are_those_of_torchs_optimizer(
    name: str, reference: Callable[[torch.Tensor], torch.optim.Optimizer]
) -> None:
    ours, _ = direction(name)
    parameter = torch.zeros(2, CHUNK_SIZE, dtype=torch.float64, requires_grad=True)
    optimizer = reference(parameter)
    for step in range(8):
        before = parameter.detach().clone()
        parameter.grad = update(step).double()
        optimizer.step()
        got = ours.step(update(step), all_live()).double()
        # Where what was added cancels, float32 is as exact as the terms were large.
        torch.testing.assert_close(got, before - parameter.detach(), rtol=1e-4, atol=2e-5)


def test_a_mean_of_an_unknown_name_is_refused() -> None:
    class Third(Sgd):
        moments = ("third",)

    layout = direction("sgd")[1]
    with pytest.raises(ValueError, match="Third keeps a mean 'third'; there are first, second"):
        Third(layout, layout.segments[0], BETA, EPSILON, CPU)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_skipped_chunk_stands_still_and_goes_on_as_if_nothing_had_been(name: str) -> None:
    (both, _), (lone, _) = direction(name), direction(name, (64, 64))
    for step in range(5):
        values, live = update(step), torch.tensor([True, step != 2])
        got = both.step(torch.where(live.unsqueeze(1), values, 0), live)
        if live[1]:
            assert torch.equal(got[1:], lone.step(values[1:], all_live(1)))
        else:
            assert not got[1].any()


@pytest.mark.parametrize("name", DIRECTIONS)
def test_chunks_one_by_one_take_the_step_of_all(name: str) -> None:
    (whole, _), (pieces, _) = direction(name), direction(name)
    for step in range(3):
        pieces.begin()
        parts = [pieces.step_chunks(n, update(step)[n : n + 1].clone(), all_live(1)) for n in (1, 0)]
        assert torch.equal(whole.step(update(step), all_live()), torch.cat(parts[::-1]))
