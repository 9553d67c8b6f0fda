"""A group over one replica is what as many replicas of their own come to."""

from __future__ import annotations

from typing import get_args

import msgspec
import numpy as np
import pytest
import torch

from p2ptrain.compression import wire
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.config import strategies
from p2ptrain.config.manifest import Manifest, Strategy
from p2ptrain.data.assignment import sequence_offset
from p2ptrain.simulation.group import Group
from p2ptrain.training.replica import Replica, build_local

MEMBERS = [b"one", b"another", b"a third"]
CONTEXT, SEQUENCES = 8, 4
TEXTS = [np.random.default_rng(seed).integers(0, 4096, 500).astype(np.uint16) for seed in range(3)]


def manifest(strategy: str) -> Manifest:
    table = {
        "name": "a",
        "nonce": "07" * 16,
        "model": {"layers": 1, "heads": 1, "embedding": 8, "context": CONTEXT},
        "optimizer": {"strategy": strategy, "inner_batch": 2, "warmup_rounds": 2},
        "round": {"pace": "fixed", "sequences_per_peer": SEQUENCES, "micro_batch": 2},
    }
    return msgspec.convert(strategies.completed(table), Manifest)


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_it_is_what_replicas_of_their_own_come_to(strategy: str) -> None:
    config = manifest(strategy)
    group = Group(config, dict(zip(MEMBERS, TEXTS, strict=True)).__getitem__)
    replicas = [Replica(config, bytes(32), torch.device("cpu")) for _ in MEMBERS]
    locals_ = [build_local(replica.model, config) for replica in replicas]
    start = replicas[0].parameters_sha256()
    for round in range(1, 4):
        played = group.play(MEMBERS, group.equal_parts(3))
        losses, payloads, pending = [], [], []
        for member, (replica, local) in enumerate(zip(replicas, locals_, strict=True)):
            for pair in range(SEQUENCES // 2):
                counts = [(round - 1) * SEQUENCES + 2 * pair + n for n in (0, 1)]
                offsets = [sequence_offset(b"\7" * 16, MEMBERS[member], c, 500, CONTEXT) for c in counts]
                batch = torch.tensor(np.stack([TEXTS[member][o : o + CONTEXT + 1] for o in offsets]).astype(int))
                losses.append(
                    local.compute(lambda r=replica, b=batch: r.model.loss(b), 2, replica.rate_at(round))  # type: ignore[misc]
                )
            local.gather()
            optimizer = replica.optimizer
            optimizer.accumulate()
            pending.append(optimizer.select())
            optimizer.zero_grad()
            # One part: chunks of a reply do not depend on the parts they lie in, where nobody is clipped.
            payloads.append(wire.encode_contribution(pending[-1].sent, optimizer.codec))
        codec, contributions = (
            replicas[0].codec,
            [(member, SEQUENCES, payload) for member, payload in enumerate(payloads)],
        )
        reply = reduce_part(contributions, codec, 0, codec.chunks, 3)
        content = wire.decode_reply(reply, codec, 0, codec.chunks, 3)
        inner = config.optimizer.gathers_way
        for member, replica in enumerate(replicas):
            rate = config.optimizer.outer_learning_rate if inner else replica.rate_at(round)
            replica.optimizer.apply([(0, codec.chunks, content)], rate)
            replica.optimizer.settle(pending[member], [(0, codec.chunks, content)], member)
        assert played.loss == pytest.approx(np.mean(losses), rel=1e-6)
        assert not content.clips
        assert {replica.parameters_sha256() for replica in replicas} == {_hash(group)}
        # Each sends two of three parts of its contribution, and its own part's reply to two others.
        assert played.sent_bytes == pytest.approx((2 * len(payloads[0]) + 2 * len(reply)) / 3, rel=0.1)
    assert replicas[0].parameters_sha256() != start


def _hash(group: Group) -> str:
    """As a replica's."""
    import hashlib

    digest = hashlib.sha256()
    for parameter in group.model.parameters():
        digest.update(parameter.detach().numpy().astype("<f4").tobytes())
    return digest.hexdigest()
