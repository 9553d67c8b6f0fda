"""Peers that cost the others time: they are silent where an answer is due, come in floods, or boast.

`Attacked` is a swarm of honest peers that trains in calm for a while, then with one kind of misbehaviour beside it, and
then in calm again; it measures how many rounds each of these phases seals. What a silent peer withholds never reaches
the network, because its driver drops the effect or its machine never seals, and what a boastful one claims is put into
the rows that leave its trainer; all else about them is the real peer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from p2ptrain.calls.client import Client
from p2ptrain.calls.handout import Handout
from p2ptrain.calls.messages import CallError, Traffic
from p2ptrain.chain import SEQUENCES_PER_KILOSECOND_MAX, UPLINK_MAX_KBIT, Row, bits
from p2ptrain.chain.sealed import SealedRound
from p2ptrain.rounds import events
from p2ptrain.rounds.exchange import Exchange
from p2ptrain.simulation.network import Line, SimNode
from p2ptrain.simulation.peer import SimDriver, SimPeer
from p2ptrain.simulation.toy import identity_of
from p2ptrain.simulation.world import Scenario, World

CLAIMS = {
    "no_throughput": {"sequences_per_kilosecond": 0},
    "endless_throughput": {"sequences_per_kilosecond": SEQUENCES_PER_KILOSECOND_MAX},
    "endless_uplink": {"uplink_kbit": UPLINK_MAX_KBIT},
}
"""What a member says of itself in every row."""
BY_A_MEMBER = ("no_replies", "hidden_replies", "no_contributions", "no_seals", "censor", *CLAIMS)
MISBEHAVIOURS = ("nothing", "flood", "churn", *BY_A_MEMBER)
"""
flood: an outsider asks for admission with `FLOOD_IDENTITIES` identities, again and again, and none of them answers.
churn: a new peer comes every `CHURN_SECONDS` and dies as soon as it is a member. no_replies: a member reduces none of
its parts. hidden_replies: it does, and seals its replies in its turns, but hands out neither them nor rounds.
no_contributions: a member sends no messages, but goes on saying its tip. no_seals: a member never seals. censor: a
member reduces no message of the founder's, and seals no reply with its work in it. The others: see `CLAIMS`.
"""
FLOOD_IDENTITIES = 50
FLOOD_SECONDS = 1.0
"""Between two times that each identity asks."""
CHURN_SECONDS = 5.0


class SilentDriver(SimDriver):
    """The driver of a peer that withholds some of what the others wait for, while `withholds` is not empty."""

    withholds: frozenset[type] = frozenset()
    """Effects that are not carried out."""
    claims: dict[str, int] = {}  # noqa: RUF012 - replaced, never changed
    """Fields of its rows that are not true."""

    def dispatch(self, event: events.Event) -> None:
        if isinstance(event, events.ContributionReady) and self.claims:
            event = replace(event, row=msgspec.structs.replace(event.row, **self.claims))
        super().dispatch(event)

    def _perform(self, effect: events.Effect) -> None:
        if type(effect) not in self.withholds:
            super()._perform(effect)


class SilentPeer(SimPeer):
    """A peer that withholds things when it is told to."""

    driver_type = SilentDriver
    driver: SilentDriver

    def withhold(self, *effects: type) -> None:
        """Carry out none of these effects from here on."""
        self.driver.withholds = frozenset(effects)

    def never_seal(self) -> None:
        """Leave every seal to the others."""
        self.driver.machine._seal_when_due = lambda now: False  # type: ignore[method-assign]

    def censor(self, victim: bytes) -> None:
        """Neither reduce what this member sends nor seal a reply with its work in it."""
        machine = self.driver.machine
        seal, hear = machine._seal, machine._on_contribution

        def _on_contribution(event: events.ContributionReceived, now: float) -> None:
            if event.peer_id != victim:
                hear(event, now)

        def _seal(exchange: Exchange, included: frozenset[int], now: float, *, solo: bool) -> bool:
            place = exchange.shape.index(victim)
            if not solo:
                for number in [n for n, reply in exchange.replies.items() if place in reply.included]:
                    del exchange.replies[number]
                included = frozenset[int]().union(*(reply.included for reply in exchange.replies.values()))
            if not solo and included <= {exchange.index}:
                exchange.replies.clear()
                included = frozenset()
            return seal(exchange, included, now, solo=solo)

        machine._seal, machine._on_contribution = _seal, _on_contribution  # type: ignore[method-assign]

    def hide(self) -> None:
        """Hand out nothing that a seal of its own names: neither replies nor rounds."""

        async def never(*_: object) -> Any:
            await asyncio.Event().wait()

        self.driver.answering.frozen_reply = never  # type: ignore[assignment]
        self.driver.catching_up.offer_rounds = never  # type: ignore[assignment]

    def claim(self, **fields: int) -> None:
        """Say this of itself from here on."""
        self.driver.claims = fields

    def behave(self) -> None:
        """Be honest again."""
        self.driver.claims = {}
        self.driver.withholds = frozenset()
        for name in ("_seal_when_due", "_seal", "_on_contribution"):
            self.driver.machine.__dict__.pop(name, None)
        self.driver.answering.__dict__.pop("frozen_reply", None)
        self.driver.catching_up.__dict__.pop("offer_rounds", None)


@dataclass
class Measured:
    """What a history came to. Rounds are those sealed on the founder's chain in a minute of virtual time."""

    calm_rounds: float = 0.0
    attacked_rounds: float = 0.0
    recovered_rounds: float = 0.0
    #: honest peer -> share of the rounds under attack whose seals included it
    included: dict[str, float] = field(default_factory=dict)
    #: seconds until a newcomer that came under attack was included, or None
    newcomer_seconds: float | None = None
    #: rounds under attack until the founder saw that somebody's work is left out, or None
    noticed_after_rounds: int | None = None
    #: members that are not honest, at the end of the attack
    silent_members: int = 0

    @property
    def share(self) -> float:
        """Rounds under attack, of those in calm."""
        return self.attacked_rounds / self.calm_rounds


