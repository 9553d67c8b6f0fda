"""A folder as `transformers` reads it: config, parameters, tokenizer. No code of ours is needed to load it.

The library writes it. That a config and a set of parameters belong together is checked before, on a model without
values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from p2ptrain.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ADAPTER = "adapter_model.safetensors"


def write_model(
    folder: Path, config: PretrainedConfig, tensors: dict[str, Tensor], also: Mapping[str, object] | None = None
) -> None:
    """Write `config.json`, `generation_config.json` and the parameters as safetensors.

    Args:
        tensors: the state dict of the causal language model that `config` describes.
        also: keys for `config.json` that the installed version of the library does not write.

    Raises:
        RuntimeError: they are not all of its parameters, by name and shape.
        OSError: the folder does not take them.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    write_module(folder, model)
    _add(folder / "config.json", also or {})


def write_module(folder: Path, module: nn.Module) -> None:
    """Write what `write_model` does, of a model that `transformers` has made. Raises OSError."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    module.save_pretrained(folder)  # type: ignore[operator]


def write_adapter(folder: Path, module: nn.Module) -> None:
    """Write the small matrices in a model, as `models/lora.py` puts them there, as `peft` writes an adapter.

    The adapter does not name the model that it belongs to: that is whatever the run started from.

    Raises:
        OSError: the folder does not take it.
    """
    from peft import TaskType, get_peft_model_state_dict
    from safetensors.torch import save_file

    config: Any = module.peft_config["default"]  # type: ignore[index]
    config.task_type, config.inference_mode = TaskType.CAUSAL_LM, True
    config.save_pretrained(folder)
    # The library's own class for a model with an adapter puts this before the names.
    tensors = {f"base_model.model.{name}": tensor for name, tensor in get_peft_model_state_dict(module).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER, {"format": "pt"})


def write_tokenizer(folder: Path, tokenizer: TextTokenizer, context: int) -> None:
    """Write a tokenizer that gives the tokens that were trained on: none is added before or after a text.

    Args:
        context: how many tokens the model takes.

    Raises:
        DataError: the tokenizer cannot be loaded.
        OSError: the folder does not take it.
    """
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": tokenizer.begin_of_text, "eos_token": tokenizer.end_of_text}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.plain(),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **{role: name for role, name in special.items() if name},
    )
    if tokenizer.chat_template:
        made.chat_template = tokenizer.chat_template
    made.save_pretrained(folder)
    # Version 4 knows no other name for it, and version 5 takes both.
    _add(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _add(path: Path, keys: Mapping[str, object]) -> None:
    table = json.loads(path.read_text(encoding="utf-8")) | keys
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
