"""What a run.toml that names a strategy need not say: the keys that suit it.

Whoever writes a manifest chooses a strategy and changes what they like; the manifest that peers agree on says
everything. docs/learning.md has the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import msgspec

from p2ptrain.config.manifest import Manifest, ModelConfig, OptimizerConfig, RoundConfig, Strategy

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

_OF_SIZE: tuple[Strategy, ...] = ("demo", "local_demo")
"""Strategies whose learning rate and warm-up follow the model and the batch (`of_size`)."""
BATCH_TOKENS = 2048
"""Of a round: the learning rate follows smaller batches, and is the same for all larger ones."""
PARAMETERS_A_WARM_TOKEN = 70
"""A model of so many more parameters warms up for a token longer: ten rounds of the demo's model and batch."""
WARM_SHARE = 0.1
"""Of the run's rounds, that the warm-up takes at most."""
FOLLOWING = ("learning_rate", "warmup_rounds")
"""Keys of `optimizer` that follow from others where nobody says them."""

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


def of_size(model: ModelConfig, target_batch: int, total_rounds: int) -> Toml:
    """Return the learning rate and the warm-up that suit a model and a batch.

    A step that is as large in all entries moves what a layer gives out in proportion to how many it takes in, so the
    rate falls with the inverse of the width (Yang et al., arXiv 2203.03466). Steps are about as large whatever the
    gradient's noise is, as Adam's are, so with a small batch they follow its root (Malladi et al., arXiv 2205.10287).
    Until running means and the frequencies of tokens are known, a large model moves far the wrong way by whole steps:
    the warm-up is as long as the model is large, counted in tokens.

    Args:
        target_batch: sequences of a round, of all peers.
    """
    tokens = target_batch * model.context
    rate = OptimizerConfig().learning_rate * ModelConfig().embedding / model.embedding
    rate *= min(1.0, math.sqrt(tokens / BATCH_TOKENS))
    rounds = round(model.parameters / PARAMETERS_A_WARM_TOKEN / tokens)
    least = OptimizerConfig().warmup_rounds
    return {
        "learning_rate": float(f"{rate:.2g}"),
        "warmup_rounds": max(least, min(rounds, int(WARM_SHARE * total_rounds))),
    }


def _suggested_by_size(table: Toml) -> Toml:
    """Return `of_size` of a run.toml's table; nothing where that makes no sense, or says nothing of the model."""
    tables = [table.get(name, {}) for name in ("model", "round", "optimizer")]
    if not table.get("model") or not all(isinstance(one, dict) for one in tables):
        return {}
    model, rounds, optimizer = cast(list[Toml], tables)
    batch = rounds.get("target_batch", RoundConfig().target_batch)
    total = optimizer.get("total_rounds", OptimizerConfig().total_rounds)
    if not isinstance(batch, int) or not isinstance(total, int) or batch < 1:
        return {}
    try:
        return of_size(msgspec.convert(model, ModelConfig), batch, total)
    except msgspec.ValidationError:
        return {}


def followed(manifest: Manifest) -> tuple[str, ...]:
    """Return which keys of `optimizer` are what follows where a run.toml leaves them out."""
    config = manifest.optimizer
    if config.strategy not in _OF_SIZE or (manifest.task_config is not None and manifest.task_config.kind != "gpt"):
        return ()
    follows = of_size(manifest.model, manifest.round.target_batch, config.total_rounds)
    return tuple(name for name in FOLLOWING if getattr(config, name) == follows[name])


def completed(table: Toml) -> Toml:
    """A run.toml's table with the keys that its strategy and its size suggest where it says nothing.

    What makes no sense, a strategy that there is not or a model without a width, is left for the manifest's own check
    to refuse.
    """
    optimizer = table.get("optimizer")
    strategy = optimizer.get("strategy", "demo") if isinstance(optimizer, dict) else "demo"
    if not isinstance(strategy, str):
        return table
    suggested = DEFAULTS.get(cast(Strategy, strategy), {})
    table = merged(suggested, table)
    if strategy in _OF_SIZE:
        table = merged({"optimizer": _suggested_by_size(table)}, table)
    return table


def merged(under: Toml, over: Toml) -> Toml:
    """`over` where it says something, else `under`, table by table."""
    out = dict(under)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return out
