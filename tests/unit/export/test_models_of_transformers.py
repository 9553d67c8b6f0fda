"""Models that `transformers` has: whole, as an adapter, and with the adapter merged, all as the libraries load them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from homes import made_home

from p2ptrain.cli.main import run
from p2ptrain.config.loading import load_manifest
from p2ptrain.training.replica import Replica

transformers = pytest.importorskip("transformers", reason="pip install 'p2ptrain[export]'")

ROUND = 10
CONFIG = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
TOKENS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(2))


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        run(list(map(str, arguments)))
    return int(caught.value.code or 0)


def home_of(tmp_path: Path, *flags: object) -> Replica:
    """A home in `tmp_path` whose run `init` has made with these flags; returns the replica of its only round."""
    toml, home = tmp_path / "run.toml", tmp_path / "home"
    assert command("init", toml, "--home", home, *flags) == 0
    _, held = made_home(home, load_manifest(toml), (), ROUND)
    return held[ROUND]


def export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, *flags: object
) -> tuple[Path, dict[str, Any]]:
    capsys.readouterr()
    assert command("export", tmp_path / name, "--home", tmp_path / "home", "--json", *flags) == 0
    return tmp_path / name, json.loads(capsys.readouterr().out)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        made = model(TOKENS)
    return made if isinstance(made, torch.Tensor) else made.logits


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=2e-6 * float(one.abs().max()))


def test_a_model_from_its_config_alone_loads_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    replica = home_of(tmp_path, "--model", f"hf:{tmp_path / 'config.json'}")
    out, result = export(tmp_path, capsys, "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM" and model.lm_head.weight is model.model.embed_tokens.weight
    assert alike(logits(model), logits(replica.model))
    assert result["parameters_sha256"] == replica.parameters_sha256()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("Fellow citizens — of 1860").input_ids) == "Fellow citizens — of 1860"
    card = (out / "README.md").read_text()
    assert "architecture `llama`" in card and "state\\-of\\-the\\-union" in card
    assert command("export", tmp_path / "other", "--home", tmp_path / "home", "--format", "gguf") == 16
    assert "convert_hf_to_gguf.py" in capsys.readouterr().err


def test_small_matrices_are_an_adapter_of_peft_and_merged_a_model_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft", reason="pip install 'p2ptrain[lora]'")
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**CONFIG))
    base.save_pretrained(tmp_path / "base")
    replica = home_of(tmp_path, "--from", tmp_path / "base", "--lora", "r=2,alpha=6,target=attention")
    expected = logits(replica.model)
    assert not alike(expected, logits(base)), "the small matrices count"

    adapter, result = export(tmp_path, capsys, "adapter")
    assert result["files"].keys() == {"adapter_model.safetensors"}
    loaded = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter
    )
    assert alike(logits(loaded), expected)
    card = (adapter / "README.md").read_text()
    assert "rank 2 and alpha 6" in card and "PeftModel" in card

    merged, _ = export(tmp_path, capsys, "merged", "--merge")
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert not [name for name, _ in whole.named_parameters() if "lora" in name]
    # Merged, every weight is rounded anew, and matrices as large as these magnify it up to a hundred times.
    assert torch.allclose(logits(whole), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))

    plain, _ = export(tmp_path, capsys, "plain", "--format", "safetensors")
    names = list(pytest.importorskip("safetensors.torch").load_file(plain / "model.safetensors"))
    assert sorted(names) == sorted(parameter.name for parameter in replica.task.parameters)
