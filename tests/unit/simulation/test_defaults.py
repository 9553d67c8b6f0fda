"""What a run.toml that says nothing but the model gets does not make that model worse than it was at the start."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from p2ptrain.config import strategies
from p2ptrain.config.manifest import Manifest
from p2ptrain.simulation.group import Group

SETTLED_ROUNDS, ROUNDS = 10, 24


def zipf_text(count: int) -> np.ndarray:
    """Tokens as frequent as words are, of which each goes by the one before as well."""
    draw = np.random.default_rng(3)
    weights = 1 / np.arange(1, 4097)
    tokens = draw.choice(4096, count, p=weights / weights.sum())
    follows = draw.random(count) < 0.3
    tokens[1:][follows[1:]] = (tokens[:-1][follows[1:]] * 7 + 3) % 4096
    return tokens.astype(np.uint16)


@pytest.mark.parametrize("members", [1, 4])
def test_after_ten_rounds_the_loss_is_never_above_that_of_knowing_nothing(members: int) -> None:
    batch = 8
    table = {
        "name": "a",
        "nonce": "07" * 16,
        "model": {"layers": 1, "heads": 4, "embedding": 256, "context": 32},
        "round": {
            "pace": "fixed",
            "target_batch": batch,
            "sequences_per_peer": batch // members,
            "micro_batch": batch // members,
        },
    }
    text, before = zipf_text(20_000), torch.get_num_threads()
    group = Group(msgspec.convert(strategies.completed(table), Manifest), lambda peer_id: text)
    names = [f"member {number}".encode() for number in range(members)]
    torch.set_num_threads(1)
    try:
        losses = [group.play(names, group.equal_parts(members)).loss for _ in range(ROUNDS)]
    finally:
        torch.set_num_threads(before)
    assert losses[0] == pytest.approx(np.log(4096), abs=0.01)
    assert max(losses[SETTLED_ROUNDS:]) < losses[0]
    assert np.mean(losses[-4:]) < losses[0] - 0.3
