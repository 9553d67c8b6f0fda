"""Models of `transformers`: what a config may ask for, and that what is trained computes what the library does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from p2ptrain.config.manifest import FileConfig, LoraConfig, TaskConfig
from p2ptrain.errors import ModelError, UsageError
from p2ptrain.models import hf, lora
from p2ptrain.models.gpt import continued
from p2ptrain.models.own import beginning_of

transformers = pytest.importorskip("transformers")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 300,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def architecture(folder: Path, table: dict[str, Any]) -> hf.Architecture:
    (folder / "config.json").write_text(json.dumps(table))
    return hf.read_config(folder)


def task(of: hf.Architecture, **more: Any) -> TaskConfig:
    return TaskConfig(
        kind="hf", parameters=1, values=FileConfig(bytes=1, root="0" * 64), config=of.text(), context=16, **more
    )


@pytest.mark.parametrize("table", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_model_of_a_manifest_gives_the_logits_and_the_loss_of_the_library(
    tmp_path: Path, table: dict[str, Any]
) -> None:
    made = hf.transformers_model(task(architecture(tmp_path, table)))
    reference = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[table["model_type"]](**table))
    assert [*made.state_dict()] == [*reference.state_dict()]
    made.load_state_dict(reference.state_dict())
    model, tokens = hf.LanguageModel(made, 16, 300), torch.randint(0, 300, (2, 17))
    reference.eval()
    with torch.no_grad():
        assert torch.equal(model(tokens), reference(tokens).logits)
        # The library shifts labels itself.
        torch.testing.assert_close(model.loss(tokens), reference(tokens, labels=tokens).loss)
        half = np.arange(17)[None].repeat(2, 0) >= 9
        labels = tokens.masked_fill(torch.from_numpy(~half), -100)
        torch.testing.assert_close(model.loss(tokens, half), reference(tokens, labels=labels).loss)
    with torch.no_grad():
        # Beyond the context, which is 16, and without what the model remembers.
        anew = continued(model, [5, 6], 20, 16, 0.0, 0, torch.device("cpu"))
    assert model.generate([5, 6], 20, 0.0, 0) == anew
    start = torch.tensor([[5, 6]])
    greedy = reference.generate(start, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert anew[:10] == greedy[0].tolist()
    assert model.loss(tokens).requires_grad and made.training


def test_kinds_follow_from_the_architecture_and_what_is_tied_stands_once(tmp_path: Path) -> None:
    made = hf.transformers_model(task(architecture(tmp_path, LLAMA)))
    kinds = {entry.name: entry.kind for entry in beginning_of(made).header.trained}
    assert kinds["model.embed_tokens.weight"] == "embedding" and "lm_head.weight" not in kinds
    assert kinds["model.norm.weight"] == "vector"
    assert kinds["model.layers.1.self_attn.q_proj.weight"] == "matrix"


def test_a_config_keeps_nulls_and_leaves_out_what_names_code(tmp_path: Path) -> None:
    table = {"model_type": "mistral", "vocab_size": 300, "hidden_size": 16, "num_attention_heads": 2}
    more = {"sliding_window": None, "auto_map": {"AutoConfig": "own.Config"}, "attn_implementation": "someone/kernel"}
    found = architecture(tmp_path, table | more | {"num_hidden_layers": 1, "torch_dtype": "bfloat16", "typo": 1})
    assert found.table["sliding_window"] is None and found.left_out == ("typo",)
    assert not found.table.keys() & {"auto_map", "attn_implementation", "torch_dtype", "dtype", "typo"}
    assert hf.checked_config(task(found).architecture).sliding_window is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_hidden_layers": 10**9}, "out of range"),
        ({"num_hidden_layers": 1024, "hidden_size": 4096, "intermediate_size": 4096}, "more than 2,147,483,648"),
        ({"vocab_size": 2**31}, "more than 2,147,483,648 parameters"),
        ({"hidden_size": "a"}, "expected int, got str"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"hidden_act": "os.system"}, "cannot build"),
        ({"model_type": "resnet"}, "no causal language model"),
        ({"model_type": "../x"}, "no causal language model"),
        ({"auto_map": {"AutoModelForCausalLM": "own.Model"}}, "auto_map"),
        ({"_attn_implementation": "someone/kernel"}, "_attn_implementation"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"dtype": "float16"}, "dtype"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_strangers_config_that_asks_for_more_than_an_architecture_is_refused(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    table = architecture(tmp_path, LLAMA).table | change
    with pytest.raises(ModelError, match=why):
        hf.without_memory(hf.checked_config(table))


def test_a_joiner_without_the_library_hears_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        hf.checked_config(LLAMA)
    assert caught.value.hint == "pip install 'p2ptrain[transformers]'"


@pytest.mark.parametrize("table", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_small_matrices_begin_as_the_model_was_and_merge_into_what_they_computed(
    tmp_path: Path, table: dict[str, Any]
) -> None:
    pytest.importorskip("peft")
    made = hf.with_values(hf.checked_config(architecture(tmp_path, table).table), 1)
    model, tokens = hf.LanguageModel(made, 16, 300), torch.randint(0, 300, (2, 9))
    names = [name for name, _ in made.named_parameters()]
    with torch.no_grad():
        before = model(tokens)
    config = lora.read_asked("r=2,alpha=8,target=all").config(made)
    matrices = lora.add_matrices(made, config)
    lora.begin(matrices, b"nonce")
    first = [matrix.tensor.clone() for matrix in matrices]
    with torch.no_grad():
        assert torch.equal(model(tokens), before)
    model.loss(tokens).backward()
    assert all(p.requires_grad == (".lora_" in name) for name, p in made.named_parameters())
    with torch.no_grad():
        for matrix in matrices:
            matrix.tensor.add_(torch.randn_like(matrix.tensor))
        moved = model(tokens)
        lora.merge(made)
        torch.testing.assert_close(model(tokens), moved)
    assert [name for name, _ in made.named_parameters()] == names
    again = lora.add_matrices(made, config)
    lora.begin(again, b"nonce")
    assert all(torch.equal(one.tensor, was) for one, was in zip(again, first, strict=True))


@pytest.mark.parametrize(
    ("table", "target", "ends"),
    [
        (LLAMA, "attention", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
        (GPT2, "mlp", {"mlp.c_fc", "mlp.c_proj"}),
        (GPT2, "attn.c_proj,c_fc", {"attn.c_proj", "c_fc"}),
    ],
    ids=["attention", "mlp", "names"],
)
def test_targets_are_ends_of_names_which_mean_nothing_else(
    tmp_path: Path, table: dict[str, Any], target: str, ends: set[str]
) -> None:
    module = hf.without_memory(hf.checked_config(architecture(tmp_path, table).table))
    config = lora.read_asked(f"r=4,target={target}").config(module)
    assert (config.rank, config.alpha, set(config.targets)) == (4, 8.0, ends)
    assert isinstance(config, LoraConfig)
    with pytest.raises(ModelError, match="no matrix"):
        lora.read_asked("target=nowhere").config(module)


@pytest.mark.parametrize("text", ["r=0", "r=1.5", "rank=4", "r=4,alpha=0", "r", "alpha=nan"])
def test_a_mistake_in_lora_is_shown_with_how_it_is_written(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        lora.read_asked(text)
    assert "--lora r=16" in caught.value.hint
