"""`p2ptrain init`: write a commented run.toml.

Text of one's own becomes a token file, and a model other than the built-in GPT a file of first values. The manifest
names both by their roots. They stay in the home, where `bootstrap` finds them and hands them to those who join: the
files themselves may change or move after this.
"""

from __future__ import annotations

import json
import logging
import secrets
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

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
    path_parser,
)
from p2ptrain.cli.output import set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.config.loading import new_manifest, parse_manifest, render
from p2ptrain.config.manifest import (
    TOKENIZER_VOCABULARY,
    VOCABULARY_MIN,
    DataConfig,
    Manifest,
    RunName,
    Strategy,
)
from p2ptrain.config.sizes import SIZES, Size
from p2ptrain.errors import DataError, UsageError
from p2ptrain.state.files import atomic_write
from p2ptrain.training.machine import Machine, free_disk_bytes, this_machine
from p2ptrain.training.needs import Needs, measured_flops, needs_of

if TYPE_CHECKING:
    from p2ptrain.data.preparing import Given
    from p2ptrain.data.provenance import Stated
    from p2ptrain.data.tokenizer import TextTokenizer
    from p2ptrain.models.lora import Asked
    from p2ptrain.training.starting import Start

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
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="hf:CONFIG.json",
            help="An architecture that transformers knows, by its config.json.",
            show_default="the built-in GPT",
        ),
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--from",
            parser=path_parser("--from"),
            metavar="PATH",
            help="Start from weights: a folder of transformers, a .safetensors file, or the home of another run.",
        ),
    ] = None,
    matrices: Annotated[
        str | None,
        typer.Option(
            "--lora",
            metavar="r=16,alpha=32,target=attention",
            help="Train small matrices beside those of the model, which is held fixed; target: attention, mlp, all, "
            "or names.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="TOKENS",
            help="Tokens in a sequence, with --model and --from.",
            show_default="what the model takes, but at most 512",
        ),
    ] = None,
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="NAME", help=f"What peers exchange: {', '.join(get_args(Strategy))}.")
    ] = "demo",
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="PARAMETERS",
            help=f"A model of about so many, with the batch and the rate that suit it: {', '.join(SIZES)}.",
            show_default="the demo's, 1.4M",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run.", show_default="that of its text")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace RUN.TOML if it exists, and write what this machine cannot hold.")
    ] = False,
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="Form of the output.")] = "text",
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
    if size is not None and size not in SIZES:
        raise UsageError(f"no size {size!r}", hint=f"use one of {', '.join(SIZES)}")
    if size is not None and (model is not None or start_from is not None):
        raise UsageError("--size is of the built-in GPT", hint="leave out --size: the model says how large it is")
    chosen = cast(Size | None, size)
    start = _start(model, start_from, context)
    asked = _asked(matrices, start)
    here = Home(home or default_home())

    def begin(name_of_text: str) -> Manifest:
        width = None if start is None else start.width
        return new_manifest(name or name_of_text, cast(Strategy, strategy), width, chosen)

    machine, path_of_home = this_machine(), here.path
    if start is None:
        # Before a text of one's own becomes tokens, which takes long.
        _check_fits(begin("any"), machine, path_of_home, force)

    tokens = begin("any").context if start is None else start.context(context)
    if given is not None:
        stated = _stated(given, license or [], url or [], attribution or [], commercial=commercial_use)
        own = None if start is None or given.tokenizer is not None else start.tokenizer
        described, vocabulary = _of_own_text(given, stated, here, tokens, own, private=private, quiet=quiet)
    else:
        described, vocabulary = _of_shipped_text(start, here, private=private)
    made, chunks = begin(described.name), None
    if start is None:
        of_gpt = msgspec.structs.replace(made.model, vocabulary=max(vocabulary, VOCABULARY_MIN))
        made = msgspec.structs.replace(made, model=of_gpt, data=described)
    else:
        made, chunks = _with_start(made, described, start, here, tokens, vocabulary, asked, quiet=quiet)
    needs = _check_fits(made, machine, path_of_home, force, chunks)
    text = render(made)
    parse_manifest(text, manifest)
    atomic_write(manifest, text.encode(), mode=0o644)
    next_command = (
        f"p2ptrain bootstrap {shlex.quote(str(manifest))}{_home_flag(home)}"
        f"{' --data PATH' if private and given is None else ''}"
    )
    flops = measured_flops()
    if format == "json":
        shown = {"manifest": str(manifest), "needs": needs.as_json(machine, flops), "next": next_command}
        print(json.dumps(shown, indent=2))
        return
    of_text = "" if made.data.private else f"{made.data.bytes:,} bytes of text, "
    count = made.parameters if made.task_config is None else made.task_config.values_parameters
    print(
        f"Wrote {manifest}: a {'GPT' if start is None else start.what} of {count:,} parameters, to be trained on "
        f"{made.data.name} ({of_text}{made.data.license})."
    )
    if needs.fixed_parameters:
        print(f"{needs.parameters:,} parameters are trained, beside a model that is held fixed.")
    print("A peer needs, about:")
    for line in needs.lines(machine, free_disk_bytes(here.path), flops):
        print(f"  {line}")
    print(f"Start it with:  {next_command}")


