"""Runs the round's state machine over the network: messages and timers in, its effects out.

Lives on the network thread, and so does all that it holds. The machine decides; the driver journals, fetches, and
passes to the trainer, through a queue, what it has to know: `StartRound`, `StoodIn`, `Apply`, `Rollback`, `Restore`.
What others ask is `answering`'s, and what is sent to reducers `sending`'s: both let the machine hear of what happens by
`dispatch`. A round is in the journal before the trainer hears of it. Where it stands the driver publishes as a whole,
`standing`, which any thread may read.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Coroutine
from typing import assert_never

from p2ptrain import chain
from p2ptrain.calls.client import Client, hello
from p2ptrain.calls.handout import Handout
from p2ptrain.calls.messages import NAMESPACE, CallError, RefusedError, Tip
from p2ptrain.calls.news import NewsFeed
from p2ptrain.calls.servicer import PeerServicer
from p2ptrain.chain import ChainState, Member, Seal, SealError, evidence
from p2ptrain.chain.admission import Grant
from p2ptrain.chain.forks import Mark
from p2ptrain.chain.sealed import Key, SealedRoundError
from p2ptrain.history.catching_up import CatchingUp
from p2ptrain.history.remembered import write_company
from p2ptrain.observe.status import Standing
from p2ptrain.peer.admission import Admission, shuts_out
from p2ptrain.peer.answering import Answering
from p2ptrain.peer.auditing import Auditing
from p2ptrain.peer.parts import DriverParts
from p2ptrain.peer.room import LOOK_SECONDS as ROOM_SECONDS
from p2ptrain.peer.room import HomeFullError, Room
from p2ptrain.peer.sending import Sending
from p2ptrain.rounds import events
from p2ptrain.rounds.decisions import LISTED
from p2ptrain.rounds.inbox import Restore
from p2ptrain.state import files
from p2ptrain.state.files import atomic_write
from p2ptrain.state.own_log import OwnEntry
from p2ptrain.state.pieces import Partials
from p2ptrain.state.tensors import TensorFileError
from p2ptrain.swarm.identity import format_peer_id
from p2ptrain.swarm.records import ID_END, REASON_MAX, RefusedRecord
from p2ptrain.swarm.tasks import cancel_and_wait, failure_logged
from p2ptrain.training.machine import this_machine

LOOK_SECONDS = 0.1
"""Between two looks at what others say, while the run's end is waited for."""
DECISIONS_MAX_CHARACTERS = 2**20
GOODBYE_SECONDS = 3.0
FULL_DISK_SECONDS = 1.0
"""Between two attempts to write to a disk that is full."""

_SAID_ONCE = (
    events.ReplyHeld,
    events.RoundsFetched,
    events.FetchFailed,
    events.Synced,
    events.RootComputed,
    events.Doubted,
    events.Audited,
)
"""What comes of this peer's own work: the machine waits for it, or nobody says it again."""

_logger = logging.getLogger(__name__)


