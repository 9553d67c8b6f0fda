"""Take a step of all parameters, by the replies of a round or by what one peer sent.

For each batch of chunks: decode, direction, decay, step. There are three ways to the same bits: by operations on whole
chunks (`Stepper._step_batch`), each chunk of signs where its parameter lies, and, of chunks that are not transformed
and step by rms, only the entries that move. What they compute every replica computes alike, to the bit.

Cost: each parameter, and what its direction keeps, is read and written once, in batches that a cache holds. One that is
not contiguous is copied there and back. A parameter of fewer bits than float32 has a master, of four more bytes an
entry, and each step passes over both twice more: before, to see whether anybody else has written to the parameter,
and after, to round the master into it. Torch's count of writes would not do for the first: writes through `data` do
not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression import dct
from p2ptrain.compression.layout import CHUNK_SIZE, SIDE, Batch, ChunkLayout, Piece
from p2ptrain.compression.wire import Coefficients
from p2ptrain.native.compiled import compiled
from p2ptrain.optim import groups, threads
from p2ptrain.optim.directions import Direction, Rms
from p2ptrain.optim.settling import PartReply
from p2ptrain.optim.threads import Workers, to_device


class Rate(NamedTuple):
    """Hold what one parameter's group says of this step."""

    #: size of a step
    step: float
    #: what weight decay leaves of the parameter
    kept: float


@dataclass(frozen=True, slots=True)
class _Live:
    """Tell which chunks [n] of a batch take a step: those of parts that were not skipped."""

    chunks: Tensor
    all: bool


