"""A session holds up nothing while it runs, and leaves nothing behind, whatever fails."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2ptrain.config.node import NodeSettings
from p2ptrain.errors import DataError, HomeError
from p2ptrain.observe.status import Standing, Status
from p2ptrain.peer import session as session_module
from p2ptrain.peer.progress import Display
from p2ptrain.peer.session import PeerSession
from p2ptrain.swarm.thread import NetworkThread

PEER = "/ip4/192.0.2.7/tcp/4000/p2p/12D3KooWRRb1xFjnFQfm8GUv9kUdQhkatGoEYsomHYLTZfyMUAVq"


class Parts:
    """A session with a real network thread, and a driver and a node that fail where told to."""

    def __init__(self, home: Path) -> None:
        self.session = PeerSession(NodeSettings(home=home, origins={}), Display(quiet=True), None)
        self.network = NetworkThread()
        #: step -> what it raises
        self.failing: dict[str, BaseException] = {}
        self.done: list[str] = []
        parts: Any = self.session
        parts._network = self.network
        parts._driver = SimpleNamespace(
            stop=self._step("stop"),
            standing=Standing(head_round=1),
            machine=SimpleNamespace(head=SimpleNamespace(round=1)),
            feed=None,
        )
        parts._node = SimpleNamespace(close=self._step("close"), known_addresses=self._known_addresses)
        parts.display.close = lambda: self._do("display")

    def _do(self, step: str) -> None:
        self.done.append(step)
        if step in self.failing:
            raise self.failing[step]

    def _step(self, name: str) -> Any:
        async def step() -> None:
            self._do(name)

        return step

    def _known_addresses(self) -> list[str]:
        self._do("peers")
        return [PEER]

    def run(self, train: Any) -> None:
        """Run the session with a trainer that does `train(swarm, after_round)`."""
        manifest = SimpleNamespace(last_round=0)
        replica = SimpleNamespace(manifest=manifest, chain=SimpleNamespace(round=1))
        trainer: Any = SimpleNamespace(run=train, replica=replica, rounds_applied=1)
        session: Any = self.session
        session._run(trainer, session._driver, SimpleNamespace(hear=lambda status: None), Status())

    def all_was_closed(self) -> bool:
        """Every step was gone through, and another process may have the home."""
        with PeerSession(self.session.settings, Display(quiet=True), None):
            pass
        return self.done == ["display", "stop", "peers", "close"] and self.network.loop.is_closed()


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    made = Parts(tmp_path)
    yield made
    made.network.stop()


def test_peers_once_seen_are_written_down_at_the_end(parts: Parts) -> None:
    with parts.session:
        pass
    assert parts.all_was_closed()
    assert json.loads(parts.session.home.peers.read_text()) == [PEER]


@pytest.mark.parametrize("step", ["display", "stop", "peers", "close"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError("no")], ids=repr)
def test_whatever_fails_while_closing_the_rest_is_closed(parts: Parts, step: str, error: BaseException) -> None:
    parts.failing[step] = error
    with pytest.raises(type(error)) as caught, parts.session:
        pass
    assert caught.value is error
    assert parts.all_was_closed()


def test_ctrl_c_while_closing_ends_one_step_only(parts: Parts) -> None:
    parts.failing["display"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), parts.session:
        pass
    assert parts.all_was_closed()


def test_a_step_that_takes_too_long_is_no_error(parts: Parts) -> None:
    parts.failing["stop"] = TimeoutError()
    with parts.session:
        pass
    assert parts.all_was_closed()


def test_the_first_error_is_the_one_reported(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    parts.failing = {"stop": RuntimeError("second"), "close": RuntimeError("third")}
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="first"), parts.session:
        raise DataError("first")
    assert parts.all_was_closed()
    assert [name in caplog.text for name in ("second", "third")] == [True, True]


def test_of_two_that_fail_while_closing_the_first_is_reported(parts: Parts) -> None:
    parts.failing = {"stop": HomeError("first"), "close": RuntimeError("second")}
    with pytest.raises(HomeError, match="first"), parts.session:
        pass
    assert parts.all_was_closed()


def test_training_does_not_wait_for_a_busy_network_thread(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "PEERS_SECONDS", -1.0)
    free = threading.Event()
    took: list[float] = []

    def train(swarm: Any, after_round: Any) -> None:
        parts.network.loop.call_soon_threadsafe(free.wait, 5.0)
        began = time.monotonic()
        assert after_round()
        took.append(time.monotonic() - began)
        free.set()

    with parts.session as session:
        parts.run(train)
        assert took[0] < 2.0
        parts.network.run(_turns())
        assert json.loads(session.home.peers.read_text()) == [PEER], "it is written all the same"


def test_when_training_fails_nothing_waits_for_rounds_any_more(parts: Parts) -> None:
    session: Any = parts.session
    session._driver.machine.head.round = 0
    session._driver.feed = SimpleNamespace(heard_at=0.0, furthest=0)
    session._driver.write_decisions = lambda why: None

    def train(swarm: Any, after_round: Any) -> None:
        raise RuntimeError("broken")

    with session:
        with pytest.raises(RuntimeError, match="broken"):
            parts.run(train)
        assert parts.network.run(_waiting()) == []


def test_that_peers_cannot_be_written_down_is_told(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session_module, "PEERS_SECONDS", -1.0)
    parts.failing["peers"] = RuntimeError("broken")

    def train(swarm: Any, after_round: Any) -> None:
        assert after_round()
        parts.network.run(_turns())

    with pytest.raises(RuntimeError, match="broken"), parts.session:
        parts.run(train)
        assert "writing down the peers once seen has failed" in caplog.text


async def _waiting() -> list[str]:
    """Return which tasks wait for rounds, once those that were cancelled have ended."""
    await asyncio.sleep(0)
    names = [getattr(task.get_coro(), "__name__", "") for task in asyncio.all_tasks()]
    return [name for name in names if name == "await_chain"]


async def _turns() -> None:
    """All that was handed to the loop before is done."""
