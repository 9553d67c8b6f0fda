"""What a peer trains and evaluates on: tokens of the training text and of the held-out text, and their tokenizer."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2ptrain.config.manifest import TOKENIZER_VOCABULARY
from p2ptrain.data.corpus import load_embedded
from p2ptrain.data.token_file import TokenFile
from p2ptrain.data.tokenizer import TextTokenizer, cached_tokens, shipped_tokenizer

Mask = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Part:
    """Training or held-out text."""

    tokens: NDArray[Any]
    """[tokens], uint16 or uint32."""
    bytes: int = 0
    """Of the text, UTF-8."""
    mask: Mask | None = None
    """A bit for each token, least significant first: whether it counts in the loss; None: all do."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token stands for on average."""
        return self.bytes / max(len(self.tokens), 1)

    def cut(self, start: int, end: int) -> Part:
        """Tokens [start, end) of it, the first at a multiple of eight."""
        mask = None if self.mask is None else self.mask[start // 8 : -(-end // 8)]
        return Part(self.tokens[start:end], self.bytes * (end - start) // max(len(self.tokens), 1), mask)

    def batch(self, offsets: list[int], length: int) -> NDArray[np.int64]:
        """The `length` tokens from each offset on [offsets, length]."""
        return np.stack([self.tokens[offset : offset + length] for offset in offsets]).astype(np.int64)

    def let_go(self) -> None:
        """Give back the memory of what was read through a mapping; it stays in the system's cache of files.

        Pages that were read once stay with a process until memory is short, and would come to be the whole text.
        """
        for array in (self.tokens, self.mask):
            mapped = getattr(array, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def counted(self, offsets: list[int], length: int) -> NDArray[np.bool_] | None:
        """Which tokens of such a batch count in the loss [offsets, length]; None: all do."""
        if self.mask is None:
            return None
        places = np.asarray(offsets)[:, None] + np.arange(length)
        return (self.mask[places >> 3] >> (places & 7) & 1).astype(bool)


_NOTHING = Part(np.zeros(0, np.uint16))


@dataclass(frozen=True, slots=True)
class Text:
    """See the module docstring."""

    train: Part
    heldout: Part
    tokenizer: Callable[[], TextTokenizer]
    """Loaded only where it is needed: it may come from a stranger."""
    vocabulary: int
    """Its tokens are below this."""

    def with_train(self, train: Part) -> Text:
        """The same held-out text beside other training text."""
        return replace(self, train=train)


def embedded_text(folder: Path, *, train: bool = True) -> Text:
    """The shipped corpus, or what is held out of it alone; its tokens are kept in `folder`."""
    corpus = load_embedded()
    parts = (Part(cached_tokens(text, folder), len(text)) for text in (corpus.train, corpus.heldout)[not train :])
    return Text(next(parts) if train else _NOTHING, next(parts), shipped_tokenizer, TOKENIZER_VOCABULARY)


def text_of(file: TokenFile) -> Text:
    """The text in a token file."""
    header = file.header
    return Text(
        Part(file.train, header.train_bytes, file.train_mask),
        Part(file.heldout, header.heldout_bytes, file.heldout_mask),
        lambda: file.tokenizer,
        header.vocabulary,
    )
