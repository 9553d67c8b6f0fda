"""Rounds in which nothing goes wrong: many members over one replica, without chain, messages or clock.

What a round does to a model is the product's own: local computing, momentum, selection, payloads, parts, reducing,
decoding, step and settling. All members are heard, and each reads what a peer of its id would read. For learning curves,
which want hundreds of rounds and no network; `world` is for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from p2ptrain.averaging import chain
from p2ptrain.averaging.reduce import reduce_part
from p2ptrain.compression import decoded
from p2ptrain.config.manifest import Manifest
from p2ptrain.data.assignment import sequence_offsets
from p2ptrain.models.gpt import GPT
from p2ptrain.models.init import initialise
from p2ptrain.optim.demo import PartReply
from p2ptrain.optim.schedule import learning_rate
from p2ptrain.training.replica import build_local, build_optimizer


@dataclass(frozen=True, slots=True)
class Round:
    """What a round was."""

    loss: float
    """Mean of all sequences, in nats a token."""
    sent_bytes: float
    """Payloads that left a member, on average; what it reduces itself does not."""
    received_bytes: float


class Group:
    """See the module docstring.

    Args:
        manifest: with pace `fixed`.
        members: peer ids, in the order of the chain; all dialable, with lines of equal speed.
        tokens: what members read, each its own text or all the same.
    """

    def __init__(self, manifest: Manifest, members: Sequence[bytes], tokens: Sequence[NDArray[np.uint16]]) -> None:
        self.manifest, self.members = manifest, tuple(members)
        self.model = GPT(manifest.model)
        initialise(self.model, bytes.fromhex(manifest.nonce))
        self.rounds = 0
        self._tokens = tuple(tokens)
        self._optimizers = [build_optimizer(self.model, manifest) for _ in members]
        self._locals = [build_local(self.model, manifest) for _ in members]
        self._read = [0] * len(members)
        layout = self._optimizers[0].layout
        most = min(chain.PARTS_PER_REDUCER_MAX, max(1, chain.PARTS_MAX // len(members)))
        #: reducer and chunks of each part
        self._parts = [
            (reducer, part)
            for reducer, chunks in enumerate(chain.partition(layout.chunks, [1] * len(members)))
            for part in chain.cut(*chunks, most)
        ]

    def play(self) -> Round:
        """One round."""
        self.rounds += 1
        ranges = [chunks for _, chunks in self._parts]
        losses, pending, payloads = [], [], []
        for member, optimizer in enumerate(self._optimizers):
            losses.append(self._compute(member))
            pending.append(optimizer.accumulate_and_select())
            optimizer.zero_grad(set_to_none=True)
            payloads.append(optimizer.payloads(pending[-1], ranges))
        replies = [self._reduce(number, [of[number] for of in payloads]) for number in range(len(self._parts))]
        contents: list[PartReply] = [
            (start, end, decoded.reply(data, self._optimizers[0].layout.reply_topk, start, end, len(self.members)))
            for (start, end), data in zip(ranges, replies, strict=True)
        ]
        config = self.manifest.optimizer
        self._optimizers[0].apply(contents, config.outer_learning_rate if config.has_inner_steps else self._rate())
        for member, optimizer in enumerate(self._optimizers):
            optimizer.settle(pending[member], contents, member)
        return self._round(losses, payloads, replies)

    def _rate(self) -> float:
        config = self.manifest.optimizer
        return learning_rate(
            self.rounds,
            peak=config.learning_rate,
            warmup_rounds=config.warmup_rounds,
            total_rounds=config.total_rounds,
            final_fraction=config.final_fraction,
        )

    def _compute(self, member: int) -> float:
        """A member's part of the round; the mean loss."""
        rules, tokens, context = self.manifest.round, self._tokens[member], self.manifest.model.context
        nats, nonce = [], bytes.fromhex(self.manifest.nonce)
        while len(nats) * rules.micro_batch < rules.sequences_per_peer:
            offsets = sequence_offsets(
                nonce, self.members[member], self._read[member], rules.micro_batch, len(tokens), context
            )
            batch = np.stack([tokens[offset : offset + context + 1] for offset in offsets]).astype(np.int64)
            self._read[member] += rules.micro_batch
            tensor = torch.from_numpy(batch)
            nats.append(
                self._locals[member].compute(lambda t=tensor: self.model.loss(t), rules.micro_batch, self._rate())  # type: ignore[misc]
            )
        self._locals[member].gather()
        return float(np.mean(nats))

    def _reduce(self, number: int, payloads: Sequence[bytes]) -> bytes:
        layout, rules = self._optimizers[0].layout, self.manifest.round
        start, end = self._parts[number][1]
        return reduce_part(
            [(member, rules.sequences_per_peer, payload) for member, payload in enumerate(payloads)],
            topk=layout.topk,
            reply_topk=layout.reply_topk,
            start=start,
            end=end,
            members=len(self.members),
            value_bits=self.manifest.codec.value_bits,
            clip_ratio=rules.clip_ratio,
            weight_cap_ratio=rules.weight_cap_ratio,
        )

    def _round(self, losses: list[float], payloads: list[tuple[bytes, ...]], replies: list[bytes]) -> Round:
        """A contribution goes to the part's reducer, a reply to all others: as many bytes are received as sent."""
        sent = sum(
            sum(len(of[number]) for member, of in enumerate(payloads) if member != reducer)
            + len(replies[number]) * (len(payloads) - 1)
            for number, (reducer, _) in enumerate(self._parts)
        )
        each = sent / len(payloads)
        return Round(float(np.mean(losses)), each, each)
