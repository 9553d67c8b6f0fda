"""Weights of a causal language model from safetensors files on this disk, as `transformers` reads them.

The library knows how the names in such files have changed over the years, how they are cut into several, and reads one
tensor at a time. It is shown a folder with links to those files and a config that `models/hf.py` has checked, and so
finds neither code, nor pickles, nor anything that a folder from elsewhere may hold beside them.

Cost: one copy of the model in float32; the files are mapped into memory and not read as a whole.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from p2ptrain.errors import ModelError
from p2ptrain.models import hf

INDEX = "model.safetensors.index.json"
_INDEX_MAX_BYTES = 64 * 1024 * 1024
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES_SHOWN = 4
_SAFE = "AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW) of transformers writes safetensors"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Files with all tensors of a model."""

    files: tuple[Path, ...]
    index: Path | None
    """Says which tensor is in which, where there are several."""

    @property
    def bytes(self) -> int:
        """Length of all."""
        return sum(file.stat().st_size for file in self.files)


def find_weights(path: Path) -> WeightFiles:
    """Return the safetensors files that `path` means: a file, or a folder of `transformers`.

    Raises:
        ModelError: there are none, or pickles alone, which are programs and never loaded.
    """
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.suffix in _PICKLES:
            raise ModelError(f"{path} is a pickle, which may run any program when it is read", hint=_SAFE)
        if path.suffix != ".safetensors" or not path.is_file():
            raise ModelError(f"{path} is no safetensors file", hint="--from with a .safetensors file, or a folder")
        return WeightFiles((path,), None)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint="--from with another path") from error


def _in_folder(folder: Path) -> WeightFiles:
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds adapters beside a model that is elsewhere",
            hint="merge them first: merge_and_unload() of peft, then save_pretrained",
        )
    if (folder / "model.safetensors").exists():
        return WeightFiles((folder / "model.safetensors",), None)
    index = folder / INDEX
    if not index.exists():
        pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in _PICKLES]
        if pickles:
            raise ModelError(
                f"{folder} has weights only in {pickles[0]}, a pickle, which may run any program when it is read",
                hint=_SAFE,
            )
        raise ModelError(f"{folder} has no model.safetensors", hint="--from with a folder that has one")
    try:
        if index.stat().st_size > _INDEX_MAX_BYTES:
            raise ModelError(f"{index} is too long", hint="write the folder anew with save_pretrained")
        names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
    except msgspec.MsgspecError as error:
        raise ModelError(f"{index} is no index: {error}", hint="write the folder anew with save_pretrained") from error
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name) or not (folder / name).is_file():
            raise ModelError(f"{folder} lacks {name[:80]}, which its index names", hint="get the whole folder")
    return WeightFiles(tuple(folder / name for name in names), index)


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def stored_types(weights: WeightFiles) -> tuple[str, ...]:
    """Return the types of numbers in the files, as `bfloat16`. Raises ModelError: some are none that can be trained."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, None] = {}
    for file in weights.files:
        try:
            with safe_open(str(file), "pt") as tensors:
                for name in list(tensors.keys()):
                    kind = tensors.get_slice(name).get_dtype()
                    if kind in _FLOATS:
                        found[_FLOATS[kind]] = None
                    elif name.endswith(("weight", "bias")):
                        raise ModelError(
                            f"{file}: {name} is of {kind}, which is quantised or no number to train",
                            hint="take weights of bfloat16, float16 or float32",
                        )
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is no safetensors file: {error}", hint="get it again") from error
    return tuple(found)


def load_weights(config: Any, weights: WeightFiles) -> nn.Module:
    """Return the model of a checked config of the library with the values of these files, on the CPU, in float32.

    Raises:
        ModelError: the model is too large, a tensor of it is missing or of another shape, or holds what is no number.
    """
    hf.without_memory(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in weights.files:
            link = folder / (file.name if weights.index is not None else "model.safetensors")
            os.symlink(file.resolve(), link)
        if weights.index is not None:
            os.symlink(weights.index.resolve(), folder / INDEX)
        config.save_pretrained(folder)
        module, report = _read(folder, config)
    for key, what in (("missing_keys", "lack"), ("mismatched_keys", "have other shapes of")):
        wrong = [str(one if isinstance(one, str) else one[0]) for one in report.get(key, ())]
        if wrong:
            raise ModelError(f"the weights {what} {_some(wrong)}", hint="give the config.json that belongs to them")
    for parameter, tensor in module.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"the weights hold no number in {parameter}", hint="take other weights")
    return module


def _read(folder: Path, config: Any) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise ModelError(f"transformers cannot read the weights: {str(error)[:300]}", hint="get them again") from error
    return loaded[0], dict(loaded[1])


def _some(names: Sequence[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
