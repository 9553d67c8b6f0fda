"""What a run trains, apart from how it is trained: some of a module's parameters, their kinds, and their first values.

Optimizer, replica, snapshots and chunks know a task alone. So any module can be trained whose parameters can be put in
an order that all peers agree on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from p2ptrain.compression.layout import Kind
from p2ptrain.models.gpt import kind_of
from p2ptrain.models.init import initialise


@dataclass(frozen=True, slots=True)
class TrainedParameter:
    """One parameter that all replicas hold alike; its kind decides how it is compressed and stepped."""

    name: str
    tensor: nn.Parameter
    kind: Kind


@dataclass(frozen=True, slots=True)
class Task:
    """See the module docstring."""

    module: nn.Module
    parameters: tuple[TrainedParameter, ...]
    """In the module's order; each tensor once."""
    begin: Callable[[], None]
    """Sets every parameter to its first value, in place."""


def gpt_parameters(model: nn.Module) -> tuple[TrainedParameter, ...]:
    """Return all parameters of the built-in GPT, or of a module whose parameters are named as its are."""
    return tuple(TrainedParameter(name, tensor, kind_of(name, tensor)) for name, tensor in model.named_parameters())


def gpt_task(model: nn.Module, nonce: bytes) -> Task:
    """Return the task of the built-in GPT: first values follow from the run's nonce."""
    return Task(model, gpt_parameters(model), partial(initialise, model, nonce))
