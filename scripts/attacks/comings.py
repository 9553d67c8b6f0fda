"""Attacks on how a swarm takes newcomers in and lets members go: they ask and never come, come and die, leave and seal
alone.

A `Visitor` is as little of a member as the others take for one: its messages have weight 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import os
from pathlib import Path
from typing import Any

from attacks.forged import key_from
from attacks.hostile import ROUND_MAX_BYTES, Attack, Hostile, Liar, PeerServicer, confess
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import PeerID
from lab.report import say

from p2ptrain.calls.client import Client
from p2ptrain.calls.messages import NAMESPACE, CallError, ContributionHeader, FileRequest, JoinRequest, Traffic
from p2ptrain.chain import Key, Row, SealError, shape_of
from p2ptrain.chain.evidence import sign_contribution
from p2ptrain.chain.sealed import SealedRoundError
from p2ptrain.errors import P2PTrainError
from p2ptrain.simulation.forged import Branch
from p2ptrain.swarm import meeting
from p2ptrain.swarm.addresses import claim_port, parse_addresses
from p2ptrain.swarm.daemon import Daemon, DaemonSettings, SocketDirectory
from p2ptrain.swarm.node import SwarmNode

STARTED_AT_ONCE = 4
ASKING_SECONDS = 0.5
FOLLOWING_SECONDS = 0.1
MEMBER_SECONDS = 60.0
NEWCOMER_EVERY_SECONDS = 5.0
SOLO_SECONDS = 8.0
SOLO_ROUNDS = 1500
DIALABLE, UNDIALABLE = Row(1, 5_000, 1_000), Row(1, 5_000, 0)


class Visitor:
    """A peer that follows the chain, asks to be admitted, and as a member sends messages of weight 0."""

    def __init__(self, hostile: Hostile, node: SwarmNode, row: Row | None, branch: Branch) -> None:
        self.node, self.row, self._hostile = node, row, hostile
        self.calls = Client(node, Traffic(), hostile.run_id)
        self.liar = Liar(branch)
        self._spoke_for = 0
        self._sending: set[asyncio.Task[Any]] = set()

    @classmethod
    async def create(
        cls, hostile: Hostile, row: Row | None, node: SwarmNode | None = None, branch: Branch | None = None
    ) -> Visitor:
        """Connected to all honest peers, and answering calls.

        Args:
            row: what it says of itself; None: it looks on and says nothing.
            node: whose identity it has; else a new one.
            branch: where it begins; else it fetches the chain.
        """
        if node is None:
            node = await hostile.another_node()
        self = cls(hostile, node, row, branch or await hostile.fetch())
        await node.add_servicer(PeerServicer(self.liar), NAMESPACE)
        return self

    @property
    def included(self) -> bool:
        """Whether it is a member, and the last seal included it."""
        return any(member.peer_id == self.node.peer_id and member.included for member in self.liar.branch.state.now)

    async def live(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for peer in self._hostile.peers:
                group.create_task(self._follow(peer))
            while True:
                await self._keep_up(self._hostile.chance.choice(self._hostile.peers))
                await self._speak()
                await asyncio.sleep(FOLLOWING_SECONDS)

    async def becomes_member(self) -> None:
        """Live until the first seal that includes it. Raises TimeoutError."""
        life = asyncio.create_task(self.live())
        try:
            async with asyncio.timeout(MEMBER_SECONDS):
                while not self.included:
                    await asyncio.sleep(FOLLOWING_SECONDS)
        finally:
            life.cancel()
            await asyncio.wait({life})

    async def _follow(self, peer: bytes) -> None:
        while True:
            with contextlib.suppress(CallError):
                async for _ in self.calls.follow(peer, self.liar.tip()):
                    pass
            await asyncio.sleep(1.0)

    async def _keep_up(self, donor: bytes) -> None:
        """Fetch what is new."""
        with contextlib.suppress(CallError, SealError, SealedRoundError):
            branch = self.liar.branch
            header, encoded = await self.calls.rounds(donor, (branch.state.id, branch.state.parent), ROUND_MAX_BYTES)
            if not header.ancestor:
                self.liar.branch = branch = await self._hostile.fetch()
            elif header.ancestor != branch.state.id and encoded:
                branch.back_to_parent()
            for one in encoded if header.ancestor else []:
                branch.take(one)

    async def _speak(self) -> None:
        """Once a round: ask for admission, or take part."""
        hostile, state, me = self._hostile, self.liar.branch.state, self.node.peer_id
        if self._spoke_for > state.round or self.row is None:
            return
        self._spoke_for = state.round + 1
        shape = shape_of(state, hostile.codec.chunks)
        if all(member.peer_id != me for member in state.following):
            request = self.calls.traffic.message(JoinRequest(hostile.run_id, self.row))
            for place in shape.sealer_order[:2]:
                await self._send(shape.members[place].peer_id, "rpc_join", request)
        elif shape.index(me) is not None:
            row = Row(0, self.row.sequences_per_kilosecond, self.row.uplink_kbit)
            tip = self.liar.tip()
            key, sign = Key(shape.round, shape.base), self.node.identity.sign
            for number, part in enumerate(shape.parts):
                signature = sign_contribution(sign, hostile.run_id, key, number, row, b"")
                header = ContributionHeader(hostile.run_id, key.round, key.base, number, row, signature, 0, b"", tip)
                message = self.calls.traffic.message(header)
                task = asyncio.create_task(self._send(shape.members[part.reducer].peer_id, "rpc_contribute", message))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)

    async def _send(self, peer: bytes, call: str, frame: Any) -> None:
        if peer != self.node.peer_id:
            await self._hostile.send(peer, call, frame, stub=lambda peer: self.node.stub(PeerServicer, peer, NAMESPACE))


def stub_of(daemon: Daemon, peer: bytes) -> Any:
    """Return what calls `peer` in the name of a daemon's identity."""
    return PeerServicer.get_stub(daemon.p2p, PeerID(peer), namespace=NAMESPACE)


