"""Steps to a loss, without any network: AdamW on the mean gradient of the peers, and DeMo with as many members.

hivemind's Optimizer (no local updates, no delays) and DDP both take AdamW's step on the mean gradient of all peers, so
one curve serves both; the rounding of gradients to 16 bits on their way is left out, in their favour. p2ptrain's curve
goes through its own accumulate, select, payload, reduce_part, decode, apply and settle, with a momentum for each member
and a part for each reducer; every bit of the exchange is the product's, only sockets are missing. With overlap, some of
a member's sequences are computed before the step of the last round is taken, those that are under way or done when its
seal arrives: `stale` of them, the first of each round.

All methods read the same sequences, start from the same parameters and have the manifest's schedule, a cosine over so
many steps as are trained at most: what reaches the loss before its end would reach it sooner with a shorter one.

A step of the 10M-parameter model on 16 sequences of 128 tokens takes about 1.3 s of one core, half a second more with
DeMo and 4 members. A run ends a little below the loss asked for, or once it is far behind another learning rate of the
same method. Runs in the file of curves are kept and not repeated.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from lab.report import note, read, write
from numpy.typing import NDArray
from torch import Tensor

from p2ptrain.compression import decoded
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.config import strategies
from p2ptrain.config.manifest import Manifest
from p2ptrain.data.assignment import sequence_offsets
from p2ptrain.data.corpus import load_embedded
from p2ptrain.data.tokenizer import cached_tokens
from p2ptrain.models.gpt import GPT
from p2ptrain.models.init import initialise
from p2ptrain.optim.demo import DeMo
from p2ptrain.optim.schedule import learning_rate
from p2ptrain.optim.settling import PartReply, Pending
from p2ptrain.training.evaluation import bits_per_byte, compressors_bits_per_byte
from p2ptrain.training.replica import build_optimizer

MEMBERS = 4
EVALUATE_EVERY = 10
EVALUATION_TOKENS = 8192
BEHIND_BITS_PER_BYTE = 0.1
BEHIND_FROM_STEP = 60
"""A run that is so far behind another of its method, after so many steps, is given up."""
ADAMW_BETAS = (0.9, 0.95)
STEPS = 250
MANIFEST = msgspec.convert(
    strategies.completed(
        {
            "name": "time to loss",
            "nonce": "0123456789abcdef" * 2,
            "model": {"layers": 6, "heads": 5, "embedding": 320, "context": 128},
            "optimizer": {"total_rounds": STEPS},
        }
    ),
    Manifest,
)
"""The GPT of 10 million parameters; of the rest, what a new run gets."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One training run."""

    method: str
    """`adamw` or `demo`."""
    learning_rate: float
    """Peak."""
    stale: int = 0
    """Sequences of each member and round that are computed before the step of the round before."""


RATE = MANIFEST.optimizer.learning_rate
SETTINGS = (
    # Of each method that which does best first: the others then end early.
    Setting("adamw", 4e-3),
    Setting("demo", RATE),
    *(Setting("adamw", rate) for rate in (2e-3, 8e-3)),
    *(Setting("demo", rate) for rate in (RATE / 2, 2 * RATE)),
    *(Setting("demo", RATE, stale) for stale in (2, 3)),
)


