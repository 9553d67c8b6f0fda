"""What a peer computes on its own, against plain torch loops."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from p2ptrain.optim.local import InnerSteps, MeanGradient

BETAS, EPSILON, RATE = (0.9, 0.95), 1e-8, 1e-2


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def loss_of(net: nn.Module, seed: int) -> Callable[[], Tensor]:
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    return lambda: (net(batch) - batch.sum(1, keepdim=True)).square().mean()


def inner(net: nn.Module, batch: int = 4, weight_decay: float = 0.0) -> InnerSteps:
    return InnerSteps(net, batch=batch, betas=BETAS, epsilon=EPSILON, weight_decay=weight_decay)


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


def test_a_normalised_gradient_is_adams_step_without_its_first_moment() -> None:
    net, plain = model(), model()
    weight, theirs = net[0].weight, plain[0].weight
    local = MeanGradient(net, [weight], beta=0.9, epsilon=1e-6)
    adam = torch.optim.Adam([theirs], lr=1.0, betas=(0.0, 0.9), eps=1e-6)
    for round in range(4):
        net.zero_grad(), plain.zero_grad()
        for seed in (2 * round, 2 * round + 1):
            local.compute(loss_of(net, seed), 4, RATE)
        local.gather()
        (sum(loss_of(plain, seed)() for seed in (2 * round, 2 * round + 1)) / 2).backward()  # type: ignore[union-attr]
        before = theirs.detach().clone()
        adam.step()
        torch.testing.assert_close(weight.grad, before - theirs.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(net[2].weight.grad, plain[2].weight.grad)
        with torch.no_grad():
            theirs.copy_(before)


def test_a_round_without_a_gradient_leaves_the_second_moment_alone() -> None:
    net, other = model(), model()
    locals_ = [MeanGradient(one, [one[0].weight]) for one in (net, other)]
    locals_[1].gather()
    for local, one in zip(locals_, (net, other), strict=True):
        local.compute(loss_of(one, 1), 4, RATE)
        local.gather()
    assert torch.equal(net[0].weight.grad, other[0].weight.grad)


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


@pytest.mark.parametrize("make", [MeanGradient, inner])
def test_a_loss_that_is_not_finite_leaves_no_trace(make: Callable[[nn.Module], MeanGradient | InnerSteps]) -> None:
    net, other = model(), model()
    one, clean = make(net), make(other)
    assert one.compute(lambda: next(net.parameters()).sum() * torch.nan, 4, RATE) != 0
    for local, of in ((one, net), (clean, other)):
        local.compute(loss_of(of, 3), 4, RATE)
        local.gather()
    torch.testing.assert_close(gradients(net), gradients(other), rtol=0, atol=0)
