"""A hostile process: it connects to honest peers, waits for a word, and does what its attack does until another word.

    python scripts/attacks/hostile.py --attack NAME --seed S --folder FOLDER --peer ADDRESS...

`attack_swarm.py` starts it. On stdin: a line begins the attack, the next one, or the end of the file, ends it. On
stdout, a JSON object a line: `ready` with the ids of its identities once it is prepared, `branch` with ids of seals
that no honest peer may ever hold, `addresses` that a newcomer is told, `did` with what it has done, `finished` when
there is no more to do. An attack knows of honest peers what goes over the wire,
and the rules of a seal, as it has to forge some.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from typing import AsyncIterator as Stream  # noqa: UP035 - hivemind knows a stream by this type alone

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import torch
from attacks.forged import key_from
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2PContext, ServicerBase
from lab.report import say

from p2ptrain.calls.client import Client, hello
from p2ptrain.calls.messages import (
    NAMESPACE,
    TRANSPORT_FAILURES,
    Answer,
    CallError,
    Follow,
    News,
    RoundsHeader,
    RoundsRequest,
    SnapshotOffer,
    Tip,
    Traffic,
    Welcome,
    decode_message,
)
from p2ptrain.chain import SealError
from p2ptrain.chain.sealed import SealedRoundError
from p2ptrain.compression.codec import Codec
from p2ptrain.config.manifest import open_manifest
from p2ptrain.simulation.forged import Branch
from p2ptrain.swarm.addresses import parse_addresses
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import PeerRecord
from p2ptrain.swarm.thread import new_network_loop
from p2ptrain.training.replica import Replica

Stubs = Callable[[bytes], Any]
ROUND_MAX_BYTES = 64 * 1024 * 1024
NEWS_SECONDS = 1.0
CALL_SECONDS = 4.0
PUBLISH_SECONDS = 2.0
FETCH_ATTEMPTS = 5
STREAMED_REQUESTS = ("rpc_contribute", "rpc_prove")
STATE_BYTES = 512 * 1024
"""Of a snapshot's piece."""


class Liar:
    """What a hostile peer answers: as an honest one would that stands on `branch`; attacks change some of it."""

    def __init__(self, branch: Branch) -> None:
        self.branch = branch
        self.traffic = Traffic()
        #: who asked us for rounds, and how often
        self.asked = 0

    def tip(self) -> Tip:
        """Where it says it stands."""
        return self.branch.tip

    async def rounds(self, wanted: RoundsRequest) -> AsyncIterator[BytesValue]:
        """Answer to `rounds`."""
        self.asked += 1
        ancestor, rounds = self.branch.after(wanted.locator)
        yield self.traffic.message(Answer(""))
        yield self.traffic.message(RoundsHeader(ancestor, len(rounds), self.tip(), ()))
        for encoded in rounds:
            for frame in self.traffic.blob(encoded):
                yield frame

    async def snapshot(self, request: bytes) -> AsyncIterator[BytesValue]:
        """Answer to `snapshot`."""
        yield self.traffic.message(Answer("no such snapshot here any more"))

    async def file(self, request: bytes) -> AsyncIterator[BytesValue]:
        """Answer to `file`."""
        yield self.traffic.message(Answer("no such file here"))

    async def hello(self) -> BytesValue:
        """Answer to `hello`: nothing of any use."""
        return self.traffic.message(Answer(""))

    def asked_to_join(self, peer: bytes, request: bytes) -> None:
        """Hear that a peer wants to be admitted."""

    def handed_statements(self, request: bytes) -> None:
        """Hear whom a chain is to let in."""