class RoundDriver:
    """See the module docstring. All is for the network thread, but `standing` and the methods that say otherwise."""

    def __init__(self, parts: DriverParts) -> None:
        self._p = parts
        self.machine = parts.machine
        line = parts.traffic.line
        handout = Handout(
            lambda: parts.uplink.line_kbit,
            shared=lambda: self.standing.members > 1,
            busy=lambda: self.standing.member,
            most_bytes=lambda: math.inf if line is None else line.upload_rate,
            cores=this_machine().threads,
        )
        self._client = Client(parts.node, parts.traffic, parts.run_id, handout, parts.grant)
        self.admission = Admission(lambda: self.machine.head, parts.introducers, clock=self._now)
        self.feed = NewsFeed(
            self._client,
            lambda: Tip.of(self.machine.head),
            self.dispatch,
            self._audience,
            self.admission.admits,
            self._note_refusal,
        )
        self.catching_up = CatchingUp(
            self._client,
            parts.codec,
            parts.journal,
            parts.snapshots,
            Partials(parts.snapshots.folder),
            lambda: list(self.feed.tips),
            parts.beginning,
            parts.manifest.round.root_interval,
            parts.snapshot_max_bytes,
            parts.snapshot_chain,
            parts.sync_progress,
            parts.seals,
        )
        self._report = failure_logged(
            _logger, "a task of the round has failed", lambda error: self.write_decisions(repr(error))
        )
        self.auditing = Auditing(parts, self._client, self.dispatch)
        #: what others ask, and what is sent to them
        self.answering = Answering(
            parts, handout, self.feed, self.catching_up, self.admission, self.auditing, self.dispatch
        )
        self.sending = Sending(parts, self._client, self.dispatch, self._report)
        self._servicer = PeerServicer(self.answering, parts.traffic)
        #: why the peer that was asked last does not admit us; "": nobody refuses
        self.not_admitted = ""
        #: the round started last
        self._started: Key | None = None
        #: effects not performed yet
        self._effects: deque[events.Effect] = deque()
        self._performing = False
        #: why this peer cannot go on
        self.failure: OSError | None = None
        #: nothing is heard or done until there is room on the disk, which is full since then
        self._paused = False
        self._full_since: float | None = None
        #: why, for people; "": that is not so
        self.held_up = ""
        #: what its own tasks and its trainer have found meanwhile
        self._unheard: list[events.Event] = []
        #: what the trainer handed over meanwhile
        self._handed: list[tuple[events.ContributionReady, OwnEntry]] = []
        #: the run's owner has shut this peer out
        self.revoked = False
        #: somebody refuses us and is being asked why
        self._asking_why = False
        self._me = parts.node.peer_id
        #: in the order of their making, as sets of objects have none
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._traffic_mark = (0, 0)
        #: bytes (sent, received) during the last round
        self.last_round_bytes = (0, 0)
        self.syncing = False
        self.leaving = False
        self._decisions_written = False
        #: as it is on disk
        self._company = self.machine.forks.company
        #: how it is with this peer: replaced whole, never changed. Any thread may read it
        self.standing = Standing(head_round=self.machine.head.round)

    async def start(self) -> None:
        """Answer calls, and begin at the chain state that the machine was given."""
        await self._p.node.add_servicer(self._servicer, NAMESPACE)
        if self._p.room is not None:
            self._spawn(self._keep_room(self._p.room))
        self._do(self.machine.start(self._now()))
        if self._p.grant is not None:
            self.dispatch(events.StatementHeard(self._p.grant))

    async def stop(self, patience_seconds: float = GOODBYE_SECONDS) -> None:
        """Say goodbye to all who follow us, and end everything.

        Args:
            patience_seconds: for replies that others are being handed.
        """
        self.leave()
        if self._timer is not None:
            self._timer.cancel()
        if self.answering.handing_out:
            await asyncio.wait(self.answering.handing_out, timeout=patience_seconds)
        await self.feed.close()
        await cancel_and_wait([*self._tasks, *self.sending.deliveries])

    async def retire(self, patience_seconds: float = GOODBYE_SECONDS) -> None:
        """Stop, as `stop` does, and leave a node behind that another driver may answer calls at."""
        await self.stop(patience_seconds)
        await self._p.node.remove_servicer(self._servicer)

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
            dialable=sum(member.dialable for member in shape.members) if shape else 0,
            syncing=self.syncing or behind,
            leaving=self.leaving,
            bytes_sent_per_round=sent,
            bytes_received_per_round=received,
            revoked=self.revoked,
            refused=self._refused_branch(),
            paused=self._paused,
            failure=None if self.failure is None else self.failure.strerror or str(self.failure),
        )

    def _refused_branch(self) -> RefusedRecord | None:
        refused = self.machine.refused_branch
        if refused is None:
            return None
        return RefusedRecord(
            round=refused.round,
            total=refused.total,
            donor=format_peer_id(refused.donor)[-ID_END:],
            why=refused.why[:REASON_MAX],
            age_seconds=max(0, int(self._now() - refused.at)),
        )

    async def others_reach(self, round: int) -> None:
        """Return once all who say where they stand have this round."""
        while any(tip.round < round for tip in self.feed.tips.values()):
            await asyncio.sleep(LOOK_SECONDS)

    # ---- from the trainer -------------------------------------------------------------------------------------

    def contribute(self, ready: events.ContributionReady, entry: OwnEntry) -> None:
        """Take the trainer's contribution to the round under way; it is dropped where it comes too late for it."""
        if self._paused:
            self._handed.append((ready, entry))
            return
        try:
            self.sending.contribute(ready, entry)
        except OSError as error:
            if self._pause(error):
                self._handed.append((ready, entry))
            else:
                self._fail(error)

    def root_computed(self, round: int, id: bytes, root: bytes) -> None:
        """The trainer has written the snapshot of this round, at state `id`; of a branch that was left, none."""
        if self._p.journal.position(id) == round:
            self.dispatch(events.RootComputed(round, root))
        self.catching_up.forget_partial()
        keep_from = min((snapshot.round for snapshot in self._p.snapshots.all()), default=0)
        if len(self._p.snapshots.all()) >= 3:
            self._p.journal.prune(keep_from + 1)

    def doubt(self, doubted: events.Doubted) -> None:
        """The trainer has a sealed reply that points against what we sent for it."""
        self.dispatch(doubted)

    def prune_own_log(self, before: int) -> None:
        """No restart of the trainer needs the entries of rounds before this one."""
        # It may be on a branch that was left for a shorter one: what goes out now is needed for longer.
        self._p.own_log.prune(min(before, self.machine.head.round))

    # ---- events and effects -----------------------------------------------------------------------------------

    def dispatch(self, event: events.Event) -> None:
        """Let the machine hear an event, and do what it asks for."""
        if self._paused and isinstance(event, _SAID_ONCE):
            self._unheard.append(event)
        if not self.leaving and not self._paused:
            self._p.told(event)
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
                try:
                    self._perform(self._effects[0])
                except OSError as error:
                    if self._pause(error):
                        return
                    raise
                self._effects.popleft()
            if self.machine.forks.company is not self._company:
                write_company(self._p.company, self.machine.forks.company)
                self._company = self.machine.forks.company
        except OSError as error:
            if self._pause(error):
                return
            self._fail(error)
        finally:
            self._performing = False
        if self.admission.revocation(self._me) is not None and not self.admission.admits(self._me):
            self._end_as_revoked()
        self._set_timer()

    def _pause(self, error: OSError) -> bool:
        """Do nothing until there is room on the disk, as if this process were stopped; False: that is not the reason.

        Others go on without this peer, which catches up afterwards. What it could not write is done first then, and
        what its own tasks have found is heard next; what others have sent meanwhile is lost, and they say it again.
        """
        if self.leaving or not files.is_full(error):
            return False
        if self._full_since is None:
            self._full_since = self._now()
            full = f"the disk of {self._p.snapshots.folder} is full"
            self.held_up = str(error.strerror) if isinstance(error, HomeFullError) else full
            _logger.warning("%s: this peer pauses until there is room", self.held_up)
        self._paused = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(FULL_DISK_SECONDS, self._try_again)
        self.publish_standing()
        return True

    def _try_again(self) -> None:
        """Go on where the disk was full, if there is room."""
        self._timer, self._paused = None, False
        self._do([])
        while self._unheard and not self._paused:
            self.dispatch(self._unheard.pop(0))
        while self._handed and not self._paused:
            self.contribute(*self._handed.pop(0))
        if self._paused or self._full_since is None:
            return
        _logger.info("there is room on the disk again: going on after %.0f s", self._now() - self._full_since)
        self._full_since, self.held_up = None, ""
        self.dispatch(events.Tick(late=True))

    async def _keep_room(self, room: Room) -> None:
        """Keep the home to the size that its owner allows, until cancelled."""
        while True:
            await asyncio.to_thread(room.look)
            room.make(self._p.journal.prune)
            if room.removed:
                names = ", ".join(room.removed[:LISTED])
                more = f" and {len(room.removed) - LISTED} more" if len(room.removed) > LISTED else ""
                _logger.info("removed, as --max-disk leaves no room for it: %s%s", names, more)
                room.removed.clear()
            await asyncio.sleep(ROOM_SECONDS)

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
                self.sending.repeat_own(effect)
            case events.StoodIn():
                self._p.inbox.put(effect)
            case events.SendContribution():
                self.sending.send(effect)
            case events.Reduce():
                self._spawn(self.answering.reduce(effect))
            case events.Audit():
                self._spawn(self.auditing.audit(effect))
            case events.SendProof():
                self._spawn(self.auditing.hand_on(effect))
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
                # To come to a chain for the first time is no fault of anybody's.
                level = logging.WARNING if self.machine.head.round else logging.INFO
                why = effect.why if self.machine.head.round else "this peer has none yet"
                _logger.log(level, "fetching the state of the swarm: %s", why)
                self._spawn(self._resync(effect))
            case events.SendJoin():
                self._spawn(self._ask_to_join(effect.sealer))
            case events.SendStatements():
                self._spawn(self._hand_on(effect))
            case events.LeftOut():
                self._tell_left_out(effect)
            case events.Note():
                _logger.info(effect.text)
            case _:
                assert_never(effect)
        self._p.told(effect)

    def _apply(self, effect: events.Apply) -> None:
        if self._p.room is not None:
            self._p.room.check()
        self._p.journal.append(effect.sealed)
        for encoded in effect.sealed.proofs:
            self._tell_expelled(evidence.read_proof(encoded))
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

    def _tell_left_out(self, effect: events.LeftOut) -> None:
        """Say who leaves whose work out."""
        names = ["this peer" if peer == self._me else format_peer_id(peer) for peer in effect.members]
        _logger.warning(
            "%s has sealed round %d, as its last ones, without most replies, which were there, and so without the work "
            "of %s; it is accused",
            format_peer_id(effect.sealer),
            effect.round,
            ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else ""),
        )

    def _tell_expelled(self, proof: evidence.Proof) -> None:
        """Say whom a seal expels, and for what."""
        who = "this peer" if proof.reducer == self._me else format_peer_id(proof.reducer)
        _logger.warning(
            "%s is expelled: its reply of round %d, part %d, is not the sum of what it was sent",
            who,
            proof.round,
            proof.part,
        )

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

    def _end_rounds_before(self, round: int) -> None:
        """Stop sending, and let go of who still waits, for rounds that are over."""
        self.sending.end_rounds_before(round)
        self.answering.end_rounds_before(round)

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
            chain.extend(head, identifier, seal, self._p.codec.chunks)
        except SealError:
            return ()
        return head.following

    async def _ask_to_join(self, sealer: bytes) -> None:
        try:
            await self._client.join(sealer, self.machine.row)
            self.not_admitted = ""
        except RefusedError as error:
            if str(error) != self.not_admitted:
                # It asks again each round; `waiting` repeats it now and then.
                _logger.warning("not admitted yet, and asking again: %s", error)
            self.not_admitted = str(error)
        except CallError as error:
            _logger.debug("could not ask %s to admit us: %s", format_peer_id(sealer)[-8:], error)
            await self.feed.connect(sealer)

    async def _hand_on(self, effect: events.SendStatements) -> None:
        try:
            await self._client.amend(effect.sealer, effect.statements)
        except CallError as error:
            _logger.debug("%s takes no statements: %s", format_peer_id(effect.sealer)[-8:], error)

    def hear_grant(self, grant: Grant) -> None:
        """Somebody's record shows by which grant it is in the run."""
        if not self.admission.take(grant) and not self.machine.head.access.has(grant):
            self.dispatch(events.StatementHeard(grant))

    def _note_refusal(self, peer: bytes) -> None:
        """A peer takes us for an outsider, although we are none by what we know."""
        if not self._asking_why and not self.leaving:
            self._asking_why = True
            self._spawn(self._ask_why(peer))

    async def _ask_why(self, peer: bytes) -> None:
        """Learn whether the owner has shut us out; what says so is the owner's signature, not the peer's word."""
        try:
            revocation = (await hello(self._p.node, peer)).revocation
        except CallError as error:
            _logger.debug("%s does not say why it refuses us: %s", format_peer_id(peer)[-8:], error)
        else:
            if revocation is not None and shuts_out(revocation, self._me, self._p.grant, self._p.beginning):
                self._end_as_revoked()
        finally:
            self._asking_why = False

    def _end_as_revoked(self) -> None:
        """Take no part any more: nobody listens."""
        if not self.revoked:
            self.revoked = True
            self.leave()
            self._p.inbox.put(None)

    async def _fetch(self, effect: events.FetchRounds) -> None:
        """Rounds that continue a state of ours, from one donor."""
        machine, donor = self.machine, effect.donor
        try:
            fetched = await self.catching_up.fetch(
                donor, tuple(effect.locator), machine.head.round, machine.known_state, machine.forks.past
            )
        except (CallError, SealedRoundError) as error:
            _logger.debug("no rounds from %s: %s", format_peer_id(donor)[-8:], error)
            self.dispatch(events.FetchFailed(donor))
            await self.feed.connect(donor)
        else:
            self.dispatch(fetched)

    async def _resync(self, effect: events.Resync) -> None:
        """Go over to a donor's chain: on disk first, then in the trainer's queue, then in the machine."""
        self.syncing = True
        try:
            parted_at = self.machine.forks.parted_from(effect.donor)
            restore, state, marks = await self.catching_up.change_chain(effect.donor, parted_at)
            if not self.machine.worth_changing_to(marks, effect.donor, self._now()):
                raise CallError("its chain is not the better one after all")
        except (CallError, SealedRoundError, TensorFileError, OSError) as error:
            _logger.warning("could not fetch the state of %s: %s", format_peer_id(effect.donor)[-8:], error)
            self.dispatch(events.FetchFailed(effect.donor))
        else:
            self._change_to(restore, state, marks)
        finally:
            self.syncing = False

    def _change_to(self, restore: Restore, state: ChainState, marks: tuple[Mark, ...]) -> None:
        try:
            self.catching_up.adopt(restore)
        except OSError as error:
            # Half of it may be in the journal: at its next start this peer sees how far that goes.
            self._fail(error)
            return
        self._p.told(restore)
        self._p.inbox.put(restore)
        self.dispatch(events.Synced(state, marks))
        self.follow_members()

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
