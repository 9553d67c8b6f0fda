"""Batches of chunks over as many threads as torch would use for one operation, each thread with batches of its own.

Torch splits every operation among its threads and waits for all of them at the end of each, so a step would be hundreds
of waits, each as long as the slowest thread: where something else (another program, our own network thread) has one of
the cores, all stand still with it. Here threads meet once a phase, and one that is held up takes fewer batches.

Given up: torch's number of threads is set to 1 meanwhile, for all of the process.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # Its threads first run while torch's number is 1, and keep that.
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="p2ptrain-step")


def usable() -> int:
    """How many threads torch would use."""
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
