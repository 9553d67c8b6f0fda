"""Text to tokens and back: the byte-level BPE that ships with the package, any other as `tokenizers` writes it, or one
that is trained on the text.

With the shipped one, and those trained here, any text survives the round trip, as all bytes are tokens. Its corpus is
tokenised once and kept as a uint16 array, 2 bytes a token. A tokenizer may come from a stranger: its length is bounded,
its kind is one of those known, and what makes its tokens depend on chance is switched off.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from p2ptrain.config.manifest import Manifest
from p2ptrain.errors import DataError
from p2ptrain.state.files import atomic_write

_PIECES_AT_ONCE = 2
_PIECE_CHARACTERS = 100_000  # tokenised at a time; cuts are at paragraphs where there are any


def _shipped() -> bytes:
    return (resources.files("p2ptrain.data") / "embedded" / "tokenizer.json").read_bytes()


@functools.cache
def tokenizer_sha256() -> str:
    """Hash of the tokenizer shipped, in hex."""
    return hashlib.sha256(_shipped()).hexdigest()


def tokenizer_of_run(manifest: Manifest) -> str:
    """Hash of the tokenizer that a run's text is in, in hex; empty where a run trains no text that is known here."""
    return "" if manifest.own_model is not None else manifest.data.tokenizer_sha256 or tokenizer_sha256()


@functools.cache
def load_tokenizer() -> Tokenizer:
    """The shipped byte-level BPE with 4096 tokens."""
    return Tokenizer.from_buffer(_shipped())


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
    tokens, tokenizer = [np.zeros(0, np.uint16)], load_tokenizer()
    for first in range(0, len(pieces), _PIECES_AT_ONCE):
        # What the library returns of a piece takes a hundred times the memory of its tokens.
        encoded = tokenizer.encode_batch_fast(pieces[first : first + _PIECES_AT_ONCE], add_special_tokens=False)
        tokens += [np.asarray(one.ids, np.uint16) for one in encoded]
    return np.concatenate(tokens)


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


# ---- any tokenizer ------------------------------------------------------------------------------------------------

TOKENIZER_MAX_BYTES = 48 * 2**20
TRAINED_MIN, TRAINED_MAX = 257, 2**18
TRAINED_TEXT_BYTES = 64 * 2**20
"""A tokenizer is trained on no more text than this."""
_TRAINING_PIECE_CHARACTERS = 4096
_MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "[SEP]",
)
"""Special tokens that stand between two documents, where a tokenizer has one."""
BEGINS = ("<|begin_of_text|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<s>", "<bos>", "[CLS]")


class _Model(msgspec.Struct, frozen=True):
    type: str = "BPE"


class _Json(msgspec.Struct, frozen=True):
    model: _Model


class TextTokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
        json: as that library writes it.
        chat_template: makes messages to text, in Jinja.

    Raises:
        DataError: it is none, too large, or cannot be loaded.
    """

    def __init__(self, json: bytes, chat_template: str = "") -> None:
        self.json, self.chat_template = json, chat_template
        self.sha256 = hashlib.sha256(json).hexdigest()
        self._tokenizer = _load(json)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError("the tokenizer has no tokens", hint="give another with --tokenizer")
        self.vocabulary = max(vocabulary.values()) + 1
        #: the names of the special tokens around a text; empty: there is none
        self.end_of_text = next((name for name in ENDS if name in vocabulary), "")
        self.begin_of_text = next((name for name in BEGINS if name in vocabulary), "")
        end = vocabulary.get(self.end_of_text)
        #: their numbers
        self.end_token, self.begin_token = end, vocabulary.get(self.begin_of_text)
        #: between two documents
        self.separator: list[int] = self.encode("\n\n") if end is None else [end]
        #: bytes of text that this is
        self.separator_bytes = 2 if end is None and self.separator else 0
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        #: the token of what it does not know; None: there is none
        self.unknown = vocabulary.get(unknown) if isinstance(unknown, str) else None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of a text; names of special tokens in it are text, unless `special`."""
        return next(self.encode_all([text], special=special))

    def encode_all(self, texts: Sequence[str], *, special: bool = False) -> Iterator[list[int]]:
        """Tokens of each of some texts, all cores at work.

        Raises:
            DataError: the tokenizer fails at them.
        """
        if not texts:
            return iter(())
        self._tokenizer.encode_special_tokens = not special
        try:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            raise _tokenizer_error(error) from error
        return (one.ids for one in encoded)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; numbers that are no token become nothing."""
        known = [int(token) for token in tokens if token < self.vocabulary]
        try:
            return str(self._tokenizer.decode(known, skip_special_tokens=False))
        except BaseException as error:
            raise _tokenizer_error(error) from error

    def plain(self) -> Tokenizer:
        """Return one of the library's own that gives the tokens of `encode_all`, with nothing before or after a text.

        Names of special tokens in a text are these tokens.
        """
        tokenizer = _load(self.json)
        tokenizer.post_processor = None
        return tokenizer


@functools.cache
def shipped_tokenizer() -> TextTokenizer:
    """The tokenizer that the package comes with."""
    return TextTokenizer(_shipped())


def _load(json: bytes) -> Tokenizer:
    hint = "give a tokenizer.json as the tokenizers library writes it"
    if len(json) > TOKENIZER_MAX_BYTES:
        raise DataError(
            f"the tokenizer takes {len(json):,} bytes; at most {TOKENIZER_MAX_BYTES:,} are loaded", hint=hint
        )
    try:
        kind = msgspec.json.decode(json, type=_Json).model.type
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"this is no tokenizer: {error}", hint=hint) from error
    if kind not in _MODELS:
        raise DataError(f"a tokenizer of kind {kind[:40]!r} is not known; known are {', '.join(_MODELS)}", hint=hint)
    try:
        tokenizer = Tokenizer.from_buffer(json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
    except BaseException as error:
        raise _tokenizer_error(error) from error
    return tokenizer


def _tokenizer_error(error: BaseException) -> BaseException:
    """What the library raises, as an error of ours; a failure inside of it is no Exception."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return DataError(f"the tokenizer fails: {str(error)[:200]}", hint="give another with --tokenizer")
    return error


def read_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer in a file, or in a folder with `tokenizer.json` and perhaps a template for conversations.

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.stat().st_size > TOKENIZER_MAX_BYTES:
            raise DataError(
                f"{file} takes {file.stat().st_size:,} bytes; at most {TOKENIZER_MAX_BYTES:,} are loaded",
                hint="give a tokenizer.json as the tokenizers library writes it",
            )
        return TextTokenizer(file.read_bytes(), _chat_template(file.parent))
    except OSError as error:
        raise DataError(
            f"no tokenizer at {file}: {error.strerror}",
            hint="--tokenizer with a tokenizer.json, its folder, or train:N",
        ) from error
    except DataError as error:
        raise DataError(f"{file}: {error}", hint=error.hint) from error


def _chat_template(folder: Path) -> str:
    """The template that lies beside a tokenizer, as transformers keeps it; empty: none."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    try:
        config: Any = msgspec.json.decode((folder / "tokenizer_config.json").read_bytes())
        template = config["chat_template"]
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return ""
    if isinstance(template, list):
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}.get("default")
    return template if isinstance(template, str) else ""


def train_tokenizer(texts: Iterable[str], size: int) -> TextTokenizer:
    """A byte-level BPE of at most `size` tokens, trained on the first 64 MB of some texts.

    Raises:
        DataError: that many cannot be.
    """
    if not TRAINED_MIN <= size <= TRAINED_MAX:
        raise DataError(
            f"a tokenizer of {size:,} tokens cannot be trained: from {TRAINED_MIN} to {TRAINED_MAX:,}",
            hint="--tokenizer train:8192",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[ENDS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_in_pieces(texts), trainer)
    return TextTokenizer(tokenizer.to_str().encode())


def _in_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The beginning of some texts, in pieces short enough that a word without end costs little."""
    left = TRAINED_TEXT_BYTES
    for text in texts:
        for start in range(0, len(text), _TRAINING_PIECE_CHARACTERS):
            piece = text[start : start + _TRAINING_PIECE_CHARACTERS]
            yield piece
            left -= len(piece.encode())
            if left <= 0:
                return
