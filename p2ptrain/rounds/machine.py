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
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, assert_never

import msgspec

from p2ptrain import chain
from p2ptrain.chain import ChainState, Join, RoundShape, Row, Seal, SealError, SignedSeal, forks, relay
from p2ptrain.chain.forks import Branch, Mark, Past
from p2ptrain.chain.sealed import Key, Reply, SealedRound
from p2ptrain.rounds import events
from p2ptrain.rounds.deadlines import Deadlines
from p2ptrain.rounds.decisions import Decisions

JOINS_PENDING_MAX = 256
JOIN_ROUNDS = 3  # and as many more as there are members: rounds after which a join that was not repeated is forgotten
STRANGERS_MAX = 64  # peers outside the group whose tips or seals we remember
FETCH_TIMEOUT_SECONDS = 20.0
LOCATOR_IDS = 9  # of the chain behind the head: far enough back for all that is remembered of it
KNOWN_MAX = 256  # former members whose word on forks still counts
VOICE_IDS = 4  # the last states that a peer said it stands at: the newest may be ahead of us
SHUNNED_MAX = 256
SHUN_DOUBLINGS = {False: 2, True: 8}  # by whether the donor is a stranger
SHUN_REMEMBERED_SECONDS = 120.0
INTRODUCER_SECONDS = 10.0  # that a newcomer leaves to those whose addresses a person gave it
STRANGERS_ASKED_MAX, NEWCOMER_ASKS_MAX = 1, 3  # strangers that rounds are fetched from at one time


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
    weight_cap_ratio: float
    """Of a member's throughput this many times the median counts."""


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


class _Fetch(NamedTuple):
    """Rounds that are being fetched."""

    since: float
    #: the donor was one when it was asked
    stranger: bool


class _Shunned(NamedTuple):
    """A donor that failed us."""

    until: float
    #: in a row
    times: int


@dataclass(frozen=True, slots=True)
class RefusedBranch:
    """The branch that fork choice refused last, for people."""

    donor: bytes
    round: int
    total: int
    why: str


@dataclass(slots=True)
class _Following:
    """Where the chains of others stand, and what we fetch of them.

    Every seal that waits for replies continues our head, and each sealer has one at most. Every peer has one tip, its
    latest. We fetch rounds from one peer that we know and from few strangers at a time, so that a stranger who never
    answers keeps nothing from us; a snapshot from one donor at a time; nothing from ourselves.
    """

    #: peer id -> its tip, the one heard last at the end
    tips: dict[bytes, events.TipHeard] = field(default_factory=dict)
    #: id of a tip that we want -> when we first did
    wanted_since: dict[bytes, float] = field(default_factory=dict)
    #: sealer -> its seal on our head, while we lack a reply that it names
    waiting: dict[bytes, _Waiting] = field(default_factory=dict)
    #: donors of the rounds that are being fetched
    fetching: dict[bytes, _Fetch] = field(default_factory=dict)
    #: donors that failed us, for longer each time, and those that did so lately
    shunned: dict[bytes, _Shunned] = field(default_factory=dict)
    #: what was refused last
    refused: RefusedBranch | None = None
    #: the donor of the snapshot that is being fetched
    resyncing: bytes | None = None
    #: after a late timer: do not seal before this time
    hold_seal_until: float = -math.inf


class _Voice(NamedTuple):
    """Where a peer says that it stands."""

    #: the ids it said last, the newest at the end
    ids: deque[bytes]
    at: float


