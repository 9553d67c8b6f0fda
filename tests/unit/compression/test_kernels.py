"""What is one pass on a device does the same as the operations that it stands for.

On CUDA's side where there is Triton (torch brings it along for CUDA; elsewhere pip install triton): on the device, or
without one in Triton's interpreter.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from p2ptrain.compression import dct, selection
from p2ptrain.compression.kernels import cpu as kernels_cpu
from p2ptrain.compression.layout import SIDE, Form
from p2ptrain.optim import threads
from p2ptrain.optim.demo import DeMo
from p2ptrain.optim.settling import Pending

CPU = torch.device("cpu")
CUDA = torch.device("cuda") if torch.cuda.is_available() else CPU
if CUDA == CPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton's own functions are defined
TALL, WIDE = 3, 2


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "cuda":
        return kernels_cuda()
    return kernels_cpu


def kernels_cuda() -> ModuleType:
    if find_spec("triton") is None:
        pytest.skip("no Triton")
    return import_module("p2ptrain.compression.kernels.cuda")


def device_of(kernels: ModuleType) -> torch.device:
    return CPU if kernels is kernels_cpu else CUDA


def gradient_of(form: Form, device: torch.device) -> Tensor:
    """[tall, wide, 64, 64], of a matrix wider than what is looked at, but for vectors."""
    if form == "rows":
        return torch.randn(TALL * WIDE, 1, SIDE, SIDE, device=device)
    columns = (WIDE + 1) * SIDE
    matrix = torch.randn(TALL * SIDE, columns, device=device)
    return matrix.as_strided((TALL, WIDE, SIDE, SIDE), (SIDE * columns, SIDE, columns, 1))


@pytest.mark.parametrize("form", ["none", "rows", "both"])
@pytest.mark.parametrize("value_bits", [1, 2, 8, 32])
@pytest.mark.parametrize("count", [1, 32, 52, 300])
def test_one_pass_accumulates_and_takes(kernels: ModuleType, form: Form, value_bits: int, count: int) -> None:
    if value_bits not in kernels.VALUE_BITS:
        pytest.skip("nothing that these kernels select")
    torch.manual_seed(count)
    device = device_of(kernels)
    chunks, gradient = TALL * WIDE, gradient_of(form, device)
    momentum = torch.randn(chunks, SIDE * SIDE, device=device)
    index, sent = torch.empty(chunks * count, dtype=torch.int64, device=device), torch.empty(chunks * count).to(device)
    ours = momentum.clone()
    kernels.accumulate_and_take(form, gradient, ours, 0.9, count, value_bits, index, sent)
    blocks = gradient.reshape(chunks, -1).contiguous()
    dct.accumulate(form, blocks, momentum, 0.9, torch.empty_like(blocks))
    expected_index, expected_sent = selection.take(momentum, count, value_bits)
    assert torch.equal(index.view(chunks, count), expected_index)
    torch.testing.assert_close(sent.view(chunks, count), expected_sent, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours, momentum, rtol=0, atol=2e-5)


def test_of_equal_entries_exactly_so_many_are_taken(kernels: ModuleType) -> None:
    device = device_of(kernels)
    momentum = torch.zeros(3, SIDE * SIDE, device=device)
    momentum[1] = torch.randint(-2, 3, (SIDE * SIDE,)).float()
    momentum[2, 7] = 1.0
    before, nothing = momentum.clone(), torch.zeros(3, 1, SIDE, SIDE, device=device)
    index, sent = torch.empty(3 * 52, dtype=torch.int64, device=device), torch.empty(3 * 52, device=device)
    kernels.accumulate_and_take("none", nothing, momentum, 1.0, 52, 32, index, sent)
    index, sent = index.view(3, 52), sent.view(3, 52)
    assert (index.diff() > 0).all()
    assert (sent[1].abs() == 2).all()
    assert 7 in index[2]
    assert torch.equal(momentum.scatter(1, index, sent), before)
    assert not momentum.gather(1, index).any()


def test_the_middle_of_a_decode_is_the_same_integers() -> None:
    kernels = kernels_cuda()
    first = torch.randint(-(2**24) + 1, 2**24, (24, SIDE * SIDE), device=CUDA).float()
    first = (first / 2.0 ** torch.arange(24, device=CUDA).unsqueeze(1)).round()
    first[23] = 0
    ours = first.clone()
    unit = kernels.shift_to_middle(ours)
    assert torch.equal(unit, dct._shift_to_middle(first))
    assert torch.equal(ours, first)


def test_an_optimizer_selects_the_same(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels is not kernels_cpu:
        monkeypatch.setattr(threads, "usable", lambda: 1)  # the interpreter is for one thread
    device = device_of(kernels)
    monkeypatch.setattr(dct, "kernels_for", lambda kind: None)
    one = selected(device)
    monkeypatch.setattr(dct, "kernels_for", lambda kind: kernels)
    other = selected(device)
    assert torch.equal(torch.from_numpy(one.sent.index), torch.from_numpy(other.sent.index))
    torch.testing.assert_close(torch.from_numpy(one.sent.value), torch.from_numpy(other.sent.value))


def selected(device: torch.device) -> Pending:
    """Of whole and broken blocks, a vector, rows dealt out and a parameter without a gradient."""
    torch.manual_seed(0)
    shapes = ((128, 192), (65, 130), (5000,), (128, 64), (64, 64))
    parameters = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn_like(parameter)
    groups = [
        {"params": parameters[:2], "topk": 20},
        {"params": [parameters[2], parameters[4]]},
        {"params": [parameters[3]], "transform": "none", "direction": "rms"},
    ]
    return DeMo(groups, topk=8).accumulate_and_select()
