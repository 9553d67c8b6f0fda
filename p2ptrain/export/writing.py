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
from p2ptrain.export.apertus import apertus_config, apertus_tensors
from p2ptrain.export.held import Held
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


def check_export(manifest: Manifest, format: Format) -> None:
    """Refuse a format that this run's model cannot have, or that packages are missing for.

    Raises:
        ModelError: the model is its owner's own code.
        UsageError: a package is not installed.
    """
    if manifest.own_model is not None and format != "safetensors":
        raise ModelError(
            f"the run {manifest.name!r} trains a model of its owner's own, which no program loads by its name",
            hint="--format safetensors writes its parameters, and your own code loads them",
        )
    missing = [package for package in _NEEDED[format] if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"--format {format} needs {' and '.join(missing)}, which is not installed",
            hint="pip install 'p2ptrain[export]'",
        )


def check_target(out: Path, force: bool) -> None:
    """Refuse a place that cannot be written to, or that holds what an export would not bring back.

    Raises:
        UsageError: it exists and is not to be replaced, or holds other files than those of an export.
        HomeError: the folder around it is missing.
    """
    if not out.parent.is_dir():
        raise HomeError(f"no directory {out.parent}", hint=f"mkdir -p {shlex.quote(str(out.parent))}")
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
    held: Held, home: Home, out: Path, format: Format, told: Told, *, force: bool = False, bits: float | None = None
) -> Exported:
    """Write what a home holds of a round, with a card, as the folder `out`.

    Args:
        bits: bits per byte that the model needs for the run's held-out text; None: not measured.

    Raises:
        ModelError, UsageError: as of `check_export` and `check_target`.
        DataError: this home has no copy of the run's tokenizer.
        HomeError: the folder cannot be written.
    """
    check_export(held.manifest, format)
    check_target(out, force)
    try:
        with _folder(out) as folder:
            with _watched(folder, 4 * held.manifest.parameters, told):
                has_tokenizer = _write(held, home, folder, format)
            parameters = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".gguf")]
            files = {path.name: _sha256(path, told) for path in parameters}
            digest = held.replica.parameters_sha256()
            text = card.card_of(
                held,
                card.Told(
                    format=format,
                    sources=() if held.manifest.own_model is not None else sources_in(held.manifest.data),
                    text=_header(home, held.manifest),
                    parameters_sha256=digest,
                    files=files,
                    bits_per_byte=bits,
                    load=how_to_load(format, Path()),
                ),
            )
            (folder / "README.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise HomeError(
            f"cannot write {out}: {error.strerror or error}", hint="make room, or name another directory"
        ) from error
    return Exported(out, files, digest, has_tokenizer)


def how_to_load(format: Format, out: Path) -> card.Lines:
    """Return what loads the folder."""
    if format == "gguf":
        return card.Lines("", f'llama-cli -m {shlex.quote(str(out / "model.gguf"))} -p "Once upon a time"')
    if format == "safetensors":
        path = str(out / "model.safetensors")
        return card.Lines(
            "python",
            f"from safetensors.torch import load_file\nmodel.load_state_dict(load_file({path!r}), strict=False)",
        )
    return card.Lines(
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r})",
    )


def _write(held: Held, home: Home, folder: Path, format: Format) -> bool:
    """Write all but the card; returns whether there is a tokenizer that what loads the folder understands."""
    manifest, tensors = held.manifest, held.tensors
    about = {
        "run_id": held.run_id.hex(),
        "round": str(held.chain.round),
        "state_id": held.chain.id.hex(),
        "root": held.root.hex(),
        "protocol": str(PROTOCOL_VERSION),
        "version": __version__,
    }
    tokenizer = None if manifest.own_model is not None else tokenizer_of(home, manifest.data)
    if tokenizer is None or format == "safetensors":
        from safetensors.torch import save_file

        if tokenizer is not None:
            about["model"] = msgspec.json.encode(manifest.model).decode()
            (folder / "tokenizer.json").write_bytes(tokenizer.json)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", about)
        return tokenizer is not None
    renamed = apertus_tensors(manifest.model, tensors)
    if format == "gguf":
        from p2ptrain.export.gguf_file import write_gguf

        licences = license_of([source.license for source in sources_in(manifest.data)])
        return write_gguf(
            folder / "model.gguf", manifest.model, renamed, tokenizer, name=manifest.name, license=licences, about=about
        )
    from transformers import ApertusConfig

    from p2ptrain.export.hub import write_model, write_tokenizer

    config = ApertusConfig(**apertus_config(manifest.model, tokenizer.begin_token, tokenizer.end_token))
    write_model(folder, config, renamed)
    write_tokenizer(folder, tokenizer, manifest.model.context)
    return True


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
    """A new folder that becomes `out` at the end; after an error inside `out` is as it was. Raises OSError."""
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
            made.rename(out)
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
