"""How well a model predicts held-out text, in bits per byte, beside what compressors need for the same text.

Bits per byte compares models with different tokenizers, and with compressors: it is the size of the text, coded with
the model's predictions, over its size as it is. The comparison flatters the model, which has seen other text of the
kind and whose own size is not counted; a compressor starts from nothing.
"""

from __future__ import annotations

import gzip
import lzma
import math

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from p2ptrain.data.tokenizer import decode, encode
from p2ptrain.models.gpt import GPT

_TOKENS_AT_ONCE = 2048


@torch.no_grad()
def bits_per_byte(model: GPT, tokens: NDArray[np.uint16], text_bytes: int, *, max_tokens: int | None = None) -> float:
    """Bits per byte of text that `model` needs for `tokens`, in windows of its context.

    Every token but the first is predicted once, with up to context - 1 tokens before it in its window. Windows do not
    overlap: a sliding window would cost up to `context` times more and give a lower figure.

    Args:
        tokens: [tokens], all of a text of `text_bytes` bytes.
        max_tokens: score about this many (at least one window), in windows spread evenly over the text, as if the
            rest took as many bits a token; default all.

    Raises:
        ValueError: fewer than two tokens.
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
    for i in range(0, len(starts), at_once):
        batch = np.stack([tokens[s : s + context + 1] for s in starts[i : i + at_once]])
        nats += _nats(model, batch)
        scored += batch.shape[0] * context
    if rest < len(tokens) - 1:
        nats += _nats(model, tokens[None, rest:])
        scored += len(tokens) - 1 - rest
    return nats / math.log(2) / scored * (len(tokens) / text_bytes)


def _nats(model: GPT, batch: NDArray[np.uint16]) -> float:
    """Nats of all predictions in `batch` [sequences, tokens]."""
    inputs = torch.from_numpy(batch.astype(np.int64)).to(model.embedding.weight.device)
    return model.loss(inputs).item() * batch.shape[0] * (batch.shape[1] - 1)


def compressors_bits_per_byte(text: bytes) -> dict[str, float]:
    """What general compressors need for `text` (not empty), each at its strongest setting, container included."""
    sizes = {
        "gzip": len(gzip.compress(text, 9)),
        "xz": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        "zstd": len(zstandard.ZstdCompressor(level=22).compress(text)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def sample(model: GPT, prompt: str, tokens: int, *, temperature: float = 0.8, seed: int = 0) -> str:
    """`prompt` and a continuation of it by `tokens` tokens; an empty prompt stands for the start of a paragraph."""
    start = encode(prompt or "\n\n")
    text = decode(model.generate(start, tokens, temperature, seed))
    return text if prompt else text.lstrip("\n")