@dataclass(frozen=True, slots=True)
class Text:
    """The embedded corpus as tokens."""

    train: NDArray[np.uint16]
    heldout: NDArray[np.uint16]
    heldout_bytes: int

    @classmethod
    def load(cls, folder: Path) -> Text:
        """From the package, or from tokens kept in `folder`."""
        corpus = load_embedded()
        folder.mkdir(parents=True, exist_ok=True)
        return cls(cached_tokens(corpus.train, folder), cached_tokens(corpus.heldout, folder), len(corpus.heldout))

    def batch(self, member: int, count: int, sequences: int) -> Tensor:
        """What a member reads after `count` sequences [sequences, context + 1]."""
        context = MANIFEST.model.context
        nonce, name = bytes.fromhex(MANIFEST.nonce), f"member {member}".encode()
        offsets = sequence_offsets(nonce, name, count, sequences, len(self.train), context)
        return torch.from_numpy(np.stack([self.train[o : o + context + 1] for o in offsets]).astype(np.int64))

    def marks(self) -> dict[str, float]:
        """Bits per byte of the held-out text without a model worth the name."""
        counts = np.bincount(self.train, minlength=MANIFEST.model.vocabulary) + 1
        unigram = -np.log2((counts / counts.sum())[self.heldout]).sum() / self.heldout_bytes
        return {"unigram": float(unigram), **compressors_bits_per_byte(load_embedded().heldout)}


def sequences_per_member() -> int:
    """A round's batch, shared out."""
    return MANIFEST.round.target_batch // MEMBERS


class AdamW:
    """Data-parallel AdamW: the gradient of the mean loss over all members' sequences."""

    def __init__(self, model: GPT) -> None:
        self._model = model
        self._optimizer = torch.optim.AdamW(model.parameters(), betas=ADAMW_BETAS, weight_decay=0.0)

    def step(self, batches: list[Tensor], rate: float) -> float:
        """Returns the mean loss in nats."""
        loss = self._model.loss(torch.cat(batches))
        loss.backward()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


class Members:
    """DeMo with a momentum for each member, over one replica."""

    def __init__(self, model: GPT, setting: Setting) -> None:
        optimizer = msgspec.structs.replace(MANIFEST.optimizer, learning_rate=setting.learning_rate)
        manifest = msgspec.structs.replace(MANIFEST, optimizer=optimizer)
        self._model, self._stale = model, setting.stale
        self._optimizers: list[DeMo] = [build_optimizer(model, manifest) for _ in range(MEMBERS)]
        #: sealed and not applied yet: contributions and replies
        self._sealed: tuple[list[Pending], list[PartReply]] | None = None
        edges = np.linspace(0, self._optimizers[0].layout.chunks, MEMBERS + 1).astype(int).tolist()
        self._parts = list(itertools.pairwise(edges))

    def step(self, batches: list[Tensor], rate: float) -> float:
        """One round; returns the mean loss in nats."""
        losses = [0.0] * MEMBERS
        gradients: list[list[Tensor | None]] = [[] for _ in range(MEMBERS)]
        for ahead in (True, False):
            if not ahead:
                self._apply(rate)
            for member, batch in enumerate(batches):
                part = batch[: self._stale] if ahead else batch[self._stale :]
                if len(part):
                    share = len(part) / len(batch)
                    losses[member] += share * self._gradient(part, share, gradients[member])
        pending = []
        for optimizer, gradient in zip(self._optimizers, gradients, strict=True):
            for parameter, one in zip(self._model.parameters(), gradient, strict=True):
                parameter.grad = one
            pending.append(optimizer.accumulate_and_select())
        self._model.zero_grad(set_to_none=True)
        self._sealed = pending, [self._reduce(pending, *part) for part in self._parts]
        if not self._stale:
            self._apply(rate)
        return sum(losses) / len(losses)

    def _gradient(self, batch: Tensor, share: float, into: list[Tensor | None]) -> float:
        """Add `share` times the mean gradient of a batch to `into`; returns the loss."""
        loss = self._model.loss(batch)
        (share * loss).backward()
        gradients = [parameter.grad for parameter in self._model.parameters()]
        into[:] = [a if b is None else b + a for a, b in itertools.zip_longest(gradients, into)]  # type: ignore[operator]
        self._model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _reduce(self, pending: list[Pending], start: int, end: int) -> PartReply:
        codec, weight = self._optimizers[0].codec, sequences_per_member()
        payloads = [o.payloads(p, [(start, end)])[0] for o, p in zip(self._optimizers, pending, strict=True)]
        contributions = [(member, weight, payload) for member, payload in enumerate(payloads)]
        reply = reduce_part(contributions, codec, start, end, MEMBERS)
        return start, end, decoded.reply(reply, codec, start, end, MEMBERS)

    def _apply(self, rate: float) -> None:
        if self._sealed is None:
            return
        pending, replies = self._sealed
        self._optimizers[0].apply(replies, rate)
        for member, (optimizer, sent) in enumerate(zip(self._optimizers, pending, strict=True)):
            optimizer.settle(sent, replies, member)
        self._sealed = None


