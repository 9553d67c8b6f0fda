"""How well a model predicts held-out text, in bits per byte, beside what compressors need for the same text.

Bits per byte compares models with different tokenizers, and with compressors: it is the size of the text, coded with
the model's predictions, over its size as it is. The comparison flatters the model, which has seen other text of the
kind and whose own size is not counted; a compressor starts from nothing.
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
from p2ptrain.models.gpt import GPT

COMPRESSED_BYTES = 4 * 2**20
"""Of the held-out text, for compressors to be measured on."""
_TOKENS_AT_ONCE = 2048


@torch.no_grad()
def bits_per_byte(
    model: GPT,
    tokens: NDArray[Any],
    text_bytes: int,
    *,
    max_tokens: int | None = None,
    mask: Mask | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> float:
    """Bits per byte of text that `model` needs for `tokens`, in windows of its context.

    Every token but the first is predicted once, with up to context - 1 tokens before it in its window. Windows do not
    overlap: a sliding window would cost up to `context` times more and give a lower figure.

    Args:
        tokens: [tokens], all of a text of `text_bytes` bytes.
        max_tokens: score about this many (at least one window), in windows spread evenly over the text, as if the
            rest took as many bits a token; default all.
        mask: a bit for each token: whether it is scored; as if the rest took as many bits a token.
        progress: hears (bytes of tokens scored, of).

    Raises:
        ValueError: fewer than two tokens, or none that is scored.
    """
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens leave nothing to predict")
    context = model.config.context
    whole = (len(tokens) - 1) // context
    starts = np.arange(whole) * context
    rest = whole * context
    if max_tokens is not None and max_tokens < len(tokens) - 1 and whole:
        starts = starts[np.linspace(0, whole - 1, max(1, min(max_tokens // context, whole))).astype(int)]
        rest = len(tokens) - 1
    nats, scored = 0.0, 0
    at_once = max(1, _TOKENS_AT_ONCE // context)
    part = Part(tokens, mask=mask)
    windows = [(starts[i : i + at_once].tolist(), context + 1) for i in range(0, len(starts), at_once)]
    if rest < len(tokens) - 1:
        windows.append(([rest], len(tokens) - rest))
    done, total = 0, sum(len(offsets) * length for offsets, length in windows) * tokens.itemsize
    for offsets, length in windows:
        found, count = _nats(model, part, offsets, length)
        nats, scored = nats + found, scored + count
        done += len(offsets) * length * tokens.itemsize
        progress(done, total)
    if not scored:
        raise ValueError("none of the tokens is scored")
    return nats / math.log(2) / scored * (len(tokens) / text_bytes)


def _nats(model: GPT, part: Part, offsets: list[int], length: int) -> tuple[float, int]:
    """Nats of all predictions in windows of `length` tokens from these offsets on, and how many they are."""
    inputs = torch.from_numpy(part.batch(offsets, length)).to(model.embedding.weight.device)
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