class Stepper:
    """Step all parameters, each in its direction.

    Args:
        params: the parameters in the layout's order.
        directions: of each parameter.
        exact: integer decode (the same bits on every device), else float.
        workers: of this layout, on the parameters' device.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        params: Sequence[Tensor],
        directions: Sequence[Direction],
        workers: Workers,
        *,
        exact: bool,
    ) -> None:
        self._layout, self._params, self.directions, self._workers = layout, params, directions, workers
        self.exact = exact
        #: by number: in float32, what is stepped in place of a parameter of fewer bits
        self.masters = {
            number: parameter.detach().float().contiguous()
            for number, parameter in enumerate(params)
            if parameter.dtype in groups.NARROW
        }
        #: the parameters, their masters, or contiguous copies of them; only for the time of a step
        self._targets: list[Tensor] = []

    def apply(self, replies: Sequence[PartReply], rates: Sequence[Rate]) -> None:
        """Take the step that the replies decide, of all parameters but frozen ones; no gradient may be recorded.

        Args:
            replies: covering all chunks; None where the seal says SKIP, which leaves those chunks where they are.
            rates: of each parameter.
        """
        held = [(start, end, content) for start, end, content in replies if content is not None]
        scale = np.zeros(self._layout.chunks, np.float32)
        live = np.zeros(self._layout.chunks, bool)
        edges = np.cumsum([0, *(len(content.byte) for _, _, content in held)])
        place, value = self._workers.host_entries(int(edges[-1]))
        for start, end, content in held:
            scale[start:end], live[start:end] = content.scale, True
        for segment, parameter in zip(self._layout.segments, self._params, strict=True):
            if not parameter.requires_grad:
                scale[segment.start : segment.end], live[segment.start : segment.end] = 0, False

        def fill(_: int, number: int) -> None:
            _, _, content = held[number]
            of, here = content.coefficients, slice(edges[number], edges[number + 1])
            numbers = content.byte if self.exact else of.value
            _entries(of.chunk, of.index, numbers, scale, place.numpy()[here], value.numpy()[here])

        threads.for_each(range(len(held)), fill, min(threads.usable(), len(held)))
        self._step(place, value, scale, live, rates)

    def apply_sent(self, sent: Coefficients, live: NDArray[np.bool_], rates: Sequence[Rate]) -> None:
        """Take the step that one contribution would decide on its own, of the chunks that are `live` [chunks]."""
        place, value = self._workers.host_entries(len(sent.value))
        scale = live.astype(np.float32)
        _entries(sent.chunk, sent.index, sent.value, scale, place.numpy(), value.numpy())
        self._step(place, value, scale, live, rates)

    def _step(
        self,
        place: Tensor,
        value: Tensor,
        scale: NDArray[np.float32],
        live: NDArray[np.bool_],
        rates: Sequence[Rate],
    ) -> None:
        """Step by the coefficients `value` [n] at `place` [n], ascending, of all chunks flattened, which are on the
        host; each counts as many times its chunk's `scale` [chunks]."""
        device = self._workers.device
        starts = [CHUNK_SIZE * batch.start for batch in self._workers.batches] + [CHUNK_SIZE * self._layout.chunks]
        edges = np.searchsorted(place.numpy(), starts).tolist()
        place, values, scales, lives = (
            to_device(array, device) for array in (place.numpy(), value.numpy(), scale, live)
        )
        for direction in self.directions:
            direction.begin()
        # Views of pieces are what is written to.
        self._targets = [self._target(number) for number in range(len(self._params))]

        def take(thread: int, task: tuple[Batch, int, int]) -> None:
            batch, low, high = task
            here = slice(batch.start, batch.end)
            alive = _Live(lives[here], bool(live[here].all()))
            inside = place[low:high] - batch.start * CHUNK_SIZE
            if self._signs_at_once(batch):
                self._subtract_signs(batch, inside, values[low:high], alive, rates)
            elif batch.form == "none" and isinstance(self.directions[batch.pieces[0].number], Rms):
                self._step_entries(batch, inside, values[low:high], scales[here], alive, rates)
            else:
                self._step_batch(thread, batch, inside, values[low:high], scales[here], alive, rates)

        self._workers.for_each(list(zip(self._workers.batches, edges[:-1], edges[1:], strict=True)), take)
        for parameter, target in zip(self._params, self._targets, strict=True):
            if target is not parameter:
                parameter.copy_(target)
        self._targets = []

    def _target(self, number: int) -> Tensor:
        """Return what is stepped for a parameter, contiguous and of float32."""
        parameter, master = self._params[number], self.masters.get(number)
        if master is None:
            return parameter.contiguous()
        if not torch.equal(master.to(parameter.dtype), parameter):  # written to from elsewhere
            master.copy_(parameter)
        return master

    def _step_batch(
        self,
        thread: int,
        batch: Batch,
        place: Tensor,
        values: Tensor,
        scale: Tensor,
        live: _Live,
        rates: Sequence[Rate],
    ) -> None:
        """Decode `values` [n] at `place` [n] of a batch's chunks, direction, decay, step."""
        of_signs = self.directions[batch.pieces[0].number].of_signs
        chunks, scratch = self._workers.scratch(thread, batch.end - batch.start)
        if self.exact:
            update, unit = dct.decode_exact_entries(batch.form, place, values, chunks, scratch)
            if not of_signs:
                update.mul_((unit * scale).unsqueeze(1))
        else:
            chunks.zero_().view(-1)[place] = values
            update = dct.decode_float(batch.form, chunks)
        for piece in batch.pieces:
            here = slice(piece.start - batch.start, piece.end - batch.start)
            step = self.directions[piece.number].step_chunks(piece.first, update[here], live.chunks[here])
            self._decay(piece, live, here, rates[piece.number].kept)
            rate, blocks = rates[piece.number].step, piece.blocks(self._targets[piece.number])
            # Decay and step apart, each rounded on its own: a fused multiply-add would differ between devices, except
            # of a sign, whose product with the rate is exact.
            step, factor = (step, rate) if of_signs else (step.mul_(rate), 1.0)
            if blocks is None:
                views = piece.views(self._targets[piece.number])
                for view, entries in zip(views, piece.entries(step), strict=True):
                    view.sub_(entries, alpha=factor)
            else:
                blocks.sub_(piece.as_blocks(step), alpha=factor)

    def _signs_at_once(self, batch: Batch) -> bool:
        """Say whether a batch's step can be that of `_subtract_signs`, which touches less memory than `_step_batch`."""
        on_cpu, of_signs = self._workers.device.type == "cpu", self.directions[batch.pieces[0].number].of_signs
        whole = (piece.blocks(self._targets[piece.number]) is not None for piece in batch.pieces)
        return self.exact and on_cpu and of_signs and batch.form == "both" and all(whole)

    def _subtract_signs(self, batch: Batch, place: Tensor, values: Tensor, live: _Live, rates: Sequence[Rate]) -> None:
        """Do as `_step_batch` does, decoding each chunk where its parameter lies."""
        starts = [piece.start - batch.start for piece in batch.pieces] + [batch.end - batch.start]
        edges = np.searchsorted(place.numpy(), [CHUNK_SIZE * start for start in starts]).tolist()
        for piece, start, end, low, high in zip(batch.pieces, starts, starts[1:], edges, edges[1:], strict=False):
            self._decay(piece, live, slice(start, end), rates[piece.number].kept)
            blocks = piece.blocks(self._targets[piece.number])
            assert blocks is not None
            dct.subtract_signs(place[low:high] - CHUNK_SIZE * start, values[low:high], blocks, rates[piece.number].step)

    def _step_entries(
        self, batch: Batch, place: Tensor, values: Tensor, scale: Tensor, live: _Live, rates: Sequence[Rate]
    ) -> None:
        """Do the same with chunks that are not transformed, for all that moves."""
        edges = torch.tensor([CHUNK_SIZE * (piece.start - batch.start) for piece in batch.pieces], device=place.device)
        lows = torch.searchsorted(place, edges).tolist()
        for piece, low, high in zip(batch.pieces, lows, [*lows[1:], len(place)], strict=True):
            here = slice(piece.start - batch.start, piece.end - batch.start)
            inside, direction = place[low:high] - CHUNK_SIZE * here.start, self.directions[piece.number]
            assert isinstance(direction, Rms)
            step = direction.step_entries(piece.first, inside, values[low:high], scale[here], live.chunks[here])
            self._decay(piece, live, here, rates[piece.number].kept)
            rate, target = rates[piece.number].step, self._targets[piece.number]
            blocks = piece.blocks(target)
            if blocks is not None and blocks.device.type == "cpu":
                entries, strides = dct.entries_of(blocks).numpy(), dct.strides_of(blocks)
                _subtract_at(inside.numpy(), step.numpy(), np.float32(rate), entries, strides)
                continue
            flat, there = piece.flat(inside)
            flat = flat[there]
            parameter = target.view(-1)
            parameter[flat] = parameter[flat] - step[there].mul_(rate)

    def _decay(self, piece: Piece, live: _Live, here: slice, kept: float) -> None:
        """Take the weight decay off a piece's parameters: `kept` of them stays, where chunks are live."""
        parameter = self._targets[piece.number]
        if kept != 1 and live.all:
            for view in piece.views(parameter):
                view.mul_(kept)
        elif kept != 1:
            by_chunk = torch.where(live.chunks[here], kept, 1.0).unsqueeze(1).expand(-1, CHUNK_SIZE)
            for view, factor in zip(piece.views(parameter), piece.entries(by_chunk.contiguous()), strict=True):
                view.mul_(factor)


