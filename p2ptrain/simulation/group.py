"""Rounds in which nothing goes wrong: many members over one replica, without chain, messages or clock.

What a round does to a model is the product's own: local computing, momentum, selection, payloads, parts, reducing,
decoding, step and settling. All members are heard, and each reads what a peer of its id would read. For learning
curves, which want hundreds of rounds and no network; `world` is for everything else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from p2ptrain import chain
from p2ptrain.chain import Part
from p2ptrain.compression import decoded, wire
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.compression.wire import Coefficients
from p2ptrain.config.manifest import Manifest
from p2ptrain.data.assignment import sequence_offsets
from p2ptrain.models.gpt import GPT
from p2ptrain.models.init import initialise
from p2ptrain.optim.demo import DeMo
from p2ptrain.optim.local import Local
from p2ptrain.optim.schedule import learning_rate
from p2ptrain.optim.settling import PartReply
from p2ptrain.training.replica import build_local, build_optimizer


@dataclass(frozen=True, slots=True)
class Round:
    """What a round was."""

    loss: float
    """Mean of all sequences, in nats a token."""
    replies: tuple[bytes, ...]
    """Of all parts."""
    sent_bytes: float
    """Of payloads, by a member on average. As many are received: all that is sent goes to a member."""


Forge = Callable[[int, Sequence[Coefficients]], Mapping[int, Coefficients]]
"""From a round's number and what all members selected: what some of them, by their place, send in its stead."""


@dataclass(slots=True)
class _Member:
    """What is a peer's own."""

    optimizer: DeMo
    local: Local
    sequences_read: int = 0


class Group:
    """See the module docstring.

    Args:
        manifest: with pace `fixed`.
        text: training text [tokens] of a peer, by its id.
        device: where all of them compute.
        forge: what hostile members send; default: all are honest.
        sequences: how many a peer computes in a round, by its id, a multiple of the micro-batch or less than one;
            default: as many as the manifest says.
        weights: how many a peer says that it computed; default: the truth.
    """

    def __init__(
        self,
        manifest: Manifest,
        text: Callable[[bytes], NDArray[np.uint16]],
        device: torch.device | str = "cpu",
        forge: Forge = lambda number, selected: {},
        sequences: Callable[[bytes], int] | None = None,
        weights: Callable[[bytes], int] | None = None,
    ) -> None:
        self.manifest, self._text, self._device, self._forge = manifest, text, device, forge
        self._sequences = sequences or (lambda peer_id: manifest.round.sequences_per_peer)
        self._weights = weights or self._sequences
        self.model = GPT(manifest.model).to(device)
        initialise(self.model, bytes.fromhex(manifest.nonce))
        #: takes the steps; each member's own has its momentum
        self._replicated = build_optimizer(self.model, manifest)
        self.codec = self._replicated.codec
        self._members: dict[bytes, _Member] = {}
        #: those sealed, so the number of the last
        self.rounds = 0

    def equal_parts(self, members: int) -> list[Part]:
        """Parts for so many members whose lines are equally fast."""
        most = min(chain.PARTS_PER_REDUCER_MAX, max(1, chain.PARTS_MAX // members))
        ranges = enumerate(chain.partition(self.codec.chunks, [1] * members))
        return [Part(reducer, *part) for reducer, chunks in ranges for part in chain.cut(*chunks, most)]

    def play(self, members: Sequence[bytes], parts: Sequence[Part], standing: Sequence[int] = ()) -> Round:
        """One round of these peers, in this order.

        Args:
            standing: of each; empty: all have come long ago.
        """
        self.rounds += 1
        ranges = [(part.start, part.end) for part in parts]
        losses, pending, payloads = [], [], []
        for peer_id in members:
            losses.append(self._compute(peer_id))
            optimizer = self._members[peer_id].optimizer
            pending.append(optimizer.accumulate_and_select())
            optimizer.zero_grad(set_to_none=True)
            payloads.append(optimizer.payloads(pending[-1], ranges))
        for number, sent in self._forge(self.rounds, [of.sent for of in pending]).items():
            payloads[number] = tuple(wire.encode_contribution(sent.cut(*part), self.codec) for part in ranges)
        weights = [self._weights(peer_id) for peer_id in members]
        replies = [
            self._reduce(part, weights, [of[number] for of in payloads], standing) for number, part in enumerate(parts)
        ]
        contents: list[PartReply] = [
            (part.start, part.end, decoded.reply(data, self.codec, part.start, part.end, len(members)))
            for part, data in zip(parts, replies, strict=True)
        ]
        config = self.manifest.optimizer
        self._replicated.apply(contents, config.outer_learning_rate if config.gathers_way else self._rate())
        for number, peer_id in enumerate(members):
            self._members[peer_id].optimizer.settle(pending[number], contents, number)
        return Round(float(np.mean(losses)), tuple(replies), _sent_bytes(parts, payloads, replies))

    def _rate(self) -> float:
        config = self.manifest.optimizer
        return learning_rate(
            self.rounds,
            peak=config.learning_rate,
            warmup_rounds=config.warmup_rounds,
            total_rounds=config.total_rounds,
            final_fraction=config.final_fraction,
        )

    def _compute(self, peer_id: bytes) -> float:
        """A member's part of the round; the mean loss."""
        if peer_id not in self._members:
            made = build_optimizer(self.model, self.manifest), build_local(self.model, self.manifest)
            self._members[peer_id] = _Member(*made)
        member, tokens, rules = self._members[peer_id], self._text(peer_id), self.manifest.round
        nonce, context = bytes.fromhex(self.manifest.nonce), self.manifest.model.context
        nats: list[float] = []
        sequences = self._sequences(peer_id)
        size = min(rules.micro_batch, sequences)
        while len(nats) * size < sequences:
            offsets = sequence_offsets(nonce, peer_id, member.sequences_read, size, len(tokens), context)
            batch = np.stack([tokens[offset : offset + context + 1] for offset in offsets]).astype(np.int64)
            member.sequences_read += size
            loss = functools.partial(self.model.loss, torch.from_numpy(batch).to(self._device))
            nats.append(member.local.compute(loss, size, self._rate()))
        member.local.gather()
        return float(np.mean(nats))

    def _reduce(self, part: Part, weights: Sequence[int], payloads: Sequence[bytes], standing: Sequence[int]) -> bytes:
        contributions = list(zip(range(len(payloads)), weights, payloads, strict=True))
        return reduce_part(contributions, self.codec, part.start, part.end, len(payloads), standing)


def _sent_bytes(parts: Sequence[Part], payloads: Sequence[Sequence[bytes]], replies: Sequence[bytes]) -> float:
    """A contribution goes to its part's reducer and a reply to all others; what stays at home is not sent."""
    sent = 0
    for number, part in enumerate(parts):
        sent += sum(len(of[number]) for member, of in enumerate(payloads) if member != part.reducer)
        sent += len(replies[number]) * (len(payloads) - 1)
    return sent / len(payloads)
