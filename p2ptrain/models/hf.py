"""A causal language model that the library `transformers` has, by its config, as what a run trains.

The config comes from a file of the owner's, and to whoever joins from a stranger's manifest. No code comes with it: the
architecture is one of the installed library, keys that name code or files are left out, and keys that this architecture
does not have are refused. The library's own class checks their values. Then the model is built without memory (torch's
device `meta`), while every parameter, buffer and module that it registers is counted, so that a config which asks for
too much is refused before any of it is there.

Names in a checkpoint, a snapshot and the run's beginning are those of the module's `named_parameters()`, as in a file
that `transformers` writes, behind `p.`: `p.model.layers.0.self_attn.q_proj.weight`. A parameter that several modules
share stands once, under its first name.

Cost: the library takes 3 to 8 seconds to load. Given up: all logits of a micro-batch are in memory at once, because
what an architecture does to them after its head differs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from p2ptrain.config.manifest import CONFIG_MAX_BYTES, PARAMETERS_MAX, TaskConfig, canonical_json
from p2ptrain.errors import ModelError
from p2ptrain.models.gpt import NOT_COUNTED, continued

MODULES_MAX = 100_000
_LAYERS_MAX, _NUMBER_MAX = 2**12, 2**31
_COUNTS = re.compile(r"layer|block|depth|expert|head|stage")
"""Keys whose numbers lists and modules are made by, also before anything could be counted."""
_NOT_OF_THE_ARCHITECTURE = frozenset(
    (
        *("transformers_version", "architectures", "dtype", "torch_dtype", "auto_map", "quantization_config"),
        *("attn_implementation", "experts_implementation", "name_or_path", "output_hidden_states"),
        *("output_attentions", "return_dict", "id2label", "label2id", "num_labels", "problem_type", "use_cache"),
        *("per_layer_config", "kernel_config", "chunk_size_feed_forward", "is_encoder_decoder", "add_cross_attention"),
    )
)
"""Keys that say nothing of parameters or of what is computed from them, or that name code. None of them travels."""
_OTHER_NAMES_MAX = 6
"""Of keys left out, in a message."""
CONFIG_FILE_MAX_BYTES = 1024 * 1024
"""Of a config.json on this disk; some list thousands of labels."""


def check_installed(package: str = "transformers") -> None:
    """Refuse to go on without an optional package. Raises ModelError, which names the extra to install."""
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f"this run's model needs the package {package}, which is not installed",
            hint=f"pip install 'p2ptrain[{'lora' if package == 'peft' else 'transformers'}]'",
        )


def _library() -> Any:
    """Return the module `transformers`, which asks no server for anything in this process. Raises ModelError."""
    check_installed()
    if "transformers" not in sys.modules:
        # Some architectures look for faster kernels there, whose code nobody has checked.
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return transformers


# ---- configs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Architecture:
    """A config that has been checked."""

    table: dict[str, object]
    """Keys of the architecture, as they go into the manifest."""
    left_out: tuple[str, ...] = ()
    """Keys of the file that the architecture does not have."""

    @property
    def model_type(self) -> str:
        """Name of the architecture, as `llama`."""
        return str(self.table["model_type"])

    @property
    def positions(self) -> int | None:
        """How many tokens a sequence may have; None: the config sets no limit."""
        return positions_of(self.table)

    def text(self) -> str:
        """Return it as the manifest has it. Raises ModelError: it is too long."""
        text = canonical_json(self.table)
        if len(text) > CONFIG_MAX_BYTES:
            raise ModelError(
                f"the config takes {len(text):,} bytes; a manifest has room for {CONFIG_MAX_BYTES:,}",
                hint="leave out of the file what the architecture does not need",
            )
        return text


def positions_of(table: Mapping[str, object]) -> int | None:
    """Return how many tokens a sequence of this config may have; None: it sets no limit."""
    named = (table.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"))
    return next((value for value in named if isinstance(value, int) and value > 0), None)


def read_config(path: Path) -> Architecture:
    """Read a config.json, or the one in a folder, of a model that `transformers` has.

    Returns:
        Every key of the architecture, also those that the file leaves to the library's defaults, which may change.

    Raises:
        ModelError: it cannot be read, is of no causal language model of the installed library, or its class refuses it.
    """
    file = path / "config.json" if path.is_dir() else path
    hint = "give a config.json as transformers writes it: --model hf:CONFIG.json"
    try:
        if file.stat().st_size > CONFIG_FILE_MAX_BYTES:
            raise ModelError(f"{file} takes {file.stat().st_size:,} bytes; no config of a model is so long", hint=hint)
        table = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}", hint=hint) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file} is no config: {error}", hint=hint) from error
    try:
        kind = _class_of(table)
        given = {key: value for key, value in table.items() if _travels(key)}
        config = _constructed(kind, given)
    except ModelError as error:
        raise ModelError(f"{file}: {error}", hint=error.hint or f"correct {file}") from error
    known = _keys_of(kind)
    # Those that are null too: null may be other than the default.
    kept = {key: _plain(getattr(config, key)) for key in sorted(known)} | {"model_type": kind.model_type}
    heard = {*known, *kind.attribute_map, "model_type", "rope_theta", "rope_scaling"}
    return Architecture(kept, tuple(sorted(key for key in given if key not in heard)))


def describe_left_out(names: tuple[str, ...]) -> str:
    """Return keys that a config has and its architecture has not, for people."""
    more = f" and {len(names) - _OTHER_NAMES_MAX} more" if len(names) > _OTHER_NAMES_MAX else ""
    return ", ".join(names[:_OTHER_NAMES_MAX]) + more


def checked_config(table: Mapping[str, Any]) -> Any:
    """Return the library's config of a manifest's.

    Raises:
        ModelError: the architecture is not in the installed library, has no such key, or refuses a value.
    """
    kind = _class_of(table)
    unknown = sorted(table.keys() - _keys_of(kind) - {"model_type"})
    if unknown:
        raise ModelError(
            f"the run's model has {describe_left_out(tuple(unknown))}, which {kind.__name__} of transformers "
            f"{_library().__version__} does not know",
            hint="pip install --upgrade transformers; or ask the run's owner for the version",
        )
    return _constructed(kind, dict(table))


def _travels(key: str) -> bool:
    return key not in _NOT_OF_THE_ARCHITECTURE and not key.startswith("_")


def _keys_of(kind: Any) -> set[str]:
    return {field.name for field in fields(kind) if _travels(field.name)}


def _class_of(table: Mapping[str, Any]) -> Any:
    """Return the library's class for a config. Raises ModelError."""
    transformers, named = _library(), table.get("model_type")
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not isinstance(named, str) or named not in known:
        raise ModelError(
            f"model_type = {str(named)[:40]!r} is no causal language model that transformers "
            f"{transformers.__version__} has",
            hint="use one that it has, as llama, qwen3 or gpt2; code of a model's own is never loaded",
        )
    kind = transformers.CONFIG_MAPPING[named]
    if getattr(kind, "sub_configs", None):
        raise ModelError(f"{named} is made of several models", hint="use the config of its language model alone")
    return kind


