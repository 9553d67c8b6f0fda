"""Small matrices beside those of a model that is held fixed: LoRA (Hu et al., arXiv 2106.09685), by the library `peft`.

Beside a matrix W [out, in] stand A [rank, in] and B [out, rank], and W x + alpha / rank * B A x takes the place of W x.
A and B alone are trained, and so they alone are exchanged, in replicas and in snapshots. W is in the run's beginning,
and read from it once.

A's first values follow from the run's nonce, as those of the built-in GPT do, with the spread that `peft` gives them;
B begins at zero, so that the run begins with what the model computed before.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from p2ptrain.config.manifest import LoraConfig
from p2ptrain.errors import ModelError, UsageError
from p2ptrain.models.hf import check_installed
from p2ptrain.models.init import fill_normal
from p2ptrain.models.task import TrainedParameter

_ATTENTION = re.compile(r"(^|[._])(self_|cross_|linear_)?(attn|attention|mixer)([._]|$)")
_MLP = re.compile(r"(^|[._])(mlp|ffn|ff|feed_forward|experts?|shared_expert|fc\d)([._]|$)")
_WORDS = ("attention", "mlp", "all")
_HINT = "--lora r=16,alpha=32,target=attention (or mlp, all, or ends of modules' names)"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a person wants of it."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention",)

    def config(self, module: nn.Module) -> LoraConfig:
        """Return what a manifest says of it, for a model without small matrices. Raises ModelError."""
        fixed = sum(parameter.numel() for parameter in module.parameters())
        return LoraConfig(
            rank=self.rank, alpha=self.alpha, targets=_ends_of(module, self.targets), fixed_parameters=fixed
        )


def read_asked(text: str) -> Asked:
    """Read `r=16,alpha=32,target=attention`; what stands after `target=` up to the end are targets. Raises UsageError.

    A rank alone has twice itself as alpha.
    """
    head, _, targets = text.partition("target=")
    given = {}
    for part in filter(None, head.split(",")):
        key, _, value = part.partition("=")
        if key not in ("r", "alpha") or not re.fullmatch(r"\d{1,5}(\.\d{1,4})?", value):
            raise UsageError(f"--lora {text}: {part!r} makes no sense", hint=_HINT)
        given[key] = float(value)
    rank = given.get("r", 16.0)
    asked = Asked(int(rank), given.get("alpha", 2 * rank), tuple(filter(None, targets.split(","))) or ("attention",))
    if not 1 <= asked.rank <= 1024 or asked.rank != rank or not 0 < asked.alpha <= 65_536:
        raise UsageError(f"--lora {text}: r is from 1 to 1024 and alpha above 0, up to 65536", hint=_HINT)
    return asked


def _ends_of(module: nn.Module, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Return ends of names, as `peft` compares them, of the matrices that are asked for. Raises ModelError."""
    head = module.get_output_embeddings()  # type: ignore[operator]
    names = [name for name, part in module.named_modules() if _is_matrix(part) and part is not head]
    ends: dict[str, None] = {}
    for target in asked:
        if target in _WORDS:
            found = [name for name in names if _means(target, name)]
        else:
            found = [name for name in names if name == target or name.endswith(f".{target}")]
        if not found:
            known = ", ".join(dict.fromkeys(_end(name) for name in names))
            raise ModelError(
                f"no matrix of this model is meant by target={target}",
                hint=f"use attention, mlp, all, or some of: {known[:300]}",
            )
        # One end may stand for matrices of both kinds, as c_proj does in GPT-2: with the part before it, it does not.
        ends |= dict.fromkeys(map(_end, found)) if target in _WORDS else {target: None}
    return tuple(ends)


def _is_matrix(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def _means(word: str, name: str) -> bool:
    return word == "all" or bool((_ATTENTION if word == "attention" else _MLP).search(name))


def _end(name: str) -> str:
    """Return the end of a module's name from behind its last number on: what is alike in all layers."""
    return re.split(r"(?:^|\.)\d+\.", name)[-1]


def add_matrices(module: nn.Module, config: LoraConfig) -> tuple[TrainedParameter, ...]:
    """Put small matrices beside those of `module`, in place, and hold all else fixed.

    Returns:
        The small matrices, in the module's order, named as in it: `...q_proj.lora_A.default.weight` [rank, in] and
        `...q_proj.lora_B.default.weight` [out, rank]; the matrix beside them is `...q_proj.base_layer.weight` then.

    Raises:
        ModelError: `peft` is not installed, or refuses.
    """
    check_installed("peft")
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    settings: Any = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=list(config.targets),
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=False,
    )
    try:
        with warnings.catch_warnings():
            # It says of matrices that GPT-2 keeps transposed that it takes them so.
            warnings.simplefilter("ignore")
            inject_adapter_in_model(settings, module)
    except Exception as error:
        raise ModelError(f"peft refuses: {str(error)[:300]}") from error
    return tuple(
        TrainedParameter(name, parameter, "matrix")
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    )


def begin(matrices: tuple[TrainedParameter, ...], nonce: bytes) -> None:
    """Set small matrices to their first values, in place; the same bits on every peer."""
    with torch.no_grad():
        for matrix in matrices:
            if ".lora_A." in matrix.name:
                # As wide as the uniform numbers that peft draws, below 1 / sqrt(in).
                fill_normal(matrix.tensor, nonce + matrix.name.encode(), 1 / math.sqrt(3 * matrix.tensor.shape[1]))
            else:
                matrix.tensor.zero_()


def merge(module: nn.Module) -> None:
    """Add the product of small matrices to those beside them, in place, and leave a module without small ones."""
    from peft.tuners.lora.layer import LoraLayer

    for name, part in list(module.named_modules()):
        if isinstance(part, LoraLayer):
            part.merge(safe_merge=True)
            module.set_submodule(name, part.get_base_layer())
    module.requires_grad_(True)
