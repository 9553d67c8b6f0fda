"""A whole swarm in one process: peers come, suffer, and must agree in the end. One seed, one history.

The first part of a run has faults; then everything heals, and within `CONVERGENCE_SECONDS` all live peers must be on
one chain, and go on. What must hold at every moment is checked at every event: `oracle.py` and the `check_` methods.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import logging
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

import msgspec
import numpy as np

from p2ptrain import chain
from p2ptrain.calls.messages import KNOWN_ALREADY, Amend
from p2ptrain.chain import ChainState, RoundShape
from p2ptrain.chain.admission import Grant, Pass, Revocation, pass_message
from p2ptrain.chain.forks import Mark
from p2ptrain.chain.seal import proof_digest
from p2ptrain.chain.sealed import Key, SealedRound, reply_digest
from p2ptrain.config.manifest import (
    AccessConfig,
    CodecConfig,
    GroupConfig,
    Manifest,
    OptimizerConfig,
    canonical_bytes,
    run_id,
)
from p2ptrain.peer.auditing import KEPT_BYTES
from p2ptrain.rounds import events
from p2ptrain.rounds.inbox import Restore
from p2ptrain.simulation.adversaries import Adversary
from p2ptrain.simulation.faults import FAULTS, GUESTS, Faults
from p2ptrain.simulation.loop import VirtualLoop
from p2ptrain.simulation.network import Line, Network
from p2ptrain.simulation.oracle import Oracle
from p2ptrain.simulation.peer import RECORD_FRESH_SECONDS, SimPeer
from p2ptrain.simulation.toy import PeerCrashed, ViolationError, identity_of, toy_beginning
from p2ptrain.state.journal import Journal
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.invitations import Invitation, revoke

CONVERGENCE_SECONDS = 90.0
SETTLED_ROUNDS = 8
CALM_SECONDS = 180.0
ADMISSION_SECONDS = 60.0
CHECK_EVERY_SECONDS = 0.5
LAST_DECISIONS = 8
"""As many events of each peer concerned are in the report of the first violation."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is simulated."""

    manifest: Manifest
    seed: int
    peers: int = 5
    rounds: int = 40
    """Rounds with faults, about; the calm after them is extra."""
    faults: tuple[str, ...] = tuple(FAULTS)
    adversaries: tuple[str, ...] = ()
    """Of `adversaries.ADVERSARIES`; each is there to the end, in the calm too."""
    chunks: int = 12
    uplink_bytes_per_second: float = 1.25e6
    delay_seconds: float = 0.04
    even_speeds: bool = False
    """All machines alike and dialable; else speeds over two orders of magnitude, and some that cannot be dialled."""


@dataclass
class Report:
    """What came of it. All of it follows from the scenario."""

    seed: int
    rounds: int = 0
    virtual_seconds: float = 0.0
    violations: list[str] = field(default_factory=list)
    coverage: Counter[str] = field(default_factory=Counter)
    digest: str = ""
    state_id: str = ""
    convergence_seconds: float | None = None
    bytes_per_peer_per_round: float = 0.0
    messages_per_peer_per_round: float = 0.0


def toy_manifest(manifest: Manifest) -> Manifest:
    """The manifest's rounds, with an optimizer whose sums are exact: unquantised, undecayed, untransformed."""
    group = GroupConfig(transform="none", direction="sign", topk=4, reply_topk=6)
    optimizer = OptimizerConfig(
        beta=1.0,
        weight_decay=0.0,
        warmup_rounds=1,
        matrix=group,
        embedding=group,
        head=group,
        vector=group,
    )
    codec = CodecConfig(value_bits=32)  # type: ignore[arg-type]
    rules = msgspec.structs.replace(manifest.round, clip_ratio=1000.0)
    return msgspec.structs.replace(manifest, optimizer=optimizer, codec=codec, round=rules)


