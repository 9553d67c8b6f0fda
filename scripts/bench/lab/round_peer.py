"""One whole p2ptrain peer, whose gradients are noise and whose rounds wait for a word: for bench/round.py.

    python scripts/bench/lab/round_peer.py --home DIR --host IP (--manifest run.toml | --join ADDRESS)

Session, trainer, driver, machine, journal, codec and sockets are those of `p2ptrain join`. Of the model only the loss
is replaced: it gives each parameter normal noise as its gradient. A contribution that is accumulated, selected and
encoded is held back until stdin says when to hand it over, so that all peers do so at one moment of the machine's clock
and nothing else runs meanwhile. On stdout, a JSON object a line: `ready` with a round's number when its contribution is
held back; after the round's step, when what happened, in seconds of time.monotonic, which all processes share. On
stdin: `go SECONDS`, `hello` (how long unary calls to another member take), `stop`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import queue
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import psutil
import torch
from lab.lines import counted_here
from lab.report import say
from torch import Tensor

from p2ptrain.calls.client import hello
from p2ptrain.chain import bits
from p2ptrain.cli.output import set_up_logging
from p2ptrain.compression import wire
from p2ptrain.config.loading import load_manifest
from p2ptrain.config.manifest import TOKENIZER_VOCABULARY
from p2ptrain.config.node import resolve_settings
from p2ptrain.data.text import Part, Text
from p2ptrain.data.tokenizer import shipped_tokenizer
from p2ptrain.models.gpt import GPT
from p2ptrain.peer.assembly import Make
from p2ptrain.peer.driver import RoundDriver
from p2ptrain.peer.progress import Display
from p2ptrain.peer.session import PeerSession
from p2ptrain.rounds.events import Apply, ContributionReady, ContributionReceived, Doubted, Effect, Event, ReplyHeld
from p2ptrain.state.own_log import OwnEntry
from p2ptrain.training.trainer import Swarm, Trainer

HELLOS = 20
NOISE = Part(np.zeros(10_000, np.uint16), 35_000)
"""Nothing of this text is looked at, but a peer wants one."""


class NoisyGPT(GPT):
    """A model that computes nothing."""

    def loss(self, tokens: Tensor, counted: object = None) -> Tensor:
        """A constant; the gradients are there already."""
        for parameter in self.parameters():
            noise = torch.randn_like(parameter)
            parameter.grad = noise if parameter.grad is None else parameter.grad.add_(noise)
        return torch.ones((), requires_grad=True)


class StampedQueue(queue.SimpleQueue[Any]):
    """The trainer's queue; knows when each sealed round was put into it."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, float] = {}

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if isinstance(item, Apply):
            self.held[item.sealed.seal.round] = time.monotonic()
        super().put(item)


