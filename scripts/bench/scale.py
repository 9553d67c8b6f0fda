"""What a round costs with 8 to 256 members: bytes, messages and seconds, by the real protocol on modelled lines.

    python scripts/bench/scale.py --out docs/results/scale.json --picture docs/pictures/scale.png

Real driver, machine, messages, codec, reducing, seals and journal on a virtual clock; only the model and its gradients
are made up (coefficients at random places, of a model of 10 million parameters). All peers are members from the start,
with lines of --uplink both ways and --delay one way. Payload is the indices, scales and values of contributions and
replies; headers are all else: of payloads and messages, hashes, seals, news, 9 bytes a frame. What libp2p, TCP and IP
add is not in it. Takes about half an hour for all four sizes on one core; prints one JSON object last.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import hashlib
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from google.protobuf.wrappers_pb2 import BytesValue
from lab.report import Watch, finish, machine, note, pyplot, save

from p2ptrain.calls.messages import Traffic
from p2ptrain.calls.uplink import UplinkMeter
from p2ptrain.chain import ChainState, Member, Row
from p2ptrain.compression import wire
from p2ptrain.compression.codec import Codec
from p2ptrain.config.home import Home
from p2ptrain.config.manifest import Manifest, ModelConfig, RoundConfig, canonical_bytes, run_id
from p2ptrain.optim import reference
from p2ptrain.peer.assembly import Run, driver_parts
from p2ptrain.peer.driver import RoundDriver
from p2ptrain.rounds.events import Apply, ContributionReady, StartRound
from p2ptrain.rounds.inbox import Dropped
from p2ptrain.simulation.loop import Actor, VirtualLoop
from p2ptrain.simulation.network import Line, Network, SimNode
from p2ptrain.simulation.toy import identity_of
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import OwnEntry, OwnLog
from p2ptrain.swarm.identity import verify
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.training.replica import Replica

COMPUTE_SECONDS = 5.0
FIRST_ROUND = 10
WARM_UP_ROUNDS = 2
SIZES = (8, 16, 64, 256)


class CountedTraffic(Traffic):
    """Tells payload from the rest."""

    payload: int = 0

    def blob(self, data: bytes, *, pieces: int = 1) -> Iterator[BytesValue]:
        self.payload += len(data) - wire.header_bytes(data)
        yield from super().blob(data, pieces=pieces)


@dataclass(frozen=True)
class Beginning:
    """Where every member begins, in place of a replica."""

    codec: Codec
    chain: ChainState
    snapshot_max_bytes = 1

    def snapshot_chain(self, data: bytes) -> ChainState:
        """Return the beginning: nobody fetches a snapshot here."""
        return self.chain


class ScalePeer:
    """One member: all of a peer but its trainer."""

    def __init__(self, swarm: Scale, number: int) -> None:
        self.swarm, self.number = swarm, number
        self.identity = identity_of(f"p{number}", 1)
        home = swarm.folder / str(number)
        for name in ("journal", "own", "checkpoints"):
            (home / name).mkdir(parents=True)
        self.home = home
        self.traffic = CountedTraffic()
        self.uplink = UplinkMeter(dialable=True)
        #: round -> when it was applied here
        self.applied: dict[int, float] = {}
        self.included = 0

    def start(self, state: ChainState) -> None:
        """Begin, as a member."""
        swarm = self.swarm
        self.actor = Actor(swarm.loop)
        node = SimNode(swarm.network, self.identity, self.actor, Line(swarm.rate, swarm.rate), dialable=True)
        swarm.network.add(node)
        self.journal = Journal(self.home / "journal", swarm.run_id, verify)
        self.journal.restart_at(state.id)
        parts = driver_parts(
            Run(swarm.manifest, swarm.run_id, signed=b"", founder=False),
            Home(self.home),
            cast(SwarmNode, node),
            Beginning(swarm.codec, state),
            journal=self.journal,
            own_log=OwnLog(self.home / "own"),
            inbox=self,
            uplink=self.uplink,
            traffic=self.traffic,
        )
        self.driver = RoundDriver(parts)
        self.actor.spawn(self._live())

    async def _live(self) -> None:
        await self.driver.start()
        self.driver.follow_members()

    # ---- the trainer's queue, and what a trainer would do ------------------------------------------------------

    def put(self, message: Any, /) -> None:
        """From the driver."""
        match message:
            case StartRound():
                # Nobody takes exactly as long as the others.
                seconds = message.seconds * self.swarm.random.uniform(0.95, 1.0)
                self.swarm.loop.call_later(seconds, self._contribute, message, context=self.actor.context)
            case Apply():
                self.applied[message.sealed.seal.round] = self.swarm.loop.time()
                self.included += message.contributed
                self.journal.prune(message.sealed.seal.round - 2)
            case Dropped():
                self.swarm.counted["dropped"] += 1
            case _:
                self.swarm.counted[type(message).__name__] += 1

    def _contribute(self, start: StartRound) -> None:
        chosen = self.swarm.coefficients(self.number)
        ranges = tuple((part.start, part.end) for part in start.shape.parts)
        payloads = tuple(wire.encode_contribution(chosen.cut(*piece), self.swarm.codec) for piece in ranges)
        row = Row(16, 3200, self.swarm.kbit)
        entry = OwnEntry(start.key.round, start.key.base, row, ranges, payloads, start.key.round, 0)
        self.driver.contribute(ContributionReady(start.key, row, payloads), entry)


class Scale:
    """One swarm of so many members, through some rounds."""

    def __init__(self, members: int, kbit: int, delay_seconds: float, folder: Path) -> None:
        self.folder, self.kbit = folder, kbit
        self.rate = kbit * 125.0
        self.random = random.Random(1)
        self.manifest = Manifest(
            name="scale",
            nonce="0123456789abcdef" * 2,
            model=ModelConfig(layers=10, heads=4, embedding=256, context=256),
            round=RoundConfig(min_seconds=COMPUTE_SECONDS, max_seconds=COMPUTE_SECONDS, root_interval=1000),
        )
        self.run_id = run_id(canonical_bytes(self.manifest))
        self.codec: Codec = Replica(self.manifest, self.run_id, torch.device("cpu")).codec
        self.loop = VirtualLoop()
        self.network = Network(self.loop, random.Random(2), delay_seconds=delay_seconds, jitter_seconds=0.01)
        self.counted: Counter[str] = Counter()
        self.peers = [ScalePeer(self, number) for number in range(members)]
        self._marks: dict[str, tuple[int, ...]] = {}

    @functools.cache  # noqa: B019
    def coefficients(self, number: int) -> wire.Coefficients:
        """What a peer sends in every round: as many as the codec's top-k, anywhere, quantised."""
        chance = np.random.default_rng(number)
        topk = self.codec.topk
        index = np.concatenate([np.sort(chance.choice(4096, k, replace=False)) for k in topk])
        chunk = np.repeat(np.arange(len(topk)), topk)
        value = [reference.quantise(chance.standard_normal(k).astype(np.float32), self.codec.value_bits) for k in topk]
        return wire.Coefficients(0, len(topk), chunk, index, np.concatenate(value))

    def run(self, rounds: int) -> dict[str, Any]:
        """Figures of the rounds after the warm-up."""
        members = tuple(
            Member(peer.identity.peer_id, Row(16, 3200, self.kbit), absent=0, included=True) for peer in self.peers
        )
        members = tuple(sorted(members, key=lambda member: member.peer_id))
        parent, head = (hashlib.sha256(word).digest() for word in (b"parent", b"head"))
        state = ChainState(self.run_id, FIRST_ROUND, head, parent, FIRST_ROUND * len(members), members, members)
        for peer in self.peers:
            peer.start(state)
        first, last = FIRST_ROUND + WARM_UP_ROUNDS, FIRST_ROUND + WARM_UP_ROUNDS + rounds
        asyncio.set_event_loop(self.loop)
        began = time.monotonic()
        self.loop.run_until_complete(self._reach(first))
        before = self._totals()
        self.loop.run_until_complete(self._reach(last))
        after = self._totals()
        asyncio.set_event_loop(None)
        if self.loop.faults:
            raise SystemExit(f"a fault: {self.loop.faults[0]!r}")
        return self._figures(rounds, first, last, before, after, time.monotonic() - began)

    async def _reach(self, round: int) -> None:
        """Until all have applied it."""
        while not all(round in peer.applied for peer in self.peers):
            await asyncio.sleep(0.25)
            done = sum(round in peer.applied for peer in self.peers)
            if self.loop.time() > 600.0:
                raise SystemExit(f"{len(self.peers)} members: {done} have round {round} after ten minutes")

    def _totals(self) -> tuple[list[int], list[int], list[int]]:
        ids = [peer.identity.peer_id for peer in self.peers]
        sent, frames = self.network.bytes_sent, self.network.frames_sent
        return [p.traffic.payload for p in self.peers], [sent.get(i, 0) for i in ids], [frames.get(i, 0) for i in ids]

    def _figures(
        self, rounds: int, first: int, last: int, before: Any, after: Any, wall_seconds: float
    ) -> dict[str, Any]:
        payload, sent, frames = (
            [(b - a) / rounds for a, b in zip(then, now, strict=True)] for then, now in zip(before, after, strict=True)
        )
        headers = [s - p for s, p in zip(sent, payload, strict=True)]
        lengths = [(peer.applied[last] - peer.applied[first]) / rounds for peer in self.peers]
        spread = [
            max(p.applied[n] for p in self.peers) - min(p.applied[n] for p in self.peers)
            for n in range(first, last + 1)
        ]
        heads = {peer.driver.machine.head.id for peer in self.peers if peer.driver.machine.head.round == last}
        return {
            "members": len(self.peers),
            "rounds": rounds,
            "payload_bytes_sent_per_peer_per_round": round(statistics.mean(payload)),
            "payload_bytes_most": round(max(payload)),
            "header_bytes_sent_per_peer_per_round": round(statistics.mean(headers)),
            "header_bytes_most": round(max(headers)),
            "messages_sent_per_peer_per_round": round(statistics.mean(frames), 1),
            "round_seconds": round(statistics.median(lengths), 3),
            "exchange_seconds": round(statistics.median(lengths) - COMPUTE_SECONDS, 3),
            "seconds_from_first_to_last_peer": round(statistics.median(spread), 3),
            "included_share": round(
                sum(p.included for p in self.peers) / len(self.peers) / (rounds + WARM_UP_ROUNDS), 4
            ),
            "tips": len(heads),
            "counted": dict(self.counted),
            "wall_seconds": round(wall_seconds, 1),
        }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes and seconds by members."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4))
    members = [row["members"] for row in rows]
    left.plot(members, [row["payload_bytes_sent_per_peer_per_round"] / 1000 for row in rows], "o-", label="payload")
    left.plot(members, [row["header_bytes_sent_per_peer_per_round"] / 1000 for row in rows], "s--", label="headers")
    left.set(ylabel="kB sent per peer and round", title="Bytes")
    left.legend()
    right.plot(members, [row["exchange_seconds"] for row in rows], "o-")
    right.set(ylabel="s beside computing", title="Seconds of exchange in a round")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(members, [str(count) for count in members])
        axes.set_xlabel("members")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    save(figure, path)


def main() -> int:
    """All sizes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--members", type=lambda text: [int(n) for n in text.split(",")], default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--uplink-mbit", type=float, default=10.0)
    parser.add_argument("--delay-ms", type=float, default=80.0, help="one way, on average")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    watch = Watch()
    rows: list[dict[str, Any]] = []
    parameters = 0
    for members in options.members:
        folder = Path(tempfile.mkdtemp(prefix="p2ptrain-scale-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        try:
            scale = Scale(members, round(1000 * options.uplink_mbit), options.delay_ms / 1000, folder)
            parameters = scale.manifest.model.parameters
            rows.append(scale.run(options.rounds))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        note(json.dumps(rows[-1]))
    report = {
        **machine(),
        "parameters": parameters,
        "uplink_mbit": options.uplink_mbit,
        "delay_ms": options.delay_ms,
        "compute_seconds": COMPUTE_SECONDS,
        "sizes": rows,
        **watch.figures(),
    }
    if options.picture is not None:
        draw(rows, options.picture)
    finish(options.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
