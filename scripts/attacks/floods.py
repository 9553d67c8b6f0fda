"""Attacks that keep peers busy, full or blind: messages that are none, streams that never end, records of nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
from attacks.comings import ManyJoins, stub_of
from attacks.forged import identity_from
from attacks.hostile import NAMESPACE, Attack, PeerServicer
from attacks.malformed import Decoders
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.dht.protocol import DHTProtocol
from hivemind.p2p import P2P, PeerID, ServicerBase
from hivemind.proto import dht_pb2
from hivemind.utils.auth import AuthRole, AuthRPCWrapper
from lab.report import say

from p2ptrain.calls.messages import TRANSPORT_FAILURES, Relay, Tip
from p2ptrain.chain.sealed import decode_sealed
from p2ptrain.swarm.daemon import Daemon
from p2ptrain.swarm.identity import verify
from p2ptrain.swarm.records import RUNS_KEY, PeerRecord, Record, RunRecord, encode_record, peers_key, subkey_of

CALLS = {
    "rpc_hello": "Hello",
    "rpc_dial": "Dial",
    "rpc_join": "JoinRequest",
    "rpc_relay": "Relay",
    "rpc_amend": "Amend",
    "rpc_contribute": "ContributionHeader",
    "rpc_follow": "Follow",
    "rpc_rounds": "RoundsRequest",
    "rpc_snapshot": "SnapshotRequest",
    "rpc_file": "FileRequest",
    "rpc_audit": "AuditRequest",
    "rpc_prove": "ProofHeader",
}
"""Each call, and the message that begins it."""
SENDERS_A_PEER, CALLS_A_SECOND, STORES_A_SECOND = 4, 80, 15
"""Of each identity; of one a peer takes 100 calls a second and 20 requests to store and to find."""
SEARCHES_SHARE = 0.2
STREAMS_A_PEER = 32
FRAME_BYTES = 1024 * 1024 - 1
ELSEWHERE = "127.0.0.9"
RELAYS_AT_ONCE = 64
RECORD_SECONDS = 30.0
RECORDS_AT_ONCE, KEYS_AT_ONCE = 64, 8
"""As many as a node takes in one call: of more it takes none."""
KEYS_SECONDS = 3000.0


class Malformed(ManyJoins):
    """Messages over all calls, and records over the DHT, that no honest peer would send, from many identities.

    Each identity calls each peer about as often as one may, so that what it sends is read. Where their number is given,
    it ends with the last one.
    """

    async def prepare(self) -> list[bytes]:
        """A daemon for each identity, and a well-formed message of each call to spoil."""
        self._made = Decoders(self.hostile.chance)
        self._messages = {call: self._of_this_run(self._made.messages[kind]) for call, kind in CALLS.items()}
        self._left = self.hostile.messages or sys.maxsize
        self._sent = {"calls": 0, "records": 0}
        self._due: dict[tuple[int, bytes], float] = {}
        return await super().prepare()

    async def run(self) -> None:
        """Send."""
        try:
            async with asyncio.TaskGroup() as group:
                for number, daemon in enumerate(self._daemons):
                    for peer in self.hostile.peers:
                        for _ in range(SENDERS_A_PEER):
                            group.create_task(self._call(number, daemon, peer))
                        group.create_task(self._store(daemon, peer))
        finally:
            say(did={**self._sent, "malformed_messages": sum(self._sent.values())})

    def _of_this_run(self, message: Any) -> bytes:
        if hasattr(message, "run_id"):
            message = msgspec.structs.replace(message, run_id=self.hostile.run_id)
        return msgspec.msgpack.encode(message)

    def _take(self, what: str, count: int) -> int:
        """Up to so many of those that are left."""
        count = min(count, self._left)
        self._left -= count
        self._sent[what] += count
        return count

    async def _call(self, number: int, daemon: Daemon, peer: bytes) -> None:
        chance, loop = self.hostile.chance, asyncio.get_running_loop()
        calls = list(self._messages)
        while self._take("calls", 1):
            due = max(self._due.get((number, peer), 0.0), loop.time() - 1.0) + 1 / CALLS_A_SECOND
            self._due[number, peer] = due
            await asyncio.sleep(due - loop.time())
            call = chance.choice(calls)
            frame = BytesValue(value=self._made.spoil(self._messages[call]))
            await self.hostile.send(peer, call, frame, stub=functools.partial(stub_of, daemon))

    async def _store(self, daemon: Daemon, peer: bytes) -> None:
        """Records to store, and now and then keys to find."""
        chance, seconds = self.hostile.chance, self.hostile.node.dht.protocol.wait_timeout
        # The protocol's own calls in the name of its one node.
        calls = ServicerBase.get_stub.__func__(DHTProtocol, daemon.p2p, PeerID(peer))
        stub = AuthRPCWrapper(calls, AuthRole.CLIENT, None)
        while self._left:
            ids = (b"", chance.randbytes(20), chance.randbytes(chance.randrange(100)))
            sender = dht_pb2.NodeInfo(node_id=chance.choices(ids, (45, 45, 10))[0])
            with contextlib.suppress(*TRANSPORT_FAILURES):
                if chance.random() < SEARCHES_SHARE and self._take("calls", 1):
                    keys = [chance.randbytes(chance.choice((20, 20, 19, 21, 0))) for _ in range(KEYS_AT_ONCE)]
                    await stub.rpc_find(dht_pb2.FindRequest(keys=keys, peer=sender), timeout=seconds)
                elif self._sent["records"] > self._sent["calls"]:
                    pass  # 64 come at a time
                elif count := self._take("records", RECORDS_AT_ONCE):
                    await stub.rpc_store(self._records(count, sender), timeout=seconds)
            await asyncio.sleep(1 / STORES_A_SECOND)

    def _records(self, count: int, sender: dht_pb2.NodeInfo) -> dht_pb2.StoreRequest:
        chance = self.hostile.chance
        keys, subkeys, values, expiries = zip(*(self._made.record_to_store() for _ in range(count)), strict=True)
        return dht_pb2.StoreRequest(
            # One that is no key ends the whole request.
            keys=[chance.randbytes(21) if chance.random() < 0.001 else key for key in keys],
            subkeys=subkeys,
            values=values,
            expiration_time=expiries,
            in_cache=[chance.random() < 0.5 for _ in keys],
            peer=sender,
        )


class _Streams(Attack):
    """Many at a time, to all peers by turns; opens anew what is closed."""

    async def run(self) -> None:
        """Keep them open."""
        self._opened: dict[str, int] = {}
        try:
            async with asyncio.TaskGroup() as group:
                self._open_all(group.create_task)
        finally:
            say(did=self._opened)

    def _open_all(self, start: Callable[[Any], Any]) -> None:
        raise NotImplementedError

    def _count(self, what: str) -> None:
        self._opened[what] = self._opened.get(what, 0) + 1

    async def _raw(self, peer: bytes, call: str, beginning: bytes, drop: bytes) -> None:
        """A stream to a call, its beginning, and then a drop each second."""
        p2p: P2P = self.hostile.node.dht.p2p
        while True:
            # uvloop raises RuntimeError where a peer has reset the stream that is written to.
            with contextlib.suppress(*TRANSPORT_FAILURES, RuntimeError):
                name = f"{NAMESPACE}::{PeerServicer.__name__}.{call}"
                _, _, writer = await p2p.call_binary_stream_handler(PeerID(peer), name)
                self._count(call)
                try:
                    writer.write(beginning)
                    while True:
                        await writer.drain()
                        await asyncio.sleep(1.0)
                        writer.write(drop)
                finally:
                    writer.close()
            await asyncio.sleep(1.0)


class IdleAndSlow(_Streams):
    """Connections that say nothing, and contributions that come by a byte a second."""

    def _open_all(self, start: Callable[[Any], Any]) -> None:
        ports = [address.split("/") for address in self.hostile.addresses]
        for number in range(int(self.options["connections"])):
            parts = ports[number % len(ports)]
            start(self._idle(parts[2], int(parts[4])))
        for peer in self.hostile.peers:
            for _ in range(STREAMS_A_PEER):
                start(self._raw(peer, "rpc_contribute", P2P.MESSAGE_MARKER + (1000).to_bytes(8, P2P.BYTEORDER), b"\0"))

    async def _idle(self, host: str, port: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(host, port)
                self._count("connections")
                try:
                    while await reader.read(1000):
                        pass
                finally:
                    writer.close()
            await asyncio.sleep(1.0)


class UnfinishedFrames(_Streams):
    """Frames of 1 MiB on `follow`, of which the last byte never comes."""

    def _open_all(self, start: Callable[[Any], Any]) -> None:
        beginning = P2P.MESSAGE_MARKER + FRAME_BYTES.to_bytes(8, P2P.BYTEORDER) + bytes(FRAME_BYTES - 1)
        for peer in self.hostile.peers:
            for _ in range(int(self.options["streams"])):
                start(self._raw(peer, "rpc_follow", beginning, b""))


class FalseRecords(Attack):
    """Signed records in the DHT that say nothing true. `what`: peers, runs, keys; `count` of them."""

    _route = "/ip4/127.0.0.1/tcp/9"
    """Where peers are said to be."""

    async def prepare(self) -> list[bytes]:
        """Sign with identities that are made up, but have keys."""
        self._identities = [identity_from(self.hostile.chance) for _ in range(int(self.options["count"]))]
        self._stored = 0
        return [self.hostile.node.peer_id]

    async def run(self) -> None:
        """Store them, and again before they expire."""
        try:
            while True:
                began = time.monotonic()
                for some in self._batches():
                    await self._store(some)
                await asyncio.sleep(max(1.0, RECORD_SECONDS / 2 - (time.monotonic() - began)))
        finally:
            say(did={"records_stored": self._stored})

    def _batches(self) -> list[list[Any]]:
        size = KEYS_AT_ONCE if self.options["what"] == "keys" else RECORDS_AT_ONCE
        return [self._identities[start : start + size] for start in range(0, len(self._identities), size)]

    async def _store(self, identities: list[Any]) -> None:
        seconds = KEYS_SECONDS if self.options["what"] == "keys" else RECORD_SECONDS
        expires = time.time() + seconds
        keys, values, subkeys = [], [], []
        for identity in identities:
            key, record = self._record(identity.peer_id)
            keys.append(key.encode())
            values.append(encode_record(identity, key, record, expires))
            subkeys.append(subkey_of(identity.peer_id))
        stored = await self.hostile.node.dht.store_many(keys, values, expires, subkeys=subkeys, exclude_self=True)
        self._stored += sum(map(bool, stored.values()))

    def _record(self, peer_id: bytes) -> tuple[str, Record]:
        hostile = self.hostile
        if self.options["what"] == "runs":
            run = RunRecord(
                peer_id=peer_id,
                run_id=peer_id[6:],
                time=time.time(),
                name="attacked",
                protocol=6,
                round=1,
                state_id=bytes(32),
                members=3,
            )
            return RUNS_KEY, run
        run_id = hostile.run_id if self.options["what"] == "peers" else peer_id[6:]
        peer = PeerRecord(
            peer_id=peer_id,
            run_id=run_id,
            time=time.time(),
            name="nobody",
            state="training",
            role="member",
            round=999_999,
            state_id=bytes(32),
            total=10**12,
            addresses=[f"{self._route}/p2p/{PeerID(peer_id)}"],
        )
        return peers_key(run_id), peer


class DialElsewhere(FalseRecords):
    """The same, of peers that are said to be at an address where nobody has asked to be dialled; counts the dials."""

    async def prepare(self) -> list[bytes]:
        """Listen there."""
        self._dials = 0
        self._began = 0.0
        self._server = await asyncio.start_server(self._dialled, ELSEWHERE, 0)
        port = self._server.sockets[0].getsockname()[1]
        self._route = f"/ip4/{ELSEWHERE}/tcp/{port}"
        return await super().prepare()

    async def run(self) -> None:
        """Store the records."""
        self._began = time.monotonic()
        try:
            await super().run()
        finally:
            seconds = round(time.monotonic() - self._began, 1)
            say(did={"dials": self._dials, "seconds": seconds, "peers": len(self.hostile.peers)})

    async def close(self) -> None:
        """Listen no more."""
        self._server.close()

    async def _dialled(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._dials += 1
        writer.close()


class ReplayedSeals(Attack):
    """Real seals of real members, which are over: passed on to everybody again and again, with their tips."""

    async def prepare(self) -> list[bytes]:
        """Fetch the chain, and keep each seal as it was signed."""
        hostile, self._relayed = self.hostile, 0
        branch = await hostile.fetch()
        sealed = [decode_sealed(one, verify) for one in branch.after((branch.beginning,))[1]]
        tips = [Tip(one.seal.round, one.id, one.seal.total) for one in sealed]
        self._messages = [
            hostile.traffic.message(Relay(hostile.run_id, tip, one.signed))
            for tip, one in zip(tips, sealed, strict=True)
        ]
        return [hostile.node.peer_id]

    async def run(self) -> None:
        """Pass them on."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(RELAYS_AT_ONCE):
                    group.create_task(self._relay(self.hostile.peers[number % len(self.hostile.peers)]))
        finally:
            say(did={"seals_relayed": self._relayed, "different_seals": len(self._messages)})

    async def _relay(self, peer: bytes) -> None:
        while True:
            await self.hostile.send(peer, "rpc_relay", self.hostile.chance.choice(self._messages))
            self._relayed += 1
