"""Two processes that are one peer compute what one process computes, and leave none behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("two_ranks.py")


def torchrun(*arguments: str, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run two ranks to their end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)


def test_two_ranks_gather_what_one_process_gathers_of_the_same_sequences() -> None:
    done = torchrun(str(SCRIPT))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("too little") is None, "a rank would have nothing to learn from"
    assert len(found) == 7
    for what, distance in found.items():
        # Sums are in another order; AdamW's steps make small differences of small gradients larger.
        assert distance < (1e-5 if what.startswith("mean") or what == "masked" else 1e-3), (what, distance)
