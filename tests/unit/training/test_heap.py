"""A peer holds no memory that it has no use for."""

from __future__ import annotations

import subprocess
import sys

STEPS = """
import sys
import torch
from p2ptrain.config.manifest import ModelConfig
from p2ptrain.models.gpt import GPT
from p2ptrain.optim.demo import DeMo
from p2ptrain.training.heap import load_no_compiler


class Asked:
    @property
    def __class__(self):
        raise AssertionError("somebody asks for the type of an object that is none of theirs")

bystander = Asked()
load_no_compiler()
model = GPT(ModelConfig(layers=1, heads=1, embedding=32, context=8, vocabulary=64))
optimizer = DeMo(model.parameters())
for _ in range(2):
    optimizer.zero_grad()
    model.loss(torch.zeros(2, 9, dtype=torch.int64)).backward()
    optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules, "the compiler was loaded"

# Whoever wants it has it all the same.
double = torch.compile(lambda x: 2 * x, backend="eager")
assert torch.equal(double(torch.ones(2)), 2 * torch.ones(2))
"""


def test_training_loads_no_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
