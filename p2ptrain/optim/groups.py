"""What DeMo takes for a parameter and for a parameter group; all else is refused by name, before anything is done.

To add an option of groups: give it a default in `DeMo.__init__`, which makes its name known, and a check in `_CHECKS`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from p2ptrain.compression.layout import CHUNK_SIZE
from p2ptrain.optim.directions import DIRECTIONS

TRANSFORMS = ("dct", "none")
NARROW = (torch.bfloat16, torch.float16)
"""Types of parameters of which the optimizer keeps a float32 master; float32 itself needs none."""
_OF_TORCH = frozenset({"params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr"})
"""Keys of a group that are torch's own, or those of its schedulers."""


def _is_number(value: Any, low: float, high: float) -> bool:
    """Whether it is a real number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    number = float(value)
    return math.isfinite(number) and low <= number <= high


def _is_rate(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and _is_number(value.item(), 0, math.inf)
    return _is_number(value, 0, math.inf)


def _is_topk(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and _is_number(value, 1, CHUNK_SIZE)


_COUNT = f"a whole number from 1 to {CHUNK_SIZE}"
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_rate, "a number of at least 0, or a tensor of one"),
    "weight_decay": (_is_rate, "a number of at least 0"),
    "learning_rate_scale": (_is_rate, "a number of at least 0"),
    "topk": (_is_topk, _COUNT),
    "reply_topk": (lambda value: value is None or _is_topk(value), f"None or {_COUNT}"),
}
"""For each option of a group that is a number: whether a value is in range, and what is."""
_SHARE = (lambda value: _is_number(value, 0, 1), "a number from 0 to 1")
_SHARE_BELOW_ONE = (lambda value: _is_number(value, 0, 1) and value < 1, "a number from 0 to below 1")
_SETTING_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": _SHARE,
    "value_bits": (lambda value: value in (1, 2, 8, 32), "1, 2, 8 or 32"),
    "rms_beta": _SHARE_BELOW_ONE,
    "rms_epsilon": (lambda value: _is_number(value, 0, math.inf), "a number of at least 0"),
    "direction_momentum": _SHARE_BELOW_ONE,
}
"""The same for what is one for all groups."""


def _check_range(where: str, key: str, value: Any, check: tuple[Callable[[Any], bool], str]) -> None:
    passes, expected = check
    if not passes(value):
        raise ValueError(f"{where}{key}={value!r} is out of range: it is {expected}")


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse what is out of range of the settings that all groups share. Raises ValueError."""
    for key, check in _SETTING_CHECKS.items():
        _check_range("", key, settings[key], check)


def check_group(number: int, group: dict[str, Any], options: Collection[str]) -> None:
    """Refuse options of a group that there are not, or that are out of range. Raises ValueError.

    Args:
        number: the group's.
        group: with all options filled in.
        options: the names of those that there are.
    """
    where = f"group {number}: "
    for key in group:
        if key not in options and key not in _OF_TORCH:
            raise ValueError(f"{where}there is no option {key!r}; there are {_listed(options)}")
    for key, names in (("transform", TRANSFORMS), ("direction", DIRECTIONS)):
        if group[key] not in names:
            raise ValueError(f"{where}there is no {key} {group[key]!r}; there are {_listed(names)}")
    for key, check in _CHECKS.items():
        _check_range(where, key, group[key], check)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def names_of(groups: Sequence[dict[str, Any]]) -> list[str]:
    """What each parameter, in order, is called in errors: its name, where groups have names, or its number."""
    names: list[str] = []
    for number, group in enumerate(groups):
        given = group.get("param_names")
        for place, parameter in enumerate(group["params"]):
            plain = f"parameter {place} of group {number}, of shape {tuple(parameter.shape)}"
            names.append(plain if given is None else f"parameter {given[place]!r}")
    return names


def check_parameters(names: Sequence[str], parameters: Sequence[Tensor], directions: Sequence[str]) -> None:
    """Refuse parameters that DeMo cannot step. Raises ValueError.

    Args:
        names: what each is called in errors.
        directions: of each.
    """
    if not parameters:
        raise ValueError("DeMo got no parameters: every group is empty")
    if not any(parameter.numel() for parameter in parameters):
        raise ValueError("DeMo got parameters without any entries")
    seen: dict[int, str] = {}
    for name, parameter, direction in zip(names, parameters, directions, strict=True):
        if id(parameter) in seen:
            raise ValueError(f"{name} is the same tensor as {seen[id(parameter)]}")
        seen[id(parameter)] = name
        if parameter.layout != torch.strided:
            raise ValueError(f"{name} is {parameter.layout}; DeMo steps dense parameters")
        if parameter.dtype != torch.float32 and parameter.dtype not in NARROW:
            raise ValueError(f"{name} is {parameter.dtype}; DeMo steps parameters of float32, bfloat16 and float16")
        if parameter.device != parameters[0].device:
            raise ValueError(
                f"{name} is on {parameter.device} and {names[0]} on {parameters[0].device}; "
                "DeMo's momentum is one tensor, so all parameters are on one device"
            )
        if direction == "muon" and parameter.dim() < 2:
            raise ValueError(
                f"{name} is a vector or a scalar, and direction muon needs a matrix; "
                "put it into a group of another direction"
            )


def check_gradients(names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Refuse gradients that DeMo cannot read. Raises ValueError."""
    for number, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is not None and gradient.layout != torch.strided:
            raise ValueError(f"the gradient of {names[number]} is {gradient.layout}; DeMo reads dense gradients")
