"""The model: what it computes, and that it can learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from p2ptrain.compression.layout import ParameterSpec
from p2ptrain.config.manifest import ModelConfig
from p2ptrain.models.gpt import GPT, parameter_specs
from p2ptrain.models.init import initialise

CONFIG = ModelConfig(layers=2, heads=2, embedding=32, context=24, vocabulary=300)


@pytest.fixture
def model() -> GPT:
    """A model with nothing at zero, so that every path carries signal."""
    torch.manual_seed(0)
    made = GPT(CONFIG)
    initialise(made, bytes(16))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return made


def _reference(model: GPT, tokens: Tensor) -> Tensor:
    """Logits of one sequence, written out: attention as a sum over earlier positions, rotation as complex numbers."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    heads, dims = CONFIG.heads, CONFIG.embedding // CONFIG.heads

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotated(x: Tensor, position: int) -> Tensor:
        angles = position * 10000.0 ** (-2 * torch.arange(dims // 2).double() / dims)
        turned = torch.complex(x[: dims // 2], x[dims // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag))

    x = weights["embedding.weight"][tokens]
    for layer in range(CONFIG.layers):
        w = {n.split(".", 2)[2]: p for n, p in weights.items() if n.startswith(f"blocks.{layer}.")}
        q, k, v = (norm(x) * w["attention_norm.gain"] @ w["qkv.weight"].T).chunk(3, -1)
        mixed = torch.zeros_like(x)
        for head in range(heads):
            part = slice(head * dims, (head + 1) * dims)
            for i in range(len(x)):
                query = rotated(norm(q[i, part]), i)
                scores = torch.stack([query @ rotated(norm(k[j, part]), j) for j in range(i + 1)]) / math.sqrt(dims)
                mixed[i, part] = scores.softmax(0) @ v[: i + 1, part]
        x = x + mixed @ w["attention_out.weight"].T
        hidden = (norm(x) * w["mlp_norm.gain"] @ w["mlp_in.weight"].T).clamp(min=0) ** 2
        x = x + hidden @ w["mlp_out.weight"].T
    return norm(x) * weights["final_norm.gain"] @ weights["head.weight"].T


def test_logits_equal_those_of_the_model_written_out(model: GPT) -> None:
    tokens = torch.randint(0, 300, (11,), generator=torch.Generator().manual_seed(1))
    expected = _reference(model, tokens)
    torch.testing.assert_close(model(tokens[None])[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [(1, 2), (3, 25), (20, 25)], ids=["one token", "a few", "several chunks of rows"])
def test_loss_and_gradients_equal_those_of_plain_cross_entropy(model: GPT, rows: tuple[int, int]) -> None:
    tokens = torch.randint(0, 300, rows, generator=torch.Generator().manual_seed(1))
    loss = model.loss(tokens)
    loss.backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    plain = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    plain.backward()
    torch.testing.assert_close(loss, plain)
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) == len(list(model.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_tokens_that_do_not_count_leave_no_trace(model: GPT) -> None:
    tokens = torch.randint(0, 300, (3, 17))
    counted = np.random.default_rng(0).random((3, 17)) < 0.4
    model.loss(tokens, counted).backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    logits = model(tokens[:, :-1])
    of_each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, 16)
    wanted = of_each[torch.from_numpy(counted[:, 1:])].mean()
    assert model.loss(tokens, counted).item() == pytest.approx(wanted.item(), rel=1e-5)
    wanted.backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-5)


def test_loss_without_gradients_is_the_same(model: GPT) -> None:
    tokens = torch.randint(0, 300, (4, 25), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        evaluated = model.loss(tokens)
    torch.testing.assert_close(evaluated, model.loss(tokens).detach())


def test_no_position_sees_a_later_one(model: GPT) -> None:
    tokens = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 300
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:15], after[:15])
    assert not torch.allclose(before[15], after[15])


def test_a_fresh_model_knows_nothing() -> None:
    fresh = GPT(CONFIG)
    initialise(fresh, bytes(16))
    assert fresh.loss(torch.randint(0, 300, (4, 25))).item() == pytest.approx(math.log(300), abs=1e-5)


def test_a_model_learns_a_text_by_heart() -> None:
    model = GPT(CONFIG)
    initialise(model, bytes(16))
    tokens = torch.randint(0, 300, (2, 25), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(tokens)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert model.generate(tokens[0, :8].tolist(), 16, 0.0, 0) == tokens[0, :24].tolist()


def test_generation_is_seeded_and_outgrows_the_context(model: GPT) -> None:
    one, same, other = (model.generate([1, 2, 3], 40, 1.0, seed) for seed in (5, 5, 6))
    assert one == same != other
    assert one[:3] == [1, 2, 3] and len(one) == 43 and max(one) < 300
    with pytest.raises(ValueError, match="no token"):
        model.generate([], 1, 0.0, 0)


def test_each_parameter_has_one_spec_of_the_right_kind(model: GPT) -> None:
    specs = parameter_specs(model)
    assert [(s.name, s.shape) for s in specs] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    kinds = {spec.name: spec.kind for spec in specs}
    assert specs[0] == ParameterSpec("embedding.weight", (300, 32), "embedding")
    assert kinds["head.weight"] == "head" and kinds["final_norm.gain"] == "vector"
    matrices = {name for name, kind in kinds.items() if kind == "matrix"}
    assert {name.split(".")[2] for name in matrices} == {"qkv", "attention_out", "mlp_in", "mlp_out"}
    assert len(matrices) == 4 * CONFIG.layers


@pytest.mark.parametrize("config", [CONFIG, ModelConfig(), ModelConfig(layers=1, heads=1, embedding=24, mlp_ratio=3)])
def test_the_manifest_counts_the_parameters_of_the_model(config: ModelConfig) -> None:
    assert sum(p.numel() for p in GPT(config).parameters()) == config.parameters
