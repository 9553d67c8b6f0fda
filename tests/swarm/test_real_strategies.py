"""Each strategy among real peers: every reply is, to the byte, what a group in one process makes of the same text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from p2ptrain import chain
from p2ptrain.chain.evidence import body_of
from p2ptrain.config.manifest import Strategy, open_manifest
from p2ptrain.data.token_file import TokenFile
from p2ptrain.simulation.group import Group
from p2ptrain.state.journal import Journal
from p2ptrain.swarm.identity import verify

sys.path.insert(0, str(Path(__file__).parent))

from peers import Swarm, eventually

NAMES = ("ada", "grace", "linus", "vint")
ROUNDS_TOGETHER = 6
MANIFEST = """\
name = "test"
nonce = "{nonce}"
[model]
layers = 1
heads = 1
embedding = 16
context = 32
[data]
{data}
[optimizer]
strategy = "{strategy}"
inner_batch = 4
warmup_rounds = 3
total_rounds = 40
[round]
pace = "fixed"
sequences_per_peer = 8
micro_batch = 4
min_seconds = 0.2
grace_seconds = 20.0
reply_timeout_seconds = 20.0
seal_timeout_seconds = 10.0
round_max_seconds = 30.0
alone_after_seconds = 30.0
root_interval = 1000
"""

SHORT = ("demo", "sparse_diloco")
"""Tried at each change: the simplest, and that which has all that strategies have."""


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(name, marks=() if name in ("demo", "sparse_diloco") else pytest.mark.long)
        for name in get_args(Strategy)
    ],
)
def test_real_peers_come_to_what_a_group_in_one_process_comes_to(strategy: str, swarm: Swarm) -> None:
    data = swarm.own_text(NAMES[0])
    swarm.manifest.write_text(MANIFEST.format(nonce=os.urandom(16).hex(), data=data, strategy=strategy))
    first = swarm.bootstrap(NAMES[0])
    address = first.address()
    for name in NAMES[1:]:
        swarm.join(name, address)
    eventually(lambda: any(entry.get("members") == len(NAMES) for entry in first.entries()), 90.0, "four members")
    # One seal that names a member shapes the round after next.
    first.reaches(first.round + ROUNDS_TOGETHER + 2)
    swarm.close()
    manifest, run_id = open_manifest(first.home.joinpath("manifest.signed").read_bytes())
    torch.set_num_threads(1)
    file = manifest.data.token_file
    assert file is not None
    text = TokenFile(first.home / "data" / f"{file.root}.tokens").train
    group = Group(manifest, lambda peer_id: text)
    journal, state = Journal(first.home / "journal", run_id, verify), chain.genesis(run_id)
    compared = 0
    for number in range(1, journal.last + 1):
        sealed, shape = journal.read(number), chain.shape_of(state, group.codec.chunks)
        state = chain.extend(state, sealed.id, sealed.seal, group.codec.chunks)
        group.rounds = number - 1
        if not shape.members:
            continue  # the founder's first seal
        members = [member.peer_id for member in shape.members]
        assert chain.bits(sealed.seal.included, len(members)) == frozenset(range(len(members)))
        played = group.play(members, shape.parts, shape.group.standing)
        # The group makes what is signed, and signs nothing.
        replies = tuple(None if reply is None else body_of(reply) for reply in sealed.replies)
        assert replies == played.replies, f"round {number} of {len(members)} members"
        compared += len(members) == len(NAMES)
    assert compared >= ROUNDS_TOGETHER
