"""A folder as `transformers` reads it: config, parameters, tokenizer. No code of ours is needed to load it.

The library writes it. That a config and a set of parameters belong together is checked before, on a model without
values.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from p2ptrain.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def write_model(folder: Path, config: PretrainedConfig, tensors: dict[str, Tensor]) -> None:
    """Write `config.json`, `generation_config.json` and the parameters as safetensors.

    Args:
        tensors: the state dict of the causal language model that `config` describes.

    Raises:
        RuntimeError: they are not all of its parameters, by name and shape.
        OSError: the folder does not take them.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.save_pretrained(folder)


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