class Attacked(World):
    """See the module docstring.

    Args:
        scenario: without faults; its peers are the honest ones.
        misbehaviour: one of `MISBEHAVIOURS`.
        newcomer: an honest peer joins `newcomer_after` seconds into the attack.
    """

    def __init__(
        self,
        scenario: Scenario,
        folder: Path,
        misbehaviour: str,
        *,
        calm_seconds: float = 40.0,
        attack_seconds: float = 120.0,
        recovery_seconds: float = 30.0,
        newcomer_after: float | None = None,
    ) -> None:
        super().__init__(scenario, folder)
        self.measured = Measured()
        self._calm_seconds, self._attack_seconds = calm_seconds, attack_seconds
        self._recovery_seconds, self._newcomer_after = recovery_seconds, newcomer_after
        self._misbehaviour = misbehaviour
        self._attack: Callable[[], Coroutine[Any, Any, None]] = getattr(
            self, "_claim" if misbehaviour in CLAIMS else f"_{misbehaviour}"
        )
        #: seals that the founder adopted, and how many of them included each member
        self._applied = 0
        self._included = Counter[bytes]()
        self._silent: SilentPeer | None = None
        if misbehaviour in BY_A_MEMBER:
            line = Line(scenario.uplink_bytes_per_second, scenario.uplink_bytes_per_second)
            self._silent = SilentPeer(self, "silent", batch_seconds=0.2, line=line, dialable=True)

    async def _play(self) -> None:
        honest = [self.add_peer(number) for number in range(self.scenario.peers)]
        if self._silent is not None:
            self.peers.append(self._silent)
        self.peers[0].start(founder=True)
        await self._until(lambda: self._round_of(self.peers[0]) >= 1, 60.0, "the founder's first seal")
        for peer in self.peers[1:]:
            peer.start()
        everybody = {peer.id for peer in self.peers}
        await self._until(lambda: everybody <= self._members(), 120.0, "all are members")
        await asyncio.sleep(10.0)  # learn when the others come
        measured = self.measured
        measured.calm_rounds = await self._rounds_a_minute(self._calm_seconds)
        self._applied = 0
        self._included.clear()
        attack = self.loop.create_task(self._attack())
        joining = self.loop.create_task(self._newcomer())
        measured.attacked_rounds = await self._rounds_a_minute(self._attack_seconds)
        attack.cancel()
        joining.cancel()
        await asyncio.gather(attack, joining, return_exceptions=True)
        measured.included = {peer.name: self._included[peer.id] / max(1, self._applied) for peer in honest}
        measured.silent_members = len(self._members() - {p.id for p in self.peers if p.alive and p is not self._silent})
        if self._silent is not None:
            self._silent.behave()
        measured.recovered_rounds = await self._rounds_a_minute(self._recovery_seconds)

    def _members(self) -> set[bytes]:
        return {member.peer_id for member in self.peers[0].machine.head.following}

    async def _rounds_a_minute(self, seconds: float) -> float:
        before, began = self._round_of(self.peers[0]), self.loop.time()
        while self.loop.time() < began + seconds:
            self._raise_faults()
            await asyncio.sleep(0.5)
        return (self._round_of(self.peers[0]) - before) * 60 / seconds

    def saw(self, peer: SimPeer, effect: events.Effect) -> None:
        super().saw(peer, effect)
        if isinstance(effect, events.LeftOut) and self.measured.noticed_after_rounds is None:
            self.measured.noticed_after_rounds = self._applied
        if isinstance(effect, events.Apply) and peer is self.peers[0]:
            self._applied += 1
            for index in bits(effect.sealed.seal.included, len(effect.shape.members)):
                self._included[effect.shape.members[index].peer_id] += 1

    async def _newcomer(self) -> None:
        """An honest peer that comes while the others are under attack."""
        if self._newcomer_after is None:
            return
        await asyncio.sleep(self._newcomer_after)
        peer = self.add_peer(len(self.peers), "newcomer")
        peer.start()
        began = self.loop.time()

        def is_in() -> bool:
            return any(m.peer_id == peer.id and m.included for m in self.peers[0].machine.head.following)

        while not is_in():
            await asyncio.sleep(0.1)
        self.measured.newcomer_seconds = self.loop.time() - began

    def _check_seal(self, peer: SimPeer, sealed: SealedRound) -> None:
        if peer is not self._silent:
            super()._check_seal(peer, sealed)

    # ---- misbehaviours ----------------------------------------------------------------------------------------

    async def _nothing(self) -> None:
        pass

    async def _no_replies(self) -> None:
        assert self._silent is not None
        self._silent.withhold(events.Reduce)

    async def _hidden_replies(self) -> None:
        assert self._silent is not None
        self._silent.hide()

    async def _no_contributions(self) -> None:
        assert self._silent is not None
        self._silent.withhold(events.SendContribution, events.Reduce, events.PublishSeal)
        self._silent.never_seal()

    async def _no_seals(self) -> None:
        assert self._silent is not None
        self._silent.never_seal()

    async def _censor(self) -> None:
        assert self._silent is not None
        self._silent.censor(self.peers[0].id)

    async def _claim(self) -> None:
        assert self._silent is not None
        self._silent.claim(**CLAIMS[self._misbehaviour])

    async def _churn(self) -> None:
        number = 0
        while True:
            number += 1
            self.loop.create_task(self._come_and_die(f"visitor{number}"))
            await asyncio.sleep(CHURN_SECONDS)

    async def _come_and_die(self, name: str) -> None:
        peer = self.add_peer(len(self.peers), name)
        peer.start()
        for _ in range(100):
            await asyncio.sleep(0.1)
            if peer.id in self._members():
                break
        peer.die()
        peer.gone = True

    async def _flood(self) -> None:
        line = Line(self.scenario.uplink_bytes_per_second, self.scenario.uplink_bytes_per_second)
        clients = []
        for number in range(FLOOD_IDENTITIES):
            identity = identity_of(f"sybil{number}", self.seed)
            node = SimNode(self.network, identity, self.peers[0].node.actor, line, dialable=True)
            self.network.add(node)
            handout = Handout(lambda: 1000)
            clients.append(Client(node, Traffic(), self.run_id, handout))  # type: ignore[arg-type]
        while True:
            asked = [self._ask(client, peer) for client in clients for peer in self.peers if peer.running]
            await asyncio.gather(*asked, asyncio.sleep(FLOOD_SECONDS))

    async def _ask(self, client: Client, peer: SimPeer) -> None:
        with contextlib.suppress(CallError):
            await client.join(peer.id, Row(0, 1000, 1000))
