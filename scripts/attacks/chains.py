"""Attacks on the choice between chains: chains that an outsider makes alone, and tips that nobody can have."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import AsyncIterator

from attacks.forged import made_up_peer_id, random_row
from attacks.hostile import Attack, Liar, confess
from google.protobuf.wrappers_pb2 import BytesValue
from lab.report import say

from p2ptrain import chain
from p2ptrain.calls.messages import (
    Answer,
    BlobHeader,
    CallError,
    ContributionHeader,
    PiecesHeld,
    RoundsHeader,
    RoundsRequest,
    SnapshotOffer,
    SnapshotRequest,
    Tip,
    decode_message,
)
from p2ptrain.chain import Join, Row, SealError
from p2ptrain.chain.seal import JOINS_MAX
from p2ptrain.simulation.forged import Branch

PIECE_BYTES = 512 * 1024
ROUND_BYTES = 64 * 1024
OFFLINE_SECONDS = 30.0
ROUNDS_AT_MOST = 2000
"""What victims fetch within a short attack."""


class OfflineChain(Attack):
    """Seal alone off line, rounds of no length, then come back with the larger total.

    `from_beginning`: the chain forks off at round 0 in place of the tip.
    """

    async def prepare(self) -> list[bytes]:
        """Fetch the chain and continue it alone."""
        hostile, me = self.hostile, self.hostile.node.identity
        beginning = chain.genesis(hostile.run_id)
        self.branch = Branch(beginning, hostile.codec) if self.options.get("from_beginning") else await hostile.fetch()
        deadline = time.monotonic() + OFFLINE_SECONDS
        made = [self.branch.forge(me, solo=True).id]
        while time.monotonic() < deadline and len(made) < ROUNDS_AT_MOST:
            made.append(self.branch.forge(me).id)
            await asyncio.sleep(0)
        confess(made)
        await hostile.serve(Liar(self.branch))
        return [me.peer_id]

    async def run(self) -> None:
        """Say so."""
        await self.hostile.announce(lambda: self.branch.tip)


class MadeUpMembers(Attack):
    """Admit identities that nobody has, and include them in rounds that never were: each adds all of them to total."""

    async def prepare(self) -> list[bytes]:
        """Fetch the chain; the rest takes seconds, and is done when the attack begins."""
        self.branch = await self.hostile.fetch()
        self._liar = Liar(self.branch)
        await self.hostile.serve(self._liar)
        return [self.hostile.node.peer_id]

    async def run(self) -> None:
        """Forge until the total is far above the honest one, then say so."""
        hostile, me = self.hostile, self.hostile.node.identity
        missing = int(self.options["identities"])
        honest = (await hostile.tip_of(hostile.peers[0])).total
        made: list[bytes] = []
        while missing or self.branch.state.total < 10 * honest:
            count = min(missing, JOINS_MAX)
            while True:  # as many as the rules let in at once
                joins = [Join(made_up_peer_id(hostile.chance), random_row(hostile.chance)) for _ in range(count)]
                try:
                    made.append(self.branch.forge(me, solo=not made, joins=tuple(joins)).id)
                    break
                except SealError:
                    if not count:
                        raise
                    count //= 2
            missing -= count
            await asyncio.sleep(0)
        confess(made)
        await hostile.announce(lambda: self.branch.tip)


class _Silent(Liar):
    """Names a tip that is better than anybody's, and never delivers it: it is silent, or sends a byte a second."""

    def __init__(self, branch: Branch, how: str) -> None:
        super().__init__(branch)
        self._how, self._run_id = how, branch.state.run_id
        self.better = branch.tip

    def tip(self) -> Tip:
        return self.better

    async def rounds(self, wanted: RoundsRequest) -> AsyncIterator[BytesValue]:
        self.asked += 1
        yield self.traffic.message(Answer(""))
        if self._how == "snapshot":
            yield self.traffic.message(RoundsHeader(b"", 0, self.better, (self._offer(),)))
            return
        if self._how == "nothing in common" and self._run_id not in wanted.locator:
            # Who hears this asks again for more, from the run's beginning on, and meanwhile seals nothing.
            yield self.traffic.message(RoundsHeader(b"", 0, self.better, ()))
            return
        if self._how == "trickle":
            yield self.traffic.message(RoundsHeader(wanted.locator[0], 1, self.better, ()))
            async for frame in self._drops(ROUND_BYTES):
                yield frame
        await asyncio.sleep(math.inf)

    async def snapshot(self, request: bytes) -> AsyncIterator[BytesValue]:
        wanted = decode_message(request, SnapshotRequest)
        yield self.traffic.message(Answer(""))
        yield self.traffic.message(PiecesHeld(b""))
        if wanted.hashes:
            hashes = b"".join(hashlib.sha256(b"piece").digest() for _ in range(wanted.first, wanted.end))
            for frame in self.traffic.blob(hashes):
                yield frame
        elif wanted.end > wanted.first:
            async for frame in self._drops(PIECE_BYTES):
                yield frame

    async def _drops(self, length: int) -> AsyncIterator[BytesValue]:
        """A blob of that length, a byte a second."""
        yield self.traffic.message(BlobHeader(length, bytes(32)))
        while True:
            await asyncio.sleep(1.0)
            yield self.traffic.frame(b"\0")

    def _offer(self) -> SnapshotOffer:
        # Its root is that of pieces that never come whole.
        length = 4 * PIECE_BYTES
        hashes = b"".join(hashlib.sha256(b"piece").digest() for _ in range(4))
        root = hashlib.sha256(b"p2ptrain root 1\0" + length.to_bytes(8, "little") + hashes).digest()
        return SnapshotOffer(self.better.round - 2, hashlib.sha256(b"state").digest(), root, length)


class TipNeverDelivered(Attack):
    """Announce a better tip, and deliver nothing. `how`: silence, nothing in common, trickle, snapshot."""

    async def prepare(self) -> list[bytes]:
        """Answer calls."""
        hostile = self.hostile
        self._liar = _Silent(Branch(chain.genesis(hostile.run_id), hostile.codec), str(self.options["how"]))
        await hostile.serve(self._liar)
        return [hostile.node.peer_id]

    async def run(self) -> None:
        """Say so, by `follow` and with contributions; a tip that is still better each second."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._go_ahead())
            group.create_task(self.hostile.announce(self._liar.tip))
            for peer in self.hostile.peers:
                group.create_task(self._contribute(peer))

    async def close(self) -> None:
        """Tell how often it was believed."""
        say(did={"asked_for_rounds": self._liar.asked})

    async def _go_ahead(self) -> None:
        hostile = self.hostile
        while True:
            with contextlib.suppress(CallError):
                tip = await hostile.tip_of(hostile.peers[0])
                far = 1000 if self.options["how"] == "snapshot" else 3
                self._liar.better = Tip(tip.round + far, hostile.chance.randbytes(32), 2 * tip.total + 1000)
            await asyncio.sleep(1.0)

    async def _contribute(self, peer: bytes) -> None:
        """What it says of a round is refused; the tip in it is heard."""
        hostile = self.hostile
        while True:
            better = self._liar.better
            row = Row(0, 1000, 0)
            header = ContributionHeader(hostile.run_id, better.round, better.id, 0, row, bytes(64), 0, b"", better)
            await hostile.send(peer, "rpc_contribute", hostile.traffic.message(header))
            await asyncio.sleep(1.0)
