"""A run that starts from somebody's weights, by the command line alone: small matrices are trained beside them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from p2ptrain.config.loading import load_manifest
from p2ptrain.data.corpus import load_embedded
from p2ptrain.state.snapshot import SnapshotStore

sys.path.insert(0, str(Path(__file__).parent))

from peers import Swarm, run

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder as `transformers` writes it: a tiny Llama in bfloat16, with a tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    folder = tmp_path / "llama"
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="100KB")
    shutil.copy(str(resources.files("p2ptrain.data") / "embedded" / "tokenizer.json"), folder)
    return folder


def test_peers_train_small_matrices_beside_weights_that_they_fetch_or_have(swarm: Swarm, weights: Path) -> None:
    toml = swarm.manifest
    swarm.text.write_bytes(load_embedded().train[:400_000])
    text = ("--data", str(swarm.text), "--license", "LicenseRef-Public-Domain")
    lora = ("--lora", "r=4,alpha=8,target=all", "--context", "32")
    made = run("init", str(toml), "--from", str(weights), *lora, *text, "--home", str(swarm.folder / "ada"))
    assert made.returncode == 0, made.stderr
    assert "bfloat16" in made.stderr and "are trained, beside a model that is held fixed" in made.stdout
    for key, value in {"root_interval": 4, "min_seconds": 0.4, "max_seconds": 1.0}.items():
        toml.write_text(re.sub(rf"^{key} = .*$", f"{key} = {value}", toml.read_text(), flags=re.M))
    manifest = load_manifest(toml)
    assert manifest.parameters == 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64)), "of each of 7 matrices a rank of 4"
    assert manifest.task_config is not None and manifest.context == 32
    ada = swarm.bootstrap("ada")
    address = ada.address()
    bob = swarm.join("bob", address)
    bob.reaches(5, seconds=120)
    carol = swarm.join("carol", address, "--model", str(weights))
    carol.reaches(1, seconds=120)
    carol.reaches(carol.round + 8, seconds=120)  # counted from where she came in: two states with a root
    for peer in (ada, bob, carol):
        peer.process.send_signal(signal.SIGINT)
    for peer in (ada, bob, carol):
        peer.ended()
    rooted = [
        {(one.round, one.id, one.root) for one in SnapshotStore(peer.home / "checkpoints").all()}
        for peer in (ada, bob, carol)
    ]
    assert len(set.intersection(*rooted)) > 1, "one may have come to carol as it is, the next is her own"
    files = [swarm.folder / name / "data" / f"{manifest.task_config.values.root}.values" for name in ("ada", "bob")]
    assert files[0].read_bytes() == files[1].read_bytes()
    fetched = [line["message"] for line in carol.entries() if "first values" in line.get("message", "")]
    assert not fetched, "it has them from its own copy"
    measured = json.loads(run("eval", "--home", str(swarm.folder / "carol"), "--format", "json").stdout)
    assert measured["parameters_sha256"] == carol.replica()[1] and 0 < measured["bits_per_byte"] < 4
    written = run("sample", "--home", str(swarm.folder / "bob"), "--prompt", "My fellow", "--tokens", "4")
    assert written.returncode == 0 and written.stdout.startswith("My fellow")
