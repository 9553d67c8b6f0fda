"""Real processes: in a run with a list, who is not on it reads nothing, by calls or in the DHT, and is told why."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

sys.path.insert(0, str(Path(__file__).parent))

from peers import Swarm, run
from test_mistakes import refused

from p2ptrain.calls.client import Client, hello
from p2ptrain.calls.dialling import DialBack, Dialling
from p2ptrain.calls.messages import (
    NAMESPACE,
    NOT_LISTED,
    Answer,
    AuditRequest,
    CallError,
    ContributionHeader,
    Dial,
    Dialled,
    FileRequest,
    Follow,
    Hello,
    JoinRequest,
    ProofHeader,
    RefusedError,
    Relay,
    RoundsRequest,
    SnapshotOffer,
    SnapshotRequest,
    Tip,
    Traffic,
    Welcome,
    decode_message,
)
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.calls.uplink import UplinkMeter
from p2ptrain.chain import Row
from p2ptrain.chain.sealed import SealedRound, decode_sealed
from p2ptrain.config.manifest import PROTOCOL_VERSION, Manifest, open_manifest
from p2ptrain.state.run_files import RunFile
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.swarm.identity import format_peer_id, parse_peer_id, verify
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import RUNS_KEY, PeerRecord, manifest_key, peers_key
from p2ptrain.swarm.thread import NetworkThread

ROW = Row(4, 1000, 100)
NAMES = "ada-of-the-list", "bob-of-the-list"


class Nobody:
    """What an outsider answers: a refusal; and who called it."""

    def __init__(self) -> None:
        self.called_by: list[bytes] = []

    def admits(self, peer: bytes) -> bool:
        self.called_by.append(peer)
        return False

    def welcome(self) -> Welcome:
        return Welcome(PROTOCOL_VERSION, bytes(32), b"", None, "")


class RunOfTwo:
    """Two peers that train, and what one of the list knows of their run."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        swarm.write_manifest(root_interval=4)
        (swarm.folder / "ada").rename(swarm.folder / NAMES[0])  # its text is there
        ids = [run("id", "--home", str(swarm.folder / name), "--format", "json").stdout for name in NAMES]
        self.ids = [parse_peer_id(json.loads(printed)["peer_id"]) for printed in ids]
        listed = json.dumps([format_peer_id(peer) for peer in self.ids])
        text = swarm.manifest.read_text() + f'\n[access]\nmode = "list"\npeers = {listed}\n'
        swarm.manifest.write_text(text)
        self.ada = swarm.bootstrap(NAMES[0])
        self.address = self.ada.address()
        self.bob = swarm.join(NAMES[1], self.address)
        self.bob.started()

    def manifest(self) -> tuple[Manifest, bytes, bytes]:
        """The manifest, the run's id, and the manifest as it travels."""
        signed = (self.ada.home / "manifest.signed").read_bytes()
        return *open_manifest(signed), signed

    def sealed(self) -> list[SealedRound]:
        """What is in the journal of one of them."""
        found = []
        for path in sorted((self.ada.home / "journal").glob("round-*")):
            # The oldest are removed meanwhile.
            with contextlib.suppress(FileNotFoundError):
                found.append(decode_sealed(path.read_bytes(), verify))
        return found

    def train(self, rounds: int) -> None:
        """Wait until both have had a part in some rounds more."""
        for peer in (self.ada, self.bob):
            peer.reaches(peer.round + rounds)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[RunOfTwo]:
    swarm = Swarm(tmp_path)
    try:
        yield RunOfTwo(swarm)
    finally:
        swarm.close()


@pytest.fixture
def network() -> Iterator[NetworkThread]:
    made = NetworkThread()
    yield made
    made.stop()


