"""What a peer needs, beside what the parts that it is of are."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from p2ptrain.config.loading import new_manifest
from p2ptrain.config.manifest import Manifest, ModelConfig
from p2ptrain.config.sizes import SIZES, Size
from p2ptrain.errors import TooLargeError
from p2ptrain.models.gpt import GPT
from p2ptrain.training.machine import Machine
from p2ptrain.training.needs import activations_bytes, flops_a_token, gpt_chunks, needs_of
from p2ptrain.training.replica import build_optimizer

LABELS = {"1M": 1e6, "10M": 1e7, "25M": 2.5e7, "100M": 1e8, "350M": 3.5e8, "1B": 1e9}
LARGE = Machine(2**50, 2**50, 1.0)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_about_as_many_parameters_as_it_says(size: Size) -> None:
    model = new_manifest("a", size=size).model
    assert model.parameters == pytest.approx(LABELS[size], rel=0.1)
    assert model.embedding % 64 == 0


@pytest.mark.parametrize(
    "model",
    [ModelConfig(), ModelConfig(layers=3, heads=3, embedding=96, vocabulary=5000), ModelConfig(mlp_ratio=3)],
)
def test_chunks_are_those_of_the_optimizer(model: ModelConfig) -> None:
    manifest = Manifest(name="a", nonce="0" * 32, model=model)
    with torch.device("meta"):
        module = GPT(model)
    assert gpt_chunks(model) == build_optimizer(module, manifest).layout.chunks


def test_a_block_keeps_about_what_the_estimate_says() -> None:
    manifest = new_manifest("a")
    deep = msgspec.structs.replace(manifest.model, layers=6)
    flat = msgspec.structs.replace(manifest.model, layers=2)
    kept = {}
    for model in (deep, flat):
        module, found = GPT(model), {}

        def pack(tensor: torch.Tensor, found: dict[int, int] = found) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module.loss(torch.zeros(4, model.context + 1, dtype=torch.int64))
        kept[model.layers] = sum(found[pointer] for pointer in found.keys() - own)
    said = [activations_bytes(msgspec.structs.replace(manifest, model=model)) for model in (deep, flat)]
    assert said[0] - said[1] == pytest.approx(kept[6] - kept[2], rel=0.25)


def test_a_token_costs_six_operations_a_parameter_that_multiplies_it() -> None:
    manifest = new_manifest("a", size="100M")
    model = manifest.model
    matrices = model.layers * 12 * model.embedding**2 + model.vocabulary * model.embedding
    assert flops_a_token(manifest) == pytest.approx(6 * matrices, rel=0.08)


def test_steady_memory_is_the_peak_without_what_writing_takes() -> None:
    needs = needs_of(new_manifest("a", size="25M"))
    assert needs.peak_bytes - needs.steady_bytes == needs.memory_bytes["writing"] > 0
    shown = needs.as_json(LARGE, 1e12)
    assert shown["memory"]["peak"] == sum(needs.memory_bytes.values())
    assert shown["days_alone"] == pytest.approx(2000 * shown["round_seconds_alone"] / 86_400, abs=1e-3)


def test_what_cannot_fit_is_refused_with_both_numbers(tmp_path: Path) -> None:
    model = ModelConfig(layers=40, heads=16, embedding=2048)
    needs = needs_of(Manifest(name="a", nonce="0" * 32, model=model))
    small = Machine(6 * 10**9, 6 * 10**9, 2.0, "the control group /job")
    with pytest.raises(TooLargeError, match=r"needs 1\d\d GB of memory, and the control group /job allows 6 GB") as one:
        needs.check(small, tmp_path, force="--force to go on")
    assert "--size 25M" in one.value.hint or "--size 100M" in one.value.hint
    needs_of(new_manifest("a")).check(small, tmp_path, force="--force to go on")
