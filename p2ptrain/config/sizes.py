"""Models to choose by size: layers, width, heads, context and batch that suit each other.

What follows from them, learning rate and warm-up, is in `strategies.py`, where it also holds for a model that somebody
has chosen key by key. Counts of parameters are with the tokenizer shipped; of another one the ends of the model are as
many times larger or smaller as it has tokens.

A head has 64 entries, or 32 in the smallest model, and a width is a multiple of a chunk's 64. Batches grow with about
the square root of the parameters. A micro-batch is what a small machine holds; a peer may compute in another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Size = Literal["1M", "10M", "25M", "100M", "350M", "1B"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a size means."""

    layers: int
    heads: int
    embedding: int
    context: int
    """Tokens in a sequence."""
    target_batch: int
    """Sequences of a round, of all peers together."""
    micro_batch: int

    def table(self) -> dict[str, object]:
        """Return the tables of a run.toml that say so."""
        model = {"layers": self.layers, "heads": self.heads, "embedding": self.embedding, "context": self.context}
        return {"model": model, "round": {"target_batch": self.target_batch, "micro_batch": self.micro_batch}}


SIZES: dict[Size, Shape] = {
    "1M": Shape(8, 2, 64, 128, 16, 4),
    "10M": Shape(10, 4, 256, 256, 16, 4),
    "25M": Shape(7, 8, 512, 256, 32, 4),
    "100M": Shape(12, 12, 768, 512, 32, 2),
    "350M": Shape(27, 16, 1024, 1024, 32, 1),
    "1B": Shape(20, 16, 2048, 1024, 64, 1),
}
