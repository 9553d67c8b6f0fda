"""An owner's commands to a peer that runs: each does what it says, and the others train on meanwhile."""

from __future__ import annotations

import json
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from peers import Peer, Swarm, eventually, run


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    # Longer than the 107 characters that the address of a socket may have.
    made = Swarm(tmp_path / ("a folder with a long name" * 4))
    made.folder.mkdir()
    yield made
    made.close()


def told(peer: Peer, *command: str, code: int = 0) -> str:
    """What a command to a peer prints."""
    done = run(*command, "--home", str(peer.home))
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}\n{peer.tail()}"
    return done.stdout + done.stderr


def status(peer: Peer, code: int = 0) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(told(peer, "status", "--format", "json", "--why", code=code))
    return answer


def rounds_in(peer: Peer, seconds: float) -> int:
    before = peer.round
    time.sleep(seconds)
    return peer.round - before


def test_a_peer_pauses_resumes_finishes_and_leaves_while_the_others_train_on(swarm: Swarm) -> None:
    swarm.write_manifest()
    ada = swarm.bootstrap("ada")
    address = ada.address()
    grace, linus = (swarm.join(name, address) for name in ("grace", "linus"))
    grace.started()
    linus.started()
    observer = swarm.watch(address)
    observer.sees(dict.fromkeys(("ada", "grace", "linus"), "training"), 60)
    assert stat.S_IMODE((grace.home / "control").stat().st_mode) == 0o600
    answer = status(grace)
    assert answer["state"] == "training" and answer["members"] == 3 and answer["decisions"]
    calm = rounds_in(ada, 8.0)
    process = psutil.Process(grace.process.pid)
    before_bytes = process.memory_info().rss
    said = told(grace, "pause")
    paused_at = grace.round
    assert said.startswith("paused\n") and "p2ptrain resume" in said
    observer.sees({"grace": "paused", "ada": "training", "linus": "training"}, 10)
    print("memory", before_bytes, process.memory_info().rss)
    paused = rounds_in(ada, 8.0)
    print("rounds", calm, paused)
    assert status(grace, code=1)["state"] == "paused" and grace.round == paused_at
    assert "resumed" in told(grace, "resume") or True
    observer.sees({"grace": "training"}, 30)
    grace.reaches(ada.round + 2)
    # A pause with an end ends by itself.
    told(grace, "pause", "2s")
    eventually(lambda: status_of(grace) == "training", 30, "grace goes on")
    told(linus, "leave")
    linus.ended(40)
    told(grace, "finish")
    grace.ended(40)
    ada.reaches(ada.round + 3)
    assert "no peer runs" in told(grace, "status", code=17)
    told(ada, "finish")
    ada.ended(40)


def status_of(peer: Peer) -> str:
    done = run("status", "--format", "json", "--home", str(peer.home))
    return str(json.loads(done.stdout)["state"])
