"""A folder with a model and its card, written beside its place and moved there whole."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shlex
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import msgspec

from p2ptrain import __version__
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import PROTOCOL_VERSION, Manifest
from p2ptrain.data.obtaining import tokenizer_of
from p2ptrain.data.preparing import Told
from p2ptrain.data.provenance import license_of, sources_in
from p2ptrain.data.token_file import Header, TokenFile
from p2ptrain.errors import HomeError, ModelError, UsageError
from p2ptrain.export import card
from p2ptrain.export.apertus import KEYS_OF_VERSION_4, apertus_config, apertus_tensors
from p2ptrain.export.held import Held
from p2ptrain.models import lora
from p2ptrain.models.hf import LanguageModel
from p2ptrain.state.files import UNFINISHED_PREFIX

Format = Literal["hf", "safetensors", "gguf"]
LOOK_EVERY_SECONDS = 0.5
"""Between two looks at how much is written."""
_NEEDED: dict[Format, tuple[str, ...]] = {
    "hf": ("transformers", "safetensors"),
    "safetensors": ("safetensors", "huggingface_hub"),
    "gguf": ("gguf", "huggingface_hub"),
}
_WRITTEN = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "model.gguf",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Names of all files that an export may have."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    folder: Path
    files: dict[str, str]
    """{name of a file with parameters: its SHA-256}."""
    parameters_sha256: str
    has_tokenizer: bool
    """Whether what loads the folder gets a tokenizer with it."""


def check_export(manifest: Manifest, format: Format, merge: bool = False) -> None:
    """Refuse a format that this run's model cannot have, or that packages are missing for.

    Args:
        merge: small matrices (LoRA) are to be added to those that they stand beside.

    Raises:
        ModelError: the model is its owner's own code, or llama.cpp's own program has to convert it.
        UsageError: a package is not installed, or there is nothing to merge.
    """
    config = manifest.task_config
    lora = None if config is None else config.lora_config
    if manifest.own_model is not None and format != "safetensors":
        raise ModelError(
            f"the run {manifest.name!r} trains a model of its owner's own, which no program loads by its name",
            hint="--format safetensors writes its parameters, and your own code loads them",
        )
    if config is not None and config.kind == "hf" and format == "gguf":
        raise ModelError(
            f"the run {manifest.name!r} trains a model of transformers, which llama.cpp converts itself",
            hint=f"--format hf{' --merge' if lora else ''}, then llama.cpp's convert_hf_to_gguf.py OUT",
        )
    if merge and lora is None:
        raise UsageError(f"the run {manifest.name!r} trains no small matrices", hint="leave out --merge")
    needed = _NEEDED[format] + (() if lora is None else ("peft",))
    missing = [package for package in needed if not _is_installed(package)]
    if missing:
        raise UsageError(
            f"--format {format} needs {' and '.join(missing)}, not installed here",
            hint=f"pip install 'p2ptrain[{'export' if lora is None else 'export,lora'}]'",
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        return False


def check_target(out: Path, force: bool) -> None:
    """Refuse a place that cannot be written to, or that holds what an export would not bring back.

    Raises:
        UsageError: the folder around it is missing, or it exists and is not to be replaced, or holds other files than
            those of an export.
    """
    if not out.parent.is_dir():
        raise UsageError(f"no directory {out.parent}", hint=f"mkdir -p {shlex.quote(str(out.parent))}")
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError(f"{out} is no directory", hint="name another")
    others = sorted(path.name for path in out.iterdir() if not any(fnmatch(path.name, name) for name in _WRITTEN))
    if others:
        raise UsageError(
            f"{out} holds what no export has written, such as {others[0]!r}", hint="name another directory"
        )
    if not force:
        raise UsageError(f"{out} exists", hint=f"p2ptrain export {shlex.quote(str(out))} --force   replaces it")


def export(
    held: Held,
    home: Home,
    out: Path,
    format: Format,
    told: Told,
    *,
    merge: bool = False,
    force: bool = False,
    bits: float | None = None,
) -> Exported:
    """Write what a home holds of a round, with a card, as the folder `out`.

    Args:
        merge: of a model with small matrices (LoRA) beside its own write one without; `held` has none then, either.
        bits: bits per byte that the model needs for the run's held-out text; None: not measured.

    Raises:
        ModelError, UsageError: as of `check_export` and `check_target`.
        DataError: this home has no copy of the run's tokenizer.
        HomeError: the folder cannot be written.
    """
    check_export(held.manifest, format, merge)
    check_target(out, force)
    try:
        with _folder(out) as folder:
            digest = held.replica.parameters_sha256()
            with _watched(folder, 4 * _parameters(held, merge), told):
                has_tokenizer = _write(held, home, folder, format, merge)
            parameters = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".gguf")]
            files = {path.name: _sha256(path, told) for path in parameters}
            text = card.card_of(
                held,
                card.Told(
                    format=format,
                    sources=() if held.manifest.own_model is not None else sources_in(held.manifest.data),
                    text=_header(home, held.manifest),
                    parameters_sha256=digest,
                    files=files,
                    bits_per_byte=bits,
                    load=how_to_load(held.manifest, format, Path(), merge),
                ),
            )
            (folder / "README.md").write_text(text, encoding="utf-8")
    except Exception as error:
        # What writes safetensors has an error of its own, which is no OSError, where the disk is full.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = getattr(error, "strerror", None) or error
        raise HomeError(f"cannot write {out}: {reason}", hint="make room, or name another directory") from error
    return Exported(out, files, digest, has_tokenizer)


def how_to_load(manifest: Manifest, format: Format, out: Path, merge: bool) -> card.Lines:
    """Return what loads the folder."""
    if format == "gguf":
        return card.Lines("", f'llama-cli -m {shlex.quote(str(out / "model.gguf"))} -p "Once upon a time"')
    if format == "safetensors":
        path = str(out / "model.safetensors")
        return card.Lines(
            "python",
            f"from safetensors.torch import load_file\nmodel.load_state_dict(load_file({path!r}), strict=False)",
        )
    config = manifest.task_config
    if config is not None and config.lora_config is not None and not merge:
        return card.Lines(
            "python",
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "base = AutoModelForCausalLM.from_pretrained(BASE)  # the model that the run started from\n"
            f"model = PeftModel.from_pretrained(base, {str(out)!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r})",
        )
    return card.Lines(
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r})",
    )


def _write(held: Held, home: Home, folder: Path, format: Format, merge: bool) -> bool:
    """Write all but the card; returns whether there is a tokenizer that what loads the folder understands."""
    manifest = held.manifest
    tokenizer = None if manifest.own_model is not None else tokenizer_of(home, manifest.data)
    model = held.replica.model
    inner = model.inner if isinstance(model, LanguageModel) else None
    adds = manifest.task_config is not None and manifest.task_config.lora_config is not None
    if inner is not None and merge:
        lora.merge(inner)
    if tokenizer is None or format == "safetensors":
        from safetensors.torch import save_file

        if tokenizer is not None:
            (folder / "tokenizer.json").write_bytes(tokenizer.json)
        tensors = dict(inner.named_parameters()) if inner is not None and merge else held.tensors
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, folder / "model.safetensors", _about(held, with_model=True))
        return tokenizer is not None
    if format == "gguf":
        from p2ptrain.export.gguf_file import write_gguf

        return write_gguf(
            folder / "model.gguf",
            manifest.model,
            apertus_tensors(manifest.model, held.tensors),
            tokenizer,
            name=manifest.name,
            license=license_of([source.license for source in sources_in(manifest.data)]),
            about=_about(held),
        )
    from p2ptrain.export import hub

    if inner is None:
        from transformers import ApertusConfig

        config = ApertusConfig(**apertus_config(manifest.model, tokenizer.begin_token, tokenizer.end_token))
        hub.write_model(folder, config, apertus_tensors(manifest.model, held.tensors), KEYS_OF_VERSION_4)
    elif adds and not merge:
        hub.write_adapter(folder, inner)
    else:
        hub.write_module(folder, inner)
    hub.write_tokenizer(folder, tokenizer, manifest.context)
    return True


def _parameters(held: Held, merge: bool) -> int:
    """Return how many parameters are written."""
    config = held.manifest.task_config
    return config.values_parameters if merge and config is not None else held.manifest.parameters


def _about(held: Held, with_model: bool = False) -> dict[str, str]:
    """Return what a file of parameters says of itself."""
    manifest, about = held.manifest, {}
    if with_model and manifest.task_config is not None and manifest.task_config.kind == "hf":
        about = {"config": str(manifest.task_config.config)}
    elif with_model and manifest.own_model is None:
        about = {"model": msgspec.json.encode(manifest.model).decode()}
    return about | {
        "run_id": held.run_id.hex(),
        "round": str(held.chain.round),
        "state_id": held.chain.id.hex(),
        "root": held.root.hex(),
        "protocol": str(PROTOCOL_VERSION),
        "version": __version__,
    }


def _header(home: Home, manifest: Manifest) -> Header | None:
    file = manifest.data.token_file
    if manifest.own_model is not None or file is None or not home.tokens(file.root).exists():
        return None
    return TokenFile(home.tokens(file.root)).header


def _sha256(path: Path, told: Told) -> str:
    digest, done, length = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
            done += len(piece)
            told.work(f"hashing {path.name}", done, length)
    return digest.hexdigest()


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A new folder that becomes `out` at the end; after an error `out` is as it was. Raises OSError."""
    made = Path(tempfile.mkdtemp(dir=out.parent, prefix=UNFINISHED_PREFIX))
    try:
        yield made
        made.chmod(0o755)
        for path in made.iterdir():
            path.chmod(0o644)
        if out.exists():
            # A folder that is not empty cannot be replaced in one step: for a moment there is none.
            before = made.with_name(made.name + ".old")
            out.rename(before)
            try:
                made.rename(out)
            except OSError:
                before.rename(out)
                raise
            shutil.rmtree(before, ignore_errors=True)
        else:
            made.rename(out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


@contextlib.contextmanager
def _watched(folder: Path, total_bytes: int, told: Told) -> Iterator[None]:
    """Have it said how much of what is being written is there: libraries that write whole models do not say it."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_EVERY_SECONDS):
            with contextlib.suppress(OSError):
                done = sum(path.stat().st_size for path in folder.iterdir())
                told.work("writing parameters", min(done, total_bytes - 1), total_bytes)

    watcher = threading.Thread(target=look, name="export-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        told.work("writing parameters", total_bytes, total_bytes)
