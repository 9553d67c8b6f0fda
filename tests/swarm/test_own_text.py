"""A run on a text of one's own, with a tokenizer of its own: whoever joins has it from the swarm."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2ptrain.config.loading import load_manifest
from p2ptrain.data.corpus import load_embedded

sys.path.insert(0, str(Path(__file__).parent))

from peers import MANIFEST, Swarm, run


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


def test_a_joiner_without_a_copy_trains_on_the_owners_records_to_the_same_state(swarm: Swarm) -> None:
    paragraphs = load_embedded().train[:400_000].decode().split("\n\n")
    records, made = swarm.folder / "records.jsonl", swarm.folder / "made.toml"
    records.write_text("".join(json.dumps({"body": paragraph}) + "\n" for paragraph in paragraphs))
    flags = ("--field", "body", "--tokenizer", "train:600", "--license", "CC0-1.0", "--home", str(swarm.folder / "ada"))
    assert run("init", str(made), "--data", str(records), *flags).returncode == 0
    text = made.read_text()
    data = text.split("[data]\n")[1].split("\n# What peers compute")[0]
    manifest = MANIFEST.format(nonce=os.urandom(16).hex(), last_round=30, data=data, root_interval=8)
    swarm.manifest.write_text(manifest)
    assert load_manifest(made).model.vocabulary == 600
    ada = swarm.bootstrap("ada")
    address = ada.address()
    bob, carol = swarm.join("bob", address), swarm.join("carol", address, "--part", "0.3")
    for peer in (ada, bob, carol):
        peer.ended()
    assert ada.replica() == bob.replica() == carol.replica()
    assert not list((swarm.folder / "carol" / "data").glob("*.tokens")), "it has no whole file"
    homes = [swarm.folder / name for name in ("ada", "bob")]
    tokens = [next((home / "data").glob("*.tokens")) for home in homes]
    assert tokens[0].name == tokens[1].name and tokens[0].read_bytes() == tokens[1].read_bytes()
    shown = json.loads(run("data", "--home", str(homes[1]), "--format", "json").stdout)
    assert (shown["sources"][0]["name"], shown["sources"][0]["license"]) == ("records", "CC0-1.0")
    assert shown["tokens"]["vocabulary"] == 600 and shown["tokens"]["documents"] > 100
    measured = json.loads(run("eval", "--home", str(homes[1]), "--format", "json").stdout)
    assert measured["parameters_sha256"] == bob.replica()[1] and measured["heldout_bytes"] > 1000
