"""Pass batches of chunks to as many threads as torch would use for one operation, each with batches of its own.

Torch splits every operation among its threads and waits for all of them at the end of each, so a step would be hundreds
of waits, each as long as the slowest thread: where something else (another program, our own network thread) has one of
the cores, all stand still with it. Here threads meet once a phase, and one that is held up takes fewer batches.

Given up: torch's number of threads is set to 1 meanwhile, for all of the process.

Cost: memory for two batches a thread (`Workers`). A device other than a CPU has one thread and larger batches; to CUDA
nobody waits for a copy.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression.layout import CHUNK_SIZE, ChunkLayout

T = TypeVar("T")
_CPU_BATCH_CHUNKS, _DEVICE_BATCH_CHUNKS = 256, 8192
"""On a CPU 4 MiB, of which a thread holds two. Smaller ones lie in nearer caches, but threads then spend more on
Python's lock than that gains."""


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # Its threads first run while torch's number is 1, and keep that.
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="p2ptrain-step")


def usable() -> int:
    """Return how many threads torch would use."""
    return torch.get_num_threads()


def for_each(items: Sequence[T], work: Callable[[int, T], None], threads: int) -> None:
    """Call work(number of the thread, item) for all items, without gradients.

    Args:
        threads: at most so many, this one included.
    """
    queue, before = iter(items), torch.get_num_threads()

    def run(number: int) -> None:
        with torch.no_grad():
            for item in queue:
                work(number, item)

    if threads == 1:
        run(0)
        return
    torch.set_num_threads(1)
    try:
        others = [_pool().submit(run, number) for number in range(1, threads)]
        try:
            run(0)
        finally:
            for other in others:
                other.result()
    finally:
        torch.set_num_threads(before)


class Workers:
    """Divide a layout's chunks into batches, and call what works on them with scratch for each thread.

    Copies of it have no scratch until they work.
    """

    def __init__(self, layout: ChunkLayout, device: torch.device) -> None:
        self.device = device
        most = _CPU_BATCH_CHUNKS if device.type == "cpu" else _DEVICE_BATCH_CHUNKS
        self.batches = layout.batches(most)
        self._shape = (2, max(batch.end - batch.start for batch in self.batches), CHUNK_SIZE)
        #: for each thread, values of a batch and what is made of them
        self._scratch: list[Tensor] = []

    def for_each(self, items: Sequence[T], work: Callable[[int, T], None]) -> None:
        """Call work(number of the thread, item) for all items; `scratch` has room for each thread."""
        count = usable() if self.device.type == "cpu" else 1
        while len(self._scratch) < count:
            self._scratch.append(torch.empty(self._shape, device=self.device))
        for_each(items, work, count)

    def scratch(self, thread: int, chunks: int) -> Tensor:
        """Return room [2, chunks, 64 * 64] for this thread alone, with anything in it."""
        return self._scratch[thread][:, :chunks]

    def host_entries(self, count: int) -> tuple[Tensor, Tensor]:
        """Make room on the host for `count` places and values, where CUDA's copies are fastest."""
        pinned = self.device.type == "cuda"
        return torch.empty(count, dtype=torch.int64, pin_memory=pinned), torch.empty(count, pin_memory=pinned)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scratch": []}


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return `array` as a tensor on `device`, without waiting where the allocator keeps memory until it is copied."""
    return torch.from_numpy(array).to(device, non_blocking=device.type == "cuda")
