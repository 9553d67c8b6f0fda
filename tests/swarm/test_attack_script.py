"""What can be checked of `scripts/attack_swarm.py` without a swarm; the script itself runs long."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts/bench"))

from attack_swarm import COLUMNS, holds, show
from attacks.catalogue import ATTACKS
from attacks.donors import HostileManifests
from attacks.forged import identity_from, key_from, made_up_peer_id, random_row
from attacks.hostile import Hostile

from p2ptrain import chain
from p2ptrain.calls.messages import CallError, Welcome, decode_message
from p2ptrain.chain import Join
from p2ptrain.chain.sealed import decode_sealed
from p2ptrain.compression.codec import Codec
from p2ptrain.config.manifest import PROTOCOL_VERSION, Manifest, open_manifest, sign_manifest
from p2ptrain.errors import ManifestError
from p2ptrain.simulation.forged import Branch
from p2ptrain.swarm.identity import format_peer_id, load_or_create_identity, verify

ROOT = Path(__file__).resolve().parents[2]
CODEC = Codec(topk=(8, 8), reply_topk=(8, 8), value_bits=2)


def test_the_document_lists_every_attack_and_no_other() -> None:
    text = (ROOT / "docs/security.md").read_text().split("## Attacks")[1].split("\n## ")[0]
    table = text.split("| `--attack` |")[1]
    assert set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\|([^|]*)\|", table, re.M)))) == ATTACKS.keys()


def test_a_forged_branch_is_signed_and_hands_out_what_follows_an_id(tmp_path: Path) -> None:
    chance = random.Random(1)
    me = key_from(chance, tmp_path / "key")
    assert load_or_create_identity(tmp_path / "key").peer_id == me.peer_id
    branch = Branch(chain.genesis(bytes(32)), CODEC)
    newcomer = Join(made_up_peer_id(chance), random_row(chance))
    made = [branch.forge(me, solo=True, joins=(newcomer,)).id, *(branch.forge(me).id for _ in range(3))]
    assert branch.tip.id == made[-1]
    assert branch.tip.total > 3, "those made up are counted"
    ancestor, encoded = branch.after((b"unknown", made[1]))
    assert ancestor == made[1]
    assert [decode_sealed(one, verify).id for one in encoded] == made[2:]
    branch.back_to_parent()
    assert branch.tip.id == made[2]


def test_one_seed_is_one_attacker(tmp_path: Path) -> None:
    made = [key_from(random.Random(seed), tmp_path / "key").peer_id for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_what_is_handed_out_for_a_manifest_is_none() -> None:
    chance = random.Random(1)
    owner = identity_from(chance)
    made = Manifest(name="attacked", nonce="00" * 16)
    signed = sign_manifest(made, owner.key, format_peer_id(owner.peer_id))
    run_id = open_manifest(signed)[1]
    welcome = Welcome(PROTOCOL_VERSION, run_id, signed, None, "")
    attack = HostileManifests(cast(Hostile, SimpleNamespace(welcome=welcome, chance=chance, run_id=run_id)))
    ways = attack.ways()
    del ways["silent"]

    async def first(way: Callable[[], AsyncIterator[BytesValue]]) -> bytes:
        return bytes((await anext(way())).value)

    assert len(ways) == 7
    for name, way in ways.items():
        with pytest.raises((CallError, ManifestError)):
            open_manifest(decode_message(asyncio.run(first(way)), Welcome).manifest, run_id)
            pytest.fail(f"{name} is one")


def test_what_lying_peers_replace_is_there() -> None:
    code = "import pathlib, lying_peer; [lie(pathlib.Path('none')) for lie in lying_peer.LIES.values()]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts/attacks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_row_holds_only_without_harm_and_near_calm() -> None:
    good = dict.fromkeys(COLUMNS, False) | {
        "attack": "none",
        "framed": False,
        "newcomer": "none",
        "newcomer_seconds": None,
        "newcomer_left_again": False,
        "did": {},
        "rounds_per_minute_ratio": 0.8,
        "rss_growth": 0.09,
    }
    assert holds(good)
    for harm in ({"crashed": True}, {"diverged": True}, {"taken_over": True}, {"framed": True}):
        assert not holds(good | harm)
    assert not holds(good | {"rounds_per_minute_ratio": 0.79})
    assert not holds(good | {"rss_growth": 0.1})
    assert not holds(good | {"did": {"let_in": 1}}), "an outsider in a run that is not for it"
    assert not holds(good | {"newcomer": "one honest"}), "a newcomer that has not come"
    came = good | {"newcomer": "one honest", "newcomer_seconds": 12.0}
    assert holds(came)
    assert not holds(came | {"newcomer_left_again": True})
    assert len(show([good]).splitlines()) == 2
