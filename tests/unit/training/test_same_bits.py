"""One journal gives one replica to the bit: however many threads, whichever instructions, eager or compiled.

Each replay is a process of its own: `replay.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lone import RUN_ID, Lone

from p2ptrain.state.journal import Journal
from p2ptrain.swarm.identity import verify

REPLAY = Path(__file__).parents[1] / "replay.py"
ROUNDS = 8


@pytest.fixture(scope="module")
def lone() -> Lone:
    made = Lone()
    made.train(ROUNDS)
    directions = {group["direction"] for group in made.replica.optimizer.param_groups}
    assert directions >= {"muon", "rms"}, "both of the default are to be shown"
    return made


@pytest.fixture(scope="module")
def journal(lone: Lone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("journal")
    kept = Journal(folder, RUN_ID, verify)
    for sealed in lone.rounds:
        kept.append(sealed)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of compiled code: compiled once, run with any number of threads."""
    return tmp_path_factory.mktemp("inductor")


CPU = [
    pytest.param(("--threads", "1"), "", id="1 thread"),
    pytest.param(("--threads", "2"), "", id="2 threads"),
    pytest.param(("--threads", "2"), "default", id="2 threads, no vector instructions"),
    pytest.param(("--threads", "1", "--compiled"), "", id="1 thread, compiled"),
    pytest.param(("--threads", "2", "--compiled"), "", id="2 threads, compiled"),
]


@pytest.mark.parametrize(("flags", "capability"), CPU)
def test_a_replay_gives_the_same_bits(
    flags: tuple[str, ...], capability: str, lone: Lone, journal: Path, cache: Path
) -> None:
    if "--compiled" in flags and shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++")
    assert replayed(journal, *flags, capability=capability, cache=cache) == lone.replica.parameters_sha256()
    if "--compiled" in flags:
        assert list(cache.rglob("*.so")), "nothing was compiled"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("flags", [(), ("--compiled",)])
def test_a_replay_on_a_gpu_gives_the_same_bits(flags: tuple[str, ...], lone: Lone, journal: Path, cache: Path) -> None:
    assert replayed(journal, "--device", "cuda", *flags, cache=cache) == lone.replica.parameters_sha256()


def replayed(journal: Path, *flags: str, cache: Path, capability: str = "") -> str:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    if capability:
        environment["ATEN_CPU_CAPABILITY"] = capability
    command = [sys.executable, str(REPLAY), str(journal), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    sha256 = json.loads(done.stdout)["parameters_sha256"]
    assert isinstance(sha256, str)
    return sha256
