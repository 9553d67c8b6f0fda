"""A machine that computes other bits does not train."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from blocks import orthogonal_block

from p2ptrain.compression import coding, dct
from p2ptrain.compression.layout import CHUNK_SIZE, SIDE
from p2ptrain.errors import DivergenceError
from p2ptrain.optim import directions
from p2ptrain.optim.schedule import learning_rate
from p2ptrain.training import selftest
from p2ptrain.training.selftest import check, self_test

CPU = torch.device("cpu")


def test_this_machine_computes_the_bits_the_run_requires() -> None:
    check(CPU)


def test_the_result_is_a_sha256_and_the_same_again() -> None:
    assert len(bytes.fromhex(self_test(CPU))) == hashlib.sha256().digest_size
    assert self_test(CPU) == self_test(CPU)


def test_what_is_expected_is_what_integers_and_ieee_floats_give() -> None:
    """The hash once more, in numpy: 64-bit integers for the decode, one rounding an operation for the steps."""
    one, layout = np.float32, selftest._layout()
    values = selftest._values(layout.chunks).astype(np.int64).reshape(-1, SIDE, SIDE)
    basis = np.rint(scipy.fft.dct(np.eye(SIDE), axis=0, norm="ortho") * 2**10).astype(np.int64)
    integers, unit = values.copy(), np.ones(len(values), np.float32)
    for chunk in layout.row_chunks:
        integers[chunk], unit[chunk] = values[chunk] @ basis, 2.0**-10
    for chunk in layout.matrix_chunks:
        first = basis.T @ values[chunk]
        shift = max(int(np.abs(first).max()).bit_length() - 11, 0)
        integers[chunk] = ((first + (1 << shift >> 1)) >> shift) @ basis
        unit[chunk] = 2.0 ** (shift - 20)
    decoded = integers.reshape(-1, CHUNK_SIZE).astype(np.float32)
    digest = hashlib.sha256(decoded.tobytes() + unit.tobytes())
    update = decoded * (unit * coding.scale_table()[1 : 1 + 40 * len(values) : 40])[:, None]
    for segment in layout.segments:
        piece = update[segment.start : segment.end]
        moment = one(1.25 * 2.0**-127) * one(0.95) + piece * piece * one(1 - 0.95)
        decayed = np.full((len(piece), 1), one(0.5) * one(0.95))
        step = piece / (np.sqrt(moment / (one(1) - decayed)) + one(1e-8))
        for array in (np.sign(piece), step, moment, decayed):
            digest.update(array.astype("<f4").tobytes())
        total = mean = second = np.zeros_like(piece)
        by_mean = by_second = one(1)
        nesterov, adam = [], []
        for _ in range(2):
            total = total * one(0.9) + piece
            nesterov.append(piece + total * one(0.9))
            second = second * one(0.95) + piece * piece * one(1 - 0.95)
            mean = mean * one(0.9) + piece * one(1 - 0.9)
            by_mean, by_second = by_mean * one(0.9), by_second * one(0.95)
            adam.append(mean / (one(1) - by_mean) / (np.sqrt(second / (one(1) - by_second)) + one(1e-8)))
        blocks = [] if segment.is_vector else [ahead.reshape(-1, SIDE, SIDE) for ahead in nesterov]
        muon = [np.stack([orthogonal_block(block) for block in of]) * one(8) for of in blocks]
        for array in (*nesterov, *adam, *muon):
            # Both signs of zero are one.
            digest.update((array + one(0)).astype("<f4").tobytes())
    rounds = (0, 1, 99, 100, 101, 2500, 5000, 9999, 10_000, 20_000)
    rates = [learning_rate(n, peak=0.02, warmup_rounds=100, total_rounds=10_000, final_fraction=0.1) for n in rounds]
    digest.update(np.array(rates, "<f8").tobytes())
    assert digest.hexdigest() == selftest.EXPECTED


def test_the_number_of_threads_does_not_matter() -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            check(CPU)
    finally:
        torch.set_num_threads(threads)


def test_random_state_does_not_matter() -> None:
    torch.manual_seed(1)
    check(CPU)


@pytest.mark.parametrize("entry", [(0, 0), (1, 40), (63, 63)])
def test_an_altered_basis_entry_is_noticed(entry: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    altered = dct.integer_basis(CPU).clone()
    altered[entry] += 1
    monkeypatch.setattr(dct, "integer_basis", lambda device: altered)
    with pytest.raises(DivergenceError, match="does not compute the bits") as caught:
        check(CPU)
    assert "--device cpu" in caught.value.hint
    assert torch.__version__ in caught.value.hint


def test_another_rounding_of_the_second_moment_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fused(directions.Rms):
        def step(self, update: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
            step = super().step(update, live)
            return torch.nextafter(step, torch.zeros_like(step))

    monkeypatch.setattr(selftest, "Rms", Fused)
    with pytest.raises(DivergenceError):
        check(CPU)


def test_flushing_subnormals_is_noticed() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(DivergenceError):
            check(CPU)
    finally:
        torch.set_flush_denormal(False)


def test_the_values_decoded_use_the_whole_range_and_every_form_of_chunk() -> None:
    layout = selftest._layout()
    values = selftest._values(layout.chunks)
    assert values.shape == (layout.chunks, CHUNK_SIZE)
    assert values.min() == -dct.VALUE_MAX
    assert values.max() == dct.VALUE_MAX
    assert np.array_equal(values, np.rint(values))
    assert len(layout.matrix_chunks) == 3
    assert len(layout.row_chunks) == 2
    assert len(layout.plain_chunks) == 1
    assert 0 < np.count_nonzero(values[2]) < SIDE**2 / 16
