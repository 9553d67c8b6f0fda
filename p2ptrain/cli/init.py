"""`p2ptrain init`: write a commented run.toml.

Text of one's own becomes a token file, which the manifest names by its root. It stays in the home, where `bootstrap`
finds it and hands it to those who join: the files themselves may change or move after this.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import msgspec
import typer

from p2ptrain.cli.options import (
    DataOption,
    FieldOption,
    HomeOption,
    QuietOption,
    TokenizerOption,
    VerboseOption,
    given_text,
)
from p2ptrain.cli.output import set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.config.loading import new_manifest, parse_manifest, render
from p2ptrain.config.manifest import VOCABULARY_MIN, DataConfig, Manifest, RunName, Strategy
from p2ptrain.errors import DataError, UsageError
from p2ptrain.state.files import atomic_write

if TYPE_CHECKING:
    from p2ptrain.data.preparing import Given
    from p2ptrain.data.provenance import Stated

_logger = logging.getLogger(__name__)


def init(
    manifest: Annotated[Path, typer.Argument(metavar="RUN.TOML", help="File to write.")] = Path("run.toml"),
    data: DataOption = None,
    field: FieldOption = None,
    tokenizer: TokenizerOption = None,
    license: Annotated[
        list[str] | None,
        typer.Option(
            "--license", metavar="SPDX", help="Licence of that text, such as CC-BY-4.0; once, or once for each --data."
        ),
    ] = None,
    url: Annotated[
        list[str] | None, typer.Option("--url", help="Where that text can be had; once for each --data.")
    ] = None,
    attribution: Annotated[
        list[str] | None, typer.Option("--attribution", help="Whom to name for that text; once for each --data.")
    ] = None,
    commercial_use: Annotated[
        bool, typer.Option("--commercial-use", help="Refuse text whose licence forbids commercial use.")
    ] = False,
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
    given = given_text(data, field, tokenizer)
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
    if given is not None:
        made = _of_own_text(
            given,
            _stated(given, license or [], url or [], attribution or [], commercial=commercial_use),
            Home(home or default_home()),
            lambda name_of_text: new_manifest(name or name_of_text, cast(Strategy, strategy)),
            private=private,
            quiet=quiet,
        )
    else:
        from p2ptrain.data.corpus import load_embedded

        embedded = load_embedded()
        made = msgspec.structs.replace(
            new_manifest(name or embedded.name, cast(Strategy, strategy)), data=embedded.config(private=private)
        )
    text = render(made)
    parse_manifest(text, manifest)
    atomic_write(manifest, text.encode(), mode=0o644)
    size = "" if made.data.private else f"{made.data.bytes:,} bytes of text, "
    print(
        f"Wrote {manifest}: a GPT of {made.model.parameters:,} parameters, to be trained on {made.data.name} "
        f"({size}{made.data.license}).\n"
        f"Start it with:  p2ptrain bootstrap {shlex.quote(str(manifest))}{_home_flag(home)}"
        f"{' --data PATH' if private and given is None else ''}"
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


def _stated(given: Given, licenses: list[str], urls: list[str], attributions: list[str], *, commercial: bool) -> Stated:
    from p2ptrain.data.licence import objections
    from p2ptrain.data.provenance import Stated, check_stated

    stated = Stated(tuple(licenses), tuple(urls), tuple(attributions))
    check_stated(given.paths, stated)
    for expression in dict.fromkeys(licenses):
        found = objections(expression, commercial=commercial)
        if commercial and any("commercial" in one for one in found):
            raise DataError(
                f"the licence forbids what --commercial-use says: {'; '.join(found)}",
                hint="leave that text out, or leave out --commercial-use",
            )
        for one in found:
            _logger.warning("the licence may forbid to share the model: %s", one)
        if objections(expression, commercial=True) != found:
            _logger.warning("%s allows no commercial use, perhaps of the model neither", expression)
    return stated


def _of_own_text(
    given: Given,
    stated: Stated,
    home: Home,
    begin: Callable[[str], Manifest],
    *,
    private: bool,
    quiet: bool,
) -> Manifest:
    """The manifest of a run on a text of one's own, whose tokens are in the home then."""
    from p2ptrain.data import obtaining, preparing, provenance
    from p2ptrain.data.building import write_part
    from p2ptrain.data.text import text_of
    from p2ptrain.data.token_file import TokenFile
    from p2ptrain.peer.progress import Display

    name = provenance.name_of(given.paths[0])
    manifest = begin(name)
    display = Display(quiet=quiet)
    home.lock()
    made = home.unfinished_tokens
    try:
        prepared = preparing.prepare(given, made, display)
        header = prepared.built.header
        obtaining.check_length(text_of(TokenFile(made)).train, manifest.model.context)
        if private:
            write_part(TokenFile(made), home.own_tokens, train=True)
            write_part(TokenFile(made), made, train=False)
        file = obtaining.place(home, display)
    finally:
        made.unlink(missing_ok=True)
        display.close()
        home.unlock()
    config = DataConfig(
        name=name,
        license=provenance.license_of(stated.licenses),
        private=private,
        bytes=0 if private else header.train_bytes,
        heldout_bytes=header.heldout_bytes,
        tokenizer_sha256=header.tokenizer_sha256,
        tokens=file,
        sources=provenance.sources_of(given.paths, stated, prepared.gathered),
    )
    model = msgspec.structs.replace(manifest.model, vocabulary=max(header.vocabulary, VOCABULARY_MIN))
    return msgspec.structs.replace(manifest, model=model, data=config)


def _home_flag(home: Path | None) -> str:
    return f" --home {shlex.quote(str(home))}" if home else ""
