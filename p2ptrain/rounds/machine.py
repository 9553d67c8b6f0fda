"""The round and the chain as a state machine: events in, effects out, no sockets and no clock.

`RoundMachine.handle(event, now)` is the only method that changes state; `now` is a monotonic time in seconds that the
caller supplies, and `wake_at` says when it wants to hear `Tick` next. The driver (`peer/driver.py`) and tests feed it
the same way, so a decision seen in a test is the decision taken over sockets. `docs/rounds.md` is the specification;
rule numbers in comments refer to it.

Cost: memory is bounded by one round of contributions to our parts plus those for the round after it, and by
`STRANGERS_MAX` in all else that others can make us remember; each event is O(members + parts). Every `FetchRounds` must
be answered by `RoundsFetched` or `FetchFailed`, every `Resync` by `Synced` or `FetchFailed`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, assert_never

import msgspec

from p2ptrain import chain
from p2ptrain.chain import ChainState, Join, RoundShape, Row, Seal, SealError, SignedSeal, relay
from p2ptrain.chain.sealed import Key, Reply, SealedRound
from p2ptrain.rounds import events
from p2ptrain.rounds.deadlines import Deadlines
from p2ptrain.rounds.decisions import Decisions
from p2ptrain.rounds.inbox import Restore

JOINS_PENDING_MAX = 256
JOIN_ROUNDS = 3  # and as many more as there are members: rounds after which a join that was not repeated is forgotten
STRANGERS_MAX = 64  # peers outside the group whose tips or seals we remember
FETCH_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRules:
    """What the manifest fixes about rounds; durations in seconds."""

    chunks: int
    target_batch: int
    min_seconds: float
    max_seconds: float
    fixed_pace: bool
    overlap: bool
    """Members compute for the next round while their messages and replies of this one are on their way."""
    round_max_seconds: float
    grace_seconds: float
    reply_timeout_seconds: float
    seal_timeout_seconds: float
    alone_after_seconds: float
    root_interval: int
    last_round: int
    """The run ends with it; 0: never."""


class _Missed(NamedTuple):
    """A part that we closed before all were heard."""

    #: when its grace began
    since: float
    #: members not heard yet
    members: set[bytes]
    #: newcomers among them
    hoped_for: frozenset[bytes]


class _Waiting(NamedTuple):
    """A seal on our head that names a reply we lack."""

    heard: events.SealHeard
    at: float


@dataclass(slots=True)
class _Part:
    """One part that we reduce this round."""

    #: peer id -> its message; at most one each
    received: dict[bytes, events.ContributionReceived] = field(default_factory=dict)
    #: when half of the other members that are waited for had arrived
    half_at: float | None = None
    #: half of them had not, by when they should have
    given_up: bool = False
    #: the reduction was asked for; later messages are late
    closed: bool = False


@dataclass(slots=True)
class _Exchange:
    """The round now under way, as one member (or onlooker) sees it."""

    shape: RoundShape
    key: Key
    #: our index among the members; None: we look on
    index: int | None
    started_at: float
    #: when computing for it began: with it, or with overlap when our message of the round before was due
    computing_since: float
    #: parts we reduce, by part number
    reducing: dict[int, _Part]
    #: when the trainer was told to hand over
    due_at: float | None = None
    #: when we sent our contribution or a weight-0 message in its stead
    sent_at: float | None = None
    #: how long we left a late trainer, before we sent a message of weight 0 in its stead
    stood_in_after: float | None = None
    #: what we said of ourselves with it
    row: Row | None = None
    #: part number -> reply that we hold
    replies: dict[int, Reply] = field(default_factory=dict)
    first_reply_at: float | None = None
    complete_at: float | None = None

    @property
    def others_awaited(self) -> frozenset[bytes]:
        """Peer ids of the other members that are waited for."""
        members = self.shape.members
        return frozenset(members[i].peer_id for i in self.shape.awaited if i != self.index)

    def half_heard(self, part: _Part) -> bool:
        """Whether a part has the messages of half of the others, newcomers apart, or of all but one awaited."""
        awaited, newcomers = len(self.others_awaited), self.newcomers
        others = [m.peer_id for i, m in enumerate(self.shape.members) if i != self.index and m.peer_id not in newcomers]
        wanted = min(math.ceil(len(others) / 2), max(1, awaited - 1))
        return awaited > 0 and len(part.received.keys() & (self.others_awaited | set(others))) >= wanted

    @property
    def newcomers(self) -> frozenset[bytes]:
        """Peer ids of the other members that no seal has included yet."""
        return frozenset(m.peer_id for i, m in enumerate(self.shape.members) if m.is_newcomer and i != self.index)


@dataclass(slots=True)
class _Exchanges:
    """The round under way and what is kept for the rounds beside it.

    The round under way is the one after the head and has the shape that the head gives it; there is none once the run
    is over. We reduce those of its parts whose reducer we are, and no other. A part has messages of members only, and
    its reply is held only after it is closed. Replies are held only once we have sent, and the round is complete when
    there is one for each part. Early messages are for the coming round and for parts that we reduce in it. What was
    sent, and who was missed, is kept for the round of the head and later ones.
    """

    current: _Exchange | None = None
    #: the round after the one under way, unless a solo seal changes it
    coming: RoundShape | None = None
    #: (part, peer id) -> message for the coming round
    early: dict[tuple[int, bytes], events.ContributionReceived] = field(default_factory=dict)
    #: rounds that the trainer's payloads were sent for, and the shape they were cut for; a fork may come back to it
    sent: dict[Key, RoundShape] = field(default_factory=dict)
    #: who may yet come late, in the round under way and the one before
    missed: dict[tuple[Key, int], _Missed] = field(default_factory=dict)
    #: our last message in the trainer's stead came too late to be sealed
    stood_in_late: bool = False


@dataclass(slots=True)
class _Following:
    """Where the chains of others stand, and what we fetch of them.

    Every seal that waits for replies continues our head, and each sealer has one at most. Every peer has one tip, its
    latest. We fetch rounds from one donor at a time and a snapshot from one donor at a time, and never from ourselves.
    """

    #: peer id -> its tip, the one heard last at the end
    tips: dict[bytes, events.TipHeard] = field(default_factory=dict)
    #: id of a tip that we want -> when we first did
    wanted_since: dict[bytes, float] = field(default_factory=dict)
    #: sealer -> its seal on our head, while we lack a reply that it names
    waiting: dict[bytes, _Waiting] = field(default_factory=dict)
    #: the donor of the rounds that are being fetched, and until when it may answer
    fetching: tuple[bytes, float] | None = None
    #: donors that failed us, until when to leave them alone
    shunned: dict[bytes, float] = field(default_factory=dict)
    #: the donor of the snapshot that is being fetched
    resyncing: bytes | None = None
    #: after a late timer: do not seal before this time
    hold_seal_until: float = -math.inf


@dataclass(slots=True)
class _Group:
    """Whom we train with, and who asks to.

    The members are those of the round under way and of the one after it, as the head says. Signs of life and goodbyes
    are kept for members alone, and no sign of life of our own. At most `JOINS_PENDING_MAX` joins are pending, none of
    them ours, and each is forgotten after `JOIN_ROUNDS` rounds and one more for each member.
    """

    members: frozenset[bytes] = frozenset()
    #: peer id -> when it last gave a sign of life
    heard: dict[bytes, float] = field(default_factory=dict)
    #: members that said goodbye and were not heard since
    left: set[bytes] = field(default_factory=set)
    #: peer id -> its row and our round when it last asked to be admitted; who asked first comes first
    joins: dict[bytes, tuple[Row, int]] = field(default_factory=dict)
    #: peer id -> how often it was admitted since a seal last included it; the one admitted last at the end
    admitted: dict[bytes, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Roots:
    """Hashes of replicas.

    At most four of our own are kept, the newest. Votes are kept of members alone.
    """

    #: round -> the root that our trainer computed
    own: dict[int, bytes] = field(default_factory=dict)
    #: peer id -> the round and the root that it said with its last message, for the seal
    votes: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)


class RoundMachine:
    """Decides for one peer; see the module docstring.

    Args:
        me: our peer id, in bytes.
        rules: from the manifest.
        state: where our chain stands.
        sign: signs a seal id.
        row: what we say of ourselves when we join (throughput, uplink).
        founder: we bootstrap: the first seal is ours to make at once.
    """

    def __init__(
        self,
        me: bytes,
        rules: RoundRules,
        state: ChainState,
        sign: Callable[[bytes], bytes],
        row: Row,
        *,
        founder: bool = False,
    ) -> None:
        self.me = me
        self.rules = rules
        self.head = state
        self.row = row
        self._sign = sign
        self._founder = founder
        #: the chain before the head, where that can be gone back to
        self._before: ChainState | None = None
        self._exchanges = _Exchanges()
        self._following = _Following()
        self._group = _Group()
        self._roots = _Roots()
        self._deadlines = Deadlines(rules.grace_seconds, rules.reply_timeout_seconds, learns=not rules.fixed_pace)
        self._effects: list[events.Effect] = []
        self.wake_at: float | None = None
        #: the last events, and what they led to
        self.decisions = Decisions()

    # ---- what others may read ---------------------------------------------------------------------------------

    @property
    def is_member(self) -> bool:
        """Whether we are a member of the round under way."""
        return self._exchanges.current is not None and self._exchanges.current.index is not None

    @property
    def exchange_key(self) -> Key | None:
        """Key of the round under way."""
        return self._exchanges.current.key if self._exchanges.current else None

    @property
    def shape(self) -> RoundShape | None:
        """Shape of the round under way."""
        return self._exchanges.current.shape if self._exchanges.current else None

    @property
    def newest_root(self) -> tuple[int, bytes]:
        """Round and hash of the newest root that our trainer computed; (0, b"") before the first."""
        newest = max(self._roots.own, default=0)
        return newest, self._roots.own.get(newest, b"")

    def awaits(self, key: Key) -> bool:
        """Whether our trainer's contribution to this round can still be sent."""
        exchange = self._exchanges.current
        return exchange is not None and exchange.key == key and exchange.index is not None and exchange.sent_at is None

    def known_state(self, identifier: bytes) -> ChainState | None:
        """The chain state at our head, or at its parent where that can still be gone back to."""
        if identifier == self.head.id:
            return self.head
        return self._before if self._before is not None and identifier == self._before.id else None

    def held_reply(self, key: Key, part: int) -> Reply | None:
        """The reply that we hold for a part of the round under way."""
        if self._exchanges.current is None or self._exchanges.current.key != key:
            return None
        return self._exchanges.current.replies.get(part)

    def refusal(self, key: Key, part: int, peer_id: bytes) -> str | None:
        """Why a message for `part` from `peer_id` would be refused, or None (rule 5)."""
        if key.round <= self.head.round:
            return "late"
        if key.round > self.head.round + 2:
            return "too early"
        if key.round == self.head.round + 2:
            return self._refusal_early(key, part, peer_id)
        exchange = self._exchanges.current
        if exchange is None or key != exchange.key:
            return "foreign"
        if exchange.shape.index(peer_id) is None:
            return "not a member"
        reducing = exchange.reducing.get(part)
        if reducing is None:
            return "not the reducer"
        if peer_id in reducing.received:
            return "twice"
        return "late" if reducing.closed else None

    def _refusal_early(self, key: Key, part: int, peer_id: bytes) -> str | None:
        coming = self._exchanges.coming
        if coming is None or key.base != coming.base:
            return "foreign"
        if coming.index(peer_id) is None:
            return "not a member"
        if part >= len(coming.parts) or coming.members[coming.parts[part].reducer].peer_id != self.me:
            return "not the reducer"
        return "twice" if (part, peer_id) in self._exchanges.early else None

    def check_invariants(self) -> None:
        """Check, between two events, what the docs of the fields' groups say. For tests and the simulator.

        Raises:
            AssertionError: names what does not hold.
        """
        for what, holds in [
            (
                "the state before the head is the head's parent",
                self._before is None or self.head.parent == self._before.id,
            ),
            *self._exchange_invariants(),
            *self._following_invariants(),
            *self._group_invariants(),
        ]:
            if not holds:
                raise AssertionError(f"it does not hold that {what}")

    def _exchange_invariants(self) -> Iterator[tuple[str, bool]]:
        kept, head = self._exchanges, self.head
        rounds = [key.round for key in kept.sent] + [key.round for key, _ in kept.missed]
        yield "what was sent or missed is of the head's round or later", all(r >= head.round for r in rounds)
        coming = kept.coming
        yield "there are early messages for the coming round alone", not kept.early or coming is not None
        if coming is not None:
            ours = {n for n, p in enumerate(coming.parts) if coming.members[p.reducer].peer_id == self.me}
            key = Key(coming.round, coming.base)
            for (part, peer), message in kept.early.items():
                yield "an early message is for the coming round", message.key == key
                yield "an early message is a member's", coming.index(peer) is not None
                yield "an early message is for a part that we shall reduce", part in ours
        exchange = kept.current
        if exchange is None:
            return
        shape, replies = exchange.shape, exchange.replies
        yield "the round under way is the one after the head", shape.round == head.round + 1
        yield "its shape is the head's", shape == chain.shape_of(head, self.rules.chunks)
        yield "its key is its shape's", exchange.key == Key(shape.round, shape.base)
        yield "our index in it is its shape's", exchange.index == shape.index(self.me)
        mine = {number for number, spec in enumerate(shape.parts) if spec.reducer == exchange.index}
        yield "we reduce the parts whose reducer we are", exchange.reducing.keys() == mine
        yield "replies are of its parts", all(0 <= number < len(shape.parts) for number in replies)
        yield "replies are held only once we have sent", not replies or exchange.sent_at is not None
        yield (
            "it is complete with a reply for each part",
            (exchange.complete_at is not None) == (bool(replies) and len(replies) == len(shape.parts)),
        )
        members = {member.peer_id for member in shape.members}
        for number, reduced in exchange.reducing.items():
            yield "messages are of members", reduced.received.keys() <= members
            yield "a part that we reduce is closed before its reply is held", reduced.closed or number not in replies

    def _following_invariants(self) -> Iterator[tuple[str, bool]]:
        kept = self._following
        for sealer, waiting in kept.waiting.items():
            yield "a seal that waits continues our head", waiting.heard.seal.parent == self.head.id
            yield "a seal that waits is filed under its sealer", waiting.heard.seal.sealer == sealer
        yield "tips are filed under their peers", all(tip.peer_id == peer for peer, tip in kept.tips.items())
        yield "rounds are not fetched from ourselves", kept.fetching is None or kept.fetching[0] != self.me
        yield "no snapshot is fetched from ourselves", kept.resyncing != self.me

    def _group_invariants(self) -> Iterator[tuple[str, bool]]:
        kept, head = self._group, self.head
        yield "the group is what the head says", kept.members == {m.peer_id for m in head.now + head.following}
        yield "signs of life are of other members", kept.heard.keys() <= kept.members - {self.me}
        yield "goodbyes are of members", kept.left <= kept.members
        yield "pending joins are bounded", len(kept.joins) <= JOINS_PENDING_MAX
        yield "no pending join is ours", self.me not in kept.joins
        oldest = head.round - JOIN_ROUNDS - len(kept.members)
        yield "pending joins are fresh", all(round > oldest for _, round in kept.joins.values())
        yield "remembered admissions are bounded", len(kept.admitted) <= JOINS_PENDING_MAX
        yield "roots are the four newest", len(self._roots.own) <= 4
        yield "votes on roots are of members", self._roots.votes.keys() <= kept.members

    # ---- the one way in ---------------------------------------------------------------------------------------

    def start(self, now: float) -> list[events.Effect]:
        """Begin at the chain state given to the constructor."""
        self.decisions.hear(None, now)
        self._begin_round(now)
        return self._settle_effects(now)

    def handle(self, event: events.Event, now: float) -> list[events.Effect]:
        """Take one event at monotonic time `now` (seconds); returns what to do, in order."""
        self.decisions.hear(event, now)
        match event:
            case events.ContributionReady():
                self._on_ready(event, now)
            case events.ContributionReceived():
                self._hear(event.peer_id, now)
                self._on_contribution(event, now)
            case events.CameLate():
                self._hear(event.peer_id, now)
                self._on_late(event, now)
            case events.ReplyHeld():
                self._on_reply(event, now)
            case events.SealHeard():
                self._hear(event.source, now)
                self._on_seal(event, now)
            case events.TipHeard():
                self._hear(event.peer_id, now)
                self._note_tip(event)
            case events.PeerLeft():
                if event.peer_id in self._group.members:
                    self._group.left.add(event.peer_id)
                self._following.tips.pop(event.peer_id, None)
                self._group.joins.pop(event.peer_id, None)
            case events.JoinReceived():
                self._hear(event.peer_id, now)
                self._on_join(event)
            case events.RoundsFetched():
                self._hear(event.donor, now)
                if self._following.fetching is not None and self._following.fetching[0] == event.donor:
                    self._following.fetching = None
                self._on_rounds(event, now)
            case events.FetchFailed():
                if self._following.fetching is not None and self._following.fetching[0] == event.donor:
                    self._following.fetching = None
                elif self._following.resyncing == event.donor:
                    self._following.resyncing = None
                self._shun(event.donor, now + self.rules.seal_timeout_seconds)
            case events.Synced():
                self._on_synced(event, now)
            case events.RootComputed():
                self._roots.own[event.round] = event.root
                for old in sorted(self._roots.own)[:-4]:
                    del self._roots.own[old]
            case events.Tick():
                if event.late:
                    # Rule 12: we may have slept through seals; ask before deciding anything.
                    self._following.hold_seal_until = now + self.rules.seal_timeout_seconds
                    best = min(self._following.tips.values(), key=_merit, default=None)
                    if best is not None:
                        self._ask(best.peer_id, now)
            case _:
                assert_never(event)
        return self._settle_effects(now)

    # ---- events -----------------------------------------------------------------------------------------------

    def _hear(self, peer_id: bytes, now: float) -> None:
        if peer_id != self.me and peer_id in self._group.members:
            self._group.heard[peer_id] = now
            self._group.left.discard(peer_id)

    def _on_join(self, event: events.JoinReceived) -> None:
        """Keep a peer's place among those who ask; where too many do, it is drawn by lot each round who may stay."""
        joins = self._group.joins
        joins[event.peer_id] = (event.row, self.head.round)
        if len(joins) > JOINS_PENDING_MAX:
            del joins[max(joins, key=lambda peer: hashlib.sha256(self.head.id + peer).digest())]

    def _note_tip(self, tip: events.TipHeard) -> None:
        self._following.tips.pop(tip.peer_id, None)
        self._following.tips[tip.peer_id] = tip
        if len(self._following.tips) > len(self._group.members) + STRANGERS_MAX:
            # The one that has been silent for longest.
            del self._following.tips[next(peer for peer in self._following.tips if peer not in self._group.members)]

    def _shun(self, donor: bytes, until: float) -> None:
        """Leave a donor alone for a while, and look for what it had elsewhere."""
        self._following.shunned[donor] = until
        self._following.tips.pop(donor, None)
        self._following.waiting = {s: w for s, w in self._following.waiting.items() if w.heard.source != donor}

    def _on_ready(self, event: events.ContributionReady, now: float) -> None:
        self.row = event.row
        exchange = self._exchanges.current
        if exchange is None or not self.awaits(event.key) or len(event.payloads) != len(exchange.shape.parts):
            return
        self._exchanges.sent[exchange.key] = exchange.shape
        self._send(exchange, event.row, event.payloads, now)

    def _send(self, exchange: _Exchange, row: Row, payloads: tuple[bytes, ...], now: float) -> None:
        """Give every reducer its message; ours to ourselves without a wire."""
        exchange.sent_at, exchange.row = now, row
        if not exchange.others_awaited:
            for reducing in exchange.reducing.values():
                reducing.half_at = now
        root_round, root = self.newest_root
        for number, part in enumerate(exchange.shape.parts):
            reducer = exchange.shape.members[part.reducer].peer_id
            if reducer == self.me:
                mine = events.ContributionReceived(
                    exchange.key, number, self.me, row, root_round, root, payloads[number]
                )
                self._on_contribution(mine, now)
            else:
                self._effects.append(events.SendContribution(exchange.key, number, reducer, row, payloads[number]))
        self._roots.votes[self.me] = (root_round, root)

    def _on_contribution(self, event: events.ContributionReceived, now: float) -> None:
        if self.refusal(event.key, event.part, event.peer_id) is not None:
            return
        self._roots.votes[event.peer_id] = (event.root_round, event.root)
        exchange = self._exchanges.current
        if exchange is None or event.key != exchange.key:
            self._exchanges.early[(event.part, event.peer_id)] = event
            return
        part = exchange.reducing[event.part]
        part.received[event.peer_id] = event
        if event.peer_id in exchange.newcomers:
            self._deadlines.patience.observe(came=True)
        if part.half_at is not None:
            if event.peer_id != self.me:
                self._deadlines.contributions.observe(event.peer_id, now - self._grace_from(exchange, part.half_at))
        elif exchange.half_heard(part):
            part.half_at = now
            self._deadlines.observe_round(self._grace_from(exchange, now) - exchange.computing_since)
            for peer in part.received.keys() - {self.me}:
                self._deadlines.contributions.observe(peer, 0.0)

    def _on_late(self, event: events.CameLate, now: float) -> None:
        """Who comes after the deadline still says how long the deadline should have been."""
        missed = self._exchanges.missed.get((event.key, event.part))
        if missed is not None and event.peer_id in missed.members:
            missed.members.remove(event.peer_id)
            if event.peer_id in missed.hoped_for:
                self._deadlines.patience.observe(came=True)
            self._deadlines.contributions.observe(event.peer_id, now - missed.since)

    def _on_reply(self, event: events.ReplyHeld, now: float) -> None:
        exchange = self._exchanges.current
        if exchange is None or exchange.key != event.key or event.part in exchange.replies:
            return
        if not 0 <= event.part < len(exchange.shape.parts):
            return
        mine = exchange.reducing.get(event.part)
        if exchange.sent_at is None or (mine is not None and not mine.closed):
            # Not of this exchange: a fork gave the round another shape while the reply was on its way.
            return
        exchange.replies[event.part] = event.reply
        if exchange.first_reply_at is None:
            exchange.first_reply_at = now
        if mine is None:
            reducer = exchange.shape.members[exchange.shape.parts[event.part].reducer].peer_id
            self._deadlines.replies.observe(reducer, now - exchange.first_reply_at)
        if len(exchange.replies) == len(exchange.shape.parts):
            exchange.complete_at = now

    def _on_seal(self, event: events.SealHeard, now: float) -> None:
        seal = event.seal
        if seal.parent == self.head.id and self._idle_solo(seal):
            return
        self._note_tip(events.TipHeard(event.source, seal.round, event.id, seal.total))
        if seal.parent != self.head.id:
            return
        try:
            chain.extend(self.head, event.id, seal, self.rules.chunks)
        except SealError as error:
            self._effects.append(events.Note("refused", f"refused a seal of round {seal.round}: {error}"))
            self._following.tips.pop(event.source, None)
            return
        known = self._following.waiting.get(seal.sealer)
        if known is not None:
            old = known.heard
            if not chain.better(seal.total, event.id, old.seal.total, old.id):
                return
        elif (
            seal.sealer not in self._group.members
            and len(self._following.waiting) >= len(self._group.members) + STRANGERS_MAX
        ):
            return
        self._following.waiting[seal.sealer] = _Waiting(event, now)

    def _idle_solo(self, first: Seal, total: int | None = None) -> bool:
        """Whether this takes our group apart for a chain with no more work in it; a better one we follow (rule 9)."""
        total = first.total if total is None else total
        return first.solo and self.is_member and first.sealer != self.me and total <= self.head.total

    def _follows(self, total: int, identifier: bytes, *, continues: bool, first: Seal | None = None) -> bool:
        """Fork choice (rule 9): whether to go over to a chain that ends like this.

        Args:
            continues: it has our head; `first` is its seal after that, where it is known.
        """
        if not continues:
            return chain.better(total, identifier, self.head.total, self.head.id)
        return total >= self.head.total and (first is None or not self._idle_solo(first, total))

    def _may_follow(self, round: int, total: int, identifier: bytes) -> bool:
        """Fork choice where the end alone is known: a longer chain may continue ours."""
        longer = round > self.head.round
        return any(self._follows(total, identifier, continues=c) for c in ((False, True) if longer else (False,)))

    def worth_changing_to(self, restore: Restore, state: ChainState) -> bool:
        """Whether to go over to a chain that was fetched whole and stands at `state` (rule 9)."""
        if state.id == self.head.id:
            return True  # our own, which our replica fell out of
        ids = [restore.chain.id, *(sealed.id for sealed in restore.rounds)]
        if self.head.id in ids:
            first = restore.rounds[ids.index(self.head.id)].seal
            return self._follows(state.total, state.id, continues=True, first=first)
        if restore.common:
            return self._follows(state.total, state.id, continues=False)
        # It starts behind our head, or off our chain: which of the two is not known.
        return self._may_follow(state.round, state.total, state.id)

    def _on_rounds(self, event: events.RoundsFetched, now: float) -> None:
        if self._following.resyncing is not None:
            return
        tip = self._following.tips.get(event.donor)
        if event.ancestor is None:
            if tip is not None and self._wants(tip):
                self._want_snapshot(event.donor, "we are far behind its chain, or off it")
            return
        if not event.rounds:
            self._following.tips.pop(event.donor, None)
            return
        rounds, ancestor = event.rounds, event.ancestor
        for number, sealed in enumerate(rounds):
            if sealed.id == self.head.id:
                rounds, ancestor = rounds[number + 1 :], sealed.id
                break
        base = self.known_state(ancestor)
        if base is None or not rounds:
            # Our chain moved on meanwhile; if the donor's is still the better one, its tip says so.
            return
        states: list[tuple[ChainState, RoundShape]] = []
        state = base
        for sealed in rounds:
            shape = chain.shape_of(state, self.rules.chunks)
            try:
                state = chain.extend(state, sealed.id, sealed.seal, self.rules.chunks)
            except SealError as error:
                self._effects.append(
                    events.Note("refused", f"refused a fetched seal of round {sealed.seal.round}: {error}")
                )
                self._shun(event.donor, now + FETCH_TIMEOUT_SECONDS)
                return
            states.append((state, shape))
        if not self._follows(state.total, state.id, continues=base is self.head, first=rounds[0].seal):
            if tip is not None and tip.round > state.round and self._wants(tip):
                # A long fork comes in pieces, and the first piece alone may be worth less than what we have.
                self._want_snapshot(event.donor, "its better chain does not fit into one answer")
            else:
                self._shun(event.donor, now + self.rules.seal_timeout_seconds)
            return
        if base is not self.head:
            text = f"fork at round {base.round + 1}: following the chain with total {state.total} instead of ours"
            self._effects.append(events.Note("fork", text))
            self._effects.append(events.Rollback(base))
            self.head = base
            self._roots.own = {round: root for round, root in self._roots.own.items() if round <= base.round}
        for (state, shape), sealed in zip(states, rounds, strict=True):
            self._adopt(sealed, state, shape)
        self._begin_round(now)

    def _on_synced(self, event: events.Synced, now: float) -> None:
        self._following.resyncing = None
        self.head = event.state
        self._before = None
        # They were of the replica that was given up; the trainer tells those of the new one.
        self._roots.own.clear()
        exchange = self._exchanges.current
        self._begin_round(now)
        if exchange is self._exchanges.current and exchange is not None and exchange.sent_at is None:
            # The same round as before, but the trainer began anew.
            self._start_training(exchange, now)

    # ---- rounds -----------------------------------------------------------------------------------------------

    def _begin_round(self, now: float) -> None:
        """Open the round after the head, unless it is under way already with the same shape."""
        chunks = self.rules.chunks
        shape, self._exchanges.coming = chain.shape_of(self.head, chunks), chain.coming_shape(self.head, chunks)
        key = Key(shape.round, shape.base)
        self._remember_only(frozenset(m.peer_id for m in self.head.now + self.head.following))
        early, self._exchanges.early = self._exchanges.early, {}
        if (
            self._exchanges.current is not None
            and self._exchanges.current.key == key
            and self._exchanges.current.shape == shape
        ):
            self._exchanges.early = {k: m for k, m in early.items() if m.key.base == self._exchanges.coming.base}
            return
        if self.rules.last_round and self.head.round >= self.rules.last_round:
            self._exchanges.current = None
            return
        index = shape.index(self.me)
        mine = {n: _Part() for n, part in enumerate(shape.parts) if part.reducer == index}
        self._exchanges.current = _Exchange(shape, key, index, now, self._computing_since(shape, now), mine)
        for message in early.values():
            self._on_contribution(message, now)
        if self.me not in {m.peer_id for m in self.head.following}:
            self._join(shape)
        if index is not None:
            self._start_training(self._exchanges.current, now)

    def _computing_since(self, shape: RoundShape, now: float) -> float:
        """When computing for the round that begins now began.

        When our last message was due, not when it left: who was late once is in step again with the next. And who
        computes less, since seals left it out, is so much earlier from then on.
        """
        before = self._exchanges.current
        if not self.rules.overlap or before is None or before.due_at is None or before.key.round != shape.round - 1:
            return now
        return min(before.due_at, now)

    def _remember_only(self, group: frozenset[bytes]) -> None:
        """Drop what was kept for peers and rounds that are of no more use."""
        head = self.head
        self._group.members = group
        self._group.heard = {p: at for p, at in self._group.heard.items() if p in group}
        self._group.left &= group
        self._roots.votes = {p: vote for p, vote in self._roots.votes.items() if p in group}
        self._following.waiting = {s: w for s, w in self._following.waiting.items() if w.heard.seal.parent == head.id}
        self._group.joins = {
            p: j for p, j in self._group.joins.items() if head.round - j[1] < JOIN_ROUNDS + len(group) and p != self.me
        }
        self._exchanges.sent = {key: shape for key, shape in self._exchanges.sent.items() if key.round >= head.round}
        self._exchanges.missed = {
            of: missed for of, missed in self._exchanges.missed.items() if of[0].round >= head.round
        }
        proven = {m.peer_id for m in head.now + head.following if not m.is_newcomer}
        self._deadlines.keep_only(proven - {self.me})

    def _start_training(self, exchange: _Exchange, now: float) -> None:
        if exchange.index is not None:
            length = self._computing_seconds(exchange)
            seconds = self._deadlines.computing_seconds(length, last_chance=self._last_chance())
            exchange.due_at = max(exchange.computing_since + seconds, now)
            start = events.StartRound(exchange.key, exchange.shape, exchange.index, exchange.due_at - now, length)
            self._effects.append(start)

    def _computing_seconds(self, exchange: _Exchange) -> float:
        rules = self.rules
        return chain.length_seconds(exchange.shape, rules.target_batch, rules.min_seconds, rules.max_seconds)

    def _join(self, shape: RoundShape) -> None:
        """Ask the peers that may seal this round to admit us, again each round until one does."""
        for place in shape.sealer_order[:2]:
            sealer = shape.members[place].peer_id
            if sealer != self.me:
                self._effects.append(events.SendJoin(sealer))

    def _adopt(self, sealed: SealedRound, state: ChainState, shape: RoundShape) -> None:
        """Move the head over one sealed round that we hold whole."""
        contributed = self._exchanges.sent.get(Key(shape.round, shape.base)) == shape
        self._before = self.head
        self.head = state
        self._note_admissions(sealed.seal, shape)
        self._effects.append(events.Apply(sealed, state, shape, shape.index(self.me), contributed))
        self._check_root(sealed.seal)
        exchange = self._exchanges.current
        if exchange is not None and exchange.sent_at is not None and exchange.shape == shape and not sealed.seal.solo:
            self._learn_from(sealed.seal, exchange)

    def _note_admissions(self, seal: Seal, shape: RoundShape) -> None:
        """Remember who was admitted and has not answered since."""
        admitted = self._group.admitted
        for index in chain.bits(seal.included, len(shape.members)):
            admitted.pop(shape.members[index].peer_id, None)
        for join in seal.joins:
            self._group.joins.pop(join.peer_id, None)
            admitted[join.peer_id] = admitted.pop(join.peer_id, 0) + 1
        while len(admitted) > JOINS_PENDING_MAX:
            del admitted[next(iter(admitted))]

    def _admissible(self, state: ChainState, *, solo: bool) -> tuple[Join, ...]:
        """Whom to admit by the seal that leads to `state`: who asked first, in every other round of those that have
        answered whenever they were admitted, so that neither a flood nor bad luck keeps anybody out for ever."""
        members = state.following if solo else state.following + self.head.following
        listed = {m.peer_id for m in members} | {self.me}
        asking = [peer for peer in self._group.joins if peer not in listed]
        if state.round % 2:
            asking.sort(key=lambda peer: self._group.admitted.get(peer, 0))
        chosen = asking[: chain.room_for_newcomers(state.following)]
        return tuple(Join(peer, self._group.joins[peer][0]) for peer in sorted(chosen))

    def _learn_from(self, seal: Seal, exchange: _Exchange) -> None:
        """What a seal of the round under way says about our deadlines."""
        members = exchange.shape.members
        given_up = 2 * self._deadlines.reply_seconds
        for number, part in enumerate(exchange.shape.parts):
            if not seal.parts[number] and number not in exchange.replies and part.reducer != exchange.index:
                # Given up by the sealer, and by us: it may have been a moment late, or dead.
                self._deadlines.replies.observe(members[part.reducer].peer_id, given_up)
        included = chain.bits(seal.included, len(members))
        self._exchanges.stood_in_late = False
        if exchange.index is not None and members[exchange.index].is_newcomer:
            return  # it hurries, and is waited for less than the others
        if exchange.stood_in_after is not None:
            self._deadlines.stand_in.observe(exchange.index in included, exchange.stood_in_after)
            self._exchanges.stood_in_late = exchange.index not in included
        else:
            self._deadlines.stand_in.observe_ready()
            if included:
                self._deadlines.head_start.observe(exchange.index in included)

    def _check_root(self, seal: Seal) -> None:
        """Resync and say so when our root differs from the sealed one (rule 10)."""
        interval = self.rules.root_interval
        at = chain.root_round(seal.round, interval)
        if not seal.root or self._roots.own.get(at, seal.root) == seal.root:
            return
        holders = sorted(p for p, vote in self._roots.votes.items() if vote == (at, seal.root) and p != self.me)
        donor = next(iter(holders), seal.sealer)
        if donor != self.me:
            self._want_snapshot(donor, "our replica differs from the sealed root")

    # ---- what time and state make due -------------------------------------------------------------------------

    def _settle_effects(self, now: float) -> list[events.Effect]:
        """Do all that is due now, then say when to look again."""
        sealed = True
        while sealed:
            self.wake_at = None
            self._adopt_waiting(now)
            self._follow_better(now)
            self._close_parts(now)
            self._stand_in(now)
            sealed = self._seal_when_due(now)
        effects, self._effects = self._effects, []
        self.decisions.decide(effects)
        return effects

    def _wake(self, at: float) -> None:
        if self.wake_at is None or at < self.wake_at:
            self.wake_at = at

    def _adopt_waiting(self, now: float) -> None:
        """Adopt the best seal on our head whose replies we all hold."""
        exchange = self._exchanges.current
        held = exchange.replies if exchange is not None else {}
        ready = []
        for sealer, waiting in list(self._following.waiting.items()):
            named = [(n, digest) for n, digest in enumerate(waiting.heard.seal.parts) if digest]
            if not all(n in held and held[n].digest == digest for n, digest in named):
                continue
            included: frozenset[int] = frozenset().union(*(held[n].included for n, _ in named))
            if chain.bitmap(included, len(waiting.heard.seal.rows)) == waiting.heard.seal.included:
                ready.append(waiting.heard)
            else:
                self._effects.append(events.Note("refused", "refused a seal that includes others than its replies do"))
                del self._following.waiting[sealer]
        if not ready:
            return
        best = min(ready, key=lambda heard: (-heard.seal.total, heard.id))
        shape = chain.shape_of(self.head, self.rules.chunks)
        state = chain.extend(self.head, best.id, best.seal, self.rules.chunks)
        replies = tuple(held[n].data if digest else None for n, digest in enumerate(best.seal.parts))
        self._adopt(SealedRound(best.id, best.seal, best.signed, replies), state, shape)
        self._begin_round(now)

    def _wants(self, tip: events.TipHeard) -> bool:
        """Whether what this tip names is better than our chain, or may continue it (rule 9)."""
        return self.known_state(tip.id) is None and self._may_follow(tip.round, tip.total, tip.id)

    def _follow_better(self, now: float) -> None:
        """Ask for what a better tip has and we lack (rule 9). Never adopts by itself."""
        if self._following.resyncing is not None:
            return
        if self._following.fetching is not None:
            donor, deadline = self._following.fetching
            if now < deadline:
                self._wake(deadline)
                return
            self._following.fetching = None
            self._shun(donor, now + self.rules.seal_timeout_seconds)
        self._following.shunned = {donor: until for donor, until in self._following.shunned.items() if until > now}
        coming = {w.heard.id: self._replies_expected_until(w) for w in self._following.waiting.values()}
        wanted = [tip for tip in sorted(self._following.tips.values(), key=_merit) if self._wants(tip)]
        self._following.wanted_since = {tip.id: self._following.wanted_since.get(tip.id, now) for tip in wanted}
        if self._exchanges.current is not None and self._exchanges.current.sent_at is not None:
            # What others say of their tip often overtakes the seal, in a large group by all its way down the tree.
            patience = self.rules.seal_timeout_seconds / (2 if relay.relayed(self._group.members) else 4)
            for tip in wanted:
                if tip.round == self.head.round + 1:
                    coming.setdefault(tip.id, self._following.wanted_since[tip.id] + patience)
        for tip in wanted:
            due = max(self._following.shunned.get(tip.peer_id, now), coming.get(tip.id, now))
            if due <= now:
                self._ask(tip.peer_id, now)
                return
            self._wake(due)

    def _replies_expected_until(self, waiting: _Waiting) -> float:
        """A seal often overtakes the last reply that it names: until when to wait before asking for the whole round."""
        exchange = self._exchanges.current
        if exchange is None or exchange.sent_at is None:
            return -math.inf
        held = exchange.replies
        if any(n in held and digest and held[n].digest != digest for n, digest in enumerate(waiting.heard.seal.parts)):
            return -math.inf
        return waiting.at + self.rules.seal_timeout_seconds / 4

    def _ask(self, peer: bytes, now: float) -> None:
        if self._following.fetching is None and self._following.resyncing is None:
            self._following.fetching = (peer, now + FETCH_TIMEOUT_SECONDS)
            self._wake(self._following.fetching[1])
            locator = [self.head.id] + ([self._before.id] if self._before is not None else [])
            self._effects.append(events.FetchRounds(peer, locator))

    def _want_snapshot(self, donor: bytes, why: str) -> None:
        if self._following.resyncing is None:
            self._following.resyncing = donor
            self._effects.append(events.Resync(donor, why))

    def _close_parts(self, now: float) -> None:
        """Freeze the parts whose deadline has come (rule 5)."""
        exchange = self._exchanges.current
        if exchange is None or exchange.index is None or exchange.sent_at is None:
            return
        newcomers = exchange.newcomers
        members = {m.peer_id for m in exchange.shape.members} - newcomers
        for number, part in exchange.reducing.items():
            if part.closed:
                continue
            missing = members - part.received.keys() - self._group.left
            hoped_for = newcomers - part.received.keys() - self._group.left
            latest = exchange.sent_at + self._deadlines.half_seconds(self.rules.round_max_seconds)
            started = latest if part.half_at is None else min(self._grace_from(exchange, part.half_at), latest)
            grace = self._deadlines.wait_seconds(missing) if missing else self._deadlines.newcomer_seconds
            due = started + grace
            if self.rules.fixed_pace:
                due = latest + self._deadlines.grace_seconds
            if (missing or hoped_for) and now < due:
                self._wake(due)
                continue
            if part.half_at is None and missing and not part.given_up:
                part.given_up = True
                self._deadlines.observe_silence()
            if not missing or len(part.received) > 1:
                # A reply to ourselves alone is worth nothing where others may yet come, before a solo seal is due.
                if hoped_for and not missing:
                    self._deadlines.patience.observe(came=False)
                self._close(exchange, number, part)

    def _close(self, exchange: _Exchange, number: int, part: _Part) -> None:
        part.closed = True
        place = {m.peer_id: i for i, m in enumerate(exchange.shape.members)}
        messages = sorted((place[p], m.row.weight, m.payload) for p, m in part.received.items())
        spec = exchange.shape.parts[number]
        self._effects.append(events.Reduce(exchange.key, number, spec.start, spec.end, len(place), tuple(messages)))
        missing = set(place) - part.received.keys()
        if missing and part.half_at is not None:
            since = self._grace_from(exchange, part.half_at)
            hoped_for = exchange.newcomers & missing
            self._exchanges.missed[exchange.key, number] = _Missed(since, missing, hoped_for)

    def _grace_from(self, exchange: _Exchange, half_at: float) -> float:
        """When the grace begins: half of the others were heard, and the time to compute is over.

        Messages of weight 0 may come as soon as a round begins; they must not start the clock for those who compute.
        """
        return max(half_at, exchange.computing_since + self._computing_seconds(exchange))

    def _stand_in(self, now: float) -> None:
        """Send a weight-0 message when our trainer is slower than the group, so that we stay a member (rule 3)."""
        exchange = self._exchanges.current
        if exchange is None or exchange.index is None or exchange.sent_at is not None or not exchange.shape.parts:
            return
        halves = [p.half_at for p in exchange.reducing.values() if p.half_at is not None]
        length = self._computing_seconds(exchange)
        ends = exchange.computing_since + length
        # Before the others give up on half of the group.
        due = max(ends, exchange.started_at) + self._deadlines.half_seconds(2 * self.rules.round_max_seconds) / 2
        wait = self._deadlines.stand_in_seconds
        if not self.rules.fixed_pace:
            # Who reduces sees the others arrive; who does not can but assume that they keep the pace.
            seen = self._grace_from(exchange, min(halves, default=-math.inf))
            if self._last_chance():
                # Not at once: the trainer may have something in hand.
                due, wait = exchange.started_at + length / 2, 0.0
            elif self._exchanges.stood_in_late:
                # No waiting for a sign that the others see before we can answer it.
                due, wait = max(ends, exchange.started_at + length / 2), 0.0
            elif halves or not exchange.reducing:
                due = min(due, seen + wait)
        if len(exchange.shape.members) == 1 or now < due:
            if len(exchange.shape.members) > 1:
                self._wake(due)
            return
        exchange.stood_in_after = wait
        self._effects.append(events.StoodIn(exchange.key))
        empty = Row(0, self.row.sequences_per_kilosecond, self.row.uplink_kbit)
        self._send(exchange, empty, tuple(b"" for _ in exchange.shape.parts), now)
        self._close_parts(now)

    def _last_chance(self) -> bool:
        """Whether one more seal that leaves us out ends our membership, or we are a newcomer, not waited for."""
        exchange = self._exchanges.current
        if exchange is not None and exchange.index is not None and exchange.shape.members[exchange.index].is_newcomer:
            return True
        absent = next((m.absent for m in self.head.following if m.peer_id == self.me), 0)
        return absent == chain.ABSENCES_ALLOWED - 1

    # ---- sealing ----------------------------------------------------------------------------------------------

    def _seal_when_due(self, now: float) -> bool:
        """Seal what we hold when it is our place's turn (rule 6); True when we sealed."""
        exchange = self._exchanges.current
        if exchange is None or self._following.resyncing is not None:
            return False
        if now < self._following.hold_seal_until:
            self._wake(self._following.hold_seal_until)
            return False
        if not exchange.shape.members:
            if not self._founder or self.head.round:
                return False
            return self._seal(exchange, frozenset(), now, solo=True)
        if exchange.index is None:
            return self._solo_when_alone(exchange, frozenset(), now)
        if exchange.sent_at is None:
            return False
        included = frozenset[int]().union(*(reply.included for reply in exchange.replies.values()))
        if exchange.others_awaited and included <= {exchange.index}:
            if self._solo_when_alone(exchange, included, now):
                return True
            if included:
                return False
        if self._known_seal(now):
            return False
        place = exchange.shape.sealer_order.index(exchange.index)
        ahead = [exchange.shape.members[i].peer_id for i in exchange.shape.sealer_order[:place]]
        due = self._seal_from(exchange)
        due += self.rules.seal_timeout_seconds * sum(peer not in self._group.left for peer in ahead)
        if now < due:
            self._wake(due)
            return False
        if place:
            self._effects.append(events.Note("takeover", f"sealing round {exchange.key.round} in place {place}"))
        return self._seal(exchange, included, now, solo=False)

    def _seal_from(self, exchange: _Exchange) -> float:
        """When the first place would seal, by what we see: with every reply, or at the reply deadline."""
        if exchange.complete_at is not None:
            return exchange.complete_at
        assert exchange.sent_at is not None
        # By when any reducer has frozen its reply, whatever it has learned.
        latest = exchange.sent_at + self._deadlines.half_seconds(self.rules.round_max_seconds)
        latest += self.rules.grace_seconds
        latest += self.rules.reply_timeout_seconds
        if not self.rules.fixed_pace and exchange.first_reply_at is not None:
            latest = min(exchange.first_reply_at + self._deadlines.reply_seconds, latest)
        return latest

    def _known_seal(self, now: float) -> bool:
        """Whether the group has sealed this round already and we lack but replies of it."""
        known = [waiting.at for waiting in self._following.waiting.values() if not waiting.heard.seal.solo]
        until = max(known, default=-math.inf) + self.rules.seal_timeout_seconds
        if known and now < until:
            self._wake(until)
        return bool(known) and (now < until or self._following.fetching is not None)

    def _solo_when_alone(self, exchange: _Exchange, included: frozenset[int], now: float) -> bool:
        """A solo seal, once no member has been heard for `alone_after` (rule 6)."""
        if not self.head.round or self._following.fetching is not None:
            # Whom we fetch from is not heard, but there.
            return False
        members = exchange.shape.members
        if exchange.index is None:
            # A learner leaves it to those who are members soon, too.
            members += self.head.following
        others = {m.peer_id for m in members} - {self.me}
        # Silence is counted from when the round began, not from before.
        silent_since = max([exchange.started_at, *(at for peer, at in self._group.heard.items() if peer in others)])
        due = silent_since + self.rules.alone_after_seconds
        if exchange.index is None:
            # Members first: a learner waits for one more place.
            due += self.rules.seal_timeout_seconds
        elif others <= self._group.left:
            due = now
        else:
            # Who is heard, but by every deadline has sent nothing, cannot hold the chain for ever.
            due = min(due, self._seal_from(exchange) + self.rules.alone_after_seconds)
        if now < due:
            self._wake(due)
            return False
        unfinished = False
        for number, part in exchange.reducing.items():
            # Our own part closes first: sealing before would throw our own contribution away.
            if not part.closed:
                self._close(exchange, number, part)
            unfinished |= number not in exchange.replies
        return not unfinished and self._seal(exchange, included, now, solo=True)

    def _seal(self, exchange: _Exchange, included: frozenset[int], now: float, *, solo: bool) -> bool:
        shape = exchange.shape
        rows = {m.peer_id: m.row for m in shape.members}
        for part in exchange.reducing.values():
            rows.update({peer: message.row for peer, message in part.received.items()})
        if exchange.index is not None:
            rows[self.me] = exchange.row if exchange.row is not None else self.row
        replies: list[bytes | None] = []
        digests: list[bytes] = []
        for number in range(len(shape.parts)):
            reply = exchange.replies.get(number)
            replies.append(reply.data if reply else None)
            digests.append(reply.digest if reply else b"")
        seal = Seal(
            version=chain.SEAL_VERSION,
            run_id=self.head.run_id,
            round=shape.round,
            parent=self.head.id,
            total=self.head.total + len(included),
            sealer=self.me,
            solo=solo,
            included=chain.bitmap(included, len(shape.members)),
            parts=tuple(digests),
            rows=tuple(rows[m.peer_id] for m in shape.members),
            joins=(),
            root=self._majority_root(shape),
        )
        without = chain.extend(self.head, b"", seal, self.rules.chunks)
        seal = msgspec.structs.replace(seal, joins=self._admissible(without, solo=solo))
        signed: SignedSeal = chain.encode_seal(seal, self._sign)
        sealed = SealedRound(chain.seal_id(signed.body), seal, signed, tuple(replies))
        state = chain.extend(self.head, sealed.id, seal, self.rules.chunks)
        if solo and shape.members:
            self._effects.append(events.Note("solo", f"nobody heard: sealing round {shape.round} alone"))
        self._adopt(sealed, state, shape)
        self._effects.append(events.PublishSeal(sealed))
        self._begin_round(now)
        return True

    def _majority_root(self, shape: RoundShape) -> bytes:
        """The root most members sent for `chain.root_round`; tie: the smaller (rule 10)."""
        wanted = chain.root_round(shape.round, self.rules.root_interval)
        members = {m.peer_id for m in shape.members} | {self.me}
        votes = Counter(
            root for peer, (at, root) in self._roots.votes.items() if peer in members and at == wanted and root
        )
        best = min(votes, key=lambda root: (-votes[root], root), default=b"")
        # A root that few have computed yet is no verdict on the others.
        return best if 2 * votes[best] >= len(shape.members) else b""


def _merit(tip: events.TipHeard) -> tuple[int, bytes]:
    """Orders tips, the best first."""
    return -tip.total, tip.id
