"""Whoever starts first, and however often: one swarm, and no peer in it twice."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from peers import Swarm, eventually, run


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


def test_a_joiner_may_come_first_and_nobody_is_in_the_swarm_twice(swarm: Swarm) -> None:
    swarm.write_manifest()
    ada = swarm.bootstrap("ada")
    address = ada.address()
    ada.kill()
    grace = swarm.join("grace", address)
    eventually(lambda: "trying again for" in grace.log.read_text(), 60, "grace waits")
    again = swarm.bootstrap("ada")
    grace.started().reaches(3)

    # The same run.toml, by another owner who meets in this network.
    shutil.copytree(swarm.folder / "ada" / "data", swarm.folder / "linus" / "data")
    flags = ("--home", str(swarm.folder / "linus"), "--host", "127.0.0.1", "--initial-peers", address)
    done = run("bootstrap", str(swarm.manifest), *flags)
    assert done.returncode == 8 and "bootstrapped by another owner already" in done.stderr, done.stderr
    assert "p2ptrain join /ip4/127.0.0.1/tcp/" in done.stderr

    # A copy of a home, which meets the other peer.
    copy = swarm.folder / "copy"
    shutil.copytree(grace.home, copy, ignore=shutil.ignore_patterns("control", "lock", "port"))
    done = run("join", address, "--home", str(copy), "--host", "127.0.0.1", "--wait", "0")
    assert done.returncode == 10 and "takes part as this peer already" in done.stderr, done.stderr
    grace.reaches(again.round + 2)
