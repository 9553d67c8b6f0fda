"""What a run.toml that names a strategy need not say: the keys that suit it.

Whoever writes a manifest chooses a strategy and changes what they like; the manifest that peers agree on says
everything. docs/learning.md has the figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import msgspec

from p2ptrain.config.manifest import ModelConfig, OptimizerConfig, Strategy

Toml = dict[str, object]

_KINDS = ("matrix", "embedding", "head", "vector")
_INNER_STEPS, _INNER_BATCH, _PEERS = 16, 16, 4


def _alike(**treatment: object) -> Toml:
    """All kinds of parameters treated alike."""
    return {kind: dict(treatment) for kind in _KINDS}


def _of(kind: str) -> Toml:
    """How the manifest treats a kind of parameter where nothing is said."""
    return cast(Toml, msgspec.to_builtins(getattr(OptimizerConfig(), kind)))


_LONG_ROUNDS: Toml = {
    "sequences_per_peer": _INNER_STEPS * _INNER_BATCH,
    "target_batch": _INNER_STEPS * _INNER_BATCH * _PEERS,
}

_OF_WIDTH: tuple[Strategy, ...] = ("demo", "local_demo")
"""Strategies whose learning rate follows the model's width. A step that is as large in all entries moves what a layer
gives out in proportion to how many it takes in, so a wider model wants a smaller one (Yang et al., arXiv 2203.03466):
with steps of signs, 2e-3 and 4e-3 did best at a width of 64, and 5e-4 at 320 with a quarter of the batch."""

DEFAULTS: Mapping[Strategy, Toml] = {
    # As the manifest has it: here so that a run.toml which says one thing of a kind keeps the rest.
    "demo": {"optimizer": {kind: _of(kind) for kind in _KINDS}},
    # For slow lines: long rounds, and in each half of demo's bytes.
    "local_demo": {
        "optimizer": {"look_ahead": 0.75, **{kind: {**_of(kind), "topk": 30, "reply_topk": 25} for kind in _KINDS}},
        "round": _LONG_ROUNDS,
    },
    # What SparseLoCo does (arXiv 2508.15706), through our codec. Learning rates of these did best in docs/learning.md.
    "sparse_diloco": {
        "optimizer": {
            "learning_rate": 4e-3,
            "outer_learning_rate": 1.0,
            **_alike(transform="none", direction="sgd", learning_rate_scale=1.0, topk=64, reply_topk=64),
        },
        "round": _LONG_ROUNDS,
    },
    # arXiv 2311.08105. With beta = 1, what 8 bits miss is sent the next time.
    "diloco": {
        "optimizer": {
            "learning_rate": 5e-4,
            "outer_learning_rate": 0.7,
            "beta": 1.0,
            **_alike(transform="none", direction="nesterov", learning_rate_scale=1.0, topk=4096, reply_topk=4096),
        },
        "codec": {"value_bits": 8},
        "round": _LONG_ROUNDS,
    },
    # Data-parallel Adam, the control.
    "dense": {
        "optimizer": {
            "learning_rate": 4e-3,
            "beta": 1.0,
            **_alike(transform="none", direction="adam", learning_rate_scale=1.0, topk=4096, reply_topk=4096),
        },
        "codec": {"value_bits": 8},
    },
}


def completed(table: Toml) -> Toml:
    """A run.toml's table with the keys that its strategy suggests where it says nothing.

    What makes no sense, a strategy that there is not or a model without a width, is left for the manifest's own check
    to refuse.
    """
    optimizer, model = table.get("optimizer"), table.get("model")
    strategy = optimizer.get("strategy", "demo") if isinstance(optimizer, dict) else "demo"
    if not isinstance(strategy, str):
        return table
    suggested = DEFAULTS.get(cast(Strategy, strategy), {})
    width = model.get("embedding") if isinstance(model, dict) else None
    if strategy in _OF_WIDTH and isinstance(width, int) and width > 0:
        rate = OptimizerConfig().learning_rate * ModelConfig().embedding / width
        suggested = merged(suggested, {"optimizer": {"learning_rate": float(f"{rate:.2g}")}})
    return merged(suggested, table)


def merged(under: Toml, over: Toml) -> Toml:
    """`over` where it says something, else `under`, table by table."""
    out = dict(under)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return out
