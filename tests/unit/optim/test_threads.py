"""Every item once, on no more threads than asked for, each with room of its own; torch's number is what it was."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from p2ptrain.compression.layout import ChunkLayout, ParameterSpec, Treatment
from p2ptrain.optim import threads


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_item_is_worked_on_once(count: int) -> None:
    done: list[int] = []
    threads.for_each(range(100), lambda thread, item: done.append(item), count)
    assert sorted(done) == list(range(100))


def test_threads_work_side_by_side_each_with_a_number_of_its_own() -> None:
    meet, numbers = threading.Barrier(3, timeout=30), set()

    def work(thread: int, item: int) -> None:
        numbers.add(thread)
        meet.wait()

    threads.for_each(range(3), work, 3)
    assert numbers == {0, 1, 2}


@pytest.mark.parametrize("count", [1, 3])
def test_no_gradients_are_kept_and_the_number_of_threads_is_given_back(count: int) -> None:
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(count)
        threads.for_each(range(9), lambda thread, item: seen.append(torch.is_grad_enabled()), threads.usable())
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert not any(seen)


@pytest.mark.parametrize("count", [1, 3])
def test_a_failure_is_raised_and_the_number_of_threads_is_given_back(count: int) -> None:
    before = torch.get_num_threads()

    def work(thread: int, item: int) -> None:
        if item == 7:
            raise ValueError("seven")

    with pytest.raises(ValueError, match="seven"):
        threads.for_each(range(9), work, count)
    assert torch.get_num_threads() == before


def test_each_thread_has_scratch_of_its_own_and_a_copy_begins_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable", lambda: 3)
    treatment = Treatment(transform="dct", direction="sign", learning_rate_scale=1.0, topk=32, reply_topk=32)
    layout = ChunkLayout([ParameterSpec("a", (640, 64), "matrix")], {"matrix": treatment})
    workers, places, meet = threads.Workers(layout, torch.device("cpu")), set(), threading.Barrier(3, timeout=30)

    def work(thread: int, item: int) -> None:
        meet.wait()
        room = workers.scratch(thread, 4)
        assert room.shape == (2, 4, 4096)
        places.add(room.data_ptr())

    workers.for_each(range(3), work)
    assert len(places) == 3
    copied = copy.deepcopy(workers)
    assert copied.batches == workers.batches
    with pytest.raises(IndexError):
        copied.scratch(0, 4)
