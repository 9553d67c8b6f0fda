"""What a run of the command line starts from, where that is not the built-in GPT from its beginning.

`p2ptrain init` makes it: the module with its first values, which become a file of the run, the *beginning* that
`models/own.py` describes. So first values are the same bits on every peer, whatever they come from: drawn as the
architecture does, read from files of somebody's, or trained by another run. With small matrices (`models/lora.py`) the
file has the values of the model that is held fixed.

Cost: one copy of the model in memory, in float32, and the file, four bytes a parameter. The file is written one
parameter at a time. Another run's home is read as `sample` reads it, with the state of its optimizer.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from torch import nn

from p2ptrain.compression.layout import CHUNK_SIZE, SIDE
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import DataConfig, FileConfig, Manifest, ModelConfig, TaskConfig
from p2ptrain.data.obtaining import tokenizer_of
from p2ptrain.data.preparing import Told, cannot_write
from p2ptrain.data.tokenizer import TextTokenizer, read_tokenizer
from p2ptrain.errors import HomeError, ModelError, UsageError
from p2ptrain.models import hf, lora
from p2ptrain.models.gpt import GPT
from p2ptrain.models.own import Beginning, beginning_of, fixed_of
from p2ptrain.models.weights import find_weights, load_weights, stored_types
from p2ptrain.state.run_files import hashed, make, take
from p2ptrain.training.reading import load_trained

CONTEXT_DEFAULT = 512
"""Tokens in a sequence where nobody says: models can take more, for more memory than many machines have."""
LOGITS_BYTES = 512 * 2**20
"""Of a micro-batch's logits, at most, where there is a choice."""
MICRO_BATCH_MAX = 4
GENTLER = 0.3
"""Factor on the learning rate of a model that has been trained before, where all of it is trained: at the whole rate
the first rounds bring it less far."""
_CONTEXT_MIN, _CONTEXT_MAX = 8, 65_536
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, slots=True)
class Start:
    """A model with its first values."""

    module: nn.Module
    architecture: hf.Architecture | None
    """None: it is the built-in GPT of `model`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TextTokenizer | None = None
    """The model's own; None: there is none with it."""
    trained: bool = False
    """Whether its values have been trained."""
    home: Home | None = None
    """That of the run which has."""
    data: DataConfig | None = None
    """The text of that run."""
    said: tuple[str, ...] = ()
    """What a person should know of it."""

    @property
    def what(self) -> str:
        """What it is, for people."""
        return "GPT" if self.architecture is None else f"model of kind {self.architecture.model_type}"

    def context(self, asked: int | None) -> int:
        """Return how many tokens a sequence has: as many as asked, or as suits. Raises UsageError: that is too many."""
        if self.architecture is None:
            positions, default = _CONTEXT_MAX, self.model.context
        else:
            positions = min(self.architecture.positions or _CONTEXT_MAX, _CONTEXT_MAX)
            default = max(min(positions, CONTEXT_DEFAULT), _CONTEXT_MIN)
        if asked is None:
            return default
        if not _CONTEXT_MIN <= asked <= positions:
            raise UsageError(
                f"--context {asked} is out of range: this model takes from {_CONTEXT_MIN} to {positions:,} tokens",
                hint=f"--context {default}",
            )
        return asked

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding. Raises ModelError: the config does not say."""
        if self.architecture is None:
            return self.model.vocabulary
        rows = self.architecture.table.get("vocab_size")
        if not isinstance(rows, int):
            raise ModelError(f"{self.architecture.model_type} does not say its vocab_size", hint="take another model")
        return rows

    @property
    def width(self) -> int:
        """Entries of a token's embedding."""
        if self.architecture is None:
            return self.model.embedding
        return int(self.module.get_input_embeddings().weight.shape[-1])  # type: ignore[operator]

    def described(
        self, begun: Manifest, data: DataConfig, home: Home, told: Told, context: int, matrices: lora.Asked | None
    ) -> tuple[Manifest, int]:
        """Return the manifest of a run that begins so, whose first values are in the home then, and how many chunks
        its trained parameters take.

        Args:
            begun: says all else.
            matrices: that alone are to be trained; None: all of the model is.

        Raises:
            ModelError: the model cannot be trained, or its config does not say all of it.
            HomeError: the file cannot be written.
        """
        beginning = beginning_of(self.module)
        trained = beginning.trained
        parameters = sum(parameter.tensor.numel() for parameter in trained)
        optimizer, rounds = begun.optimizer, begun.round
        if self.trained and matrices is None:
            rate = float(f"{GENTLER * optimizer.learning_rate:.2g}")
            optimizer = msgspec.structs.replace(optimizer, learning_rate=rate)
        if self.architecture is None:
            task = TaskConfig(kind="gpt", parameters=parameters, values=_placed(beginning, home, told))
            model = msgspec.structs.replace(self.model, context=context)
        else:
            self._check_fixed(beginning)
            rounds = msgspec.structs.replace(rounds, micro_batch=micro_batch_for(context, self.vocabulary))
            of_matrices = None if matrices is None else matrices.config(self.module)
            task = TaskConfig(
                kind="hf",
                parameters=parameters,
                values=_placed(beginning, home, told),
                config=self.architecture.text(),
                context=context,
            )
            if of_matrices is not None:
                trained = lora.add_matrices(self.module, of_matrices)
                count = sum(matrix.tensor.numel() for matrix in trained)
                task = msgspec.structs.replace(task, parameters=count, lora=of_matrices)
            model = ModelConfig()
        made = msgspec.structs.replace(begun, model=model, task=task, data=data, optimizer=optimizer, round=rounds)
        return made, sum(_chunks_of(tuple(parameter.tensor.shape)) for parameter in trained)

    def _check_fixed(self, beginning: Beginning) -> None:
        """Make sure that a peer has what no gradient changes from the config alone. Raises ModelError."""
        if not beginning.header.fixed or self.architecture is None:
            return
        fresh = hf.with_values(hf.checked_config(self.architecture.table), None)
        if fixed_of(fresh, {entry.name for entry in beginning.header.trained}) != beginning.header.fixed:
            raise ModelError(
                "a part of this model that no gradient changes does not follow from its config",
                hint="train it from Python: docs/own-model.md",
            )

    def place_text(self, home: Home) -> DataConfig:
        """Have the text of the run that this comes from in another home, and return what a manifest says of it.

        Raises:
            HomeError: it cannot be written, or is not there.
        """
        assert self.home is not None and self.data is not None
        file = self.data.token_file
        if file is not None:
            there, here = self.home.tokens(file.root), home.tokens(file.root)
            try:
                if not here.exists():
                    here.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    shutil.copyfile(there, home.unfinished_tokens)
                    take(hashed(home.unfinished_tokens)[1], here)
            except FileNotFoundError as error:
                raise HomeError(f"home {self.home.path} has no whole copy of its text", hint="--data PATH") from error
            except OSError as error:
                raise cannot_write(home.data, error) from error
        return self.data


