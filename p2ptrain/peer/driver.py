"""Runs the round's state machine over the network: messages and timers in, its effects out.

Lives on the network thread, and so does all that it holds. The machine decides; the driver journals, sends, receives,
checks form and size, and passes to the trainer, through a queue, what it has to know: `StartRound`, `StoodIn`,
`Dropped`, `Apply`, `Rollback`, `Restore`. A round is in the journal before the trainer hears of it, and a contribution
in the own log before its first byte leaves. Where it stands it publishes as a whole, `standing`, which any thread may
read.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

import msgspec

from p2ptrain import chain
from p2ptrain.calls.client import Client
from p2ptrain.calls.handout import Handout
from p2ptrain.calls.messages import (
    NAMESPACE,
    TOO_MANY_CALLS,
    CallError,
    ContributionHeader,
    JoinRequest,
    RefusedError,
    Tip,
    Traffic,
    Welcome,
)
from p2ptrain.calls.news import RETRY_SECONDS, NewsFeed
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.calls.uplink import Burst, UplinkMeter
from p2ptrain.chain import ChainState, Member, RoundShape, Seal, SealError
from p2ptrain.chain.sealed import (
    Key,
    Reply,
    SealedRoundError,
    make_reply,
    reply_digest,
)
from p2ptrain.compression import decoded, wire
from p2ptrain.compression.layout import ChunkLayout
from p2ptrain.compression.reduce import reduce_part
from p2ptrain.config.manifest import PROTOCOL_VERSION, Manifest
from p2ptrain.history.catching_up import CatchingUp
from p2ptrain.observe.status import Standing
from p2ptrain.rounds import events
from p2ptrain.rounds.inbox import Dropped, Inbox
from p2ptrain.rounds.machine import RoundMachine
from p2ptrain.state.failpoints import failpoint
from p2ptrain.state.files import atomic_write
from p2ptrain.state.journal import Journal
from p2ptrain.state.own_log import OwnEntry, OwnLog
from p2ptrain.state.pieces import Partials
from p2ptrain.state.snapshot import SnapshotStore
from p2ptrain.state.tensors import TensorFileError
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.node import SwarmNode

LOOK_SECONDS = 0.1
"""Between two looks at what others say, while the run's end is waited for."""
DECISIONS_MAX_CHARACTERS = 2**20
_GOODBYE_SECONDS = 3.0
_TRANSIENT = ("foreign", "too early", TOO_MANY_CALLS)
"""Reasons of a reducer that may pass: it has not seen the last seal yet."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverParts:
    """What a driver works with."""

    node: SwarmNode
    manifest: Manifest
    signed_manifest: bytes
    run_id: bytes
    layout: ChunkLayout
    machine: RoundMachine
    journal: Journal
    own_log: OwnLog
    snapshots: SnapshotStore
    inbox: Inbox
    uplink: UplinkMeter
    traffic: Traffic
    snapshot_max_bytes: int
    snapshot_chain: Callable[[bytes], ChainState]
    packed_corpus: Callable[[], bytes | None]
    sync_progress: Callable[[str, int, int], None]
    decisions_log: Path
    """Where a failure leaves what the machine heard and decided last."""


class RoundDriver:
    """See the module docstring. All is for the network thread, but `standing` and the methods that say otherwise."""

    def __init__(self, parts: DriverParts) -> None:
        self._p = parts
        self.machine = parts.machine
        self.handout = Handout(lambda: parts.uplink.line_kbit)
        self._client = Client(parts.node, parts.traffic, parts.run_id, self.handout)
        self.feed = NewsFeed(self._client, lambda: self.tip, self.dispatch, self._audience)
        self.catching_up = CatchingUp(
            self._client,
            parts.layout,
            parts.journal,
            parts.snapshots,
            Partials(parts.snapshots.folder),
            lambda: list(self.feed.tips),
            parts.manifest.round.root_interval,
            parts.snapshot_max_bytes,
            parts.snapshot_chain,
            parts.sync_progress,
        )
        #: the round started last
        self._started: Key | None = None
        #: effects not performed yet
        self._effects: deque[events.Effect] = deque()
        self._performing = False
        #: why this peer cannot go on
        self.failure: OSError | None = None
        self._me = parts.node.peer_id
        #: in the order of their making, as sets of objects have none
        self._tasks: dict[asyncio.Task[None], None] = {}
        #: the messages of the round under way, for the uplink; who is being sent one of several parts
        self._burst: tuple[Key, Burst] | None = None
        self._turns: dict[bytes, asyncio.Lock] = {}
        #: deliveries under way -> their round
        self._deliveries: dict[asyncio.Task[None], int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        #: calls by which our replies are being handed out
        self.handing_out: set[asyncio.Future[None]] = set()
        #: replies frozen here: waiters by round and part
        self._reply_waiters: dict[tuple[Key, int], asyncio.Future[Reply]] = {}
        self._traffic_mark = (0, 0)
        #: bytes (sent, received) during the last round
        self.last_round_bytes = (0, 0)
        self.syncing = False
        self.leaving = False
        self._decisions_written = False
        #: how it is with this peer: replaced whole, never changed. Any thread may read it
        self.standing = Standing(head_round=self.machine.head.round)

    async def start(self) -> None:
        """Answer calls, and begin at the chain state that the machine was given."""
        await self._p.node.add_servicer(PeerServicer(self, self._p.traffic), NAMESPACE)
        self._do(self.machine.start(self._now()))

    async def stop(self) -> None:
        """Say goodbye to all who follow us, and end everything."""
        self.leave()
        if self._timer is not None:
            self._timer.cancel()
        if self.handing_out:
            await asyncio.wait(self.handing_out, timeout=_GOODBYE_SECONDS)
        await self.feed.close()
        tasks = [*self._tasks, *self._deliveries]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def leave(self) -> None:
        """Take no part any more; `stop` ends what is under way."""
        self.leaving = True
        self.publish_standing()

    def publish_standing(self) -> None:
        """Bring `standing` up to date."""
        machine, shape = self.machine, self.machine.shape
        behind = max((tip.round for tip in self.feed.tips.values()), default=0) > machine.head.round + 1
        sent, received = self.last_round_bytes
        self.standing = Standing(
            head_round=machine.head.round,
            member=machine.is_member,
            members=len(shape.members) if shape else 0,
            syncing=self.syncing or behind,
            leaving=self.leaving,
            bytes_sent_per_round=sent,
            bytes_received_per_round=received,
            failure=None if self.failure is None else self.failure.strerror or str(self.failure),
        )

    async def others_reach(self, round: int) -> None:
        """Return once all who say where they stand have this round."""
        while any(tip.round < round for tip in self.feed.tips.values()):
            await asyncio.sleep(LOOK_SECONDS)

    @property
    def tip(self) -> Tip:
        """Where our chain stands."""
        head = self.machine.head
        return Tip(head.round, head.id, head.total)

    # ---- from the trainer -------------------------------------------------------------------------------------

    def contribute(self, ready: events.ContributionReady, entry: OwnEntry) -> None:
        """The trainer's contribution to the round under way; dropped where it comes too late for it."""
        shape = self.machine.shape
        ranges = tuple((part.start, part.end) for part in shape.parts) if shape else ()
        if not self.machine.awaits(ready.key) or entry.ranges != ranges:
            sent = self._p.own_log.find(entry.key)
            if sent is None or sent.decays != entry.decays:
                self._p.inbox.put(Dropped(entry.key, entry.decays, entry.row.weight))
            return
        row = msgspec.structs.replace(ready.row, uplink=self._p.uplink.declared_kbit)
        ready, entry = replace(ready, row=row), msgspec.structs.replace(entry, row=row)
        try:
            if self._p.own_log.find(ready.key) != entry:
                self._p.own_log.write(entry)
        except OSError as error:
            self._fail(error)
        self.dispatch(ready)

    def root_computed(self, round: int, id: bytes, root: bytes) -> None:
        """The trainer has written the snapshot of this round, at state `id`; of a branch that was left, none."""
        if self._p.journal.position(id) == round:
            self.dispatch(events.RootComputed(round, root))
        self.catching_up.forget_partial()
        keep_from = min((snapshot.round for snapshot in self._p.snapshots.all()), default=0)
        if len(self._p.snapshots.all()) >= 3:
            self._p.journal.prune(keep_from + 1)

    def prune_own_log(self, before: int) -> None:
        """No restart of the trainer needs the entries of rounds before this one."""
        # It may be on a branch that was left for a shorter one: what goes out now is needed for longer.
        self._p.own_log.prune(min(before, self.machine.head.round))

    # ---- events and effects -----------------------------------------------------------------------------------

    def dispatch(self, event: events.Event) -> None:
        """Let the machine hear an event, and do what it asks for."""
        if not self.leaving:
            self._do(self.machine.handle(event, self._now()))

    def _do(self, effects: list[events.Effect]) -> None:
        # Before the trainer hears of anything, so that it never shows what was before.
        self.publish_standing()
        # Performing one may have the machine hear of something, and ask for more: in order, after these.
        self._effects += effects
        if self._performing:
            return
        self._performing = True
        try:
            while self._effects:
                self._perform(self._effects.popleft())
        except OSError as error:
            self._fail(error)
        finally:
            self._performing = False
        self._set_timer()

    def _fail(self, error: OSError) -> None:
        """Without its journal a peer must not go on: what it says would not outlive it."""
        self.failure = error
        self.leave()
        self._p.inbox.put(None)
        self.write_decisions(repr(error))

    def _perform(self, effect: events.Effect) -> None:
        match effect:
            case events.StartRound():
                if self._started == effect.key:
                    # On another branch now, where the same key has other parts.
                    self._end_rounds_before(effect.key.round + 1)
                self._started = effect.key
                self._p.inbox.put(effect)
                self._repeat_own(effect)
            case events.StoodIn():
                self._p.inbox.put(effect)
            case events.SendContribution():
                self._log_stand_in(effect)
                task = asyncio.create_task(self._deliver(effect))
                self._deliveries[task] = effect.key.round
                task.add_done_callback(lambda done: self._deliveries.pop(done, None))
                task.add_done_callback(self._report)
            case events.Reduce():
                self._spawn(self._reduce(effect))
            case events.PublishSeal():
                self.feed.tell(effect.sealed.signed)
                self.feed.pass_on(effect.sealed.id, effect.sealed.seal, effect.sealed.signed)
            case events.Apply():
                self._apply(effect)
            case events.Rollback():
                self._p.journal.truncate(effect.state.round)
                self._p.inbox.put(effect)
            case events.FetchRounds():
                self._spawn(self._fetch(effect))
            case events.Resync():
                _logger.warning("fetching the state of the swarm: %s", effect.why)
                self._spawn(self._resync(effect))
            case events.SendJoin():
                self._spawn(self._ask_to_join(effect.sealer))
            case events.Note():
                _logger.info(effect.text)
            case _:
                assert_never(effect)

    def _apply(self, effect: events.Apply) -> None:
        self._p.journal.append(effect.sealed)
        self.catching_up.note_root(effect.sealed)
        self._end_rounds_before(effect.state.round + 1)
        sent, received = self._p.traffic.sent, self._p.traffic.received
        self.last_round_bytes = (sent - self._traffic_mark[0], received - self._traffic_mark[1])
        self._traffic_mark = (sent, received)
        self.publish_standing()
        self._p.inbox.put(effect)
        if effect.sealed.seal.sealer != self._me:
            self.feed.tell(None)
        self.follow_members()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.machine.wake_at is not None and not self.leaving:
            self._timer_due = self.machine.wake_at
            delay = max(0.0, self._timer_due - self._now())
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.dispatch(events.Tick(late=self._now() - self._timer_due > 1.0))

    def _now(self) -> float:
        """Monotonic seconds, by the loop's clock."""
        return asyncio.get_running_loop().time()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        task.add_done_callback(self._report)

    # ---- contributions and replies ----------------------------------------------------------------------------

    def _repeat_own(self, effect: events.StartRound) -> None:
        """What was sent for a round, before a restart or on another branch, stays the only message of its round.

        At once, before anything could stand in for it: whose message went in as weight 0 must not count as used.
        """
        entry = self._p.own_log.find(effect.key)
        if entry is None:
            return
        parts = effect.shape.parts
        payloads = tuple(b"" for _ in parts)
        if not entry.stood_in:
            topk, bits = self._p.layout.topk, self._p.manifest.codec.value_bits
            sent = wire.join(
                [
                    wire.decode_contribution(payload, topk, *piece, bits)
                    for payload, piece in zip(entry.payloads, entry.ranges, strict=True)
                ]
            )
            payloads = tuple(wire.encode_contribution(sent.cut(p.start, p.end), topk, bits) for p in parts)
            ranges = tuple((part.start, part.end) for part in parts)
            if ranges != entry.ranges:
                self._p.own_log.write(msgspec.structs.replace(entry, ranges=ranges, payloads=payloads))
        self.dispatch(events.ContributionReady(effect.key, entry.row, payloads))

    def _log_stand_in(self, effect: events.SendContribution) -> None:
        """A message in the trainer's stead is journaled before its first byte, as the trainer's are."""
        if effect.row.weight == 0 and self._p.own_log.find(effect.key) is None:
            entry = OwnEntry(effect.key.round, effect.key.base, effect.row, (), (), 0, 0)
            self._p.own_log.write(entry)

    def _end_rounds_before(self, round: int) -> None:
        """Stop sending, and let go of who still waits, for rounds that are over."""
        for task in [t for t, of in self._deliveries.items() if of < round]:
            task.cancel()
        for key in [k for k in self._reply_waiters if k[0].round < round]:
            self._reply_waiters.pop(key).cancel()

    async def _deliver(self, effect: events.SendContribution) -> None:
        """Send one part to its reducer until it answers with the reply; the round's end cancels this."""
        shape = self.machine.shape
        if shape is None or self.machine.exchange_key != effect.key:
            return
        root_round, root = self.machine.newest_root
        spec = shape.parts[effect.part]
        reply_max = wire.reply_max_bytes(self._p.layout.reply_topk, spec.start, spec.end, len(shape.members))
        rules = self.machine.rules
        reply_seconds = rules.max_seconds + rules.round_max_seconds + rules.grace_seconds + rules.reply_timeout_seconds
        burst = self._burst_of(effect.key, shape)
        turn = self._turns.setdefault(effect.reducer, asyncio.Lock())
        attempt = 0
        while self.machine.exchange_key == effect.key:
            header = ContributionHeader(
                run_id=self._p.run_id,
                round=effect.key.round,
                base=effect.key.base,
                part=effect.part,
                row=effect.row,
                root_round=root_round,
                root=root,
                tip=self.tip,
            )
            try:
                data = await self._client.contribute(
                    effect.reducer, header, effect.payload, reply_max, reply_seconds, turn, burst
                )
                reply = make_reply(data, self._p.layout, shape, effect.part)
                if self.machine.shape is shape:
                    self.dispatch(events.ReplyHeld(effect.key, effect.part, reply))
                return
            except RefusedError as error:
                if str(error) not in _TRANSIENT:
                    _logger.info("%s refuses our contribution: %s", format_peer_id(effect.reducer)[-8:], error)
                    return
            except (CallError, SealedRoundError) as error:
                _logger.debug("contribution to %s: %s", format_peer_id(effect.reducer)[-8:], error)
            burst.spoil()
            await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
            attempt += 1

    def _burst_of(self, key: Key, shape: RoundShape) -> Burst:
        """What all messages of one round of ours tell of the line."""
        if self._burst is None or self._burst[0] != key:
            elsewhere = sum(shape.members[part.reducer].peer_id != self._me for part in shape.parts)
            self._burst = key, self._p.uplink.burst(elsewhere)
            self._turns = {peer: turn for peer, turn in self._turns.items() if turn.locked()}
        return self._burst[1]

    async def _reduce(self, effect: events.Reduce) -> None:
        config, layout, shape = self._p.manifest, self._p.layout, self.machine.shape
        spec = shape.parts[effect.part] if shape is not None and effect.part < len(shape.parts) else None
        if spec is None or (spec.start, spec.end) != (effect.start, effect.end):
            return  # the round is over, or a fork has cut it otherwise

        def reduced(contributions: Sequence[tuple[int, int, bytes]]) -> bytes:
            return reduce_part(
                contributions,
                topk=layout.topk,
                reply_topk=layout.reply_topk,
                start=effect.start,
                end=effect.end,
                members=effect.members,
                value_bits=config.codec.value_bits,
                clip_ratio=config.round.clip_ratio,
                weight_cap_ratio=config.round.weight_cap_ratio,
            )

        def work() -> bytes:
            try:
                return reduced(effect.contributions)
            except wire.WireError:
                # What came a round early was not looked at yet.
                return reduced([c for c in effect.contributions if self._well_formed(shape, effect.part, *c[1:])])

        data = await asyncio.to_thread(work)
        if self.machine.shape is not shape:
            return  # the round is over, or its parts are others now
        reply = Reply(reply_digest(data), wire.reply_members(data, effect.members), data)
        waiter = self._reply_waiters.get((effect.key, effect.part))
        if waiter is None:
            waiter = self._reply_waiters.setdefault((effect.key, effect.part), self._future())
        if not waiter.done():
            waiter.set_result(reply)
        self.dispatch(events.ReplyHeld(effect.key, effect.part, reply))

    def _future(self) -> asyncio.Future[Reply]:
        return asyncio.get_running_loop().create_future()

    async def frozen_reply(self, key: Key, part: int) -> Reply | None:
        """The reply of a part that we reduce, once it is frozen; None when the round ended without."""
        sealed = self._from_journal(key, part)
        if sealed is not None:
            return sealed
        if key.round <= self.machine.head.round or part > chain.MEMBERS_MAX:
            return None
        waiter = self._reply_waiters.setdefault((key, part), self._future())
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            if waiter.cancelled():
                return self._from_journal(key, part)
            raise

    def _from_journal(self, key: Key, part: int) -> Reply | None:
        """The reply in a round that is sealed already."""
        data = self._p.journal.reply(key.round, key.base, part)
        return None if data is None else Reply(reply_digest(data), frozenset(), data)

    # ---- what others ask (called by the servicer) -------------------------------------------------------------

    def welcome(self) -> Welcome:
        """Answer to hello."""
        return Welcome(PROTOCOL_VERSION, self._p.run_id, self._p.signed_manifest, self.tip)

    def wrong_run(self, run_id: bytes) -> str | None:
        """Why a request for this run is refused, or None."""
        return None if run_id == self._p.run_id else "this peer is in another run"

    def allowed(self, peer: bytes) -> bool:
        """Whether the run's access list lets `peer` contribute."""
        access = self._p.manifest.access
        return access.mode == "open" or format_peer_id(peer) in access.peers

    def take_join(self, wanted: JoinRequest, peer: bytes) -> str:
        """A peer asks to be admitted; returns a refusal or ""."""
        refusal = self.wrong_run(wanted.run_id)
        if refusal is None and not self.allowed(peer):
            refusal = "this run is for listed peers only"
        if refusal is not None:
            return refusal
        failpoint("join_received")
        self.feed.follow(peer)
        self.dispatch(events.JoinReceived(peer, wanted.row))
        return ""

    def refuse(self, header: ContributionHeader, peer: bytes) -> str | None:
        """Why a contribution is refused before its payload is read, or None."""
        refusal = self.wrong_run(header.run_id)
        if refusal is not None:
            return refusal
        if not self.allowed(peer):
            return "this run is for listed peers only"
        self.hear_tip(peer, header.tip)
        return self._refusal(Key(header.round, header.base), header.part, peer)

    def _refusal(self, key: Key, part: int, peer: bytes) -> str | None:
        """The machine's refusal; of who is late it hears all the same."""
        refusal = self.machine.refusal(key, part, peer)
        if refusal == "late":
            self.dispatch(events.CameLate(key, part, peer))
        return refusal

    def contribution_max_bytes(self, header: ContributionHeader) -> int:
        """No payload for that part is longer."""
        start, end, bits = 0, self._p.layout.chunks, self._p.manifest.codec.value_bits
        shape = self.machine.shape
        if shape is not None and header.round == shape.round and header.part < len(shape.parts):
            start, end = shape.parts[header.part].start, shape.parts[header.part].end
        return wire.contribution_max_bytes(self._p.layout.topk, start, end, bits)

    def take_contribution(self, header: ContributionHeader, peer: bytes, payload: bytes) -> str | None:
        """A contribution arrived whole; returns a refusal or None."""
        key = Key(header.round, header.base)
        refusal = self._refusal(key, header.part, peer)
        shape = self.machine.shape if header.round == self.machine.head.round + 1 else None
        if refusal is None and not self._well_formed(shape, header.part, header.row.weight, payload):
            refusal = "malformed"
        if refusal is None:
            self.dispatch(
                events.ContributionReceived(key, header.part, peer, header.row, header.root_round, header.root, payload)
            )
        return refusal

    def _well_formed(self, shape: RoundShape | None, part: int, weight: int, payload: bytes) -> bool:
        """Whether a payload is what its part takes; without a shape it is looked at later. Any thread."""
        if bool(payload) != bool(weight):
            return False
        if not payload or shape is None:
            return True
        spec = shape.parts[part]
        try:
            decoded.contribution(payload, self._p.layout.topk, spec.start, spec.end, self._p.manifest.codec.value_bits)
        except wire.WireError:
            return False
        return True

    def hear_tip(self, peer: bytes, tip: Tip) -> None:
        """A peer said where it stands."""
        self.feed.follow(peer)
        self.feed.hear_tip(peer, tip)

    def packed_corpus(self) -> bytes | None:
        """The corpus to hand out. Any thread."""
        return self._p.packed_corpus()

    # ---- others -----------------------------------------------------------------------------------------------

    def follow_members(self) -> None:
        """Follow members of this round and the next."""
        head = self.machine.head
        members = {member.peer_id: member for member in head.now + head.following}
        self.feed.follow_group(list(members.values()))

    def _audience(self, identifier: bytes, seal: Seal) -> tuple[Member, ...]:
        """Who needs a seal: the members of the round after it. All compute the same, before they adopt it and after."""
        head = self.machine.head
        if seal.solo:
            return ()
        if identifier == head.id:
            return head.now
        try:
            chain.extend(head, identifier, seal, self._p.layout.chunks)
        except SealError:
            return ()
        return head.following

    async def _ask_to_join(self, sealer: bytes) -> None:
        try:
            await self._client.join(sealer, self.machine.row)
        except RefusedError as error:
            _logger.warning("not admitted: %s", error)
        except CallError as error:
            _logger.debug("could not ask %s to admit us: %s", format_peer_id(sealer)[-8:], error)
            await self.feed.connect(sealer)

    async def _fetch(self, effect: events.FetchRounds) -> None:
        """Rounds that continue our head, or its parent, from one donor."""
        machine, donor = self.machine, effect.donor
        try:
            fetched = await self.catching_up.fetch(
                donor, tuple(effect.locator), machine.head.round, machine.known_state
            )
        except (CallError, SealedRoundError) as error:
            _logger.debug("no rounds from %s: %s", format_peer_id(donor)[-8:], error)
            self.dispatch(events.FetchFailed(donor))
            await self.feed.connect(donor)
        else:
            self.dispatch(fetched)

    def _worth_changing_to(self, state: ChainState) -> bool:
        """Whether a fetched chain is better than ours, continues it, or is ours, which our replica fell out of."""
        head = self.machine.head
        ahead = state.round > head.round and state.total >= head.total
        return ahead or state.id == head.id or chain.better(state.total, state.id, head.total, head.id)

    async def _resync(self, effect: events.Resync) -> None:
        """Go over to a donor's chain: on disk first, then in the trainer's queue, then in the machine."""
        self.syncing = True
        try:
            restore, state = await self.catching_up.change_chain(effect.donor)
            if not self._worth_changing_to(state):
                raise CallError("its chain is not the better one after all")
            self.catching_up.adopt(restore)
            self._p.inbox.put(restore)
            self.dispatch(events.Synced(state))
            self.follow_members()
        except (CallError, SealedRoundError, TensorFileError, OSError) as error:
            _logger.warning("could not fetch the state of %s: %s", format_peer_id(effect.donor)[-8:], error)
            self.dispatch(events.FetchFailed(effect.donor))
        finally:
            self.syncing = False

    def _report(self, task: asyncio.Task[None]) -> None:
        """Log a task's failure: nothing that this driver does may fail in silence."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _logger.error("a task of the round has failed", exc_info=error)
            self.write_decisions(repr(error))

    def write_decisions(self, why: str) -> None:
        """Leave what the machine heard and decided before this process's first failure in the home, and say where."""
        if self._decisions_written:
            return
        self._decisions_written = True
        lines = self.machine.decisions.lines(lambda peer: format_peer_id(peer)[-6:])
        while sum(map(len, lines)) > DECISIONS_MAX_CHARACTERS:
            del lines[: len(lines) // 2 + 1]
        text = f"{why}\nThe last events, at monotonic seconds, and what each led to:\n" + "\n".join(lines) + "\n"
        try:
            atomic_write(self._p.decisions_log, text.encode())
        except OSError as error:
            _logger.warning("cannot write %s: %s", self._p.decisions_log, error.strerror)
        else:
            _logger.error("what this peer decided before the failure is in %s", self._p.decisions_log)
