"""Settle a contribution: what the group used of it is consumed, and everything else returns to the momentum.

What was sent left the momentum (`Pending`). Of it the replies used the coefficients that they hold too, those of a
clipped part by a factor. The rest, decayed as often as the momentum since, goes back where it was. What was consumed is
kept (`Settled`), so that a seal that is undone undoes its settling.

Cost: one pass over the coefficients of contribution and replies, parts over threads, and one over the places in the
momentum that something returns to. Neither grows with the momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.compression.wire import Coefficients, ReplyContent
from p2ptrain.native.compiled import compiled
from p2ptrain.optim import threads
from p2ptrain.optim.threads import to_device

PartReply = tuple[int, int, ReplyContent | None]
"""First chunk, end chunk, reply or None for a SKIP."""


@dataclass(slots=True)
class Pending:
    """Hold what left the momentum with a contribution and is not settled yet."""

    sent: Coefficients
    #: how many decays this momentum had been through when it was sent
    decays: int


@dataclass(frozen=True, slots=True)
class Settled:
    """Hold what `DeMo.settle` did, so that `DeMo.unsettle` can undo it."""

    pending: Pending
    #: [n] whether a coefficient was consumed
    kept: NDArray[np.bool_]
    #: (first, end, factor in 256ths) of coefficients that were clipped before they were consumed
    clips: tuple[tuple[int, int, int], ...]

    def consumed(self, value: Tensor) -> Tensor:
        """Return what the group used [n] of the `value` [n] that was sent, on its device."""
        used = torch.where(to_device(self.kept, value.device), value, 0.0)
        for first, end, factor in self.clips:
            used[first:end] *= factor / 256
        return used

    @property
    def consumed_share(self) -> float:
        """Return the share of the sent norm that was consumed, for display."""
        value = torch.from_numpy(self.pending.sent.value)
        whole = float(value.abs().sum())
        return float(self.consumed(value).abs_().sum()) / whole if whole else 0.0


def consumed_of(pending: Pending, replies: Sequence[PartReply], index: int | None) -> Settled:
    """Say what the sealed replies used of a contribution; the momentum stays as it is.

    Args:
        index: our place among that round's members; None: we were none, nothing was used.
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
    return Settled(pending, kept, tuple(clips))


def products(pending: Pending, replies: Sequence[PartReply], index: int | None) -> dict[int, float]:
    """Return, by the number of each reply that includes our contribution, its product with what we sent.

    A mean has a share of us in it, so it hardly ever points against us: a product below zero says that somebody should
    look at what was summed. A part that was clipped to nothing has none.

    Args:
        index: our place among that round's members; None: we were none, and there are none.
    """
    sent, found = pending.sent, {}
    for number, (start, end, content) in enumerate(replies):
        if content is None or index is None or index not in content.included or content.clips.get(index) == 0:
            continue
        low, high = (int(edge) for edge in np.searchsorted(sent.chunk, (start, end)))
        here, theirs = slice(low, high), content.coefficients
        found[number] = _product(
            sent.chunk[here], sent.index[here], sent.value[here], theirs.chunk, theirs.index, theirs.value
        )
    return found


def add_returned(momentum: Tensor, settled: Settled, factor: float, chunk_there: Tensor | None) -> None:
    """Add to the momentum, `factor` times, what was not consumed.

    Args:
        chunk_there: each coefficient's chunk on the momentum's device, if it is there already.
    """
    sent, device = settled.pending.sent, momentum.device
    if device.type == "cpu":
        returned = sent.value - settled.consumed(torch.from_numpy(sent.value)).numpy()
        _add(momentum.numpy(), sent.chunk, sent.index, returned, np.float32(factor))
        return
    chunk = to_device(sent.chunk, device) if chunk_there is None else chunk_there
    index, value = to_device(sent.index, device), to_device(sent.value, device)
    returned = (value - settled.consumed(value)).mul_(factor)
    momentum.view(-1).index_add_(0, chunk * CHUNK_SIZE + index, returned)


def forget_sent(momentum: Tensor, sent: Coefficients) -> None:
    """Zero the entries that were sent: of them only the rounding would have stayed behind, which nobody knows.

    Where zero was sent, nothing left the momentum: of a frozen parameter all of it stays.
    """
    left = sent.value != 0
    momentum[torch.from_numpy(sent.chunk[left]), torch.from_numpy(sent.index[left])] = 0


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
def _in_both(
    chunk: NDArray[np.int64],
    index: NDArray[np.int64],
    other_chunk: NDArray[np.int64],
    other_index: NDArray[np.int64],
    found: NDArray[np.bool_],
) -> None:
    """Say in `found` whether each of these places [n] is among the others; both ascend.

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


@compiled
def _product(
    chunk: NDArray[np.int64],
    index: NDArray[np.int64],
    value: NDArray[np.float32],
    other_chunk: NDArray[np.int64],
    other_index: NDArray[np.int64],
    other_value: NDArray[np.float32],
) -> float:
    """Add up the products of what two lists have at the same place; both ascend, and each has a place once."""
    there = np.zeros(CHUNK_SIZE, np.float32)
    other, first, number, total = 0, 0, 0, 0.0
    while number < len(chunk):
        here = chunk[number]
        while other < len(other_chunk) and other_chunk[other] < here:
            other += 1
        first = other
        while other < len(other_chunk) and other_chunk[other] == here:
            there[other_index[other]] = other_value[other]
            other += 1
        while number < len(chunk) and chunk[number] == here:
            total += np.float64(value[number]) * np.float64(there[index[number]])
            number += 1
        for place in other_index[first:other]:
            there[place] = 0
    return total
