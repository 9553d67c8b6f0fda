"""From documents to a token file, in bounded memory and one pass over the text.

Tokens go to disk as they come, but for those of documents that are drawn (`gathering.documents`): they wait, and are
the held-out part in the end. Of a long text only those with the smallest draws wait, 16 MiB of text, so they still come
from everywhere in it. A text of few or long documents has not the right share drawn; the last 2 % of it are held out,
from a boundary between pieces on. Memory: what waits, some MB of text and their tokens, 16 bytes a boundary, of which
there are some hundred and one for each 64 kB of text.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from p2ptrain.data.fitting import Fit
from p2ptrain.data.gathering import documents
from p2ptrain.data.reading import PASSAGE_CHARACTERS, Passage, place_to_cut
from p2ptrain.data.token_file import HEADER_BYTES, VOCABULARY_MAX, Header, TokenFile, token_bytes
from p2ptrain.data.tokenizer import TextTokenizer
from p2ptrain.errors import DataError
from p2ptrain.state.files import UNFINISHED_PREFIX

HELDOUT_SHARE = 0.02
DRAWN_SHARE = (0.01, 0.04)
"""The drawn documents are held out where they are this part of the text."""
HELDOUT_MAX_BYTES = 16 * 2**20
"""Of text: more would make an evaluation slow and no surer."""
HELDOUT_MAX_DOCUMENTS = 2**16
MIN_BYTES = 10_000
_BATCH_CHARACTERS = 1 << 20
_PIECE_MIN_CHARACTERS = 200
_PIECES = 256
"""A piece is at most this part of the text before it, so that there is a boundary near to any share of it."""
_COPIED_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Built:
    """A token file that was made."""

    header: Header
    fit: Fit


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens of a piece of text."""

    tokens: bytes
    count: int
    learned: bool
    text_bytes: int


