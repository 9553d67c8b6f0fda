"""Two real peers, one of them a volunteer on a machine whose use a file describes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from peers import Peer, Swarm, eventually, run

from p2ptrain.config.home import Home
from p2ptrain.config.manifest import open_manifest
from p2ptrain.peer.machine_use import VARIABLE
from p2ptrain.state.files import atomic_write
from p2ptrain.state.journal import Journal
from p2ptrain.swarm.identity import verify

PAUSES = 2
PAUSE_SECONDS = 2.0
"""From the moment that the machine is wanted until the memory is back, as the peer measures it: looks at the machine,
which come once a second, are beside it."""
MODEL_BYTES = 20e6
"""Of memory that a pause gives back at the least: parameters, momentum and moments of 8 MB each, and what goes with
them."""


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


def status(peer: Peer) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run("status", "--why", "--format", "json", "--home", str(peer.home)).stdout)
    return answer


@pytest.mark.long
def test_a_volunteer_gives_its_machine_back_and_loses_nothing(swarm: Swarm, tmp_path: Path) -> None:
    swarm.write_manifest(root_interval=64)
    text = swarm.manifest.read_text()
    swarm.manifest.write_text(text.replace("embedding = 32", "embedding = 384").replace("heads = 2", "heads = 6"))
    use = tmp_path / "use.json"

    def idle(seconds: float) -> None:
        atomic_write(use, json.dumps({"idle_seconds": seconds, "other_load_percent": 1}).encode())

    idle(1)
    ada = swarm.bootstrap("ada")
    address = ada.address()
    bob = swarm.join("bob", address, "--volunteer", environment={VARIABLE: str(use)})
    # A machine that is wanted from the beginning: nothing is built.
    eventually(lambda: "waits until this machine is not wanted" in bob.log.read_text(), 120, "bob waits")
    answer = status(bob)
    assert (answer["state"], answer["paused_by"]) == ("paused", "volunteering")
    assert answer["doing"] == "keyboard or mouse were used 1 s ago, and idle is 3 min"

    for number in range(PAUSES):
        idle(1000)
        eventually(lambda: status(bob)["state"] == "training", 120, f"bob trains:\n{bob.tail()}")
        bob.reaches(ada.round + 2, 120)
        assert status(bob)["volunteering"]["wanted"] == ""
        held = psutil.Process(bob.process.pid).memory_info().rss
        idle(2)
        eventually(
            lambda n=number: bob.log.read_text().count("memory was given back") > n, 60, f"memory:\n{bob.tail()}"
        )
        freed = held - psutil.Process(bob.process.pid).memory_info().rss
        took = [entry["message"] for entry in bob.entries() if "memory was given back" in entry["message"]][-1]
        print(f"freed {freed / 1e6:.1f} of {held / 1e6:.1f} MB; {took}")
        assert freed > MODEL_BYTES, "the model is not held any more"
        assert float(took.split()[4]) <= PAUSE_SECONDS, took
    refused = run("resume", "--home", str(bob.home))
    assert refused.returncode and "this machine is wanted: keyboard or mouse" in refused.stderr
    shown = run("status", "--why", "--home", str(bob.home)).stdout
    assert "it goes on by itself" in shown and "machine wanted: keyboard or mouse were used 2 s ago" in shown

    # A pause of the owner's stays when the machine is idle again.
    assert run("pause", "--home", str(bob.home)).returncode == 0
    idle(1000)
    eventually(lambda: status(bob)["volunteering"]["wanted"] == "", 30, "the machine is idle")
    assert status(bob)["paused_by"] == "owner"
    assert run("resume", "--home", str(bob.home)).returncode == 0
    bob.reaches(ada.round + 2, 120)

    for peer in (bob, ada):
        assert run("finish", "--home", str(peer.home)).returncode == 0
        peer.ended(120)
    # What one ended at is on the other's chain, which is one round longer or more.
    state, _ = bob.replica()
    home = Home(ada.home)
    _, run_id = open_manifest(home.manifest.read_bytes())
    assert bytes.fromhex(state) in Journal(home.journal, run_id, verify).ids.values()
    messages = [entry["message"] for entry in bob.entries()]
    resumed = next(number for number, message in enumerate(messages) if message.startswith("resumed"))
    assert not [message for message in messages[resumed:] if "snapshot" in message], "resumed by the others' journals"
    assert "Traceback" not in bob.log.read_text()
