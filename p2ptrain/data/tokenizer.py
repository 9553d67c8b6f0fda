"""Text to tokens and back: the byte-level BPE that ships with the package, and tokens kept on disk.

Every run uses this tokenizer, whatever its text: one thing fewer to fetch and to trust from a stranger. The price is
more tokens a byte on text unlike the one it was trained on. Any text survives the round trip, as all bytes are tokens.
Tokens are made once and kept as a uint16 array, 2 bytes a token.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from p2ptrain.errors import DataError
from p2ptrain.state.files import atomic_write

_PIECE_CHARACTERS = 100_000  # tokenised at a time; cuts are at paragraphs where there are any


def _shipped() -> bytes:
    return (resources.files("p2ptrain.data") / "embedded" / "tokenizer.json").read_bytes()


@functools.cache
def tokenizer_sha256() -> str:
    """Hash of the tokenizer shipped, in hex."""
    return hashlib.sha256(_shipped()).hexdigest()


@functools.cache
def load_tokenizer() -> Tokenizer:
    """The shipped byte-level BPE with 4096 tokens."""
    return Tokenizer.from_buffer(_shipped())


def check_tokenizer(expected_sha256: str) -> None:
    """Accept the hash of a run's tokenizer if it is the shipped one's, or empty.

    Raises:
        DataError: the run was made with another tokenizer.
    """
    if expected_sha256 not in ("", tokenizer_sha256()):
        raise DataError(
            f"the run's tokenizer hashes to {expected_sha256[:16]}, the one shipped here to {tokenizer_sha256()[:16]}",
            hint="install the p2ptrain version that the run was made with",
        )


def encode(text: str) -> list[int]:
    """Tokens of a short text."""
    return load_tokenizer().encode(text, add_special_tokens=False).ids


def decode(tokens: Sequence[int]) -> str:
    """Text of tokens; bytes that are not UTF-8, and numbers that are no token, become replacement marks or nothing."""
    return load_tokenizer().decode(tokens, skip_special_tokens=False)


def tokenise(text: bytes) -> NDArray[np.uint16]:
    """Tokens of a corpus [tokens]; a pure function of the text.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        whole = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the run's text is not UTF-8: {error}", hint="it cannot be trained on") from error
    pieces, start = [], 0
    while start < len(whole):
        end = whole.rfind("\n\n", start + 1, start + _PIECE_CHARACTERS)
        end = end + 2 if end > start else min(start + _PIECE_CHARACTERS, len(whole))
        pieces.append(whole[start:end])
        start = end
    encoded = load_tokenizer().encode_batch_fast(pieces, add_special_tokens=False)
    return np.concatenate([np.zeros(0, np.uint16), *(np.asarray(one.ids, np.uint16) for one in encoded)])


def cached_tokens(text: bytes, folder: Path) -> NDArray[np.uint16]:
    """`tokenise`, kept in `folder` under the hash of text and tokenizer; memory-mapped, read-only.

    A file left there by a process that was killed is never half of one.

    Raises:
        DataError: the text is not UTF-8, or empty.
    """
    if not text:
        raise DataError("the run's text is empty", hint="it cannot be trained on")
    key = hashlib.sha256(tokenizer_sha256().encode() + text).hexdigest()[:32]
    path = folder / f"tokens-{key}.u16"
    if not path.exists():
        atomic_write(path, tokenise(text).astype("<u2").tobytes())
    return np.memmap(path, "<u2", "r")
