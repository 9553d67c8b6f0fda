"""A small modern GPT, built from the manifest: RMSNorm, rotary positions, QK norm, squared ReLU, no biases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2ptrain.compression.layout import Kind, ParameterSpec
from p2ptrain.config.manifest import ModelConfig


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
        self.embedding = nn.Embedding(config.vocabulary, config.embedding)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = Norm(config.embedding)
        self.head = nn.Linear(config.embedding, config.vocabulary, bias=False)
        dims = config.embedding // config.heads
        frequency = 10000.0 ** (-torch.arange(0, dims, 2) / dims)
        angle = torch.arange(config.context)[:, None] * frequency[None, :]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, positions, vocabulary]."""
        positions = tokens.shape[1]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:positions], self.sin[:positions])  # type: ignore[index]
        return self.head(self.final_norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of predicting tokens[:, 1:] from what precedes; tokens [batch, context + 1]."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def generate(self, tokens: list[int], count: int, temperature: float, seed: int) -> list[int]:
        """Continue `tokens` by `count` sampled ones; temperature 0 takes the likeliest."""
        generator = torch.Generator().manual_seed(seed)
        out = list(tokens)
        device = self.embedding.weight.device
        for _ in range(count):
            window = torch.tensor([out[-self.config.context :]], device=device)
            logits = self(window)[0, -1].float().cpu()
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
