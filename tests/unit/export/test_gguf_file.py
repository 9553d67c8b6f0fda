"""The file for llama.cpp, read with the reader of the gguf library: what llama.cpp's loader of `apertus` asks for."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

sys.path.insert(0, str(Path(__file__).parent))

from test_apertus import TEXT, drawn, parameters_of

from p2ptrain.config.manifest import ModelConfig
from p2ptrain.data.tokenizer import TextTokenizer, shipped_tokenizer, train_tokenizer
from p2ptrain.export.apertus import apertus_tensors
from p2ptrain.export.gguf_file import write_gguf

gguf = pytest.importorskip("gguf", reason="pip install 'p2ptrain[export]'")

CONFIG = ModelConfig(layers=2, heads=2, embedding=32, context=32, vocabulary=4100, mlp_ratio=2)


def written(path: Path, tokenizer: TextTokenizer) -> tuple[bool, gguf.GGUFReader, dict[str, torch.Tensor]]:
    parameters = parameters_of(drawn(CONFIG))
    tensors = apertus_tensors(CONFIG, parameters)
    about = {"state_id": "ab" * 32}
    understood = write_gguf(path, CONFIG, tensors, tokenizer, name="test", license="MIT", about=about)
    return understood, gguf.GGUFReader(path), parameters


def test_its_tensors_have_the_names_and_shapes_that_llama_cpp_asks_for(tmp_path: Path) -> None:
    understood, reader, parameters = written(tmp_path / "model.gguf", shipped_tokenizer())
    assert understood
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    # As its `load_arch_tensors` of apertus has them: the entries of a row first.
    rows, width, hidden, head = 4100, 32, 64, 16
    expected = {"token_embd.weight": (width, rows), "output_norm.weight": (width,), "output.weight": (width, rows)}
    for layer in range(2):
        expected |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                **dict.fromkeys(("attn_norm", "ffn_norm"), (width,)),
                **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width)),
                **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (head,)),
                "ffn_up": (width, hidden),
                "ffn_down": (hidden, width),
            }.items()
        }
    assert shapes == expected
    values = {tensor.name: tensor.data for tensor in reader.tensors}
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in reader.tensors)
    qkv = parameters["blocks.1.qkv.weight"].numpy()
    assert np.array_equal(np.concatenate([values[f"blk.1.attn_{name}.weight"] for name in "qkv"]), qkv)
    assert np.array_equal(values["blk.1.ffn_down.weight"], parameters["blocks.1.mlp_out.weight"].numpy())


def test_its_activation_is_squared_relu(tmp_path: Path) -> None:
    _, reader, _ = written(tmp_path / "model.gguf", shipped_tokenizer())
    raw = {key: np.array(reader.fields[f"xielu.{key}"].contents()) for key in ("alpha_p", "alpha_n", "beta", "eps")}
    assert all(values.shape == (CONFIG.layers,) for values in raw.values())
    x = np.linspace(-50, 50, 1001)[:, None]
    # As ggml_xielu and its operation of one entry are written.
    negative, positive = raw["beta"] + np.logaddexp(0, raw["alpha_n"]), np.logaddexp(0, raw["alpha_p"])
    below = (np.expm1(np.minimum(x, raw["eps"])) - x) * negative + raw["beta"] * x
    activated = np.where(x > 0, positive * x * x + raw["beta"] * x, below)
    assert np.allclose(activated, np.maximum(x, 0) ** 2, rtol=1e-7, atol=0)


def test_what_else_it_says_is_of_this_model(tmp_path: Path) -> None:
    _, reader, _ = written(tmp_path / "model.gguf", shipped_tokenizer())
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "apertus" and said["general.license"] == "MIT"
    numbers = {
        "context_length": 32,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
        "vocab_size": 4100,
    }
    assert {key: said[f"apertus.{key}"] for key in numbers} == numbers
    assert said["apertus.attention.layer_norm_rms_epsilon"] == torch.finfo(torch.float32).eps
    assert said["p2ptrain.state_id"] == "ab" * 32


def test_its_tokenizer_says_what_the_run_s_does(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT * 20], 300)
    understood, reader, _ = written(tmp_path / "model.gguf", tokenizer)
    said = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in reader.fields.items()}
    assert understood and (said["model"], said["pre"]) == ("gpt2", "gpt-2")
    library = tokenizer.plain()
    names = said["tokens"]
    assert len(names) == len(set(names)) == len(said["token_type"]) == 4100
    assert {name: names[number] for name, number in library.get_vocab().items()} == {n: n for n in library.get_vocab()}
    assert said["token_type"][tokenizer.vocabulary :] == [gguf.TokenType.UNUSED] * (4100 - tokenizer.vocabulary)
    assert said["token_type"][0] == gguf.TokenType.CONTROL and said["eos_token_id"] == tokenizer.end_token == 0
    pairs = [tuple(merge.split(" ")) for merge in said["merges"]]
    assert pairs and all(first + second in names for first, second in pairs)


def test_the_end_of_a_text_is_no_token_of_text_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    _, reader, _ = written(tmp_path / "model.gguf", shipped_tokenizer())
    end = reader.fields["tokenizer.ggml.eos_token_id"].contents()
    every_character = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    assert end not in shipped_tokenizer().encode(every_character[:0x3000] + every_character[-200:])
    assert reader.fields["tokenizer.ggml.tokens"].contents()[end] == "\u00ff"


def test_a_tokenizer_that_llama_cpp_would_not_follow_is_not_passed_off_as_one_that_it_does(tmp_path: Path) -> None:
    library = train_tokenizer([TEXT * 20], 300).plain()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    other = TextTokenizer(library.to_str().encode())
    understood, reader, _ = written(tmp_path / "model.gguf", other)
    assert not understood
    assert reader.fields["tokenizer.ggml.model"].contents() == "none"
    assert reader.fields["tokenizer.huggingface.json"].contents() == other.json.decode()
