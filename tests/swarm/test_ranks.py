"""A peer of two processes, started by `torchrun`, beside a peer of one: replicas are equal to the bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from p2ptrain.swarm.identity import format_peer_id, load_or_create_identity

sys.path.insert(0, str(Path(__file__).parent))

from peers import Swarm, eventually

ROUNDS = 60


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


def torchrun(swarm: Swarm, name: str, address: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a peer of two processes; all its words go to `log`."""
    starting = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--home", str(swarm.folder / name), "--name", name, "--host", "127.0.0.1", "--threads", "1"]
    command = [*starting, "-m", "p2ptrain", "join", address, *flags, "--micro-batch", "2", "--log-format", "json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


@pytest.mark.long
@pytest.mark.parametrize("ending", ["the run's end", "Ctrl-C", "a killed process"])
def test_a_peer_of_two_processes_and_one_of_one_are_bit_identical(swarm: Swarm, ending: str) -> None:
    swarm.write_manifest(last_round=ROUNDS if ending == "the run's end" else 0)
    ada = swarm.bootstrap("ada")
    log = swarm.folder / "bob.log"
    bob = torchrun(swarm, "bob", ada.address(), log)
    try:
        journal = swarm.folder / "bob" / "journal"
        eventually(lambda: bob.poll() is not None or len(list(journal.glob("round-*"))) > 3, 90, "bob takes part")
        ranks = psutil.Process(bob.pid).children(recursive=True)
        if ending == "Ctrl-C":
            bob.send_signal(signal.SIGINT)
        elif ending == "a killed process":
            next(one for one in ranks if one.is_running() and one.environ().get("RANK") == "1").kill()
        code = bob.wait(120)
        assert (code == 0) == (ending == "the run's end"), log.read_text()
        assert not psutil.wait_procs(ranks, 10)[1], "of a peer that has ended no process is left"
    finally:
        bob.kill()
    said = log.read_text()
    if ending == "a killed process":
        # torchrun ends the others as SIGTERM does; a round may be under way.
        assert "parameters sha256" in said or "another process of this peer has ended" in said, said
        again = swarm.join("bob")
        again.reaches(ada.round + 2)
        return
    (found,) = re.findall(r"state (\w{64}), parameters sha256 (\w{64})", said)
    if ending == "Ctrl-C":
        return
    ada.ended()
    assert found == ada.replica()
    events = [json.loads(line) for line in (ada.home / "events" / "events.jsonl").read_text().splitlines()]
    rounds = [event["members"] for event in events if event["kind"] == "sealed" and len(event["members"]) == 2]
    own = load_or_create_identity(ada.home / "identity.key").peer_id
    of_bob = [member for members in rounds for member in members if member[0] != format_peer_id(own)]
    assert len(rounds) > 10 and sum(member[1] for member in of_bob) > 0.7 * len(rounds), "its work counts"
