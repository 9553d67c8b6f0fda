"""Attacks by what honest newcomers have said: their calls to join, and the grants by which they are guests."""

from __future__ import annotations

import asyncio
import contextlib

from attacks.comings import ManyJoins
from attacks.hostile import Hostile, Liar
from attacks.members import LyingMember
from google.protobuf.wrappers_pb2 import BytesValue
from lab.report import say

from p2ptrain import chain
from p2ptrain.calls.messages import CallError, Hello, Welcome, decode_message
from p2ptrain.compression.codec import Codec
from p2ptrain.config.manifest import PROTOCOL_VERSION
from p2ptrain.simulation.forged import Branch

RECORDED_MAX = 64


class ReplayedJoins(ManyJoins):
    """A member writes down who asks it to be admitted, and with what; many identities send that to everybody again."""

    stays = True

    async def prepare(self) -> list[bytes]:
        """Become a member, too."""
        self._member = LyingMember(self.hostile, lie="record_joins")
        self._joins = self.hostile.folder / "joins"
        members = await self._member.prepare()
        return [*members, *(await super().prepare())[1:]]

    async def run(self) -> None:
        """Send them."""
        try:
            await super().run()
        finally:
            say(did={"recorded": len(self._recorded())})

    async def close(self) -> None:
        """Have the member leave."""
        await super().close()
        await self._member.close()

    def _recorded(self) -> list[bytes]:
        with contextlib.suppress(FileNotFoundError):
            lines = self._joins.read_text().split()
            return [bytes.fromhex(line) for line in dict.fromkeys(lines)][-RECORDED_MAX:]
        return []

    def _requests(self) -> list[tuple[str, BytesValue]]:
        return [("rpc_join", BytesValue(value=request)) for request in self._recorded()]


class _Collector(Liar):
    """Refuses newcomers as an honest peer would, so that they show it their grants."""

    def __init__(self, hostile: Hostile) -> None:
        # Of a run that is not for it, it knows no more than the id.
        super().__init__(Branch(chain.genesis(hostile.run_id), Codec((1,), (1,), 2)))
        self._hostile = hostile
        self.grants: dict[bytes, None] = {}

    async def hello(self) -> BytesValue:
        return self.traffic.message(self._hostile.welcome)

    def handed_statements(self, request: bytes) -> None:
        self.grants[request] = None
        while len(self.grants) > RECORDED_MAX:
            del self.grants[next(iter(self.grants))]


class ReplayedGrants(ManyJoins):
    """An outsider is shown a newcomer's grant; it, and many identities, show that to everybody as theirs."""

    async def prepare(self) -> list[bytes]:
        """Have newcomers come by."""
        self._let_in = self._replayed = 0
        self._collector = _Collector(self.hostile)
        await self.hostile.serve(self._collector)
        say(addresses=(await self.hostile.node.join_addresses())[:1])
        return await super().prepare()

    async def run(self) -> None:
        """Show them, and look whether that helps."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(super().run())
        finally:
            grants = len(self._collector.grants)
            say(did={"grants": grants, "replayed": self._replayed, "let_in": self._let_in})

    def _requests(self) -> list[tuple[str, BytesValue]]:
        grants = [("rpc_amend", BytesValue(value=request)) for request in self._collector.grants]
        return [*grants, ("rpc_hello", self.hostile.traffic.message(Hello(PROTOCOL_VERSION)))]

    def _heard(self, call: str, answer: bytes | None) -> None:
        self._replayed += call == "rpc_amend"
        if call == "rpc_hello" and answer is not None:
            with contextlib.suppress(CallError):
                self._let_in += not decode_message(answer, Welcome).refusal
