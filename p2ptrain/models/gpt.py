"""A small modern GPT, built from the manifest: RMSNorm, rotary positions, QK norm, squared ReLU, no biases.

A training step costs about 6 floating-point operations a parameter and token, the embedding's lookup excepted. At small
widths much of it is the head's, so its logits are made and consumed a few rows at a time: up to a quarter less of a
step's time on one CPU core, and memory that does not grow with batch times vocabulary. Embedding and head are not tied,
as DeMo treats them as different kinds. Generation keeps no cache of keys: simple, and quadratic in the context.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from p2ptrain.compression.layout import Kind, ParameterSpec
from p2ptrain.config.manifest import ModelConfig

ROTARY_BASE = 10000.0
NOT_COUNTED = -100
"""In place of a token that the loss does not count."""
_ROWS_AT_ONCE = nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [batch, heads, positions, dims]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Norm(nn.Module):
    """RMSNorm with a gain [dims]."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gain)


class Block(nn.Module):
    """Attention and MLP, each on a normalised input, each added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.embedding, config.embedding * config.mlp_ratio
        self.heads = config.heads
        self.attention_norm, self.mlp_norm = Norm(width), Norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, positions, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, positions, 3, self.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k = (_rotate(F.rms_norm(part, part.shape[-1:]), cos, sin) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, positions, width))
        return x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x))).square())


class GPT(nn.Module):
    """Next-token model over [batch, positions] of token numbers; parameters are set by `init.initialise`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        #: keep what goes into each block alone, and compute the rest again in the backward pass (arXiv 1604.06174)
        self.recompute = False
        self.embedding = nn.Embedding(config.vocabulary, config.embedding)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = Norm(config.embedding)
        self.head = nn.Linear(config.embedding, config.vocabulary, bias=False)
        dims = config.embedding // config.heads
        frequency = ROTARY_BASE ** (-torch.arange(0, dims, 2) / dims)
        angle = torch.arange(config.context)[:, None] * frequency[None, :]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def _stream(self, tokens: Tensor) -> Tensor:
        """What the head reads [batch, positions, dims]."""
        positions = tokens.shape[1]
        x = self.embedding(tokens)
        for block in self.blocks:
            given = x, self.cos[:positions], self.sin[:positions]  # type: ignore[index]
            x = checkpoint(block, *given, use_reentrant=False) if self.recompute and x.requires_grad else block(*given)
        return self.final_norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, positions, vocabulary] for tokens [batch, positions], positions at most the context."""
        return self.head(self._stream(tokens))

    def loss(self, tokens: Tensor, counted: NDArray[np.bool_] | None = None) -> Tensor:
        """Mean cross-entropy in nats a token of predicting tokens[:, 1:] from what precedes each.

        Args:
            tokens: [batch, 2 to context + 1], int64.
            counted: of the same shape: over which tokens the mean is; None: over all. At least one after the first.

        Returns:
            A scalar; `backward` may be called on it once.
        """
        stream, targets = self._stream(tokens[:, :-1]), tokens[:, 1:]
        if counted is not None:
            targets = targets.masked_fill(torch.from_numpy(~counted[:, 1:]).to(tokens.device), NOT_COUNTED)
        return F.linear_cross_entropy(
            stream.flatten(0, 1), self.head.weight, targets.flatten(), ignore_index=NOT_COUNTED, options=_ROWS_AT_ONCE
        )

    @torch.no_grad()
    def generate(self, tokens: list[int], count: int, temperature: float, seed: int) -> list[int]:
        """Continue `tokens` by `count` sampled ones; temperature 0 takes the likeliest.

        Sampling is on the CPU and seeded, so that one set of parameters gives one text on one machine.

        Args:
            tokens: at least one.

        Raises:
            ValueError: no tokens to continue.
        """
        return continued(self, tokens, count, self.config.context, temperature, seed, self.embedding.weight.device)


def continued(
    logits_of: Callable[[Tensor], Tensor],
    tokens: list[int],
    count: int,
    context: int,
    temperature: float,
    seed: int,
    device: torch.device,
) -> list[int]:
    """Continue `tokens` by `count` sampled ones; see `GPT.generate`.

    Args:
        logits_of: gives [1, positions, vocabulary] for tokens [1, positions], positions at most `context`.

    Raises:
        ValueError: no tokens to continue.
    """
    if not tokens:
        raise ValueError("there is no token to continue")
    generator = torch.Generator().manual_seed(seed)
    out = list(tokens)
    for _ in range(count):
        window = torch.tensor([out[-context:]], device=device)
        logits = logits_of(window)[0, -1].float().cpu()
        if temperature <= 0:
            out.append(int(logits.argmax()))
        else:
            probabilities = (logits / temperature).softmax(-1)
            out.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return out


def kind_of(name: str, parameter: Tensor) -> Kind:
    """How a parameter is treated, by its name and shape."""
    if parameter.ndim < 2:
        return "vector"
    if name.startswith("embedding."):
        return "embedding"
    return "head" if name.startswith("head.") else "matrix"


def parameter_specs(model: nn.Module) -> list[ParameterSpec]:
    """Specs of all parameters in the model's order."""
    return [ParameterSpec(n, tuple(p.shape), kind_of(n, p)) for n, p in model.named_parameters()]
