"""Tasks are ended for certain, also where one cancellation is lost."""

from __future__ import annotations

import asyncio

import pytest

from p2ptrain.swarm import tasks as tasks_module
from p2ptrain.swarm.tasks import cancel_and_wait


async def hold(started: asyncio.Event) -> None:
    started.set()
    await asyncio.Event().wait()


async def drop_one_cancellation(started: asyncio.Event) -> None:
    """What a loop does whose `wait_for`, in Python 3.11, was cancelled just as the work was done."""
    try:
        await hold(started)
    except asyncio.CancelledError:
        await asyncio.Event().wait()


async def fail_at_the_end(started: asyncio.Event) -> None:
    try:
        await hold(started)
    finally:
        raise ValueError("no")


@pytest.mark.parametrize("work", [hold, drop_one_cancellation, fail_at_the_end])
def test_a_task_is_ended_whatever_it_does(work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "_CANCEL_AGAIN_SECONDS", 0.05)

    async def scenario() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(work(started))
        await started.wait()
        await asyncio.wait_for(cancel_and_wait([task]), 5)
        assert task.done()

    asyncio.run(scenario())


def test_none_and_those_that_have_ended_take_no_time() -> None:
    async def scenario() -> None:
        async def fail() -> None:
            raise ValueError("no")

        task = asyncio.create_task(fail())
        await asyncio.wait({task})
        await cancel_and_wait([task])
        await cancel_and_wait([])

    asyncio.run(scenario())
