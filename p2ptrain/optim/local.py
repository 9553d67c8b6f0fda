"""What a peer computes between two contributions, and what of it enters the momentum.

Strategies differ in this and in how parameters are treated (`config/strategies.py`); momentum, codec, reducing, chain
and settling are the same for all. Strategies `demo` and `dense` gather the mean gradient. `diloco` and `sparse_diloco`
take inner steps: AdamW on a peer's own, after which the way gone is negated and takes the gradient's place (Douillard
et al., arXiv 2311.08105; Sarfi et al., arXiv 2508.15706). Strategy `local_demo` takes them too, and gathers the mean of
the gradients that it met on the way: AdamW makes all entries' steps alike, so that noise is most of the way gone.

A seal may be applied between any two calls: the replica's parameters are never left changed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Gathers(Protocol):
    """Where gradients are until they are contributed."""

    def gather(self) -> None:
        """Leave in every parameter's `grad` what enters the momentum, and begin anew."""
        ...


class Local(Gathers, Protocol):
    """What a peer does on its own."""

    def compute(self, loss: Callable[[], Tensor], sequences: int, rate: float) -> float:
        """One micro-batch.

        Args:
            loss: computes the mean loss in nats of these sequences by the parameters as they then are.
            rate: learning rate of inner steps.

        Returns:
            The loss; where it is not finite, the micro-batch is left out.
        """
        ...


class Together(Protocol):
    """The processes that one peer is, each with as many sequences of every micro-batch."""

    size: int

    def agree(self, nats: float) -> float:
        """Return the mean of all processes' losses."""
        ...

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Have each parameter's `grad` be the mean over all processes."""
        ...


class Alone:
    """A peer that is one process."""

    size = 1

    def agree(self, nats: float) -> float:
        return nats

    def average(self, parameters: Sequence[Tensor]) -> None:
        pass


ALONE = Alone()


class MeanGradient:
    """The mean over all micro-batches, which are of one size."""

    def __init__(self, model: nn.Module, together: Together = ALONE) -> None:
        self._parameters, self._together = list(model.parameters()), together
        self._micro_batches = 0

    def compute(self, loss: Callable[[], Tensor], sequences: int, rate: float) -> float:
        value = loss()
        nats = self._together.agree(value.item())
        if math.isfinite(nats):
            value.backward()
            self._micro_batches += 1
        return nats

    def gather(self) -> None:
        if self._micro_batches:
            self._together.average(self._parameters)
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self._micro_batches)
        self._micro_batches = 0


class HandedGradients:
    """The mean over all samples of gradients that somebody else has computed, batch by batch of any size.

    Costs the memory of the gradients, which leave `grad` for as long as the next batch is computed.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        #: by parameter, of the gradients met, each as often as it has samples
        self._sums: list[Tensor | None] = [None] * len(self._parameters)
        self._samples = 0

    def take(self, samples: int) -> bool:
        """Take a mean over `samples` out of every parameter's `grad`; False: it is not finite, and does not count."""
        gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        totals = [gradient.sum() for gradient in gradients if gradient is not None]
        if totals and not bool(torch.stack(totals).isfinite().all()):
            return False
        for number, gradient in enumerate(gradients):
            before = self._sums[number]
            if gradient is None:
                continue
            if before is None:
                self._sums[number] = gradient.mul_(samples)
            else:
                before.add_(gradient, alpha=samples)
        self._samples += samples
        return True

    def gather(self) -> None:
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = None if total is None else total.div_(self._samples)
        self._sums = [None] * len(self._parameters)
        self._samples = 0


class InnerSteps:
    """AdamW, a step every so many sequences; its moments stay with this process, and begin anew with another.

    Args:
        batch: sequences a step. The last one before `gather` takes what there is.
        beta1, beta2: decays a step of AdamW's first and second moment.
        epsilon, weight_decay: AdamW's.
    """

    def __init__(
        self,
        model: nn.Module,
        together: Together = ALONE,
        *,
        batch: int,
        beta1: float,
        beta2: float,
        epsilon: float,
        weight_decay: float,
    ) -> None:
        self._parameters, self._together, self._batch = list(model.parameters()), together, batch
        self._optimizer = torch.optim.AdamW(
            self._parameters, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay, fused=True
        )
        #: by parameter, how far inner steps have gone
        self._moved = [torch.zeros_like(parameter) for parameter in self._parameters]
        #: behind the gradients at hand
        self._sequences = 0
        self._rate = 0.0

    @contextlib.contextmanager
    def _moved_on(self) -> Iterator[list[Tensor]]:
        """The parameters where inner steps have come to; gives those that are the replica's."""
        shared = [parameter.data for parameter in self._parameters]
        for parameter, moved in zip(self._parameters, self._moved, strict=True):
            parameter.data = parameter.data + moved
        try:
            yield shared
        finally:
            for parameter, data in zip(self._parameters, shared, strict=True):
                parameter.data = data

    def compute(self, loss: Callable[[], Tensor], sequences: int, rate: float) -> float:
        self._rate = rate
        with self._moved_on() as shared:
            value = loss()
            nats = self._together.agree(value.item())
            if math.isfinite(nats):
                (value * sequences).backward()
                self._sequences += sequences
            if self._sequences >= self._batch:
                self._together.average(self._parameters)
                self._step(shared)
        return nats

    def _step(self, shared: list[Tensor]) -> None:
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self._sequences)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._sequences = 0
        self._moved = [p.data - data for p, data in zip(self._parameters, shared, strict=True)]

    def gather(self) -> None:
        if self._sequences:
            self._together.average(self._parameters)
            with self._moved_on() as shared:
                self._step(shared)
        for number, parameter in enumerate(self._parameters):
            parameter.grad = self._moved[number].neg_()
        self._moved = [torch.zeros_like(parameter) for parameter in self._parameters]


class LookAhead(InnerSteps):
    """Inner steps as above, and the mean gradient of all sequences, each taken where the steps before it had come to.

    Args:
        rate_factor: learning rate of inner steps over the replica's.
    """

    def __init__(
        self,
        model: nn.Module,
        together: Together = ALONE,
        *,
        rate_factor: float,
        batch: int,
        beta1: float,
        beta2: float,
        epsilon: float,
    ) -> None:
        super().__init__(model, together, batch=batch, beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=0.0)
        self._rate_factor = rate_factor
        #: of the gradients met, each as often as it has sequences
        self._sums = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._summed_sequences = 0

    def compute(self, loss: Callable[[], Tensor], sequences: int, rate: float) -> float:
        return super().compute(loss, sequences, self._rate_factor * rate)

    def _step(self, shared: list[Tensor]) -> None:
        self._keep()
        super()._step(shared)

    def _keep(self) -> None:
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad)
        self._summed_sequences += self._sequences

    def gather(self) -> None:
        if self._sequences:
            # No step: nothing would be computed where it leads to.
            self._together.average(self._parameters)
            self._keep()
        for number, parameter in enumerate(self._parameters):
            parameter.grad = self._sums[number].div_(max(self._summed_sequences, 1))
        self._sums = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._moved = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._sequences = self._summed_sequences = 0
