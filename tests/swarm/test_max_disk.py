"""A home that its owner allows a size: a real peer stays below it, and pauses, and says so, where it cannot."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from peers import Peer, Swarm, eventually, run

from p2ptrain.config.manifest import open_manifest
from p2ptrain.peer.room import held_bytes
from p2ptrain.training.needs import needs_of

MB = 1_000_000


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


def status(peer: Peer) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run("status", "--format", "json", "--home", str(peer.home)).stdout or "{}")
    return answer


@pytest.mark.long
def test_a_peer_keeps_its_home_small_and_pauses_with_a_word_where_it_cannot(swarm: Swarm) -> None:
    swarm.write_manifest(root_interval=2, own_text=False)
    home = swarm.folder / "ada"
    refused = run("bootstrap", str(swarm.manifest), "--home", str(home), "--max-disk", "1MB")
    assert refused.returncode == 18 and "--max-disk allows 1 MB" in refused.stderr, refused.stderr

    # Without a limit: what it holds, once there are three snapshots.
    ada = swarm.bootstrap("ada")
    ada.started().reaches(8)
    ada.process.send_signal(2)
    ada.ended()
    snapshots = sorted((home / "checkpoints").glob("snapshot-*"))
    assert len(snapshots) == 3
    manifest, _ = open_manifest((home / "manifest.signed").read_bytes())
    reserve = needs_of(manifest).next_bytes

    # Room for all but one snapshot; and tokens of a run that is not this home's are the last to go.
    other = home / "data" / f"{'b' * 64}.tokens"
    other.write_bytes(os.urandom(3 * MB))
    most = held_bytes(home) + reserve - 3 * MB - snapshots[0].stat().st_size // 2
    ada = swarm.bootstrap("ada", "--max-disk", f"{most}B", "--force")
    eventually(lambda: "removed, as --max-disk leaves no room" in ada.log.read_text(), 60, ada.tail())
    eventually(lambda: not other.exists(), 60, "tokens that no run here needs")
    ada.reaches(ada.round + 6)
    assert held_bytes(home) <= most, "at any time, as what is replaced is there twice"
    assert status(ada)["state"] == "solo"

    # What the owner puts there is not touched.
    mine = home / "holidays.zip"
    mine.write_bytes(os.urandom(most))
    eventually(lambda: status(ada)["state"] == "paused", 60, ada.tail())
    answer = status(ada)
    assert answer["paused_by"] == "disk" and "--max-disk allows" in answer["doing"], answer
    stood = answer["round"]
    said = run("status", "--home", str(home)).stdout
    assert "it goes on by itself once there is room" in said, said
    assert status(ada)["round"] == stood and mine.exists()
    mine.unlink()
    ada.reaches(stood + 3)
    assert "there is room on the disk again" in ada.log.read_text()
    ada.process.send_signal(2)
    ada.ended()
    assert "Traceback" not in ada.log.read_text()
