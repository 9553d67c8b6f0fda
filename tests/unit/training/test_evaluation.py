"""Bits per byte, of models and of compressors; samples."""

from __future__ import annotations

import gzip
import lzma
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zstandard

from p2ptrain.config.manifest import ModelConfig
from p2ptrain.data.tokenizer import encode, shipped_tokenizer, tokenise
from p2ptrain.models.gpt import GPT
from p2ptrain.models.init import initialise
from p2ptrain.training.evaluation import bits_per_byte, compressors_bits_per_byte, sample

TEXT = (
    "To the Congress of the United States: peace, commerce and honest friendship with all nations.\n\n" * 12
).encode()
CONTEXT = 16


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    made = GPT(ModelConfig(layers=1, heads=2, embedding=16, context=CONTEXT))
    initialise(made, bytes(16))
    with torch.no_grad():
        made.head.weight += 0.3 * torch.randn(made.head.weight.shape)
    return made


def _one_by_one(model: GPT, tokens: np.ndarray) -> float:
    """Bits of every token but the first, each predicted alone from what precedes it in its window."""
    bits = 0.0
    for i in range(1, len(tokens)):
        start = (i - 1) // CONTEXT * CONTEXT
        logits = model(torch.from_numpy(tokens[start:i].astype(np.int64))[None])[0, -1]
        bits -= float(F.log_softmax(logits, -1)[int(tokens[i])]) / math.log(2)
    return bits


@pytest.mark.parametrize("length", [2, CONTEXT, CONTEXT + 1, CONTEXT + 2, 3 * CONTEXT, 3 * CONTEXT + 1, 150])
def test_bits_are_those_of_every_token_predicted_one_by_one(model: GPT, length: int) -> None:
    tokens = tokenise(TEXT)[:length]
    with torch.no_grad():
        per_token = _one_by_one(model, tokens) / (length - 1)
    assert bits_per_byte(model, tokens, 1000) == pytest.approx(per_token * length / 1000, rel=1e-4)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary() -> None:
    fresh = GPT(ModelConfig(layers=1, heads=2, embedding=16, context=CONTEXT))
    initialise(fresh, bytes(16))
    tokens = tokenise(TEXT)
    expected = 12 * len(tokens) / len(TEXT)
    for most in (None, 40, 1):
        assert bits_per_byte(fresh, tokens, len(TEXT), max_tokens=most) == pytest.approx(expected, rel=1e-5)


def test_a_part_of_the_text_stands_for_all_of_it(model: GPT) -> None:
    tokens = tokenise(TEXT)
    whole = bits_per_byte(model, tokens, len(TEXT))
    assert bits_per_byte(model, tokens, len(TEXT), max_tokens=len(tokens) // 2) == pytest.approx(whole, rel=0.05)
    assert bits_per_byte(model, tokens, len(TEXT), max_tokens=10**9) == whole


def test_a_short_text_is_scored_whole_whatever_the_limit(model: GPT) -> None:
    tokens = tokenise(TEXT)[: CONTEXT // 2]
    assert bits_per_byte(model, tokens, 30, max_tokens=1) == bits_per_byte(model, tokens, 30)
    with pytest.raises(ValueError, match="nothing to predict"):
        bits_per_byte(model, tokens[:1], 30)


def test_tokens_that_do_not_count_are_not_scored(model: GPT) -> None:
    tokens = tokenise(TEXT)[: 2 * CONTEXT + 1]
    counted = np.random.default_rng(0).random(len(tokens)) < 0.3
    mask = np.packbits(counted, bitorder="little")
    nats = []
    for start in (0, CONTEXT):
        window = torch.from_numpy(tokens[start : start + CONTEXT + 1].astype(np.int64))
        with torch.no_grad():
            of_each = F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none")
        nats += of_each[torch.from_numpy(counted[start + 1 : start + CONTEXT + 1])].tolist()
    expected = sum(nats) / len(nats) / math.log(2) * len(tokens) / 500
    assert bits_per_byte(model, tokens, 500, mask=mask) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="none of the tokens"):
        bits_per_byte(model, tokens, 500, mask=np.zeros_like(mask))


def test_evaluation_leaves_no_gradients(model: GPT) -> None:
    bits_per_byte(model, tokenise(TEXT), len(TEXT))
    assert all(p.grad is None for p in model.parameters())


def test_compressors_are_measured_by_what_they_can_undo() -> None:
    found = compressors_bits_per_byte(TEXT)
    assert list(found) == ["gzip", "xz", "zstd"]
    assert found["gzip"] == 8 * len(gzip.compress(TEXT)) / len(TEXT)
    assert found["xz"] == pytest.approx(8 * len(lzma.compress(TEXT)) / len(TEXT), rel=0.1)
    assert zstandard.decompress(zstandard.ZstdCompressor(level=22).compress(TEXT)) == TEXT
    assert all(0 < bits < 2 for bits in found.values())


def test_a_sample_continues_its_prompt_and_repeats_with_its_seed(model: GPT) -> None:
    one = sample(model, shipped_tokenizer(), "Fellow citizens", 20, seed=3)
    assert one.startswith("Fellow citizens") and len(one) > len("Fellow citizens")
    assert (
        one
        == sample(model, shipped_tokenizer(), "Fellow citizens", 20, seed=3)
        != sample(model, shipped_tokenizer(), "Fellow citizens", 20, seed=4)
    )


def test_a_sample_without_a_prompt_begins_a_paragraph(model: GPT) -> None:
    assert encode("\n\n")
    text = sample(model, shipped_tokenizer(), "", 10, temperature=0.0)
    assert text and not text.startswith("\n")
