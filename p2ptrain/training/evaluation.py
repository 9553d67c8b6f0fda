"""How well a model predicts held-out text, in bits per byte, beside what compressors need for the same text.

Bits per byte compares models with different tokenizers, and with compressors: it is the size of the text, coded with
the model's predictions, over its size as it is. The comparison flatters the model, which has seen other text of the
kind and whose own size is not counted; a compressor starts from nothing. Perplexity is of a token, so it compares
models with one tokenizer alone.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from p2ptrain.data.text import Mask, Part
from p2ptrain.data.tokenizer import TextTokenizer
from p2ptrain.errors import DataError
from p2ptrain.models.gpt import GPT

COMPRESSED_BYTES = 4 * 2**20
"""Of the held-out text, for compressors to be measured on."""
_TOKENS_AT_ONCE = 2048
_NATS_MAX = 700.0
"""The exponential of more is no number."""


class Scoring:
    """Scores a text with a model, a slice at a time; what is found so far is there in between.

    Every token but the first is predicted once, with up to context - 1 tokens before it in its window. Windows do not
    overlap: a sliding window would cost up to `context` times more and give a lower figure.

    Args:
        text: to score, with its length in bytes.
        max_tokens: score about this many (at least one window), in windows spread evenly over the text, as if the
            rest took as many bits a token; default all.
        windows_at_once: in a slice; default as many as 2048 tokens are.

    Raises:
        ValueError: fewer than two tokens.
    """

    def __init__(
        self, model: GPT, text: Part, max_tokens: int | None = None, *, windows_at_once: int | None = None
    ) -> None:
        count = len(text.tokens)
        if count < 2:
            raise ValueError(f"{count} tokens leave nothing to predict")
        context = model.config.context
        whole = (count - 1) // context
        starts = np.arange(whole) * context
        rest = whole * context
        if max_tokens is not None and max_tokens < count - 1 and whole:
            starts = starts[np.linspace(0, whole - 1, max(1, min(max_tokens // context, whole))).astype(int)]
            rest = count - 1
        at_once = windows_at_once or max(1, _TOKENS_AT_ONCE // context)
        self._model, self._text = model, text
        self._windows = [(starts[i : i + at_once].tolist(), context + 1) for i in range(0, len(starts), at_once)]
        if rest < count - 1:
            self._windows.append(([rest], count - rest))
        #: tokens to predict in all, and those that were, whether or not they count
        self.tokens = sum(len(offsets) * (length - 1) for offsets, length in self._windows)
        self.done = 0
        self._nats, self._scored, self._next = 0.0, 0, 0

    @torch.no_grad()
    def slice(self) -> bool:
        """Score the next windows; False: all were scored before.

        Raises:
            DataError: the text has a token that the model does not know.
        """
        if self._next == len(self._windows):
            return False
        offsets, length = self._windows[self._next]
        nats, scored = _nats(self._model, self._text, offsets, length)
        self._nats, self._scored = self._nats + nats, self._scored + scored
        self.done += len(offsets) * (length - 1)
        self._next += 1
        return True

    @property
    def nats_per_token(self) -> float:
        """Mean over the tokens that count. Raises ValueError: there were none yet."""
        if not self._scored:
            raise ValueError("none of the tokens is scored")
        return self._nats / self._scored

    @property
    def bits_per_byte(self) -> float:
        """Of the text. Raises ValueError: no token was scored yet."""
        return self.nats_per_token / math.log(2) * (len(self._text.tokens) / self._text.bytes)

    @property
    def perplexity(self) -> float:
        """For each token of the text's tokenizer: no measure to compare tokenizers by. Raises ValueError: as above."""
        return math.exp(min(self.nats_per_token, _NATS_MAX))


def bits_per_byte(
    model: GPT,
    tokens: NDArray[Any],
    text_bytes: int,
    *,
    max_tokens: int | None = None,
    mask: Mask | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> float:
    """Bits per byte of text that `model` needs for `tokens`, as `Scoring` finds them.

    Args:
        tokens: [tokens], all of a text of `text_bytes` bytes.
        max_tokens: score about this many; default all.
        mask: a bit for each token: whether it is scored; as if the rest took as many bits a token.
        progress: hears (bytes of tokens scored, of).

    Raises:
        ValueError: fewer than two tokens, or none that is scored.
        DataError: there is a token that the model does not know.
    """
    return score(model, Part(tokens, text_bytes, mask), max_tokens, progress).bits_per_byte


def score(
    model: GPT, text: Part, max_tokens: int | None = None, progress: Callable[[int, int], None] = lambda done, of: None
) -> Scoring:
    """Score a text to its end; arguments and errors are those of `bits_per_byte`."""
    scoring, each = Scoring(model, text, max_tokens), text.tokens.itemsize
    while scoring.slice():
        progress(scoring.done * each, scoring.tokens * each)
    return scoring


def _nats(model: GPT, part: Part, offsets: list[int], length: int) -> tuple[float, int]:
    """Nats of all predictions in windows of `length` tokens from these offsets on, and how many they are."""
    batch = part.batch(offsets, length)
    if batch.max() >= model.config.vocabulary:
        raise DataError(
            f"the held-out text holds {batch.max()}, which is no token of {model.config.vocabulary:,}",
            hint="the run's owner has to make it anew: p2ptrain init --data",
        )
    inputs = torch.from_numpy(batch).to(model.embedding.weight.device)
    counted = part.counted(offsets, length)
    count = inputs.shape[0] * (length - 1) if counted is None else int(counted[:, 1:].sum())
    return (model.loss(inputs, counted).item() * count if count else 0.0), count


def compressors_bits_per_byte(text: bytes) -> dict[str, float]:
    """What general compressors need for `text` (not empty), each at its strongest setting, container included."""
    sizes = {
        "gzip": len(gzip.compress(text, 9)),
        "xz": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        "zstd": len(zstandard.ZstdCompressor(level=22).compress(text)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def beginning_of(tokens: NDArray[Any], tokenizer: TextTokenizer) -> bytes:
    """The text of some tokens, no more than `COMPRESSED_BYTES` of it: stronger compressors take seconds a megabyte."""
    # A token that stands for no byte is rare.
    return tokenizer.decode(tokens[:COMPRESSED_BYTES].tolist()).encode()[:COMPRESSED_BYTES]


def sample(
    model: GPT, tokenizer: TextTokenizer, prompt: str, tokens: int, *, temperature: float = 0.8, seed: int = 0
) -> str:
    """`prompt` and a continuation of it by `tokens` tokens; an empty prompt stands for the start of a document."""
    start = tokenizer.encode(prompt, special=True) if prompt else tokenizer.separator or [0]
    continued = model.generate(start, tokens, temperature, seed)
    return tokenizer.decode(continued) if prompt else tokenizer.decode(continued[len(start) :]).lstrip("\n")
