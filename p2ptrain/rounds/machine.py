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

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import msgspec

from p2ptrain import chain
from p2ptrain.chain import ChainState, Member, RoundShape, Row, Seal, SealError, SignedSeal, relay
from p2ptrain.chain.evidence import Contribution, sign_contribution
from p2ptrain.chain.forks import Mark
from p2ptrain.chain.sealed import Key, Reply, SealedRound
from p2ptrain.chain.state import STRIKES_BORNE
from p2ptrain.rounds import events
from p2ptrain.rounds.admissions import Admissions
from p2ptrain.rounds.audits import Audits
from p2ptrain.rounds.deadlines import Deadlines
from p2ptrain.rounds.decisions import Decisions
from p2ptrain.rounds.exchange import Exchange, Exchanges, Missed, OwnPart
from p2ptrain.rounds.fetching import FETCH_TIMEOUT_SECONDS, STRANGERS_MAX, Fetch, Fetching, RefusedBranch, Waiting
from p2ptrain.rounds.fork_choice import ForkChoice, linked, marks_after
from p2ptrain.rounds.rules import RoundRules
from p2ptrain.rounds.statements import Statements

STRUCK_HALVINGS = 2  # of the wait for the seal of a member that has owed something again and again
ASK_AFTER = 1 / 4  # of the wait for a seal, for a reply that it names, before its sealer is asked for the round
LOCATOR_IDS = 16  # of the chain up to the head: far enough back for all that is remembered of it


@dataclass(slots=True)
class _Group:
    """Whom we train with.

    The members are those of the round under way and of the one after it, as the head says. Signs of life and goodbyes
    are kept for members alone, and no sign of life of our own.
    """

    members: frozenset[bytes] = frozenset()
    #: peer id -> when it last gave a sign of life
    heard: dict[bytes, float] = field(default_factory=dict)
    #: members that said goodbye and were not heard since
    left: set[bytes] = field(default_factory=set)


@dataclass(slots=True)
class _Roots:
    """Hashes of replicas.

    At most four of our own are kept, the newest. Votes are kept of members alone.
    """

    #: round -> the root that our trainer computed
    own: dict[int, bytes] = field(default_factory=dict)
    #: peer id -> the round and the root that it said with its last message, for the seal
    votes: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    #: the newest round whose root was sealed, and each such root with the sealers that named it
    sealed_round: int = 0
    sealers: dict[bytes, set[bytes]] = field(default_factory=dict)
    #: the last round of which as many vouched for another root as for ours; -1: ours was named since
    tied_round: int = -1