def requests(run_id: bytes, sealed: SealedRound, offer: SnapshotOffer) -> dict[str, Any]:
    """{call: its request}, each as one of the list would send it."""
    tip = Tip(sealed.seal.round, sealed.id, sealed.seal.total)
    header = ContributionHeader(run_id, tip.round + 1, sealed.seal.parent, 0, ROW, bytes(64), 0, b"", tip)
    return {
        "rpc_hello": Hello(PROTOCOL_VERSION),
        "rpc_dial": Dial(4000),
        "rpc_join": JoinRequest(run_id, ROW),
        "rpc_relay": Relay(run_id, tip, sealed.signed),
        "rpc_follow": Follow(run_id, tip),
        "rpc_rounds": RoundsRequest(run_id, (run_id, sealed.seal.parent)),
        "rpc_snapshot": SnapshotRequest(run_id, offer.id, offer.root, 0, 1, True),
        "rpc_file": FileRequest(run_id, offer.root, 0, 1, False),
        "rpc_contribute": header,
        "rpc_audit": AuditRequest(run_id, sealed.seal.parts[0]),
        "rpc_prove": ProofHeader(run_id, bytes(32)),
    }


async def frames_of(node: SwarmNode, peer: bytes, name: str, request: Any, seconds: float = 6.0) -> list[bytes]:
    """What a call brings, by a bare stub: of a stream all frames until it ends or `seconds` are over."""
    message = Traffic().message(request)
    stub = getattr(node.stub(PeerServicer, peer, NAMESPACE), name)
    if name in ("rpc_hello", "rpc_dial", "rpc_join", "rpc_relay"):
        return [(await stub(message, timeout=seconds)).value]

    async def one() -> AsyncIterator[BytesValue]:
        yield message

    stream = await stub(one() if name in ("rpc_contribute", "rpc_prove") else message)
    found = []
    try:
        async with asyncio.timeout(seconds):
            async for frame in stream:
                found.append(frame.value)
    except (TimeoutError, ConnectionError):
        pass  # a stream that is refused may end while the request is still being written
    await stream.aclose()
    return found


async def refusals(calls: Client, peer: bytes, asked: dict[str, Any], offer: SnapshotOffer) -> list[str]:
    """What the calls of an ordinary client are refused with."""

    async def follow() -> None:
        async for news in calls.follow(peer, asked["rpc_follow"].tip):
            raise AssertionError(news)

    said, relayed, header = [], asked["rpc_relay"], asked["rpc_contribute"]
    burst = UplinkMeter(dialable=True).burst(1)
    for call in (
        calls.join(peer, ROW),
        calls.relay(peer, relayed.tip, relayed.seal),
        follow(),
        calls.rounds(peer, asked["rpc_rounds"].locator, 2**20),
        calls.snapshot(peer, offer),
        calls.snapshot(peer, offer, 0, 1, hashes=True),
        calls.file(peer, RunFile(2**20, offer.root), 0, 1),
        calls.contribute(peer, header, bytes(1000), 2**20, 5.0, asyncio.Lock(), burst),
    ):
        with pytest.raises(CallError) as caught:
            await call
        if isinstance(caught.value, RefusedError):
            said.append(str(caught.value))
    assert len(said) >= 7, "one, whose stream ends while it is being written, may not read why"
    return said


