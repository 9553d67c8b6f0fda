"""The recorded history comes to the same state and parameters, to the bit, whichever Python replays it.

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

sys.path.insert(0, str(Path(__file__).parent))

from test_recorded_history import PARAMETERS_SHA256, RECORDED, STATE_ID

TREE = Path(__file__).parents[3]
REPLAY = Path(__file__).parents[1] / "replay.py"
PYTHONS = [python for python in os.environ.get("P2PTRAIN_PYTHONS", "").split(":") if python]
NONE = pytest.param("", marks=pytest.mark.skip(reason="P2PTRAIN_PYTHONS names no interpreters (separated by colons)"))
PROBE = "import importlib.metadata, sys; [importlib.metadata.distribution(name) for name in sys.argv[1:]]"


@pytest.mark.parametrize("python", PYTHONS or [NONE])
def test_the_recorded_history_replays_to_the_same_bits_under_every_python(python: str) -> None:
    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    probe = run(python, "-c", PROBE, *(named.split("==")[0] for named in project["dependencies"]))
    if probe.returncode:
        lacks = probe.stderr.splitlines()[-1]
        pytest.skip(f"{python} of P2PTRAIN_PYTHONS has not all of p2ptrain's dependencies: {lacks}")
    done = run(python, str(REPLAY), str(RECORDED / "journal"), "--manifest", str(RECORDED / "manifest.signed"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["state_id"], result["parameters_sha256"]) == (STATE_ID, PARAMETERS_SHA256), result


def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An interpreter with this tree's p2ptrain before any that is installed."""
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    return subprocess.run([python, *arguments], capture_output=True, text=True, timeout=220, env=environment)
