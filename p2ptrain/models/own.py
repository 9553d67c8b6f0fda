"""A module of somebody's own as a task, and the file that says what of it a run trains, and from which values on.

The file, the *beginning*, has names, shapes and kinds of the trained parameters, in order, their first values, and
hashes of what is held fixed. The manifest has the file's root. Whoever joins gets the file from the swarm, unless their
own module makes the same bytes, and takes the values in it, whatever their copy holds. So no value has to follow from
a seed, which gives other numbers on another device or with another version of torch.

Kinds follow from the types of modules:

- `embedding`: the weight of an `Embedding` or `EmbeddingBag`, also where a head shares it;
- `head`: the weight of what `get_output_embeddings()` returns, where the module has such a method, as those of
  `transformers` do; else of the `Linear` that was registered last;
- `vector`: whatever has fewer than two dimensions;
- `matrix`: all others.

A parameter that several modules share counts once. One that does not require a gradient is not trained: it, and each
buffer that `state_dict` saves, has to hold the same bytes on every peer. Running statistics, which training changes
and no gradient does, are refused: each peer's would be of its own samples. So is any other saved buffer that the first
batch has changed.

Cost: the file is as long as the parameters, and every peer keeps it to go back to the beginning of the chain. It is
written and read one parameter at a time.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast, get_args

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from p2ptrain.compression.layout import Kind
from p2ptrain.config.manifest import PARAMETERS_MAX, FileConfig, TaskConfig
from p2ptrain.errors import ModelError
from p2ptrain.models.task import Task, TrainedParameter
from p2ptrain.state import run_files
from p2ptrain.state.pieces import PieceFile
from p2ptrain.state.run_files import RunFile
from p2ptrain.state.tensors import (
    TensorFileError,
    bytes_of,
    check_tensors,
    pack_head,
    packed_bytes,
    read_meta,
    read_tensors,
)

HEADER_MAX_BYTES = 4 * 1024 * 1024
"""Of names, shapes, kinds and hashes."""
DIFFERENCES_SHOWN = 4

_Name = Annotated[str, Meta(min_length=1, max_length=512)]
_Shape = Annotated[tuple[Annotated[int, Meta(ge=0, le=PARAMETERS_MAX)], ...], Meta(max_length=16)]


class ParameterEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A trained parameter."""

    name: _Name
    shape: _Shape
    kind: Kind


class FixedEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A parameter or buffer that is the same on all peers and is not trained."""

    name: _Name
    dtype: Annotated[str, Meta(max_length=64)]
    shape: _Shape
    sha256: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the beginning says beside values."""

    trained: tuple[ParameterEntry, ...]
    fixed: tuple[FixedEntry, ...]


_header_decoder = msgspec.msgpack.Decoder(Header)


# ---- from a module --------------------------------------------------------------------------------------------------