def _constructed(kind: Any, table: dict[str, Any]) -> Any:
    """Return a config of that class, whose own checks it has passed. Raises ModelError."""
    _check_numbers(table)
    try:
        # The class may change what it is given.
        config = kind.from_dict(msgspec.json.decode(msgspec.json.encode(table)))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(f"{kind.__name__} refuses the config: {' '.join(lines)[:300]}") from error
    return config


def _check_numbers(value: Any, key: str = "") -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        most = _LAYERS_MAX if _COUNTS.search(key) else _NUMBER_MAX
        if abs(value) > most:
            raise ModelError(f"{key[:40]} = {str(value)[:20]} is out of range: at most {most:,}")


def _plain(value: Any) -> object:
    """Return a config's value as JSON has it. Raises ModelError."""
    try:
        plain: object = msgspec.json.decode(msgspec.json.encode(value))
    except (TypeError, msgspec.MsgspecError) as error:
        raise ModelError(f"a value of the config is none of JSON: {error}") from error
    return plain


# ---- modules --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """Refuse what is built within, as soon as it is too large, by what its modules register. Raises ModelError."""
    hooks = nn.modules.module
    entries = modules = 0

    def tensor(module: nn.Module, name: str, registered: Tensor | None) -> None:
        nonlocal entries
        entries += 0 if registered is None else registered.numel()
        if entries > PARAMETERS_MAX:
            raise ModelError(f"the model has more than {PARAMETERS_MAX:,} parameters", hint="take a smaller one")

    def part(module: nn.Module, name: str, registered: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > MODULES_MAX:
            raise ModelError(f"the model has more than {MODULES_MAX:,} modules", hint="take a smaller one")

    handles = [
        hooks.register_module_parameter_registration_hook(tensor),
        hooks.register_module_buffer_registration_hook(tensor),
        hooks.register_module_module_registration_hook(part),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_memory(config: Any) -> nn.Module:
    """Build the module of a config of the library on the device `meta`, where tensors have shapes and no values.

    Raises:
        ModelError: it would have more than `PARAMETERS_MAX` parameters, or cannot be built.
    """
    with torch.device("meta"), _counted():
        return _built(config)


def with_values(config: Any, seed: int | None) -> nn.Module:
    """Build the module of a config of the library on the CPU, in float32.

    Args:
        seed: of first values as the architecture draws them; None: values are whatever the memory held.

    Raises:
        ModelError: as of `without_memory`.
    """
    without_memory(config)
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
            return _built(config)
        from transformers.initialization import no_init_weights

        with no_init_weights():
            module = _built(config)
        # As a part of giving first values, what is shared would be.
        module.tie_weights()  # type: ignore[operator]
        return module


def _built(config: Any) -> nn.Module:
    copy = type(config).from_dict(config.to_dict())
    # Any other would be loaded from a server.
    copy._attn_implementation = None
    try:
        made = _library().AutoModelForCausalLM.from_config(copy, trust_remote_code=False, dtype=torch.float32)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"transformers cannot build the model: {str(error)[:300]}") from error
    assert isinstance(made, nn.Module)
    return made


def transformers_model(task: TaskConfig, config: bytes | Mapping[str, Any] | None = None) -> nn.Module:
    """Build the module that a run of kind `hf` trains, as a plain model of `transformers` on the CPU, in float32.

    Its parameters hold no values yet. In a checkpoint and a snapshot (`Replica.arrays`, `load_arrays`) they stand by
    the names of `named_parameters()` behind `p.`; with `task.lora` these are the names of small matrices, which
    `models/lora.py` adds to the module, and the values of all others are in the run's beginning alone.

    Args:
        task: of the manifest.
        config: in place of that of `task`: JSON, or what it says.

    Raises:
        ModelError: `transformers` is not installed or does not have this model, or the model is too large.
    """
    if isinstance(config, bytes):
        config = msgspec.json.decode(config, type=dict[str, Any])
    return with_values(checked_config(task.architecture if config is None else config), None)


# ---- as what is trained ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sizes:
    """What text has to suit."""

    context: int
    """Tokens in a sequence."""
    vocabulary: int


class LanguageModel(nn.Module):
    """A model of `transformers` that is used as the built-in GPT is.

    Args:
        inner: over [batch, positions] of token numbers; gives logits [batch, positions, vocabulary].
    """

    def __init__(self, inner: nn.Module, context: int, vocabulary: int) -> None:
        super().__init__()
        self.inner, self.config = inner, Sizes(context, vocabulary)

    @property
    def embedding(self) -> nn.Module:
        """Where tokens enter."""
        found = self.inner.get_input_embeddings()  # type: ignore[operator]
        assert isinstance(found, nn.Module)
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, positions, vocabulary] for tokens [batch, positions], positions at most the context.

        Without gradients nothing is left out by chance, as dropout does in training.
        """
        if self.inner.training != torch.is_grad_enabled():
            self.inner.train(torch.is_grad_enabled())
        logits = self.inner(input_ids=tokens, use_cache=False).logits
        assert isinstance(logits, Tensor)
        return logits

    def loss(self, tokens: Tensor, counted: NDArray[np.bool_] | None = None) -> Tensor:
        """Mean cross-entropy in nats a token of predicting tokens[:, 1:] from what precedes each.

        Args:
            tokens: [batch, 2 to context + 1], int64.
            counted: of the same shape: over which tokens the mean is; None: over all. At least one after the first.
        """
        logits, targets = self(tokens[:, :-1]), tokens[:, 1:]
        if counted is not None:
            targets = targets.masked_fill(torch.from_numpy(~counted[:, 1:]).to(tokens.device), NOT_COUNTED)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NOT_COUNTED)

    @torch.no_grad()
    def generate(self, tokens: list[int], count: int, temperature: float, seed: int) -> list[int]:
        """Continue `tokens` by `count` sampled ones, as the built-in GPT does. Raises ValueError: no tokens."""
        self.inner.eval()
        device = next(self.parameters()).device
        return continued(self._remembering(), tokens, count, self.config.context, temperature, seed, device)

    def _remembering(self) -> Callable[[Tensor], Tensor]:
        """Return what gives logits [1, positions, vocabulary] and computes nothing anew of tokens seen before."""
        known = inspect.signature(self.inner.forward).parameters
        # It has had both names; an architecture without it computes all anew.
        name = next((name for name in ("cache", "past_key_values") if name in known), None)
        cache: Any = None
        seen = 0

        def logits_of(window: Tensor) -> Tensor:
            nonlocal cache, seen
            if window.shape[1] != seen + 1:
                # The first, or one that has moved on: tokens have other positions in it.
                cache = None
            more = {} if name is None else {name: cache, "use_cache": True}
            made = self.inner(input_ids=window if cache is None else window[:, -1:], **more)
            cache, seen = getattr(made, name or "", None), window.shape[1]
            logits = made.logits
            assert isinstance(logits, Tensor)
            return logits

        return logits_of