def train(setting: Setting, cache: Path, stop_below: float, path: Path) -> dict[str, Any]:
    """One run: held-out bits per byte by step.

    Args:
        cache: folder of tokens.
        stop_below: bits per byte at which it ends, where it stays below.
        path: file of curves, those not to be far behind among them.
    """
    torch.set_num_threads(1)
    alike = [run for run in read(path)["runs"] if (run["method"], run["stale"]) == (setting.method, setting.stale)]
    others = [dict(run["heldout_bits_per_byte"]) for run in alike]
    text, model = Text.load(cache), GPT(MANIFEST.model)
    initialise(model, bytes.fromhex(MANIFEST.nonce))
    trainer = AdamW(model) if setting.method == "adamw" else Members(model, setting)
    schedule, count = MANIFEST.optimizer, sequences_per_member()
    curve: list[tuple[int, float]] = []
    began = time.process_time()
    for step in range(STEPS + 1):
        if step % EVALUATE_EVERY == 0:
            bits = bits_per_byte(model, text.heldout, text.heldout_bytes, max_tokens=EVALUATION_TOKENS)
            curve.append((step, round(bits, 4)))
            note(f"{setting}: step {step}: {bits:.4f} bits per byte")
            if len(curve) > 1 and max(bits for _, bits in curve[-2:]) < stop_below:
                break
            best = min((other.get(step, math.inf) for other in others), default=math.inf)
            if step >= BEHIND_FROM_STEP and bits > best + BEHIND_BITS_PER_BYTE:
                break
        rate = learning_rate(
            step,
            peak=setting.learning_rate,
            warmup_rounds=schedule.warmup_rounds,
            total_rounds=schedule.total_rounds,
            final_fraction=schedule.final_fraction,
        )
        trainer.step([text.batch(member, step * count, count) for member in range(MEMBERS)], rate)
    return {**asdict(setting), "heldout_bits_per_byte": curve, "cpu_seconds": round(time.process_time() - began)}


def steps_to(curve: list[tuple[int, float]], bits: float) -> float | None:
    """The step at which a curve first is at `bits`, on the line between two evaluations; None: never."""
    for (before, above), (after, below) in itertools.pairwise(curve):
        if below <= bits:
            return before + (after - before) * (above - bits) / max(above - below, 1e-9)
    return None


def curves(path: Path, cache: Path, stop_below: float, jobs: int) -> dict[str, Any]:
    """All runs, those in the file at `path` as they are, the others trained, `jobs` at once, and added to it."""
    setup = {
        "parameters": MANIFEST.model.parameters,
        "members": MEMBERS,
        "sequences_per_member": sequences_per_member(),
        "evaluation_tokens": EVALUATION_TOKENS,
        # As it comes back from the file: a tuple would not.
        "manifest": json.loads(msgspec.json.encode(MANIFEST)),
    }
    known = read(path) or {}
    if known.get("setup") != setup:
        known = {"setup": setup, "marks_bits_per_byte": Text.load(cache).marks(), "runs": []}
        write(path, known)
    made = [{key: run[key] for key in Setting.__slots__} for run in known["runs"]]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        runs = [
            pool.submit(train, setting, cache, stop_below, path) for setting in SETTINGS if asdict(setting) not in made
        ]
        for run in as_completed(runs):
            known["runs"].append(run.result())
            write(path, known)
    return known
