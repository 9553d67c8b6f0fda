"""A round of a toy through everything that is compiled (`kernels/compiled.py`), so that no round of a run waits.

Where nothing is compiled yet that takes some twenty seconds of a core, once a machine; from then on about one.
"""

from __future__ import annotations

import logging
import threading
import time

import torch

from p2ptrain.compression import decoded, wire
from p2ptrain.compression.layout import SIDE
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.optim.demo import DeMo

_logger = logging.getLogger(__name__)
_SAY_AFTER_SECONDS = 3.0
_MEMBERS, _VALUE_BITS, _TOPK = 2, 2, 4


def warm_up() -> None:
    """See the module docstring; says so where it takes more than a few seconds."""
    began = time.monotonic()
    say = threading.Timer(_SAY_AFTER_SECONDS, _logger.info, ["compiling the codec, once on a machine"])
    say.daemon = True
    say.start()
    try:
        _take_part(_toy())
    finally:
        say.cancel()
    _logger.debug("codec warm after %.1f s", time.monotonic() - began)


def _toy() -> DeMo:
    """A chunk of each form, and of one that steps by other than signs."""
    forms = (
        {"params": [torch.zeros(SIDE, SIDE)]},
        {"params": [torch.zeros(SIDE, SIDE)], "direction": "muon"},
        {"params": [torch.zeros(SIDE)]},
        {"params": [torch.zeros(SIDE, SIDE)], "transform": "none", "direction": "rms"},
    )
    for form in forms:
        for parameter in form["params"]:
            assert isinstance(parameter, torch.Tensor)
            parameter.grad = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
    return DeMo(forms, topk=_TOPK, reply_topk=_TOPK, value_bits=_VALUE_BITS)


def _take_part(optimizer: DeMo) -> None:
    """As a reducer of what it sent itself, of that with what another sent, and as one who reads what others reduced."""
    chunks, topk, reply_topk = optimizer.layout.chunks, optimizer.layout.topk, optimizer.layout.reply_topk
    pending = optimizer.accumulate_and_select()
    (payload,) = optimizer.payloads(pending, [(0, chunks)])
    wire.decode_contribution(payload, topk, 0, chunks, _VALUE_BITS)
    reduced = [
        reduce_part(
            [(member, 1, payload) for member in range(senders)],
            topk=topk,
            reply_topk=reply_topk,
            start=0,
            end=chunks,
            members=_MEMBERS,
            value_bits=_VALUE_BITS,
            clip_ratio=1.0,
            weight_cap_ratio=1.0,
        )
        for senders in range(1, _MEMBERS + 1)
    ]
    for content in (
        wire.decode_reply(reduced[0], reply_topk, 0, chunks, _MEMBERS),
        decoded.reply(reduced[1], reply_topk, 0, chunks, _MEMBERS),
    ):
        optimizer.apply([(0, chunks, content)])
        optimizer.unsettle(optimizer.settle(pending, [(0, chunks, content)], 0))
    optimizer.step()
