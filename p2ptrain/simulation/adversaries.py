"""Peers that want a swarm to follow a chain of their making: one behaviour each, in place of an honest peer's.

An adversary knows all that there is to know, has a fast line and is always there. It watches the chain of an honest
peer, parts from it at one of the last states, and makes up rounds of no length; then it says everywhere that it stands
at the end of them, and hands them out to whoever asks. It begins anew from time to time, so that it meets the swarm in
every state that faults bring it into.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError

from p2ptrain.calls.messages import (
    Answer,
    News,
    RoundsHeader,
    RoundsRequest,
    SealsHeader,
    SealsRequest,
    Tip,
    Traffic,
    decode_message,
)
from p2ptrain.chain import Join, Row, SealError
from p2ptrain.chain.sealed import SealedRound, encode_sealed
from p2ptrain.simulation.forged import Branch
from p2ptrain.simulation.loop import Actor
from p2ptrain.simulation.network import Line, SimNode
from p2ptrain.simulation.toy import identity_of

if TYPE_CHECKING:
    from p2ptrain.simulation.peer import SimPeer
    from p2ptrain.simulation.world import World

ADVERSARIES = ("offline_chain", "made_up_members", "false_tip", "member_solo", "member_claims_all", "founder_solo")
"""
offline_chain: an outsider seals alone. made_up_members: it admits identities that nobody has, and counts them in every
round. false_tip: it says that it stands far ahead, and never answers who asks. member_solo: a member leaves with the
chain and seals alone. member_claims_all: a member leaves with it and goes on sealing rounds that include everybody.
founder_solo: the founder leaves and seals alone, from as far back as it can, so from before there were other members.
"""
OUTSIDERS = ("offline_chain", "made_up_members", "false_tip")
BEGINS_AFTER_ROUNDS = 6
AGAIN_SECONDS = 6.0
BACK_MAX = 10
"""Rounds before the victim's head, at most, where a made-up branch parts from its chain."""
SEALS_MAX = 40
_LINE_BYTES_PER_SECOND = 1e7