class PeerServicer(ServicerBase):
    """Answers in the name of a liar; its name and those of its methods are the protocol's."""

    def __init__(self, liar: Liar) -> None:
        self._liar = liar

    async def rpc_hello(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """Say which run this is."""
        return await self._liar.hello()

    async def rpc_join(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """Take a newcomer."""
        self._liar.asked_to_join(context.remote_id.to_bytes(), request.value)
        return self._liar.traffic.message(Answer(""))

    async def rpc_amend(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """Take statements, and pass them on to nobody."""
        self._liar.handed_statements(request.value)
        return self._liar.traffic.message(Answer(""))

    async def rpc_relay(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """Take a seal, and pass it on to nobody."""
        return self._liar.traffic.message(Answer(""))

    async def rpc_contribute(self, stream: Stream[BytesValue], context: P2PContext) -> Stream[BytesValue]:
        """Refuse."""
        yield self._liar.traffic.message(Answer("foreign"))

    async def rpc_follow(self, request: BytesValue, context: P2PContext) -> Stream[BytesValue]:
        """Say a tip each second."""
        decode_message(request.value, Follow)
        yield self._liar.traffic.message(Answer(""))
        while True:
            yield self._liar.traffic.message(News(self._liar.tip(), None, False))
            await asyncio.sleep(NEWS_SECONDS)

    async def rpc_rounds(self, request: BytesValue, context: P2PContext) -> Stream[BytesValue]:
        """Hand out rounds."""
        async for frame in self._liar.rounds(decode_message(request.value, RoundsRequest)):
            yield frame

    async def rpc_snapshot(self, request: BytesValue, context: P2PContext) -> Stream[BytesValue]:
        """Hand out a snapshot."""
        async for frame in self._liar.snapshot(request.value):
            yield frame

    async def rpc_file(self, request: BytesValue, context: P2PContext) -> Stream[BytesValue]:
        """Hand out a file of the run."""
        async for frame in self._liar.file(request.value):
            yield frame

    async def rpc_audit(self, request: BytesValue, context: P2PContext) -> Stream[BytesValue]:
        """Show nothing."""
        yield self._liar.traffic.message(Answer("not here"))

    async def rpc_prove(self, stream: Stream[BytesValue], context: P2PContext) -> Stream[BytesValue]:
        """Know it already."""
        yield self._liar.traffic.message(Answer("known"))


class Hostile:
    """What attacks have in common: a node in the run's network, the run, and chance from the seed."""

    def __init__(
        self, node: SwarmNode, peers: list[str], folder: Path, chance: random.Random, messages: int = 0
    ) -> None:
        self.node, self.folder, self.chance, self.addresses = node, folder, chance, peers
        self.peers = list(parse_addresses(peers))
        #: how many it is to send, where an attack counts them
        self.messages = messages
        self.traffic = Traffic()
        self.run_id = b""
        self.welcome: Welcome
        #: the snapshot that the chain fetched last begins with, and its bytes; None: it begins with the run
        self.fetched: tuple[SnapshotOffer | None, bytes] = None, b""
        self.calls: Client
        #: what the run trains, unless it is not for us
        self.replica: Replica

    @classmethod
    async def connect(cls, peers: list[str], folder: Path, seed: int, messages: int = 0) -> Hostile:
        """Join the DHT of these peers and learn which run they are in."""
        chance = random.Random(seed)
        key_from(chance, folder / "hostile.key")
        node = await SwarmNode.create(folder / "hostile.key", peers)
        self = cls(node, peers, folder, chance, messages)
        for peer in self.peers:
            await node.connect(peer, peers)
        self.welcome = await hello(node, self.peers[0])
        self.run_id = self.welcome.run_id
        if not self.welcome.refusal:
            manifest, _ = open_manifest(self.welcome.manifest, self.run_id)
            self.replica = Replica(manifest, self.run_id, torch.device("cpu"))
        self.calls = Client(node, self.traffic, self.run_id)
        return self

    @property
    def codec(self) -> Codec:
        """What all peers of the run agree on about payloads."""
        return self.replica.codec

    async def fetch(self) -> Branch:
        """The first honest peer's chain, from its beginning or its newest snapshot to its tip. Raises CallError."""
        for attempt in range(FETCH_ATTEMPTS):
            try:
                return await self._fetch(self.peers[0])
            except (CallError, SealedRoundError, SealError):
                # Pruned, or a fork, meanwhile.
                if attempt + 1 == FETCH_ATTEMPTS:
                    raise
        raise AssertionError

    async def _fetch(self, donor: bytes) -> Branch:
        header, encoded = await self.calls.rounds(donor, (self.run_id,), ROUND_MAX_BYTES)
        base = open_manifest(self.welcome.manifest, self.run_id)[0].beginning(self.run_id)
        self.fetched = None, b""
        if not header.ancestor:
            offer = max(header.snapshots, key=lambda one: one.round)
            pieces = []
            for number in range(-(-offer.length // STATE_BYTES)):
                pieces += (await self.calls.snapshot(donor, offer, number, number + 1, timeout_seconds=30.0)).pieces
            self.fetched = offer, b"".join(pieces)
            base = self.replica.snapshot_chain(self.fetched[1])
            header, encoded = await self.calls.rounds(donor, (offer.id,), ROUND_MAX_BYTES)
        branch = Branch(base, self.codec)
        while encoded:
            for one in encoded:
                branch.take(one)
            _, encoded = await self.calls.rounds(donor, (branch.state.id,), ROUND_MAX_BYTES)
        return branch

    async def tip_of(self, peer: bytes) -> Tip:
        """Where an honest peer stands."""
        tip = (await hello(self.node, peer)).tip
        assert tip is not None, "it is of the run, and has us in it"
        return tip

    async def serve(self, liar: Liar) -> None:
        """Answer calls from now on."""
        await self.node.add_servicer(PeerServicer(liar), NAMESPACE)

    async def another_node(self) -> SwarmNode:
        """A node of another identity, connected to all honest peers."""
        key = self.folder / f"visitor-{self.chance.randrange(2**32)}.key"
        key_from(self.chance, key)
        node = await SwarmNode.create(key, self.addresses)
        for peer in self.peers:
            await node.connect(peer, self.addresses)
        return node

    def stub(self, peer: bytes) -> Any:
        """What calls `peer` in our name."""
        return self.node.stub(PeerServicer, peer, NAMESPACE)

    async def send(self, peer: bytes, call: str, *frames: BytesValue, stub: Stubs | None = None) -> bytes | None:
        """Make a call of these frames and return its first answer, if one comes within seconds.

        Args:
            stub: calls in another name than ours.
        """

        async def sent() -> AsyncIterator[BytesValue]:
            for frame in frames:
                yield frame

        with contextlib.suppress(*TRANSPORT_FAILURES):
            async with asyncio.timeout(CALL_SECONDS):
                answers = await getattr((stub or self.stub)(peer), call)(
                    sent() if call in STREAMED_REQUESTS else frames[0]
                )
                if isinstance(answers, BytesValue):
                    return bytes(answers.value)
                try:
                    answer = await anext(answers, None)
                    return None if answer is None else bytes(answer.value)
                finally:
                    await answers.aclose()
        return None

    async def be_found(self, node: SwarmNode, liar: Liar) -> None:
        """Publish what a peer publishes of itself, so that others follow a node; for ever."""
        addresses = await node.join_addresses()
        while True:
            tip = liar.tip()
            record = PeerRecord(
                peer_id=node.peer_id,
                run_id=self.run_id,
                time=time.time(),
                name="mallory",
                state="training",
                role="member",
                round=tip.round,
                state_id=tip.id,
                total=tip.total,
                addresses=addresses,
            )
            await node.publish_peer(record)
            await asyncio.sleep(PUBLISH_SECONDS)

    async def announce(self, tip: Callable[[], Tip]) -> None:
        """Follow all honest peers, which is how they hear of us and of our tip; for ever."""

        async def at(peer: bytes) -> None:
            while True:
                with contextlib.suppress(CallError):
                    async for _ in self.calls.follow(peer, tip()):
                        pass
                await asyncio.sleep(NEWS_SECONDS)

        async with asyncio.TaskGroup() as group:
            for peer in self.peers:
                group.create_task(at(peer))


class Attack:
    """One attack. `options` are what its name in the list adds to its class."""

    #: it goes on to live with the honest peers when its attack is over
    stays = False

    def __init__(self, hostile: Hostile, **options: int | str) -> None:
        self.hostile, self.options = hostile, options

    async def prepare(self) -> list[bytes]:
        """Do what is to be done before the attack begins; returns the ids of all identities that are hostile."""
        return [self.hostile.node.peer_id]

    async def run(self) -> None:
        """Attack until cancelled."""

    async def close(self) -> None:
        """End what was started."""


def confess(branch: list[bytes]) -> None:
    """Tell the one who measures by what a takeover is known."""
    for start in range(0, len(branch), 500):
        say(branch=[identifier.hex() for identifier in branch[start : start + 500]])


async def attack(options: argparse.Namespace) -> None:
    """From connecting to the end."""
    from attacks.catalogue import ATTACKS

    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        while True:
            line = sys.stdin.readline()
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(lines.put_nowait, line)
            if not line:
                return

    threading.Thread(target=read, daemon=True).start()
    hostile = await Hostile.connect(options.peer, options.folder, options.seed, options.messages)
    spec = ATTACKS[options.attack]
    chosen = spec.kind(hostile, **spec.options)
    try:
        identities = await chosen.prepare()
        say(ready=[identity.hex() for identity in identities])
        if await lines.get():
            work = asyncio.create_task(chosen.run())
            stop = asyncio.create_task(lines.get())
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                say(finished=True)
                await stop
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            while chosen.stays and await lines.get():
                pass
    finally:
        await chosen.close()
        await hostile.node.close()


def main() -> None:
    """Until stdin says so."""
    # Imported under its own name, so that attacks in other files find these very classes.
    from attacks import hostile

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--attack", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for its keys and logs")
    parser.add_argument("--messages", type=int, default=0, help="to send, where the attack counts them")
    parser.add_argument("--peer", action="append", required=True, help="full address of an honest peer")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with asyncio.Runner(loop_factory=new_network_loop) as runner:
        runner.run(hostile.attack(parser.parse_args()))


if __name__ == "__main__":
    main()
