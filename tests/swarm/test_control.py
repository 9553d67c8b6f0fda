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


def test_a_peer_pauses_resumes_finishes_and_leaves_while_the_others_train_on(swarm: Swarm) -> None:
    swarm.write_manifest()
    ada = swarm.bootstrap("ada")
    address = ada.address()
    grace, linus = (swarm.join(name, address) for name in ("grace", "linus"))
    observer = swarm.watch(address)
    observer.sees(dict.fromkeys(("ada", "grace", "linus"), "training"), 90)
    assert stat.S_IMODE((grace.home / "control").stat().st_mode) == 0o600
    answer = status(grace)
    assert answer["state"] == "training" and answer["members"] == 3 and answer["decisions"]

    memory = psutil.Process(grace.process.pid).memory_info
    before_bytes = memory().rss
    assert told(grace, "pause").startswith("paused\n")
    paused_at, freed_bytes = time.time(), before_bytes - memory().rss
    observer.sees({"grace": "paused", "ada": "training", "linus": "training"}, 15)
    assert status(grace, code=1)["state"] == "paused"
    held = grace.round
    ada.reaches(held + 6)
    # None of these rounds was waited for longer than its deadlines, and none is in the paused peer's home.
    assert time.time() - paused_at < 60 and grace.round == held
    told(grace, "resume")
    observer.sees({"grace": "training"}, 40)
    assert not [entry for entry in grace.entries() if "snapshot" in entry["message"]][1:], "resumed by its journal"
    # A pause with an end ends by itself.
    assert status(grace)["state"] == "training" and told(grace, "pause", "1s")
    eventually(
        lambda: (
            json.loads(run("status", "--format", "json", "--home", str(grace.home)).stdout)["round"]
            and "resumed" in grace.log.read_text().rsplit("paused at", 1)[1]
        ),
        60,
        "grace goes on by itself",
    )
    print(f"freed {freed_bytes / 1e6:.1f} of {before_bytes / 1e6:.1f} MB")

    told(linus, "leave")
    linus.ended(60)
    told(grace, "finish")
    grace.ended(60)
    assert "no peer runs" in told(grace, "status", code=17)
    assert "paused at round" in told(grace, "logs") and "resumed at round" in told(grace, "logs")
    ada.reaches(ada.round + 2)
    told(ada, "finish")
    ada.ended(60)
