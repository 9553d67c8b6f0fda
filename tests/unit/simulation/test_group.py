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
        losses, pending = [], []
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
        codec, contents, sent = replicas[0].codec, [], 0
        for part in group.equal_parts(3):
            contributions = [
                (member, SEQUENCES, wire.encode_contribution(one.sent.cut(part.start, part.end), codec))
                for member, one in enumerate(pending)
            ]
            reply = reduce_part(contributions, codec, part.start, part.end, 3)
            # All but the part's reducer send it their part of a contribution, and it sends its reply to them.
            sent += sum(len(payload) for member, _, payload in contributions if member != part.reducer) + 2 * len(reply)
            contents.append((part.start, part.end, wire.decode_reply(reply, codec, part.start, part.end, 3)))
        inner = config.optimizer.gathers_way
        for member, replica in enumerate(replicas):
            rate = config.optimizer.outer_learning_rate if inner else replica.rate_at(round)
            replica.optimizer.apply(contents, rate)
            replica.optimizer.settle(pending[member], contents, member)
        assert played.loss == pytest.approx(np.mean(losses), rel=1e-6)
        assert not any(content.clips for _, _, content in contents)
        assert {replica.parameters_sha256() for replica in replicas} == {_hash(group)}
        assert played.sent_bytes == pytest.approx(sent / 3)
    assert replicas[0].parameters_sha256() != start


def _hash(group: Group) -> str:
    """As a replica's."""
    import hashlib

    digest = hashlib.sha256()
    for parameter in group.model.parameters():
        digest.update(parameter.detach().numpy().astype("<f4").tobytes())
    return digest.hexdigest()
