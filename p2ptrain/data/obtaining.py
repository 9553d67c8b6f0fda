"""Get a run's text from the first place that has it: this home, the paths given, the package, or the swarm."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from p2ptrain.config.home import Home
from p2ptrain.config.manifest import DataConfig, FileConfig, Manifest
from p2ptrain.data.corpus import check_embedded, load_embedded
from p2ptrain.data.preparing import Given, Told, cannot_write, prepare
from p2ptrain.data.text import Part, Text, embedded_text, text_of
from p2ptrain.data.token_file import TokenFile, is_token_file
from p2ptrain.data.tokenizer import TextTokenizer, shipped_tokenizer
from p2ptrain.errors import DataError
from p2ptrain.state.pieces import Partials
from p2ptrain.state.run_files import hashed, take
from p2ptrain.state.snapshot import PIECE_BYTES

Fetch = Callable[[FileConfig, Path], None]
"""Has a file of the run, from the swarm if need be, at that path."""
FetchPieces = Callable[[FileConfig, Path, Collection[int]], Path]
"""The same of some pieces of it; returns where they lie, in a file of its length."""


@dataclass(frozen=True, slots=True)
class Share:
    """A part of the training text, for a peer that has no room for all of it."""

    share: float
    """From 0 to 1."""
    salt: bytes
    """Says which part it is."""
    fetch: FetchPieces


def obtain_text(
    home: Home, manifest: Manifest, given: Given | None, fetch: Fetch, told: Told, share: Share | None = None
) -> Text:
    """The text that a manifest names.

    Where text is private, training text is what `given` holds, or held when this home was given any last.

    Args:
        fetch: is called for a text of one's own, also where it lies in the home already.
        share: fetch a part of the training text alone, unless all of it is here. Nothing else has parts: not private
            text, nor what is shipped.

    Raises:
        DataError: nobody has it, or what was given is another text, or none was and it is private; or it is too short.
        HomeError: it cannot be written.
    """
    config, context = manifest.data, manifest.context
    if not config.private and given is not None:
        _check_given(home, config, given, told)
    file = config.token_file
    if share is not None and file is not None and not config.private and not home.tokens(file.root).exists():
        text = _part(home, config, file, share)
    else:
        text = _shared(home, config, fetch, train=not config.private)
    if config.private:
        text = text.with_train(_own(home, config, given, told, text.tokenizer()))
    if text.vocabulary > manifest.vocabulary:
        raise DataError(
            f"the model's vocabulary = {manifest.vocabulary} is below the tokenizer's {text.vocabulary:,} tokens",
            hint="make run.toml anew with p2ptrain init --data",
        )
    check_length(text.train, context)
    return text


def check_length(train: Part, context: int) -> None:
    """Refuse a text that is shorter than one sequence. Raises DataError."""
    if len(train.tokens) < context + 1:
        raise DataError(
            f"a text of {len(train.tokens):,} tokens has no sequence of context + 1 = {context + 1:,}",
            hint="use more text, or a shorter model.context",
        )


def held_text(home: Home, config: DataConfig) -> Text:
    """What is held out, as far as this home has it, and the tokenizer. Raises DataError."""

    def nowhere(file: FileConfig, path: Path) -> None:
        if not path.exists() or path.stat().st_size != file.bytes:
            raise DataError(f"home {home.path} has no copy of the run's text", hint="p2ptrain join ADDR fetches it")

    file = config.token_file
    if file is not None and not home.tokens(file.root).exists() and _partial(home, file).exists():
        return _opened(config, _partial(home, file))
    return _shared(home, config, nowhere, train=False)


def tokenizer_of(home: Home, config: DataConfig) -> TextTokenizer:
    """The tokenizer of a run, as far as this home has it. Raises DataError."""
    return shipped_tokenizer() if config.token_file is None else held_text(home, config).tokenizer()


def _shared(home: Home, config: DataConfig, fetch: Fetch, *, train: bool) -> Text:
    """What peers hand out, or have from the package, whose training text takes a while and may be left out."""
    file = config.token_file
    if file is None:
        check_embedded(config, load_embedded())
        return embedded_text(home.data, train=train)
    path = home.tokens(file.root)
    fetch(file, path)
    return _opened(config, path)


def _part(home: Home, config: DataConfig, file: FileConfig, share: Share) -> Text:
    """What is held out, the tokenizer, and a part of the training text."""
    path = home.tokens(file.root)
    header = TokenFile(share.fetch(file, path, {0})).header
    start, end = header.window(share.share, share.salt)
    pieces = {
        number
        for first, last in header.ranges(start, end)
        for number in range(first // PIECE_BYTES, -(-last // PIECE_BYTES))
    }
    text = _opened(config, share.fetch(file, path, pieces))
    return text.with_train(text.train.cut(start, end))


def _partial(home: Home, file: FileConfig) -> Path:
    return Partials(home.data).path_of_file(bytes.fromhex(file.root))


def _opened(config: DataConfig, path: Path) -> Text:
    found = TokenFile(path)
    if config.tokenizer_sha256 not in ("", found.header.tokenizer_sha256):
        raise DataError(f"{path} is of another tokenizer than the run's", hint=f"rm {path}   and start again")
    return text_of(found)


def _check_given(home: Home, config: DataConfig, given: Given, told: Told) -> None:
    """Make the run's token file from a copy of its text, unless this home has it."""
    file = config.token_file
    if file is None:
        raise DataError("the run trains on the text that is shipped with p2ptrain", hint="leave out --data")
    path = home.tokens(file.root)
    if path.exists() and path.stat().st_size == file.bytes:
        return
    made = home.unfinished_tokens
    try:
        if len(given.paths) == 1 and is_token_file(given.paths[0]):
            shutil.copyfile(given.paths[0], made)
        else:
            prepare(given, made, told, expected=config.tokenizer_sha256)
        found, pieces = hashed(made, lambda done, of: told.work("hashing tokens", done, of))
        if (found.length, found.root.hex()) != (file.bytes, file.root):
            raise DataError(
                f"the text here makes tokens that hash to {found.root.hex()[:16]}, those of the run ({config.name}) "
                f"hash to {file.root[:16]}",
                hint="give the same files in the same order, --field and --tokenizer as the owner; or leave out --data",
            )
        take(pieces, path)
    except OSError as error:
        raise cannot_write(home.data, error) from error
    finally:
        made.unlink(missing_ok=True)


def place(home: Home, told: Told) -> FileConfig:
    """Have the home's unfinished token file be one of a run; returns what the manifest says of it. Raises HomeError."""
    try:
        found, pieces = hashed(home.unfinished_tokens, lambda done, of: told.work("hashing tokens", done, of))
        take(pieces, home.tokens(found.root.hex()))
    except OSError as error:
        raise cannot_write(home.data, error) from error
    return FileConfig(bytes=found.length, root=found.root.hex())


def _own(home: Home, config: DataConfig, given: Given | None, told: Told, tokenizer: TextTokenizer) -> Part:
    """What this peer alone trains on, of the run's tokenizer."""
    if given is not None:
        prepare(given, home.own_tokens, told, tokenizer=tokenizer, holds_out=False)
    elif not home.own_tokens.exists():
        raise DataError(
            f"each peer of this run trains on text of its own, and home {home.path} has none",
            hint="again with --data PATH; it stays on this machine",
        )
    own = TokenFile(home.own_tokens)
    if own.header.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{home.own_tokens} is of another tokenizer than the run's", hint="give the text again with --data PATH"
        )
    return text_of(own).train