def micro_batch_for(context: int, vocabulary: int) -> int:
    """Return how many sequences are computed at once, so that their logits fit into the memory of small machines."""
    return max(1, min(MICRO_BATCH_MAX, LOGITS_BYTES // (4 * context * vocabulary)))


def _chunks_of(shape: tuple[int, ...]) -> int:
    """Return how many chunks a parameter takes, as `compression/layout.py` cuts it."""
    if len(shape) < 2:
        return math.ceil(math.prod(shape) / CHUNK_SIZE)
    return math.ceil(shape[0] / SIDE) * math.ceil(math.prod(shape[1:]) / SIDE)


# ---- where it comes from --------------------------------------------------------------------------------------------


def from_config(path: Path, seed: int) -> Start:
    """Return a model from scratch, with first values as its architecture draws them.

    Args:
        path: of a config.json.

    Raises:
        ModelError: it is no config of a model that `transformers` has, or the model is too large.
    """
    architecture = hf.read_config(path)
    return Start(
        hf.with_values(hf.checked_config(architecture.table), seed), architecture, said=_left_out(architecture)
    )


def from_path(path: Path, config: Path | None) -> Start:
    """Return a model with the weights that a folder of `transformers`, a file of safetensors, or a home holds.

    Args:
        config: a config.json; None: that of the folder.

    Raises:
        ModelError: there is no such model, or it is not of numbers that can be trained.
        HomeError, DataError: the home cannot be read.
        UsageError: a file alone does not say what it is the weights of.
    """
    if (path / "manifest.signed").exists():
        if config is not None:
            raise UsageError(f"{path} is a home, whose run says which model it is", hint="leave out --model")
        return _from_home(Home(path))
    if config is None and not path.is_dir() and path.suffix not in _PICKLES and path.exists():
        raise UsageError(
            f"{path} does not say of which architecture its weights are", hint=f"--from {path} --model hf:CONFIG.json"
        )
    weights = find_weights(path)
    architecture = hf.read_config(path if config is None else config)
    said, types = list(_left_out(architecture)), stored_types(weights)
    others = [kind for kind in types if kind != "float32"]
    if others:
        said.append(f"the weights are of {' and '.join(others)}: converted to float32")
    folder = path if path.is_dir() else path.parent
    tokenizer = read_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    module = load_weights(hf.checked_config(architecture.table), weights)
    return Start(module, architecture, tokenizer=tokenizer, trained=True, said=tuple(said))


def _from_home(home: Home) -> Start:
    trained = load_trained(home, "cpu")
    manifest, task = trained.manifest, trained.manifest.task_config
    tokenizer, model = tokenizer_of(home, manifest.data), trained.replica.model
    said = (f"goes on from round {trained.replica.chain.round:,} of the run {manifest.name!r}",)
    if isinstance(model, GPT):
        return Start(model, None, manifest.model, tokenizer, True, home, manifest.data, said)
    assert task is not None and isinstance(model, hf.LanguageModel)
    if task.lora_config is not None:
        lora.merge(model.inner)
    return Start(
        model.inner, hf.Architecture(task.architecture), ModelConfig(), tokenizer, True, home, manifest.data, said
    )


def _left_out(architecture: hf.Architecture) -> tuple[str, ...]:
    names = architecture.left_out
    if not names:
        return ()
    shown = hf.describe_left_out(names)
    return (f"left out keys that transformers does not know for {architecture.model_type}: {shown}",)


def place_values(home: Home, task: TaskConfig, path: Path, told: Told) -> None:
    """Have a run's first values in the home, from a copy of the weights, or of the file itself.

    Args:
        path: a folder of `transformers`, a file of safetensors, or a home's file of first values.

    Raises:
        ModelError: they are others than the run's, or cannot be read.
        HomeError: they cannot be written.
    """
    wanted, copied = task.values, None
    there = set(home.data.glob("*.values*"))
    if path.is_file() and path.suffix != ".safetensors" and path.stat().st_size == wanted.bytes:
        found, copied = FileConfig(bytes=wanted.bytes, root=hashed(path)[0].root.hex()), path
    elif task.kind == "hf":
        weights = find_weights(path)
        told.say(f"reading {weights.bytes:,} bytes of weights")
        beginning = beginning_of(load_weights(hf.checked_config(task.architecture), weights))
        found = _placed(beginning, home, told)
    else:
        raise ModelError(f"{path} is no copy of the run's first values", hint="leave out --model, to fetch them")
    if found != wanted:
        for file in set(home.data.glob("*.values*")) - there:
            file.unlink()
        raise ModelError(
            f"the weights at {path} make first values that hash to {found.root[:16]}, the run's to {wanted.root[:16]}",
            hint="leave out --model, to fetch them",
        )
    if copied is not None:
        _write(_parts_of(copied), home, told, wanted.bytes)


def _placed(beginning: Beginning, home: Home, told: Told) -> FileConfig:
    return _write(beginning.parts(), home, told, 4 * sum(p.tensor.numel() for p in beginning.trained))


def _parts_of(path: Path) -> Iterator[bytes | memoryview]:
    with path.open("rb") as file:
        while part := file.read(2**20):
            yield part


def _write(parts: Iterator[bytes | memoryview], home: Home, told: Told, total: int) -> FileConfig:
    def heard() -> Iterator[bytes | memoryview]:
        done = 0
        for part in parts:
            yield part
            done += len(part)
            told.work("writing first values", min(done, total), total)

    made = home.unfinished_values
    try:
        written, file = make(made, heard())
        take(file, home.values(written.root.hex()))
    except OSError as error:
        raise HomeError(
            f"cannot write first values to {home.data}: {error.strerror}",
            hint="make room, or choose another home with --home DIR",
        ) from error
    finally:
        made.unlink(missing_ok=True)
        made.with_name(made.name + ".hashes").unlink(missing_ok=True)
    return FileConfig(bytes=written.length, root=written.root.hex())
