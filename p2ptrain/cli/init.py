"""`p2ptrain init`: write a commented run.toml.

Text of one's own enters the manifest by hash alone. A packed copy stays in the home, where `bootstrap` finds it by that
hash and hands it to those who join: the files themselves may change or move after this.
"""

from __future__ import annotations

import logging
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import msgspec
import typer

from p2ptrain.cli.options import HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.config.loading import new_manifest, parse_manifest, render
from p2ptrain.config.manifest import DataConfig, RunName, Strategy
from p2ptrain.errors import UsageError
from p2ptrain.state.files import atomic_write

if TYPE_CHECKING:
    from p2ptrain.data.corpus import Corpus

_logger = logging.getLogger(__name__)


def init(
    manifest: Annotated[Path, typer.Argument(metavar="RUN.TOML", help="File to write.")] = Path("run.toml"),
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", metavar="PATH", help="Text file, or folder of .txt and .md, to train on instead; repeatable."
        ),
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", metavar="SPDX", help="Licence of that text, such as CC-BY-4.0.")
    ] = None,
    private: Annotated[
        bool,
        typer.Option(
            "--private",
            help="Each peer trains on text of its own, which stays there; of yours 2 % is handed out, held out.",
        ),
    ] = False,
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="NAME", help=f"What peers exchange: {', '.join(get_args(Strategy))}.")
    ] = "demo",
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run.", show_default="that of its text")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace RUN.TOML if it exists.")] = False,
    home: HomeOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Write a commented run.toml: the embedded corpus and a small GPT, or a text of yours."""
    set_up_logging(verbose, quiet)
    _check_target(manifest, force)
    if bool(data) != bool(license):
        lacking = "--license SPDX" if data else "--data PATH"
        raise UsageError(
            f"{'--data' if data else '--license'} needs {lacking.split()[0]}",
            hint=f"p2ptrain init {shlex.quote(str(manifest))} ... {lacking}",
        )
    if name is not None:
        _check_name(name)
    if strategy not in get_args(Strategy):
        raise UsageError(f"no strategy {strategy!r}", hint=f"use one of {', '.join(get_args(Strategy))}")
    corpus = _own_corpus(data, license) if data and license else _embedded_corpus()
    made = msgspec.structs.replace(
        new_manifest(name or corpus.name, cast(Strategy, strategy)), data=corpus.config(private=private)
    )
    text = render(made)
    parse_manifest(text, manifest)
    if data:
        _keep(corpus, made.data, Home(home or default_home()))
    atomic_write(manifest, text.encode(), mode=0o644)
    print(
        f"Wrote {manifest}: a GPT of {made.model.parameters:,} parameters, to be trained on {corpus.name} "
        f"({len(corpus.train) / 1e6:.1f} MB of text, {corpus.license}).\n"
        f"Start it with:  p2ptrain bootstrap {shlex.quote(str(manifest))}{_home_flag(home)}"
    )


def _check_target(path: Path, force: bool) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a directory", hint=f"p2ptrain init {shlex.quote(str(path / 'run.toml'))}")
    if path.exists() and not force:
        raise UsageError(
            f"{path} exists", hint=f"p2ptrain init {shlex.quote(str(path))} --force   (it becomes a new run)"
        )
    if not path.parent.is_dir():
        raise UsageError(f"no directory {path.parent}", hint=f"mkdir -p {shlex.quote(str(path.parent))}")


def _check_name(name: str) -> None:
    try:
        msgspec.convert(name, RunName)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"--name {name!r} is no name for a run",
            hint="use up to 64 letters, digits, spaces and . _ -, a letter or digit first",
        ) from error


def _embedded_corpus() -> Corpus:
    from p2ptrain.data.corpus import load_embedded

    return load_embedded()


def _own_corpus(paths: list[Path], license: str) -> Corpus:
    from p2ptrain.data.corpus import load_files

    return load_files(paths, _name_of(paths[0]), license)


def _name_of(path: Path) -> str:
    """A name for a text, and a run, from where it lies."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().stem).strip("._-")[:64] or "text"


def _keep(corpus: Corpus, config: DataConfig, home: Home) -> None:
    from p2ptrain.data.corpus import pack
    from p2ptrain.data.obtaining import keep_own_text, shared_sha256

    home.create()
    if config.private:
        keep_own_text(home, corpus.train)
        corpus = replace(corpus, train=b"")
    copy = home.corpus(shared_sha256(config))
    if not copy.exists():
        _logger.info("keeping a packed copy of the text in %s", copy)
        atomic_write(copy, pack(corpus))


def _home_flag(home: Path | None) -> str:
    return f" --home {shlex.quote(str(home))}" if home else ""
