"""After the warm-up no round has anything left to compile."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: in this one other tests have compiled what they use.
PROGRAM = """
from typing import get_args

import msgspec
import numpy as np

from p2ptrain.chain import Part
from p2ptrain.compression.kernels.compiled import ALL
from p2ptrain.config import strategies
from p2ptrain.config.manifest import Manifest, Strategy
from p2ptrain.simulation.group import Group
from p2ptrain.training.warm_up import warm_up

def compiled():
    return {one.py_func.__qualname__: list(one.signatures) for one in ALL}

warm_up()
before = compiled()
for strategy in get_args(Strategy):
    table = {
        "name": "a",
        "nonce": "07" * 16,
        "model": {"layers": 1, "heads": 1, "embedding": 64, "context": 8},
        "optimizer": {"strategy": strategy, "inner_batch": 2},
        "round": {"pace": "fixed", "sequences_per_peer": 2, "micro_batch": 2},
    }
    group = Group(msgspec.convert(strategies.completed(table), Manifest), lambda peer: np.arange(500, dtype=np.uint16))
    for members in ([b"one"], [b"one", b"another", b"a third"]):
        group.play(members, group.equal_parts(len(members)))
after = compiled()
assert after == before, {name: (after[name], before[name]) for name in after if after[name] != before[name]}
"""


def test_no_strategy_has_anything_left_to_compile() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
