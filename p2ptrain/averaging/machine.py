"""The round and the chain as a state machine: events in, effects out, no sockets and no clock.

`RoundMachine.handle(event, now)` is the only method that changes state; `now` is a monotonic time in seconds that the
caller supplies, and `wake_at` says when it wants to hear `Tick` next. The network shell (`driver.py`) and tests feed
it the same way, so a decision seen in a test is the decision taken over sockets. Design section 4 is the
specification; section numbers in comments refer to it.

Cost: memory is bounded by one round of contributions to our parts plus those for the round after it; each event is
O(members + parts).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from p2ptrain.averaging import chain
from p2ptrain.averaging.chain import ChainState, Join, RoundShape, Row, Seal, SealError, SignedSeal
from p2ptrain.averaging.events import (
    Apply,
    ContributionReady,
    ContributionReceived,
    Effect,
    Event,
    FetchFailed,
    FetchRounds,
    JoinReceived,
    Key,
    Note,
    PeerLeft,
    PublishSeal,
    Reduce,
    Reply,
    ReplyHeld,
    Resync,
    Rollback,
    RootComputed,
    RoundsFetched,
    SealedRound,
    SealHeard,
    SendContribution,
    SendJoin,
    StartRound,
    Synced,
    Tick,
    TipHeard,
)

JOINS_PENDING_MAX = 256
PEERS_KNOWN_MAX = 2 * chain.MEMBERS_MAX
FETCH_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRules:
    """What the manifest fixes about rounds; durations in seconds."""

    chunks: int
    target_batch: int
    min_seconds: float
    max_seconds: float
    fixed_pace: bool
    round_max_seconds: float
    grace_seconds: float
    reply_timeout_seconds: float
    seal_timeout_seconds: float
    alone_after_seconds: float
    root_interval: int
    last_round: int
    """The run ends with it; 0: never."""


class _Undo(NamedTuple):
    """What a fork of depth one takes to undo."""

    state: ChainState
    sealed: SealedRound


@dataclass(slots=True)
class _Part:
    """One part that we reduce this round."""

    #: peer id -> its message; at most one each
    received: dict[bytes, ContributionReceived] = field(default_factory=dict)
    #: when half of the other members had arrived
    half_at: float | None = None
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
    #: parts we reduce, by part number
    reducing: dict[int, _Part]
    #: when we sent our contribution or a weight-0 message in its stead
    sent_at: float | None = None
    #: what we said of ourselves with it
    row: Row | None = None
    #: the payloads sent were the trainer's
    contributed: bool = False
    #: part number -> reply that we hold
    replies: dict[int, Reply] = field(default_factory=dict)
    first_reply_at: float | None = None
    complete_at: float | None = None


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
        self._undo: _Undo | None = None
        self._exchange: _Exchange | None = None
        #: messages for the round after the one under way, and for rounds we have not reached
        self._early: dict[tuple[Key, bytes], ContributionReceived] = {}
        #: seals that continue our head but lack a reply that we are fetching
        self._waiting_seals: dict[bytes, tuple[SealHeard, float]] = {}
        self._joins: dict[bytes, Row] = {}
        #: peer id -> when it last gave a sign of life
        self._heard: dict[bytes, float] = {}
        self._left: set[bytes] = set()
        self._tips: dict[bytes, TipHeard] = {}
        self._roots: dict[int, bytes] = {}
        #: what members said their root is, for the seal
        self._root_votes: dict[bytes, tuple[int, bytes]] = {}
        self._fetching: tuple[bytes, float] | None = None
        #: donors that failed us, until when to leave them alone
        self._shunned: dict[bytes, float] = {}
        self._resyncing = False
        #: after a late timer: do not seal before this time
        self._hold_seal_until = -math.inf
        self._quiet_since: float | None = None
        self._effects: list[Effect] = []
        self.wake_at: float | None = None

    # ---- what others may read ---------------------------------------------------------------------------------

    @property
    def is_member(self) -> bool:
        """Whether we are a member of the round under way."""
        return self._exchange is not None and self._exchange.index is not None

    @property
    def exchange_key(self) -> Key | None:
        """Key of the round under way."""
        return self._exchange.key if self._exchange else None

    @property
    def shape(self) -> RoundShape | None:
        """Shape of the round under way."""
        return self._exchange.shape if self._exchange else None

    @property
    def newest_root(self) -> tuple[int, bytes]:
        """Round and hash of the newest root that our trainer computed; (0, b"") before the first."""
        return self._newest_root()

    def awaits(self, key: Key) -> bool:
        """Whether our trainer's contribution to this round can still be sent."""
        exchange = self._exchange
        return exchange is not None and exchange.key == key and exchange.index is not None and exchange.sent_at is None

    def known_state(self, identifier: bytes) -> ChainState | None:
        """The chain state at our head, or at its parent where that can still be gone back to."""
        if identifier == self.head.id:
            return self.head
        return self._undo.state if self._undo is not None and identifier == self._undo.state.id else None

    def held_reply(self, key: Key, part: int) -> Reply | None:
        """The reply that we hold for a part of the round under way."""
        if self._exchange is None or self._exchange.key != key:
            return None
        return self._exchange.replies.get(part)

    def refusal(self, key: Key, part: int, peer_id: bytes) -> str | None:
        """Why a message for `part` from `peer_id` would be refused, or None (design 4.5)."""
        if key.round <= self.head.round:
            return "late"
        if key.round > self.head.round + 2:
            return "too early"
        if key.round == self.head.round + 2:
            if key.base != self.head.id:
                return "foreign"
            # Who follows and which parts there are is settled by seals we know; a part number beyond that is noise.
            if all(m.peer_id != peer_id for m in self.head.following):
                return "not a member"
            # One message a peer, as nobody reduces two parts.
            return "twice" if (key, peer_id) in self._early else None
        exchange = self._exchange
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

    # ---- the one way in ---------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Effect]:
        """Begin at the chain state given to the constructor."""
        self._begin_round(now)
        return self._settle_effects(now)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at monotonic time `now` (seconds); returns what to do, in order."""
        match event:
            case ContributionReady():
                self._on_ready(event, now)
            case ContributionReceived():
                self._hear(event.peer_id, now)
                self._on_contribution(event, now)
            case ReplyHeld():
                self._on_reply(event, now)
            case SealHeard():
                self._hear(event.source, now)
                self._on_seal(event, now)
            case TipHeard():
                self._hear(event.peer_id, now)
                self._tips[event.peer_id] = event
            case PeerLeft():
                if any(event.peer_id == member.peer_id for member in self.head.now + self.head.following):
                    self._left.add(event.peer_id)
                self._tips.pop(event.peer_id, None)
            case JoinReceived():
                self._hear(event.peer_id, now)
                if len(self._joins) < JOINS_PENDING_MAX:
                    self._joins[event.peer_id] = event.row
            case RoundsFetched():
                self._fetching = None
                self._hear(event.donor, now)
                self._on_rounds(event, now)
            case FetchFailed():
                self._fetching = None
                self._resyncing = False
                self._shunned[event.donor] = now + self.rules.seal_timeout_seconds
            case Synced():
                self._on_synced(event, now)
            case RootComputed():
                self._roots[event.round] = event.root
                for old in sorted(self._roots)[:-4]:
                    del self._roots[old]
            case Tick():
                if event.late:
                    # 4.12: we may have slept through seals; ask before deciding anything.
                    self._hold_seal_until = now + self.rules.seal_timeout_seconds
                    for peer in self._tips:
                        self._ask(peer, now)
        for known in (self._tips, self._heard, self._root_votes, self._shunned):
            # Strangers may say hello under as many names as they like.
            while len(known) > PEERS_KNOWN_MAX:
                del known[next(iter(known))]
        return self._settle_effects(now)

    # ---- events -----------------------------------------------------------------------------------------------

    def _hear(self, peer_id: bytes, now: float) -> None:
        if peer_id != self.me:
            self._heard[peer_id] = now
            self._left.discard(peer_id)

    def _on_ready(self, event: ContributionReady, now: float) -> None:
        self.row = event.row
        exchange = self._exchange
        if exchange is None or not self.awaits(event.key) or len(event.payloads) != len(exchange.shape.parts):
            return
        exchange.contributed = True
        self._send(exchange, event.row, event.payloads, now)

    def _send(self, exchange: _Exchange, row: Row, payloads: tuple[bytes, ...], now: float) -> None:
        """Give every reducer its message; ours to ourselves without a wire."""
        exchange.sent_at, exchange.row = now, row
        root_round, root = self._newest_root()
        for number, part in enumerate(exchange.shape.parts):
            reducer = exchange.shape.members[part.reducer].peer_id
            if reducer == self.me:
                mine = ContributionReceived(exchange.key, number, self.me, row, root_round, root, payloads[number])
                self._on_contribution(mine, now)
            else:
                self._effects.append(SendContribution(exchange.key, number, reducer, row, payloads[number]))
        self._root_votes[self.me] = (root_round, root)

    def _on_contribution(self, event: ContributionReceived, now: float) -> None:
        if self.refusal(event.key, event.part, event.peer_id) is not None:
            return
        self._root_votes[event.peer_id] = (event.root_round, event.root)
        exchange = self._exchange
        if exchange is None or event.key != exchange.key:
            self._early[event.key, event.peer_id] = event
            return
        part = exchange.reducing[event.part]
        part.received[event.peer_id] = event
        others = len(exchange.shape.members) - 1
        arrived = len(part.received.keys() - {self.me})
        if part.half_at is None and others and arrived >= math.ceil(others / 2):
            part.half_at = now

    def _on_reply(self, event: ReplyHeld, now: float) -> None:
        exchange = self._exchange
        if exchange is None or exchange.key != event.key or event.part in exchange.replies:
            return
        if not 0 <= event.part < len(exchange.shape.parts):
            return
        exchange.replies[event.part] = event.reply
        if exchange.first_reply_at is None:
            exchange.first_reply_at = now
        if len(exchange.replies) == len(exchange.shape.parts):
            exchange.complete_at = now

    def _on_seal(self, event: SealHeard, now: float) -> None:
        seal = event.seal
        self._tips[event.source] = TipHeard(event.source, seal.round, event.id, seal.total)
        if seal.parent != self.head.id or event.id in self._waiting_seals:
            return
        try:
            chain.extend(self.head, event.id, seal, self.rules.chunks)
        except SealError as error:
            self._effects.append(Note("refused", f"refused a seal of round {seal.round}: {error}"))
            self._tips.pop(event.source, None)
            return
        self._waiting_seals[event.id] = (event, now)

    def _on_rounds(self, event: RoundsFetched, now: float) -> None:
        if event.ancestor is None:
            self._want_snapshot(event.donor, "its journal does not reach back to our chain")
            return
        if not event.rounds:
            self._tips.pop(event.donor, None)
            return
        if event.ancestor == self.head.id:
            base, undo = self.head, False
        elif self._undo is not None and event.ancestor == self._undo.state.id:
            base, undo = self._undo.state, True
        else:
            self._want_snapshot(event.donor, "the fork is deeper than one seal")
            return
        states: list[tuple[ChainState, RoundShape]] = []
        state = base
        for sealed in event.rounds:
            shape = chain.shape_of(state, self.rules.chunks)
            try:
                state = chain.extend(state, sealed.id, sealed.seal, self.rules.chunks)
            except SealError as error:
                self._effects.append(Note("refused", f"refused a fetched seal of round {sealed.seal.round}: {error}"))
                self._shunned[event.donor] = now + FETCH_TIMEOUT_SECONDS
                return
            states.append((state, shape))
        if undo:
            if not chain.better(state.total, state.id, self.head.total, self.head.id):
                return
            text = f"fork at round {base.round + 1}: following the chain with total {state.total} instead of ours"
            self._effects.append(Note("fork", text))
            self._effects.append(Rollback(base))
            self.head = base
        for (state, shape), sealed in zip(states, event.rounds, strict=True):
            self._adopt(sealed, state, shape, now)
        self._begin_round(now)

    def _on_synced(self, event: Synced, now: float) -> None:
        self._resyncing = False
        self.head = event.state
        self._undo = None
        self._begin_round(now)

    # ---- rounds -----------------------------------------------------------------------------------------------

    def _begin_round(self, now: float) -> None:
        """Open the round after the head, unless it is under way already with the same shape."""
        shape = chain.shape_of(self.head, self.rules.chunks)
        key = Key(shape.round, shape.base)
        previous = self._exchange
        same = previous is not None and previous.key == key and previous.shape == shape
        self._waiting_seals = {i: s for i, s in self._waiting_seals.items() if s[0].seal.parent == self.head.id}
        if same:
            return
        if self.rules.last_round and self.head.round >= self.rules.last_round:
            self._exchange = None
            return
        index = shape.index(self.me)
        mine = {n: _Part() for n, part in enumerate(shape.parts) if part.reducer == index}
        self._exchange = _Exchange(shape, key, index, now, mine)
        self._quiet_since = now
        self._left &= {member.peer_id for member in self.head.now + self.head.following}
        early = [m for m in self._early.values() if m.key == key]
        self._early = {k: m for k, m in self._early.items() if m.key.round > key.round}
        for message in early:
            self._on_contribution(message, now)
        if index is None:
            self._join(shape)
            return
        self._joins.pop(self.me, None)
        rules = self.rules
        length = chain.length_seconds(shape, rules.target_batch, rules.min_seconds, rules.max_seconds)
        self._effects.append(StartRound(key, shape, index, length))

    def _join(self, shape: RoundShape) -> None:
        """Ask the peers that may seal this round to admit us, again each round until one does."""
        if any(m.peer_id == self.me for m in self.head.following):
            return
        for place in shape.sealer_order[:2]:
            if shape.members[place].dialable:
                self._effects.append(SendJoin(shape.members[place].peer_id))

    def _adopt(self, sealed: SealedRound, state: ChainState, shape: RoundShape, now: float) -> None:
        """Move the head over one sealed round that we hold whole."""
        exchange = self._exchange
        ours = exchange is not None and exchange.shape == shape and exchange.contributed
        self._undo = _Undo(self.head, sealed)
        self.head = state
        for join in sealed.seal.joins:
            self._joins.pop(join.peer_id, None)
        self._effects.append(Apply(sealed, state, shape, shape.index(self.me), bool(ours)))
        self._check_root(sealed.seal)

    def _check_root(self, seal: Seal) -> None:
        """4.10: who differs from the sealed root resyncs and says so."""
        if not seal.root:
            return
        interval = self.rules.root_interval
        mine = self._roots.get((seal.round - 1) // interval * interval)
        if mine is not None and mine != seal.root and seal.sealer != self.me:
            self._want_snapshot(seal.sealer, "our replica differs from the sealed root")

    # ---- what time and state make due -------------------------------------------------------------------------

    def _settle_effects(self, now: float) -> list[Effect]:
        """Do all that is due now, then say when to look again."""
        self.wake_at = None
        while self._adopt_waiting(now):
            pass
        self._follow_better(now)
        self._close_parts(now)
        self._stand_in(now)
        if self._seal_when_due(now):
            return self._settle_effects(now)
        effects, self._effects = self._effects, []
        return effects

    def _wake(self, at: float) -> None:
        if self.wake_at is None or at < self.wake_at:
            self.wake_at = at

    def _adopt_waiting(self, now: float) -> bool:
        """Adopt the best seal on our head whose replies we all hold."""
        exchange = self._exchange
        held = exchange.replies if exchange is not None else {}
        ready = [
            heard
            for heard, _ in self._waiting_seals.values()
            if all(not d or (n in held and held[n].digest == d) for n, d in enumerate(heard.seal.parts))
        ]
        if not ready:
            return False
        best = min(ready, key=lambda heard: (-heard.seal.total, heard.id))
        shape = chain.shape_of(self.head, self.rules.chunks)
        state = chain.extend(self.head, best.id, best.seal, self.rules.chunks)
        replies = tuple(held[n].data if digest else None for n, digest in enumerate(best.seal.parts))
        self._adopt(SealedRound(best.id, best.seal, best.signed, replies), state, shape, now)
        self._begin_round(now)
        return True

    def _follow_better(self, now: float) -> None:
        """Ask for what a better tip has and we lack (4.9). Never adopts by itself."""
        if self._resyncing:
            return
        if self._fetching is not None:
            donor, deadline = self._fetching
            if now < deadline:
                self._wake(deadline)
                return
            self._fetching = None
            self._shunned[donor] = now + self.rules.seal_timeout_seconds
        known = {self.head.id} | ({self._undo.state.id} if self._undo else set())
        for peer, tip in sorted(self._tips.items(), key=lambda item: (-item[1].total, item[1].id)):
            ahead = tip.round > self.head.round and tip.total >= self.head.total
            if tip.id in known or not (ahead or chain.better(tip.total, tip.id, self.head.total, self.head.id)):
                continue
            ask_at = max(self._shunned.get(peer, -math.inf), self._replies_expected_until(tip.id))
            if now < ask_at:
                self._wake(ask_at)
                continue
            self._ask(peer, now)
            return

    def _replies_expected_until(self, identifier: bytes) -> float:
        """A seal often overtakes the last reply that it names: until when to wait before asking for the whole round."""
        waiting = self._waiting_seals.get(identifier)
        exchange = self._exchange
        if waiting is None or exchange is None or exchange.index is None or exchange.sent_at is None:
            return -math.inf
        heard, heard_at = waiting
        held = exchange.replies
        if any(n in held and digest and held[n].digest != digest for n, digest in enumerate(heard.seal.parts)):
            return -math.inf
        return heard_at + self.rules.seal_timeout_seconds / 4

    def _ask(self, peer: bytes, now: float) -> None:
        if self._fetching is None and not self._resyncing:
            self._fetching = (peer, now + FETCH_TIMEOUT_SECONDS)
            locator = [self.head.id] + ([self._undo.state.id] if self._undo else [])
            self._effects.append(FetchRounds(peer, locator))

    def _want_snapshot(self, donor: bytes, why: str) -> None:
        if not self._resyncing:
            self._resyncing = True
            self._effects.append(Resync(donor, why))

    def _close_parts(self, now: float) -> None:
        """Freeze the parts whose deadline has come (4.5)."""
        exchange = self._exchange
        if exchange is None or exchange.index is None or exchange.sent_at is None:
            return
        members = {m.peer_id for m in exchange.shape.members}
        for number, part in exchange.reducing.items():
            if part.closed:
                continue
            missing = members - part.received.keys() - self._left
            latest = exchange.sent_at + self.rules.round_max_seconds
            started = latest if part.half_at is None else min(part.half_at, latest)
            due = started + self.rules.grace_seconds
            if self.rules.fixed_pace:
                due = latest + self.rules.grace_seconds
            if missing and now < due:
                self._wake(due)
                continue
            part.closed = True
            place = {m.peer_id: i for i, m in enumerate(exchange.shape.members)}
            messages = sorted((place[p], m.row.weight, m.payload) for p, m in part.received.items())
            spec = exchange.shape.parts[number]
            self._effects.append(Reduce(exchange.key, number, spec.start, spec.end, len(members), tuple(messages)))

    def _stand_in(self, now: float) -> None:
        """Send a weight-0 message when our trainer is slower than the group, so that we stay a member (4.3)."""
        exchange = self._exchange
        if exchange is None or exchange.index is None or exchange.sent_at is not None or not exchange.shape.parts:
            return
        halves = [p.half_at for p in exchange.reducing.values() if p.half_at is not None]
        length = chain.length_seconds(
            exchange.shape, self.rules.target_batch, self.rules.min_seconds, self.rules.max_seconds
        )
        due = exchange.started_at + length + self.rules.round_max_seconds
        if not self.rules.fixed_pace:
            # Who reduces sees the others arrive; who does not can but assume that they keep the pace.
            seen = min(halves) if halves else exchange.started_at + length
            if halves or not exchange.reducing:
                due = min(due, seen + self.rules.grace_seconds / 2)
        if len(exchange.shape.members) == 1 or now < due:
            if len(exchange.shape.members) > 1:
                self._wake(due)
            return
        empty = Row(0, self.row.throughput, self.row.uplink)
        self._send(exchange, empty, tuple(b"" for _ in exchange.shape.parts), now)
        self._close_parts(now)

    # ---- sealing ----------------------------------------------------------------------------------------------

    def _seal_when_due(self, now: float) -> bool:
        """Seal what we hold when it is our place's turn (4.6); True when we sealed."""
        exchange = self._exchange
        if exchange is None or self._resyncing:
            return False
        if now < self._hold_seal_until:
            self._wake(self._hold_seal_until)
            return False
        if not exchange.shape.members:
            if not self._founder or self.head.round:
                return False
            return self._seal(exchange, frozenset(), now, solo=True)
        if exchange.index is None:
            return self._solo_when_alone(exchange, frozenset(), now)
        if exchange.sent_at is None:
            return False
        rules = self.rules
        if exchange.complete_at is not None:
            base = exchange.complete_at
        else:
            latest = exchange.sent_at + rules.round_max_seconds + rules.grace_seconds
            if rules.fixed_pace or exchange.first_reply_at is None:
                base = latest + rules.reply_timeout_seconds
            else:
                base = min(exchange.first_reply_at, latest) + rules.reply_timeout_seconds
        included = frozenset().union(*(reply.included for reply in exchange.replies.values()))
        if len(exchange.shape.members) > 1 and included == {exchange.index}:
            return self._solo_when_alone(exchange, included, now)
        place = exchange.shape.sealer_order.index(exchange.index)
        ahead = [exchange.shape.members[i].peer_id for i in exchange.shape.sealer_order[:place]]
        due = base + rules.seal_timeout_seconds * sum(peer not in self._left for peer in ahead)
        if now < due:
            self._wake(due)
            return False
        if place:
            self._effects.append(Note("takeover", f"sealing round {exchange.key.round} in place {place}"))
        return self._seal(exchange, included, now, solo=False)

    def _solo_when_alone(self, exchange: _Exchange, included: frozenset[int], now: float) -> bool:
        """A solo seal, once no member has been heard for `alone_after` (4.6)."""
        if not self.head.round:
            return False
        members = exchange.shape.members
        if exchange.index is None:
            # A learner leaves it to those who are members soon, too.
            members += self.head.following
        others = [member.peer_id for member in members if member.peer_id != self.me]
        gone = all(peer in self._left for peer in others)
        silent_since = max([self._heard.get(p, -math.inf) for p in others] + [self._silence_floor(now)])
        wait = self.rules.alone_after_seconds
        if exchange.index is None:
            # Members first: a learner waits for one more place.
            wait += self.rules.seal_timeout_seconds
        due = now if gone and exchange.index is not None else silent_since + wait
        if now < due:
            self._wake(due)
            return False
        if exchange.index is not None and exchange.first_reply_at is None and exchange.reducing:
            # Our own parts close at their deadline; sealing before would throw our own contribution away.
            for number, part in exchange.reducing.items():
                if not part.closed:
                    return self._close_alone(exchange, number, part)
            return False
        return self._seal(exchange, included & {exchange.index}, now, solo=True)

    def _silence_floor(self, now: float) -> float:
        """Silence is counted from when we began to listen, not from before."""
        if self._quiet_since is None:
            self._quiet_since = now
        return self._quiet_since

    def _close_alone(self, exchange: _Exchange, number: int, part: _Part) -> bool:
        part.closed = True
        place = {m.peer_id: i for i, m in enumerate(exchange.shape.members)}
        messages = sorted((place[p], m.row.weight, m.payload) for p, m in part.received.items())
        spec = exchange.shape.parts[number]
        members = len(exchange.shape.members)
        self._effects.append(Reduce(exchange.key, number, spec.start, spec.end, members, tuple(messages)))
        return False

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
            if solo and reply is not None and reply.included - {exchange.index}:
                reply = None
            replies.append(reply.data if reply else None)
            digests.append(reply.digest if reply else b"")
        listed = {m.peer_id for m in self.head.following} if not solo else {self.me}
        joins = tuple(Join(p, r) for p, r in sorted(self._joins.items()) if p not in listed)[: chain.JOINS_MAX]
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
            joins=joins,
            root=self._majority_root(shape, included),
        )
        signed: SignedSeal = chain.encode_seal(seal, self._sign)
        sealed = SealedRound(chain.seal_id(signed.body), seal, signed, tuple(replies))
        state = chain.extend(self.head, sealed.id, seal, self.rules.chunks)
        if solo and shape.members:
            self._effects.append(Note("solo", f"nobody heard: sealing round {shape.round} alone"))
        self._adopt(sealed, state, shape, now)
        self._effects.append(PublishSeal(sealed))
        self._begin_round(now)
        return True

    def _newest_root(self) -> tuple[int, bytes]:
        if not self._roots:
            return 0, b""
        newest = max(self._roots)
        return newest, self._roots[newest]

    def _majority_root(self, shape: RoundShape, included: frozenset[int]) -> bytes:
        """The root most members sent for the last multiple of the interval; tie: the smaller (4.10)."""
        wanted = (shape.round - 1) // self.rules.root_interval * self.rules.root_interval
        members = {m.peer_id for m in shape.members} | {self.me}
        votes = Counter(
            root for peer, (at, root) in self._root_votes.items() if peer in members and at == wanted and root
        )
        best = min(votes, key=lambda root: (-votes[root], root), default=b"")
        # A root that few have computed yet is no verdict on the others.
        return best if 2 * votes[best] >= len(included) else b""
