"""What the owner of an attacked peer can see of it; `scripts/attack_swarm.py` measures the attacks themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts/bench"))

from attacks.watched import HostileProcess
from peers import Swarm, eventually, run

from p2ptrain.swarm.identity import format_peer_id

PREPARED_SECONDS = 90.0


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


def test_inspect_shows_the_branch_of_an_attacker_and_why_it_was_refused(swarm: Swarm, tmp_path: Path) -> None:
    swarm.write_manifest()
    address = swarm.bootstrap("ada").address()
    grace = swarm.join("grace", address).address()
    observer = swarm.watch(address)
    observer.sees({"ada": "training", "grace": "training"}, 60)
    hostile = HostileProcess(tmp_path / "hostile", "offline_chain", 1, [address, grace])
    try:
        eventually(lambda: hostile.identities, PREPARED_SECONDS, "the attacker is not ready")
        hostile.word()

        def refused() -> list[dict[str, Any]]:
            peers = observer.sees({}, 10)["peers"]
            return [peer["refused_branch"] for peer in peers if peer["refused_branch"] is not None]

        first = eventually(refused, 60, "inspect shows no refused branch")[0]
        assert hostile.identities is not None
        assert first["donor"] in {format_peer_id(bytes.fromhex(peer))[-8:] for peer in hostile.identities}
        assert first["why"] and first["round"] > 0 and first["age_seconds"] < 60
        table = run("inspect", address).stdout
        assert "refused a branch up to round" in table and first["donor"] in table
    finally:
        hostile.close()
