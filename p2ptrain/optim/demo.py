"""DeMo: decoupled momentum, whose largest DCT coefficients are all that peers exchange.

Peng et al., arXiv 2411.19870. The momentum lives in the DCT domain, [chunks, 64 * 64] for all parameters at once: the
transform is linear and orthonormal, so taking out what is sent means subtracting entries, and a step needs two
transforms, not three (the gradient in, the reply out).

In a swarm a round is `accumulate` (once or more), `select`, exchange, `apply`, `settle`. Alone, `step()` does all of it
with a group of one. With `value_bits=32, exact=False, reply_topk=None` a lone step is the paper's rule; the learning
rate multiplies the step, not the gradient, which is the same under a constant rate, because the sign drops scale.

As an optimizer of torch it keeps torch's conventions: closures, hooks, schedulers, named parameters, copies, and a
state that goes through `torch.save`. Two things are its own.

- A frozen parameter stays exactly as it is: no step, no decay. Frozen is one that does not require a gradient, and in a
  lone step also one without a gradient. What its momentum holds decays and waits. In a swarm a peer without a gradient
  follows what the others found, so there only `requires_grad` counts, and all peers hold it alike.
- Groups are those that the optimizer is made with: chunks are numbered through all parameters, and every peer, every
  contribution under way and every saved state counts on these numbers.

Cost: one momentum plus a few batches of chunks beyond the gradient. Whatever is as large as the model (gradient,
momentum, parameters) is passed through once a phase, in batches of chunks that a cache holds from the gradient to the
momentum, and from the reply to the parameters; threads take whole batches (`threads.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression import dct, selection, wire
from p2ptrain.compression.kernels import cpu as kernels_cpu
from p2ptrain.compression.layout import CHUNK_SIZE, SIDE, Batch, ChunkLayout, ParameterSpec, Piece, Treatment
from p2ptrain.compression.reduce import reply_to_one
from p2ptrain.compression.wire import Coefficients, ReplyContent
from p2ptrain.native.compiled import compiled
from p2ptrain.optim import groups, threads
from p2ptrain.optim.directions import DIRECTIONS, MOMENTUM, Direction, Rms

T = TypeVar("T")
_COPIED = frozenset(
    {
        "_settings",
        "beta",
        "value_bits",
        "exact",
        "_params",
        "_group_of",
        "_names",
        "layout",
        "momentum",
        "_batch_chunks",
        "_batches",
        "_scratch_shape",
        "_masters",
        "_chunk",
        "_chunk_there",
        "_directions",
        "_decays",
    }
)
"""Attributes that copies of an optimizer take along, beside torch's."""
_CPU_BATCH_CHUNKS, _DEVICE_BATCH_CHUNKS = 256, 8192
"""On a CPU 4 MiB, of which a thread holds two. Smaller ones lie in nearer caches, but threads then spend more on
Python's lock than that gains: with two, a step took 113, 108, 95 and 93 ms at 64, 128, 256 and 512 chunks."""


@dataclass(slots=True)
class Pending:
    """What left the momentum with a contribution and is not settled yet."""

    sent: Coefficients
    #: how many decays this momentum had been through when it was sent
    decays: int


@dataclass(frozen=True, slots=True)
class Settled:
    """What `settle` did, so that `unsettle` can undo it."""

    pending: Pending
    #: [n] whether a coefficient was consumed
    kept: NDArray[np.bool_]
    #: (first, end, factor in 256ths) of coefficients that were clipped before they were consumed
    clips: tuple[tuple[int, int, int], ...]

    def consumed(self, value: Tensor) -> Tensor:
        """[n] what the group used of the `value` [n] that was sent, on its device."""
        used = torch.where(_to_device(self.kept, value.device), value, 0.0)
        for first, end, factor in self.clips:
            used[first:end] *= factor / 256
        return used

    @property
    def consumed_share(self) -> float:
        """Share of the sent norm that was consumed, for display."""
        value = torch.from_numpy(self.pending.sent.value)
        whole = float(value.abs().sum())
        return float(self.consumed(value).abs_().sum()) / whole if whole else 0.0


