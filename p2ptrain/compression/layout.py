"""Where each parameter's entries lie among the chunks.

A parameter of two or more dimensions is seen as a matrix [shape[0], rest] and cut into 64x64 chunks, padded with zeros
at its right and lower edges. A vector or scalar is cut into segments of 64, 64 of them to a chunk. Padding makes any
shape work (a prime side has no useful divisor), and one chunk size for everything lets the transform, the selection
and the codec run over all parameters in one batch; the price is momentum for the padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SIDE = 64
CHUNK_SIZE = SIDE * SIDE

Kind = Literal["matrix", "embedding", "head", "vector"]
Transform = Literal["dct", "none"]


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """Name, shape and kind of one parameter; the kind decides how it is treated."""

    name: str
    shape: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """How parameters of one kind are compressed and stepped."""

    transform: Transform
    direction: str
    learning_rate_scale: float
    topk: int
    """Coefficients a member sends per chunk."""
    reply_topk: int
    """Coefficients a reducer keeps per chunk, at most."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The chunks [start, end) of one parameter."""

    spec: ParameterSpec
    treatment: Treatment
    start: int
    end: int
    rows: int
    """Rows and columns of the parameter as a matrix; a vector has one row."""
    columns: int

    @property
    def is_vector(self) -> bool:
        """Laid out in segments of 64, and transformed along rows only."""
        return len(self.spec.shape) < 2


class ChunkLayout:
    """Maps parameters, in order, to chunks; a pure function of specs and treatments.

    Args:
        specs: the parameters in the order in which every peer holds them.
        treatments: by kind.
    """

    def __init__(self, specs: Sequence[ParameterSpec], treatments: Mapping[str, Treatment]) -> None:
        segments, start = [], 0
        for spec in specs:
            if len(spec.shape) < 2:
                rows, columns = 1, max(1, math.prod(spec.shape))
                count = math.ceil(columns / CHUNK_SIZE)
            else:
                rows, columns = spec.shape[0], math.prod(spec.shape[1:])
                count = math.ceil(rows / SIDE) * math.ceil(columns / SIDE)
            segments.append(Segment(spec, treatments[spec.kind], start, start + count, rows, columns))
            start += count
        self.segments: tuple[Segment, ...] = tuple(segments)
        self.chunks = start
        self.topk = self._per_chunk(lambda t: t.topk)
        self.reply_topk = self._per_chunk(lambda t: t.reply_topk)
        vector = torch.zeros(start, dtype=torch.bool)
        identity = torch.zeros(start, dtype=torch.bool)
        for segment in segments:
            vector[segment.start : segment.end] = segment.is_vector
            identity[segment.start : segment.end] = segment.treatment.transform == "none"
        #: chunks to transform in two dimensions, in one, and not at all
        self.matrix_chunks = torch.nonzero(~vector & ~identity).flatten()
        self.row_chunks = torch.nonzero(vector & ~identity).flatten()
        self.plain_chunks = torch.nonzero(identity).flatten()

    def _per_chunk(self, of: Callable[[Treatment], int]) -> tuple[int, ...]:
        values: list[int] = []
        for segment in self.segments:
            values += [of(segment.treatment)] * (segment.end - segment.start)
        return tuple(values)

    def gather(self, tensors: Sequence[Tensor | None], out: Tensor) -> Tensor:
        """Copy parameter-shaped tensors into chunks; None counts as zeros.

        Args:
            tensors: one per segment, in order.
            out: [chunks, 64 * 64], overwritten.
        """
        out.zero_()
        for segment, tensor in zip(self.segments, tensors, strict=True):
            if tensor is None:
                continue
            block = out[segment.start : segment.end]
            if segment.is_vector:
                block.view(-1)[: segment.columns].copy_(tensor.reshape(-1))
                continue
            tall, wide = math.ceil(segment.rows / SIDE), math.ceil(segment.columns / SIDE)
            matrix = tensor.reshape(segment.rows, segment.columns)
            if (segment.rows % SIDE, segment.columns % SIDE) != (0, 0):
                pad = (0, wide * SIDE - segment.columns, 0, tall * SIDE - segment.rows)
                matrix = torch.nn.functional.pad(matrix, pad)
            block.view(tall, wide, SIDE, SIDE).copy_(matrix.reshape(tall, SIDE, wide, SIDE).transpose(1, 2))
        return out

    def extract(self, segment: Segment, chunks: Tensor) -> Tensor:
        """The parameter-shaped tensor that lies in `chunks` [all chunks, 64 * 64]; it may share their memory."""
        block = chunks[segment.start : segment.end]
        if segment.is_vector:
            return block.reshape(-1)[: segment.columns].reshape(segment.spec.shape)
        tall, wide = math.ceil(segment.rows / SIDE), math.ceil(segment.columns / SIDE)
        matrix = block.view(tall, wide, SIDE, SIDE).transpose(1, 2).reshape(tall * SIDE, wide * SIDE)
        return matrix[: segment.rows, : segment.columns].reshape(segment.spec.shape)