def _check_fits(made: Manifest, machine: Machine, home: Path, force: bool, chunks: int | None = None) -> Needs:
    """Return what a peer of the run needs. Raises TooLargeError: this machine has not got it, and nobody insists."""
    needs = needs_of(made, chunks, machine)
    if not force:
        needs.check(machine, home, force="--force to write it")
    return needs


def _start(model: str | None, path: Path | None, context: int | None) -> Start | None:
    """What the run starts from; None: the built-in GPT, from its beginning."""
    if model is None and path is None:
        if context is not None:
            raise UsageError("--context needs --model or --from", hint="set model.context in RUN.TOML")
        return None
    kind, _, named = (model or "").partition(":")
    if model is not None and (kind != "hf" or not named):
        raise UsageError(
            f"--model {model}: no model that is known",
            hint="--model hf:CONFIG.json, a config as transformers writes it",
        )
    config = Path(named).expanduser() if named else None
    from p2ptrain.training import starting

    if path is not None:
        _logger.info("reading %s", path)
        start = starting.from_path(path, config)
    else:
        assert config is not None
        start = starting.from_config(config, secrets.randbits(63))
    for line in start.said:
        _logger.warning("%s", line)
    return start


def _asked(matrices: str | None, start: Start | None) -> Asked | None:
    """What small matrices are to be trained; None: the whole model is."""
    if matrices is None:
        return None
    from p2ptrain.models.hf import check_installed
    from p2ptrain.models.lora import read_asked

    asked = read_asked(matrices)
    if start is None or start.architecture is None:
        raise UsageError(
            "--lora is for models that transformers has", hint="--from FOLDER --lora ..., or leave out --lora"
        )
    check_installed("peft")
    asked.config(start.module)
    return asked


def _of_shipped_text(start: Start | None, home: Home, *, private: bool) -> tuple[DataConfig, int]:
    """What a manifest says where no text is given: of the shipped one, or of that of the run which `start` is from."""
    from p2ptrain.data.corpus import load_embedded
    from p2ptrain.data.tokenizer import tokenizer_sha256

    if start is not None and start.data is not None and start.data.token_file is not None and not private:
        if start.data.private:
            raise UsageError("each peer of that run has text of its own", hint="--data PATH --license SPDX")
        assert start.tokenizer is not None
        return start.place_text(home), start.tokenizer.vocabulary
    if start is not None and start.tokenizer is not None and start.tokenizer.sha256 != tokenizer_sha256():
        raise UsageError(
            "the shipped text is of another tokenizer than this model's",
            hint="give a text, which the model's own tokenizer reads: --data PATH --license SPDX",
        )
    if start is not None and start.trained and start.tokenizer is None:
        _logger.warning("no tokenizer.json lies beside the weights: the shipped one is taken for theirs")
    return load_embedded().config(private=private), TOKENIZER_VOCABULARY


def _with_start(
    begun: Manifest,
    data: DataConfig,
    start: Start,
    home: Home,
    context: int,
    vocabulary: int,
    asked: Asked | None,
    *,
    quiet: bool,
) -> tuple[Manifest, int]:
    """The manifest of a run that begins with `start`, whose first values are in the home then, and its chunks."""
    from p2ptrain.peer.progress import Display

    if vocabulary > start.vocabulary:
        raise DataError(
            f"the tokenizer has {vocabulary:,} tokens, and the model's vocabulary is {start.vocabulary:,}",
            hint="give the model's own tokenizer with --tokenizer, or a larger vocab_size",
        )
    display = Display(quiet=quiet)
    home.lock()
    try:
        return start.described(begun, data, home, display, context, asked)
    finally:
        display.close()
        home.unlock()


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
    context: int,
    tokenizer: TextTokenizer | None,
    *,
    private: bool,
    quiet: bool,
) -> tuple[DataConfig, int]:
    """What a manifest says of a text of one's own, whose tokens are in the home then, and how many tokens there are."""
    from p2ptrain.data import obtaining, preparing, provenance
    from p2ptrain.data.building import write_part
    from p2ptrain.data.text import text_of
    from p2ptrain.data.token_file import TokenFile
    from p2ptrain.peer.progress import Display

    display = Display(quiet=quiet)
    home.lock()
    made = home.unfinished_tokens
    try:
        prepared = preparing.prepare(given, made, display, tokenizer=tokenizer)
        header = prepared.built.header
        obtaining.check_length(text_of(TokenFile(made)).train, context)
        if private:
            write_part(TokenFile(made), home.own_tokens, train=True)
            write_part(TokenFile(made), made, train=False)
        file = obtaining.place(home, display)
    finally:
        made.unlink(missing_ok=True)
        display.close()
        home.unlock()
    config = DataConfig(
        name=provenance.name_of(given.paths[0]),
        license=provenance.license_of(stated.licenses),
        private=private,
        bytes=0 if private else header.train_bytes,
        heldout_bytes=header.heldout_bytes,
        tokenizer_sha256=header.tokenizer_sha256,
        tokens=file,
        sources=provenance.sources_of(given.paths, stated, prepared.gathered),
    )
    return config, header.vocabulary


def _home_flag(home: Path | None) -> str:
    return f" --home {shlex.quote(str(home))}" if home else ""
