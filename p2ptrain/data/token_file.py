"""A run's text as tokens, in one file that is read by memory map, handed out in pieces, and known by its hash.

First a block of fixed length with what is in it, then the tokenizer's JSON, then the tokens of the training text, those
of the held-out text, and, where not all of them count in the loss, a bit for each. A token has two bytes, or four where
the vocabulary is larger than 65,536. Where text is private, the file that is handed out has no training text, and each
peer's own has no held-out text.

The file may come from a stranger: lengths must add up to its own before anything is mapped, and a number that is no
token is refused when it is read for a batch.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2ptrain.config.manifest import VOCABULARY_MAX
from p2ptrain.data.tokenizer import TOKENIZER_MAX_BYTES, TextTokenizer
from p2ptrain.errors import DataError

_MAGIC = b"p2ptrain tokens\x01"
_FIELDS = struct.Struct("<16sIIIIQQQQQQ32s")
HEADER_BYTES = 256
ALIGNMENT = 4096
_MASKED = 1


@dataclass(frozen=True, slots=True)
class Header:
    """What a token file holds."""

    vocabulary: int
    """Tokens are below this."""
    tokenizer_bytes: int
    tokenizer_sha256: str
    train_tokens: int
    heldout_tokens: int
    train_bytes: int
    """Of the training text, UTF-8."""
    heldout_bytes: int
    documents: int
    masked: bool = False
    """There is a bit for each token: whether it counts in the loss."""

    @property
    def token_bytes(self) -> int:
        """Bytes of a token."""
        return token_bytes(self.vocabulary)

    @property
    def tokens_start(self) -> int:
        """Where the tokens begin."""
        return -(-(HEADER_BYTES + self.tokenizer_bytes) // ALIGNMENT) * ALIGNMENT

    @property
    def mask_start(self) -> int:
        """Where the bits begin, where there are any."""
        return self.tokens_start + (self.train_tokens + self.heldout_tokens) * self.token_bytes

    @property
    def length(self) -> int:
        """Bytes of the whole file."""
        bits = -(-self.train_tokens // 8) + -(-self.heldout_tokens // 8) if self.masked else 0
        return self.mask_start + bits

    def window(self, share: float, salt: bytes) -> tuple[int, int]:
        """The training tokens [start, end) of a peer that holds a share of them; `salt` says where they are."""
        count = min(self.train_tokens, -(-int(self.train_tokens * share) // 8) * 8)
        # From a whole byte of the bits on.
        places = (self.train_tokens - count) // 8 + 1
        digest = hashlib.sha256(b"p2ptrain part 1\0" + salt).digest()
        start = int.from_bytes(digest[:16], "little") % places * 8
        return start, start + count

    def ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Bytes [from, to) of the file that belong to training tokens [start, end) and to all that is held out."""
        yield 0, self.tokens_start
        yield self.tokens_start + start * self.token_bytes, self.tokens_start + end * self.token_bytes
        yield self.tokens_start + self.train_tokens * self.token_bytes, self.mask_start
        if self.masked:
            yield self.mask_start + start // 8, self.mask_start + -(-end // 8)
            yield self.mask_start + -(-self.train_tokens // 8), self.length

    def encode(self) -> bytes:
        """The block that the file begins with [HEADER_BYTES]."""
        return _FIELDS.pack(
            _MAGIC,
            self.token_bytes,
            _MASKED if self.masked else 0,
            self.vocabulary,
            0,
            self.tokenizer_bytes,
            self.train_tokens,
            self.heldout_tokens,
            self.train_bytes,
            self.heldout_bytes,
            self.documents,
            bytes.fromhex(self.tokenizer_sha256),
        ).ljust(HEADER_BYTES, b"\0")


def token_bytes(vocabulary: int) -> int:
    """Bytes of a token of such a vocabulary."""
    return 2 if vocabulary <= 2**16 else 4


def decode_header(block: bytes, file_bytes: int) -> Header:
    """The header of a file of `file_bytes` bytes.

    Raises:
        DataError: it is no token file, or its lengths do not add up.
    """
    hint = "build it anew from the text: --data PATH"
    if len(block) < HEADER_BYTES or not block.startswith(_MAGIC):
        raise DataError("this is no token file of p2ptrain", hint=hint)
    _, each, flags, vocabulary, zero, of_tokenizer, *counts, sha256 = _FIELDS.unpack_from(block)
    train, heldout, train_bytes, heldout_bytes, documents = counts
    header = Header(
        vocabulary,
        of_tokenizer,
        sha256.hex(),
        train,
        heldout,
        train_bytes,
        heldout_bytes,
        documents,
        masked=bool(flags & _MASKED),
    )
    sound = (
        1 <= vocabulary <= VOCABULARY_MAX
        and of_tokenizer <= TOKENIZER_MAX_BYTES
        and max(counts) < 2**48
        and each == header.token_bytes
        and not zero
        and not flags & ~_MASKED
    )
    if not sound or header.encode() != block[:HEADER_BYTES] or header.length != file_bytes:
        raise DataError("this token file is damaged: its lengths do not add up", hint=hint)
    return header


def is_token_file(path: Path) -> bool:
    """Whether a file begins like one."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


class TokenFile:
    """A token file, memory-mapped, read-only.

    Raises:
        DataError: it cannot be read, or is no token file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                block = file.read(HEADER_BYTES)
            self.header = decode_header(block, path.stat().st_size)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}", hint="give the text again: --data PATH") from error
        except DataError as error:
            raise DataError(f"{path}: {error}", hint=error.hint) from error

    def tokenizer_json(self) -> bytes:
        """The tokenizer that the tokens are of, as the tokenizers library writes it. Raises DataError."""
        with self.path.open("rb") as file:
            file.seek(HEADER_BYTES)
            json = file.read(self.header.tokenizer_bytes)
        if hashlib.sha256(json).hexdigest() != self.header.tokenizer_sha256:
            raise DataError(f"the tokenizer in {self.path} is damaged", hint="give the text again: --data PATH")
        return json

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """That tokenizer, loaded. Raises DataError."""
        return TextTokenizer(self.tokenizer_json())

    @property
    def train(self) -> NDArray[Any]:
        """Tokens of the training text [train_tokens]."""
        return self._tokens(0, self.header.train_tokens)

    @property
    def heldout(self) -> NDArray[Any]:
        """Tokens of the held-out text [heldout_tokens]."""
        return self._tokens(self.header.train_tokens, self.header.heldout_tokens)

    @property
    def train_mask(self) -> NDArray[np.uint8] | None:
        """A bit for each training token, least significant first; None: all count."""
        return self._mask(self.header.mask_start, self.header.train_tokens)

    @property
    def heldout_mask(self) -> NDArray[np.uint8] | None:
        """The same of the held-out tokens."""
        return self._mask(self.header.mask_start + -(-self.header.train_tokens // 8), self.header.heldout_tokens)

    def _tokens(self, first: int, count: int) -> NDArray[Any]:
        kind = np.dtype(f"<u{self.header.token_bytes}")
        if not count:
            return np.zeros(0, kind)
        return np.memmap(self.path, kind, "r", self.header.tokens_start + first * kind.itemsize, (count,))

    def _mask(self, start: int, bits: int) -> NDArray[np.uint8] | None:
        if not self.header.masked:
            return None
        return np.memmap(self.path, np.uint8, "r", start, (-(-bits // 8),)) if bits else np.zeros(0, np.uint8)