class Adversary:
    """See the module docstring.

    Args:
        kind: one of `ADVERSARIES`.
        number: tells several of one kind apart.
    """

    def __init__(self, world: World, kind: str, number: int) -> None:
        self._world, self._kind, self._random = world, kind, world.adversary_random
        self.identity = identity_of(f"{kind} {number}", world.seed)
        self._traffic = Traffic()
        self._branch: Branch | None = None
        self._tip = Tip(0, world.run_id, 0)
        #: who has asked for rounds of this branch
        self._asked: set[bytes] = set()
        self.node: SimNode

    async def run(self) -> None:
        """Until the history ends."""
        while self._victim() is None:
            await asyncio.sleep(1.0)
        if self._kind not in OUTSIDERS:
            await self._become_a_member()
        line = Line(_LINE_BYTES_PER_SECOND, _LINE_BYTES_PER_SECOND)
        actor = Actor(self._world.loop)
        self.node = SimNode(self._world.network, self.identity, actor, line, dialable=True)
        self.node.servicer = self
        self._world.network.add(self.node)
        actor.spawn(self._announce())
        while True:
            self._make_up()
            await asyncio.sleep(self._random.uniform(0.2, 1.8) * AGAIN_SECONDS)

    def _victim(self) -> SimPeer | None:
        there = [
            peer
            for peer in self._world.peers
            if peer.running
            and peer.trainer.replica.chain == peer.machine.head  # the oracle has learned of all that it applied
            and peer.machine.head.round >= BEGINS_AFTER_ROUNDS
            and peer.machine.head.id not in self._world.forged
        ]
        return self._random.choice(there) if there else None

    async def _become_a_member(self) -> None:
        """Take a member's place, and its key, where enough honest ones are left."""
        while True:
            for peer in self._world.peers:
                head = peer.machine.head if peer.running else None
                members = {m.peer_id for m in head.now} if head is not None else set()
                there = {p.id for p in self._world.peers if p.running and p.machine.head == head}
                if (
                    peer.dialable
                    and peer.id in members
                    and len(members & there) >= 4
                    and peer.founder == (self._kind == "founder_solo")
                ):
                    self.identity = peer.identity
                    peer.die()
                    peer.gone = True
                    return
            await asyncio.sleep(0.5)

    async def _announce(self) -> None:
        while True:
            self._world.records[self.identity.peer_id] = self._world.loop.time()
            await asyncio.sleep(1.0)

    def _make_up(self) -> None:
        victim = self._victim()
        if victim is None:
            return
        self._world.note(self._kind, f"parts from {victim.name} at {victim.machine.head.round}")
        self._world.report.coverage[f"attack_{self._kind}"] += 1
        head, journal = victim.machine.head, victim.journal
        if self._kind == "false_tip":
            unknown = hashlib.sha256(f"{self._random.random()}".encode()).digest()
            self._tip = Tip(head.round + self._random.randrange(1, 1000), unknown, 2 * head.total + 1000)
            return
        back: tuple[int, ...] = (0, 1, self._random.randrange(BACK_MAX + 1))
        if self._kind == "founder_solo":
            back = (self._random.randrange(head.round), head.round - 1)
        at = max(journal.first - 1, head.round - self._random.choice(back))
        shared = max(journal.first - 1, at - 2 * BACK_MAX)
        branch = Branch(self._world.oracle.state(journal.ids[shared]), self._world.oracle.codec)
        for number in range(shared + 1, at + 1):
            branch.take(encode_sealed(journal.read(number)))
        parted_at = branch.state
        try:
            for number in range(self._random.randrange(1, SEALS_MAX + 1)):
                before = branch.state
                sealed = self._seal(branch, first=not number)
                self._world.oracle.learn(sealed, before, branch.state, made_up=True)
                self._world.forged[sealed.id], self._world.parted_at[sealed.id] = self._kind, parted_at
        except SealError:
            if self._kind != "member_claims_all":  # a member then that is none at the state it parts from
                raise
        self._branch, self._tip = branch, branch.tip
        self._asked.clear()

    def _seal(self, branch: Branch, *, first: bool) -> SealedRound:
        solo = first and self._kind != "member_claims_all"
        # As many newcomers as a seal may admit.
        for count in (8, 4, 2, 1) if self._kind == "made_up_members" else ():
            made_up = (identity_of(f"nobody {self._random.random()}", self._world.seed) for _ in range(count))
            joins = tuple(Join(nobody.peer_id, Row(4, 1000, 0)) for nobody in made_up)
            with contextlib.suppress(SealError):
                return branch.forge(self.identity, solo=solo, joins=joins)
        return branch.forge(self.identity, solo=solo)

    # ---- what others ask --------------------------------------------------------------------------------------

    async def rpc_follow(self, request: BytesValue, context: Any) -> AsyncIterator[BytesValue]:
        """Say where it stands, each second."""
        yield self._traffic.message(Answer(""))
        while True:
            yield self._traffic.message(News(self._tip, None, False))
            await asyncio.sleep(1.0)

    async def rpc_rounds(self, request: BytesValue, context: Any) -> AsyncIterator[BytesValue]:
        """Hand out the chain, where there is one; to who asks for the first time, as if its journal were too short."""
        wanted = decode_message(request.value, RoundsRequest)
        yield self._traffic.message(Answer(""))
        if self._branch is None:
            await asyncio.Event().wait()
            return
        ancestor, rounds = self._branch.after(wanted.locator)
        asking, parted_at = context.remote_id.to_bytes(), b""
        if asking not in self._asked:
            self._asked.add(asking)
            parted_at = self._branch.went_through(wanted.locator)
            ancestor, rounds = b"", []
        yield self._traffic.message(RoundsHeader(ancestor, len(rounds), self._tip, (), parted_at))
        for encoded in rounds:
            for frame in self._traffic.blob(encoded):
                yield frame

    async def rpc_seals(self, request: BytesValue, context: Any) -> AsyncIterator[BytesValue]:
        """Show the seals of the chain, where there is one."""
        wanted = decode_message(request.value, SealsRequest)
        seals = None if self._branch is None else self._branch.seals_after(wanted.known)
        if seals is None:
            yield self._traffic.message(Answer("no seals are kept here"))
            return
        yield self._traffic.message(Answer(""))
        yield self._traffic.message(SealsHeader(b"", self._world.chunks, self._tip))
        for frame in self._traffic.blob(msgspec.msgpack.encode(seals)):
            yield frame

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("rpc_"):
            raise AttributeError(name)
        raise P2PDaemonError("protocol not supported")