class ManyJoins(Attack):
    """So many identities ask each honest peer for admission, again and again, and never do anything."""

    async def prepare(self) -> list[bytes]:
        """A libp2p daemon for each, as only its key's owner can ask in an identity's name."""
        os.nice(19)  # what so many take of this machine, they would take of others
        self._sockets: list[SocketDirectory] = []
        self._daemons: list[Daemon] = []
        few = asyncio.Semaphore(STARTED_AT_ONCE)
        keys = [self.hostile.folder / f"guest-{number}.key" for number in range(int(self.options["identities"]))]
        identities = [key_from(self.hostile.chance, key).peer_id for key in keys]
        await asyncio.gather(*(self._start(key, few) for key in keys))
        return [self.hostile.node.peer_id, *identities]

    async def run(self) -> None:
        """Ask."""
        self._asked = 0
        try:
            await asyncio.gather(*(self._ask(daemon) for daemon in self._daemons))
        finally:
            say(did={"asked": self._asked})

    async def close(self) -> None:
        """End the daemons."""
        await asyncio.gather(*(daemon.stop() for daemon in self._daemons))
        for sockets in self._sockets:
            sockets.remove()

    async def _start(self, key: Path, few: asyncio.Semaphore) -> None:
        async with few:
            sockets = SocketDirectory()
            self._sockets.append(sockets)
            settings = DaemonSettings(
                identity_path=key,
                sockets=sockets.path,
                host="127.0.0.1",
                port=claim_port("127.0.0.1", 0),
                announce=[],
                listen=False,
                nat=False,
                relays=[],
            )
            daemon = await Daemon.start(settings)
            self._daemons.append(daemon)
            for peer, routes in parse_addresses(self.hostile.addresses).items():
                await meeting.dial(daemon.p2p, peer, routes, 10.0)

    async def _ask(self, daemon: Daemon) -> None:
        stub = functools.partial(stub_of, daemon)
        while True:
            for call, request in self._requests():
                for peer in self.hostile.peers:
                    self._heard(call, await self.hostile.send(peer, call, request, stub=stub))
                    self._asked += 1
            await asyncio.sleep(ASKING_SECONDS)

    def _requests(self) -> list[tuple[str, BytesValue]]:
        """What each identity asks, again and again."""
        return [("rpc_join", self.hostile.traffic.message(JoinRequest(self.hostile.run_id, DIALABLE)))]

    def _heard(self, call: str, answer: bytes | None) -> None:
        """Hear an answer."""


class FileCalls(ManyJoins):
    """So many identities ask for a piece of the run's text at once; none reads what comes."""

    def _requests(self) -> list[tuple[str, BytesValue]]:
        file = self.hostile.replica.manifest.data.token_file
        assert file is not None
        request = FileRequest(self.hostile.run_id, bytes.fromhex(file.root), 0, 1, False)
        return [("rpc_file", self.hostile.traffic.message(request))]


class DyingNewcomers(Attack):
    """A newcomer every few seconds; each becomes a member and dies as soon as a seal has included it.

    They get the chain from a scout, so that they are admitted as fast as may be.
    """

    async def prepare(self) -> list[bytes]:
        """Send out the scout."""
        self._scout = await Visitor.create(self.hostile, None, self.hostile.node)
        self._looking_on = asyncio.create_task(self._scout.live())
        return [self.hostile.node.peer_id]

    async def close(self) -> None:
        """Call it back."""
        self._looking_on.cancel()
        await asyncio.wait({self._looking_on})

    async def run(self) -> None:
        """One after the other, as many at a time as it takes."""
        self._died = self._came = 0
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    group.create_task(self._one())
                    await asyncio.sleep(NEWCOMER_EVERY_SECONDS)
        finally:
            say(did={"newcomers": self._came, "died_as_members": self._died})

    async def _one(self) -> None:
        self._came += 1
        try:
            visitor = await Visitor.create(self.hostile, DIALABLE, branch=copy.deepcopy(self._scout.liar.branch))
        except (P2PTrainError, CallError):
            return  # the swarm is too busy to be met
        try:
            await visitor.becomes_member()
            self._died += 1
        except TimeoutError:
            pass
        finally:
            await visitor.node.close()


class MemberSolo(Attack):
    """A member leaves with the chain, seals alone as fast as it can, and comes back."""

    async def prepare(self) -> list[bytes]:
        """Become a member, and live as one."""
        self._visitor = await Visitor.create(self.hostile, UNDIALABLE, self.hostile.node)
        await self._visitor.becomes_member()
        self._life: asyncio.Task[None] = asyncio.create_task(self._visitor.live())
        return [self.hostile.node.peer_id]

    async def run(self) -> None:
        """Leave, seal, come back."""
        self._life.cancel()
        await asyncio.wait({self._life})
        branch, me = self._visitor.liar.branch, self.hostile.node.identity
        self._visitor.liar.branch = Branch(branch.state, self.hostile.codec)  # what it says meanwhile
        made = [branch.forge(me, solo=True).id]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SOLO_SECONDS
        while loop.time() < deadline and len(made) < SOLO_ROUNDS:
            made.append(branch.forge(me).id)
            await asyncio.sleep(0)
        await asyncio.sleep(max(0.0, deadline - loop.time()))
        confess(made)
        self._visitor.liar.branch = branch
        await self.hostile.announce(lambda: branch.tip)

    async def close(self) -> None:
        """Stop living."""
        self._life.cancel()
        await asyncio.wait({self._life})
