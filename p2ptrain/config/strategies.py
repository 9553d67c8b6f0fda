"""What a run.toml that names a strategy need not say: the keys that suit it.

Whoever writes a manifest chooses a strategy and changes what they like; the manifest that peers agree on says
everything. docs/learning.md has the figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import msgspec

from p2ptrain.config.manifest import OptimizerConfig, Strategy

Toml = dict[str, object]

_KINDS = ("matrix", "embedding", "head", "vector")
_INNER_STEPS, _INNER_BATCH, _PEERS = 15, 16, 4


def _alike(**treatment: object) -> Toml:
    """All kinds of parameters treated alike."""
    return {kind: dict(treatment) for kind in _KINDS}


_LONG_ROUNDS: Toml = {
    "sequences_per_peer": _INNER_STEPS * _INNER_BATCH,
    "target_batch": _INNER_STEPS * _INNER_BATCH * _PEERS,
}

DEFAULTS: Mapping[Strategy, Toml] = {
    # As the manifest has it: here so that a run.toml which says one thing of a kind keeps the rest.
    "demo": {"optimizer": {kind: msgspec.to_builtins(getattr(OptimizerConfig(), kind)) for kind in _KINDS}},
    # What SparseLoCo does (arXiv 2508.15706), through our codec.
    "sparse_diloco": {
        "optimizer": {
            "learning_rate": 2e-3,
            "outer_learning_rate": 1.0,
            **_alike(transform="none", direction="sgd", learning_rate_scale=1.0, topk=64, reply_topk=64),
        },
        "round": _LONG_ROUNDS,
    },
    # arXiv 2311.08105. With beta = 1, what 8 bits miss is sent the next time.
    "diloco": {
        "optimizer": {
            "learning_rate": 2e-3,
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
            "learning_rate": 2e-3,
            "beta": 1.0,
            **_alike(transform="none", direction="adam", learning_rate_scale=1.0, topk=4096, reply_topk=4096),
        },
        "codec": {"value_bits": 8},
    },
}


def completed(table: Toml) -> Toml:
    """A run.toml's table with the keys that its strategy suggests where it says nothing.

    A strategy that there is not is left for the manifest's own check to refuse.
    """
    optimizer = table.get("optimizer")
    strategy = optimizer.get("strategy", "demo") if isinstance(optimizer, dict) else "demo"
    return merged(DEFAULTS.get(cast(Strategy, strategy), {}), table) if isinstance(strategy, str) else table


def merged(under: Toml, over: Toml) -> Toml:
    """`over` where it says something, else `under`, table by table."""
    out = dict(under)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return out
