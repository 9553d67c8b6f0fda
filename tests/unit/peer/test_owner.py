"""An owner's commands over the real socket, and what a peer says while it waits."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import stat
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "rounds"))

from cluster import Cluster

from p2ptrain.calls.uplink import MOST_KBIT
from p2ptrain.cli.control import limits_of, seconds_of
from p2ptrain.config.home import Home
from p2ptrain.errors import NotRunningError, P2PTrainError, UsageError
from p2ptrain.peer import control, supervisor, waiting
from p2ptrain.peer.owner import Owner
from p2ptrain.peer.waiting import awaited, told_while
from p2ptrain.state.transfer import MonthlyTransfer
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.line import HEADROOM, Allowed, Line


def asked(home: Home, request: control.Request, owner: Owner) -> control.Answer:
    """What a peer with this owner answers, the two ends in threads of their own."""

    async def scenario() -> control.Answer:
        await owner.listen()
        try:
            with ThreadPoolExecutor(1) as pool:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(pool, control.ask, home.control, request, 10.0)
        finally:
            await owner.close()

    return asyncio.run(scenario())


@pytest.fixture
def home(tmp_path: Path) -> Home:
    # A socket's address has 107 characters at most.
    made = Home(tmp_path / ("long " * 30))
    made.create()
    return made


def test_only_the_owner_can_open_the_socket_and_one_left_by_a_dead_process_is_replaced(home: Home) -> None:
    home.control.write_text("left behind")
    modes = []

    class Watched(Owner):
        def line(self) -> str:
            modes.append(stat.S_IMODE(home.control.stat().st_mode))
            return super().line()

    owner = Watched(home, lambda: None)

    async def scenario() -> None:
        await owner.listen()
        assert owner.line() == "starting: starting"
        await owner.close()

    asyncio.run(scenario())
    assert modes == [0o600] and not home.control.exists()


def test_a_peer_that_does_not_train_yet_says_what_it_does_and_cannot_be_paused(home: Home) -> None:
    owner = Owner(home, lambda: None)
    owner.doing = "fetching the run's text"
    answer = asked(home, control.Ask(why=True), owner)
    assert (answer["state"], answer["doing"], answer["decisions"]) == ("starting", "fetching the run's text", [])
    with pytest.raises(P2PTrainError, match="does not train yet: it is fetching the run's text") as caught:
        asked(home, control.Pause(), owner)
    assert caught.value.exit_code == NotRunningError.exit_code and "p2ptrain leave" in caught.value.hint
    with pytest.raises(P2PTrainError, match="not paused"):
        asked(home, control.Resume(), owner)


def test_where_no_peer_runs_the_error_says_how_to_start_one(home: Home) -> None:
    with pytest.raises(NotRunningError, match="no peer runs in home") as caught:
        control.ask(home.control, control.Ask(), 1.0)
    assert "p2ptrain join" in caught.value.hint


def test_an_owner_shows_and_changes_the_limits_of_a_running_peer(home: Home) -> None:
    owner = Owner(home, lambda: None)
    with pytest.raises(P2PTrainError, match="no line yet") as early:
        asked(home, control.Limit(), owner)
    assert early.value.exit_code == NotRunningError.exit_code
    owner.limited = line = Line(Allowed(), MonthlyTransfer(home.transfer, time.time()))
    assert asked(home, control.Limit(), owner)["upload_limit_bytes_per_second"] is None
    assert line.upload_rate == math.inf and line.ceiling_kbit > MOST_KBIT
    answer = asked(home, control.Limit("upload-limit", "1Mbit"), owner)
    assert answer["upload_limit_bytes_per_second"] == 125_000
    assert line.upload_rate == HEADROOM * 125_000 and line.ceiling_kbit < 1000
    asked(home, control.Limit("download-limit", "2MB"), owner)
    answer = asked(home, control.Limit("monthly-transfer", "200GB"), owner)
    assert answer["monthly_transfer_bytes"] == 200e9 and answer["download_limit_bytes_per_second"] == 2e6
    shown = limits_of(answer)
    assert shown[0] == "upload-limit      1 Mbit/s" and shown[2].startswith("monthly-transfer  200 GB, of which 0 kB")
    answer = asked(home, control.Limit("upload-limit", "0"), owner)
    assert answer["upload_limit_bytes_per_second"] is None and answer["download_limit_bytes_per_second"] == 2e6
    for key, value, said in (
        ("upload-limit", "fast", "expected a rate"),
        ("speed", "1Mbit", "no limit 'speed'"),
        ("monthly-transfer", "1kB", "too little to take part"),
    ):
        with pytest.raises(P2PTrainError, match=said) as caught:
            asked(home, control.Limit(key, value), owner)
        assert caught.value.exit_code == UsageError.exit_code
    assert asked(home, control.Limit(), owner) == answer, "what is refused changes nothing"


def test_frames_that_wait_for_a_limit_leave_when_it_is_lifted_and_wait_when_it_comes(home: Home) -> None:
    async def scenario() -> None:
        line = Line(Allowed(upload_rate=8_000), MonthlyTransfer(home.transfer, time.time()))
        await line.leave("rpc_contribute", 80_000)
        waiting = asyncio.create_task(line.leave("rpc_contribute", 1_000))
        await asyncio.sleep(0)
        line.limit(Allowed())
        async with asyncio.timeout(5):
            await waiting
            await line.leave("rpc_contribute", 10**9)
        line.limit(Allowed(upload_rate=8_000))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await line.leave("rpc_contribute", 60_000)
                await line.leave("rpc_contribute", 60_000)
        line.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("line", [b"noise\n", b'{"command":"obey"}\n', b"x" * 10_000 + b"\n", b'{"command":"pause"'])
def test_what_is_no_request_is_answered_with_an_error_and_nothing_else_happens(home: Home, line: bytes) -> None:
    owner = Owner(home, lambda: None)

    def send() -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection, control._short(home.control) as name:
            connection.settimeout(10)
            connection.connect(name)
            connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            answer: dict[str, Any] = json.loads(control._read(connection))
            return answer

    async def scenario() -> dict[str, Any]:
        await owner.listen()
        try:
            return await asyncio.get_running_loop().run_in_executor(None, send)
        finally:
            await owner.close()

    answer = asyncio.run(scenario())
    assert answer["error"].startswith("not a request") and owner.trains_on


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("8h", 28800), ("2d", 172800)])
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5", "5 weeks", "1e9"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no duration"):
        seconds_of(text)


def test_a_peer_says_whom_it_waits_for() -> None:
    cluster = Cluster()
    ada, bob, cyd = cluster.group(3, names=("ada", "bob", "cyd"))
    cluster.run(6)
    said = set()

    def driver(peer: Any) -> Any:
        return SimpleNamespace(machine=peer.machine, not_admitted="", leaving=False)

    cyd.alive = False
    name = format_peer_id(cyd.identity.peer_id)[-8:]
    for _ in range(400):
        cluster.run(0.05)
        said.add(awaited(driver(ada)))
        said.add(awaited(driver(bob)))
    waits = {text for text in said if name in text}
    assert any(text.startswith("contributions of") for text in waits) or any("replies of" in text for text in waits)
    assert "this peer's own gradient" in said


def test_a_step_that_takes_long_is_told_of_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SAY_AFTER_SECONDS", 0.01)
    told = threading.Event()
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        told.set()

    with told_while("asking which run there is", say):
        assert told.wait(10)
    assert lines[0] == "asking which run there is, since 0 s"


def test_systemd_hears_that_a_peer_is_alive_and_how_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "120000000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))

        async def scenario() -> None:
            telling = asyncio.create_task(supervisor.keep_notified(lambda: "training, round 7"))
            data = await asyncio.get_running_loop().run_in_executor(None, systemd.recv, 1000)
            assert data == b"WATCHDOG=1\nSTATUS=training, round 7"
            telling.cancel()

        asyncio.run(scenario())
    assert supervisor.watchdog_seconds() == 120
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert supervisor.watchdog_seconds() == 0
    assert msgspec.json.encode(control.Pause(60.0)) == b'{"command":"pause","seconds":60.0}'
