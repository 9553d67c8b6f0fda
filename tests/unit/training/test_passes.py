"""How a peer computes a micro-batch is its own business: what comes out is one gradient, whatever fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from p2ptrain.config.manifest import ModelConfig
from p2ptrain.models.gpt import GPT
from p2ptrain.models.init import initialise
from p2ptrain.models.of_manifest import recompute_activations
from p2ptrain.training.machine import Machine
from p2ptrain.training.passes import Passes, choose, kept_bytes, out_of_memory

CPU = torch.device("cpu")
PLENTY = Machine(2**50, 2**50, 1.0)
TOKENS = torch.arange(33).expand(64, -1) * 7 % 300


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Of products this small, threads would spend their time on waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> GPT:
    made = GPT(ModelConfig(layers=2, heads=2, embedding=64, context=32, vocabulary=300))
    initialise(made, b"passes")
    with torch.no_grad():
        for parameter in made.parameters():
            # Outputs begin at zero, and nothing before them would have a gradient.
            parameter.add_(torch.linspace(-0.02, 0.02, parameter.numel()).view(parameter.shape))
    return made


def chosen(model: GPT, machine: Machine = PLENTY, *, wanted: int = 16, grow: bool = False) -> Passes:
    return choose(
        model,
        lambda count: model.loss(TOKENS[:count]),
        CPU,
        wanted=wanted,
        most=64,
        grow=grow,
        precision="float32",
        machine=machine,
        reserved_bytes=10**6,
    )


def gradients(model: GPT, passes: Passes) -> torch.Tensor:
    for parameter in model.parameters():
        parameter.grad = None
    with passes.precision(CPU):
        loss = model.loss(TOKENS[:4])
    loss.backward()
    found = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in found)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def test_as_many_sequences_as_the_run_says_where_there_is_room(model: GPT) -> None:
    passes = chosen(model)
    assert (passes.sequences, passes.bfloat16) == (16, False) and passes.seconds_a_sequence > 0
    assert all(parameter.grad is None for parameter in model.parameters()), "what was tried out leaves nothing"


def test_where_there_is_not_they_are_halved_until_what_a_pass_keeps_fits(model: GPT) -> None:
    kept = {count: kept_bytes(lambda n: model.loss(TOKENS[:n]), model, count) for count in (4, 8)}
    room = int((1.3 * kept[4] + 1.3 * kept[8]) / 2) + 10**6
    assert chosen(model, replace(PLENTY, free_bytes=room)).sequences == 4
    assert chosen(model, replace(PLENTY, free_bytes=1)).sequences == 1


def test_trying_out_takes_no_more_than_fits_and_than_a_round_has(model: GPT) -> None:
    assert chosen(model, wanted=1, grow=True).sequences in (1, 2, 4, 8, 16, 32, 64)
    assert chosen(model, replace(PLENTY, free_bytes=1), wanted=1, grow=True).sequences == 1
    assert chosen(model, wanted=1000).sequences == 64


def test_recomputing_keeps_less_and_comes_to_the_same_gradient(model: GPT) -> None:
    def kept() -> int:
        return kept_bytes(lambda n: model.loss(TOKENS[:n]), model, 16)

    before, plain = kept(), gradients(model, Passes(4))
    recompute_activations(model)
    assert kept() < 0.5 * before
    assert torch.allclose(gradients(model, Passes(4)), plain, rtol=1e-5, atol=1e-8)


def test_gradients_of_bfloat16_products_are_float32_and_near(model: GPT) -> None:
    exact, near = gradients(model, Passes(4)), gradients(model, Passes(4, bfloat16=True))
    assert not torch.equal(exact, near)
    assert torch.cosine_similarity(exact, near, dim=0) > 0.995


def test_what_allocators_say_is_known_from_other_failures() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert out_of_memory(refused.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(other.value)
