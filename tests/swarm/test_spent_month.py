"""A peer whose month of transfer is used up: by hand it ends and says so; under systemd it waits, and costs nothing."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))

from peers import Swarm, eventually, run

from p2ptrain.state.transfer import MonthlyTransfer


def test_under_systemd_a_peer_waits_for_the_next_month_or_for_its_owner_to_allow_more(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path)
    swarm.write_manifest(own_text=False)
    home = tmp_path / "ada"
    home.mkdir()
    MonthlyTransfer(home / "transfer.json", time.time()).count(2_000_000, 0, time.time())
    flags = ("--monthly-transfer", "1MB")
    by_hand = run("bootstrap", str(swarm.manifest), "--home", str(home), *flags)
    assert by_hand.returncode == 20 and "too little is left to take part" in by_hand.stderr, by_hand.stderr

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        ada = swarm.bootstrap("ada", *flags, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        try:
            while (message := systemd.recv(1000)) != b"READY=1":
                assert message.startswith(b"WATCHDOG=1"), message
            answer = json.loads(run("status", "--home", str(home), "--format", "json").stdout)
            assert answer["state"] == "starting" and "this month's transfer is used up" in answer["doing"]
            process = psutil.Process(ada.process.pid)
            assert not process.children(recursive=True), "no daemon, so nothing is carried"
            assert ada.process.poll() is None
            done = run("limits", "monthly-transfer", "100GB", "--home", str(home))
            assert done.returncode == 0, done.stderr
            ada.started().reaches(2)
            os.kill(ada.process.pid, 2)
            ada.ended()
            assert "Traceback" not in ada.log.read_text()
        finally:
            swarm.close()


def test_under_systemd_a_peer_that_waits_for_the_next_month_leaves_when_told_to(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path)
    swarm.write_manifest(own_text=False)
    home = tmp_path / "ada"
    home.mkdir()
    MonthlyTransfer(home / "transfer.json", time.time()).count(2_000_000, 0, time.time())
    environment = {"NOTIFY_SOCKET": str(tmp_path / "nobody")}
    ada = swarm.bootstrap("ada", "--monthly-transfer", "1MB", environment=environment)
    try:
        eventually(lambda: "waits until" in ada.log.read_text(), 60, "ada waits")
        # As Ctrl-C, which the unit takes for a good end, and does not restart.
        assert run("leave", "--home", str(home)).returncode == 0
        assert ada.process.wait(30) == 130, ada.tail()
        assert "Traceback" not in ada.log.read_text()
    finally:
        swarm.close()