def plain(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` has wrapped, or `module`: so that names are alike with and without."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def kinds_of(module: nn.Module, patterns: Mapping[str, Kind] | None = None) -> dict[str, Kind]:
    """Return the kind of each parameter; see the module docstring.

    Args:
        patterns: {pattern of names, as in a shell: kind}; the first that matches decides before the rules do.

    Raises:
        ModelError: there is no such kind, a pattern that matches nothing, or a vector that should be a matrix.
    """
    patterns = patterns or {}
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    head = _head_of(module)
    kinds: dict[str, Kind] = {}
    for name, parameter in module.named_parameters():
        asked = next((kind for pattern, kind in patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if asked is not None and asked not in get_args(Kind):
            raise ModelError(f"{name} cannot be of kind {asked!r}", hint=f"use one of {', '.join(get_args(Kind))}")
        if asked not in (None, "vector") and parameter.ndim < 2:
            raise ModelError(f"{name} has {parameter.ndim} dimensions, so it is a vector, not of kind {asked!r}")
        if asked is not None:
            kinds[name] = asked
        elif parameter.ndim < 2:
            kinds[name] = "vector"
        elif id(parameter) in embeddings:
            kinds[name] = "embedding"
        else:
            kinds[name] = "head" if parameter is head else "matrix"
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in kinds):
            raise ModelError(
                f"no parameter is called {pattern!r}", hint=f"among others there are {', '.join([*kinds][:4])}"
            )
    return kinds


def _head_of(module: nn.Module) -> Tensor | None:
    named = getattr(module, "get_output_embeddings", None)
    head = named() if callable(named) else None
    if head is None:
        head = next((m for m in reversed(list(module.modules())) if isinstance(m, nn.Linear)), None)
    return getattr(head, "weight", None)


def keepers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the parts, by name, that keep running statistics in training."""
    parts = module.named_modules()
    return {name: part for name, part in parts if isinstance(part, _NormBase) and part.track_running_stats}


def check_statistics(keepers: Mapping[str, nn.Module]) -> None:
    """Refuse statistics that training would change now. Raises ModelError."""
    for name, part in keepers.items():
        if part.training:
            raise ModelError(
                f"{name or 'the model'} ({type(part).__name__}) keeps running statistics, and each peer's would be of "
                "its own samples",
                hint="use GroupNorm or LayerNorm, or track_running_stats=False, or keep this module in eval(), which "
                "holds its statistics fixed, also after model.train()",
            )


def trained_of(module: nn.Module, kinds: Mapping[str, Kind]) -> tuple[TrainedParameter, ...]:
    """Return the parameters that are trained: those that require a gradient and have entries.

    Raises:
        ModelError: there is nothing to train, or what cannot be the same on all peers, by name.
    """
    check_statistics(keepers_of(module))
    found: list[TrainedParameter] = []
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"{name} has no shape yet", hint="run the model on one batch before")
        if not parameter.requires_grad or not parameter.numel():
            continue
        if parameter.dtype != torch.float32:
            raise ModelError(
                f"{name} is of {parameter.dtype}; what a swarm trains is of torch.float32",
                hint="model.float(); with torch.autocast the forward pass may still compute in bfloat16",
            )
        found.append(TrainedParameter(name, parameter, kinds[name]))
    if not found:
        raise ModelError("the model has no parameter that requires a gradient", hint="see requires_grad_()")
    entries = sum(parameter.tensor.numel() for parameter in found)
    if entries > PARAMETERS_MAX:
        raise ModelError(f"the model trains {entries:,} parameters; at most {PARAMETERS_MAX:,} are supported")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Beginning:
    """The beginning of a run that trains a module from the values that this has whenever it is read."""

    header: Header
    trained: tuple[TrainedParameter, ...]

    def parts(self) -> Iterator[bytes | memoryview]:
        """Yield the file, one parameter in memory at a time."""
        yield pack_head(msgspec.msgpack.encode(self.header), {e.name: e.shape for e in self.header.trained})
        for parameter in self.trained:
            yield bytes_of(parameter.tensor.detach().cpu().numpy())

    def config(self) -> TaskConfig:
        """Return what the manifest says of it; hashes all values."""
        return self._named(run_files.named(self.parts()))

    def write(self, path: Path) -> tuple[TaskConfig, PieceFile]:
        """Write the file, and return what the manifest says of it. Raises OSError."""
        made, file = run_files.make(path, self.parts())
        return self._named(made), file

    def _named(self, made: RunFile) -> TaskConfig:
        entries = sum(math.prod(entry.shape) for entry in self.header.trained)
        return TaskConfig(parameters=entries, values=FileConfig(bytes=made.length, root=made.root.hex()))


def beginning_of(module: nn.Module, patterns: Mapping[str, Kind] | None = None) -> Beginning:
    """Return the beginning of a run that trains `module`.

    Raises:
        ModelError: it cannot be trained, or `patterns` do not suit it.
    """
    module = plain(module)
    trained = trained_of(module, kinds_of(module, patterns))
    header = Header(
        tuple(ParameterEntry(p.name, tuple(p.tensor.shape), p.kind) for p in trained),
        fixed_of(module, {p.name for p in trained}),
    )
    meta = msgspec.msgpack.encode(header)
    if len(meta) > HEADER_MAX_BYTES:
        raise ModelError(f"the names and shapes of this model take {len(meta):,} bytes; at most {HEADER_MAX_BYTES:,}")
    return Beginning(header, trained)


def buffers_of(module: nn.Module) -> tuple[FixedEntry, ...]:
    """Return the buffers that `state_dict` saves, as they are now."""
    module = plain(module)
    saved = module.state_dict(keep_vars=True)
    return tuple(_entry(name, buffer) for name, buffer in module.named_buffers() if name in saved)


def check_buffers(module: nn.Module, before: tuple[FixedEntry, ...]) -> None:
    """Refuse a module of which a saved buffer is not what it was `before` training. Raises ModelError."""
    for now, then in zip(buffers_of(module), before, strict=True):
        if now != then:
            raise ModelError(
                f"the buffer {now.name} changes in training, and each peer's would be of its own samples",
                hint="hold it fixed, or register it with persistent=False if each peer may have its own",
            )


def fixed_of(module: nn.Module, trained: set[str]) -> tuple[FixedEntry, ...]:
    """Return the parameters that are not among those trained, and the buffers that `state_dict` saves."""
    others = (_entry(name, parameter) for name, parameter in module.named_parameters() if name not in trained)
    return (*others, *buffers_of(module))


def _entry(name: str, tensor: Tensor) -> FixedEntry:
    data = tensor.detach().cpu().contiguous().reshape(-1)
    entries = data.view(torch.uint8).numpy().tobytes() if data.numel() else b""
    return FixedEntry(name, str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(entries).digest())


# ---- from the file --------------------------------------------------------------------------------------------------


def beginning_max_bytes(config: TaskConfig) -> int:
    """Return a length that no beginning of this many parameters exceeds."""
    return packed_bytes({"": (config.values_parameters,)}, HEADER_MAX_BYTES)


def check_length(config: TaskConfig) -> None:
    """Refuse a manifest whose beginning is longer than its parameters can be. Raises ModelError."""
    if config.values.bytes > beginning_max_bytes(config):
        raise ModelError(f"the run's first values take {config.values.bytes:,} bytes, more than its parameters can")


def header_of(path: Path) -> Header:
    """Decode the header of a beginning alone. Raises ModelError, OSError."""
    try:
        return _header_decoder.decode(read_meta(path, HEADER_MAX_BYTES))
    except (TensorFileError, msgspec.MsgspecError) as error:
        raise ModelError(f"this is no beginning of a run: {error}") from error


def check_beginning(path: Path, config: TaskConfig) -> Header:
    """Return the header of the beginning at `path`, if it is the one that the manifest names.

    Raises:
        ModelError: it is another one, or malformed.
        OSError: it cannot be read.
    """
    check_length(config)
    found, named = path.stat().st_size, config.values
    if found != named.bytes:
        raise ModelError(f"the first values take {found:,} bytes, the run's {named.bytes:,}", hint=_fetch_anew(path))
    root = run_files.named(run_files.read_parts(path)).root.hex()
    if root != named.root:
        raise ModelError(
            f"the first values hash to {root[:16]}, the run's to {named.root[:16]}", hint=_fetch_anew(path)
        )
    header = header_of(path)
    names = [entry.name for entry in header.trained]
    entries = sum(math.prod(entry.shape) for entry in header.trained)
    vectors = all(entry.kind == "vector" for entry in header.trained if len(entry.shape) < 2)
    if len(set(names)) != len(names) or entries != config.values_parameters or not vectors:
        raise ModelError("the run's owner has signed first values that contradict the manifest")
    try:
        check_tensors(path, {entry.name: entry.shape for entry in header.trained})
    except TensorFileError as error:
        raise ModelError(f"the run's first values are malformed: {error}") from error
    return header


def _fetch_anew(path: Path) -> str:
    return f"they are not what was written: remove {path} and start again, to fetch them anew"


def own_task(module: nn.Module, path: Path, config: TaskConfig) -> Task:
    """Return the task that a run's beginning describes, for this copy of its module.

    Args:
        path: of the beginning, which is read anew whenever the run begins anew.

    Raises:
        ModelError: the module is another one than the run trains; the message names the first differences.
    """
    module = plain(module)
    header = check_beginning(path, config)
    parameters = dict(module.named_parameters())
    ours = trained_of(module, {name: cast(Kind, "matrix") for name in parameters})
    _check_alike(header, ours, fixed_of(module, {p.name for p in ours}))
    trained = tuple(TrainedParameter(e.name, parameters[e.name], e.kind) for e in header.trained)
    shapes = {entry.name: entry.shape for entry in header.trained}

    def begin() -> None:
        check_beginning(path, config)
        with torch.no_grad():
            for name, values in read_tensors(path, shapes):
                parameters[name].copy_(torch.from_numpy(values))

    return Task(module, trained, begin)


def _check_alike(header: Header, ours: tuple[TrainedParameter, ...], fixed: tuple[FixedEntry, ...]) -> None:
    theirs = {entry.name: list(entry.shape) for entry in header.trained}
    here = {parameter.name: list(parameter.tensor.shape) for parameter in ours}
    wrong = [f"{name}: {theirs[name]} there, none here" for name in theirs if name not in here]
    wrong += [f"{name}: {here[name]} here, none there" for name in here if name not in theirs]
    wrong += [
        f"{name}: {theirs[name]} there, {here[name]} here"
        for name in theirs
        if name in here and theirs[name] != here[name]
    ]
    if wrong:
        raise ModelError(f"this model trains other parameters than the run's: {_first(wrong)}", hint=_SAME_CODE)
    if list(theirs) != list(here):
        place = next(number for number, (a, b) in enumerate(zip(theirs, here, strict=True)) if a != b)
        raise ModelError(
            f"this model has its parameters in another order: number {place} is {[*theirs][place]} there, "
            f"{[*here][place]} here",
            hint=_SAME_CODE,
        )
    held, known = {entry.name: entry for entry in fixed}, {entry.name: entry for entry in header.fixed}
    wrong = [f"{name}: none here" for name in known if name not in held]
    wrong += [f"{name}: none there" for name in held if name not in known]
    wrong += [f"{name}: other values" for name in known if name in held and held[name] != known[name]]
    if wrong:
        raise ModelError(
            f"what this model holds fixed is not what the run's does: {_first(wrong)}",
            hint="parameters that are not trained, and saved buffers, have to be the same on all peers: load them from "
            "the same file",
        )


_SAME_CODE = "all peers build the model by the same code and settings; ask the run's owner for them"


def _first(wrong: list[str]) -> str:
    more = f"; and {len(wrong) - DIFFERENCES_SHOWN} more" if len(wrong) > DIFFERENCES_SHOWN else ""
    return "; ".join(wrong[:DIFFERENCES_SHOWN]) + more


def parameters_sha256(model: nn.Module) -> str:
    """Hash all parameters in the model's order, each once, as float32; equal on peers whose replicas are equal."""
    digest = hashlib.sha256()
    for parameter in plain(model).parameters():
        digest.update(np.ascontiguousarray(parameter.detach().float().cpu().numpy(), "<f4").data)
    return digest.hexdigest()
