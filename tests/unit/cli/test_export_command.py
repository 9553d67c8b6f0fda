"""`p2ptrain export`, from a home to what others load."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from homes import made_home
from lone import MANIFEST

from p2ptrain.cli.main import run
from p2ptrain.config.loading import load_manifest
from p2ptrain.state.snapshot import SnapshotStore, piece_hashes, root_of
from p2ptrain.training.replica import Replica

transformers = pytest.importorskip("transformers", reason="pip install 'p2ptrain[export]'")
gguf = pytest.importorskip("gguf", reason="pip install 'p2ptrain[export]'")
safetensors = pytest.importorskip("safetensors.torch", reason="pip install 'p2ptrain[export]'")

CHECKPOINT, SNAPSHOTS = 10, (4, 8)


class OwnModel(nn.Module):
    """A model of somebody's own, of which a part is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.frozen = nn.Linear(3, 5), nn.Linear(5, 2)
        self.frozen.requires_grad_(False)


@pytest.fixture
def home(tmp_path: Path) -> tuple[Path, dict[int, Replica]]:
    made, held = made_home(tmp_path / "home", MANIFEST, SNAPSHOTS, CHECKPOINT)
    return made.path, held


def exported(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    with pytest.raises(SystemExit) as caught:
        run(["export", *map(str, arguments), "--json"])
    said = capsys.readouterr()
    assert not caught.value.code, said.err
    result: dict[str, Any] = json.loads(said.out)
    return result


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        run(["export", *map(str, arguments)])
    assert caught.value.code == code
    return capsys.readouterr().err


def test_transformers_loads_the_newest_round(
    home: tuple[Path, dict[int, Replica]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, held = home
    result = exported(capsys, tmp_path / "out", "--home", path)
    replica = held[CHECKPOINT]
    assert (result["round"], result["state_id"]) == (CHECKPOINT, replica.chain.id.hex())
    assert result["parameters_sha256"] == replica.parameters_sha256()
    data = replica.snapshot()
    assert result["root"] == root_of(len(data), piece_hashes(data)).hex()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not list(tmp_path.glob(".tmp-*"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer("Fellow citizens", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, replica.model(tokens), rtol=0, atol=1e-5)


def test_a_snapshot_is_exported_by_its_round_under_our_own_names_with_the_root_that_the_chain_has(
    home: tuple[Path, dict[int, Replica]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, held = home
    result = exported(capsys, tmp_path / "out", "--home", path, "--round", 8, "--format", "safetensors")
    snapshot = next(s for s in SnapshotStore(path / "checkpoints").all() if s.round == 8)
    assert (result["round"], result["root"]) == (8, snapshot.root.hex())
    tensors = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    expected = dict(held[8].model.named_parameters())
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        said = file.metadata()
    assert said["state_id"] == result["state_id"] and json.loads(said["model"])["embedding"] == 16


def test_a_gguf_file_is_of_the_same_parameters(
    home: tuple[Path, dict[int, Replica]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, held = home
    result = exported(capsys, tmp_path / "out", "--home", path, "--format", "gguf")
    assert result["tokenizer"] and result["files"].keys() == {"model.gguf"}
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert np.array_equal(tensors["output.weight"], held[CHECKPOINT].model.head.weight.detach().numpy())


def test_what_is_known_of_a_text_of_ones_own_is_in_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    letters, home, toml = tmp_path / "letters.txt", tmp_path / "home", tmp_path / "run.toml"
    letters.write_text("\n\n".join(f"Dear reader, this is letter {number} of many." for number in range(400)))
    stated = ["--license", "MIT", "--attribution", "A. <b>Reader</b>"]
    with pytest.raises(SystemExit) as caught:
        run(["init", str(toml), "--data", str(letters), *stated, "--tokenizer", "train:300", "--home", str(home)])
    assert not caught.value.code
    capsys.readouterr()
    manifest = load_manifest(toml)
    small = msgspec.structs.replace(MANIFEST.model, vocabulary=manifest.model.vocabulary)
    made_home(home, msgspec.structs.replace(manifest, model=small), (), CHECKPOINT)
    result = exported(capsys, tmp_path / "out", "--home", home, "--evaluate")
    with pytest.raises(SystemExit):
        run(["eval", "--home", str(home), "--format", "json"])
    measured = json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert result["bits_per_byte"] == measured
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{measured:.4f} bits per byte" in card and "license: mit" in card and "A\\. \\<b\\>Reader" in card
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token == "<|endoftext|>"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 0


def test_a_round_that_the_home_does_not_hold_is_refused_with_those_that_it_does(
    home: tuple[Path, dict[int, Replica]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, 10, tmp_path / "out", "--home", home[0], "--round", 7)
    assert "does not hold round 7; it holds 4, 8, 10" in said and "--round 10" in said
    assert not (tmp_path / "out").exists()


def test_a_damaged_snapshot_is_not_exported(
    home: tuple[Path, dict[int, Replica]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (snapshot,) = (s for s in SnapshotStore(home[0] / "checkpoints").all() if s.round == 8)
    data = bytearray(snapshot.read())
    data[-1] ^= 1
    snapshot.path.write_bytes(data)
    assert "damaged" in refused(capsys, 10, tmp_path / "out", "--home", home[0], "--round", 8)


def test_only_what_an_export_has_written_is_replaced_and_only_with_force(
    home: tuple[Path, dict[int, Replica]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, common = tmp_path / "out", ("--home", home[0], "--format", "safetensors")
    exported(capsys, out, *common, "--round", 4)
    before = (out / "model.safetensors").read_bytes()
    assert "exists" in refused(capsys, 2, out, *common)
    assert (out / "model.safetensors").read_bytes() == before
    assert exported(capsys, out, *common, "--force")["round"] == CHECKPOINT
    (out / "thesis.tex").write_text("years of work")
    assert "'thesis.tex'" in refused(capsys, 2, out, *common, "--force")
    assert (out / "thesis.tex").exists()
    assert "home" in refused(capsys, 2, home[0], *common, "--force")
    assert "mkdir" in refused(capsys, 2, tmp_path / "no" / "out", *common)


def test_a_model_of_somebodys_own_is_exported_without_its_code_under_its_own_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = OwnModel()
    home, held = made_home(tmp_path / "home", MANIFEST, (), CHECKPOINT, module)
    assert "--format safetensors" in refused(capsys, 16, tmp_path / "out", "--home", home.path)
    result = exported(capsys, tmp_path / "out", "--home", home.path, "--format", "safetensors")
    assert result["parameters_sha256"] == held[CHECKPOINT].parameters_sha256()
    tensors = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert list(tensors) == ["body.bias", "body.weight"] and torch.equal(tensors["body.weight"], module.body.weight)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the same on every peer: `frozen.weight`, `frozen.bias`." in card
    # What such a run trains on is its peers' own programs' affair.
    assert "state-of-the-union" not in card and "license" not in card.split("---")[1]


def test_a_package_that_is_missing_is_named_with_the_extra(
    home: tuple[Path, dict[int, Replica]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    said = refused(capsys, 2, tmp_path / "out", "--home", home[0], "--format", "gguf")
    assert "needs gguf" in said and "p2ptrain[export]" in said
