"""DeMo as one writes it from the paper (Peng et al., arXiv 2411.19870, algorithm 1), to measure ours against.

With the operations of the authors' own code (github.com/bloc97/DeMo): one parameter after the other, momentum in the
parameter domain, three transforms a step (the momentum's, the inverse of what is sent, the inverse of what all sent),
one einsum over all chunks of a parameter, `torch.topk`, int64 indices and float32 values, `scatter_reduce_` to their
mean, sign. A chunk's side is the largest divisor of a dimension up to 64. `tuned` is the same with its products as two
matrix products and `scatter_add_`, the fastest that a loop over parameters was found to be.

Here the group is one peer: what all sent is what it sent, and nothing is encoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

SIDE_MAX = 64
Sent = tuple[Tensor, Tensor]
"""Indices int64 [chunks, k] and values float32 [chunks, k]."""


def side_of(entries: int) -> int:
    """The largest divisor that a chunk may have as its side."""
    return max(side for side in range(1, SIDE_MAX + 1) if entries % side == 0)


def cosines(side: int, device: torch.device) -> Tensor:
    """Orthonormal DCT-II basis [side, side]; row = frequency."""
    n = torch.arange(side, dtype=torch.float64)
    basis = torch.cos(math.pi / side * (n[None, :] + 0.5) * n[:, None]) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)
    return basis.float().to(device)


def _chunk_size(shape: torch.Size) -> int:
    """Entries of a chunk, of coefficients of this shape."""
    return shape[-1] if len(shape) == 2 else shape[-1] * shape[-2]


class StraightforwardDeMo:
    """See the module docstring."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        beta: float,
        topk: int,
        *,
        tuned: bool = False,
    ) -> None:
        self.params = list(params)
        self.lr, self.beta, self.topk, self.tuned = lr, beta, topk, tuned
        self.momentum = [torch.zeros_like(parameter) for parameter in self.params]
        sides = {(side_of(n), parameter.device) for parameter in self.params for n in parameter.shape}
        self.basis = {side: cosines(side, device) for side, device in sides}

    @torch.no_grad()
    def step(self) -> None:
        """One round of a group of one."""
        for parameter, momentum in zip(self.params, self.momentum, strict=True):
            assert parameter.grad is not None
            momentum.mul_(self.beta).add_(parameter.grad)
            coefficients = self._encode(momentum)
            sent = self._select(coefficients)
            momentum.sub_(self._decode([sent], coefficients.shape, parameter))
            received = [sent]
            parameter.sub_(self._decode(received, coefficients.shape, parameter).sign_(), alpha=self.lr)

    def _encode(self, x: Tensor) -> Tensor:
        """Coefficients: [chunks, side] of a vector, [tall, wide, side, side] of a matrix."""
        if x.dim() == 1:
            basis = self.basis[side_of(len(x))]
            return x.view(-1, len(basis)) @ basis.T
        tall, wide = (self.basis[side_of(n)] for n in x.shape)
        chunks = x.view(x.shape[0] // len(tall), len(tall), x.shape[1] // len(wide), len(wide)).transpose(1, 2)
        if self.tuned:
            return tall @ (chunks @ wide.T)
        return torch.einsum("yxrc,jr,kc->yxjk", chunks, tall, wide)

    def _select(self, coefficients: Tensor) -> Sent:
        flat = coefficients.reshape(-1, _chunk_size(coefficients.shape))
        index = flat.abs().topk(min(self.topk, flat.shape[1]), dim=1, sorted=False).indices
        return index, flat.gather(1, index)

    def _decode(self, sent: list[Sent], shape: torch.Size, like: Tensor) -> Tensor:
        """What was sent, together, in the parameter's domain and shape."""
        size = _chunk_size(shape)
        summed = torch.zeros(shape.numel() // size, size, device=like.device)
        index, value = (torch.cat(parts, 1) for parts in zip(*sent, strict=True))
        if self.tuned:
            summed.scatter_add_(1, index, value)
        else:
            summed.scatter_reduce_(1, index, value, reduce="mean", include_self=False)
        if len(shape) == 2:
            return (summed @ self.basis[shape[-1]]).view(like.shape)
        chunks = summed.view(shape)
        tall, wide = self.basis[shape[-2]], self.basis[shape[-1]]
        out = tall.T @ (chunks @ wide) if self.tuned else torch.einsum("yxjk,jr,kc->yxrc", chunks, tall, wide)
        return out.transpose(1, 2).reshape(like.shape)