@compiled
def _entries(
    chunk: NDArray[np.int64],
    index: NDArray[np.int64],
    number: NDArray[Any],
    scale: NDArray[np.float32],
    place: NDArray[np.int64],
    value: NDArray[np.float32],
) -> None:
    """Write each coefficient's place [n] among all chunks flattened and its `number` [n], 0 where its chunk's scale is.

    With a scale of zero nothing moves, of which a sign would know nothing.
    """
    for entry in range(len(index)):
        place[entry] = chunk[entry] * CHUNK_SIZE + index[entry]
        value[entry] = number[entry] if scale[chunk[entry]] > 0 else 0


@compiled
def _subtract_at(
    place: NDArray[np.int64],
    step: NDArray[np.float32],
    rate: np.float32,
    parameter: NDArray[np.float32],
    plain: dct.Plain,
) -> None:
    """Take `rate` times each step [n], at `place` [n] of chunks flattened, off the `parameter` that has these
    `dct.Strides`."""
    strides = dct.Strides(*plain)
    for number in range(len(place)):
        chunk, inside = place[number] // CHUNK_SIZE, place[number] % CHUNK_SIZE
        start = dct.start_of(strides, chunk)
        parameter[start + (inside // SIDE) * strides.row + inside % SIDE] -= step[number] * rate
