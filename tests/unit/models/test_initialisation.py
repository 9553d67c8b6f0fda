"""Initial parameters: the same bits everywhere."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from p2ptrain.config.manifest import ModelConfig
from p2ptrain.models.gpt import GPT
from p2ptrain.models.init import _splitmix64, initialise, unit_normal_integers

NONCE = bytes(range(16))
SMALL = ModelConfig(layers=2, heads=2, embedding=32, context=16, vocabulary=300)


def _digest(model: GPT) -> str:
    whole = hashlib.sha256()
    for name, parameter in model.named_parameters():
        whole.update(name.encode() + parameter.detach().numpy().astype("<f4").tobytes())
    return whole.hexdigest()


def test_the_generator_is_splitmix64() -> None:
    # First outputs for seed 0, as published with the reference implementation.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    with np.errstate(over="ignore"):
        ours = _splitmix64(np.arange(1, 4, dtype=np.uint64))
    assert ours.tolist() == published


def test_integers_equal_those_of_plain_python() -> None:
    mask = 2**64 - 1
    state = int.from_bytes(hashlib.sha256(b"seed").digest()[:8], "little")
    expected = []
    for i in range(100):
        z = (state + i) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        z ^= z >> 31
        expected.append(sum(z >> shift & 0xFFFF for shift in (0, 16, 32, 48)) - 2 * 65535)
    assert unit_normal_integers(b"seed", 100).tolist() == expected


def test_a_short_stream_is_the_beginning_of_a_long_one() -> None:
    assert np.array_equal(unit_normal_integers(b"any", 1000)[:10], unit_normal_integers(b"any", 10))


def test_the_initialisation_is_pinned_to_the_bit() -> None:
    model = GPT(SMALL)
    initialise(model, NONCE)
    assert _digest(model) == "6a6ebe92a84702d70a17756c08ef6279b06877dc6bdef62deb9e4f41c12069da"


def test_neither_threads_nor_random_state_nor_order_matter() -> None:
    torch.manual_seed(1)
    one = GPT(SMALL)
    initialise(one, NONCE)
    before = torch.get_num_threads()
    torch.manual_seed(2)
    torch.set_num_threads(2)
    try:
        other = GPT(SMALL)
        initialise(other, NONCE)
    finally:
        torch.set_num_threads(before)
    assert _digest(one) == _digest(other)


def test_another_nonce_gives_another_model() -> None:
    one, other = GPT(SMALL), GPT(SMALL)
    initialise(one, NONCE)
    initialise(other, NONCE[::-1])
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert not torch.equal(one.blocks[0].qkv.weight, one.blocks[1].qkv.weight)


def test_every_entry_is_an_integer_times_one_constant_so_that_it_is_rounded_once() -> None:
    model = GPT(SMALL)
    initialise(model, NONCE)
    weight = model.blocks[0].qkv.weight.detach().double().numpy().ravel()
    integers = unit_normal_integers(NONCE + b"blocks.0.qkv.weight", weight.size)
    constant = round(2**40 / math.sqrt(32) / (65536 / math.sqrt(3))) / 2**40
    exact = integers.astype(np.float64) * constant
    assert np.all(np.abs(weight - exact) <= np.abs(exact) * 2**-24)


def test_spreads_are_as_stated() -> None:
    model = GPT(ModelConfig(layers=1, heads=2, embedding=64))
    initialise(model, NONCE)
    qkv, embedding = model.blocks[0].qkv.weight.detach(), model.embedding.weight.detach()
    assert abs(float(qkv.std()) * 8 - 1) < 0.02 and abs(float(qkv.mean())) < 0.005
    assert abs(float(embedding.std()) / 0.02 - 1) < 0.01
    assert not model.head.weight.any() and not model.blocks[0].mlp_out.weight.any()
    assert bool((model.final_norm.gain == 1).all())
