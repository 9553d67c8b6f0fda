"""Answers what others ask of this peer, and reduces the parts that are its own.

Lives on the network thread. What a call brings is checked here before the machine hears of it: the run, the length and
the form. Who sends a contribution waits here for the reply of its part, until the reply is frozen or the round is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from p2ptrain import chain
from p2ptrain.calls.handout import Handout
from p2ptrain.calls.messages import (
    KNOWN_ALREADY,
    Amend,
    AuditRequest,
    ContributionHeader,
    JoinRequest,
    ProofHeader,
    SealsRequest,
    Tip,
    Welcome,
)
from p2ptrain.calls.news import NewsFeed
from p2ptrain.chain import SignedSeal, evidence
from p2ptrain.chain.admission import Revocation
from p2ptrain.chain.evidence import Bundle
from p2ptrain.chain.sealed import Key, Reply, reply_digest
from p2ptrain.compression import wire
from p2ptrain.config.manifest import PROTOCOL_VERSION
from p2ptrain.history.catching_up import CatchingUp
from p2ptrain.peer.admission import Admission
from p2ptrain.peer.auditing import Auditing
from p2ptrain.peer.parts import DriverParts
from p2ptrain.rounds import events
from p2ptrain.state.failpoints import failpoint
from p2ptrain.state.seals import answer_after
from p2ptrain.swarm.identity import verify


class Answering:
    """What `calls.servicer` asks for; see the module docstring.

    Args:
        parts: of this peer.
        handout: how much of the line those get who fetch snapshots.
        feed: the news that others hear of this peer.
        catching_up: where rounds and snapshots to hand out come from.
        admission: whom this peer lets in.
        auditing: keeps what we summed, for those who audit us.
        dispatch: lets the machine hear an event, and does what it asks for.
    """

    def __init__(
        self,
        parts: DriverParts,
        handout: Handout,
        feed: NewsFeed,
        catching_up: CatchingUp,
        admission: Admission,
        auditing: Auditing,
        dispatch: Callable[[events.Event], None],
    ) -> None:
        self._p, self._machine, self._dispatch = parts, parts.machine, dispatch
        self.handout, self.feed, self.catching_up, self._auditing = handout, feed, catching_up, auditing
        #: returns the file of the run that has a root, if it is here
        self.open_file = parts.files.get
        #: says whether a peer may take part in the run and read anything of it
        self.admits = admission.admits
        self._admission = admission
        #: calls by which our replies are being handed out
        self.handing_out: set[asyncio.Future[None]] = set()
        #: replies frozen here: waiters by round and part
        self._reply_waiters: dict[tuple[Key, int], asyncio.Future[Reply]] = {}

    @property
    def tip(self) -> Tip:
        """Say where our chain stands."""
        return Tip.of(self._machine.head)

    @property
    def awaited(self) -> int:
        """Count the parts whose reply is waited for, or kept for those who ask."""
        return len(self._reply_waiters)

    def end_rounds_before(self, round: int) -> None:
        """Let go of who still waits for a reply of rounds that are over."""
        for key in [k for k in self._reply_waiters if k[0].round < round]:
            self._reply_waiters.pop(key).cancel()

    # ---- what others say and want to know ---------------------------------------------------------------------

    def welcome(self) -> Welcome:
        """Answer to hello."""
        return Welcome(PROTOCOL_VERSION, self._p.run_id, self._p.signed_manifest, self.tip, "")

    async def seen_at(self, peer: bytes) -> str:
        """Return the IP address that a peer is connected from; "" where it is not, or through a relay."""
        return await self._p.node.seen_at(peer)

    def revocation(self, peer: bytes) -> Revocation | None:
        """Return the statement by which the run's owner has shut a peer out."""
        return self._admission.revocation(peer)

    def take_statements(self, amend: Amend) -> str:
        """Hear whom to let in or to shut out; return a refusal, that the chain has all of it already, or ""."""
        refusal = self.wrong_run(amend.run_id)
        if refusal is not None:
            return refusal
        if all(map(self._machine.head.access.has, amend.statements)):
            return KNOWN_ALREADY
        refused = ""
        for statement in amend.statements:
            refusal = self._admission.take(statement)
            if refusal:
                refused = refused or refusal
            else:
                self._dispatch(events.StatementHeard(statement))
        return refused

    def wrong_run(self, run_id: bytes) -> str | None:
        """Return why a request for this run is refused, or None."""
        return None if run_id == self._p.run_id else "this peer is in another run"

    def take_join(self, wanted: JoinRequest, peer: bytes) -> str:
        """Hear that a peer asks to be admitted; return a refusal or ""."""
        refusal = self.wrong_run(wanted.run_id)
        if refusal is None and peer in self._machine.head.expelled:
            refusal = "this peer is expelled, as a reply of it was not the sum of what it was sent"
        if refusal is not None:
            return refusal
        failpoint("join_received")
        self.feed.follow(peer)
        self._dispatch(events.JoinReceived(peer, wanted.row))
        return ""

    def refuse(self, header: ContributionHeader, peer: bytes) -> str | None:
        """Return why a contribution is refused before its payload is read, or None."""
        refusal = self.wrong_run(header.run_id)
        if refusal is not None:
            return refusal
        self.hear_tip(peer, header.tip)
        return self._refusal(Key(header.round, header.base), header.part, peer)

    def _refusal(self, key: Key, part: int, peer: bytes) -> str | None:
        """Return the machine's refusal; of who is late it hears all the same."""
        refusal = self._machine.refusal(key, part, peer)
        if refusal == "late":
            self._dispatch(events.CameLate(key, part, peer))
        return refusal

    def contribution_max_bytes(self, header: ContributionHeader) -> int:
        """Return the length that no payload for that part exceeds."""
        start, end = 0, self._p.codec.chunks
        shape = self._machine.shape
        if shape is not None and header.round == shape.round and header.part < len(shape.parts):
            start, end = shape.parts[header.part].start, shape.parts[header.part].end
        return wire.contribution_max_bytes(self._p.codec, start, end)

    def take_contribution(self, header: ContributionHeader, peer: bytes, payload: bytes) -> str | None:
        """Take a contribution that arrived whole; return a refusal or None."""
        key = Key(header.round, header.base)
        refusal = self._refusal(key, header.part, peer)
        shape = self._machine.shape if header.round == self._machine.head.round + 1 else None
        # Without a shape its form is looked at when the part is reduced.
        spec = None if refusal is not None or shape is None else shape.parts[header.part]
        if refusal is None and (bool(payload) != bool(header.row.weight) or not self._is_signed(header, peer, payload)):
            refusal = "malformed"
        if spec is not None and not evidence.well_formed(
            self._p.codec, spec.start, spec.end, header.row.weight, payload
        ):
            refusal = "malformed"
        if refusal is None:
            self._dispatch(
                events.ContributionReceived(
                    key, header.part, peer, header.row, header.root_round, header.root, payload, header.signature
                )
            )
        return refusal

    async def offer_seals(self, wanted: SealsRequest) -> tuple[bytes, list[SignedSeal], int] | None:
        """Return what seals continue, encoded, the seals, and the chunks of the model; None: no seals are kept."""
        log, head = self._p.seals, self._machine.head.round
        if log is None:
            return None
        found = await asyncio.to_thread(answer_after, log, wanted.round, wanted.known, wanted.newest, head)
        return *found, self._p.codec.chunks

    def parted_at(self, locator: tuple[bytes, ...]) -> bytes:
        """Return the first of these ids that our chain went through, as far as we remember, or nothing."""
        return next((identifier for identifier in locator if identifier in self._machine.forks.past), b"")

    def _is_signed(self, header: ContributionHeader, peer: bytes, payload: bytes) -> bool:
        """Say whether a contribution is its sender's by its signature: an auditor will ask."""
        key, row = Key(header.round, header.base), header.row
        return evidence.check_contribution(
            peer, header.signature, self._p.run_id, key, header.part, row, payload, verify
        )

    def show_summed(self, wanted: AuditRequest, peer: bytes) -> bytes | str:
        """Return what a reply of ours is the sum of, or why it is refused."""
        return self.wrong_run(wanted.run_id) or self._auditing.show(wanted.reply, peer)

    def refuse_proof(self, header: ProofHeader, peer: bytes) -> str | None:
        """Return why a proof is refused before it is read, or None."""
        return self.wrong_run(header.run_id) or self._auditing.refuse_proof(header.proof, peer)

    async def take_proof(self, header: ProofHeader, peer: bytes, read: Callable[[], Awaitable[bytes]]) -> None:
        """Read a proof and check it. Raises CallError when it does not come."""
        await self._auditing.take_proof(header.proof, peer, read)

    def hear_tip(self, peer: bytes, tip: Tip) -> None:
        """Hear where a peer stands."""
        self.feed.follow(peer)
        self.feed.hear_tip(peer, tip)

    # ---- the parts that we reduce -----------------------------------------------------------------------------

    async def reduce(self, effect: events.Reduce) -> None:
        """Make the reply of a part, for all who sent something for it."""
        shape = self._machine.shape
        spec = shape.parts[effect.part] if shape is not None and effect.part < len(shape.parts) else None
        if spec is None or (spec.start, spec.end) != (effect.start, effect.end):
            return  # the round is over, or a fork has cut it otherwise
        data, bundle = await self._reduced(effect)
        if self._machine.shape is not shape:
            return  # the round is over, or its parts are others now
        included = wire.reply_members(evidence.body_of(data), len(effect.group.peer_ids))
        reply = Reply(reply_digest(data), included, data)
        self._auditing.keep(effect.key, reply.digest, effect.group.peer_ids, bundle)
        waiter = self._reply_waiters.get((effect.key, effect.part))
        if waiter is None:
            waiter = self._reply_waiters.setdefault((effect.key, effect.part), self._future())
        if not waiter.done():
            waiter.set_result(reply)
        self._dispatch(events.ReplyHeld(effect.key, effect.part, reply))

    async def _reduced(self, effect: events.Reduce) -> tuple[bytes, Bundle]:
        """Return the reply of a part, and what it is the sum of."""
        return await asyncio.to_thread(
            evidence.reduce_and_attest,
            effect.contributions,
            self._p.codec,
            effect.start,
            effect.end,
            sign=self._p.node.identity.sign,
            run_id=self._p.run_id,
            key=effect.key,
            part=effect.part,
            group=effect.group,
        )

    async def frozen_reply(self, key: Key, part: int) -> Reply | None:
        """Return the reply of a part that we reduce, once it is frozen; None when the round ended without."""
        sealed = self._from_journal(key, part)
        if sealed is not None:
            return sealed
        if key.round <= self._machine.head.round or part > chain.MEMBERS_MAX:
            return None
        waiter = self._reply_waiters.setdefault((key, part), self._future())
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            if waiter.cancelled():
                return self._from_journal(key, part)
            raise

    def _from_journal(self, key: Key, part: int) -> Reply | None:
        """Return the reply in a round that is sealed already."""
        data = self._p.journal.reply(key.round, key.base, part)
        return None if data is None else Reply(reply_digest(data), frozenset(), data)

    def _future(self) -> asyncio.Future[Reply]:
        return asyncio.get_running_loop().create_future()
