"""p2ptrain: one model, trained on many people's machines, with no server.

What Python programs use is here, and is loaded when it is first asked for: `bootstrap` and `join` make a `Peer` of a
model of one's own, `DeMo` is the optimizer alone, which loads no network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2ptrain.api.huggingface import SwarmCallback
    from p2ptrain.api.optimizer import SwarmOptimizer
    from p2ptrain.api.peer import Peer, bootstrap, join
    from p2ptrain.models.own import parameters_sha256
    from p2ptrain.models.task import Task
    from p2ptrain.observe.metrics import Sink
    from p2ptrain.optim.demo import DeMo

__version__ = "0.1.0"
__all__ = ["DeMo", "Peer", "Sink", "SwarmCallback", "SwarmOptimizer", "Task", "bootstrap", "join", "parameters_sha256"]

_WHERE = {
    "DeMo": "p2ptrain.optim.demo",
    "Peer": "p2ptrain.api.peer",
    "Sink": "p2ptrain.observe.metrics",
    "SwarmCallback": "p2ptrain.api.huggingface",
    "SwarmOptimizer": "p2ptrain.api.optimizer",
    "Task": "p2ptrain.models.task",
    "bootstrap": "p2ptrain.api.peer",
    "join": "p2ptrain.api.peer",
    "parameters_sha256": "p2ptrain.models.own",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
