"""The text of a run: the embedded corpus or an owner's files, known by hash.

A corpus travels between peers as xz of training and held-out text together, about 0.23 bytes a byte of English. Who
receives it never unpacks more than the manifest states, and uses nothing before both hashes match. A corpus is held in
memory whole: simple, and bound to texts well below the machine's memory.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from p2ptrain.config.manifest import DataConfig
from p2ptrain.data.licence import check_licence
from p2ptrain.data.tokenizer import check_tokenizer, tokenizer_sha256
from p2ptrain.errors import DataError

HELDOUT_SHARE = 0.02
MIN_BYTES = 10_000
UNPACK_MAX_BYTES = 2**30
"""Longest corpus taken from a stranger, unpacked."""
_XZ_MEMORY_BYTES = 256 * 2**20
_SEARCH_SHARE = 0.9  # the held-out part begins after this share of the text at the earliest


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training and held-out text, UTF-8."""

    name: str
    license: str
    train: bytes
    heldout: bytes

    def config(self, *, private: bool = False) -> DataConfig:
        """What a manifest says of this corpus, or of its held-out text alone."""
        return DataConfig(
            name=self.name,
            license=self.license,
            private=private,
            sha256="" if private else hashlib.sha256(self.train).hexdigest(),
            bytes=0 if private else len(self.train),
            heldout_sha256=hashlib.sha256(self.heldout).hexdigest(),
            heldout_bytes=len(self.heldout),
            tokenizer_sha256=tokenizer_sha256(),
        )


def load_embedded() -> Corpus:
    """The State of the Union addresses shipped with the package; those from 2020 on are held out."""
    folder = resources.files("p2ptrain.data") / "embedded"
    train, heldout = (lzma.decompress((folder / f"{part}.txt.xz").read_bytes()) for part in ("train", "heldout"))
    return Corpus("state-of-the-union", "LicenseRef-Public-Domain", train, heldout)


def load_files(paths: Sequence[Path], name: str, license: str) -> Corpus:
    """A corpus from text files and folders of `.txt` and `.md`: the last 2 %, from a paragraph on, are held out.

    The same files in the same order give the same corpus on every machine: folders are read in name order, line ends
    become `\\n`, and texts are stripped and joined by blank lines.

    Args:
        license: an SPDX expression, see `check_licence`.

    Raises:
        DataError: nothing to read, not UTF-8, too little text, or an unknown licence.
    """
    check_licence(license)
    files = _text_files(paths)
    texts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text: {error}", hint="convert it, or leave it out") from error
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}", hint="leave it out, or allow reading") from error
        if text:
            texts.append(text + "\n\n")
    whole = "".join(texts).encode()
    if len(whole) < MIN_BYTES:
        raise DataError(
            f"{len(whole)} bytes of text in {len(files)} files are too little; at least {MIN_BYTES} are needed",
            hint="give more text with --data",
        )
    cut = _heldout_start(whole)
    return Corpus(name, license, whole[:cut], whole[cut:])


def _text_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file()]
            files += sorted(found, key=lambda p: p.relative_to(path).as_posix())
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"no text at {path}", hint="give a text file, or a folder of .txt and .md files")
    return files


def _heldout_start(whole: bytes) -> int:
    """Where the last 2 % begin: at the paragraph before, else the line, else the character."""
    latest, earliest = int(len(whole) * (1 - HELDOUT_SHARE)), int(len(whole) * _SEARCH_SHARE)
    for mark in (b"\n\n", b"\n"):
        found = whole.rfind(mark, earliest, latest)
        if found >= 0:
            return found + len(mark)
    while whole[latest] & 0xC0 == 0x80:  # inside a character
        latest -= 1
    return latest


def pack(corpus: Corpus) -> bytes:
    """The corpus as it travels; `unpack` is the inverse."""
    return lzma.compress(corpus.train + corpus.heldout, preset=6)


def unpack(blob: bytes, config: DataConfig, *, max_bytes: int = UNPACK_MAX_BYTES) -> Corpus:
    """The corpus that `config` names, from `pack`'s bytes of anyone.

    Args:
        config: with lengths and hashes, as in a signed manifest.
        max_bytes: of text, whatever the manifest says.

    Raises:
        DataError: too long, not xz, or not that corpus. No more than the stated length is ever unpacked.
    """
    size = config.bytes + config.heldout_bytes
    if size > max_bytes:
        raise DataError(
            f"the run's text is {size:,} bytes long; at most {max_bytes:,} are fetched from a swarm",
            hint="get the text elsewhere and join with --data PATH",
        )
    try:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
        # One byte more than stated: a longer text is told from the right one without unpacking it.
        text = decompressor.decompress(blob, max_length=size + 1)
    except lzma.LZMAError as error:
        raise DataError(f"the data received cannot be unpacked: {error}", hint="fetch it from another peer") from error
    if len(text) != size:
        longer = "more than " if len(text) > size else ""
        raise DataError(
            f"the data received is {longer}{min(len(text), size):,} bytes long unpacked, not {size:,}",
            hint="fetch it from another peer",
        )
    corpus = Corpus(config.name, config.license, text[: config.bytes], text[config.bytes :])
    return check(corpus, config, hint="fetch it from another peer")


def check(corpus: Corpus, config: DataConfig, *, hint: str = "join without --data to fetch it") -> Corpus:
    """Return `corpus` under the run's name and licence if it is the one that `config` names, and can be trained on.

    An empty hash in `config` stands for that of the shipped corpus. Where text is private, only what is held out
    counts.

    Args:
        hint: what the user can do where it is another.

    Raises:
        DataError: it is another, or not text, or the run uses another tokenizer.
    """
    check_tokenizer(config.tokenizer_sha256)
    expected = config if config.sha256 or config.heldout_sha256 else load_embedded().config(private=config.private)
    found = corpus.config(private=config.private)
    if (found.sha256, found.heldout_sha256) != (expected.sha256, expected.heldout_sha256):
        part, ours, theirs = "training", found.sha256, expected.sha256
        if ours == theirs:
            part, ours, theirs = "held-out", found.heldout_sha256, expected.heldout_sha256
        raise DataError(
            f"the {part} text here hashes to {ours[:16]}, the run's ({config.name}) to {theirs[:16]}",
            hint=hint,
        )
    for text in (corpus.heldout,) if config.private else (corpus.train, corpus.heldout):
        try:
            empty = not text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"the run's text is not UTF-8: {error}", hint="it cannot be trained on") from error
        if empty:
            raise DataError("a part of the run's text is empty", hint="it cannot be trained on")
    return Corpus(config.name, config.license, corpus.train, corpus.heldout)