class World:
    """See the module docstring."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario, self.folder, self.seed = scenario, folder, scenario.seed
        names = [format_peer_id(identity_of(f"p{number}", self.seed).peer_id) for number in range(scenario.peers)]
        #: signs who is let in and shut out
        self.owner = identity_of("owner", self.seed)
        self.manifest = msgspec.structs.replace(toy_manifest(scenario.manifest), founder=names[0])
        if GUESTS in scenario.faults:
            self.manifest = msgspec.structs.replace(
                self.manifest,
                owner=self.owner.key.public_key().public_bytes_raw().hex(),
                access=AccessConfig(mode="invite", peers=tuple(names)),
            )
        self.run_id = run_id(canonical_bytes(self.manifest))
        self.chunks = scenario.chunks
        self.random = random.Random(scenario.seed)
        self.loop = VirtualLoop()
        self.network = Network(
            self.loop, random.Random(scenario.seed + 1), delay_seconds=scenario.delay_seconds, loss=0.001
        )
        self.report = Report(scenario.seed)
        #: what the owner has said, and some peer that it is on the chain
        self.revocations: list[Revocation] = []
        self.peers: list[SimPeer] = []
        self.records: dict[bytes, float] = {}
        self.calm = not scenario.faults
        #: id of a state that was made up -> the kind of adversary that did
        self.forged: dict[bytes, str] = {}
        #: id of such a state -> where its branch parts from an honest one
        self.parted_at: dict[bytes, ChainState] = {}
        self.adversary_random = random.Random(scenario.seed + 3)
        self._history = hashlib.sha256()
        self._apply_random = random.Random(scenario.seed + 2)
        #: peer -> what the momentum's owner knows it has produced, and the state id it stood at, at its death
        self._left: dict[str, tuple[Any, bytes]] = {}
        #: in calm: member -> rounds of its contributions since one was last included
        self._missed: dict[bytes, set[int]] = {}
        self._waiting_since: dict[bytes, int] = {}
        self.oracle = Oracle(self.manifest, self.run_id, *toy_beginning(self.manifest, self.chunks))

    # ---- running ----------------------------------------------------------------------------------------------

    def run(self) -> Report:
        """The whole history. Violations are in the report."""
        with _captured_errors(self):
            collects = gc.isenabled()
            gc.disable()  # a cycle's end must not depend on what else this process has done
            try:
                asyncio.set_event_loop(self.loop)
                self.loop.run_until_complete(self._play())
            except ViolationError as error:
                self.violate(str(error))
            finally:
                asyncio.set_event_loop(None)
                self.loop.discard()
                if collects:
                    gc.enable()
        report = self.report
        report.virtual_seconds = round(self.loop.time(), 6)
        report.digest = self._history.hexdigest()
        return report

    async def _play(self) -> None:
        scenario = self.scenario
        for number in range(scenario.peers):
            self.add_peer(number)
        self.peers[0].start(founder=True)
        await self._until(lambda: self._round_of(self.peers[0]) >= 1, 60.0, "the founder's first seal")
        faults = Faults(self)
        for peer in self.peers[1:]:
            self.loop.call_later(self.random.uniform(0.0, 15.0), self._start, peer)
        limit = self.loop.time() + 60.0 * scenario.rounds
        suffering = self.loop.create_task(faults.run())
        hostile = [Adversary(self, kind, number) for number, kind in enumerate(scenario.adversaries)]
        attacks = [self.loop.create_task(adversary.run()) for adversary in hostile]
        try:
            await self._until(lambda: self._highest() >= scenario.rounds, limit, "")
        finally:
            suffering.cancel()
        await faults.heal_all()
        self.calm = True
        began = self.loop.time()
        await self._until(self._converged, CONVERGENCE_SECONDS, "all live peers on one chain")
        self.report.convergence_seconds = round(self.loop.time() - began, 3)
        # Newcomers come in one after the other.
        await self._until(self._all_members, ADMISSION_SECONDS, "everybody a member")
        # A replica that went wrong is noticed at the next root.
        corrupted = self.report.coverage["fault_corrupt"] > 0
        goal = self._highest() + (3 * self.manifest.round.root_interval if corrupted else SETTLED_ROUNDS)
        self._missed.clear()
        before = self._sent_totals(), self._highest()
        await self._until(lambda: self._lowest() >= goal, CALM_SECONDS, f"{SETTLED_ROUNDS} rounds in calm")
        await self._until(self._converged, 30.0, "one chain at the end")
        rounds = max(1, self._highest() - before[1])
        sent, frames = (after - then for after, then in zip(self._sent_totals(), before[0], strict=True))
        self.report.bytes_per_peer_per_round = round(sent / rounds / len(self.peers), 1)
        self.report.messages_per_peer_per_round = round(frames / rounds / len(self.peers), 1)
        living = self._living()
        members = {m.peer_id for m in living[0].machine.head.following}
        for peer in living:
            if peer.corrupt:
                self.violate(f"{peer.name} holds a replica gone wrong, and has not noticed")
            if peer.id not in members:
                self.violate(f"{peer.name} is connected and not a member")
        self._check_access(living[0].machine.head)
        self.report.coverage["guests_in_the_end"] += len(living[0].machine.head.access.guests & members)
        for attack in attacks:
            attack.cancel()
        self.report.rounds = self._highest()
        self.report.state_id = living[0].machine.head.id.hex()

    async def _until(self, condition: Any, seconds: float, what: str) -> None:
        """Wait for `condition`; that it does not come true within `seconds` is a violation where `what` names it."""
        deadline = self.loop.time() + seconds
        while not condition():
            self._raise_faults()
            self.bury_revoked()
            if self.loop.time() > deadline:
                if what:
                    raise ViolationError(f"not within {seconds:.0f} s: {what}; {self._standing()}")
                return
            await asyncio.sleep(CHECK_EVERY_SECONDS)
        self._raise_faults()

    def _raise_faults(self) -> None:
        for fault in self.loop.faults:
            if not isinstance(fault, PeerCrashed):
                self.violate(f"an error that nobody took: {fault!r}")
        self.loop.faults.clear()
        if self.report.violations:
            raise ViolationError("see above")

    def add_peer(self, number: int, name: str = "") -> SimPeer:
        """One more peer, not started."""
        scenario = self.scenario
        batch_seconds = 0.2 if scenario.even_speeds else 0.05 * 10 ** self.random.uniform(0, 2)
        dialable = scenario.even_speeds or number == 0 or self.random.random() < 0.75
        spread = 1.0 if scenario.even_speeds else 10 ** self.random.uniform(-0.5, 0.5)
        rate = scenario.uplink_bytes_per_second * spread
        peer = SimPeer(
            self, name or f"p{number}", batch_seconds=batch_seconds, line=Line(rate, rate), dialable=dialable
        )
        self.peers.append(peer)
        return peer

    # ---- who is let in ----------------------------------------------------------------------------------------

    def grant_for(self, peer_id: bytes, name: str) -> Grant | None:
        """The owner's invitation, used by a peer that the run does not list; None where it needs none."""
        if self.manifest.beginning(self.run_id).access.admits(peer_id):
            return None
        token = identity_of(f"token of {name}", self.seed)
        issued = Pass(self.run_id, self.owner.peer_id, token.peer_id, 2**40, 1, b"", False)
        invitation = Invitation(issued, self.owner.sign(pass_message(issued)), token.key.private_bytes_raw())
        return invitation.grant(peer_id)

    async def revoke(self, peer: SimPeer) -> None:
        """Hand the owner's word to one peer after another, until one says that its chain has it."""
        revocation = revoke(self.owner, self.run_id, peer.id, with_guests=False)
        while True:
            there = [other for other in self.peers if other.running and other is not peer]
            if there:
                asked = self.random.choice(there)
                said = asked.actor.context.run(  # type: ignore[union-attr]
                    asked.driver.answering.take_statements, Amend(self.run_id, (revocation,))
                )
                if said == KNOWN_ALREADY:
                    self.revocations.append(revocation)
                    self.report.coverage["revoked"] += 1
                    return
            await asyncio.sleep(1.0)

    def bury_revoked(self) -> None:
        """Who has learned that it was revoked has ended, and does not come back."""
        for peer in self.peers:
            if peer.alive and hasattr(peer, "driver") and peer.driver.revoked:
                self.report.coverage["revoked_peers_that_ended"] += 1
                peer.die()
                peer.gone = True

    def _check_access(self, head: ChainState) -> None:
        """What any chain has said of access and the owner was told of holds in the end, whatever fork it was on."""
        for revocation in self.revocations:
            subject = revocation.subject
            if head.access.admits(subject) or any(m.peer_id == subject for m in head.following):
                self.violate("a peer that the owner has revoked is in the run again")

    def _start(self, peer: SimPeer) -> None:
        if not peer.alive and not self.calm:
            peer.start()

    def violate(self, what: str) -> None:
        """An invariant does not hold."""
        if what != "see above":
            told = "" if self.report.violations else self._decisions(what)
            self.report.violations.append(f"at {self.loop.time():.3f} s: {what}{told}")

    def _decisions(self, what: str) -> str:
        """The last decisions of the peers that `what` names, or of all that live, with seconds before now."""
        named = set(re.findall(r"\w+", what))
        there = [peer for peer in self.peers if hasattr(peer, "driver")]
        concerned = [peer for peer in there if peer.name in named] or there
        names = {peer.id: peer.name for peer in self.peers}
        told = ""
        for peer in concerned:
            lines = peer.machine.decisions.lines(
                lambda id: names.get(id, id.hex()[-6:]), last=LAST_DECISIONS, now=self.loop.time()
            )
            told += f"\n  {peer.name} decided last:" + "".join(f"\n    {line}" for line in lines)
        return told

    def _standing(self) -> str:
        return ", ".join(
            f"{p.name} at {p.machine.head.round}/{p.machine.head.total}/{p.machine.head.id.hex()[:6]}"
            for p in self._living()
        )

    # ---- where it stands --------------------------------------------------------------------------------------

    def _living(self) -> list[SimPeer]:
        return [peer for peer in self.peers if peer.alive and hasattr(peer, "driver")]

    def _round_of(self, peer: SimPeer) -> int:
        return peer.machine.head.round if peer.alive and hasattr(peer, "driver") else 0

    def _highest(self) -> int:
        return max((self._round_of(peer) for peer in self.peers), default=0)

    def _lowest(self) -> int:
        return min((self._round_of(peer) for peer in self._living()), default=0)

    def _converged(self) -> bool:
        """Whether all live peers are on one chain, up to a seal that is on its way."""
        heads = [peer.machine.head for peer in self._living()]
        if len(heads) < sum(peer.alive for peer in self.peers):
            return False
        best = max(heads, key=lambda head: (head.total, head.round))
        if best.id in self.forged:
            return False
        path = self.oracle.path_tail(best.id, 2)
        return all(head.id in path for head in heads)

    def _all_members(self) -> bool:
        living = self._living()
        return {peer.id for peer in living} <= {m.peer_id for m in living[0].machine.head.following}

    def _sent_totals(self) -> tuple[int, int]:
        return sum(self.network.bytes_sent.values()), sum(self.network.frames_sent.values())

    # ---- the records in the DHT -------------------------------------------------------------------------------

    def publish(self, peer: SimPeer) -> None:
        """A peer says that it lives."""
        if peer.dialable:
            self.records[peer.id] = self.loop.time()

    def others(self, peer: SimPeer) -> list[tuple[bytes, Grant | None]]:
        """Whose records a peer finds, and the grants in them."""
        now, grants = self.loop.time(), {other.id: other.grant for other in self.peers}
        return [
            (other, grants.get(other))
            for other, at in self.records.items()
            if other != peer.id
            and now - at < RECORD_FRESH_SECONDS
            and (other, peer.id) not in self.network.cut
            and (peer.id, other) not in self.network.cut
        ]

    def apply_seconds(self) -> float:
        """How long a trainer takes for one message."""
        return self._apply_random.choice((0.0, 0.0, 0.01, 0.1))

    # ---- what peers do ----------------------------------------------------------------------------------------

    def note(self, peer: str, what: str) -> None:
        """A line of the history."""
        self._history.update(f"{self.loop.time():.9f} {peer} {what}\n".encode())

    def sends(self, peer: SimPeer, ready: events.ContributionReady, shape: RoundShape) -> None:
        """A contribution leaves."""
        if any(ready.payloads):
            self.oracle.saw_sent(peer.id, ready, shape)

    def saw(self, peer: SimPeer, effect: events.Effect) -> None:
        """An effect is about to be performed."""
        count = self.report.coverage
        self.note(peer.name, _told(effect))
        match effect:
            case events.Apply():
                seal = effect.sealed.seal
                self.oracle.learn(effect.sealed, self.oracle.state(seal.parent), effect.state)
                count["applied"] += 1
                count["skips"] += sum(not part for part in seal.parts)
                if seal.parts and not any(seal.parts):
                    count["rounds_of_skips_only"] += 1
                if self.calm:
                    self._check_inclusion(peer, effect)
            case events.PublishSeal():
                seal = effect.sealed.seal
                count["sealed"] += 1
                self._check_seal(peer, effect.sealed)
                if seal.solo and seal.round > 1:
                    was_member = any(m.peer_id == peer.id for m in self.oracle.state(seal.parent).now)
                    alone = was_member and len(self.oracle.state(seal.parent).now) == 1
                    if not alone:
                        count["solo_by_member" if was_member else "solo_by_learner"] += 1
            case events.Rollback():
                count["rollbacks_of_depth_one"] += 1
                self._count_merge(peer)
            case events.Resync():
                count["resyncs"] += 1
            case events.FetchRounds():
                count["fetches"] += 1
            case events.Audit():
                count["audits"] += 1
            case events.LeftOut():
                count["left_out"] += 1
            case events.Note():
                if effect.kind == "takeover":
                    count["takeovers"] += 1
            case events.StartRound():
                self.oracle.check_length(effect.shape, effect.length_seconds)
            case (
                events.StoodIn()
                | events.SendContribution()
                | events.Reduce()
                | events.SendJoin()
                | events.SendStatements()
                | events.SendProof()
            ):
                pass
            case _:
                assert_never(effect)

    def _count_merge(self, peer: SimPeer) -> None:
        left = self.oracle.state(peer.machine.head.parent) if peer.machine.head.round else None
        if left is not None and len(left.now) == 1:
            self.report.coverage["merges_of_solos"] += 1

    def after_event(self, peer: SimPeer) -> None:
        """A peer has done all that one event asked for."""
        self._check_taken_over(peer)
        total = peer.machine.head.total
        if total < peer.total:
            self.report.coverage["left_more_work_for_more_members"] += 1
        peer.total = total
        try:
            peer.machine.check_invariants()
        except AssertionError as error:
            self.violate(f"{peer.name}: {error}")
        self._check_bounds(peer)
        self._check_convicted(peer)

    def _check_convicted(self, peer: SimPeer) -> None:
        """Nobody is expelled, and nobody has a proof, but of those who lie."""
        machine = peer.machine
        convicted = {*machine.head.expelled, *(proof.reducer for proof in machine.audits.proofs.values())}
        for innocent in convicted - self.oracle.liars:
            named = next((other.name for other in self.peers if other.id == innocent), innocent.hex())
            self.violate(f"{peer.name} convicts {named}, which has not lied")
        if set(machine.head.expelled) & {member.peer_id for member in machine.head.following}:
            self.violate(f"{peer.name} has a member that is expelled")

    def _check_taken_over(self, peer: SimPeer) -> None:
        """Nobody follows a made-up branch who was a member where it parts; a newcomer may be misled, and comes back."""
        before, head = peer.stood_at, peer.machine.head
        peer.stood_at = head
        kind = self.forged.get(head.id)
        if head is before or kind is None:
            return
        self.report.coverage["misled"] += before.id not in self.forged
        # One seal, in turn or out of it, is a member's to make.
        led = head.parent in self.forged if kind == "member_claims_all" else before.id not in self.forged
        parted_at = self.parted_at[head.id]
        if kind == "founder_solo" and any(p is not peer and p.running and p.machine.head == before for p in self.peers):
            # Whoever else stood there, too, came after it.
            parted_at = before
        if led and peer.id in Mark.of(parted_at).members:
            self.violate(f"{peer.name} was taken over at round {head.round}")

    def took(self, peer: SimPeer, message: object) -> None:
        """A trainer is about to take a message."""
        if isinstance(message, Restore):
            count = self.report.coverage
            count["replayed_rounds"] += len(message.rounds)
            ours = peer.trainer.replica.chain
            if message.snapshot is not None:
                count["restores_from_snapshot"] += 1
            fork_round = self._fork_round(ours.id, message.rounds[-1].id if message.rounds else message.chain.id)
            if fork_round < ours.round:
                count["deep_rollbacks"] += 1
                count["forks_older_than_the_journal"] += int(fork_round < peer.journal.first - 1)

    def _fork_round(self, ours: bytes, theirs: bytes) -> int:
        """The last round that the chains to two state ids have in common."""
        path = self.oracle.path(theirs)
        return sum(state in path for state in self.oracle.path(ours)) - 1

    # ---- what must hold ---------------------------------------------------------------------------------------

    def check_account(self, peer: SimPeer) -> None:
        """Produced = momentum + pending + consumed + named losses, for every coefficient."""
        trainer = peer.trainer
        consumed = self.oracle.consumed(trainer.replica.chain.id, peer.id)
        there = trainer.momentum_rows() + trainer.pending_rows() + consumed
        wrong = trainer.produced - peer.lost - there
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ViolationError(
                f"{peer.name} at round {trainer.replica.chain.round}: {wrong[place]:g} of coefficient {place} is "
                f"unaccounted for: produced {trainer.produced[place]:g}, lost {peer.lost[place]:g}, "
                f"momentum {trainer.momentum_rows()[place]:g}, pending {trainer.pending_rows()[place]:g}, "
                f"consumed {consumed[place]:g}"
            )

    def restored(self, peer: SimPeer, journal: Journal) -> None:
        """A peer has come back from its disk: what it lost must be what it had gathered since it last wrote."""
        trainer = peer.trainer
        if peer.name not in self._left:
            return
        produced, stood_at = self._left.pop(peer.name)
        trainer.produced = produced
        peer.lost = produced - trainer.books.retained
        # It may have died after its journal went over to another chain and before it did itself.
        if peer.in_doubt or self._fork_round(stood_at, trainer.replica.chain.id) < journal.first - 1:
            self.gave_up(peer, trainer.at_stake())
        peer.retained_at[trainer.replica.optimizer.decays] = produced - peer.lost
        self.check_account(peer)

    def gave_up(self, peer: SimPeer, at_stake: Any) -> None:
        """A peer changed to a chain whose past is not to be had: what it had sent for that past is a named loss."""
        trainer = peer.trainer
        consumed = self.oracle.consumed(trainer.replica.chain.id, peer.id)
        there = trainer.momentum_rows() + trainer.pending_rows() + consumed
        change = trainer.produced - peer.lost - there
        if (abs(change) > at_stake).any():
            raise ViolationError(f"{peer.name}: a change of chains lost more than what it had sent")
        peer.lost = peer.lost + change
        for decays, retained in peer.retained_at.items():
            peer.retained_at[decays] = retained - change
        peer.has_given_up |= bool(change.any())
        self.report.coverage["given_up"] += int(change.any())

    def died(self, peer: SimPeer) -> None:
        """A peer is about to be gone."""
        if hasattr(peer, "trainer"):
            self._left[peer.name] = peer.trainer.produced, peer.leaves or peer.trainer.replica.chain.id

    def _check_seal(self, peer: SimPeer, sealed: SealedRound) -> None:
        """An honest sealer seals what it holds, and all of it."""
        before = self.oracle.state(sealed.seal.parent)
        shape = chain.shape_of(before, self.chunks)
        if [proof_digest(proof) for proof in sealed.proofs] != [named.proof for named in sealed.seal.expelled]:
            self.violate(f"{peer.name} sealed proofs that it does not hold")
        for number, (digest, data) in enumerate(zip(sealed.seal.parts, sealed.replies, strict=True)):
            if (reply_digest(data) if data is not None else b"") != digest:
                self.violate(f"{peer.name} sealed a reply that it does not hold")
            if data is None and peer.held.get((Key(shape.round, shape.base), number)) == shape:
                self.violate(f"{peer.name} skipped a part whose reply it holds")

    def _check_inclusion(self, peer: SimPeer, effect: events.Apply) -> None:
        if effect.index is None or not effect.contributed:
            return
        included = chain.bits(effect.sealed.seal.included, len(effect.shape.members))
        if effect.index in included:
            self._missed.pop(peer.id, None)
            return
        # A contribution left out by two branches is one: two members that cannot be dialled each seal alone.
        missed = self._missed.setdefault(peer.id, set())
        missed.add(effect.sealed.seal.round)
        if len(missed) > 2 and self.report.convergence_seconds is not None:
            self.violate(f"{peer.name}: {len(missed)} contributions in a row were not included")

    def _check_bounds(self, peer: SimPeer) -> None:
        if peer.machine.head.id in self.forged:
            return  # what nobody ever took a snapshot of came in one piece
        machine, journal = peer.machine, peer.journal
        interval = self.manifest.round.root_interval
        sizes = {
            "early messages": (len(machine.exchanges.early), 2 * self.chunks * len(self.peers)),
            "tips": (len(machine.fetching.tips), 64 + 2 * len(self.peers)),
            "rounds in the journal": (journal.last - journal.first + 1, 5 * interval + 8),
            "pending": (len(peer.trainer.ledger.pending), 64),
            "kept for audits": (peer.driver.auditing.kept_bytes, KEPT_BYTES),
            "waiting calls": (peer.driver.answering.awaited, 4 * self.chunks),
        }
        for what, (size, most) in sizes.items():
            if size > most:
                self.violate(f"{peer.name}: {size} {what}, at most {most} are expected")