class GatedTrainer(Trainer):
    """Holds each contribution back until it is told to hand it over, and times what it does."""

    gate: Gate

    def __init__(self, session: PeerSession, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._session = session

    def run(self, swarm: Swarm, after_round: Callable[[], bool]) -> None:
        self.gate = Gate(self._session, swarm, self._peer_id, self._inbox)
        optimizer, timed = self.replica.optimizer, self.gate.timed
        for of, name, stage in (
            (optimizer, "accumulate_and_select", "accumulate_and_select"),
            (optimizer, "payloads", "encode"),
            (self.replica, "apply", "apply"),
            (self.ledger, "settle", "settle"),
        ):
            setattr(of, name, timed(stage, getattr(of, name)))
        super().run(self.gate, after_round)

    def take(self, message: Any, swarm: Swarm) -> None:
        if isinstance(message, Apply):
            self.gate.before_step()
        super().take(message, swarm)
        if isinstance(message, Apply):
            self.gate.after_step(message)


class Gate:
    """What a trainer tells the network thread passes through here."""

    def __init__(self, session: PeerSession, swarm: Any, me: bytes, inbox: Any) -> None:
        self._session, self._swarm, self._me, self._inbox = session, swarm, me, inbox
        self._driver: RoundDriver = swarm.driver
        self._stages: dict[str, list[float]] = {}
        self._daemon = next(c for c in psutil.Process().children(recursive=True) if c.name().startswith("p2pd"))
        #: of the round under way
        self._round: dict[str, Any] = {}
        self._marks: dict[str, float] = {}
        self._cpu_before = 0.0
        machine = self._driver.machine
        handle = machine.handle

        def marking(event: Event, now: float) -> list[Effect]:
            match event:
                case ContributionReceived():
                    self._marks["contributions"] = time.monotonic()
                case ReplyHeld():
                    # Those that came from elsewhere come later, or are all there is.
                    self._marks.setdefault("first_reply", time.monotonic())
                    self._marks["replies"] = time.monotonic()
            return handle(event, now)

        machine.handle = marking

    def timed(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, its wall and core seconds noted under `stage`."""

        @functools.wraps(work)
        def measured(*arguments: Any, **options: Any) -> Any:
            wall, core = time.monotonic(), time.thread_time()
            try:
                return work(*arguments, **options)
            finally:
                spent = self._stages.setdefault(stage, [0.0, 0.0])
                spent[0] += time.monotonic() - wall
                spent[1] += time.thread_time() - core

        return measured

    # ---- the trainer's swarm ----------------------------------------------------------------------------------

    def root_computed(self, round: int, id: bytes, root: bytes) -> None:
        """Passed on."""
        self._swarm.root_computed(round, id, root)

    def doubt(self, doubted: Doubted) -> None:
        """Passed on."""
        self._swarm.doubt(doubted)

    def prune_own_log(self, before: int) -> None:
        """Passed on."""
        self._swarm.prune_own_log(before)

    def contribute(self, ready: ContributionReady, entry: OwnEntry) -> None:
        """Passed on at the moment that stdin says."""
        shape = self._driver.machine.shape
        members = len(shape.members) if shape is not None else 0
        say(ready=ready.key.round, members=members, line=counted_here())
        while True:
            word, *rest = sys.stdin.readline().split() or ["stop"]
            match word:
                case "hello":
                    say(unary_seconds=self._hellos())
                case "go":
                    break
                case _:
                    self._inbox.put(None)
                    return
        at = float(rest[0])
        time.sleep(max(0.0, at - time.monotonic()))
        reducers = [part.reducer for part in shape.parts] if shape is not None else []
        me = shape.index(self._me) if shape is not None else None
        mine = [data for data, reducer in zip(ready.payloads, reducers, strict=True) if reducer != me]
        self._round = {
            "late_seconds": time.monotonic() - at,
            "line": counted_here(),
            "contribution_bytes": sum(map(len, ready.payloads)),
            "payload_sent": sum(len(data) - wire.header_bytes(data) for data in mine),
        }
        self._marks.clear()
        self._cpu_before = self._core_seconds()
        self._swarm.contribute(ready, entry)

    def _hellos(self) -> list[float]:
        shape, network = self._driver.machine.shape, self._session.network
        others = [m.peer_id for m in shape.members if m.peer_id != self._me] if shape else []
        seconds = []
        for peer in others[:1] * HELLOS:
            began = time.monotonic()
            network.run(hello(self._session.node, peer))
            seconds.append(time.monotonic() - began)
        return seconds

    # ---- steps ------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """A sealed round is there."""
        if self._round:
            self._round["exchange_core_seconds"] = self._core_seconds() - self._cpu_before

    def after_step(self, message: Apply) -> None:
        """And its step was taken."""
        sealed, shape, index = message.sealed, message.shape, message.index
        if self._round and index is not None:
            for part, data in zip(shape.parts, sealed.replies, strict=True):
                if part.reducer == index and data is not None:
                    self._round["payload_sent"] += (len(shape.members) - 1) * (len(data) - wire.header_bytes(data))
            say(
                round=sealed.seal.round,
                members=len(shape.members),
                included=len(bits(sealed.seal.included, len(shape.members))),
                parts=len(shape.parts),
                share=sum(part.end - part.start for part in shape.parts if part.reducer == index) / shape.parts[-1].end,
                skipped=sum(data is None for data in sealed.replies),
                sealer=sealed.seal.sealer == self._me,
                state=sealed.id.hex(),
                held=self._inbox.held[sealed.seal.round],
                marks=self._marks,
                stages=self._stages,
                traffic=(self._driver.standing.bytes_sent_per_round, self._driver.standing.bytes_received_per_round),
                **self._round,
            )
        self._round, self._stages = {}, {}
        self._inbox.held.clear()

    def _core_seconds(self) -> float:
        used = self._daemon.cpu_times()
        return time.process_time() + used.user + used.system


@contextlib.contextmanager
def gated_session(options: argparse.Namespace) -> Iterator[PeerSession]:
    """A session whose trainer is gated."""
    settings = resolve_settings(options.home, {"host": options.host, "threads": 1, "device": "cpu"})

    def trainer(*arguments: Any) -> GatedTrainer:
        return GatedTrainer(peer, *arguments)

    with PeerSession(settings, Display(quiet=True), None, Make(trainer, NoisyGPT, StampedQueue)) as peer:
        yield peer


def main() -> None:
    """Until stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--host", required=True, help="address to listen on")
    parser.add_argument("--manifest", type=Path, help="begin this run")
    parser.add_argument("--join", action="append", default=[], help="address of a peer of the run to join")
    options = parser.parse_args()
    set_up_logging(1, False, "text")
    torch.seed()
    with gated_session(options) as peer:
        peer.connect(options.join)
        run = peer.found_run(load_manifest(options.manifest)) if options.manifest else peer.find_run(options.join, None)
        peer.enter_run(run)
        peer.train(run, Text(NOISE, NOISE, shipped_tokenizer, TOKENIZER_VOCABULARY), None)


if __name__ == "__main__":
    main()