def test_an_outsider_gets_nothing_by_any_call_or_key_and_the_two_go_on(two: RunOfTwo, network: NetworkThread) -> None:
    two.train(10)
    manifest, run_id, signed = two.manifest()
    sealed = two.sealed()[-1]
    snapshot = SnapshotStore(two.ada.home / "checkpoints").all()[0]
    offer = SnapshotOffer(snapshot.round, snapshot.id, snapshot.root, snapshot.path.stat().st_size)
    asked = requests(run_id, sealed, offer)
    nobody: Any = Nobody()

    async def scenario() -> None:
        outsider = await SwarmNode.create(None, [two.address], host="127.0.0.1")
        try:
            servicer = PeerServicer(nobody, Traffic())
            # Whoever is connected may be asked whether it can dial back, which says nothing of a run.
            servicer.rpc_dial = Dialling(DialBack(outsider.seen_at)).rpc_dial  # type: ignore[method-assign]
            await outsider.add_servicer(servicer, NAMESPACE)
            for peer in two.ids:
                await outsider.connect(peer)
                await calls_bring_nothing(outsider, peer)
            await keys_say_nothing(outsider)
            # Who publishes where the two look for each other is neither dialled nor followed.
            mine = await outsider.join_addresses()
            record = PeerRecord(
                peer_id=outsider.peer_id,
                run_id=run_id,
                time=time.time(),
                name="eve",
                state="training",
                role="member",
                round=sealed.seal.round + 50,
                state_id=sealed.id,
                total=sealed.seal.total + 100,
                addresses=mine,
            )
            assert await outsider.publish_peer(record)
            assert await outsider.publish_peer(record, bytes(32))
            await asyncio.to_thread(two.train, 10)
            assert nobody.called_by == []
        finally:
            await outsider.close()

    async def calls_bring_nothing(outsider: SwarmNode, peer: bytes) -> None:
        for name, request in asked.items():
            found = await frames_of(outsider, peer, name, request)
            if name == "rpc_hello":
                welcome = Welcome(PROTOCOL_VERSION, run_id, b"", None, NOT_LISTED)
                assert [decode_message(data, Welcome) for data in found] == [welcome]
                assert await hello(outsider, peer) == welcome
            else:
                said = [decode_message(data, Answer) for data in found]
                assert said == [Answer(NOT_LISTED)] or (name in ("rpc_contribute", "rpc_prove") and not said), name
        assert set(await refusals(Client(outsider, Traffic(), run_id), peer, asked, offer)) == {NOT_LISTED}

    async def keys_say_nothing(outsider: SwarmNode) -> None:
        assert await outsider.get_manifest(run_id) is None
        assert await outsider.get(manifest_key(run_id)) == {} == await outsider.get(RUNS_KEY)
        assert await outsider.read_runs() == {} == await outsider.read_peers(run_id)
        found = await outsider.get(peers_key(run_id)) or {}
        # Two encrypted records under two peer ids are all that shows.
        assert len(found) == 2
        assert set(await outsider.read_peers(run_id, manifest.records_key)) == set(two.ids)
        for secret in (*(name.encode() for name in NAMES), manifest.nonce.encode(), b"/ip4/", b"training", sealed.id):
            assert not any(secret in value for value in found.values())

    network.run(scenario(), 90)
    members = {seal.seal.sealer for seal in two.sealed()} | {j.peer_id for s in two.sealed() for j in s.seal.joins}
    assert members <= set(two.ids)
    assert "Traceback" not in two.ada.log.read_text() and '"eve"' not in two.ada.log.read_text()
    assert not [entry for entry in two.ada.entries() if entry["level"] == "error"]
    assert signed == (two.bob.home / "manifest.signed").read_bytes()

    # The requests were good ones: the same bring everything to one of the list.
    two.bob.process.send_signal(signal.SIGINT)
    two.bob.ended(40)

    async def control() -> None:
        bob = await SwarmNode.create(two.bob.home / "identity.key", [two.address], host="127.0.0.1")
        try:
            await bob.connect(two.ids[0])
            assert (await hello(bob, two.ids[0])).manifest == signed
            for name, request in asked.items():
                found = await frames_of(bob, two.ids[0], name, request, 3.0)
                if name in ("rpc_follow", "rpc_rounds"):
                    assert len(found) > 1, name
                if name == "rpc_contribute":
                    assert found == [], "it waits for the payload"
                elif name == "rpc_dial":
                    decode_message(found[0], Dialled)
                elif name != "rpc_hello":
                    assert decode_message(found[0], Answer).refusal != NOT_LISTED, name
        finally:
            await bob.close()

    network.run(control(), 60)


def test_an_outsider_that_joins_or_inspects_is_told_why_and_what_to_do(two: RunOfTwo) -> None:
    two.train(2)
    home = ("--home", str(two.swarm.folder / "eve"))
    for command in (("join", two.address, *home, "--host", "127.0.0.1"), ("inspect", two.address, *home)):
        began = time.monotonic()
        said = refused(14, *command)
        assert time.monotonic() - began < 30
        assert "for listed peers only" in said and "p2ptrain id" in said
    assert not (two.swarm.folder / "eve" / "manifest.signed").exists()
    # A home of the run looks on as ever; so does one of the list by the address of the other.
    for where in ((), (two.address,)):
        shown = run("inspect", *where, "--home", str(two.bob.home), "--format", "json")
        assert {peer["name"] for peer in json.loads(shown.stdout)["peers"]} == set(NAMES)
    # Whoever has the manifest, but not the identity that is on the list, is told at once as well.
    two.bob.process.send_signal(signal.SIGINT)
    two.bob.ended(40)
    (two.bob.home / "identity.key").rename(two.bob.home / "old.key")
    refused(14, "join", "--home", str(two.bob.home), "--host", "127.0.0.1")
