"""The built-in GPT as `transformers` loads it, without code of ours: the same logits, the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from p2ptrain.config.manifest import ModelConfig
from p2ptrain.data.tokenizer import TextTokenizer, shipped_tokenizer, train_tokenizer
from p2ptrain.export.apertus import KEYS_OF_VERSION_4, apertus_config, apertus_tensors
from p2ptrain.export.hub import write_model, write_tokenizer
from p2ptrain.models.gpt import GPT

transformers = pytest.importorskip("transformers", reason="pip install 'p2ptrain[export]'")

SIZES = [
    ModelConfig(layers=1, heads=1, embedding=8, context=16, vocabulary=300, mlp_ratio=1),
    ModelConfig(layers=3, heads=4, embedding=64, context=48, vocabulary=4096, mlp_ratio=3),
]
TEXT = "Fellow citizens,  naïve — 日本\n\n1234\t we'll <|endoftext|> ÿ."


def drawn(config: ModelConfig, seed: int = 0) -> GPT:
    """A GPT with all parameters drawn, gains too."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, deviation = (1.0, 0.3) if parameter.ndim < 2 else (0.0, 2.0 / parameter.shape[1] ** 0.5)
            parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))
    return model


def parameters_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", SIZES, ids=["one head", "several"])
def test_transformers_computes_the_same_logits(tmp_path: Path, config: ModelConfig) -> None:
    model = drawn(config)
    tensors = apertus_tensors(config, parameters_of(model))
    write_model(tmp_path, transformers.ApertusConfig(**apertus_config(config, None, 5)), tensors, KEYS_OF_VERSION_4)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, config.vocabulary, (2, config.context), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(tokens), loaded(tokens).logits
    assert loaded.dtype == torch.float32
    assert ours.abs().max() > 1.0
    # Some tens of operations deep, each off by 2**-24 at most.
    assert torch.allclose(theirs, ours, rtol=0, atol=2e-6 * float(ours.abs().max()))
    # One token at a time as well, with what the library keeps of keys and values.
    start = tokens[:1, :4]
    continued = loaded.generate(start, max_new_tokens=config.context - 4, do_sample=False, eos_token_id=None)
    assert continued[0].tolist() == model.generate(start[0].tolist(), config.context - 4, 0.0, 0)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 10000.0 and said["rope_scaling"] is None
    assert loaded.generation_config.eos_token_id == 5


def with_begin_and_end() -> TextTokenizer:
    """One that puts its own token before each text, as many do, and cuts a text short."""
    tokenizer = train_tokenizer([TEXT * 20], 300).plain()
    tokenizer.add_special_tokens(["<s>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.enable_truncation(4)
    return TextTokenizer(tokenizer.to_str().encode(), chat_template="{{ messages[0].content }}{{ eos_token }}")


@pytest.mark.parametrize("kind", ["shipped", "trained", "with begin and end"])
def test_the_tokenizer_gives_the_tokens_that_were_trained_on(tmp_path: Path, kind: str) -> None:
    tokenizer = {
        "shipped": shipped_tokenizer,
        "trained": lambda: train_tokenizer([TEXT * 20], 280),
        "with begin and end": with_begin_and_end,
    }[kind]()
    write_tokenizer(tmp_path, tokenizer, 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "apertus"}))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT).input_ids == tokenizer.encode(TEXT, special=True)
    assert loaded.decode(loaded(TEXT).input_ids) == TEXT
    assert loaded.model_max_length == 64
    assert (loaded.eos_token or "") == tokenizer.end_of_text and (loaded.bos_token or "") == tokenizer.begin_of_text
    if tokenizer.chat_template:
        said = loaded.apply_chat_template([{"role": "user", "content": "Hear, hear."}], tokenize=False)
        assert said == "Hear, hear.<|endoftext|>"
