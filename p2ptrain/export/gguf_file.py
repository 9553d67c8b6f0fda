"""One GGUF file for llama.cpp: the built-in GPT as its architecture `apertus`, in float32, with the tokenizer.

llama.cpp knows one activation for this architecture, xIELU. With alpha_p = 1, alpha_n = 0 and beta = 0 that is squared
ReLU. The file has the alphas as they are before the softplus that makes them positive.

A tokenizer goes along where llama.cpp does what it does: a byte-level BPE that cuts text as GPT-2's does, as the one
shipped and those trained here do. With any other the file says that it has none, and `tokenizer.huggingface.json` in it
holds the original all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from torch import Tensor

from p2ptrain.config.manifest import ModelConfig
from p2ptrain.data.tokenizer import TextTokenizer
from p2ptrain.export.apertus import NORM_EPSILON
from p2ptrain.models.gpt import ROTARY_BASE

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SOFTPLUS_IS_1 = math.log(math.e - 1)
_SOFTPLUS_IS_0 = -1000.0
_NEVER_IN_TEXT = "\u00ff"
"""How a byte-level BPE writes the byte 255, which no UTF-8 has."""


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: TextTokenizer,
    *,
    name: str,
    license: str,
    about: Mapping[str, str],
) -> bool:
    """Write the file, and return whether llama.cpp gets a tokenizer with it.

    Args:
        tensors: as `apertus_tensors` names them.
        name: of the model.
        license: of what it was trained on.
        about: what else to say, {key: value}.

    Raises:
        OSError: it cannot be written.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

    writer = GGUFWriter(path, MODEL_ARCH_NAMES[MODEL_ARCH.APERTUS])
    writer.add_name(name)
    writer.add_license(license)
    for key, value in about.items():
        writer.add_string(f"p2ptrain.{key}", value)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.embedding)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.embedding * config.mlp_ratio)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.heads)
    writer.add_rope_dimension_count(config.embedding // config.heads)
    writer.add_rope_freq_base(ROTARY_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_xielu_alpha_p([_SOFTPLUS_IS_1] * config.layers)
    writer.add_xielu_alpha_n([_SOFTPLUS_IS_0] * config.layers)
    writer.add_xielu_beta([0.0] * config.layers)
    writer.add_xielu_eps([-1e-6] * config.layers)
    writer.add_vocab_size(config.vocabulary)
    understood = _add_tokenizer(writer, tokenizer, config.vocabulary)
    names = get_tensor_name_map(MODEL_ARCH.APERTUS, config.layers)
    for theirs, tensor in tensors.items():
        known = names.get_name(theirs, try_suffixes=(".weight",))
        assert known is not None, theirs
        writer.add_tensor(known, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return understood


def _add_tokenizer(writer: GGUFWriter, tokenizer: TextTokenizer, rows: int) -> bool:
    from gguf import TokenType

    json: dict[str, Any] = msgspec.json.decode(tokenizer.json)
    writer.add_string("tokenizer.huggingface.json", tokenizer.json.decode())
    if not cuts_as_gpt2(json):
        writer.add_tokenizer_model("none")
        return False
    names, types = [f"[unused {number}]" for number in range(rows)], [TokenType.UNUSED] * rows
    for name, number in json["model"]["vocab"].items():
        names[number], types[number] = name, TokenType.NORMAL
    for added in json["added_tokens"]:
        names[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(types)
    merges = json["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    # Without a number llama.cpp takes token 11 for the end of a text, whatever that is.
    never: int = json["model"]["vocab"][_NEVER_IN_TEXT]
    writer.add_eos_token_id(never if tokenizer.end_token is None else tokenizer.end_token)
    writer.add_bos_token_id(never if tokenizer.begin_token is None else tokenizer.begin_token)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    return True


def cuts_as_gpt2(json: Mapping[str, Any]) -> bool:
    """Say whether a tokenizer, as the `tokenizers` library writes it, is one that llama.cpp calls gpt-2."""
    model, cutter = json["model"], json.get("pre_tokenizer") or {}
    return (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"))
        and not model.get("ignore_merges")
        and json.get("normalizer") is None
        and cutter.get("type") == "ByteLevel"
        and cutter.get("use_regex", True)
        and not cutter.get("add_prefix_space")
        and _NEVER_IN_TEXT in model["vocab"]
    )
