"""Gather gradients in the momentum, and select the largest coefficients of every chunk, which leave it.

Both happen at once (`Gatherer.accumulate_and_select`) or one after the other. What leaves is the quantised value, so
the rounding stays in the momentum for another round. Of a frozen parameter nothing leaves.

Cost: the momentum is passed through once, for both phases where they come together, and the gradient once. Kernels
(`compression/kernels/`) read the gradient where it lies, if it is of float32 and whole chunks can be seen in it;
otherwise a thread copies a piece of it to its scratch. Beyond that there are the coefficients selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression import dct, selection
from p2ptrain.compression.kernels import cpu as kernels_cpu
from p2ptrain.compression.layout import SIDE, Batch, ChunkLayout, Piece
from p2ptrain.compression.wire import Coefficients
from p2ptrain.optim.threads import Workers, to_device


def gradient_of(parameter: Tensor) -> Tensor | None:
    """Return what the momentum gets of a parameter: of a frozen one nothing."""
    return parameter.grad if parameter.requires_grad else None


def _send_nothing(index: Tensor, value: Tensor, count: int) -> None:
    """Write what is selected from a frozen parameter: zeros, as every chunk sends the same `count`."""
    index.view(-1, count).copy_(torch.arange(count, device=index.device))
    value.zero_()


class Gatherer:
    """Add parameters' gradients to a momentum [chunks, 64 * 64], and select from it.

    Args:
        params: the parameters in the layout's order.
        workers: of this layout, on the parameters' device.
    """

    def __init__(self, layout: ChunkLayout, params: Sequence[Tensor], workers: Workers) -> None:
        self._layout, self._params, self._workers = layout, params, workers
        #: [sum of topk] chunk of each coefficient sent; the same on the device
        self._chunk = np.repeat(np.arange(layout.chunks), layout.topk)
        self._chunk_there = to_device(self._chunk, workers.device)

    def chunk_there(self, chunk: NDArray[np.int64]) -> Tensor | None:
        """Return these coefficients' chunks on the device, if they are those of what was selected here."""
        return self._chunk_there if chunk is self._chunk else None

    def accumulate(self, momentum: Tensor, beta: float) -> None:
        """Decay the momentum by `beta` and add the gradients to it."""
        self._workers.for_each(
            self._workers.batches, lambda thread, batch: self._accumulate_batch(thread, batch, momentum, beta)
        )

    def select(self, momentum: Tensor, value_bits: int) -> Coefficients:
        """Move the top-k of every chunk, as quantised, out of the momentum."""
        return self._selected(momentum, None, value_bits)

    def accumulate_and_select(self, momentum: Tensor, beta: float, value_bits: int) -> Coefficients:
        """Do one after the other, in a single pass over the momentum."""
        return self._selected(momentum, beta, value_bits)

    def _selected(self, momentum: Tensor, beta: float | None, value_bits: int) -> Coefficients:
        """Return what is selected from each batch, which accumulates before where `beta` is given."""
        device, topk = momentum.device, self._layout.topk
        index = torch.empty(len(self._chunk), dtype=torch.int64, device=device)
        value = torch.empty(len(self._chunk), device=device)
        kernels = None if beta is None else dct.kernels_for(device.type)

        def take(thread: int, task: tuple[Batch, int]) -> None:
            batch, low = task
            if beta is not None:
                if kernels is not None and value_bits in kernels.VALUE_BITS:
                    into = index[low:], value[low:]
                    self._accumulate_and_take(kernels, thread, batch, momentum, beta, value_bits, *into)
                    return
                self._accumulate_batch(thread, batch, momentum, beta)
            count = topk[batch.start]  # of all chunks of a batch
            for start, end, frozen in self._stretches(batch):
                here = slice(low + (start - batch.start) * count, low + (end - batch.start) * count)
                if frozen:
                    _send_nothing(index[here], value[here], count)
                    continue
                place, sent = selection.take(momentum[start:end], count, value_bits)
                index[here], value[here] = place.flatten(), sent.flatten()

        batches = self._workers.batches
        edges = np.searchsorted(self._chunk, [batch.start for batch in batches]).tolist()
        self._workers.for_each(list(zip(batches, edges, strict=True)), take)
        if device.type != "cpu":
            hosts = self._workers.host_entries(len(index))
            for host, tensor in zip(hosts, (index, value), strict=True):
                host.copy_(tensor)
            index, value = hosts
        return Coefficients(0, self._layout.chunks, self._chunk, index.numpy(), value.numpy())

    def _stretches(self, batch: Batch) -> list[tuple[int, int, bool]]:
        """Return a batch's chunks [start, end) and whether their parameter is frozen: one stretch where none is."""
        frozen = [not self._params[piece.number].requires_grad for piece in batch.pieces]
        if not any(frozen):
            return [(batch.start, batch.end, False)]
        return [(piece.start, piece.end, still) for piece, still in zip(batch.pieces, frozen, strict=True)]

    def _accumulate_batch(self, thread: int, batch: Batch, momentum: Tensor, beta: float) -> None:
        if momentum.device.type == "cpu":
            for piece in batch.pieces:
                of_piece = momentum[piece.start : piece.end]
                kernels_cpu.accumulate(batch.form, self._gradient(thread, piece), of_piece, beta)
            return
        blocks, scratch = self._workers.scratch(thread, batch.end - batch.start)
        for piece in batch.pieces:
            self._read(piece, blocks[piece.start - batch.start : piece.end - batch.start])
        dct.accumulate(batch.form, blocks, momentum[batch.start : batch.end], beta, scratch)

    def _accumulate_and_take(
        self,
        kernels: ModuleType,
        thread: int,
        batch: Batch,
        momentum: Tensor,
        beta: float,
        value_bits: int,
        index: Tensor,
        value: Tensor,
    ) -> None:
        """Do both for a batch in one pass; what is taken goes to the beginning of `index` and `value`."""
        low, count = 0, self._layout.topk[batch.start]
        for piece in batch.pieces:
            here, of_piece = slice(low, low + (piece.end - piece.start) * count), momentum[piece.start : piece.end]
            low = here.stop
            if not self._params[piece.number].requires_grad:
                of_piece.mul_(beta)
                _send_nothing(index[here], value[here], count)
                continue
            kernels.accumulate_and_take(
                batch.form,
                self._gradient(thread, piece),
                of_piece,
                beta,
                count,
                value_bits,
                index[here],
                value[here],
            )

    def _read(self, piece: Piece, chunks: Tensor) -> None:
        """Copy a piece's gradient to `chunks` [piece.end - piece.start, 64 * 64]."""
        gradient = gradient_of(self._params[piece.number])
        if gradient is None:
            chunks.zero_()
        else:
            piece.read(gradient, chunks)

    def _gradient(self, thread: int, piece: Piece) -> Tensor:
        """Return a piece's gradient [tall, wide, 64, 64] where it lies, or a copy in the thread's scratch."""
        gradient = gradient_of(self._params[piece.number])
        blocks = None if gradient is None else piece.blocks(gradient)
        if blocks is not None and blocks.dtype == torch.float32:
            return blocks
        copy = self._workers.scratch(thread, piece.end - piece.start)[0]
        self._read(piece, copy)
        return copy.view(len(copy), 1, SIDE, SIDE)
