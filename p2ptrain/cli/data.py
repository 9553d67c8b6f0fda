"""`p2ptrain data`: what a run trains on, and where that comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from p2ptrain.cli.options import HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import printable, set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.config.loading import load_manifest
from p2ptrain.config.manifest import DataConfig, open_manifest
from p2ptrain.errors import HomeError

if TYPE_CHECKING:
    from p2ptrain.data.token_file import Header


def data(
    manifest: Annotated[
        Path | None, typer.Argument(metavar="RUN.TOML", help="A manifest; none: that of the home's run.")
    ] = None,
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="Form of the output.")] = "text",
    home: HomeOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Show what a run trains on: sources, licences, attribution, tokens."""
    set_up_logging(verbose, quiet)
    from p2ptrain.data.provenance import sources_in

    here = Home(home or default_home())
    config = load_manifest(manifest).data if manifest is not None else _config_in(here)
    sources, header = sources_in(config), _header(here, config)
    if format == "json":
        found = {
            "name": config.name,
            "license": config.license,
            "private": config.private,
            "tokenizer_sha256": config.tokenizer_sha256,
            "root": "" if config.token_file is None else config.token_file.root,
            "tokens": None if header is None else {**_counts(header), "vocabulary": header.vocabulary},
            "sources": [msgspec.structs.asdict(source) for source in sources],
        }
        print(json.dumps(found))
        return
    lines = [f"{config.name} ({config.license})" + (", each peer's own text beside it" if config.private else "")]
    if header is not None:
        counts = _counts(header)
        lines.append(
            f"  {counts['documents']:,} documents; {counts['train']:,} tokens to train on, {counts['heldout']:,} held "
            f"out; {counts['bytes_per_token']:.2f} bytes a token; {header.vocabulary:,} tokens in the vocabulary"
        )
    elif config.token_file is not None:
        lines.append(f"  {config.token_file.bytes:,} bytes of tokens, which home {here.path} does not have")
    for source in sources:
        lines.append(f"{source.name}")
        rows = [
            ("licence", source.license),
            ("address", source.url),
            ("attribution", source.attribution),
            ("length", f"{source.bytes:,} bytes" if source.bytes else ""),
            ("sha256", source.sha256),
        ]
        lines += [f"  {what:<12}{value}" for what, value in rows if value]
    print(printable("\n".join(lines)))


def _counts(header: Header) -> dict[str, float]:
    tokens = header.train_tokens + header.heldout_tokens
    return {
        "documents": header.documents,
        "train": header.train_tokens,
        "heldout": header.heldout_tokens,
        "bytes_per_token": round((header.train_bytes + header.heldout_bytes) / max(tokens, 1), 3),
    }


def _config_in(home: Home) -> DataConfig:
    try:
        return open_manifest(home.manifest.read_bytes())[0].data
    except OSError as error:
        raise HomeError(
            f"home {home.path} is in no run", hint="p2ptrain data RUN.TOML, or another home with --home DIR"
        ) from error


def _header(home: Home, config: DataConfig) -> Header | None:
    """What the home's token file says; None: it has none, or the run needs none."""
    from p2ptrain.data.token_file import TokenFile

    if config.token_file is None or not home.tokens(config.token_file.root).exists():
        return None
    return TokenFile(home.tokens(config.token_file.root)).header
