"""Real daemons on loopback: a stranger who calls, stores and publishes without end, and the others who go on."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, AsyncIterator  # noqa: UP035 - hivemind knows a stream by this type alone

import msgpack
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.dht import DHTID
from hivemind.p2p import P2P, P2PContext, P2PHandlerError, PeerID, ServicerBase
from hivemind.proto import dht_pb2

from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import Tip, Traffic
from p2ptrain.calls.news import NewsFeed
from p2ptrain.peer.presence import Presence
from p2ptrain.swarm import guards, validator
from p2ptrain.swarm.guards import MAX_KEYS_SOUGHT_AT_ONCE, MAX_KEYS_STORED_AT_ONCE
from p2ptrain.swarm.identity import Identity, format_peer_id, new_identity
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import (
    PEER_RECORD_SECONDS,
    RUN_RECORD_SECONDS,
    RUNS_KEY,
    PeerRecord,
    RunRecord,
    encode_record,
    peers_key,
    subkey_of,
)
from p2ptrain.swarm.storage import KEYS_PER_SIGNER, MAX_STORED_KEYS, RECORDS_PER_CALLER
from p2ptrain.swarm.streams import CALLS_BURST, REQUEST_MAX_BYTES, STREAMS_PER_PEER

RUN = bytes(range(32))

if TYPE_CHECKING:
    from conftest import Swarm


class Talk(ServicerBase):
    """What strangers call. Counts what gets through to it."""

    def __init__(self) -> None:
        self.calls = self.under_way = 0

    async def rpc_unary(self, request: BytesValue, context: P2PContext) -> BytesValue:
        self.calls += 1
        return request

    async def rpc_one(self, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        self.under_way += 1
        try:
            yield request
            await asyncio.Event().wait()
        finally:
            self.under_way -= 1

    async def rpc_many(self, stream: AsyncIterator[BytesValue], context: P2PContext) -> AsyncIterator[BytesValue]:
        async for message in stream:
            yield BytesValue(value=b"%d" % len(message.value))


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def talks(swarm: Swarm) -> tuple[SwarmNode, Talk]:
    node, talk = await swarm.node(), Talk()
    await node.add_servicer(talk, "run")
    return node, talk


async def opened(caller: SwarmNode, callee: SwarmNode, method: str) -> Stream:
    name = Talk._get_handle_name("run", method)
    _, reader, writer = await caller.dht.p2p.call_binary_stream_handler(PeerID(callee.peer_id), name)
    return reader, writer


def frame(length: int, sent: int) -> bytes:
    """The beginning of a frame that says `length` and has `sent` bytes."""
    return P2P.MESSAGE_MARKER + length.to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER) + bytes(sent)


async def hung_up(reader: asyncio.StreamReader, seconds: float = 5.0) -> bool:
    """Whether the other side ends the stream, without a word, within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            return await reader.read() == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


async def still_open(streams: list[Stream], seconds: float = 2.0) -> int:
    return (await asyncio.gather(*(hung_up(reader, seconds) for reader, _ in streams))).count(False)


async def answers(caller: SwarmNode, callee: SwarmNode) -> bool:
    """Whether a call of each form is answered."""
    stub = caller.stub(Talk, callee.peer_id, "run")
    replies = await stub.rpc_one(BytesValue(value=b"!"))
    first = await asyncio.wait_for(anext(replies), 5)
    await replies.aclose()
    return bool(first.value == b"!" == (await stub.rpc_unary(BytesValue(value=b"!"), timeout=5)).value)


def record(identity: Identity, addresses: Sequence[str] = ()) -> PeerRecord:
    return PeerRecord(
        peer_id=identity.peer_id,
        run_id=RUN,
        time=time.time(),
        name="peer",
        state="training",
        role="member",
        round=1,
        state_id=bytes(32),
        total=1,
        addresses=list(addresses),
    )


Item = tuple[str, bytes, bytes, float]


def items(
    identities: list[Identity],
    *,
    genuine: bool = True,
    seconds: float = PEER_RECORD_SECONDS,
    key: str = peers_key(RUN),
    route: str = "",
) -> list[Item]:
    """(key, subkey, value, expiry) of a peer record for each identity."""
    expires = time.time() + seconds
    made = []
    for identity in identities:
        addresses = [f"{route}/p2p/{format_peer_id(identity.peer_id)}"] if route else []
        data = encode_record(identity, key, record(identity, addresses), expires)
        made.append((key, subkey_of(identity.peer_id), data if genuine else data[:-1] + b"x", expires))
    return made


async def stores(caller: SwarmNode, callee: SwarmNode, made: list[Item], *, at_once: int = 50) -> int:
    """How many of these the callee says that it has stored."""
    stored = 0
    for start in range(0, len(made), at_once):
        keys, subkeys, values, expires = zip(*made[start : start + at_once], strict=True)
        answer = await caller.dht.protocol.call_store(
            PeerID(callee.peer_id),
            [DHTID.generate(key.encode()) for key in keys],
            [msgpack.packb(value) for value in values],
            list(expires),
            list(subkeys),
        )
        stored += sum(answer or [])
    return stored


