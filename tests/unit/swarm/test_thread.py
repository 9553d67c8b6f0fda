"""The network thread runs what it is given, lets go of what takes too long, and ends when told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from p2ptrain.swarm.thread import NetworkThread


@pytest.fixture
def network() -> Iterator[NetworkThread]:
    network = NetworkThread()
    yield network
    network.stop()


async def thread_name() -> str:
    return threading.current_thread().name


def test_work_runs_on_the_thread_and_its_result_comes_back(network: NetworkThread) -> None:
    assert network.run(thread_name()) == "network"
    assert network.spawn(thread_name()).result(5) == "network"


def test_an_error_of_the_work_is_raised_to_the_caller(network: NetworkThread) -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        network.run(fail())


def test_work_that_takes_too_long_is_cancelled(network: NetworkThread) -> None:
    cancelled = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(TimeoutError):
        network.run(endless(), timeout_seconds=0.05)
    assert cancelled.wait(5)


def test_stopping_cancels_what_runs_and_refuses_what_comes(network: NetworkThread) -> None:
    waiting = network.spawn(asyncio.Event().wait())
    network.stop()
    network.stop()
    assert waiting.cancelled()
    assert not any(thread.name == "network" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="stopped"):
        network.run(thread_name())


def test_waiting_for_oneself_is_an_error(network: NetworkThread) -> None:
    async def inside() -> None:
        network.run(thread_name())

    with pytest.raises(RuntimeError, match="itself"):
        network.run(inside())