@dataclass(frozen=True, slots=True)
class _Live:
    """Which chunks [n] of a batch take a step: those of parts that were not skipped."""

    chunks: Tensor
    all: bool


PartReply = tuple[int, int, ReplyContent | None]
"""First chunk, end chunk, reply or None for a SKIP."""


class DeMo(torch.optim.Optimizer):
    """See the module docstring.

    Args:
        params: parameters of float32, bfloat16 or float16 (of the last two a float32 master is what is stepped), pairs
            of name and parameter, or groups of either. A group may override `lr`, `weight_decay`, `transform`,
            `direction`, `topk` and `reply_topk`, and set a `learning_rate_scale` (default 1).
        lr: size of a step of direction `sign`; a number, or a tensor of one.
        beta: momentum decay a round. One value for all groups: the momentum is one tensor.
        weight_decay: decoupled, times lr.
        transform: "dct" or "none".
        direction: see `directions.DIRECTIONS`.
        topk: coefficients sent per chunk of 4096.
        reply_topk: coefficients kept per chunk of a reply; None: all. A lone step that is not exact keeps all.
        value_bits: 1, 2, 8, or 32 for unquantised values.
        exact: integer decode (the same bits on every device), else float.

    Raises:
        ValueError: a parameter, an option or a setting that there is not, or that is out of range, by its name.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        beta: float = 0.99,
        weight_decay: float = 0.0,
        transform: str = "dct",
        direction: str = "sign",
        topk: int = 32,
        reply_topk: int | None = None,
        value_bits: int = 2,
        exact: bool = True,
        rms_beta: float = 0.95,
        rms_epsilon: float = 1e-8,
        direction_momentum: float = MOMENTUM,
    ) -> None:
        self._settings: dict[str, Any] = {
            "beta": beta,
            "value_bits": value_bits,
            "exact": exact,
            "rms_beta": rms_beta,
            "rms_epsilon": rms_epsilon,
            "direction_momentum": direction_momentum,
        }
        groups.check_settings(self._settings)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "transform": transform,
            "direction": direction,
            "topk": topk,
            "reply_topk": reply_topk,
            "learning_rate_scale": 1.0,
        }
        super().__init__(params, defaults)
        self.beta, self.value_bits, self.exact = beta, value_bits, exact
        self._params: list[Tensor] = [parameter for group in self.param_groups for parameter in group["params"]]
        #: by parameter: the number of its group; the groups themselves are replaced by `load_state_dict`
        self._group_of = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        #: what each parameter is called in errors
        self._names = groups.names_of(self.param_groups)
        directions = [self.param_groups[number]["direction"] for number in self._group_of]
        groups.check_parameters(self._names, self._params, directions)
        treatments = {
            f"group{number}": Treatment(
                transform=group["transform"],
                direction=group["direction"],
                learning_rate_scale=float(group["learning_rate_scale"]),
                topk=int(group["topk"]),
                reply_topk=int(group["reply_topk"] or CHUNK_SIZE),
            )
            for number, group in enumerate(self.param_groups)
        }
        specs = [
            ParameterSpec(name, tuple(parameter.shape), f"group{number}")  # type: ignore[arg-type]
            for name, parameter, number in zip(self._names, self._params, self._group_of, strict=True)
        ]
        self.layout = ChunkLayout(specs, treatments)
        device = self._params[0].device
        self.momentum = torch.zeros(self.layout.chunks, CHUNK_SIZE, device=device)
        self._batch_chunks = _CPU_BATCH_CHUNKS if device.type == "cpu" else _DEVICE_BATCH_CHUNKS
        self._batches = self.layout.batches(self._batch_chunks)
        most = max(batch.end - batch.start for batch in self._batches)
        self._scratch_shape = (2, most, CHUNK_SIZE)
        #: by number: in float32, what is stepped in place of a parameter of fewer bits
        self._masters = {
            number: parameter.detach().float().contiguous()
            for number, parameter in enumerate(self._params)
            if parameter.dtype in groups.NARROW
        }
        #: the parameters, their masters, or contiguous copies of them for the time of a step
        self._targets: list[Tensor] = []
        #: for each thread, values of a batch and what is made of them
        self._scratch: list[Tensor] = []
        #: [sum of topk] chunk of each coefficient sent; the same on the device
        self._chunk = np.repeat(np.arange(self.layout.chunks), self.layout.topk)
        self._chunk_there = _to_device(self._chunk, device)
        self._directions: list[Direction] = [
            DIRECTIONS[segment.treatment.direction](
                self.layout, segment, rms_beta, rms_epsilon, device, direction_momentum
            )
            for segment in self.layout.segments
        ]
        self._decays = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as the constructor does for each that it is given.

        Raises:
            RuntimeError: the optimizer is made already.
        """
        if "layout" in self.__dict__:
            raise RuntimeError(
                "DeMo takes no group after it is made: chunks are numbered through all parameters, and peers, "
                "contributions under way and saved states count on these numbers. Make a new DeMo of all groups, or "
                "hold the parameters from the beginning and freeze them (requires_grad=False) until their time."
            )
        super().add_param_group(param_group)
        groups.check_group(len(self.param_groups) - 1, self.param_groups[-1], self.defaults)

    # ---- a round, in order ------------------------------------------------------------------------------------

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients (means over the sequences computed) to the momentum, after one decay of it."""
        groups.check_gradients(self._names, self._params)
        self._for_each(self._batches, self._accumulate_batch)
        self._decays += 1

    def _accumulate_batch(self, thread: int, batch: Batch) -> None:
        if self.momentum.device.type == "cpu":
            for piece in batch.pieces:
                momentum = self.momentum[piece.start : piece.end]
                kernels_cpu.accumulate(batch.form, self._gradient(thread, piece), momentum, self.beta)
            return
        blocks, scratch = self._scratch[thread][:, : batch.end - batch.start]
        for piece in batch.pieces:
            self._read(piece, blocks[piece.start - batch.start : piece.end - batch.start])
        dct.accumulate(batch.form, blocks, self.momentum[batch.start : batch.end], self.beta, scratch)

    def _gradient_of(self, number: int) -> Tensor | None:
        parameter = self._params[number]
        return parameter.grad if parameter.requires_grad else None

    def _read(self, piece: Piece, chunks: Tensor) -> None:
        """Copy a piece's gradient to `chunks` [piece.end - piece.start, 64 * 64]."""
        gradient = self._gradient_of(piece.number)
        if gradient is None:
            chunks.zero_()
        else:
            piece.read(gradient, chunks)

    def _gradient(self, thread: int, piece: Piece) -> Tensor:
        """A piece's gradient [tall, wide, 64, 64] where it lies, or a copy in the thread's scratch."""
        gradient = self._gradient_of(piece.number)
        blocks = None if gradient is None else piece.blocks(gradient)
        if blocks is not None and blocks.dtype == torch.float32:
            return blocks
        copy = self._scratch[thread][0, : piece.end - piece.start]
        self._read(piece, copy)
        return copy.view(len(copy), 1, SIDE, SIDE)

    @torch.no_grad()
    def select(self) -> Pending:
        """Move the top-k of every chunk, as quantised, out of the momentum."""
        return self._selected(lambda thread, batch: None)

    @torch.no_grad()
    def accumulate_and_select(self) -> Pending:
        """One after the other, in a single pass over the momentum."""
        groups.check_gradients(self._names, self._params)
        self._decays += 1
        return self._selected(self._accumulate_batch, fused=True)

    def _selected(self, before: Callable[[int, Batch], None], *, fused: bool = False) -> Pending:
        """What is selected from each batch after `before`.

        Args:
            fused: `before` is `_accumulate_batch`, so that a device's kernels may do both at once.
        """
        device, topk = self.momentum.device, self.layout.topk
        index = torch.empty(len(self._chunk), dtype=torch.int64, device=device)
        value = torch.empty(len(self._chunk), device=device)
        kernels = dct.kernels_for(device.type) if fused else None

        def take(thread: int, task: tuple[Batch, int]) -> None:
            batch, low = task
            if kernels is not None and self.value_bits in kernels.VALUE_BITS:
                self._accumulate_and_take(kernels, thread, batch, index[low:], value[low:])
                return
            before(thread, batch)
            count = topk[batch.start]  # of all chunks of a batch
            for start in range(batch.start, batch.end, self._batch_chunks):
                chunks = self.momentum[start : min(start + self._batch_chunks, batch.end)]
                here = slice(low, low + len(chunks) * count)
                place, sent = selection.take(chunks, count, self.value_bits)
                index[here], value[here] = place.flatten(), sent.flatten()
                low = here.stop

        edges = np.searchsorted(self._chunk, [batch.start for batch in self._batches]).tolist()
        self._for_each(list(zip(self._batches, edges, strict=True)), take)
        if device.type != "cpu":
            hosts = self._host_entries(len(index))
            for host, tensor in zip(hosts, (index, value), strict=True):
                host.copy_(tensor)
            index, value = hosts
        return Pending(Coefficients(0, self.layout.chunks, self._chunk, index.numpy(), value.numpy()), self._decays)

    def _accumulate_and_take(
        self, kernels: ModuleType, thread: int, batch: Batch, index: Tensor, value: Tensor
    ) -> None:
        """A batch in one pass; what is taken goes to the beginning of `index` and `value`."""
        low, count = 0, self.layout.topk[batch.start]
        for piece in batch.pieces:
            here = slice(low, low + (piece.end - piece.start) * count)
            kernels.accumulate_and_take(
                batch.form,
                self._gradient(thread, piece),
                self.momentum[piece.start : piece.end],
                self.beta,
                count,
                self.value_bits,
                index[here],
                value[here],
            )
            low = here.stop

    def _for_each(self, items: Sequence[T], work: Callable[[int, T], None]) -> None:
        """Call work(thread, item), with scratch for each thread."""
        device = self.momentum.device
        count = threads.usable() if device.type == "cpu" else 1
        while len(self._scratch) < count:
            self._scratch.append(torch.empty(self._scratch_shape, device=device))
        threads.for_each(items, work, count)

    def payloads(self, pending: Pending, ranges: Sequence[tuple[int, int]]) -> tuple[bytes, ...]:
        """The contributions for chunks [start, end), of each of `ranges`."""
        payloads = [b""] * len(ranges)

        def encode(_: int, number: int) -> None:
            part = pending.sent.cut(*ranges[number])
            payloads[number] = wire.encode_contribution(part, self.layout.topk, self.value_bits)

        threads.for_each(range(len(ranges)), encode, min(threads.usable(), len(ranges)))
        return tuple(payloads)

    @torch.no_grad()
    def apply(self, replies: Sequence[PartReply], learning_rate: float | None = None) -> None:
        """Take the step that the replies decide: decode, direction, decay, step.

        Args:
            replies: covering all chunks; None where the seal says SKIP, which leaves those chunks where they are.
            learning_rate: before each group's scale; default: each group's own `lr`.
        """
        held = [(start, end, content) for start, end, content in replies if content is not None]
        scale = np.zeros(self.layout.chunks, np.float32)
        live = np.zeros(self.layout.chunks, bool)
        edges = np.cumsum([0, *(len(content.byte) for _, _, content in held)])
        place, value = self._host_entries(int(edges[-1]))
        for start, end, content in held:
            scale[start:end], live[start:end] = content.scale, True
        for segment, parameter in zip(self.layout.segments, self._params, strict=True):
            if not parameter.requires_grad:
                scale[segment.start : segment.end], live[segment.start : segment.end] = 0, False

        def fill(_: int, number: int) -> None:
            _, _, content = held[number]
            of, here = content.coefficients, slice(edges[number], edges[number + 1])
            numbers = content.byte if self.exact else of.value
            _entries(of.chunk, of.index, numbers, scale, place.numpy()[here], value.numpy()[here])

        threads.for_each(range(len(held)), fill, min(threads.usable(), len(held)))
        self._step(place, value, scale, live, learning_rate)

    def _host_entries(self, count: int) -> tuple[Tensor, Tensor]:
        """Room on the host for `count` places and values, where CUDA's copies are fastest."""
        pinned = self.momentum.device.type == "cuda"
        return torch.empty(count, dtype=torch.int64, pin_memory=pinned), torch.empty(count, pin_memory=pinned)

    def _step(
        self,
        place: Tensor,
        value: Tensor,
        scale: NDArray[np.float32],
        live: NDArray[np.bool_],
        learning_rate: float | None,
    ) -> None:
        """Step by the coefficients `value` [n] at `place` [n], ascending, of all chunks flattened, which are on the
        host; each counts as many times its chunk's `scale` [chunks]."""
        device = self.momentum.device
        starts = [CHUNK_SIZE * batch.start for batch in self._batches] + [CHUNK_SIZE * self.layout.chunks]
        edges = np.searchsorted(place.numpy(), starts).tolist()
        place, values, scales, lives = (
            _to_device(array, device) for array in (place.numpy(), value.numpy(), scale, live)
        )
        for direction in self._directions:
            direction.begin()
        # Views of pieces are what is written to.
        self._targets = [self._target(number) for number in range(len(self._params))]

        def take(thread: int, task: tuple[Batch, int, int]) -> None:
            batch, low, high = task
            here = slice(batch.start, batch.end)
            alive = _Live(lives[here], bool(live[here].all()))
            inside = place[low:high] - batch.start * CHUNK_SIZE
            if self._signs_at_once(batch):
                self._subtract_signs(batch, inside, values[low:high], alive, learning_rate)
            elif batch.form == "none" and isinstance(self._directions[batch.pieces[0].number], Rms):
                self._step_entries(batch, inside, values[low:high], scales[here], alive, learning_rate)
            else:
                self._step_batch(thread, batch, inside, values[low:high], scales[here], alive, learning_rate)

        self._for_each(list(zip(self._batches, edges[:-1], edges[1:], strict=True)), take)
        for parameter, target in zip(self._params, self._targets, strict=True):
            if target is not parameter:
                parameter.copy_(target)

    def _target(self, number: int) -> Tensor:
        """What is stepped for a parameter, contiguous and of float32."""
        parameter, master = self._params[number], self._masters.get(number)
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
        learning_rate: float | None,
    ) -> None:
        """Decode `values` [n] at `place` [n] of a batch's chunks, direction, decay, step."""
        of_signs = self._directions[batch.pieces[0].number].of_signs
        chunks, scratch = self._scratch[thread][:, : batch.end - batch.start]
        if self.exact:
            update, unit = dct.decode_exact_entries(batch.form, place, values, chunks, scratch)
            if not of_signs:
                update.mul_((unit * scale).unsqueeze(1))
        else:
            chunks.zero_().view(-1)[place] = values
            update = dct.decode_float(batch.form, chunks)
        for piece in batch.pieces:
            here = slice(piece.start - batch.start, piece.end - batch.start)
            step = self._directions[piece.number].step_chunks(piece.first, update[here], live.chunks[here])
            rate, blocks = self._decay(piece, live, here, learning_rate), piece.blocks(self._targets[piece.number])
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
        """Whether `_subtract_signs` can take a batch's step, which reads and writes less than `_step_batch` does."""
        on_cpu, of_signs = self.momentum.device.type == "cpu", self._directions[batch.pieces[0].number].of_signs
        whole = (piece.blocks(self._targets[piece.number]) is not None for piece in batch.pieces)
        return self.exact and on_cpu and of_signs and batch.form == "both" and all(whole)

    def _subtract_signs(
        self, batch: Batch, place: Tensor, values: Tensor, live: _Live, learning_rate: float | None
    ) -> None:
        """As `_step_batch`, decoding each chunk where its parameter lies."""
        starts = [piece.start - batch.start for piece in batch.pieces] + [batch.end - batch.start]
        edges = np.searchsorted(place.numpy(), [CHUNK_SIZE * start for start in starts]).tolist()
        for piece, start, end, low, high in zip(batch.pieces, starts, starts[1:], edges, edges[1:], strict=False):
            rate = self._decay(piece, live, slice(start, end), learning_rate)
            blocks = piece.blocks(self._targets[piece.number])
            assert blocks is not None
            dct.subtract_signs(place[low:high] - CHUNK_SIZE * start, values[low:high], blocks, rate)

    def _step_entries(
        self, batch: Batch, place: Tensor, values: Tensor, scale: Tensor, live: _Live, learning_rate: float | None
    ) -> None:
        """The same, of chunks that are not transformed, for all that moves."""
        edges = torch.tensor([CHUNK_SIZE * (piece.start - batch.start) for piece in batch.pieces], device=place.device)
        lows = torch.searchsorted(place, edges).tolist()
        for piece, low, high in zip(batch.pieces, lows, [*lows[1:], len(place)], strict=True):
            here = slice(piece.start - batch.start, piece.end - batch.start)
            inside, direction = place[low:high] - CHUNK_SIZE * here.start, self._directions[piece.number]
            assert isinstance(direction, Rms)
            step = direction.step_entries(piece.first, inside, values[low:high], scale[here], live.chunks[here])
            rate, target = self._decay(piece, live, here, learning_rate), self._targets[piece.number]
            blocks = piece.blocks(target)
            if blocks is not None and blocks.device.type == "cpu":
                entries, strides = dct.entries_of(blocks).numpy(), dct.strides_of(blocks)
                _subtract_at(inside.numpy(), step.numpy(), np.float32(rate), entries, strides)
                continue
            flat, there = piece.flat(inside)
            flat = flat[there]
            parameter = target.view(-1)
            parameter[flat] = parameter[flat] - step[there].mul_(rate)

    def _decay(self, piece: Piece, live: _Live, here: slice, learning_rate: float | None) -> float:
        """Take the weight decay off a piece's parameters; returns the rate."""
        group, parameter = self.param_groups[self._group_of[piece.number]], self._targets[piece.number]
        rate = float(group["lr"] if learning_rate is None else learning_rate) * float(group["learning_rate_scale"])
        decay = 1 - rate * float(group["weight_decay"])
        if decay != 1 and live.all:
            for view in piece.views(parameter):
                view.mul_(decay)
        elif decay != 1:
            by_chunk = torch.where(live.chunks[here], decay, 1.0).unsqueeze(1).expand(-1, CHUNK_SIZE)
            for view, factor in zip(piece.views(parameter), piece.entries(by_chunk.contiguous()), strict=True):
                view.mul_(factor)
        return rate

    @torch.no_grad()
    def settle(self, pending: Pending, replies: Sequence[PartReply], index: int | None) -> Settled:
        """Consume what the sealed replies used of a contribution; everything else returns to the momentum.

        Args:
            index: our place among that round's members; None: we were none, all returns.
        """
        sent = pending.sent
        kept = np.zeros(len(sent.value), bool)
        found: list[tuple[int, int, ReplyContent]] = []
        clips = []
        for start, end, content in replies:
            if content is None or index is None or index not in content.included:
                continue
            low, high = (int(edge) for edge in np.searchsorted(sent.chunk, (start, end)))
            found.append((low, high, content))
            if index in content.clips:
                clips.append((low, high, content.clips[index]))

        def mark(_: int, of: tuple[int, int, ReplyContent]) -> None:
            here, theirs = slice(of[0], of[1]), of[2].coefficients
            _in_both(sent.chunk[here], sent.index[here], theirs.chunk, theirs.index, kept[here])

        threads.for_each(found, mark, min(threads.usable(), len(found)))
        settled = Settled(pending, kept, tuple(clips))
        self.settle_again(settled)
        return settled

    @torch.no_grad()
    def settle_again(self, settled: Settled) -> None:
        """What a settle returned goes into the momentum."""
        self._add_returned(settled, 1.0)

    @torch.no_grad()
    def unsettle(self, settled: Settled) -> Pending:
        """Undo a settle: what it returned leaves the momentum again, and the contribution is pending as before."""
        self._add_returned(settled, -1.0)
        return settled.pending

    def _add_returned(self, settled: Settled, sign: float) -> None:
        sent, device = settled.pending.sent, self.momentum.device
        factor = sign * self.beta ** (self._decays - settled.pending.decays)
        if device.type == "cpu":
            returned = sent.value - settled.consumed(torch.from_numpy(sent.value)).numpy()
            _add(self.momentum.numpy(), sent.chunk, sent.index, returned, np.float32(factor))
            return
        chunk = self._chunk_there if sent.chunk is self._chunk else _to_device(sent.chunk, device)
        index, value = _to_device(sent.index, device), _to_device(sent.value, device)
        returned = (value - settled.consumed(value)).mul_(factor)
        self.momentum.view(-1).index_add_(0, chunk * CHUNK_SIZE + index, returned)

    @torch.no_grad()
    def restore_sent(self, sent: Coefficients, decays: int) -> Pending:
        """After a crash: account for what was sent after the momentum at hand was saved.

        Of an entry that was sent only the rounding stayed behind: it is zeroed. What was gathered in between is lost.

        Args:
            decays: of the momentum, at the time of sending.
        """
        self.momentum.mul_(self.beta ** max(0, decays - self._decays))
        self._decays = max(decays, self._decays)
        self.momentum[torch.from_numpy(sent.chunk), torch.from_numpy(sent.index)] = 0
        return Pending(sent, decays)

    @property
    def decays(self) -> int:
        """How many decays the momentum has been through."""
        return self._decays

    @decays.setter
    def decays(self, decays: int) -> None:
        self._decays = decays

    def give_back(self, pending: Pending) -> None:
        """Return all of a contribution that no seal can include any more."""
        self.settle(pending, (), None)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One round of a group of one, which needs no bytes for it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pending = self.accumulate_and_select()
        moving = self._moving()
        if self.exact:
            replies: list[PartReply] = [(start, end, self._reply_to_one(pending, start, end)) for start, end in moving]
            self.apply(replies)
            self.settle(pending, replies, 0)
            return loss
        sent, live = pending.sent, np.zeros(self.layout.chunks, bool)
        for start, end in moving:
            live[start:end] = True
        place, value = self._host_entries(len(sent.value))
        scale = live.astype(np.float32)
        _entries(sent.chunk, sent.index, sent.value, scale, place.numpy(), value.numpy())
        self._step(place, value, scale, live, None)
        if not live.all():
            self.settle_again(Settled(pending, live[sent.chunk], ()))
        return loss

    def _moving(self) -> list[tuple[int, int]]:
        """Ranges of chunks that take a lone step: those of parameters that are not frozen."""
        ranges: list[tuple[int, int]] = []
        for number, segment in enumerate(self.layout.segments):
            if self._gradient_of(number) is None:
                continue
            if ranges and ranges[-1][1] == segment.start:
                ranges[-1] = ranges[-1][0], segment.end
            else:
                ranges.append((segment.start, segment.end))
        return ranges

    def _reply_to_one(self, pending: Pending, start: int, end: int) -> ReplyContent:
        sent = pending.sent if end - start == self.layout.chunks else pending.sent.cut(start, end)
        return reply_to_one(sent, self.layout.topk, self.layout.reply_topk)

    # ---- state ------------------------------------------------------------------------------------------------

    def replicated_state(self) -> dict[str, Tensor]:
        """What every replica holds alike beside the parameters: the directions' state, by parameter number."""
        return {
            f"{number}.{key}": tensor
            for number, direction in enumerate(self._directions)
            for key, tensor in direction.state().items()
        }

    def load_replicated_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `replicated_state`."""
        for number, direction in enumerate(self._directions):
            direction.load_state({key: state[f"{number}.{key}"] for key in direction.state()})

    def _shape_of_state(self) -> dict[str, Any]:
        """What must be alike where a state is saved and where it is loaded, in plain types."""
        treated = ("transform", "direction", "topk", "reply_topk")
        return {
            "parameters": [
                [list(segment.spec.shape), *(getattr(segment.treatment, key) for key in treated)]
                for segment in self.layout.segments
            ],
            **self._settings,
        }

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the momentum (own), the directions' state (replicated) and the masters, in plain types."""
        own = {
            "of": self._shape_of_state(),
            "momentum": self.momentum,
            "decays": self._decays,
            "replicated": self.replicated_state(),
            "masters": {str(number): master for number, master in self._masters.items()},
        }
        return {**super().state_dict(), "demo": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Nothing is loaded of a state that is refused.

        Raises:
            ValueError: the state of another optimizer, or of other parameters, treatments or settings.
        """
        own = state_dict.get("demo")
        if own is None or "of" not in own:
            raise ValueError("this is no state of DeMo")
        self._check_loaded(own, state_dict["param_groups"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "demo"})
        self.momentum.copy_(own["momentum"])
        self._decays = own["decays"]
        self.load_replicated_state(own["replicated"])
        for number, master in self._masters.items():
            # Of a parameter of float32 the value itself is its master.
            master.copy_(own["masters"].get(str(number), self._params[number].detach()))

    def _check_loaded(self, own: dict[str, Any], param_groups: list[dict[str, Any]]) -> None:
        ours, theirs = self._shape_of_state(), own["of"]
        if len(ours["parameters"]) != len(theirs["parameters"]):
            raise ValueError(f"the state is of {len(theirs['parameters'])} parameters, not {len(ours['parameters'])}")
        what = "shape, transform, direction, topk, reply_topk"
        for name, one, other in zip(self._names, ours["parameters"], theirs["parameters"], strict=True):
            if one != other:
                raise ValueError(f"the state has for {name} {what} = {other}; here they are {one}")
        for key in self._settings:
            if ours[key] != theirs[key]:
                raise ValueError(f"the state is of {key}={theirs[key]!r}; here it is {ours[key]!r}")
        if own["momentum"].shape != self.momentum.shape:
            raise ValueError(f"the state's momentum is {list(own['momentum'].shape)}, not {list(self.momentum.shape)}")
        for number, group in enumerate(param_groups):
            groups.check_group(number, group, self.defaults)

    def __getstate__(self) -> dict[str, Any]:
        """All that a copy needs; like torch's own, without hooks and what schedulers put around `step`."""
        held = {key: value for key, value in self.__dict__.items() if key in _COPIED}
        return {**super().__getstate__(), **held, "_scratch": [], "_targets": []}


@compiled
def _entries(
    chunk: NDArray[np.int64],
    index: NDArray[np.int64],
    number: NDArray[Any],
    scale: NDArray[np.float32],
    place: NDArray[np.int64],
    value: NDArray[np.float32],
) -> None:
    """Where each coefficient [n] lies among all chunks flattened, and its `number` [n], 0 where its chunk's scale is.

    With a scale of zero nothing moves, of which a sign would know nothing.
    """
    for entry in range(len(index)):
        place[entry] = chunk[entry] * CHUNK_SIZE + index[entry]
        value[entry] = number[entry] if scale[chunk[entry]] > 0 else 0


@compiled
def _add(
    momentum: NDArray[np.float32],
    chunk: NDArray[np.int64],
    index: NDArray[np.int64],
    value: NDArray[np.float32],
    factor: np.float32,
) -> None:
    """Add values [n], each `factor` times, to [chunks, 64 * 64]; most are zero."""
    for number in range(len(value)):
        if value[number]:
            momentum[chunk[number], index[number]] += value[number] * factor


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


@compiled
def _in_both(
    chunk: NDArray[np.int64],
    index: NDArray[np.int64],
    other_chunk: NDArray[np.int64],
    other_index: NDArray[np.int64],
    found: NDArray[np.bool_],
) -> None:
    """Whether each of these places [n] is among the others; both ascend.

    Each chunk by a table of the others' indices: which of two lists goes on is nothing a processor can guess.
    """
    there = np.zeros(CHUNK_SIZE, np.bool_)
    other, first, number = 0, 0, 0
    while number < len(chunk):
        here = chunk[number]
        while other < len(other_chunk) and other_chunk[other] < here:
            other += 1
        first = other
        while other < len(other_chunk) and other_chunk[other] == here:
            there[other_index[other]] = True
            other += 1
        while number < len(chunk) and chunk[number] == here:
            found[number] = there[index[number]]
            number += 1
        for place in other_index[first:other]:
            there[place] = False


def _to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    # Without waiting where the allocator keeps memory until it is copied.
    return torch.from_numpy(array).to(device, non_blocking=device.type == "cuda")
