"""A peer's place in the network: one libp2p daemon, one DHT node, the servicers of this process, and their upkeep.

Everything runs on the loop that called `SwarmNode.create`. The daemon is watched and, when it dies, started again with
the same identity and port; the DHT node outlives it, with all it stores, and the servicers are registered again. Peers
once seen are dialled again when the routing table has lost them, so two halves of a network find together. Cost: one
small request to a few peers every `UPKEEP_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from hivemind.dht import DHTID, DHTNode
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2PHandlerError, PeerID, ServicerBase
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.proto import dht_pb2
from hivemind.utils.auth import AuthRole, AuthRPCWrapper

from p2ptrain.config.manifest import open_manifest
from p2ptrain.errors import AddressError, ManifestError, P2PTrainError, UnreachableError
from p2ptrain.swarm import crawl, meeting
from p2ptrain.swarm.addresses import (
    claim_port,
    is_loopback_host,
    order_for_dialling,
    parse_addresses,
    parse_announced,
)
from p2ptrain.swarm.circuits import RelayCaps, reserve
from p2ptrain.swarm.clock import ClockWatch
from p2ptrain.swarm.daemon import Daemon, DaemonSettings, SocketDirectory
from p2ptrain.swarm.guards import install_guards
from p2ptrain.swarm.identity import Identity, format_peer_id, load_or_create_identity
from p2ptrain.swarm.line import Line
from p2ptrain.swarm.reach import ip_of
from p2ptrain.swarm.records import (
    MANIFEST_SECONDS,
    MANIFEST_SUBKEY,
    PEER_RECORD_SECONDS,
    RUNS_KEY,
    PeerRecord,
    R,
    Record,
    RecordError,
    RunRecord,
    encode_record,
    key_id_of,
    manifest_key,
    open_record,
    peer_of,
    peers_key,
    subkey_of,
)
from p2ptrain.swarm.storage import RECORDS_PER_KEY
from p2ptrain.swarm.tasks import cancel_and_wait, failure_logged
from p2ptrain.swarm.validator import SignedRecordValidator

UPKEEP_SECONDS = 10.0
EXPLORE_SECONDS = 300.0
"""Between two searches for nodes that are not known yet, while nothing changes or the network is not small."""
SMALL_NETWORK = 20
UPKEEP_PEERS = 3
"""Peers missing from the routing table that are dialled again at each upkeep."""
MAX_KNOWN_PEERS = 256
RESTART_SECONDS = 0.5
"""Wait before the second attempt to restart the daemon; doubles up to `MAX_RESTART_SECONDS`."""
MAX_RESTART_SECONDS = 10.0
CLOCK_SECONDS = 60.0
"""Between two times that others are asked what time it is."""
CLOCKS_ASKED, CLOCK_ANSWER_SECONDS = 5, 1.0
"""A slower answer says too little: it may be off by half of what it took."""
_REGISTER_SECONDS = 10.0

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class SwarmNode:
    """Made by `create`, ended by `close`. Methods are for the loop that made it."""

    def __init__(self, identity: Identity, settings: DaemonSettings, sockets: SocketDirectory, daemon: Daemon) -> None:
        """Use `create`."""
        self.identity = identity
        self.peer_id = identity.peer_id
        self.port = settings.port
        """TCP port, the one to remember for the next start; meaningless for an observer."""
        self.observer = not settings.listen
        self.dht: DHTNode
        #: Coroutines to run after the daemon was restarted, in order; servicers are registered again before them.
        self.on_restart: list[Callable[[], Awaitable[None]]] = []
        #: {peer id: routes without /p2p/ID} of peers that have answered once, the most recent last.
        self.known_peers: dict[bytes, list[str]] = {}
        #: {peer id: full multiaddrs} as records say, which may be made up, the most recent last.
        self._told: dict[bytes, Sequence[str]] = {}
        #: What the owner's limits let go; None: all.
        self.line = settings.line
        #: Times the daemon has been restarted.
        self.restarts = 0
        self._settings = settings
        self._sockets = sockets
        self._daemon = daemon
        self._servicers: list[tuple[ServicerBase, str | None]] = []
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def create(
        cls,
        identity_path: Path | None,
        initial_peers: Iterable[str] = (),
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        announce: Sequence[str] = (),
        observer: bool = False,
        nat: bool | None = None,
        relaying: RelayCaps | None = None,
        line: Line | None = None,
        timeout_seconds: float = 5.0,
    ) -> SwarmNode:
        """Starts a node and, given `initial_peers` (full multiaddrs, any one of which suffices), joins their DHT.

        `identity_path` None is an identity for this process only. `host` is the IP address to listen on and `port` the
        TCP port (0: a free one). `announce` replaces the addresses found. An observer listens nowhere and is listed by
        nobody. `nat` (default: unless `host` is loopback) opens ports by UPnP and uses relays. With
        `relaying` it is such a relay for others. `line` holds back what the owner's limits do not let go.

        Raises AddressError, PortInUseError, UnreachableError (within about twice `timeout_seconds`), ClockSkewError,
        HomeError, DaemonError; nothing is left running then.
        """
        install_guards()
        sockets = SocketDirectory()
        daemon = None
        try:
            identity_path = sockets.path / "identity" if identity_path is None else identity_path
            identity = load_or_create_identity(identity_path)
            peers = parse_addresses(initial_peers, own_peer_id=identity.peer_id)
            settings = DaemonSettings(
                identity_path=identity_path,
                sockets=sockets.path,
                host=host,
                port=0 if observer else claim_port(host, port),
                announce=[parse_announced(text, identity.peer_id) for text in announce],
                listen=not observer,
                nat=not is_loopback_host(host) if nat is None else nat,
                relays=[f"{route}/p2p/{PeerID(peer_id)}" for peer_id, routes in peers.items() for route in routes],
                relaying=relaying,
                line=line,
            )
            daemon = await Daemon.start(settings)
            self = cls(identity, settings, sockets, daemon)
            if line is not None:
                # What it takes to meet the others counts, too.
                self._tasks.append(asyncio.create_task(line.run(lambda: self.daemon_pid)))
            self.dht = await DHTNode.create(
                p2p=daemon.p2p,
                client_mode=observer,
                record_validator=SignedRecordValidator(),
                # Readers want what is true now, and what is cached at others is not merged when it changes.
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
            )
            if peers:
                await meeting.meet(self.dht, peers, timeout_seconds)
                for peer_id, routes in peers.items():
                    self.remember(peer_id, routes)
                await self._explore(timeout_seconds)
        except BaseException:
            if daemon is not None:
                await daemon.stop()
                await cancel_and_wait(self._tasks)
            sockets.remove()
            raise
        self._tasks += [asyncio.create_task(self._watch_daemon()), asyncio.create_task(self._keep_up())]
        for task in self._tasks:
            task.add_done_callback(failure_logged(_logger, "the node's upkeep has failed"))
        return self

    async def close(self) -> None:
        """Ends the daemon and removes its sockets. Idempotent."""
        await cancel_and_wait(self._tasks)
        self._tasks = []
        if self.line is not None:
            self.line.close()
        self.dht.is_alive = False
        await self._daemon.stop()
        self._sockets.remove()

    # Reaching, and being reached

    @property
    def daemon_pid(self) -> int:
        """Process id of the libp2p daemon that runs now."""
        return self._daemon.pid

    @property
    def dialable(self) -> bool:
        """Whether this peer accepts connections at all; whether a firewall lets them through, it cannot know."""
        return not self.observer

    async def join_addresses(self) -> list[str]:
        """Full multiaddrs by which others may dial this peer, those that work for most first; [] when none."""
        if self.observer:
            return []
        routes = []
        # hivemind raises ValueError where libp2p knows no address, for example without any network interface.
        with contextlib.suppress(ValueError, P2PDaemonError, OSError, EOFError):
            found = await self._daemon.p2p.get_visible_maddrs(latest=True)
            routes = [str(address).rpartition("/p2p/")[0] for address in found]
        return [f"{route}/p2p/{format_peer_id(self.peer_id)}" for route in order_for_dialling(routes)]

    async def connect(self, peer_id: bytes, addresses: Iterable[str] = (), *, timeout_seconds: float = 5.0) -> None:
        """Makes sure of a connection to `peer_id`, by `addresses` (full multiaddrs), or else those of its record, and
        by known ones, or the DHT's.

        Raises UnreachableError, AddressError.
        """
        given = parse_addresses(addresses, own_peer_id=self.peer_id).get(peer_id, []) or self._told_routes(peer_id)
        routes = list(dict.fromkeys([*given, *self.known_peers.get(peer_id, [])]))
        await meeting.dial(self._daemon.p2p, peer_id, routes, timeout_seconds)
        self.remember(peer_id, routes)

    async def reserve(self, relay: bytes) -> list[str]:
        """Reserves a place at a relay, and returns the full multiaddrs by which others then reach this peer through it.

        Raises UnreachableError.
        """
        await self.connect(relay)
        circuit_bytes = await reserve(self._daemon.p2p, relay)
        _logger.debug("%s relays to here, %d bytes a connection", format_peer_id(relay)[-8:], circuit_bytes)
        through = format_peer_id(relay), format_peer_id(self.peer_id)
        # Who cannot be dialled has dialled the relay itself, so these lead there.
        routes = order_for_dialling((await self.connected()).get(relay, []))
        return [f"{route}/p2p/{through[0]}/p2p-circuit/p2p/{through[1]}" for route in routes if "/p2p-" not in route]

    async def connected(self) -> dict[bytes, list[str]]:
        """{peer id: the routes of its connections} of all that this peer is connected to."""
        with contextlib.suppress(P2PDaemonError, OSError, EOFError, ValueError):
            return {p.peer_id.to_bytes(): [str(a) for a in p.addrs] for p in await self._daemon.p2p.list_peers()}
        return {}

    async def seen_at(self, peer_id: bytes) -> str:
        """The IP address that `peer_id` is connected from; "" when it is not, or through a relay."""
        with contextlib.suppress(P2PDaemonError, OSError, EOFError, ValueError):
            for peer in await self._daemon.p2p.list_peers():
                if peer.peer_id.to_bytes() == peer_id:
                    return ip_of(str(address) for address in peer.addrs)
        return ""

    async def ping(self, peer_id: bytes) -> bool:
        """Whether the DHT node of `peer_id` answers, within 3 s."""
        return await self.dht.protocol.call_ping(PeerID(peer_id)) is not None

    async def crawl(self, *, timeout_seconds: float = 8.0) -> crawl.Census:
        """Who is in the DHT and who of them answers; includes this node, unless it is an observer.

        Read the records of a run before: they tell how to dial its peers.
        """
        told = {peer_id: self._told_routes(peer_id) for peer_id in self._told}
        census = await crawl.crawl(self.dht, told | self.known_peers, timeout_seconds)
        return census if self.observer else crawl.Census(census.alive | {self.peer_id}, census.dead)

    def remember(self, peer_id: bytes, routes: Sequence[str]) -> None:
        """Keeps `routes` (multiaddrs without /p2p/ID), for when the DHT has lost `peer_id`. Forgets the oldest."""
        if peer_id != self.peer_id and routes:
            _keep_newest(self.known_peers, peer_id, list(routes))

    def _told_routes(self, peer_id: bytes) -> list[str]:
        # An address that cannot be read is that peer's affair.
        with contextlib.suppress(AddressError):
            return parse_addresses(self._told.get(peer_id, ())).get(peer_id, [])
        return []

    def known_addresses(self) -> list[str]:
        """Full multiaddrs of peers once seen, the most recent first: what to keep on disk for the next start."""
        known = reversed(self.known_peers.items())
        return [f"{route}/p2p/{PeerID(peer_id)}" for peer_id, routes in known for route in routes]

    # Calls between peers

    async def add_servicer(self, servicer: ServicerBase, namespace: str | None = None) -> None:
        """Lets others call the rpc_* methods of `servicer` in `namespace`, also after the daemon was restarted."""
        async with asyncio.timeout(_REGISTER_SECONDS):
            await servicer.add_p2p_handlers(self._daemon.p2p, namespace=namespace)
        self._servicers.append((servicer, namespace))

    async def remove_servicer(self, servicer: ServicerBase) -> None:
        """Answers no more calls of `servicer`; those under way end as they do."""
        found = [entry for entry in self._servicers if entry[0] is servicer]
        self._servicers = [entry for entry in self._servicers if entry[0] is not servicer]
        for _, namespace in found:
            # A daemon that has died has forgotten it anyway.
            with contextlib.suppress(P2PDaemonError, OSError, EOFError, TimeoutError):
                async with asyncio.timeout(_REGISTER_SECONDS):
                    await servicer.remove_p2p_handlers(self._daemon.p2p, namespace=namespace)

    def stub(self, servicer_type: type[ServicerBase], peer_id: bytes, namespace: str | None = None) -> Any:
        """An object whose rpc_* methods call those of `peer_id`. Ask anew for each call: a restart outdates it."""
        return servicer_type.get_stub(self._daemon.p2p, PeerID(peer_id), namespace=namespace)

    # Records

    async def publish(
        self, key: str, record: Record, seconds: float, secret: bytes = b"", *, timeout_seconds: float = 10.0
    ) -> bool:
        """Signs `record` and stores it under `key` for `seconds`; False when no node took it in time."""
        expires = time.time() + seconds
        data = encode_record(self.identity, key, record, expires, secret)
        return await self._store(key, data, expires, subkey_of(self.peer_id), timeout_seconds)

    async def read(
        self, key: str, record_type: type[R], secret: bytes = b"", *, timeout_seconds: float = 10.0
    ) -> dict[bytes, R]:
        """All valid records of one type under `key`, by publisher; empty also when nobody answers in time."""
        return self.open_records(key, await self.get(key, timeout_seconds=timeout_seconds) or {}, record_type, secret)

    def open_records(
        self, key: str, found: Mapping[Any, Any], record_type: type[R], secret: bytes = b""
    ) -> dict[bytes, R]:
        """Those of what was found under `key` that are valid records of one type, by publisher."""
        now = time.time()
        records: dict[bytes, R] = {}
        brought = [(peer_of(subkey), data) for subkey, data in found.items()]
        # Several nodes may each have answered with as many as there may be: those who once answered us come first.
        brought.sort(key=lambda item: item[0] not in self.known_peers and item[0] != self.peer_id)
        for peer_id, data in brought[:RECORDS_PER_KEY]:
            if peer_id is not None:
                try:
                    records[peer_id] = open_record(data, key, peer_id, record_type, now=now, secret=secret)
                except RecordError as error:
                    _logger.debug("record of %s under %s: %s", format_peer_id(peer_id), key, error)
        for peer_id, record in records.items():
            if isinstance(record, PeerRecord) and peer_id != self.peer_id and record.addresses:
                _keep_newest(self._told, peer_id, record.addresses)
        return records

    async def publish_peer(self, record: PeerRecord, secret: bytes = b"") -> bool:
        """Tells the run's peers about this one, for `PEER_RECORD_SECONDS`; `secret`: the manifest's `records_key`."""
        return await self.publish(peers_key(record.run_id), record, PEER_RECORD_SECONDS, secret)

    async def read_peers(
        self, run_id: bytes, secret: bytes = b"", *, timeout_seconds: float = 10.0
    ) -> dict[bytes, PeerRecord]:
        """{peer id: its record} of a run; killed peers stay until their records expire."""
        return await self.read(peers_key(run_id), PeerRecord, secret, timeout_seconds=timeout_seconds)

    async def read_runs(self, *, timeout_seconds: float = 10.0) -> dict[bytes, list[RunRecord]]:
        """{run id: what each of its peers published} for all runs in this DHT."""
        runs: dict[bytes, list[RunRecord]] = {}
        for record in (await self.read(RUNS_KEY, RunRecord, timeout_seconds=timeout_seconds)).values():
            runs.setdefault(record.run_id, []).append(record)
        return runs

    async def store_manifest(self, encoded: bytes, *, timeout_seconds: float = 10.0) -> bool:
        """Keeps a signed manifest in the DHT for `MANIFEST_SECONDS`. ManifestError when it is not valid."""
        _, run_id = open_manifest(encoded)
        expires = time.time() + MANIFEST_SECONDS
        return await self._store(manifest_key(run_id), encoded, expires, MANIFEST_SUBKEY, timeout_seconds)

    async def get_manifest(self, run_id: bytes, *, timeout_seconds: float = 10.0) -> bytes | None:
        """The signed manifest of `run_id`, checked; None when the DHT does not have it."""
        found = await self.get(manifest_key(run_id), timeout_seconds=timeout_seconds) or {}
        encoded = found.get(MANIFEST_SUBKEY)
        if isinstance(encoded, bytes):
            with contextlib.suppress(ManifestError):
                open_manifest(encoded, run_id)
                return encoded
        return None

    async def _store(self, key: str, value: bytes, expires: float, subkey: bytes, timeout_seconds: float) -> bool:
        # An observer's own storage is one that nobody can ask.
        try:
            async with asyncio.timeout(timeout_seconds):
                return bool(
                    await self.dht.store(key.encode(), value, expires, subkey=subkey, exclude_self=self.observer)
                )
        except TimeoutError:
            return False

    async def get(self, key: str, *, latest: bool = True, timeout_seconds: float = 10.0) -> dict[Any, Any] | None:
        """{subkey: value} under `key`, unchecked: of all nodes near it, or else of the first that has any; None: nobody
        has answered in time."""
        try:
            async with asyncio.timeout(timeout_seconds):
                found = await self.dht.get(key.encode(), latest=latest)
        except TimeoutError:
            return None
        if found is None or not isinstance(found.value, dict):
            return {}
        return {subkey: item.value for subkey, item in found.value.items()}

    # Of single nodes

    @property
    def peer(self) -> PeerID:
        """This node, as the DHT names it."""
        return PeerID(self.peer_id)

    def nearest(self, key: str, others: Mapping[DHTID, PeerID]) -> dict[DHTID, PeerID]:
        """Nodes that this one knows, and `others`, and itself unless it is an observer; the nearest to `key` first."""
        place, table = DHTID.from_bytes(key_id_of(key)), self.dht.protocol.routing_table
        known = table.get_nearest_neighbors(place, self.dht.protocol.bucket_size, exclude=self.dht.node_id)
        found = {node: peer for node, peer in {**others, **dict(known)}.items() if peer not in self.dht.blacklist}
        if not self.observer:
            found[self.dht.node_id] = self.peer
        return {node: found[node] for node in sorted(found, key=place.xor_distance)}

    async def search(self, key: str, count: int, *, timeout_seconds: float = 10.0) -> dict[DHTID, PeerID]:
        """The nodes nearest to `key`, by asking those that are nearer and nearer; fewer when time is over."""
        # The place beside it has the same nodes around it, and nobody stores anything there that would come along.
        place = DHTID(int(DHTID.from_bytes(key_id_of(key))) ^ 1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                return (await self.dht.find_nearest_nodes([place], k_nearest=count, exclude_self=True))[place]
        return {}

    async def store_at(self, peer: PeerID, key: str, value: bytes, expires: float, subkey: bytes) -> bool:
        """Stores at one node, which may be this one; False when it does not answer, or does not take it."""
        protocol, place = self.dht.protocol, DHTID.from_bytes(key_id_of(key))
        packed = protocol.serializer.dumps(value)
        if peer == self.peer:
            return bool(protocol.storage.store_subkey(place, subkey, packed, expires))
        taken = await protocol.call_store(peer, [place], [packed], [expires], [subkey])
        self._note_answer(peer, taken is not None)
        return bool(taken and taken[0])

    def stored(self, key: str) -> dict[Any, Any]:
        """{subkey: value} under `key` as this node stores it."""
        return _unpacked(self.dht.protocol.storage.get(DHTID.from_bytes(key_id_of(key))))

    def stored_until(self, key_ids: Container[DHTID]) -> dict[DHTID, dict[bytes, float]]:
        """{key's id: {peer id: when its record expires}} of those keys under which this node stores any."""
        return {
            key_id: {peer: one.expiration_time for subkey, one in item.value.items() if (peer := peer_of(subkey))}
            for key_id, item in self.dht.protocol.storage.items()
            if key_id in key_ids and isinstance(item.value, DictionaryDHTValue)
        }

    def spare(self, is_full: Callable[[Any], bool]) -> None:
        """Have this node store nothing under a key that is new to it, by its id, while `is_full` says so."""
        self.dht.protocol.storage.is_full = is_full

    def drop(self, key: str) -> None:
        """Store nothing under a key any more."""
        with contextlib.suppress(KeyError):
            del self.dht.protocol.storage[DHTID.from_bytes(key_id_of(key))]

    @property
    def knows_everybody(self) -> bool:
        """Whether the network is so small that the routing table has all of it."""
        return len(self.dht.protocol.routing_table.uid_to_peer_id) < SMALL_NETWORK

    async def stored_at(self, peer: PeerID, key: str) -> tuple[dict[Any, Any] | None, dict[DHTID, PeerID]]:
        """What one other node has under `key`, and which nodes it holds for the nearest.

        Returns:
            ({subkey: value}, unchecked, nodes): None and {} when it does not answer.
        """
        place = DHTID.from_bytes(key_id_of(key))
        found = await self.dht.protocol.call_find(peer, [place])
        self._note_answer(peer, found is not None)
        if found is None:
            return None, {}
        stored, nodes = found[place]
        return _unpacked(stored), {node: peer for node, peer in nodes.items() if peer not in self.dht.blacklist}

    def _note_answer(self, peer: PeerID, answered: bool) -> None:
        if answered:
            self.dht.blacklist.register_success(peer)
        else:
            self.dht.blacklist.register_failure(peer)

    # Upkeep

    async def _watch_daemon(self) -> None:
        while True:
            await self._daemon.died()
            _logger.warning("the libp2p daemon has died; starting it again")
            delay = RESTART_SECONDS
            while True:
                try:
                    await self._restart()
                    break
                except (P2PTrainError, P2PDaemonError, OSError, EOFError, TimeoutError) as error:
                    _logger.warning("the libp2p daemon does not come back, next attempt in %.1f s: %s", delay, error)
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, MAX_RESTART_SECONDS)

    async def _restart(self) -> None:
        await self._daemon.stop()
        if not self.observer:
            claim_port(self._settings.host, self.port)
        self._daemon = await Daemon.start(self._settings)
        p2p = self.dht.p2p = self.dht.protocol.p2p = self._daemon.p2p
        self.dht.blacklist.clear()
        protocol = self.dht.protocol
        registrations = [servicer.add_p2p_handlers(p2p, namespace=namespace) for servicer, namespace in self._servicers]
        if not self.observer:
            registrations.append(protocol.add_p2p_handlers(p2p, AuthRPCWrapper(protocol, AuthRole.SERVICER, None)))
        async with asyncio.timeout(_REGISTER_SECONDS):
            await asyncio.gather(*registrations)
        self.restarts += 1
        # The new daemon knows no addresses but those that we remember.
        remembered = [*self._told, *self.known_peers]
        await asyncio.gather(*(self._greet(peer_id) for peer_id in dict.fromkeys(remembered[-16:])))
        for callback in self.on_restart:
            await callback()

    async def _keep_up(self) -> None:
        explored, explore_due = frozenset[DHTID](), 0.0
        watch, compare_due = ClockWatch(), 0.0
        while True:
            await asyncio.sleep(UPKEEP_SECONDS * random.uniform(0.8, 1.2))
            if jumped := watch.looked(time.time(), time.monotonic()):
                _logger.warning(jumped)
                # Nodes that this one knew may have given it up, and be elsewhere.
                explore_due = compare_due = 0.0
            if time.monotonic() >= compare_due:
                compare_due = time.monotonic() + CLOCK_SECONDS
                if wrong := watch.compared(await self._ahead_of_others()):
                    _logger.warning(wrong)
            with contextlib.suppress(P2PDaemonError, OSError, EOFError, ValueError):
                for peer in await self._daemon.p2p.list_peers():
                    peer_id = peer.peer_id.to_bytes()
                    # Of who has dialled us the connection tells no address that can be dialled; its record may.
                    told = self._told_routes(peer_id)
                    if told or peer_id not in self.known_peers:
                        self.remember(peer_id, told or [str(address) for address in peer.addrs])
            table = self.dht.protocol.routing_table
            lost = [peer_id for peer_id in self.known_peers if PeerID(peer_id) not in table]
            await asyncio.gather(*(self._greet(peer) for peer in random.sample(lost, min(UPKEEP_PEERS, len(lost)))))
            # Who is new, or gone, may have brought or taken others; else a look now and then is enough.
            about = frozenset(table.uid_to_peer_id)
            if (about != explored and len(about) < SMALL_NETWORK) or time.monotonic() >= explore_due:
                await self._explore(UPKEEP_SECONDS)
                explored, explore_due = frozenset(table.uid_to_peer_id), time.monotonic() + EXPLORE_SECONDS

    async def _ahead_of_others(self) -> list[float]:
        """Return by how much this machine's clock is ahead of those of some nodes that it is connected to [s]."""

        async def ahead_of(peer: PeerID) -> float | None:
            began = time.time(), time.monotonic()
            with contextlib.suppress(P2PDaemonError, P2PHandlerError, OSError, EOFError, TimeoutError, ValueError):
                async with asyncio.timeout(CLOCK_ANSWER_SECONDS):
                    stub = self.dht.protocol.get_stub(peer)
                    theirs = (await stub.rpc_ping(dht_pb2.PingRequest())).dht_time
                # As if it had been read halfway.
                return began[0] + (time.monotonic() - began[1]) / 2 - float(theirs)
            return None

        known = list(self.dht.protocol.routing_table.peer_id_to_uid)
        answers = await asyncio.gather(*map(ahead_of, random.sample(known, min(CLOCKS_ASKED, len(known)))))
        return [ahead for ahead in answers if ahead is not None]

    async def _greet(self, peer_id: bytes) -> None:
        """Dials a peer and has it and us list each other; it may well be gone."""
        with contextlib.suppress(UnreachableError):
            routes = self.known_peers.get(peer_id) or self._told_routes(peer_id)
            await meeting.dial(self._daemon.p2p, peer_id, routes, 3.0)
            await self.dht.protocol.call_ping(PeerID(peer_id))

    async def _explore(self, timeout_seconds: float) -> None:
        """Fills the routing table with the neighbours of this node and of a random place."""
        places = [self.dht.node_id, DHTID.generate()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self.dht.find_nearest_nodes(places)


def _unpacked(found: Any) -> dict[Any, Any]:
    """{subkey: value} of what a node has stored."""
    values: dict[Any, Any] = {}
    if found is not None and isinstance(found.value, DictionaryDHTValue):
        for subkey, item in found.value.items():
            with contextlib.suppress(msgspec.MsgspecError, ValueError):
                values[subkey] = msgspec.msgpack.decode(item.value, type=bytes)
    return values


def _keep_newest(peers: dict[bytes, T], peer_id: bytes, value: T) -> None:
    peers.pop(peer_id, None)
    peers[peer_id] = value
    while len(peers) > MAX_KNOWN_PEERS:
        del peers[next(iter(peers))]