@pytest.mark.parametrize("method", ["rpc_one", "rpc_many"])
def test_a_first_frame_longer_than_any_request_ends_its_stream(swarm: Swarm, method: str) -> None:
    async def scenario() -> None:
        victim, _ = await talks(swarm)
        outsider = await swarm.node(victim)
        reader, writer = await opened(outsider, victim, method)
        writer.write(frame(2**20, 2**16))
        assert await hung_up(reader)
        writer.close()

        async def frames() -> AsyncIterator[BytesValue]:
            yield BytesValue(value=b"header")
            yield BytesValue(value=bytes(256 * 1024))

        replies = await outsider.stub(Talk, victim.peer_id, "run").rpc_many(frames())
        assert [reply.value async for reply in replies] == [b"6", b"262144"], "a whole piece after a header is taken"

    swarm.run(scenario())


def test_streams_that_never_finish_their_request_are_few_and_hinder_nobody(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2ptrain.swarm.streams.SILENT_MAX", 80)

    async def scenario() -> None:
        victim, talk = await talks(swarm)
        other = await swarm.node(victim)
        outsiders = [await swarm.node(victim) for _ in range(2)]
        streams = []
        for outsider in outsiders:
            mine = [await opened(outsider, victim, "rpc_one") for _ in range(STREAMS_PER_PEER + 50)]
            for _, writer in mine:
                writer.write(frame(REQUEST_MAX_BYTES, REQUEST_MAX_BYTES - 1))
            streams.append(mine)
        assert await answers(other, victim)
        left = [await still_open(mine) for mine in streams]
        assert max(left) <= STREAMS_PER_PEER and sum(left) <= 80
        assert talk.under_way == 0
        for _, writer in itertools.chain(*streams):
            writer.close()

    swarm.run(scenario())


def test_a_request_that_does_not_come_ends_its_stream(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2ptrain.swarm.streams.REQUEST_SECONDS", 0.5)

    async def scenario() -> None:
        victim, _ = await talks(swarm)
        outsider = await swarm.node(victim)
        reader, writer = await opened(outsider, victim, "rpc_one")
        await asyncio.wait_for(reader.read(), 5)
        writer.close()

    swarm.run(scenario())


def test_calls_without_end_are_refused_to_their_peer_alone(swarm: Swarm) -> None:
    async def scenario() -> None:
        victim, talk = await talks(swarm)
        outsider, other = await swarm.node(victim), await swarm.node(victim)
        stub = outsider.stub(Talk, victim.peer_id, "run")
        calls = int(2 * CALLS_BURST)
        results = await asyncio.gather(*(stub.rpc_unary(BytesValue()) for _ in range(calls)), return_exceptions=True)
        assert sum(isinstance(result, P2PHandlerError) for result in results) > 0
        assert CALLS_BURST / 2 < talk.calls < calls
        assert await answers(other, victim)

    swarm.run(scenario())


def test_wrongly_signed_records_are_verified_for_a_while_only(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[bytes] = []
    verify = validator.check_record

    def counted(value: bytes, key_id: bytes, peer_id: bytes) -> float:
        verified.append(peer_id)
        return verify(value, key_id, peer_id)

    monkeypatch.setattr(validator, "check_record", counted)

    async def scenario() -> None:
        victim = await swarm.node()
        outsider, other = await swarm.node(victim), await swarm.node(victim)
        wrong = items([new_identity() for _ in range(1000)], genuine=False)
        assert await stores(outsider, victim, wrong) == 0
        assert 0 < len(verified) < 2 * validator.VERIFIED_BURST
        assert await stores(other, victim, items([other.identity])) == 1, "another peer's is verified"

    swarm.run(scenario())


def test_a_request_names_few_keys(swarm: Swarm) -> None:
    async def scenario() -> None:
        victim = await swarm.node()
        outsider = await swarm.node(victim)
        many = items([new_identity() for _ in range(MAX_KEYS_STORED_AT_ONCE + 1)])
        assert await stores(outsider, victim, many, at_once=len(many)) == 0
        keys = [DHTID.generate() for _ in range(MAX_KEYS_SOUGHT_AT_ONCE + 1)]
        assert await outsider.dht.protocol.call_find(PeerID(victim.peer_id), keys) is None
        assert await outsider.dht.protocol.call_find(PeerID(victim.peer_id), keys[1:]) is not None

    swarm.run(scenario())


def test_an_id_that_is_no_nodes_is_refused_and_no_task_fails_of_it(swarm: Swarm) -> None:
    async def scenario() -> None:
        failed: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failed.append(context))
        victim = await swarm.node()
        outsider, other = await swarm.node(victim), await swarm.node(victim)
        stub = outsider.dht.protocol.get_stub(PeerID(victim.peer_id))
        for length in (1, 19, 21, 4000):
            sender = dht_pb2.NodeInfo(node_id=b"\xff" * length)
            for call, request in (
                (stub.rpc_ping, dht_pb2.PingRequest(peer=sender)),
                (stub.rpc_store, dht_pb2.StoreRequest(peer=sender)),
                (stub.rpc_find, dht_pb2.FindRequest(peer=sender, keys=[bytes(20)])),
            ):
                with pytest.raises(P2PHandlerError, match="no node's id"):
                    await call(request, timeout=5)
        gc.collect()
        assert failed == []
        assert await other.ping(victim.peer_id)

    swarm.run(scenario())


def test_a_stranger_of_ever_new_ids_is_handed_a_nodes_records_a_few_times_only(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[PeerID] = []

    async def scenario() -> None:
        victim = await swarm.node()
        outsider = await swarm.node(victim)
        # A key that the victim is nearer to, so that it is for the victim to hand records over.
        for number in itertools.count():
            key = peers_key(number.to_bytes(32))
            place = DHTID.generate(key.encode())
            near, far = (place ^ node.dht.node_id for node in (victim, outsider))
            if near < far:
                break
        assert await stores(outsider, victim, items([new_identity() for _ in range(20)], key=key)) == 20
        call_store = victim.dht.protocol.call_store

        def counted(peer: PeerID, *what: object, **how: object) -> object:
            handed.append(peer)
            return call_store(peer, *what, **how)

        monkeypatch.setattr(victim.dht.protocol, "call_store", counted)
        stub = outsider.dht.protocol.get_stub(PeerID(victim.peer_id))
        for number in range(60):
            # Nearer than all before, and not as near as the victim.
            close = dht_pb2.NodeInfo(node_id=DHTID(place ^ ((near + far) // 2 - number)).to_bytes())
            await stub.rpc_ping(dht_pb2.PingRequest(peer=close), timeout=5)
        assert 0 < len(handed) <= guards.MET_BURST + 1

    swarm.run(scenario())


def test_keys_of_a_stranger_drive_out_nobodys_run(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validator, "VERIFIED_PER_SECOND", 1e6)
    monkeypatch.setattr(guards, "REQUESTS_PER_SECOND", 1e6)

    async def scenario() -> None:
        victim = await swarm.node()
        outsider, other = await swarm.node(victim), await swarm.node(victim)
        run = RunRecord(
            peer_id=other.peer_id, run_id=RUN, time=time.time(), name="a", protocol=1, round=3, state_id=RUN, members=2
        )
        assert await other.publish(RUNS_KEY, run, RUN_RECORD_SECONDS)
        made = [items([outsider.identity], key=f"key {n}", seconds=50)[0] for n in range(MAX_STORED_KEYS + 100)]
        assert await stores(outsider, victim, items([outsider.identity], key="long", seconds=3600)) == 0
        assert await stores(outsider, victim, made) == KEYS_PER_SIGNER
        assert await victim.read_runs() == {RUN: [run]}
        assert await other.publish(RUNS_KEY, run, RUN_RECORD_SECONDS)
        assert await victim.read_runs() == {RUN: [run]}

    swarm.run(scenario())


def test_records_of_made_up_peers_are_few_and_no_address_of_theirs_is_kept(swarm: Swarm) -> None:
    async def scenario() -> None:
        victim = await swarm.node()
        outsider, other = await swarm.node(victim), await swarm.node(victim)
        made_up = items([new_identity() for _ in range(2000)], route="/ip4/127.0.0.1/tcp/1")
        assert await stores(outsider, victim, made_up) <= RECORDS_PER_CALLER
        assert await other.publish_peer(record(other.identity, await other.join_addresses()))
        peers = await victim.read_peers(RUN)
        assert other.peer_id in peers and len(peers) <= RECORDS_PER_CALLER + 1
        await victim.connect(other.peer_id)
        assert victim.known_addresses() == await other.join_addresses()

    swarm.run(scenario())


def test_records_of_made_up_peers_cause_few_dials_and_honest_peers_are_met_all_the_same(swarm: Swarm) -> None:
    async def scenario() -> None:
        victim = await swarm.node()
        other = await swarm.node(victim)
        outsiders = [await swarm.node(victim) for _ in range(2)]
        dials = 0

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal dials
            dials += 1
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = Client(victim, Traffic(), RUN)
        feed = NewsFeed(client, lambda: Tip(0, RUN, 0), lambda event: None, lambda *_: ())
        driver, status = SimpleNamespace(feed=feed), SimpleNamespace(turns=())
        names = {"run_id": RUN, "run_name": "a", "signed_manifest": b"", "name": "a", "device": "", "addresses": []}
        presence = Presence(victim, driver, status, **names)  # type: ignore[arg-type]
        for outsider in outsiders:
            made_up = items([new_identity() for _ in range(60)], route=f"/ip4/127.0.0.1/tcp/{port}")
            assert await stores(outsider, victim, made_up) > 30
        assert await other.publish_peer(record(other.identity, await other.join_addresses()))
        followed = False
        for _ in range(10):
            await presence._meet()
            await asyncio.sleep(0.5)
            followed = followed or other.peer_id in feed._followed
        assert followed and dials <= 4, f"{dials} dials"
        server.close()
        await feed.close()

    swarm.run(scenario())
