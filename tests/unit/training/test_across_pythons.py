"""One journal gives one replica to the bit, whichever Python replays it.

Which there are, the environment says: `P2PTRAIN_PYTHONS=/a/bin/python:/b/bin/python`, each with what p2ptrain depends
on, as `pip install -c constraints.txt -e .` leaves it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import RUN_ID, Lone

from p2ptrain.state.journal import Journal
from p2ptrain.swarm.identity import verify

TREE = Path(__file__).parents[3]
REPLAY = Path(__file__).parents[1] / "replay.py"
PYTHONS = [python for python in os.environ.get("P2PTRAIN_PYTHONS", "").split(":") if python]
NONE = pytest.param("", marks=pytest.mark.skip(reason="P2PTRAIN_PYTHONS names no interpreters (separated by colons)"))
ROUNDS = 8
PROBE = "import importlib.metadata, sys; [importlib.metadata.distribution(name) for name in sys.argv[1:]]"


@pytest.fixture(scope="module")
def lone() -> Lone:
    made = Lone()
    made.train(ROUNDS)
    return made


@pytest.fixture(scope="module")
def journal(lone: Lone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("journal")
    kept = Journal(folder, RUN_ID, verify)
    for sealed in lone.rounds:
        kept.append(sealed)
    return folder


@pytest.mark.parametrize("python", PYTHONS or [NONE])
def test_a_replay_gives_the_same_bits_under_every_python(python: str, lone: Lone, journal: Path) -> None:
    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    probe = run(python, "-c", PROBE, *(named.split("==")[0] for named in project["dependencies"]))
    if probe.returncode:
        pytest.skip(f"{python} of P2PTRAIN_PYTHONS has not all of p2ptrain's dependencies: {probe.stderr.splitlines()[-1]}")
    done = run(python, str(REPLAY), str(journal))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters_sha256"] == lone.replica.parameters_sha256()


def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An interpreter with this tree's p2ptrain before any that is installed."""
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    return subprocess.run([python, *arguments], capture_output=True, text=True, timeout=200, env=environment)