class RoundMachine:
    """Decides for one peer; see the module docstring.

    Args:
        me: our peer id, in bytes.
        rules: from the manifest.
        state: where our chain stands.
        sign: signs a hash: a seal's id, or what `chain.evidence` makes of a contribution.
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
        #: the chain before the head, where that can be gone back to
        self._before: ChainState | None = None
        self.forks = ForkChoice(me, rules.alone_after_seconds, past or [Mark.of(state)], company, introducers)
        self.exchanges = Exchanges()
        self.fetching = Fetching(rules.reply_timeout_seconds, rules.seal_timeout_seconds)
        self.group = _Group()
        self.admissions = Admissions(me)
        self.statements = Statements(me)
        self.audits = Audits(me, sign, rules.audits_a_part)
        self.roots = _Roots()
        self._deadlines = Deadlines(rules.grace_seconds, rules.reply_timeout_seconds, learns=not rules.fixed_pace)
        self._effects: list[events.Effect] = []
        self.wake_at: float | None = None
        #: the last events, and what they led to
        self.decisions = Decisions()

    # ---- what others may read ---------------------------------------------------------------------------------

    @property
    def is_member(self) -> bool:
        """Whether we are a member of the round under way."""
        return self.exchanges.current is not None and self.exchanges.current.index is not None

    @property
    def exchange_key(self) -> Key | None:
        """Key of the round under way."""
        return self.exchanges.current.key if self.exchanges.current else None

    @property
    def shape(self) -> RoundShape | None:
        """Shape of the round under way."""
        return self.exchanges.current.shape if self.exchanges.current else None

    @property
    def newest_root(self) -> tuple[int, bytes]:
        """Round and hash of the newest root that our trainer computed; (0, b"") before the first."""
        newest = max(self.roots.own, default=0)
        return newest, self.roots.own.get(newest, b"")

    def awaits(self, key: Key) -> bool:
        """Whether our trainer's contribution to this round can still be sent."""
        exchange = self.exchanges.current
        return exchange is not None and exchange.key == key and exchange.index is not None and exchange.sent_at is None

    @property
    def refused_branch(self) -> RefusedBranch | None:
        """The branch that fork choice refused last."""
        return self.fetching.refused

    def known_state(self, identifier: bytes) -> ChainState | None:
        """The chain state at our head, or at its parent where that can still be gone back to."""
        if identifier == self.head.id:
            return self.head
        return self._before if self._before is not None and identifier == self._before.id else None

    def held_reply(self, key: Key, part: int) -> Reply | None:
        """The reply that we hold for a part of the round under way."""
        if self.exchanges.current is None or self.exchanges.current.key != key:
            return None
        return self.exchanges.current.replies.get(part)

    def refusal(self, key: Key, part: int, peer_id: bytes) -> str | None:
        """Why a message for `part` from `peer_id` would be refused, or None (rule 5)."""
        if key.round <= self.head.round:
            return "late"
        if key.round > self.head.round + 2:
            return "too early"
        if key.round == self.head.round + 2:
            return self._refusal_early(key, part, peer_id)
        exchange = self.exchanges.current
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
        coming = self.exchanges.coming
        if coming is None or key.base != coming.base:
            return "foreign"
        if coming.index(peer_id) is None:
            return "not a member"
        if part >= len(coming.parts) or coming.members[coming.parts[part].reducer].peer_id != self.me:
            return "not the reducer"
        return "twice" if (part, peer_id) in self.exchanges.early else None

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
            ("what is remembered of the chain ends with the head", self.forks.past.head.id == self.head.id),
            *self.exchanges.invariants(self.head, self.me, self.rules.chunks),
            *self.fetching.invariants(self.head.id, self.me),
            *self.forks.invariants(self.group.members),
            *self.admissions.invariants(self.head.round, len(self.group.members)),
            *self.statements.invariants(self.head),
            *self.audits.invariants(self.group.members),
            ("the group is what the head says", self.group.members == _members_of(self.head)),
            ("signs of life are of other members", self.group.heard.keys() <= self.group.members - {self.me}),
            ("goodbyes are of members", self.group.left <= self.group.members),
            ("roots are the four newest", len(self.roots.own) <= 4),
            ("votes on roots are of members", self.roots.votes.keys() <= self.group.members),
        ]:
            if not holds:
                raise AssertionError(f"it does not hold that {what}")

    # ---- the one way in ---------------------------------------------------------------------------------------

    def start(self, now: float) -> list[events.Effect]:
        """Begin at the chain state given to the constructor."""
        self.decisions.hear(None, now)
        self.fetching.started_at = now
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
                if event.peer_id in self.group.members:
                    self.group.left.add(event.peer_id)
                self.fetching.tips.pop(event.peer_id, None)
                self.admissions.withdraw(event.peer_id)
            case events.JoinReceived():
                self._hear(event.peer_id, now)
                self.admissions.ask(event.peer_id, event.row, self.head)
            case events.StatementHeard():
                if self.statements.hear([event.statement], self.head) and self.shape is not None:
                    self._hand_on_statements(self.shape)
            case events.RoundsFetched():
                self._hear(event.donor, now)
                self.fetching.asked.pop(event.donor, None)
                self._on_rounds(event, now)
            case events.FetchFailed():
                if self.fetching.asked.pop(event.donor, None) is None and self.fetching.resyncing == event.donor:
                    self.fetching.resyncing = None
                self._shun(event.donor, now)
            case events.Synced():
                self._on_synced(event, now)
            case events.RootComputed():
                self.roots.own[event.round] = event.root
                for old in sorted(self.roots.own)[:-4]:
                    del self.roots.own[old]
            case events.Doubted():
                self._effects += self.audits.doubt(event, self.group.members)
            case events.Audited():
                self._on_audited(event)
            case events.ProofHeard():
                self.audits.keep(event.reducer, event.proof, found=False)
            case events.Tick():
                if event.late:
                    # Rule 12: we may have slept through seals; ask before deciding anything.
                    self.fetching.hold_seal_until = now + self.rules.seal_timeout_seconds
                    best = min(self.fetching.tips.values(), key=self.forks.merit, default=None)
                    if best is not None:
                        self._ask(best.peer_id, now)
            case _:
                assert_never(event)
        return self._settle_effects(now)

    # ---- events -----------------------------------------------------------------------------------------------

    def _hear(self, peer_id: bytes, now: float) -> None:
        if peer_id != self.me and peer_id in self.group.members:
            self.group.heard[peer_id] = now
            self.group.left.discard(peer_id)

    def _note_tip(self, tip: events.TipHeard, now: float) -> None:
        self.fetching.note_tip(tip, self.group.members)
        self.forks.note_tip(tip, now)

    def _shun(self, donor: bytes, now: float, seconds: float | None = None) -> None:
        # A newcomer knows nobody: who fails it once may be all that it has.
        stranger = bool(self.forks.known) and self.forks.is_stranger(donor)
        self.fetching.shun(donor, now, stranger=stranger, seconds=seconds)

    def _on_ready(self, event: events.ContributionReady, now: float) -> None:
        self.row = event.row
        exchange = self.exchanges.current
        if exchange is None or not self.awaits(event.key) or len(event.payloads) != len(exchange.shape.parts):
            return
        self.exchanges.sent[exchange.key] = exchange.shape
        self._send(exchange, event.row, event.payloads, now)

    def _send(self, exchange: Exchange, row: Row, payloads: tuple[bytes, ...], now: float) -> None:
        """Give every reducer its message; ours to ourselves without a wire."""
        exchange.sent_at, exchange.row = now, row
        if not exchange.others_awaited:
            for reducing in exchange.reducing.values():
                reducing.half_at = now
        root_round, root = self.newest_root
        for number, part in enumerate(exchange.shape.parts):
            reducer, payload = exchange.shape.members[part.reducer].peer_id, payloads[number]
            signature = sign_contribution(self._sign, self.head.run_id, exchange.key, number, row, payload)
            if reducer == self.me:
                mine = events.ContributionReceived(
                    exchange.key, number, self.me, row, root_round, root, payload, signature
                )
                self._on_contribution(mine, now)
            else:
                self._effects.append(events.SendContribution(exchange.key, number, reducer, row, payload, signature))
        self.roots.votes[self.me] = (root_round, root)

    def _on_contribution(self, event: events.ContributionReceived, now: float) -> None:
        if self.refusal(event.key, event.part, event.peer_id) is not None:
            return
        self.roots.votes[event.peer_id] = (event.root_round, event.root)
        exchange = self.exchanges.current
        if exchange is None or event.key != exchange.key:
            self.exchanges.early[(event.part, event.peer_id)] = event
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
        missed = self.exchanges.missed.get((event.key, event.part))
        if missed is not None and event.peer_id in missed.members:
            missed.members.remove(event.peer_id)
            if event.peer_id in missed.hoped_for:
                self._deadlines.patience.observe(came=True)
            self._deadlines.contributions.observe(event.peer_id, now - missed.since)

    def _on_reply(self, event: events.ReplyHeld, now: float) -> None:
        exchange = self.exchanges.current
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
            self.fetching.tips.pop(event.source, None)
            return
        if seal.solo and not self._follows(self.forks.past.head, [Mark.of(state, seal)], event.source, now):
            self._shun(event.source, now)
            return
        known = self.fetching.waiting.get(seal.sealer)
        if known is not None:
            old = known.heard
            if not chain.better(seal.total, event.id, old.seal.total, old.id):
                return
        elif (
            seal.sealer not in self.group.members
            and len(self.fetching.waiting) >= len(self.group.members) + STRANGERS_MAX
        ):
            return
        self.fetching.waiting[seal.sealer] = Waiting(event, now)

    # ---- forks (rule 9) ---------------------------------------------------------------------------------------

    def _follows(
        self, common: Mark, theirs: Sequence[Mark], donor: bytes | None, now: float, *, whole: bool = True
    ) -> bool:
        """Decide whether to go over to a chain that has these states after `common`, a state of ours.

        Args:
            theirs: their members may be left empty where they are not known.
            whole: whether these are all states that it has after `common`.
            donor: who hands it out; None: it is looked at again in a moment, and a refusal is no news.
        """
        judgement = self.forks.follows(
            common,
            theirs,
            now,
            ids={mark.id for mark in theirs} if whole else None,
            heard=self.group.heard,
            expected_from=self._seal_expected_from,
            turn=self._turn,
        )
        if not judgement.follow and donor is not None:
            self._refuse(donor, theirs[-1], judgement.why, now)
        return judgement.follow

    def _follows_from_afar(self, end: Mark, theirs: Collection[bytes] | None, donor: bytes, now: float) -> bool:
        """Decide whether to go over to a chain that has no state in common with what we remember of ours."""
        member = self.me in self.group.members
        judgement = self.forks.follows_from_afar(end, theirs, donor, now, is_member=member)
        if not judgement.follow:
            self._refuse(donor, end, judgement.why, now)
        return judgement.follow

    def _refuse(self, donor: bytes, end: Mark, why: str, now: float) -> None:
        self.fetching.refused = RefusedBranch(donor, end.round, end.total, why, now)
        if donor not in self.fetching.shunned:  # else it was said lately
            text = f"refused a branch up to round {end.round} with total {end.total}: {why}"
            self._effects.append(events.Note("refused", text))

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
        exchange = self.exchanges.current
        if exchange is None or exchange.index is None or self.rules.fixed_pace:
            return -math.inf
        shape, length = exchange.shape, self._computing_seconds(exchange)
        ahead = self._waits_ahead(shape, _turn(shape, sealer, solo=False))
        if not ahead:
            return exchange.computing_since + length / 2
        return exchange.computing_since + length + sum(ahead) - ahead[-1] / 2

    def _waits_ahead(self, shape: RoundShape, place: int, sealed: Collection[bytes] = ()) -> list[float]:
        """Return how long each of the sealers before this place is waited for, in their order.

        Args:
            sealed: those that have sealed already, whose replies did not come.
        """
        ahead = [shape.members[index] for index in shape.sealer_order[:place]]
        gone = self.group.left.union(sealed)
        return [self._wait_for_sealer(member) for member in ahead if member.peer_id not in gone]

    def _wait_for_sealer(self, member: Member) -> float:
        """How long to wait for a member's seal: half as long for each strike beyond those that are borne, twice.

        All know the strikes, so all wait alike. Who is on trial and well seals as soon as the others have its replies.
        """
        beyond = max(0, member.strikes - STRIKES_BORNE)
        return self.rules.seal_timeout_seconds / 2 ** min(beyond, STRUCK_HALVINGS)

    def worth_changing_to(self, marks: Sequence[Mark], donor: bytes, now: float) -> bool:
        """Whether to go over to a chain of which all was fetched and checked from the first of these states on."""
        end = marks[-1]
        if end.id == self.head.id:
            return True  # our own, which our replica fell out of
        marks = self.forks.joined(marks)
        ids = [mark.id for mark in marks]
        common = self.forks.past.last_common(ids)
        if common is None:
            parted_at = self.forks.parted_from(donor)
            if parted_at is not None:
                return self._follows(parted_at, marks, donor, now, whole=False)
            return self._follows_from_afar(end, ids, donor, now)
        theirs = marks[common + 1 :]
        return bool(theirs) and self._follows(self.forks.past[ids[common]], theirs, donor, now)

    def _on_rounds(self, event: events.RoundsFetched, now: float) -> None:
        if self.fetching.resyncing is not None:
            return
        tip = self.fetching.tips.get(event.donor)
        if event.ancestor is None:
            if tip is None or not self.forks.wants(tip):
                return
            end = Mark(tip.round, tip.id, tip.total, b"", False, frozenset())
            parted_at = self.forks.note_parting(event.donor, event.parted_at)
            fork = self.forks.shown_fork(event.shown, tip.id)
            if fork is not None:
                follows = self._follows(*fork, event.donor, now)
            elif parted_at is not None:
                follows = self._follows(parted_at, [end], event.donor, now, whole=False)
            else:
                follows = self._follows_from_afar(end, None, event.donor, now)
            if follows:
                self._want_snapshot(event.donor, "we are far behind its chain, or off it", event.shown)
            else:
                self._shun(event.donor, now)
            return
        if not event.rounds:
            self.fetching.tips.pop(event.donor, None)
            return
        ids = [event.ancestor, *(sealed.id for sealed in event.rounds)]
        place = self.forks.past.last_common(ids)
        if place is None or place == len(event.rounds):
            # Our chain moved on meanwhile; if the donor's is still the better one, its tip says so.
            return
        common, rounds = self.forks.past[ids[place]], event.rounds[place:]
        base = self.known_state(common.id)
        if base is not None and not event.checked:
            return
        try:
            if base is None:
                states, marks = [], linked(common, rounds)
            else:
                states = self._extended(base, rounds)
                marks = marks_after(common, rounds, [state for state, _ in states])
        except SealError as error:
            self._effects.append(events.Note("refused", f"refused rounds that were fetched: {error}"))
            self._shun(event.donor, now, FETCH_TIMEOUT_SECONDS)
            return
        continued = tip is not None and tip.round > marks[-1].round and self.forks.wants(tip)
        if base is not None and self._follows(common, marks, event.donor, now):
            self._change_to(base, rounds, states)
            self.fetching.shunned.pop(event.donor, None)
            self._begin_round(now)
        elif tip is not None and (base is None or continued):
            if continued:
                # A long fork comes in pieces, and the first piece alone may be worth less than what we have.
                marks = [*marks, Mark(tip.round, tip.id, tip.total, b"", False, frozenset())]
                common, marks = self.forks.shown_fork(event.shown, tip.id) or (common, marks)
            if self._follows(common, marks, event.donor, now):
                why = "its better chain parts from ours further back than we can undo"
                self._want_snapshot(event.donor, why, event.shown)
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
        access = self.head.access
        if base is not self.head:
            text = f"fork at round {base.round + 1}: following the chain with total {states[-1][0].total}, not ours"
            self._effects.append(events.Note("fork", text))
            self._effects.append(events.Rollback(base))
            self.head = base
            self.forks.past.cut(base.id)
            self.roots.own = {round: root for round, root in self.roots.own.items() if round <= base.round}
        for (state, shape), sealed in zip(states, rounds, strict=True):
            self._adopt(sealed, state, shape)
        self.statements.keep_lost(access, self.head)

    def _on_synced(self, event: events.Synced, now: float) -> None:
        donor, self.fetching.resyncing = self.fetching.resyncing or b"", None
        access, self.head = self.head.access, event.state
        self._before = None
        self.statements.keep_lost(access, self.head)
        self.forks.go_over_to(event.past or (Mark.of(event.state),), donor)
        # They were of the replica that was given up; the trainer tells those of the new one.
        self.roots.own.clear()
        exchange = self.exchanges.current
        self._begin_round(now)
        if exchange is self.exchanges.current and exchange is not None and exchange.sent_at is None:
            # The same round as before, but the trainer began anew.
            self._start_training(exchange, now)

    # ---- rounds -----------------------------------------------------------------------------------------------

    def _begin_round(self, now: float) -> None:
        """Open the round after the head, unless it is under way already with the same shape."""
        chunks = self.rules.chunks
        shape, self.exchanges.coming = chain.shape_of(self.head, chunks), chain.coming_shape(self.head, chunks)
        key = Key(shape.round, shape.base)
        self._remember_only(_members_of(self.head))
        early, self.exchanges.early = self.exchanges.early, {}
        if (
            self.exchanges.current is not None
            and self.exchanges.current.key == key
            and self.exchanges.current.shape == shape
        ):
            self.exchanges.early = {k: m for k, m in early.items() if m.key.base == self.exchanges.coming.base}
            return
        if self.rules.last_round and self.head.round >= self.rules.last_round:
            self.exchanges.current = None
            return
        index = shape.index(self.me)
        mine = {n: OwnPart() for n, part in enumerate(shape.parts) if part.reducer == index}
        self.exchanges.current = Exchange(shape, key, index, now, self._computing_since(shape, now), mine)
        for message in early.values():
            self._on_contribution(message, now)
        if self.me not in {m.peer_id for m in self.head.following} and self.me not in self.head.expelled:
            self._join(shape)
        self._hand_on_statements(shape)
        self._hand_on_proofs(shape)
        if index is not None:
            self._start_training(self.exchanges.current, now)

    def _computing_since(self, shape: RoundShape, now: float) -> float:
        """When computing for the round that begins now began.

        When our last message was due, not when it left: who was late once is in step again with the next. And who
        computes less, since seals left it out, is so much earlier from then on.
        """
        before = self.exchanges.current
        if not self.rules.overlap or before is None or before.due_at is None or before.key.round != shape.round - 1:
            return now
        return min(before.due_at, now)

    def _remember_only(self, group: frozenset[bytes]) -> None:
        """Drop what was kept for peers and rounds that are of no more use."""
        head = self.head
        self.group.members = group
        self.group.heard = {p: at for p, at in self.group.heard.items() if p in group}
        self.group.left &= group
        self.roots.votes = {p: vote for p, vote in self.roots.votes.items() if p in group}
        self.fetching.waiting = {s: w for s, w in self.fetching.waiting.items() if w.heard.seal.parent == head.id}
        self.admissions.forget_stale(head.round, len(group))
        self.statements.forget_stale(head)
        self.audits.forget_all_but(group)
        self.exchanges.forget_before(head.round)
        self.forks.know_only(group)
        proven = {m.peer_id for m in head.now + head.following if not m.is_newcomer}
        self._deadlines.keep_only(proven - {self.me})

    def _start_training(self, exchange: Exchange, now: float) -> None:
        if exchange.index is not None:
            length = self._computing_seconds(exchange)
            seconds = self._deadlines.computing_seconds(length, last_chance=self._last_chance())
            exchange.due_at = max(exchange.computing_since + seconds, now)
            start = events.StartRound(exchange.key, exchange.shape, exchange.index, exchange.due_at - now, length)
            self._effects.append(start)

    def _computing_seconds(self, exchange: Exchange) -> float:
        rules = self.rules
        bounds = rules.min_seconds, rules.max_seconds
        return chain.length_seconds(exchange.shape, rules.target_batch, *bounds, rules.weight_cap_ratio)

    def _join(self, shape: RoundShape) -> None:
        """Ask the peers that may seal this round to admit us, again each round until one does."""
        for sealer in self._next_sealers(shape):
            self._effects.append(events.SendJoin(sealer))

    def _hand_on_statements(self, shape: RoundShape) -> None:
        """Give those that may seal this round what the chain lacks, again each round until it has it."""
        statements = self.statements.choose(self.head)
        for sealer in self._next_sealers(shape) if statements else ():
            self._effects.append(events.SendStatements(sealer, statements))

    def _next_sealers(self, shape: RoundShape) -> list[bytes]:
        """The peers that may seal this round, without us."""
        sealers = (shape.members[place].peer_id for place in shape.sealer_order[:2])
        return [sealer for sealer in sealers if sealer != self.me]

    def _hand_on_proofs(self, shape: RoundShape) -> None:
        """Give what we found to the peers that may seal this round, again each round until a seal names it."""
        for proof in self.audits.to_hand_on(self.head):
            for sealer in self._next_sealers(shape):
                if sealer != proof.reducer:
                    self._effects.append(events.SendProof(sealer, proof.reducer, proof.encoded))

    def _on_audited(self, event: events.Audited) -> None:
        # Who has said goodbye owes nothing.
        withheld = event.verdict == "withheld" and event.reducer not in self.group.left
        self.audits.conclude(event, owes=withheld)
        self.audits.forget_all_but(self.group.members)
        if event.verdict == "wrong" and self.exchanges.current is not None:
            self._hand_on_proofs(self.exchanges.current.shape)

    def _adopt(self, sealed: SealedRound, state: ChainState, shape: RoundShape) -> None:
        """Move the head over one sealed round that we hold whole."""
        contributed = self.exchanges.sent.get(Key(shape.round, shape.base)) == shape
        self._before = self.head
        self.head = state
        self.forks.adopt(sealed.seal, shape, state)
        self.admissions.note(sealed.seal, shape)
        self._effects.append(events.Apply(sealed, state, shape, shape.index(self.me), contributed))
        self._check_root(sealed.seal)
        exchange = self.exchanges.current
        self.audits.learn(sealed)
        self.audits.forget_all_but(_members_of(state))
        if exchange is not None and exchange.sent_at is not None and exchange.shape == shape and not sealed.seal.solo:
            self._learn_from(sealed.seal, exchange)
            # Of rounds that we took part in, as they are sealed: reducers keep what they summed for a few rounds only.
            self.audits.note_two_replies(exchange.replies, sealed, shape)
            self._note_left_out(exchange, sealed)
            self._effects += self.audits.draw(sealed, shape)

    def _note_left_out(self, exchange: Exchange, sealed: SealedRound) -> None:
        """Count a seal that leaves out work which we hold; say whose, once we accuse its sealer of it (rule 14)."""
        missing = self.audits.note_left_out(exchange.replies, sealed, exchange.shape)
        if missing:
            whose = tuple(exchange.shape.members[i].peer_id for i in sorted(missing))
            self._effects.append(events.LeftOut(sealed.seal.round, sealed.seal.sealer, whose))

    def _learn_from(self, seal: Seal, exchange: Exchange) -> None:
        """What a seal of the round under way says about our deadlines."""
        members = exchange.shape.members
        given_up = 2 * self._deadlines.reply_seconds
        for number, part in enumerate(exchange.shape.parts):
            if part.reducer == exchange.index:
                self._deadlines.observe_own_part(sealed=bool(seal.parts[number]))
            elif not seal.parts[number] and number not in exchange.replies:
                # Given up by the sealer, and by us: it may have been a moment late, or dead.
                self._deadlines.replies.observe(members[part.reducer].peer_id, given_up)
        included = chain.bits(seal.included, len(members))
        self.exchanges.stood_in_late = False
        if exchange.index is not None and members[exchange.index].is_newcomer:
            return  # it hurries, and is waited for less than the others
        if exchange.stood_in_after is not None:
            self._deadlines.stand_in.observe(exchange.index in included, exchange.stood_in_after)
            self.exchanges.stood_in_late = exchange.index not in included
        else:
            self._deadlines.stand_in.observe_ready()
            if included:
                self._deadlines.head_start.observe(exchange.index in included)

    def _check_root(self, seal: Seal) -> None:
        """Resync and say so when our root differs from the sealed one, and more vouch for that one (rule 10).

        A seal says one root, and its sealer may have made it up: it is worth as much as a member's word.
        """
        interval = self.rules.root_interval
        at = chain.root_round(seal.round, interval)
        if not seal.root:
            return
        if self.roots.sealed_round != at:
            self.roots.sealed_round, self.roots.sealers = at, {}
        self.roots.sealers.setdefault(seal.root, set()).add(seal.sealer)
        own = self.roots.own.get(at, seal.root)
        if own == seal.root:
            self.roots.tied_round = -1
            return
        theirs = sorted(self._vouching(at, seal.root) - {self.me})
        ours = self._vouching(at, own) | {self.me}
        # At a tie, once all members have had a turn to seal another root, or when nobody named ours the time before.
        decided = seal.round - at - 2 >= min(len(self.head.now), interval - 1) or self.roots.tied_round == at - interval
        if len(theirs) == len(ours) and not decided:
            self.roots.tied_round = at
        if theirs and (len(theirs) > len(ours) or (len(theirs) == len(ours) and decided)):
            holders = [peer for peer in theirs if self.roots.votes.get(peer) == (at, seal.root)]
            self._want_snapshot((holders or theirs)[0], "our replica differs from the sealed root")

    def _vouching(self, at: int, root: bytes) -> set[bytes]:
        """Peers that sent us this root of this round with a contribution, or named it in a seal."""
        voted = {peer for peer, vote in self.roots.votes.items() if vote == (at, root)}
        return voted | self.roots.sealers.get(root, set())

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
        """Adopt the best seal on our head whose replies and proofs we all hold."""
        exchange = self.exchanges.current
        held = exchange.replies if exchange is not None else {}
        ready = []
        for sealer, waiting in list(self.fetching.waiting.items()):
            named = [(n, digest) for n, digest in enumerate(waiting.heard.seal.parts) if digest]
            if not all(n in held and held[n].digest == digest for n, digest in named):
                continue
            if self.audits.holds(waiting.heard.seal.expelled) is None:
                continue
            included: frozenset[int] = frozenset().union(*(held[n].included for n, _ in named))
            if chain.bitmap(included, len(waiting.heard.seal.rows)) == waiting.heard.seal.included:
                ready.append(waiting.heard)
            else:
                self._effects.append(events.Note("refused", "refused a seal that includes others than its replies do"))
                del self.fetching.waiting[sealer]
        if not ready:
            return
        shape = chain.shape_of(self.head, self.rules.chunks)

        def merit(heard: events.SealHeard) -> tuple[int, int, bytes]:
            return _turn(shape, heard.seal.sealer, solo=heard.seal.solo), -heard.seal.total, heard.id

        best = min(ready, key=merit)
        state = chain.extend(self.head, best.id, best.seal, self.rules.chunks)
        if not self._follows(self.forks.past.head, [Mark.of(state, best.seal)], None, now):
            self._wake(self._seal_expected_from(best.seal.sealer))
            return
        replies = tuple(held[n].data if digest else None for n, digest in enumerate(best.seal.parts))
        proofs = self.audits.holds(best.seal.expelled) or ()
        self._adopt(SealedRound(best.id, best.seal, best.signed, replies, proofs), state, shape)
        self._begin_round(now)

    def _follow_better(self, now: float) -> None:
        """Ask for what a better tip has and we lack (rule 9). Never adopts by itself."""
        fetching = self.fetching
        if fetching.resyncing is not None:
            return
        for donor, fetch in list(fetching.asked.items()):
            if now < fetch.since + FETCH_TIMEOUT_SECONDS:
                self._wake(fetch.since + FETCH_TIMEOUT_SECONDS)
            else:
                del fetching.asked[donor]
                self._shun(donor, now)
        fetching.forgive(now)
        coming = {w.heard.id: self._replies_expected_until(w) for w in fetching.waiting.values()}
        wanted = [tip for tip in sorted(fetching.tips.values(), key=self.forks.merit) if self.forks.wants(tip)]
        fetching.wanted_since = {tip.id: fetching.wanted_since.get(tip.id, now) for tip in wanted}
        if self.exchanges.current is not None and self.exchanges.current.sent_at is not None:
            # What others say of their tip often overtakes the seal, in a large group by all its way down the tree.
            patience = self.rules.seal_timeout_seconds / (2 if relay.relayed(self.group.members) else 4)
            for tip in wanted:
                if tip.round == self.head.round + 1:
                    coming.setdefault(tip.id, fetching.wanted_since[tip.id] + patience)
        for tip in wanted:
            shunned = fetching.shunned.get(tip.peer_id)
            due = max(
                self._may_ask_from(tip.peer_id), coming.get(tip.id, now), now if shunned is None else shunned.until
            )
            if due <= now:
                self._ask(tip.peer_id, now)
            elif due < math.inf:
                self._wake(due)

    def _may_ask_from(self, peer: bytes) -> float:
        return self.fetching.may_ask_from(
            peer,
            stranger=self.forks.is_stranger(peer),
            newcomer=not self.head.round,
            introduced=bool(self.forks.introducers),
        )

    def _replies_expected_until(self, waiting: Waiting) -> float:
        """A seal often overtakes the last reply that it names: until when to wait before asking for the whole round."""
        exchange = self.exchanges.current
        if exchange is None or exchange.sent_at is None:
            return -math.inf
        held = exchange.replies
        if self.audits.holds(waiting.heard.seal.expelled) is None:
            return -math.inf  # proofs come with the whole round alone
        if any(n in held and digest and held[n].digest != digest for n, digest in enumerate(waiting.heard.seal.parts)):
            return -math.inf
        return waiting.at + self.rules.seal_timeout_seconds * ASK_AFTER

    def _ask(self, peer: bytes, now: float) -> None:
        if self._may_ask_from(peer) <= now and self.fetching.resyncing is None:
            self.fetching.asked[peer] = Fetch(now, self.forks.is_stranger(peer))
            self._wake(now + FETCH_TIMEOUT_SECONDS)
            self._effects.append(events.FetchRounds(peer, self.forks.past.locator(LOCATOR_IDS)))

    def _want_snapshot(self, donor: bytes, why: str, shown: tuple[Mark, ...] = ()) -> None:
        if self.fetching.resyncing is None:
            self.forks.shown = shown
            self.fetching.resyncing = donor
            self._effects.append(events.Resync(donor, why))

    def _close_parts(self, now: float) -> None:
        """Freeze the parts whose deadline has come (rule 5)."""
        exchange = self.exchanges.current
        if exchange is None or exchange.index is None or exchange.sent_at is None:
            return
        newcomers = exchange.newcomers
        members = {m.peer_id for m in exchange.shape.members} - newcomers
        for number, part in exchange.reducing.items():
            if part.closed:
                continue
            missing = members - part.received.keys() - self.group.left
            hoped_for = newcomers - part.received.keys() - self.group.left
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

    def _close(self, exchange: Exchange, number: int, part: OwnPart) -> None:
        part.closed = True
        place = {m.peer_id: i for i, m in enumerate(exchange.shape.members)}
        messages = [Contribution(place[p], m.row, m.payload, m.signature) for p, m in part.received.items()]
        in_order = tuple(sorted(messages, key=lambda message: message.member))
        spec = exchange.shape.parts[number]
        self._effects.append(events.Reduce(exchange.key, number, spec.start, spec.end, exchange.shape.group, in_order))
        missing = set(place) - part.received.keys()
        if missing and part.half_at is not None:
            since = self._grace_from(exchange, part.half_at)
            hoped_for = exchange.newcomers & missing
            self.exchanges.missed[exchange.key, number] = Missed(since, missing, hoped_for)

    def _grace_from(self, exchange: Exchange, half_at: float) -> float:
        """When the grace begins: half of the others were heard, and the time to compute is over.

        Messages of weight 0 may come as soon as a round begins; they must not start the clock for those who compute.
        """
        return max(half_at, exchange.computing_since + self._computing_seconds(exchange))

    def _stand_in(self, now: float) -> None:
        """Send a weight-0 message when our trainer is slower than the group, so that we stay a member (rule 3)."""
        exchange = self.exchanges.current
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
            elif self.exchanges.stood_in_late:
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
        exchange = self.exchanges.current
        if exchange is not None and exchange.index is not None and exchange.shape.members[exchange.index].is_newcomer:
            return True
        absent = next((m.absent for m in self.head.following if m.peer_id == self.me), 0)
        return absent == chain.ABSENCES_ALLOWED - 1

    # ---- sealing ----------------------------------------------------------------------------------------------

    def _seal_when_due(self, now: float) -> bool:
        """Seal what we hold when it is our place's turn (rule 6); True when we sealed."""
        exchange = self.exchanges.current
        if exchange is None or self.me in self.head.expelled:
            return False
        if now < self.fetching.hold_seal_until:
            self._wake(self.fetching.hold_seal_until)
            return False
        if not exchange.shape.members:
            if not self._founder or self.head.round:
                return False
            return self._seal(exchange, frozenset(), now, solo=True)
        included = frozenset[int]().union(*(reply.included for reply in exchange.replies.values()))
        if self.fetching.resyncing is not None and included <= {exchange.index}:
            # What we seal alone would make our chain seem worth staying on. With the others we do not hold them up.
            return False
        if exchange.index is None:
            return self._solo_when_alone(exchange, frozenset(), now)
        if exchange.sent_at is None:
            return False
        if exchange.others_awaited and included <= {exchange.index}:
            if self._solo_when_alone(exchange, included, now):
                return True
            if included:
                return False
        known = self._known_seals(exchange)
        if known and now < max(known.values()):
            self._wake(max(known.values()))
            return False
        place = exchange.shape.sealer_order.index(exchange.index)
        due = self._seal_from(exchange) + sum(self._waits_ahead(exchange.shape, place, known))
        if now < due:
            self._wake(due)
            return False
        if place:
            self._effects.append(events.Note("takeover", f"sealing round {exchange.key.round} in place {place}"))
        return self._seal(exchange, included, now, solo=False)

    def _seal_from(self, exchange: Exchange) -> float:
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

    def _known_seals(self, exchange: Exchange) -> dict[bytes, float]:
        """Who has sealed this round already, though we lack replies of it, and until when to wait for these.

        No longer than for its seal, and than replies take, as far as that was learned: a sealer may hand out a seal,
        and never what it names. Where it was only slow its seal wins, because its turn came first.
        """
        members = {member.peer_id: member for member in exchange.shape.members}
        replies = self._deadlines.reply_seconds
        until = {}
        for sealer, waiting in self.fetching.waiting.items():
            if sealer in members and not waiting.heard.seal.solo:
                wait = self._wait_for_sealer(members[sealer])
                fetching = replies if self.fetching.fetches_from_known else 0.0
                until[sealer] = waiting.at + min(wait + fetching, wait * ASK_AFTER + replies)
        return until

    def _solo_when_alone(self, exchange: Exchange, included: frozenset[int], now: float) -> bool:
        """A solo seal, once no member has been heard for `alone_after` (rule 6)."""
        learning = exchange.index is None and self.fetching.asked
        if not self.head.round or learning or self.fetching.fetches_from_known:
            return False
        if not self.head.access.admits(self.me):
            return False  # the owner has shut us out, or we are a guest that no seal has let in yet
        members = exchange.shape.members
        if exchange.index is None:
            # A learner leaves it to those who are members soon, too.
            members += self.head.following
        others = {m.peer_id for m in members} - {self.me}
        # Silence is counted from when the round began, not from before.
        silent_since = max([exchange.started_at, *(at for peer, at in self.group.heard.items() if peer in others)])
        due = silent_since + self.rules.alone_after_seconds
        if exchange.index is None:
            # Members first: a learner waits for one more place.
            due += self.rules.seal_timeout_seconds
        elif others <= self.group.left:
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
        if unfinished:
            return False
        if now < silent_since + self.rules.alone_after_seconds:
            for peer in sorted(others - self.group.left):
                self.admissions.leave_out(peer, now, self.rules.alone_after_seconds)
        return self._seal(exchange, included, now, solo=True)

    def _seal(self, exchange: Exchange, included: frozenset[int], now: float, *, solo: bool) -> bool:
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
        expelled, proofs = self.audits.expulsions(self.head)
        in_turn = not solo and exchange.index == shape.sealer_order[0]
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
            amendments=self.statements.choose(self.head, solo=solo),
            expelled=expelled,
            accused=self.audits.accusation(self.head, shape, expelled) if in_turn else b"",
        )
        listed = {m.peer_id for m in (() if solo else self.head.following)} | {self.me}
        without = chain.extend(self.head, b"", seal, self.rules.chunks)
        listed |= {m.peer_id for m in without.following} | set(without.expelled)
        seal = msgspec.structs.replace(seal, joins=self.admissions.choose(without, listed, now))
        signed: SignedSeal = chain.encode_seal(seal, self._sign)
        sealed = SealedRound(chain.seal_id(signed.body), seal, signed, tuple(replies), proofs)
        self.audits.have_accused(seal.accused)
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
            root for peer, (at, root) in self.roots.votes.items() if peer in members and at == wanted and root
        )
        best = min(votes, key=lambda root: (-votes[root], root), default=b"")
        # A root that few have computed yet is no verdict on the others.
        return best if 2 * votes[best] >= len(shape.members) else b""


def _members_of(state: ChainState) -> frozenset[bytes]:
    """Peer ids of the members of the round under way and of the one after it."""
    return frozenset(member.peer_id for member in state.now + state.following)


def _turn(shape: RoundShape, sealer: bytes, *, solo: bool) -> int:
    """The place of a sealer in a round's order; a solo seal is nobody's turn, and comes last."""
    index = shape.index(sealer)
    return len(shape.members) if solo or index is None else shape.sealer_order.index(index)
