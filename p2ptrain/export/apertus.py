"""The built-in GPT as Apertus, an architecture that `transformers` and llama.cpp know, so that both load it as it is.

Apertus (the model of the Swiss AI initiative) is Llama with an ungated MLP whose activation the config names, and with
normalised queries and keys; with squared ReLU its computation is that of `models/gpt.py`, to rounding. Its gains of
queries and keys are 1 here, as our norm of them has none. The rotary embedding turns the same pairs, so no row moves:
the rows of `qkv` are cut into three and everything else is renamed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from p2ptrain.config.manifest import ModelConfig
from p2ptrain.models.gpt import ROTARY_BASE

NORM_EPSILON = torch.finfo(torch.float32).eps
"""Of `rms_norm` of float32, where none is given."""

KEYS_OF_VERSION_4 = {"rope_theta": ROTARY_BASE, "rope_scaling": None}
"""Of `transformers`: it does not read `rope_parameters`, and takes another base and scaling without these, silently."""


def apertus_tensors(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the GPT's parameters under the names of `ApertusForCausalLM`; most are the same memory.

    Args:
        tensors: {name in `models.gpt.GPT`: parameter}, all of them.
    """
    ones = torch.ones(config.embedding // config.heads)
    made = {
        "model.embed_tokens.weight": tensors["embedding.weight"],
        "model.norm.weight": tensors["final_norm.gain"],
        "lm_head.weight": tensors["head.weight"],
    }
    for number in range(config.layers):
        ours, theirs = f"blocks.{number}", f"model.layers.{number}"
        for name, rows in zip("qkv", tensors[f"{ours}.qkv.weight"].chunk(3), strict=True):
            made[f"{theirs}.self_attn.{name}_proj.weight"] = rows.clone()
        made |= {
            f"{theirs}.self_attn.q_norm.weight": ones.clone(),
            f"{theirs}.self_attn.k_norm.weight": ones.clone(),
            f"{theirs}.self_attn.o_proj.weight": tensors[f"{ours}.attention_out.weight"],
            f"{theirs}.mlp.up_proj.weight": tensors[f"{ours}.mlp_in.weight"],
            f"{theirs}.mlp.down_proj.weight": tensors[f"{ours}.mlp_out.weight"],
            f"{theirs}.attention_layernorm.weight": tensors[f"{ours}.attention_norm.gain"],
            f"{theirs}.feedforward_layernorm.weight": tensors[f"{ours}.mlp_norm.gain"],
        }
    return made


def apertus_config(config: ModelConfig, begin: int | None, end: int | None) -> dict[str, Any]:
    """Return the arguments of `ApertusConfig` for the GPT of a manifest.

    Args:
        begin, end: the tokens that stand before and after a text; None: there is none.
    """
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.embedding,
        "intermediate_size": config.embedding * config.mlp_ratio,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "hidden_act": "relu2",
        "max_position_embeddings": config.context,
        "rms_norm_eps": NORM_EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
        "tie_word_embeddings": False,
        "bos_token_id": begin,
        "eos_token_id": end,
        # A token for padding would be left out of what its embedding learns, if somebody trains on.
        "pad_token_id": None,
        "dtype": "float32",
    }
