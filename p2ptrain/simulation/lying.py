"""Members that lie as reducers, as senders or as auditors, and what becomes of them (docs/rounds.md, rule 14).

`Lying` is a calm swarm of honest peers and a few of one kind of liar, which begin to lie once all are members. All else
about a liar is the real peer. It counts the rounds until the liars are expelled, and watches that nobody else is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from p2ptrain.calls.messages import CallError
from p2ptrain.chain import ChainState, Expulsion, RoundShape, evidence
from p2ptrain.chain.evidence import Bundle, Proof
from p2ptrain.chain.sealed import Key, Reply, reply_digest
from p2ptrain.chain.state import STANDING_TRUSTED, may_accuse
from p2ptrain.compression import wire
from p2ptrain.compression.codec import Codec
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.peer.answering import Answering
from p2ptrain.rounds import events
from p2ptrain.rounds.audits import Audits
from p2ptrain.simulation.network import Line
from p2ptrain.simulation.peer import SimDriver, SimPeer
from p2ptrain.simulation.world import Scenario, World

LIES = ("wrong_sum", "withheld", "two_replies", "unsigned", "false_accuser", "false_prover")
"""
wrong_sum: the replies of a reducer are the sums with their signs flipped. withheld: the same, and it never shows what
it summed. two_replies: it gives every other caller an empty reply, and the rest the right one. unsigned: a member signs
none of its contributions. false_accuser: a member accuses an honest one with each seal that may. false_prover: a member
hands the others, as proofs, replies that are right.
"""


class LyingDriver(SimDriver):
    """The driver of a peer that lies once `lie` was called."""

    lies: str = ""

    def lie(self, kind: str, victims: Sequence[bytes]) -> None:
        """Lie in this way from here on; an accuser accuses `victims`, the first that it may."""
        self.lies = kind
        if kind in ("wrong_sum", "withheld"):
            self.answering._reduced = self._flipped  # type: ignore[method-assign]
        if kind == "withheld":
            self.auditing.show = lambda digest, peer: "not today"  # type: ignore[method-assign]
        if kind == "two_replies":
            self._right, self._calls = self.answering.frozen_reply, 0
            self.answering.frozen_reply = self._either  # type: ignore[method-assign]
        if kind == "false_accuser":
            audits = self.machine.audits
            self.machine.audits = _FalseAccuser(audits.me, audits.sign, audits.audits_a_part)
            self.machine.audits.victims = victims

    def _perform(self, effect: events.Effect) -> None:
        if self.lies == "unsigned" and isinstance(effect, events.SendContribution):
            effect = replace(effect, signature=bytes(evidence.SIGNATURE_BYTES))
        super()._perform(effect)
        if self.lies == "false_prover" and isinstance(effect, events.Apply):
            self._spawn(self._hand_false_proofs(effect))

    async def _flipped(self, effect: events.Reduce) -> tuple[bytes, Bundle]:
        lie, bundle, right = await sum_of_opposites(self.answering, effect)
        if lie != right:
            self.peer.world.report.coverage["lies"] += 1
        return lie, bundle

    async def _either(self, key: Key, part: int) -> Reply | None:
        """Return the right reply every other time, else one that keeps nothing."""
        reply = await self._right(key, part)
        self._calls += 1
        return reply if reply is None or self._calls % 2 else empty_reply(self.answering, key, part, reply)

    async def _hand_false_proofs(self, effect: events.Apply) -> None:
        """To all members: that a reducer, though it summed nothing, lied."""
        shape, sealed = effect.shape, effect.sealed
        members = shape.group.peer_ids
        for number, reply in enumerate(sealed.replies):
            reducer = members[shape.parts[number].reducer]
            if reply is None or reducer == self._me:
                continue
            proof = Proof(reducer, shape.round, shape.base, number, shape.group, reply, Bundle((), ()))
            for peer in members:
                if peer not in (self._me, reducer):
                    self.peer.world.report.coverage["lies"] += 1
                    try:
                        await self._client.prove(peer, evidence.encode_proof(proof))
                    except CallError:
                        continue


async def sum_of_opposites(answering: Answering, effect: events.Reduce) -> tuple[bytes, Bundle, bytes]:
    """Return what the opposite of all contributions comes to, attested as their sum; what they are; the right reply."""
    parts, codec = answering._p, answering._p.codec
    right, bundle = await Answering._reduced(answering, effect)
    summed = [
        (said.member, said.row.weight, _flip(payload, codec, effect.start, effect.end))
        for said, payload in zip(bundle.messages, bundle.payloads, strict=True)
    ]
    body = reduce_part(summed, codec, effect.start, effect.end, len(effect.group.peer_ids), effect.group.standing)
    sign = parts.node.identity.sign
    lie = evidence.attest(sign, parts.run_id, effect.key, effect.part, effect.group, body, bundle.messages)
    return lie, bundle, right


def empty_reply(answering: Answering, key: Key, part: int, reply: Reply) -> Reply:
    """Return another reply of the round under way than `reply`, to the same members; it keeps nothing."""
    parts, shape = answering._p, answering._machine.shape
    if shape is None or (shape.round, shape.base) != (key.round, key.base):
        return reply
    spec = shape.parts[part]
    nothing = [(member, 0, b"") for member in sorted(reply.included)]
    body = reduce_part(nothing, parts.codec, spec.start, spec.end, len(shape.members))
    data = evidence.attest(parts.node.identity.sign, parts.run_id, key, part, shape.group, body, ())
    return Reply(reply_digest(data), reply.included, data)


def _flip(payload: bytes, codec: Codec, start: int, end: int) -> bytes:
    if not payload:
        return payload
    sent = wire.decode_contribution(payload, codec, start, end)
    return wire.encode_contribution(replace(sent, value=-sent.value), codec)


class _FalseAccuser(Audits):
    """Accuses the first of `victims` that it may, in each of its turns."""

    victims: Sequence[bytes] = ()

    def accusation(self, head: ChainState, shape: RoundShape, expelled: Sequence[Expulsion]) -> bytes:
        there = (peer for peer in self.victims if shape.index(peer) is not None)
        return next(there, b"") if may_accuse(head, self.me) else b""


class LyingPeer(SimPeer):
    """A peer that lies when it is told to."""

    driver_type = LyingDriver
    driver: LyingDriver


@dataclass
class Outcome:
    """What a history came to."""

    #: rounds from the first lie until all liars were expelled, or None
    rounds_until_expelled: int | None = None
    #: rounds that were sealed meanwhile
    rounds: int = 0
    #: honest peer -> share of these rounds in which it reduced
    reduced: dict[str, float] = field(default_factory=dict)
    #: the same of liars, by name
    liars_reduced: dict[str, float] = field(default_factory=dict)
    #: liar -> share of the rounds that included it
    liars_included: dict[str, float] = field(default_factory=dict)
    #: most strikes of an honest peer, and of a liar
    strikes: tuple[int, int] = (0, 0)


class Lying(World):
    """See the module docstring.

    Args:
        scenario: without faults; its peers are the honest ones.
        kind: one of `LIES`.
        liars: how many.
        rounds: to watch after the first lie, unless all liars are expelled before.
    """

    def __init__(self, scenario: Scenario, folder: Path, kind: str, *, liars: int = 1, rounds: int = 40) -> None:
        super().__init__(scenario, folder)
        self.outcome = Outcome()
        self._kind, self._rounds = kind, rounds
        line = Line(scenario.uplink_bytes_per_second, scenario.uplink_bytes_per_second)
        self._liars = [
            LyingPeer(self, f"liar{number}", batch_seconds=0.2, line=line, dialable=True) for number in range(liars)
        ]

    async def _play(self) -> None:
        honest = [self.add_peer(number) for number in range(self.scenario.peers)]
        self.peers += self._liars
        founder, everybody = self.peers[0], {peer.id for peer in self.peers}
        founder.start(founder=True)
        await self._until(lambda: self._round_of(founder) >= 1, 60.0, "the founder's first seal")
        for peer in self.peers[1:]:
            peer.start()
        await self._until(
            lambda: everybody <= {m.peer_id for m in founder.machine.head.now if m.standing >= STANDING_TRUSTED},
            240.0,
            "all reduce",
        )
        liars = {peer.id for peer in self._liars}
        if self._kind in ("wrong_sum", "withheld", "two_replies"):
            self.oracle.liars |= liars
        for liar in self._liars:
            liar.driver.lie(self._kind, [peer.id for peer in honest])
        began, seen = self._round_of(founder), self._round_of(founder)
        counts = {peer.name: 0 for peer in self.peers}
        included = {peer.name: 0 for peer in self._liars}
        outcome = self.outcome
        while self._round_of(founder) < began + self._rounds and outcome.rounds_until_expelled is None:
            self._raise_faults()
            head = founder.machine.head
            if head.round > seen:
                seen = head.round
                shape = founder.machine.shape
                reducers = {shape.members[part.reducer].peer_id for part in shape.parts} if shape else set()
                last = {m.peer_id for m in head.following if m.included}
                for peer in self.peers:
                    counts[peer.name] += peer.id in reducers
                for peer in self._liars:
                    included[peer.name] += peer.id in last
                strikes = {m.peer_id: m.strikes for m in head.following}
                worst = [max((s for p, s in strikes.items() if (p in liars) == of), default=0) for of in (False, True)]
                outcome.strikes = max(outcome.strikes[0], worst[0]), max(outcome.strikes[1], worst[1])
                outcome.rounds += 1
                if outcome.rounds_until_expelled is None and liars <= set(head.expelled):
                    outcome.rounds_until_expelled = head.round - began
            await asyncio.sleep(0.05)
        rounds = max(1, outcome.rounds)
        names = {peer.name for peer in self._liars}
        outcome.reduced = {name: count / rounds for name, count in counts.items() if name not in names}
        outcome.liars_reduced = {name: counts[name] / rounds for name in names}
        outcome.liars_included = {name: included[name] / rounds for name in names}
        self.report.rounds = self._highest()
