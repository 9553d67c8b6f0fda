"""What runs start from: weights of somebody's, which every peer makes the same bytes of."""

from __future__ import annotations

import json
import os
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from p2ptrain.cli.main import run
from p2ptrain.config.home import Home
from p2ptrain.config.loading import load_manifest
from p2ptrain.config.manifest import Manifest, TaskConfig, open_manifest, sign_manifest
from p2ptrain.data.preparing import Told
from p2ptrain.errors import ModelError, UsageError
from p2ptrain.models.of_manifest import check_model, task_of
from p2ptrain.models.weights import find_weights
from p2ptrain.state.own_log import OwnLog
from p2ptrain.training.replica import Replica
from p2ptrain.training.standing import Books
from p2ptrain.training.starting import from_path, place_values

transformers = pytest.importorskip("transformers")

FOUNDER = "12D3KooWA964U7Tn4pqAJrgP53vtK4iwcwhP9q2Xxx7CvPgwDiXa"


class Nobody(Told):
    def work(self, what: str, done: int, total: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `transformers`, in several files of bfloat16."""
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("llama") / "folder"
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="100KB")
    shutil.copy(str(resources.files("p2ptrain.data") / "embedded" / "tokenizer.json"), folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def init(folder: Path, *arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        run(["init", str(folder / "run.toml"), "--home", str(folder / "home"), "--force", *map(str, arguments)])
    return int(caught.value.code or 0)


def made(folder: Path) -> tuple[Manifest, TaskConfig, Home]:
    manifest = load_manifest(folder / "run.toml")
    assert manifest.task_config is not None
    return manifest, manifest.task_config, Home(folder / "home")


def in_home(home: Home, manifest: Manifest) -> Replica:
    """A home in which a peer has trained: its parameters are not those of the beginning any more."""
    signed = sign_manifest(manifest, home.load_or_create_owner_key(), FOUNDER)
    home.manifest.write_bytes(signed)
    opened, run_id = open_manifest(signed)
    task = opened.task_config
    values = None if task is None else home.values(task.values.root)
    replica = Replica(opened, run_id, torch.device("cpu"), task_of(opened, values))
    with torch.no_grad():
        for parameter in replica.task.parameters:
            parameter.tensor.add_(0.01)
    Books(replica, b"", home.checkpoints, OwnLog(home.own)).save()
    return replica


def test_a_folder_of_several_bfloat16_files_becomes_what_the_library_reads(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(tmp_path, "--from", llama, "--context", "32") == 0
    heard = capsys.readouterr()
    assert "bfloat16: converted to float32" in heard.err and "a newcomer fetches" in heard.out
    manifest, task, home = made(tmp_path)
    check_model(task)
    assert (task.kind, manifest.context, manifest.vocabulary) == ("hf", 32, 4096)
    trained = task_of(manifest, home.values(task.values.root))
    trained.begin()
    reference = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    found = {parameter.name: parameter.tensor for parameter in trained.parameters}
    assert [*found] == [name for name, _ in reference.named_parameters()]
    assert all(torch.equal(found[name], parameter) for name, parameter in reference.named_parameters())
    assert manifest.optimizer.learning_rate == 2.4e-3, "0.3 of what is for a width of 16"


def test_a_copy_of_the_weights_takes_the_place_of_the_file_and_another_does_not(tmp_path: Path, llama: Path) -> None:
    assert init(tmp_path, "--from", llama, "--lora", "r=2,target=attention") == 0
    manifest, task, home = made(tmp_path)
    assert task.lora_config is not None and manifest.parameters < task.values_parameters
    other = Home(tmp_path / "other")
    other.create()
    single = tmp_path / "one.safetensors"
    tensors = {name: tensor for file in llama.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(tensors, single)
    for copy in (single, home.values(task.values.root)):
        place_values(other, task, copy, Nobody())
        path = other.values(task.values.root)
        assert path.read_bytes() == home.values(task.values.root).read_bytes()
        path.unlink()
    tensors["model.norm.weight"] += 1
    save_file(tensors, single)
    with pytest.raises(ModelError, match="hash to") as caught:
        place_values(other, task, single, Nobody())
    assert "leave out --model" in caught.value.hint
    assert not list(other.data.glob("*.values"))


def test_a_file_of_weights_goes_with_a_config_and_a_pickle_is_never_read(tmp_path: Path, llama: Path) -> None:
    single = tmp_path / "one.safetensors"
    save_file({n: t for file in llama.glob("*.safetensors") for n, t in load_file(file).items()}, single)
    assert from_path(single, llama / "config.json").module.config.hidden_size == 16
    with pytest.raises(UsageError, match="which architecture"):
        from_path(single, None)
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    shutil.copy(llama / "config.json", pickles)
    (pickles / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    for path in (pickles, pickles / "pytorch_model.bin"):
        with pytest.raises(ModelError, match="pickle") as caught:
            from_path(path, None)
        assert "save_pretrained" in caught.value.hint
    config = json.loads((llama / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "other.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lack model\.layers\.2"):
        from_path(single, tmp_path / "other.json")


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, llama: Path) -> None:
    index = {"weight_map": {"model.norm.weight": f"../{os.path.relpath('/etc/passwd', tmp_path)}"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which its index names"):
        find_weights(tmp_path)


@pytest.mark.parametrize("lora", [(), ("--lora", "r=2")], ids=["all of it", "small matrices"])
def test_a_run_goes_on_from_another_runs_home_with_what_that_had_learned(
    tmp_path: Path, llama: Path, lora: tuple[str, ...]
) -> None:
    (tmp_path / "next").mkdir()
    assert init(tmp_path, "--from", llama, *lora) == 0
    manifest, _, home = made(tmp_path)
    before = in_home(home, manifest)
    assert init(tmp_path / "next", "--from", home.path) == 0
    manifest, task, home = made(tmp_path / "next")
    after = task_of(manifest, home.values(task.values.root))
    after.begin()
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        torch.testing.assert_close(after.module(tokens), before.model(tokens))
    assert task.lora_config is None and manifest.parameters == task.values_parameters


def test_the_built_in_model_goes_on_too(tmp_path: Path) -> None:
    (tmp_path / "next").mkdir()
    assert init(tmp_path) == 0
    home = Home(tmp_path / "home")
    before = in_home(home, load_manifest(tmp_path / "run.toml"))
    assert init(tmp_path / "next", "--from", home.path, "--context", "64") == 0
    manifest, task, home = made(tmp_path / "next")
    after = task_of(manifest, home.values(task.values.root))
    after.begin()
    assert (task.kind, manifest.context, manifest.model.layers) == ("gpt", 64, 2)
    kinds = {parameter.name: parameter.kind for parameter in after.parameters}
    assert kinds == {parameter.name: parameter.kind for parameter in before.task.parameters}
    for one, other in zip(after.parameters, before.task.parameters, strict=True):
        assert torch.equal(one.tensor, other.tensor)


def test_a_manifest_whose_model_another_library_would_build_otherwise_is_refused(tmp_path: Path, llama: Path) -> None:
    assert init(tmp_path, "--model", f"hf:{llama / 'config.json'}") == 0
    _, task, home = made(tmp_path)
    config = json.loads(str(task.config)) | {"intermediate_size": 40}
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    wrong = TaskConfig(kind="hf", parameters=task.parameters, values=task.values, config=text, context=16)
    with pytest.raises(ModelError, match="transformers builds one of"):
        check_model(wrong)
    too_long = TaskConfig(kind="hf", parameters=task.parameters, values=task.values, config=task.config, context=65)
    with pytest.raises(ModelError, match="longer than the model's 64"):
        check_model(too_long)
    assert home.values(task.values.root).exists()
