"""From the paths that a person gives to a token file: list, choose a tokenizer, read, build, say what was done."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from p2ptrain.data.building import Builder, Built
from p2ptrain.data.conversations import chat_of
from p2ptrain.data.gathering import Gathered, gather
from p2ptrain.data.listing import Listing, list_files
from p2ptrain.data.reading import Wanted
from p2ptrain.data.tokenizer import (
    TRAINED_TEXT_BYTES,
    TextTokenizer,
    read_tokenizer,
    shipped_tokenizer,
    train_tokenizer,
)
from p2ptrain.errors import DataError, HomeError


@dataclass(frozen=True, slots=True)
class Given:
    """What a person says of a text."""

    paths: tuple[Path, ...]
    field: str | None = None
    """The field with the text, where files hold records."""
    tokenizer: str | None = None
    """A path, or `train:N`; None: the shipped one."""


class Told(Protocol):
    """What hears of the work. Any thread, one at a time."""

    def work(self, what: str, done: int, total: int) -> None:
        """Progress of something that takes a while, in bytes."""

    def say(self, text: str) -> None:
        """A line for people."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A text as tokens."""

    built: Built
    gathered: Gathered
    tokenizer: TextTokenizer


@dataclass(slots=True)
class _Reading:
    """How far the files of a listing are read, which may be done twice."""

    listing: Listing
    told: Told
    what: str = "reading text"
    _done: int = field(default=0)

    def advance(self, count: int) -> None:
        self._done += count
        total = sum(file.bytes for file in self.listing.files)
        self.told.work(self.what, self._done, max(total, self._done))


def prepare(
    given: Given,
    path: Path,
    told: Told,
    *,
    expected: str = "",
    tokenizer: TextTokenizer | None = None,
    holds_out: bool = True,
) -> Prepared:
    """Make a token file at `path` of what was given.

    Args:
        expected: hash of the tokenizer that it has to be; empty: any.
        tokenizer: in place of the one given.
        holds_out: whether a part of the text is held out.

    Raises:
        DataError: nothing can be read, there is too little text, or the tokenizer is another.
        HomeError: the file cannot be written.
    """
    listing = list_files(given.paths)
    told.say(str(listing))
    wanted = Wanted(given.field)
    tokenizer = tokenizer or _tokenizer(given, listing, wanted, told)
    if expected not in ("", tokenizer.sha256):
        raise DataError(
            f"the run's tokenizer hashes to {expected[:16]}, this one to {tokenizer.sha256[:16]}",
            hint="--tokenizer with the one that the run was made with, or leave out --data",
        )
    wanted = Wanted(given.field, chat_of(tokenizer))
    gathered = Gathered()
    passages = gather(listing, wanted, gathered, _Reading(listing, told).advance)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        where = ", ".join(map(str, given.paths[:3])) + (", ..." if len(given.paths) > 3 else "")
        builder = Builder(path, tokenizer, lambda text: told.say(f"warning: {text}"), holds_out=holds_out, where=where)
        built = builder.build(passages)
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    for line in gathered.lines():
        told.say(line)
    told.say(str(built.fit))
    return Prepared(built, gathered, tokenizer)


def cannot_write(folder: Path, error: OSError) -> HomeError:
    """What to say where tokens cannot be written."""
    return HomeError(
        f"cannot write the text as tokens to {folder}: {error.strerror or error}",
        hint="make room, or choose another home with --home DIR",
    )


def _tokenizer(given: Given, listing: Listing, wanted: Wanted, told: Told) -> TextTokenizer:
    if given.tokenizer is None:
        return shipped_tokenizer()
    if not given.tokenizer.startswith("train:"):
        return read_tokenizer(Path(given.tokenizer).expanduser())
    size = re.fullmatch(r"train:(\d{1,7})", given.tokenizer)
    if size is None:
        raise DataError(f"--tokenizer {given.tokenizer}: not a number of tokens", hint="--tokenizer train:8192")
    if any(file.is_pipe for file in listing.files):
        raise DataError(
            "a tokenizer is trained on the text before the text is read, and a pipe can be read only once",
            hint="write it to a file first, or train a tokenizer on a part of it",
        )
    told.say("training a tokenizer, which may take a minute")
    tokenizer = train_tokenizer(_sample(listing, wanted, told), int(size[1]))
    told.say(f"trained a tokenizer of {tokenizer.vocabulary:,} tokens")
    return tokenizer


def _sample(listing: Listing, wanted: Wanted, told: Told) -> Iterator[str]:
    """The beginning of each file, as much as a tokenizer is trained on in all."""
    share = max(TRAINED_TEXT_BYTES // len(listing.files), 1)
    done = 0
    for file in listing.files:
        left = share
        passages = gather(Listing((file,), ()), wanted, Gathered())
        for passage in passages:
            yield passage.text
            size = len(passage.text.encode())
            left, done = left - size, done + size
            told.work("reading text for the tokenizer", done, max(TRAINED_TEXT_BYTES, done))
            if left <= 0:
                break
