"""Attacks on newcomers by peers whose addresses they are told: false manifests, texts, snapshots and chains.

Each way to mislead has an identity of its own, with a node of its own. A newcomer is told the addresses of all of them,
and that of an honest peer after them; at `FirstContact` it is told no other address than the attacker's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections.abc import AsyncIterator, Callable

import msgspec
from attacks.comings import Visitor
from attacks.forged import identity_from, made_up_peer_id, random_row
from attacks.hostile import ROUND_MAX_BYTES, STATE_BYTES, Attack, Hostile, Liar, PeerServicer, confess
from attacks.malformed import Spoiler
from google.protobuf.wrappers_pb2 import BytesValue
from lab.report import say

from p2ptrain.calls.messages import (
    NAMESPACE,
    PIECE_BYTES,
    Answer,
    BlobHeader,
    CallError,
    FileRequest,
    JoinRequest,
    PiecesHeld,
    RoundsHeader,
    RoundsRequest,
    SnapshotOffer,
    SnapshotRequest,
    Tip,
    decode_message,
)
from p2ptrain.chain import Join, Member, Row, SealError, root_round
from p2ptrain.config.manifest import SignedManifest, open_manifest
from p2ptrain.simulation.forged import Branch
from p2ptrain.state.pieces import pieces_of
from p2ptrain.state.run_files import RunFile
from p2ptrain.state.snapshot import piece_hashes, root_of
from p2ptrain.state.tensors import pack_tensors, unpack_tensors
from p2ptrain.swarm.node import SwarmNode
from p2ptrain.swarm.tasks import cancel_and_wait

NOT_UTF8 = b"\x91\xa2\xff\xfe"
"""An answer whose refusal is no text."""
WELCOME_MAX_BYTES = 1024 * 1024
PADDED_MEMBERS = 200
AHEAD_ROUNDS = 4096
"""Of a state at which nobody stands."""
LOOK_SECONDS = 1.0
SEAL_SECONDS = 1.0


class _Donors(Attack):
    """Identities that answer in one way each; `_liars` says what the way is, by name."""

    async def prepare(self) -> list[bytes]:
        """Begin to answer."""
        hostile = self.hostile
        self._nodes: list[tuple[SwarmNode, Liar]] = []
        self.answered: dict[str, int] = {}
        for name, liar in (await self._liars()).items():
            self.answered[name] = 0
            node = await hostile.another_node()
            self._nodes.append((node, liar))
            await node.add_servicer(PeerServicer(liar), NAMESPACE)
        say(addresses=[address for node, _ in self._nodes for address in (await node.join_addresses())[:1]])
        return [hostile.node.peer_id, *(node.peer_id for node, _ in self._nodes)]

    async def _liars(self) -> dict[str, Liar]:
        raise NotImplementedError

    async def run(self) -> None:
        """Wait for newcomers, which find these nodes as they find all peers."""
        try:
            async with asyncio.TaskGroup() as group:
                for node, liar in self._nodes:
                    group.create_task(self.hostile.be_found(node, liar))
        finally:
            say(did=self.answered)

    async def close(self) -> None:
        """End the nodes."""
        for node, _ in self._nodes:
            await node.close()

    def nothing_yet(self) -> Branch:
        """A chain without a round."""
        manifest, run_id = open_manifest(self.hostile.welcome.manifest)
        return Branch(manifest.beginning(run_id), self.hostile.codec)


class _Answers(Liar):
    """Gives one kind of answer to one call, and to `hello` the true one where that is not the call."""

    def __init__(self, attack: _Donors, name: str, *, welcome: Callable[[], AsyncIterator[BytesValue]] | None = None):
        super().__init__(attack.nothing_yet())
        self._attack, self._name, self._welcome = attack, name, welcome

    def count(self) -> None:
        """It was asked what it is there for."""
        self._attack.answered[self._name] += 1

    async def hello(self) -> BytesValue:
        if self._welcome is None:
            return self.traffic.message(self._attack.hostile.welcome)
        self.count()
        return await anext(self._welcome())


class HostileManifests(_Donors):
    """Manifests that are none: of other hashes, signed by nobody, malformed, endless, never there."""

    async def _liars(self) -> dict[str, Liar]:
        return {name: _Answers(self, name, welcome=way) for name, way in self.ways().items()}

    def ways(self) -> dict[str, Callable[[], AsyncIterator[BytesValue]]]:
        """Return the answers to `hello`, by name."""
        welcome, chance = self.hostile.welcome, self.hostile.chance
        signed = msgspec.msgpack.decode(welcome.manifest, type=SignedManifest)
        altered = bytearray(signed.body)
        altered[altered.index(b"nonce") + 10] ^= 1
        forger, spoiler = identity_from(chance), Spoiler(chance)

        def of(manifest: bytes) -> Callable[[], AsyncIterator[BytesValue]]:
            return lambda: _once(msgspec.msgpack.encode(msgspec.structs.replace(welcome, manifest=manifest)))

        def signed_as(body: bytes, signature: bytes) -> bytes:
            return msgspec.msgpack.encode(SignedManifest(body, signature))

        return {
            "altered": of(signed_as(bytes(altered), signed.signature)),
            "signed_by_another": of(signed_as(signed.body, forger.key.sign(self.hostile.run_id))),
            "malformed": of(spoiler.spoiled(welcome.manifest)),
            "nested": of(b"\x91" * 16_000),
            "too_long": of(welcome.manifest + bytes(16 * 1024)),
            "endless": lambda: _once(b"\x91" * WELCOME_MAX_BYTES),
            "no_text": lambda: _once(NOT_UTF8),
            "silent": _never,
        }


class _HandsOut(_Answers):
    """Answers `file` with these frames."""

    def __init__(self, attack: _Donors, name: str, frames: Callable[[FileRequest], AsyncIterator[BytesValue]]) -> None:
        super().__init__(attack, name)
        self._frames = frames

    async def file(self, request: bytes) -> AsyncIterator[BytesValue]:
        self.count()
        async for frame in self._frames(decode_message(request, FileRequest)):
            yield frame


class HostileTexts(_Donors):
    """Texts that are another's, that are spoiled, that never end, or are malformed."""

    async def _liars(self) -> dict[str, Liar]:
        hostile, traffic = self.hostile, self.hostile.traffic
        config = hostile.replica.manifest.data.token_file
        assert config is not None
        file = RunFile(config.bytes, bytes.fromhex(config.root))
        donor, pieces = hostile.peers[0], pieces_of(file.length)
        hashes = (await hostile.calls.file(donor, file, 0, pieces, hashes=True, timeout_seconds=30.0)).hashes
        real = [
            (await hostile.calls.file(donor, file, number, number + 1, timeout_seconds=30.0)).pieces[0]
            for number in range(pieces)
        ]

        async def begin(held: bytes = b"") -> AsyncIterator[BytesValue]:
            yield traffic.message(Answer(""))
            yield traffic.message(PiecesHeld(held))

        async def of(
            wanted: FileRequest, hashes: bytes, piece: Callable[[bytes], bytes], held: bytes = b""
        ) -> AsyncIterator[BytesValue]:
            """Answer with these hashes, and with pieces that something was done to."""
            async for frame in begin(held):
                yield frame
            blobs = [hashes] if wanted.hashes else [piece(real[n]) for n in range(wanted.first, wanted.end)]
            for blob in blobs:
                for frame in traffic.blob(blob):
                    yield frame

        async def announced(length: int, pause_seconds: float, piece: bytes) -> AsyncIterator[BytesValue]:
            async for frame in begin():
                yield frame
            yield traffic.message(BlobHeader(length, hashlib.sha256().digest()))
            while True:
                yield traffic.frame(piece)
                await asyncio.sleep(pause_seconds)

        def flipped(data: bytes) -> bytes:
            return bytes(byte ^ 1 for byte in data)

        whole = bytes(PIECE_BYTES)
        ways: dict[str, Callable[[FileRequest], AsyncIterator[BytesValue]]] = {
            "another": lambda wanted: of(wanted, flipped(hashes), flipped),
            "spoiled": lambda wanted: of(wanted, hashes, flipped),
            "short": lambda wanted: of(wanted, hashes, lambda data: data[:-1]),
            "has_none": lambda wanted: of(wanted, hashes, bytes, bytes(-(-pieces // 8))),
            "endless": lambda wanted: announced(len(real[0]), 0.0, whole),
            "terabyte": lambda wanted: announced(2**40, 0.0, whole),
            "no_text": lambda wanted: _once(NOT_UTF8),
            "trickled": lambda wanted: announced(len(real[0]), 1.0, b"\0"),
            "silent": lambda wanted: _never(),
        }
        return {name: _HandsOut(self, name, way) for name, way in ways.items()}


async def _once(data: bytes) -> AsyncIterator[BytesValue]:
    yield BytesValue(value=data)


async def _never() -> AsyncIterator[BytesValue]:
    await asyncio.sleep(math.inf)
    yield BytesValue()


class _WithSnapshot(Liar):
    """Hands out the rounds of a chain after a snapshot, without which there is no way from the run's beginning."""

    def __init__(self, branch: Branch) -> None:
        super().__init__(branch)
        self.offer: SnapshotOffer | None = None
        self.held = b""

    @property
    def stands_on(self) -> Branch:
        """The chain that it hands out."""
        return self.branch

    def tip(self) -> Tip:
        return self.stands_on.tip

    async def rounds(self, wanted: RoundsRequest) -> AsyncIterator[BytesValue]:
        self.asked += 1
        ancestor, rounds = self.stands_on.after(wanted.locator)
        yield self.traffic.message(Answer(""))
        offers = () if self.offer is None else (self.offer,)
        yield self.traffic.message(RoundsHeader(ancestor, len(rounds), self.tip(), offers))
        for encoded in rounds:
            for frame in self.traffic.blob(encoded):
                yield frame

    async def snapshot(self, request: bytes) -> AsyncIterator[BytesValue]:
        wanted, held, offer = decode_message(request, SnapshotRequest), self.held, self.offer
        if offer is None or (wanted.id, wanted.root) != (offer.id, offer.root):
            yield self.traffic.message(Answer("no such snapshot here any more"))
            return
        yield self.traffic.message(Answer(""))
        yield self.traffic.message(PiecesHeld(b""))
        if wanted.hashes:
            for frame in self.traffic.blob(b"".join(piece_hashes(held)[wanted.first : wanted.end])):
                yield frame
            return
        for number in range(wanted.first, wanted.end):
            for frame in self.traffic.blob(self.piece(held[number * STATE_BYTES : (number + 1) * STATE_BYTES])):
                yield frame

    def piece(self, data: bytes) -> bytes:
        """Return a piece as it is handed out."""
        return data


class _Snapshots(_WithSnapshot):
    """Stands on the honest chain, and has its snapshot in a way of its own."""

    def __init__(self, attack: _Donors, name: str, scout: Visitor) -> None:
        super().__init__(attack.nothing_yet())
        self._attack, self._name, self._scout = attack, name, scout
        self.made_up: Branch | None = None

    async def hello(self) -> BytesValue:
        return self.traffic.message(self._attack.hostile.welcome)

    @property
    def stands_on(self) -> Branch:
        return self.made_up or self._scout.liar.branch

    async def rounds(self, wanted: RoundsRequest) -> AsyncIterator[BytesValue]:
        locator = tuple(one for one in wanted.locator if one != wanted.run_id)
        async for frame in super().rounds(RoundsRequest(wanted.run_id, locator)):
            yield frame

    def piece(self, data: bytes) -> bytes:
        self._attack.answered[self._name] += 1
        return data if self._name != "wrong_pieces" else bytes(byte ^ 1 for byte in data)


class HostileSnapshots(_Donors):
    """Snapshots with wrong pieces, roots of their own, padded lists of members, or a state that is nobody's."""

    async def _liars(self) -> dict[str, Liar]:
        self._tasks: list[asyncio.Task[None]] = []
        self._scout = await Visitor.create(self.hostile, None, self.hostile.node)
        self._tasks.append(asyncio.create_task(self._scout.live()))
        names = ("wrong_pieces", "own_root", "padded", "elsewhere")
        self._made = {name: _Snapshots(self, name, self._scout) for name in names}
        await self._take_newest()
        self._tasks.append(asyncio.create_task(self._keep_up()))
        return dict(self._made)

    async def close(self) -> None:
        """Stop looking on as well."""
        await cancel_and_wait(self._tasks)
        await super().close()

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            with contextlib.suppress(CallError):
                await self._take_newest()

    async def _take_newest(self) -> None:
        """Have the snapshot that honest peers offer, in all ways."""
        hostile, donor = self.hostile, self.hostile.peers[0]
        header, _ = await hostile.calls.rounds(donor, (hostile.run_id,), ROUND_MAX_BYTES)
        offer = max(header.snapshots, key=lambda one: one.round, default=None)
        if offer is None or offer == self._made["wrong_pieces"].offer:
            return
        data = b""
        for number in range(-(-offer.length // STATE_BYTES)):
            data += (await hostile.calls.snapshot(donor, offer, number, number + 1, timeout_seconds=30.0)).pieces[0]
        self._offer("wrong_pieces", offer, data)
        self._offer("own_root", offer, data[:-4] + b"\0\0\0\x3f")
        state = hostile.replica.snapshot_chain(data)
        chance, arrays = hostile.chance, unpack_tensors(data, hostile.replica.shapes)[1]
        made_up = tuple(
            Member(made_up_peer_id(chance), random_row(chance, 1000), 0, True) for _ in range(PADDED_MEMBERS)
        )
        padded = msgspec.structs.replace(state, now=state.now + made_up, following=state.following + made_up)
        self._offer("padded", offer, pack_tensors(msgspec.msgpack.encode(padded), arrays))
        if self._made["elsewhere"].offer is None:
            self._go_elsewhere(offer, state.round, data)

    def _offer(self, name: str, like: SnapshotOffer, data: bytes) -> None:
        made, root = self._made[name], root_of(len(data), piece_hashes(data))
        if name == "wrong_pieces":
            assert root == like.root, "an honest peer's snapshot is as it says"
        made.held = data
        made.offer = msgspec.structs.replace(like, root=root, length=len(data))

    def _go_elsewhere(self, like: SnapshotOffer, round: int, data: bytes) -> None:
        """A state far ahead whose members are all the attacker's, and rounds after it that name its root."""
        hostile = self.hostile
        me, interval = hostile.node.identity, hostile.replica.manifest.round.root_interval
        state, arrays = hostile.replica.snapshot_chain(data), unpack_tensors(data, hostile.replica.shapes)[1]
        alone = (Member(me.peer_id, Row(1, 1000, 1000), 0, True),)
        state = msgspec.structs.replace(
            state,
            round=round + AHEAD_ROUNDS // interval * interval,
            id=hostile.chance.randbytes(32),
            parent=hostile.chance.randbytes(32),
            total=state.total + 10**9,
            now=alone,
            following=alone,
        )
        packed = pack_tensors(msgspec.msgpack.encode(state), arrays)
        self._offer("elsewhere", msgspec.structs.replace(like, round=state.round, id=state.id), packed)
        made = self._made["elsewhere"]
        assert made.offer is not None
        branch, forged = Branch(state, hostile.codec), list[bytes]()
        for _ in range(interval):
            due = root_round(branch.state.round + 1, interval) == state.round
            forged.append(branch.forge(me, root=made.offer.root if due else b"").id)
        made.made_up = branch
        confess(forged)


class _Introducer(_WithSnapshot):
    """The only peer whose address a newcomer is told: it hands out the true manifest, and a chain of its own."""

    def __init__(self, branch: Branch, hostile: Hostile) -> None:
        super().__init__(branch)
        self._hostile = hostile
        self.offer, self.held = hostile.fetched
        self.asking: dict[bytes, Row] = {}

    async def hello(self) -> BytesValue:
        return self.traffic.message(msgspec.structs.replace(self._hostile.welcome, tip=self.tip()))

    def asked_to_join(self, peer: bytes, request: bytes) -> None:
        self.asking[peer] = decode_message(request, JoinRequest).row


class FirstContact(Attack):
    """Hand a newcomer a chain that parts from the honest one and goes on alone, and admit it as a member there.

    `rounds`: made up before it comes; more than a peer remembers, or few.
    """

    async def prepare(self) -> list[bytes]:
        """Fetch the chain."""
        self._branch = await self.hostile.fetch()
        self._liar = _Introducer(self._branch, self.hostile)
        self._admitted: set[bytes] = set()
        await self.hostile.serve(self._liar)
        return [self.hostile.node.peer_id]

    async def run(self) -> None:
        """Make up rounds, then one each second, for whoever comes."""
        await self._seal(solo=True)
        for _ in range(int(self.options["rounds"]) - 1):
            await self._seal()
        say(addresses=(await self.hostile.node.join_addresses())[:1])
        found = asyncio.create_task(self.hostile.be_found(self.hostile.node, self._liar))
        try:
            while True:
                await asyncio.sleep(SEAL_SECONDS)
                await self._seal(admits=True)
        finally:
            found.cancel()
            say(did={"asked_for_rounds": self._liar.asked, "admitted": len(self._admitted)})

    async def _seal(self, *, solo: bool = False, admits: bool = False) -> None:
        branch = self._branch
        listed = {member.peer_id for member in branch.state.following}
        joins = [Join(peer, row) for peer, row in sorted(self._liar.asking.items()) if admits and peer not in listed]
        try:
            sealed = branch.forge(self.hostile.node.identity, solo=solo, joins=tuple(joins[:1]))
        except SealError:
            sealed = branch.forge(self.hostile.node.identity, solo=True)
        self._admitted |= {join.peer_id for join in sealed.seal.joins}
        confess([sealed.id])
        await asyncio.sleep(0)
