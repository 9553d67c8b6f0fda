"""What a peer computes on its own, against plain torch loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from p2ptrain.optim.local import HandedGradients, InnerSteps, LookAhead, MeanGradient

BETAS, EPSILON, RATE = (0.9, 0.95), 1e-8, 1e-2


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def loss_of(net: nn.Module, seed: int) -> Callable[[], Tensor]:
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    return lambda: (net(batch) - batch.sum(1, keepdim=True)).square().mean()


def inner(net: nn.Module, batch: int = 4, weight_decay: float = 0.0) -> InnerSteps:
    return InnerSteps(net, batch=batch, beta1=BETAS[0], beta2=BETAS[1], epsilon=EPSILON, weight_decay=weight_decay)


def look_ahead(net: nn.Module, batch: int = 4, rate_factor: float = 0.5) -> LookAhead:
    return LookAhead(net, rate_factor=rate_factor, batch=batch, beta1=BETAS[0], beta2=BETAS[1], epsilon=EPSILON)


def gradients(net: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


def test_the_mean_gradient_is_that_of_the_mean_loss() -> None:
    net, plain = model(), model()
    local = MeanGradient(net)
    for seed in range(3):
        local.compute(loss_of(net, seed), 4, RATE)
    local.gather()
    torch.stack([loss_of(plain, seed)() for seed in range(3)]).mean().backward()
    torch.testing.assert_close(gradients(net), gradients(plain))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_inner_steps_are_adamws_and_leave_the_replica_alone(weight_decay: float) -> None:
    net, plain = model(), model()
    local = inner(net, batch=8, weight_decay=weight_decay)
    optimizer = torch.optim.AdamW(plain.parameters(), RATE, BETAS, EPSILON, weight_decay)
    start = copy.deepcopy(net.state_dict())
    for round in range(2):
        for step in range(3):
            # Two micro-batches of four sequences are a step.
            for seed in (10 * round + 2 * step, 10 * round + 2 * step + 1):
                local.compute(loss_of(net, seed), 4, RATE)
            optimizer.zero_grad()
            (sum(loss_of(plain, 10 * round + 2 * step + n)() for n in (0, 1)) / 2).backward()  # type: ignore[union-attr]
            optimizer.step()
            for name, tensor in net.state_dict().items():
                assert torch.equal(tensor, start[name])
        local.gather()
        way = [before - after for before, after in zip(net.parameters(), plain.parameters(), strict=True)]
        torch.testing.assert_close(gradients(net), [one.detach() for one in way], rtol=1e-4, atol=1e-6)
        # The next round starts from the replica, with the moments of this one.
        net.zero_grad()
        plain.load_state_dict(start)


def test_a_step_of_the_replica_in_between_moves_both() -> None:
    net, plain = model(), model()
    local, optimizer = inner(net), torch.optim.AdamW(plain.parameters(), RATE, BETAS, EPSILON, 0.0)
    for seed in range(4):
        local.compute(loss_of(net, seed), 4, RATE)
        optimizer.zero_grad()
        loss_of(plain, seed)().backward()
        optimizer.step()
        if seed == 1:
            with torch.no_grad():
                for parameter in (*net.parameters(), *plain.parameters()):
                    parameter.add_(0.25)
    local.gather()
    ends = [parameter - parameter.grad for parameter in net.parameters()]  # type: ignore[operator]
    torch.testing.assert_close(ends, list(plain.parameters()), rtol=1e-4, atol=1e-6)


def test_what_is_left_over_at_the_end_is_a_step_too() -> None:
    net, plain = model(), model()
    local, optimizer = inner(net, batch=100), torch.optim.AdamW(plain.parameters(), RATE, BETAS, EPSILON, 0.0)
    local.compute(loss_of(net, 1), 4, RATE)
    local.gather()
    loss_of(plain, 1)().backward()
    optimizer.step()
    ends = [parameter - parameter.grad for parameter in net.parameters()]  # type: ignore[operator]
    torch.testing.assert_close(ends, list(plain.parameters()), rtol=1e-4, atol=1e-6)
    net.zero_grad()
    local.gather()
    assert not any(gradient.any() for gradient in gradients(net)), "nothing was computed since"


@pytest.mark.parametrize("micro_batches", [5, 6], ids=["a step begun", "whole steps"])
def test_a_look_ahead_gathers_the_mean_of_gradients_met_on_adamws_way(micro_batches: int) -> None:
    net, plain = model(), model()
    local = look_ahead(net, batch=8, rate_factor=0.5)
    optimizer = torch.optim.AdamW(plain.parameters(), 0.5 * RATE, BETAS, EPSILON, 0.0)
    start = copy.deepcopy(net.state_dict())
    for round in range(2):
        met: list[list[Tensor]] = []
        for number in range(micro_batches):
            seed = 10 * round + number
            local.compute(loss_of(net, seed), 4, RATE)
            (loss_of(plain, seed)() / 2).backward()
            if number % 2:
                met.append(gradients(plain))
                optimizer.step()
                optimizer.zero_grad()
            for name, tensor in net.state_dict().items():
                assert torch.equal(tensor, start[name])
        if micro_batches % 2:
            met.append(gradients(plain))
            optimizer.zero_grad()
        local.gather()
        # Of two micro-batches a step, each half as much as a micro-batch of its own.
        expected = [sum(one) * 2 / micro_batches for one in zip(*met, strict=True)]
        torch.testing.assert_close(gradients(net), expected, rtol=1e-4, atol=1e-6)
        # The next round starts from the replica, with the moments of this one.
        net.zero_grad()
        plain.load_state_dict(start)


def test_a_look_ahead_without_steps_is_the_mean_gradient() -> None:
    net, plain = model(), model()
    local, mean = look_ahead(net, batch=100), MeanGradient(plain)
    for _ in range(2):
        for seed in range(3):
            local.compute(loss_of(net, seed), 4, RATE)
            mean.compute(loss_of(plain, seed), 4, RATE)
        local.gather(), mean.gather()
        torch.testing.assert_close(gradients(net), gradients(plain))
        net.zero_grad(), plain.zero_grad()
    local.gather()
    assert not any(gradient.any() for gradient in gradients(net)), "nothing was computed since"


@pytest.mark.parametrize("make", [MeanGradient, inner, look_ahead])
def test_a_loss_that_is_not_finite_leaves_no_trace(make: Callable[[nn.Module], MeanGradient | InnerSteps]) -> None:
    net, other = model(), model()
    one, clean = make(net), make(other)
    assert one.compute(lambda: next(net.parameters()).sum() * torch.nan, 4, RATE) != 0
    for local, of in ((one, net), (clean, other)):
        local.compute(loss_of(of, 3), 4, RATE)
        local.gather()
    torch.testing.assert_close(gradients(net), gradients(other), rtol=0, atol=0)


def test_handed_gradients_make_the_mean_over_all_samples_whatever_the_batches() -> None:
    net = torch.nn.Linear(3, 1, bias=False)
    unused = torch.nn.Parameter(torch.zeros(2))
    samples = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    handed = HandedGradients([net.weight, unused])
    for batch in samples.split([1, 6, 3]):
        net(batch).square().mean().backward()
        assert handed.take(len(batch))
        assert net.weight.grad is None, "the next batch begins anew"
    handed.gather()
    assert net.weight.grad is not None and unused.grad is None
    (expected,) = torch.autograd.grad(net(samples).square().mean(), [net.weight])
    torch.testing.assert_close(net.weight.grad, expected)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_handed_gradient_that_is_not_finite_does_not_count(wrong: float) -> None:
    net = torch.nn.Linear(3, 1, bias=False)
    handed = HandedGradients([net.weight])
    net.weight.grad = torch.ones(1, 3)
    assert handed.take(2)
    net.weight.grad = torch.tensor([[0.0, wrong, 0.0]])
    assert not handed.take(5)
    handed.gather()
    assert net.weight.grad is not None and net.weight.grad.tolist() == [[1.0, 1.0, 1.0]]
    net.weight.grad = None
    handed.gather()
    assert net.weight.grad is None, "nothing was handed since"
