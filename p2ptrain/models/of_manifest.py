"""From a manifest, and the file of first values that it names, to the task of its run: what the command line trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from p2ptrain.config.manifest import Manifest, ModelConfig, TaskConfig
from p2ptrain.errors import ModelError
from p2ptrain.models import hf, lora
from p2ptrain.models.gpt import GPT
from p2ptrain.models.own import own_task
from p2ptrain.models.task import Task, gpt_task


def check_model(task: TaskConfig) -> None:
    """Refuse a model that this machine cannot build, before anything of it is fetched.

    Raises:
        ModelError: a package is missing, the architecture is not known or too large, or the manifest contradicts it.
    """
    if task.kind != "hf":
        return
    if task.lora_config is not None:
        hf.check_installed("peft")
    module = hf.without_memory(hf.checked_config(task.architecture))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if parameters != task.values_parameters:
        raise ModelError(
            f"the run's model has {task.values_parameters:,} parameters, and transformers builds one of {parameters:,}",
            hint="ask the run's owner which version of transformers it is",
        )
    positions = hf.positions_of(task.architecture)
    if positions is not None and task.context > positions:  # type: ignore[operator]
        raise ModelError(f"sequences of {task.context} tokens are longer than the model's {positions:,} positions")


def recompute_activations(model: nn.Module) -> None:
    """Have a model of a run keep little of a forward pass, and compute the rest again in the backward pass."""
    if isinstance(model, hf.LanguageModel):
        model.inner.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        # Without it the library's checkpoints do nothing; none of our models has layers that behave otherwise.
        model.inner.train()
    elif isinstance(model, GPT):
        model.recompute = True


def task_of(manifest: Manifest, values: Path | None, gpt: Callable[[ModelConfig], GPT] = GPT) -> Task:
    """Return what a run trains, where no program of a peer's own brings it along.

    Args:
        values: the file that `manifest.task.values` names; None: there is none to name.
        gpt: makes the built-in model.

    Raises:
        ModelError: the file is another one, or this machine cannot build the model.
        OSError: the file cannot be read.
    """
    config = manifest.task_config
    if config is None:
        return gpt_task(gpt(manifest.model), bytes.fromhex(manifest.nonce))
    assert values is not None and config.kind != "code"
    if config.kind == "gpt":
        return own_task(gpt(manifest.model), values, config)
    inner = hf.transformers_model(config)
    task = own_task(inner, values, config)
    if config.lora_config is not None:
        # Once: nothing changes what is held fixed.
        task.begin()
        matrices = lora.add_matrices(inner, config.lora_config)
        task = Task(inner, matrices, partial(lora.begin, matrices, bytes.fromhex(manifest.nonce)))
        found = sum(matrix.tensor.numel() for matrix in matrices)
        if found != config.parameters:
            raise ModelError(
                f"the run's manifest says {config.parameters:,} trained parameters, and LoRA makes {found:,}"
            )
    return replace(task, module=hf.LanguageModel(inner, manifest.context, manifest.vocabulary))
