"""Real nodes on loopback: they find each other, believe only what is signed, and survive strangers and crashes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, AsyncIterator  # noqa: UP035 - hivemind knows a stream by this type alone

import msgpack
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.dht import DHTNode
from hivemind.dht import protocol as dht_protocol
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.proto import dht_pb2

from p2ptrain.config.manifest import Manifest, open_manifest, sign_manifest
from p2ptrain.errors import AddressError, ClockSkewError, PortInUseError, UnreachableError
from p2ptrain.swarm import circuits
from p2ptrain.swarm import node as node_module
from p2ptrain.swarm import shelves as shelves_module
from p2ptrain.swarm.circuits import RelayCaps
from p2ptrain.swarm.crawl import Census
from p2ptrain.swarm.identity import Identity, format_peer_id, new_identity, parse_peer_id
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.records import (
    PEER_RECORD_SECONDS,
    RUN_RECORD_SECONDS,
    RUNS_KEY,
    MissingRecord,
    PeerRecord,
    RunRecord,
    encode_record,
    manifest_key,
    peers_key,
    subkey_of,
)
from p2ptrain.swarm.shelves import REPLICAS, Shelves, find_peer, shelf_key, shelf_of

RUN = bytes(range(32))

if TYPE_CHECKING:
    from conftest import PeerProcess, Swarm

    Start = Callable[..., PeerProcess]


def peer_record(identity: Identity, **changes: Any) -> PeerRecord:
    fields: dict[str, Any] = {
        "peer_id": identity.peer_id,
        "run_id": RUN,
        "time": time.time(),
        "name": "peer",
        "state": "training",
        "role": "member",
        "round": 1,
        "state_id": bytes(32),
        "total": 1,
    }
    return PeerRecord(**(fields | changes))


@pytest.fixture
def manifest() -> bytes:
    return sign_manifest(
        Manifest(name="test", nonce="0" * 32), Ed25519PrivateKey.generate(), format_peer_id(new_identity().peer_id)
    )


class Echo(ServicerBase):
    """What a test calls to see that calls arrive."""

    async def rpc_echo(self, request: BytesValue, context: P2PContext) -> BytesValue:
        return BytesValue(value=context.remote_id.to_bytes() + request.value)

    async def rpc_swallow(self, stream: AsyncIterator[BytesValue], context: P2PContext) -> AsyncIterator[BytesValue]:
        async for message in stream:
            yield BytesValue(value=b"%d" % len(message.value))


async def echoes(caller: SwarmNode, callee: SwarmNode) -> bool:
    answer = await caller.stub(Echo, callee.peer_id, "run").rpc_echo(BytesValue(value=b"!"), timeout=5)
    return bool(answer.value == caller.peer_id + b"!")


async def stranger(*victims: str) -> DHTNode:
    """A plain hivemind node that checks nothing."""
    quiet = {"use_relay": False, "nat_port_map": False, "auto_nat": False}
    return await DHTNode.create(initial_peers=list(victims), **quiet)


# Records


def test_peers_read_what_others_publish(swarm: Swarm) -> None:
    async def scenario() -> None:
        first = await swarm.node()
        second = await swarm.node(first)
        observer = await swarm.node(second, observer=True)
        record = peer_record(second.identity, addresses=await second.join_addresses())
        assert await second.publish_peer(record)
        assert await first.publish_peer(peer_record(first.identity))
        for reader in (first, second, observer):
            peers = await reader.read_peers(RUN)
            assert set(peers) == {first.peer_id, second.peer_id}
            assert peers[second.peer_id] == record
        run = RunRecord(
            peer_id=first.peer_id, run_id=RUN, time=time.time(), name="a", protocol=1, round=3, state_id=RUN, members=2
        )
        assert await first.publish(RUNS_KEY, run, RUN_RECORD_SECONDS)
        assert await observer.read_runs() == {RUN: [run]}
        assert await observer.read_peers(bytes(32)) == {}

    swarm.run(scenario())


def test_records_are_read_from_single_nodes_and_what_one_hides_the_next_one_shows(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        first = await swarm.node()
        nodes = [first, *[await swarm.node(first) for _ in range(4)]]
        for node in nodes:
            await node._explore(5.0)
        shelves = [Shelves(node, RUN, b"") for node in nodes]
        everyone = {node.peer_id for node in nodes}

        async def publish(*which: Shelves) -> None:
            for one in which:
                addresses = await one._node.join_addresses()
                assert await one.publish(peer_record(one._node.identity, addresses=addresses))

        await publish(*shelves)
        # Fewer nodes than there are keep each record.
        assert sum(bool(node.stored(peers_key(RUN))) for node in nodes) == REPLICAS
        watching = Shelves(await swarm.node(nodes[2], observer=True), RUN, b"")
        seen = await watching.look_at_all()
        assert set(seen.records) == everyone
        # One who does not keep them reads them all the same, of one who does, and says when to others.
        outside = next(one for one in shelves if not one._node.stored(peers_key(RUN)))
        looked = await outside.look()
        assert set(looked.records) == everyone
        await outside._node.connect(next(peer for peer in everyone if peer != outside._node.peer_id))

        # A node that forgets all hides nobody for long: another one is asked the next time, and nothing is forgotten.
        next(node for node in nodes if node.stored(peers_key(RUN))).dht.protocol.storage.data.clear()
        for _ in range(8):
            watching._looked_at[peers_key(RUN)] = 0.0
            assert set((await watching.look_at_all()).records) == everyone

        # In a large run records are on shelves; the first key says on how many.
        monkeypatch.setattr(shelves_module, "SHOWN_EVERY", 0)
        for one in shelves:
            one.count = 4
        await publish(*shelves)
        await publish(*shelves[1:])
        for newcomer in (watching, Shelves(await swarm.node(nodes[3], observer=True), RUN, b"")):
            newcomer._looked_at.clear()
            seen = await newcomer.look_at_all()
            assert newcomer.count == 4 and set(seen.records) == everyone
            # Who said nothing meanwhile shows its age, at the time of the look.
            oldest = min(everyone, key=lambda peer: seen.records[peer].time - seen.at[peer])
            assert oldest == first.peer_id
        alone = await find_peer(nodes[4], RUN, b"", first.peer_id)
        assert alone is not None and alone.shelves == 4

    swarm.run(scenario())


def test_who_is_said_to_be_missing_is_looked_for_and_nobody_believes_it_unseen(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelves_module, "SHOWN_EVERY", 0)
    # No shelf is read in its turn.
    monkeypatch.setattr(shelves_module, "LOOKS_PER_SECOND", 1e-6)
    monkeypatch.setattr(shelves_module, "LOOKS_BURST", 0.0)

    async def scenario() -> None:
        first = await swarm.node()
        nodes = [first, *[await swarm.node(first) for _ in range(3)]]
        shelves = [Shelves(node, RUN, b"") for node in nodes]
        for one in shelves:
            one.sized_for(24, 24)
            assert one.count == shelves_module.MANY_SHELVES

        async def publish(which: Shelves, seconds_ago: float = 0.0) -> None:
            at = time.time() - seconds_ago
            with monkeypatch.context() as then:
                then.setattr(shelves_module, "PEER_RECORD_SECONDS", PEER_RECORD_SECONDS - seconds_ago)
                assert await which.publish(peer_record(which._node.identity, time=at))

        live, dead = shelves[1:3]
        await publish(live)
        await publish(dead, 1.0)
        watching = Shelves(await swarm.node(first, observer=True), RUN, b"")

        async def age_of(which: Shelves) -> float:
            seen = await watching.look_at_all()
            return seen.at[which._node.peer_id] - seen.records[which._node.peer_id].time

        assert await age_of(live) < 3 and await age_of(dead) < 4

        # Those who keep a record say that it is not renewed, once it is old, and only once.
        for one in shelves:
            one.tell_missing()
            assert one._telling is None
        monkeypatch.setattr(shelves_module, "SUSPECT_SECONDS", 0.5)
        monkeypatch.setattr(shelves_module, "GONE_SECONDS", 1.5)
        await publish(live)
        for one in shelves:
            one.tell_missing()
        told = [one._telling for one in shelves if one._telling is not None]
        assert told
        await asyncio.gather(*told)
        for one in shelves:
            one.tell_missing()
        assert [one._telling for one in shelves if one._telling is not None] == told
        await swarm.eventually(lambda: time.time() - watching._looked_at[key_of(dead)] > 2.0)
        assert await age_of(dead) > 1.5, "a look at its shelf shows how old its record is now"

        # A liar has shelves read, a few times; what it says shows nowhere.
        liar = shelves[3]
        said = MissingRecord(
            peer_id=liar._node.peer_id,
            run_id=RUN,
            time=time.time(),
            peers={live._node.peer_id: time.time() - 2.0},
        )
        await liar._tell(said)
        await publish(live)
        assert await age_of(live) < 1.5

    def key_of(which: Shelves) -> str:
        return shelf_key(RUN, which.count, shelf_of(which._node.peer_id, which.count))

    swarm.run(scenario())


def test_a_manifest_is_found_by_its_hash(swarm: Swarm, manifest: bytes) -> None:
    async def scenario() -> None:
        _, run_id = open_manifest(manifest)
        first = await swarm.node()
        second = await swarm.node(first)
        assert await first.store_manifest(manifest)
        assert await second.get_manifest(run_id) == manifest
        assert await second.get_manifest(bytes(32)) is None

    swarm.run(scenario())


def test_forged_records_are_refused(swarm: Swarm, manifest: bytes) -> None:
    async def scenario() -> None:
        first = await swarm.node()
        second = await swarm.node(first)
        genuine = peer_record(first.identity)
        assert await first.publish_peer(genuine)
        intruder = await stranger(*await first.join_addresses())
        thief, soon, late = new_identity(), time.time() + 20, time.time() + PEER_RECORD_SECONDS + 9
        forged = encode_record(thief, peers_key(RUN), peer_record(thief, name="forged"), late)
        stored = (await first.dht.get(peers_key(RUN).encode(), latest=True)).value[subkey_of(first.peer_id)].value
        _, run_id = open_manifest(manifest)
        attempts: list[tuple[str, object, float, object]] = [
            (peers_key(RUN), forged, late, subkey_of(first.peer_id)),  # in another's name
            (peers_key(RUN), stored, late, subkey_of(first.peer_id)),  # a genuine one, kept alive
            (peers_key(RUN), b"anything", soon, None),  # a plain value, to shadow all records
            (peers_key(RUN), b"x" * 100_000, soon, subkey_of(thief.peer_id)),
            (peers_key(RUN), 1, soon, (1, 2)),
            (manifest_key(RUN), manifest, soon, b"p2ptrain1:manifest"),  # another run's manifest
            (manifest_key(run_id), manifest[:-1] + b"x", soon, b"p2ptrain1:manifest"),
        ]
        try:
            for key, value, expires, subkey in attempts:
                assert not await intruder.store(key.encode(), value, expires, subkey=subkey, exclude_self=True)
        finally:
            await intruder.shutdown()
        for reader in (first, second):
            assert await reader.read_peers(RUN) == {first.peer_id: genuine}
            assert await reader.get_manifest(RUN) is None

    swarm.run(scenario())


# Strangers


def test_nested_extension_types_do_not_crash_a_peer(swarm: Swarm, peer_process: Start) -> None:
    victim = peer_process()
    bomb = msgpack.packb([])
    while len(bomb) < 60_000:
        bomb = msgpack.packb([msgpack.ExtType(0x40, bomb)])

    async def scenario() -> None:
        intruder = await stranger(*victim.report["addresses"])
        peer_id = PeerID.from_base58(victim.report["peer_id"])
        request = dht_pb2.StoreRequest(
            keys=[bytes(20)], subkeys=[b""], values=[bomb], expiration_time=[time.time() + 60], in_cache=[False]
        )
        try:
            with pytest.raises(Exception, match="nested deeper"):
                await intruder.protocol.get_stub(peer_id).rpc_store(request, timeout=5)
            assert await intruder.protocol.call_ping(peer_id) is not None
        finally:
            await intruder.shutdown()

    swarm.run(scenario())
    assert victim.process.poll() is None


def test_a_frame_that_claims_a_terabyte_is_refused(swarm: Swarm) -> None:
    async def scenario() -> None:
        first = await swarm.node()
        second = await swarm.node(first)
        await first.add_servicer(Echo(), "run")
        name = Echo._get_handle_name("run", "rpc_swallow")
        p2p = second.dht.p2p
        _, reader, writer = await p2p.call_binary_stream_handler(PeerID(first.peer_id), name)
        writer.write(P2P.MESSAGE_MARKER + (10**12).to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER) + bytes(1000))
        # The victim hangs up; whether that arrives as an end or as a reset is a matter of timing.
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()

        async def frames() -> AsyncIterator[BytesValue]:
            yield BytesValue(value=bytes(2048))

        replies = await second.stub(Echo, first.peer_id, "run").rpc_swallow(frames())
        assert [reply.value async for reply in replies] == [b"2048"]

    swarm.run(scenario())


def test_an_answer_to_a_call_that_has_ended_harms_no_other_call(swarm: Swarm) -> None:
    async def scenario() -> None:
        held, release = asyncio.Event(), asyncio.Event()

        class Holding(ServicerBase):
            async def rpc_echo(self, request: BytesValue, context: P2PContext) -> BytesValue:
                held.set()
                await release.wait()
                return request

        first = await swarm.node()
        second = await swarm.node(first)
        await first.add_servicer(Holding(), "run")
        calling = second.stub(Holding, first.peer_id, "run").rpc_echo(BytesValue(value=b"?"))
        answer = calling.send(None)
        await held.wait()
        # The answer comes after the call's end and before its caller's next turn.
        answer.cancel()
        release.set()
        assert await second.ping(first.peer_id)
        assert not second.dht.p2p._client.control._read_task.done()
        calling.close()
        assert second.restarts == 0

    swarm.run(scenario())


# Upkeep


def test_a_killed_daemon_comes_back_as_the_same_peer(swarm: Swarm) -> None:
    async def scenario() -> None:
        first = await swarm.node()
        second = await swarm.node(first)
        await first.add_servicer(Echo(), "run")
        await second.add_servicer(Echo(), "run")
        members = {first.peer_id, second.peer_id}
        for node in (first, second):
            await node.publish_peer(peer_record(node.identity, addresses=await node.join_addresses()))
        assert set(await first.read_peers(RUN)) == members
        addresses = await first.join_addresses()
        assert await echoes(second, first)
        restarted = asyncio.Event()

        async def note() -> None:
            restarted.set()

        first.on_restart.append(note)
        hanging = asyncio.create_task(first.stub(Echo, second.peer_id, "run").rpc_echo(BytesValue(value=b"?")))
        os.kill(first.daemon_pid, signal.SIGKILL)
        # The first finds the connection gone, the second dials in vain. libp2p then dials that peer no more for
        # seconds, so the new daemon has to dial whom it knows.
        for _ in range(2):
            with contextlib.suppress(P2PDaemonError):
                await echoes(second, first)
        await asyncio.wait_for(restarted.wait(), 15)
        await asyncio.wait({hanging}, timeout=5)
        assert hanging.done()
        hanging.exception()

        assert await first.join_addresses() == addresses
        assert PeerID(first.peer_id) == first.dht.p2p.peer_id
        assert await echoes(second, first)
        assert await echoes(first, second)
        assert set(await first.read_peers(RUN)) == members
        await swarm.eventually(lambda: PeerID(first.peer_id) in second.dht.protocol.routing_table)
        third = await swarm.node(first)
        assert set(await third.read_peers(RUN)) == members

    swarm.run(scenario())


def test_a_clock_that_goes_wrong_while_a_peer_runs_is_said_once_and_so_is_its_end(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node_module, "UPKEEP_SECONDS", 0.2)
    monkeypatch.setattr(node_module, "CLOCK_SECONDS", 0.0)

    def said(text: str) -> int:
        # Both nodes are in this process, and what one is asked for it answers by the same clock that it compares with.
        return sum(text in record.message for record in caplog.records)

    async def scenario() -> None:
        first = await swarm.node()
        await swarm.node(first)
        await asyncio.sleep(1.0)
        assert not said("clock")
        monkeypatch.setattr(dht_protocol, "get_dht_time", lambda: time.time() + 60.0)
        await swarm.eventually(lambda: said("this machine's clock is 60 s behind the swarm's") == 2)
        await asyncio.sleep(1.0)
        assert said("clock") == 2, "once by each"
        monkeypatch.setattr(dht_protocol, "get_dht_time", time.time)
        await swarm.eventually(lambda: said("this machine's clock is right again") == 2)

    with caplog.at_level("WARNING"):
        swarm.run(scenario())


def test_peers_that_lost_each_other_meet_again(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "UPKEEP_SECONDS", 0.2)

    async def scenario() -> None:
        first = await swarm.node()
        second = await swarm.node(first)
        tables = [node.dht.protocol.routing_table for node in (first, second)]
        for table in tables:
            for node_id in list(table.uid_to_peer_id):
                del table[node_id]
        await swarm.eventually(lambda: PeerID(second.peer_id) in tables[0] and PeerID(first.peer_id) in tables[1])

    swarm.run(scenario())


# Observing


def test_an_observer_is_listed_nowhere(swarm: Swarm) -> None:
    async def scenario() -> None:
        first = await swarm.node()
        second = await swarm.node(first)
        observer = await swarm.node(first, observer=True)
        assert await observer.read_peers(RUN) == {}
        for node in (first, second):
            assert PeerID(observer.peer_id) not in node.dht.protocol.routing_table
            assert (await node.crawl()).alive == {first.peer_id, second.peer_id}
        assert (await observer.crawl()).alive == {first.peer_id, second.peer_id}
        assert not observer.dialable
        assert await observer.join_addresses() == []

    swarm.run(scenario())


def test_a_crawl_tells_the_living_from_the_killed(swarm: Swarm, peer_process: Start) -> None:
    async def scenario() -> None:
        nodes = [await swarm.node()]
        for _ in range(3):
            nodes.append(await swarm.node(nodes[0]))
        victim = await asyncio.to_thread(peer_process, *await nodes[0].join_addresses())
        killed = parse_peer_id(victim.report["peer_id"])
        observer = await swarm.node(nodes[0], observer=True)
        assert (await observer.crawl()).alive == {node.peer_id for node in nodes} | {killed}
        os.kill(victim.process.pid, signal.SIGKILL)
        os.kill(victim.report["daemon_pid"], signal.SIGKILL)
        census = await observer.crawl()
        assert (census.alive, census.dead) == ({node.peer_id for node in nodes}, {killed})

    swarm.run(scenario())


def test_a_crawl_reaches_peers_that_only_records_tell_how_to_dial(swarm: Swarm) -> None:
    async def scenario() -> None:
        first = await swarm.node()
        second = await swarm.node(first)
        assert await second.publish_peer(peer_record(second.identity, addresses=await second.join_addresses()))
        # A daemon that has just started can tell nobody where others are.
        first.known_peers.clear()
        os.kill(first.daemon_pid, signal.SIGKILL)
        await swarm.eventually(lambda: first.restarts == 1)
        observer = await swarm.node(first, observer=True)
        await observer.read_peers(RUN)
        assert await observer.crawl() == Census(frozenset({first.peer_id, second.peer_id}), frozenset())

    swarm.run(scenario())


# Errors


def test_a_dead_initial_peer_is_unreachable_in_bounded_time(swarm: Swarm) -> None:
    async def scenario() -> None:
        name = format_peer_id(new_identity().peer_id)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            closed = "/ip4/127.0.0.1/tcp/1"
            mute = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
            for route, reason in ((closed, "connection refused"), (mute, "no answer from")):
                started = time.monotonic()
                with pytest.raises(UnreachableError, match=reason) as caught:
                    await SwarmNode.create(None, [f"{route}/p2p/{name}"], timeout_seconds=2)
                assert time.monotonic() - started < 8
                assert "join line" in caught.value.hint

            first = await swarm.node()
            addresses = [f"{closed}/p2p/{name}", *await first.join_addresses()]
            second = await SwarmNode.create(None, addresses, timeout_seconds=2)
            swarm.nodes.append(second)
            assert await second.ping(first.peer_id)

    swarm.run(scenario())


def test_an_address_of_another_identity_is_called_that(swarm: Swarm) -> None:
    async def scenario() -> None:
        first = await swarm.node()
        [address] = await first.join_addresses()
        wrong = address.rpartition("/")[0] + "/" + format_peer_id(new_identity().peer_id)
        with pytest.raises(UnreachableError, match="old identity"):
            await SwarmNode.create(None, [wrong])
        with pytest.raises(AddressError):
            await SwarmNode.create(None, ["nonsense"])

    swarm.run(scenario())


def test_a_port_in_use_is_an_error_and_ones_own_is_free_after_closing(swarm: Swarm, tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "identity.key"
        first = await swarm.node(identity_path=path)
        with pytest.raises(PortInUseError, match=str(first.port)):
            await SwarmNode.create(None, port=first.port)
        addresses = await first.join_addresses()
        await first.close()
        again = await swarm.node(identity_path=path, port=first.port)
        assert await again.join_addresses() == addresses

    swarm.run(scenario())


def test_a_wrong_clock_is_an_error_of_the_one_who_has_it(swarm: Swarm, peer_process: Start) -> None:
    async def scenario() -> None:
        first = await swarm.node()
        skewed = await asyncio.to_thread(peer_process, "--clock-ahead-seconds", "30", *await first.join_addresses())
        assert skewed.report["error"] == ClockSkewError.__name__
        assert "30 s ahead" in skewed.report["message"]

    swarm.run(scenario())


# Leaving nothing behind


def test_a_start_that_is_given_up_leaves_nothing(swarm: Swarm, sockets_in: Path) -> None:
    async def scenario() -> None:
        starting = asyncio.create_task(SwarmNode.create(None))
        await swarm.eventually(lambda: any(child.name() == "p2pd" for child in psutil.Process().children()))
        # Whoever gives up may do so again before all is cleared away.
        for _ in range(3):
            starting.cancel()
            await asyncio.wait({starting}, timeout=0.01)
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not any(sockets_in.iterdir())

    swarm.run(scenario())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None], ids=["SIGKILL", "SIGTERM", "close"])
def test_no_daemon_and_no_sockets_are_left(
    swarm: Swarm, peer_process: Start, sockets_in: Path, how: signal.Signals | None
) -> None:
    peer = peer_process()
    daemon = psutil.Process(peer.report["daemon_pid"])
    assert daemon.name() == "p2pd"
    assert any(sockets_in.iterdir())
    if how is None:
        peer.close()
    else:
        os.kill(peer.process.pid, how)
    daemon.wait(15)
    swarm.run(swarm.eventually(lambda: not any(sockets_in.iterdir())))


def test_interrupting_the_terminal_spares_the_daemon(swarm: Swarm) -> None:
    async def scenario() -> None:
        node = await swarm.node()
        assert os.getpgid(node.daemon_pid) != os.getpgid(0)

    swarm.run(scenario())


def test_a_relay_carries_what_it_was_told_to(swarm: Swarm) -> None:
    async def scenario() -> None:
        caps = RelayCaps(circuit_bytes=1 << 24)
        # Which of the daemon's two relays answered was a matter of chance, at each start.
        relays = [await swarm.node(relaying=caps) for _ in range(3)]
        asking = await swarm.node(*relays, observer=True, nat=True)
        carried = [await circuits.reserve(asking._daemon.p2p, relay.peer_id) for relay in relays]
        assert carried == [caps.circuit_bytes] * 3

    swarm.run(scenario())
