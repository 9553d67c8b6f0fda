"""A GPT whose computing is modelled: it sleeps as long as a machine of a given speed takes, and makes gradients up.

Two cores cannot compute for four peers at once without getting in their way, so timing runs of whole rounds sleep
instead: a third of the time in the forward pass, two thirds in the backward pass, parameter by parameter from the last
to the first, each for as long as its share of the entries. What can be sent before the backward pass is over can so be
sent before it is over. Everything that follows the gradients is real.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from p2ptrain.config.manifest import ModelConfig
from p2ptrain.models.gpt import GPT

FORWARD_SHARE = 1 / 3
GRADIENT_SCALE = 1e-3
_SHIFTS = 4096


class _Layer(torch.autograd.Function):
    """Hands a scalar on; backward sleeps and gives the parameter a gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, parameter: Tensor, noise: Tensor, seconds: float) -> Tensor:
        context.shape, context.noise, context.seconds = parameter.shape, noise, seconds
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        time.sleep(context.seconds)
        start = int(torch.randint(_SHIFTS, ()))
        entries = context.noise[start : start + context.shape.numel()]
        return gradients[0], entries.clone().view(context.shape), None, None


class SyntheticGPT(GPT):
    """See the module docstring.

    Args:
        seconds_per_sequence: of forward and backward pass together.
    """

    def __init__(self, config: ModelConfig, seconds_per_sequence: float) -> None:
        super().__init__(config)
        self._seconds = seconds_per_sequence
        self._entries = sum(parameter.numel() for parameter in self.parameters())
        largest = max(parameter.numel() for parameter in self.parameters())
        self._noise = GRADIENT_SCALE * torch.randn(largest + _SHIFTS)

    def loss(self, tokens: Tensor, counted: object = None) -> Tensor:
        """A constant, after a while."""
        seconds = self._seconds * tokens.shape[0]
        time.sleep(FORWARD_SHARE * seconds)
        x = torch.ones((), requires_grad=True)
        for parameter in self.parameters():
            share = parameter.numel() / self._entries
            x = _Layer.apply(x, parameter, self._noise, (1 - FORWARD_SHARE) * seconds * share)
        return x