@dataclass(slots=True)
class _Group:
    """Whom we train with, and who asks to.

    The members are those of the round under way and of the one after it, as the head says. Signs of life and goodbyes
    are kept for members alone, and no sign of life of our own. We know all members and the last `KNOWN_MAX` that were
    members before; what they say of where they stand counts in forks. At most `JOINS_PENDING_MAX` joins are pending,
    none of them ours, and each is forgotten after `JOIN_ROUNDS` rounds and one more for each member.
    """

    members: frozenset[bytes] = frozenset()
    #: peer id -> when it last gave a sign of life
    heard: dict[bytes, float] = field(default_factory=dict)
    #: members that said goodbye and were not heard since
    left: set[bytes] = field(default_factory=set)
    #: peer that is or was a member, without us, the latest at the end -> the last state of ours that it shared
    known: dict[bytes, Mark] = field(default_factory=dict)
    #: peer that we know, or whose address we were given -> where it says that it stands
    voices: dict[bytes, _Voice] = field(default_factory=dict)
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
        past: marks of our chain up to `state`, as far as they are known.
        company: members of the last state that we shared with another peer, before this start.
        introducers: peers whose addresses a person gave us.
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
        past: Sequence[Mark] = (),
        company: frozenset[bytes] = frozenset(),
        introducers: Collection[bytes] = (),
    ) -> None:
        self.me = me
        self.rules = rules
        self.head = state
        self.row = row
        self._sign = sign
        self._founder = founder
        self._introducers = frozenset(introducers) - {me}
        #: the chain before the head, where that can be gone back to
        self._before: ChainState | None = None
        #: the chain up to the head
        self._past = Past(past or [Mark.of(state)])
        #: members of the last state that we shared with another peer
        self.company = company or self._past.head.members
        #: nothing was adopted since the start: others may have gone on for long
        self._returning = True
        self._started_at = -math.inf
        self._exchanges = _Exchanges()
        self._following = _Following()
        self._group = _Group()
        self._roots = _Roots()
        self._deadlines = Deadlines(rules.grace_seconds, rules.reply_timeout_seconds, learns=not rules.fixed_pace)
        self._effects: list[events.Effect] = []
        self.wake_at: float | None = None
        #: the last events, and what they led to
        self.decisions = Decisions()
        for peer in sorted(self.company - {me}):
            self._group.known[peer] = self._past.head._replace(members=self.company)

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

    @property
    def refused_branch(self) -> RefusedBranch | None:
        """The branch that fork choice refused last."""
        return self._following.refused

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
            ("what is remembered of the chain ends with the head", self._past.head.id == self.head.id),
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
        yield "rounds are not fetched from ourselves", self.me not in kept.fetching
        strangers = sum(fetch.stranger for fetch in kept.fetching.values())
        yield "rounds are fetched from one known peer at a time", len(kept.fetching) - strangers <= 1
        yield "rounds are fetched from few strangers at a time", strangers <= NEWCOMER_ASKS_MAX
        yield "what is shunned is bounded", len(kept.shunned) <= SHUNNED_MAX
        yield "no snapshot is fetched from ourselves", kept.resyncing != self.me

    def _group_invariants(self) -> Iterator[tuple[str, bool]]:
        kept, head = self._group, self.head
        yield "the group is what the head says", kept.members == {m.peer_id for m in head.now + head.following}
        yield "signs of life are of other members", kept.heard.keys() <= kept.members - {self.me}
        yield "goodbyes are of members", kept.left <= kept.members
        yield "members are known", kept.members - {self.me} <= kept.known.keys()
        yield "the known are bounded", len(kept.known) <= KNOWN_MAX + len(kept.members)
        yield "voices are of known peers", kept.voices.keys() <= kept.known.keys() | self._introducers
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
        self._started_at = now
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
                self._note_tip(event, now)
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
                self._following.fetching.pop(event.donor, None)
                self._on_rounds(event, now)
            case events.FetchFailed():
                if self._following.fetching.pop(event.donor, None) is None and self._following.resyncing == event.donor:
                    self._following.resyncing = None
                self._shun(event.donor, now)
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
                    best = min(self._following.tips.values(), key=self._merit, default=None)
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

    def _note_tip(self, tip: events.TipHeard, now: float) -> None:
        self._following.tips.pop(tip.peer_id, None)
        self._following.tips[tip.peer_id] = tip
        if len(self._following.tips) > len(self._group.members) + STRANGERS_MAX:
            # The one that has been silent for longest.
            del self._following.tips[next(peer for peer in self._following.tips if peer not in self._group.members)]
        known = self._group.known
        if tip.peer_id in known or tip.peer_id in self._introducers:
            mark = self._past.get(tip.id)
            if mark is not None and tip.peer_id in known and mark.round > known[tip.peer_id].round:
                known[tip.peer_id] = mark
            said = self._group.voices.get(tip.peer_id)
            ids = said.ids if said is not None else deque[bytes](maxlen=VOICE_IDS)
            if not ids or ids[-1] != tip.id:
                ids.append(tip.id)
            self._group.voices[tip.peer_id] = _Voice(ids, now)

    def _is_stranger(self, peer: bytes) -> bool:
        return peer not in self._group.known and peer not in self._introducers

    def _shun(self, donor: bytes, now: float, seconds: float | None = None) -> None:
        """Leave a donor alone for a while, for longer each time, and look for what it had elsewhere."""
        shunned = self._following.shunned
        seconds = self.rules.seal_timeout_seconds if seconds is None else seconds
        before = shunned.pop(donor, None)
        times = 0 if before is None else before.times + 1
        # A newcomer knows nobody: who fails it once may be all that it has.
        stranger = bool(self._group.known) and self._is_stranger(donor)
        shunned[donor] = _Shunned(now + seconds * 2 ** min(times, SHUN_DOUBLINGS[stranger]), times)
        while len(shunned) > SHUNNED_MAX:
            del shunned[next(iter(shunned))]
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
        self._note_tip(events.TipHeard(event.source, seal.round, event.id, seal.total), now)
        if seal.parent != self.head.id:
            return
        try:
            state = chain.extend(self.head, event.id, seal, self.rules.chunks)
        except SealError as error:
            self._effects.append(events.Note("refused", f"refused a seal of round {seal.round}: {error}"))
            self._following.tips.pop(event.source, None)
            return
        if seal.solo and not self._follows(self._past.head, [Mark.of(state, seal)], event.source, now):
            self._shun(event.source, now)
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

    # ---- forks (rule 9) ---------------------------------------------------------------------------------------

    def _follows(self, common: Mark, theirs: Sequence[Mark], donor: bytes | None, now: float) -> bool:
        """Decide whether to go over to a chain that has these states after `common`, a state of ours.

        Args:
            theirs: their members may be left empty where they are not known.
            donor: who hands it out; None: it is looked at again in a moment, and a refusal is no news.
        """
        ours = self._past.after(common.id)
        if common.round and self._by_a_stranger(common, theirs, now):
            return self._refuse(donor, theirs[-1], "a solo seal by one that was no member")
        if not ours and (not common.round or theirs[0].sealer == self.me):
            return theirs[-1].total >= common.total
        if not ours and len(theirs) == 1 and not theirs[0].solo and now >= self._seal_expected_from(theirs[0].sealer):
            return theirs[-1].total >= common.total
        on, off = self._voices({mark.id for mark in theirs}, since=common.round, now=now)
        branches = Branch(ours, on | {self.me}, self._turn(ours)), Branch(theirs, off, self._turn(theirs))
        verdict = forks.judge(common, *branches)
        if not verdict.follow:
            why = f"{verdict.theirs} of {len(common.members)} members behind it, {verdict.ours} behind ours"
            return self._refuse(donor, theirs[-1], why)
        return True

    def _turn(self, marks: Sequence[Mark]) -> int:
        """Whose turn, in the sealer order, the first of these seals was, where it is of our head's round."""
        if not marks or self._before is None or marks[0].round != self.head.round:
            return 0
        return _turn(chain.shape_of(self._before, self.rules.chunks), marks[0].sealer, solo=marks[0].solo)

    def _seal_expected_from(self, sealer: bytes) -> float:
        """Return the time from which a seal of the round under way is followed on its sealer's word alone.

        For the first sealer that is when half of the round's length is over; for a later one, when it may be its turn.
        An earlier seal has one of two causes: we are a round behind, or its sealer did not wait for the others. Where
        the others say that they stand tells which.
        """
        exchange = self._exchanges.current
        if exchange is None or exchange.index is None or self.rules.fixed_pace:
            return -math.inf
        shape, length = exchange.shape, self._computing_seconds(exchange)
        order = [shape.members[index].peer_id for index in shape.sealer_order]
        ahead = sum(peer not in self._group.left for peer in order[: _turn(shape, sealer, solo=False)])
        if not ahead:
            return exchange.computing_since + length / 2
        return exchange.computing_since + length + (ahead - 1 / 2) * self.rules.seal_timeout_seconds

    def _by_a_stranger(self, common: Mark, theirs: Sequence[Mark], now: float) -> bool:
        """Whether a solo seal by one that was no member would take members apart that are there."""
        before = [common, *theirs[:-1]]
        solo = any(
            mark.solo and mark.sealer not in previous.members | {self.me}
            for previous, mark in zip(before, theirs, strict=True)
            if previous.members
        )
        since = now - self.rules.alone_after_seconds
        there = any(self._group.heard.get(peer, -math.inf) >= since for peer in common.members)
        return solo and (self.me in common.members or there)

    def _voices(self, theirs: Collection[bytes], *, since: int, now: float) -> tuple[set[bytes], set[bytes]]:
        """Who says of itself that it stands on our chain, at round `since` or later, and who at a state in `theirs`."""
        on, off = set(), set()
        for peer, voice in self._group.voices.items():
            if now - voice.at > self.rules.alone_after_seconds:
                continue
            oldest = since
            for identifier in reversed(voice.ids):
                if identifier in theirs:
                    off.add(peer)
                    break
                mark = self._past.get(identifier)
                if mark is not None:
                    if mark.round >= oldest:
                        on.add(peer)
                    break
                # The newest may be one that we have not come to yet; then it stood at our head a moment ago.
                oldest = max(since, self.head.round - VOICE_IDS)
        return on, off

    def _follows_from_afar(self, end: Mark, theirs: Collection[bytes] | None, donor: bytes, now: float) -> bool:
        """Whether to go over to a chain that ends so and has no state in common with what we remember of ours.

        Far behind it or off it: there is to judge by what members say who were there at the last state that we shared
        with its donor. Who comes back after a long time, and is told by a person whom to ask, goes where these are.

        Args:
            theirs: ids on it; None: not known yet, so whoever stands at no state of ours may stand there.
        """
        more = self._has_more(end.round, end.total, end.id)
        on, off = self._voices(theirs or (), since=0, now=now)
        if theirs is None:
            fresh = {p for p, v in self._group.voices.items() if now - v.at <= self.rules.alone_after_seconds}
            off = fresh - on
        # Of an introducer that is not the donor it takes the ids to know that it stands there.
        if donor in self._introducers or (theirs is not None and off & self._introducers):
            if self.me not in self._group.members:
                return True
            if self._returning:
                return more
        shared = self._group.known.get(donor)
        members = self.company if shared is None else shared.members
        behind_ours, behind_theirs = len((on | {self.me}) & members), len(off & members)
        if behind_theirs > behind_ours or (behind_theirs == behind_ours and more):
            return True
        why = f"{behind_theirs} of {len(members)} members behind it, {behind_ours} behind ours, nothing in common"
        return self._refuse(donor, end, why)

    def _refuse(self, donor: bytes | None, end: Mark, why: str) -> bool:
        if donor is None:
            return False
        self._following.refused = RefusedBranch(donor, end.round, end.total, why)
        if donor not in self._following.shunned:  # else it was said lately
            text = f"refused a branch up to round {end.round} with total {end.total}: {why}"
            self._effects.append(events.Note("refused", text))
        return False

    def _has_more(self, round: int, total: int, identifier: bytes) -> bool:
        """Whether a chain that ends like this claims more than ours does, or may continue ours."""
        head = self.head
        return chain.better(total, identifier, head.total, head.id) or (round > head.round and total >= head.total)

    def worth_changing_to(self, marks: Sequence[Mark], donor: bytes, now: float) -> bool:
        """Whether to go over to a chain of which all was fetched and checked from the first of these states on."""
        end = marks[-1]
        if end.id == self.head.id:
            return True  # our own, which our replica fell out of
        ids = [mark.id for mark in marks]
        common = self._past.last_common(ids)
        if common is None:
            return self._follows_from_afar(end, ids, donor, now)
        theirs = marks[common + 1 :]
        return bool(theirs) and self._follows(self._past[ids[common]], theirs, donor, now)

    def _on_rounds(self, event: events.RoundsFetched, now: float) -> None:
        if self._following.resyncing is not None:
            return
        tip = self._following.tips.get(event.donor)
        if event.ancestor is None:
            if tip is None or not self._wants(tip):
                return
            end = Mark(tip.round, tip.id, tip.total, b"", False, frozenset())
            if self._follows_from_afar(end, None, event.donor, now):
                self._want_snapshot(event.donor, "we are far behind its chain, or off it")
            else:
                self._shun(event.donor, now)
            return
        if not event.rounds:
            self._following.tips.pop(event.donor, None)
            return
        ids = [event.ancestor, *(sealed.id for sealed in event.rounds)]
        place = self._past.last_common(ids)
        if place is None or place == len(event.rounds):
            # Our chain moved on meanwhile; if the donor's is still the better one, its tip says so.
            return
        common, rounds = self._past[ids[place]], event.rounds[place:]
        base = self.known_state(common.id)
        if base is not None and not event.checked:
            return
        try:
            if base is None:
                states, marks = [], _linked(common, rounds)
            else:
                states = self._extended(base, rounds)
                marks = _marks(common, rounds, [state for state, _ in states])
        except SealError as error:
            self._effects.append(events.Note("refused", f"refused rounds that were fetched: {error}"))
            self._shun(event.donor, now, FETCH_TIMEOUT_SECONDS)
            return
        continued = tip is not None and tip.round > marks[-1].round and self._wants(tip)
        if base is not None and self._follows(common, marks, event.donor, now):
            self._change_to(base, rounds, states)
            self._following.shunned.pop(event.donor, None)
            self._begin_round(now)
        elif tip is not None and (base is None or continued):
            if continued:
                # A long fork comes in pieces, and the first piece alone may be worth less than what we have.
                marks = [*marks, Mark(tip.round, tip.id, tip.total, b"", False, frozenset())]
            if self._follows(common, marks, event.donor, now):
                self._want_snapshot(event.donor, "its better chain parts from ours further back than we can undo")
            else:
                self._shun(event.donor, now)
        else:
            # Of the round under way: others will tell in a moment.
            early = common.id == self.head.id and len(marks) == 1
            self._shun(event.donor, now, self.rules.seal_timeout_seconds / 4 if early else None)

    def _extended(self, base: ChainState, rounds: Sequence[SealedRound]) -> list[tuple[ChainState, RoundShape]]:
        """The chain after each of these rounds, and the round's shape. Raises SealError."""
        states: list[tuple[ChainState, RoundShape]] = []
        state = base
        for sealed in rounds:
            shape = chain.shape_of(state, self.rules.chunks)
            state = chain.extend(state, sealed.id, sealed.seal, self.rules.chunks)
            states.append((state, shape))
        return states

    def _change_to(
        self, base: ChainState, rounds: Sequence[SealedRound], states: Sequence[tuple[ChainState, RoundShape]]
    ) -> None:
        """Go over to these rounds after `base`, our head or the state before it."""
        if base is not self.head:
            text = f"fork at round {base.round + 1}: following the chain with total {states[-1][0].total}, not ours"
            self._effects.append(events.Note("fork", text))
            self._effects.append(events.Rollback(base))
            self.head = base
            self._past.cut(base.id)
            self._roots.own = {round: root for round, root in self._roots.own.items() if round <= base.round}
        for (state, shape), sealed in zip(states, rounds, strict=True):
            self._adopt(sealed, state, shape)

    def _on_synced(self, event: events.Synced, now: float) -> None:
        self._following.resyncing = None
        self.head = event.state
        self._before = None
        self._returning = False
        self._remember_past(event.past or (Mark.of(event.state),))
        self.company = self._past.head.members
        # They were of the replica that was given up; the trainer tells those of the new one.
        self._roots.own.clear()
        exchange = self._exchanges.current
        self._begin_round(now)
        if exchange is self._exchanges.current and exchange is not None and exchange.sent_at is None:
            # The same round as before, but the trainer began anew.
            self._start_training(exchange, now)

    def _remember_past(self, marks: Sequence[Mark]) -> None:
        """Our chain goes through these states now, the last of which is the head."""
        common = self._past.last_common([mark.id for mark in marks])
        if common is None:
            self._past = Past(marks)
            return
        self._past.cut(marks[common].id)
        for mark in marks[common + 1 :]:
            self._past.append(mark)

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
        known = self._group.known
        for peer in sorted(group - {self.me}):
            known[peer] = known.pop(peer, self._past.head)
        while len(known) > KNOWN_MAX + len(group):
            del known[next(iter(known))]
        heard_of = known.keys() | self._introducers
        self._group.voices = {p: voice for p, voice in self._group.voices.items() if p in heard_of}
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
        bounds = rules.min_seconds, rules.max_seconds
        return chain.length_seconds(exchange.shape, rules.target_batch, *bounds, rules.weight_cap_ratio)

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
        self._note_company(sealed.seal, shape)
        self._past.append(Mark.of(state, sealed.seal, self._past.head))
        self._returning = False
        self._note_admissions(sealed.seal, shape)
        self._effects.append(events.Apply(sealed, state, shape, shape.index(self.me), contributed))
        self._check_root(sealed.seal)
        exchange = self._exchanges.current
        if exchange is not None and exchange.sent_at is not None and exchange.shape == shape and not sealed.seal.solo:
            self._learn_from(sealed.seal, exchange)

    def _note_company(self, seal: Seal, shape: RoundShape) -> None:
        """Whose work is in a round was on our chain at its base; who sealed it, at the state before it."""
        base, head = self._past.get(shape.base), self._past.head
        there = {shape.members[index].peer_id: base for index in chain.bits(seal.included, len(shape.members))}
        there[seal.sealer] = head
        newest: Mark | None = None
        for peer, mark in there.items():
            if peer != self.me and mark is not None:
                newest = mark if newest is None or mark.round > newest.round else newest
                if peer in self._group.known and mark.round > self._group.known[peer].round:
                    self._group.known[peer] = mark
        if newest is not None:
            self.company = newest.members

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
        shape = chain.shape_of(self.head, self.rules.chunks)

        def merit(heard: events.SealHeard) -> tuple[int, int, bytes]:
            return _turn(shape, heard.seal.sealer, solo=heard.seal.solo), -heard.seal.total, heard.id

        best = min(ready, key=merit)
        state = chain.extend(self.head, best.id, best.seal, self.rules.chunks)
        if not self._follows(self._past.head, [Mark.of(state, best.seal)], None, now):
            self._wake(self._seal_expected_from(best.seal.sealer))
            return
        replies = tuple(held[n].data if digest else None for n, digest in enumerate(best.seal.parts))
        self._adopt(SealedRound(best.id, best.seal, best.signed, replies), state, shape)
        self._begin_round(now)

    def _wants(self, tip: events.TipHeard) -> bool:
        """Whether what this tip names may be better than our chain (rule 9).

        Of peers that we know any other branch may be, however short: more members may stand on it. To a peer that is no
        member yet, of anybody: it may have been led astray.
        """
        if tip.id in self._past or not tip.round:
            return False
        more = self._has_more(tip.round, tip.total, tip.id)
        return more or tip.peer_id in self._group.known or self.me not in self._past.head.members

    def _merit(self, tip: events.TipHeard) -> tuple[bool, int, bytes]:
        """Order tips, the best first: those of peers that we know before those of strangers."""
        return self._is_stranger(tip.peer_id), -tip.total, tip.id

    def _follow_better(self, now: float) -> None:
        """Ask for what a better tip has and we lack (rule 9). Never adopts by itself."""
        following = self._following
        if following.resyncing is not None:
            return
        for donor, fetch in list(following.fetching.items()):
            if now < fetch.since + FETCH_TIMEOUT_SECONDS:
                self._wake(fetch.since + FETCH_TIMEOUT_SECONDS)
            else:
                del following.fetching[donor]
                self._shun(donor, now)
        following.shunned = {
            donor: shunned
            for donor, shunned in following.shunned.items()
            if now < shunned.until + SHUN_REMEMBERED_SECONDS
        }
        coming = {w.heard.id: self._replies_expected_until(w) for w in following.waiting.values()}
        wanted = [tip for tip in sorted(following.tips.values(), key=self._merit) if self._wants(tip)]
        following.wanted_since = {tip.id: following.wanted_since.get(tip.id, now) for tip in wanted}
        if self._exchanges.current is not None and self._exchanges.current.sent_at is not None:
            # What others say of their tip often overtakes the seal, in a large group by all its way down the tree.
            patience = self.rules.seal_timeout_seconds / (2 if relay.relayed(self._group.members) else 4)
            for tip in wanted:
                if tip.round == self.head.round + 1:
                    coming.setdefault(tip.id, following.wanted_since[tip.id] + patience)
        for tip in wanted:
            shunned = following.shunned.get(tip.peer_id)
            due = max(
                self._may_ask_from(tip.peer_id), coming.get(tip.id, now), now if shunned is None else shunned.until
            )
            if due <= now:
                self._ask(tip.peer_id, now)
            elif due < math.inf:
                self._wake(due)

    def _may_ask_from(self, peer: bytes) -> float:
        """When there is room for one more question to a peer of its kind; infinity: not before an answer."""
        asked = self._following.fetching
        if peer in asked:
            return math.inf
        if not self._is_stranger(peer):
            return -math.inf if all(fetch.stranger for fetch in asked.values()) else math.inf
        earliest = self._started_at + INTRODUCER_SECONDS if not self.head.round and self._introducers else -math.inf
        strangers = [fetch.since for fetch in asked.values() if fetch.stranger]
        if len(strangers) >= (STRANGERS_ASKED_MAX if self.head.round else NEWCOMER_ASKS_MAX):
            return math.inf
        # A newcomer asks the next one when the one before is slow to answer.
        return max([earliest, *(since + self.rules.reply_timeout_seconds for since in strangers)])

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
        if self._may_ask_from(peer) <= now and self._following.resyncing is None:
            self._following.fetching[peer] = _Fetch(now, self._is_stranger(peer))
            self._wake(now + FETCH_TIMEOUT_SECONDS)
            self._effects.append(events.FetchRounds(peer, self._past.locator(LOCATOR_IDS)))

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
        return bool(known) and (now < until or self._fetches_from_known())

    def _fetches_from_known(self) -> bool:
        """Whether rounds are being fetched from a peer that we know: it is not heard, but there."""
        return any(not fetch.stranger for fetch in self._following.fetching.values())

    def _solo_when_alone(self, exchange: _Exchange, included: frozenset[int], now: float) -> bool:
        """A solo seal, once no member has been heard for `alone_after` (rule 6)."""
        learning = exchange.index is None and self._following.fetching
        if not self.head.round or learning or self._fetches_from_known():
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


def _turn(shape: RoundShape, sealer: bytes, *, solo: bool) -> int:
    """The place of a sealer in a round's order; a solo seal is nobody's turn, and comes last."""
    index = shape.index(sealer)
    return len(shape.members) if solo or index is None else shape.sealer_order.index(index)


def _marks(common: Mark, rounds: Sequence[SealedRound], states: Sequence[ChainState]) -> list[Mark]:
    """The marks of the states after `common` that these rounds lead to."""
    marks = [common]
    for sealed, state in zip(rounds, states, strict=True):
        marks.append(Mark.of(state, sealed.seal, marks[-1]))
    return marks[1:]


def _linked(common: Mark, rounds: Sequence[SealedRound]) -> list[Mark]:
    """Marks of rounds after a state whose members in full are not at hand: who signed is certain, who was a member not.

    Raises:
        SealError: they do not follow one another.
    """
    marks = [common]
    for sealed in rounds:
        seal, before = sealed.seal, marks[-1]
        if seal.parent != before.id or seal.round != before.round + 1:
            raise SealError("rounds that do not follow one another")
        marks.append(Mark(seal.round, sealed.id, seal.total, seal.sealer, seal.solo, frozenset()))
    return marks[1:]
