"""From documents to a token file, in bounded memory and one pass over the text.

Tokens go to disk as they come. Documents that are drawn to be held out (`gathering.documents`) go to a file beside it and are
put last; then the last 2 % of all, but no more than 16 MiB of text, become the held-out part, from a boundary between
pieces on. Memory: some MB of text and their tokens, 16 bytes a boundary, of which there are at most some hundred and one
for each 64 kB of text.
"""

from __future__ import annotations

import contextlib
import os
import shutil
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
from p2ptrain.data.token_file import ALIGNMENT, HEADER_BYTES, VOCABULARY_MAX, Header, token_bytes
from p2ptrain.data.tokenizer import TextTokenizer
from p2ptrain.errors import DataError

HELDOUT_SHARE = 0.02
HELDOUT_MAX_BYTES = 16 * 2**20
"""Of text: more would make an evaluation slow and no surer."""
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


class _Stream:
    """Tokens on their way to disk, and a byte for each that says whether it counts, once one of them does not."""

    def __init__(self, files: tuple[BinaryIO, BinaryIO], kind: np.dtype[np.unsignedinteger]) -> None:
        self.file, self._mask, self._kind = *files, kind
        self.tokens = self.bytes = 0
        self._masked = 0
        #: tokens and bytes of text before each boundary
        self._boundaries = array("Q"), array("Q")

    def write(self, ids: list[int], learned: bool, text_bytes: int) -> None:
        """Append the tokens of some bytes of text."""
        if not learned:
            self.fill_mask()
        if self._masked == self.tokens and (self._masked or not learned):
            self._mask.write((b"\1" if learned else b"\0") * len(ids))
            self._masked += len(ids)
        self.file.write(np.asarray(ids, self._kind).tobytes())
        self.tokens += len(ids)
        self.bytes += text_bytes

    def mark(self) -> None:
        """Here is a boundary; few are kept."""
        tokens, texts = self._boundaries
        if not texts or self.bytes - texts[-1] >= min(PASSAGE_CHARACTERS, self.bytes // (2 * _PIECES)):
            tokens.append(self.tokens)
            texts.append(self.bytes)

    def boundary(self, latest: int) -> tuple[int, int]:
        """(tokens, bytes of text) before the last boundary that is not after `latest` bytes."""
        tokens, texts = self._boundaries
        at = bisect_right(texts, latest) - 1
        return (tokens[at], texts[at]) if at >= 0 else (0, 0)

    def fill_mask(self) -> BinaryIO:
        """Write that all tokens count for which nothing was said yet."""
        while self._masked < self.tokens:
            count = min(self.tokens - self._masked, _COPIED_BYTES)
            self._mask.write(b"\1" * count)
            self._masked += count
        return self._mask


class Builder:
    """See the module docstring.

    Args:
        path: of the file that is made; replaced in one step once it is whole.
        warn: hears once, early, where the tokenizer does not fit.
    """

    def __init__(self, path: Path, tokenizer: TextTokenizer, warn: Callable[[str], None] = lambda text: None) -> None:
        self._path, self._tokenizer, self._warn = path, tokenizer, warn
        if tokenizer.vocabulary > VOCABULARY_MAX:
            raise DataError(
                f"the tokenizer has {tokenizer.vocabulary:,} tokens; at most {VOCABULARY_MAX:,} are supported",
                hint="give another with --tokenizer, or --tokenizer train:N",
            )
        self._kind: np.dtype[np.unsignedinteger] = np.dtype(f"<u{token_bytes(tokenizer.vocabulary)}")
        self._unknown = self._documents = self._characters = 0
        self._masked = self._warned = False

    def build(self, passages: Iterable[Passage]) -> Built:
        """Make the file.

        Raises:
            DataError: there is too little text, or what `passages` raises.
            OSError: it cannot be written.
        """
        with contextlib.ExitStack() as stack:
            here = self._path.parent
            whole, mask, drawn, drawn_mask = (stack.enter_context(_unfinished(here)) for _ in range(4))
            tokenizer = self._tokenizer
            header = Header(tokenizer.vocabulary, len(tokenizer.json), tokenizer.sha256, 0, 0, 0, 0, 0)
            whole.write(bytes(HEADER_BYTES) + tokenizer.json)
            whole.write(bytes(header.tokens_start - whole.tell()))
            streams = _Stream((whole, mask), self._kind), _Stream((drawn, drawn_mask), self._kind)
            for batch in _batches(documents(iter(passages))):
                self._encode(batch, streams)
            header = self._put_together(streams, header)
            whole.seek(0)
            whole.write(header.encode())
            whole.flush()
            os.fsync(whole.fileno())
            os.replace(whole.name, self._path)
            text_bytes, tokens = (sum(getattr(stream, name) for stream in streams) for name in ("bytes", "tokens"))
            return Built(header, Fit(text_bytes, tokens, self._unknown))

    def _encode(self, batch: list[tuple[list[Passage], bool]], streams: tuple[_Stream, _Stream]) -> None:
        pieces: list[tuple[str, Passage, bool, bool]] = []
        for document, drawn in batch:
            for passage in document:
                limit = max(_PIECE_MIN_CHARACTERS, min(PASSAGE_CHARACTERS, self._characters // _PIECES))
                texts = list(_split(passage.text, limit))
                for number, text in enumerate(texts):
                    ends = passage.ends and number == len(texts) - 1
                    pieces.append((text, passage, drawn, ends))
                    self._characters += len(text)
        separator = self._tokenizer.separator
        for (text, passage, drawn, ends), ids in zip(
            pieces, self._tokenizer.encode_all([piece[0] for piece in pieces]), strict=True
        ):
            stream = streams[drawn]
            if self._tokenizer.unknown is not None:
                self._unknown += ids.count(self._tokenizer.unknown)
            stream.write(ids, passage.learned, len(text.encode()))
            self._masked = self._masked or not passage.learned
            if ends:
                stream.write(separator, passage.learned, self._tokenizer.separator_bytes)
                self._documents += 1
            stream.mark()
        text_bytes = sum(stream.bytes for stream in streams)
        if not self._warned and text_bytes >= MIN_BYTES:
            self._warned = True
            if warning := Fit(text_bytes, sum(stream.tokens for stream in streams), self._unknown).warning:
                self._warn(warning)

    def _put_together(self, streams: tuple[_Stream, _Stream], header: Header) -> Header:
        first, drawn = streams
        all_bytes, all_tokens = first.bytes + drawn.bytes, first.tokens + drawn.tokens
        if all_bytes < MIN_BYTES:
            raise DataError(
                f"{all_bytes:,} bytes of text are too little; at least {MIN_BYTES:,} are needed",
                hint="give more text with --data",
            )
        latest = all_bytes - min(int(all_bytes * HELDOUT_SHARE), HELDOUT_MAX_BYTES)
        tokens, texts = first.boundary(latest)
        if latest > first.bytes:
            behind = drawn.boundary(latest - first.bytes)
            tokens, texts = first.tokens + behind[0], first.bytes + behind[1]
        if min(tokens, all_tokens - tokens) < 2:
            raise DataError(
                f"a text of {all_tokens:,} tokens has no part that could be held out", hint="give more text with --data"
            )
        made = replace(
            header,
            train_tokens=tokens,
            heldout_tokens=all_tokens - tokens,
            train_bytes=texts,
            heldout_bytes=all_bytes - texts,
            documents=self._documents,
            masked=self._masked,
        )
        _append(drawn.file, first.file)
        if self._masked:
            mask = first.fill_mask()
            _append(drawn.fill_mask(), mask)
            _pack_bits(mask, first.file, (made.train_tokens, made.heldout_tokens))
        return made


def _split(text: str, limit: int) -> Iterator[str]:
    """A passage in pieces; nothing of it is lost."""
    while len(text) > limit:
        end = place_to_cut(text, limit)
        yield text[:end]
        text = text[end:]
    yield text


def _batches(found: Iterator[tuple[list[Passage], bool]]) -> Iterator[list[tuple[list[Passage], bool]]]:
    batch, characters = [], 0
    for document, drawn in found:
        batch.append((document, drawn))
        characters += sum(len(passage.text) for passage in document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[BinaryIO]:
    """A file that is gone afterwards, unless it was given another name."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-", delete=False) as file:
        try:
            yield file  # type: ignore[misc]
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)


def _append(source: BinaryIO, to: BinaryIO) -> None:
    source.flush()
    source.seek(0)
    shutil.copyfileobj(source, to, _COPIED_BYTES)


def _pack_bits(masks: BinaryIO, to: BinaryIO, counts: tuple[int, ...]) -> None:
    """A byte for each token to a bit for each, every part of them beginning with a whole byte."""
    masks.flush()
    masks.seek(0)
    for left in counts:
        while left:
            block = masks.read(min(left, _COPIED_BYTES))
            to.write(np.packbits(np.frombuffer(block, np.uint8), bitorder="little").tobytes())
            left -= len(block)