class _Errors(logging.Handler):
    """Errors that the program logs are errors."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, PeerCrashed):
            self._world.violate(f"{record.getMessage()}: {error!r}")


@contextlib.contextmanager
def _captured_errors(world: World) -> Iterator[None]:
    logger = logging.getLogger("p2ptrain")
    handler, level, propagate = _Errors(world), logger.level, logger.propagate
    logger.addHandler(handler)
    if level == logging.NOTSET:
        logger.setLevel(logging.ERROR)
    logger.propagate = propagate and level != logging.NOTSET
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _told(effect: events.Effect) -> str:
    """An effect as a line of the history."""
    match effect:
        case events.Apply():
            return f"apply {effect.sealed.seal.round} {effect.sealed.id.hex()}"
        case events.PublishSeal():
            return f"seal {effect.sealed.seal.round} {effect.sealed.id.hex()}"
        case events.Rollback():
            return f"rollback {effect.state.round}"
        case (
            events.StartRound()
            | events.StoodIn()
            | events.SendContribution()
            | events.Reduce()
            | events.Audit()
            | events.SendProof()
            | events.FetchRounds()
            | events.Resync()
            | events.SendJoin()
            | events.SendStatements()
            | events.LeftOut()
            | events.Note()
        ):
            return type(effect).__name__
        case _:
            assert_never(effect)


def simulate(scenario: Scenario) -> Report:
    """Play one scenario in a folder of its own."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="p2ptrain-sim-", dir=base))
    gc.freeze()  # the collection afterwards need not walk through what was there before
    try:
        return World(scenario, folder).run()
    finally:
        _forget_what_is_half_done()
        gc.unfreeze()
        shutil.rmtree(folder, ignore_errors=True)


def _forget_what_is_half_done() -> None:
    """Collect the streams and tasks that the history left waiting; each would say so on stderr, later and elsewhere."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = before