class _Stream:
    """Tokens on their way to disk, and a byte for each that says whether it counts, once one of them does not."""

    def __init__(self, file: BinaryIO, mask: BinaryIO) -> None:
        self.file, self._mask = file, mask
        self.tokens = self.bytes = 0
        self.masked = False
        #: tokens and bytes of text before each boundary
        self._boundaries = array("Q"), array("Q")

    def write(self, piece: _Piece) -> None:
        """Append a piece; behind it is a boundary, of which few are kept."""
        if not piece.learned and not self.masked:
            self.masked = True
            for start in range(0, self.tokens, _COPIED_BYTES):
                self._mask.write(b"\1" * min(self.tokens - start, _COPIED_BYTES))
        if self.masked:
            self._mask.write((b"\1" if piece.learned else b"\0") * piece.count)
        self.file.write(piece.tokens)
        self.tokens += piece.count
        self.bytes += piece.text_bytes
        tokens, texts = self._boundaries
        if not texts or self.bytes - texts[-1] >= min(PASSAGE_CHARACTERS, self.bytes // (2 * _PIECES)):
            tokens.append(self.tokens)
            texts.append(self.bytes)

    def boundary(self, latest: int) -> tuple[int, int]:
        """(tokens, bytes of text) before the last boundary that is not after `latest` bytes."""
        tokens, texts = self._boundaries
        at = bisect_right(texts, latest) - 1
        return (tokens[at], texts[at]) if at >= 0 else (0, 0)

    def pack_mask(self, counts: tuple[int, ...]) -> None:
        """Append a bit for each token to the file, where one of them does not count; each part begins with a byte."""
        if not self.masked:
            return
        self._mask.flush()
        self._mask.seek(0)
        for left in counts:
            while left:
                block = self._mask.read(min(left, _COPIED_BYTES))
                self.file.write(np.packbits(np.frombuffer(block, np.uint8), bitorder="little").tobytes())
                left -= len(block)


class _Drawn:
    """Documents that wait to be held out: those with the smallest draws."""

    def __init__(self) -> None:
        #: heap of (minus the draw, order, pieces)
        self._waiting: list[tuple[int, int, list[_Piece]]] = []
        self._below, self._order = 2**64, 0
        self.bytes = 0

    def add(self, draw: int, document: list[_Piece]) -> Iterator[list[_Piece]]:
        """Have a document wait; yields those that give way, copies of one another together."""
        if draw >= self._below:
            yield document
            return
        heapq.heappush(self._waiting, (-draw, self._order, document))
        self._order += 1
        self.bytes += _text_bytes(document)
        while self.bytes > HELDOUT_MAX_BYTES or len(self._waiting) > HELDOUT_MAX_DOCUMENTS:
            self._below = -self._waiting[0][0]
            while self._waiting and -self._waiting[0][0] >= self._below:
                gone = heapq.heappop(self._waiting)[2]
                self.bytes -= _text_bytes(gone)
                yield gone

    def all(self) -> Iterator[list[_Piece]]:
        """Those that still wait, in the order in which they came."""
        for _, _, document in sorted(self._waiting, key=lambda entry: entry[1]):
            yield document


def _text_bytes(document: list[_Piece]) -> int:
    return sum(piece.text_bytes for piece in document)


class Builder:
    """See the module docstring.

    Args:
        path: of the file that is made; replaced in one step once it is whole.
        warn: hears once, early, where the tokenizer does not fit.
        holds_out: whether a part is held out.
        where: the text is, for people.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: TextTokenizer,
        warn: Callable[[str], None] = lambda text: None,
        *,
        holds_out: bool = True,
        where: str = "",
    ) -> None:
        self._where = f" in {where}" if where else ""
        self._path, self._tokenizer, self._warn, self._holds_out = path, tokenizer, warn, holds_out
        if tokenizer.vocabulary > VOCABULARY_MAX:
            raise DataError(
                f"the tokenizer has {tokenizer.vocabulary:,} tokens; at most {VOCABULARY_MAX:,} are supported",
                hint="give another with --tokenizer, or --tokenizer train:N",
            )
        self._kind: np.dtype[np.unsignedinteger] = np.dtype(f"<u{token_bytes(tokenizer.vocabulary)}")
        self._unknown = self._documents = self._characters = 0
        self._warned = False
        self._drawn = _Drawn()

    def build(self, passages: Iterable[Passage]) -> Built:
        """Make the file.

        Raises:
            DataError: there is too little text, or what `passages` raises.
            OSError: it cannot be written.
        """
        folder, tokenizer = self._path.parent, self._tokenizer
        with _unfinished(folder) as file, _unfinished(folder) as mask:
            header = Header(tokenizer.vocabulary, len(tokenizer.json), tokenizer.sha256, 0, 0, 0, 0, 0)
            file.write(bytes(HEADER_BYTES) + tokenizer.json)
            file.write(bytes(header.tokens_start - file.tell()))
            stream = _Stream(file, mask)
            for batch in _batches(documents(passages)):
                for draw, document in self._encode(batch):
                    for one in [document] if draw is None else self._drawn.add(draw, document):
                        self._write(one, stream)
                self._warn_once(stream)
            header = self._put_together(stream, header)
            file.seek(0)
            file.write(header.encode())
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, self._path)
            return Built(header, Fit(stream.bytes, stream.tokens, self._unknown))

    def _encode(self, batch: list[tuple[list[Passage], int | None]]) -> Iterator[tuple[int | None, list[_Piece]]]:
        """(draw, pieces) of each document, or part of one."""
        #: by whether the names of special tokens in them are these tokens
        texts: dict[bool, list[str]] = {False: [], True: []}
        counts: list[list[int]] = []
        for document, _ in batch:
            counts.append([])
            for passage in document:
                limit = max(_PIECE_MIN_CHARACTERS, min(PASSAGE_CHARACTERS, self._characters // _PIECES))
                pieces = list(_split(passage.text, limit))
                texts[passage.special] += pieces
                counts[-1].append(len(pieces))
                self._characters += len(passage.text)
        encoded = {
            special: zip(some, self._tokenizer.encode_all(some, special=special), strict=True)
            for special, some in texts.items()
        }
        for (document, draw), of_passages in zip(batch, counts, strict=True):
            made: list[_Piece] = []
            for passage, count in zip(document, of_passages, strict=True):
                for text, ids in itertools.islice(encoded[passage.special], count):
                    made.append(self._piece(ids, passage.learned, len(text.encode())))
            last = document[-1]
            if last.ends:
                end = self._piece(self._tokenizer.separator, last.learned, self._tokenizer.separator_bytes)
                before = made.pop()
                made.append(
                    _Piece(
                        before.tokens + end.tokens,
                        before.count + end.count,
                        last.learned,
                        before.text_bytes + end.text_bytes,
                    )
                )
                self._documents += 1
            yield draw, made

    def _piece(self, ids: list[int], learned: bool, text_bytes: int) -> _Piece:
        if self._tokenizer.unknown is not None:
            self._unknown += ids.count(self._tokenizer.unknown)
        return _Piece(np.asarray(ids, self._kind).tobytes(), len(ids), learned, text_bytes)

    def _write(self, document: list[_Piece], stream: _Stream) -> None:
        for piece in document:
            stream.write(piece)

    def _warn_once(self, stream: _Stream) -> None:
        if not self._warned and stream.bytes >= MIN_BYTES:
            self._warned = True
            if warning := Fit(stream.bytes, stream.tokens, self._unknown).warning:
                self._warn(warning)

    def _put_together(self, stream: _Stream, header: Header) -> Header:
        """The header of the whole, once what waits is written, too."""
        tokens, texts = stream.tokens, stream.bytes
        for document in self._drawn.all():
            self._write(document, stream)
        if stream.bytes < MIN_BYTES:
            raise DataError(
                f"{stream.bytes:,} bytes of text{self._where} are too little; at least {MIN_BYTES:,} are needed",
                hint="give more text with --data",
            )
        share = self._drawn.bytes / stream.bytes
        is_share = DRAWN_SHARE[0] <= share <= DRAWN_SHARE[1] or self._drawn.bytes > HELDOUT_MAX_BYTES // 2
        if not self._holds_out:
            tokens, texts = stream.tokens, stream.bytes
        elif not is_share:
            latest = stream.bytes - min(int(stream.bytes * HELDOUT_SHARE), HELDOUT_MAX_BYTES)
            tokens, texts = stream.boundary(latest)
        if self._holds_out and min(tokens, stream.tokens - tokens) < 2:
            raise DataError(
                f"a text of {stream.tokens:,} tokens has no part that could be held out",
                hint="give more text with --data",
            )
        heldout = stream.tokens - tokens
        stream.pack_mask((tokens, heldout))
        return replace(
            header,
            train_tokens=tokens,
            heldout_tokens=heldout,
            train_bytes=texts,
            heldout_bytes=stream.bytes - texts,
            documents=self._documents,
            masked=stream.masked,
        )


def write_part(source: TokenFile, path: Path, *, train: bool) -> None:
    """Write a token file that holds the training text alone, or the held-out text alone. Raises OSError."""
    header = source.header
    header = (
        replace(header, heldout_tokens=0, heldout_bytes=0) if train else replace(header, train_tokens=0, train_bytes=0)
    )
    tokens, mask = (source.train, source.train_mask) if train else (source.heldout, source.heldout_mask)
    with _unfinished(path.parent) as file:
        file.write(header.encode() + source.tokenizer_json())
        file.write(bytes(header.tokens_start - file.tell()))
        for array in (tokens, mask):
            for start in range(0, 0 if array is None else len(array), _COPIED_BYTES):
                file.write(array[start : start + _COPIED_BYTES].tobytes())  # type: ignore[index]
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)


def _split(text: str, limit: int) -> Iterator[str]:
    """A passage in pieces; nothing of it is lost."""
    while len(text) > limit:
        end = place_to_cut(text, limit)
        yield text[:end]
        text = text[end:]
    yield text


def _batches(found: Iterator[tuple[list[Passage], int | None]]) -> Iterator[list[tuple[list[Passage], int | None]]]:
    batch, characters = [], 0
    for document, draw in found:
        batch.append((document, draw))
        characters += sum(len(passage.text) for passage in document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[BinaryIO]:
    """A file that is gone afterwards, unless it was given another name."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=UNFINISHED_PREFIX, delete=False) as file:
        try:
            yield file  # type: ignore[misc]
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
