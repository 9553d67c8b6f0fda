"""Several round machines in one process, on a clock that a test moves: messages, delays, deaths and cut links.

The machines are the real ones; replies are bytes that name the members whose messages went in, so a test can tell
whose work a seal used. Everything is in order of (time, sequence): one scenario has one history.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, assert_never

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2ptrain import chain
from p2ptrain.chain import ChainState, Row
from p2ptrain.chain.sealed import Key, Reply, SealedRound
from p2ptrain.rounds import events
from p2ptrain.rounds.decisions import short_id
from p2ptrain.rounds.machine import RoundMachine
from p2ptrain.rounds.rules import RoundRules
from p2ptrain.swarm.identity import Identity, verify

RUN_ID = hashlib.sha256(b"run").digest()
DELAY = 0.05
RULES: dict[str, Any] = {
    "chunks": 24,
    "target_batch": 16,
    "min_seconds": 1.0,
    "max_seconds": 4.0,
    "fixed_pace": False,
    "overlap": False,
    "round_max_seconds": 10.0,
    "grace_seconds": 1.0,
    "reply_timeout_seconds": 3.0,
    "seal_timeout_seconds": 2.0,
    "alone_after_seconds": 6.0,
    "root_interval": 1000,
    "last_round": 0,
    # What the trainers here send are no payloads, so there is nothing to repeat.
    "audits_a_part": 0.0,
    "weight_cap_ratio": 4.0,
}


class Peer:
    """One machine with a model of its trainer, its disk and its servicer."""

    def __init__(self, cluster: Cluster, name: str, state: ChainState, *, founder: bool, dialable: bool) -> None:
        self.cluster, self.name = cluster, name
        self.identity = identity_of(name)
        row = Row(0, 0, 1000 if dialable else 0)
        rules = RoundRules(**(RULES | cluster.rules))
        self.machine = RoundMachine(self.identity.peer_id, rules, state, self.identity.sign, row, founder=founder)
        self.alive = True
        #: sealed rounds applied, and the chain state after each; the genesis first
        self.states: list[ChainState] = [state]
        self.rounds: list[SealedRound] = []
        self.notes: list[events.Note] = []
        self.resyncs: list[events.Resync] = []
        self.rollbacks = 0
        self.contributed: list[tuple[int, bool]] = []
        self.refused: list[str] = []
        #: factor on the time that the trainer takes; None: it never hands anything over
        self.slowness: float | None = 1.0
        #: the round that the trainer computes for, until it hands over or is too late
        self._current: events.StartRound | None = None
        #: it is in the middle of what it computes, which no message interrupts
        self._busy = False
        #: it has finished something too late for its round
        self._in_hand = False
        #: dies after this many more replies have left
        self.replies_left: int | None = None
        #: rounds that it has sent for, as the own log keeps them
        self.sent: set[Key] = set()
        self.frozen: dict[tuple[Key, int], Reply] = {}
        self._waiting: dict[tuple[Key, int], list[Peer]] = {}
        self.do(self.machine.start(cluster.now))

    @property
    def id(self) -> bytes:
        return self.identity.peer_id

    @property
    def head(self) -> ChainState:
        return self.machine.head

    def hears(self, event: events.Event) -> None:
        if self.alive:
            effects = self.machine.handle(event, self.cluster.now)
            self.machine.check_invariants()
            if self.cluster.listener is not None:
                self.cluster.listener(self, event, effects)
            self.do(effects)

    def later(self, seconds: float, event: events.Event) -> None:
        self.cluster.at(seconds, lambda: self.hears(event))

    def do(self, effects: list[events.Effect]) -> None:
        for effect in effects:
            if self.alive:
                self._perform(effect)
        wake = self.machine.wake_at
        if wake is not None:
            due = max(0.0, wake - self.cluster.now)
            # Only the newest alarm counts, as with a timer that is set anew.
            self.cluster.at(due, lambda: self.hears(events.Tick()) if self.machine.wake_at == wake else None)

    def _perform(self, effect: events.Effect) -> None:
        match effect:
            case events.StartRound():
                self._train(effect)
            case events.StoodIn():
                self._current = None
            case events.SendContribution():
                self._deliver(effect)
            case events.Reduce():
                self._reduce(effect)
            case events.Apply():
                assert effect.sealed.seal.parent == self.states[-1].id
                self.states.append(effect.state)
                self.rounds.append(effect.sealed)
                if self._current is not None and self._current.key.round <= self.rounds[-1].seal.round:
                    self._current = None
                self.contributed.append((effect.sealed.seal.round, effect.contributed))
                self.cluster.tell_all(self, events.TipHeard(self.id, self.head.round, self.head.id, self.head.total))
            case events.PublishSeal():
                sealed = effect.sealed
                assert chain.open_seal(sealed.signed, verify) == (sealed.id, sealed.seal)
                self.cluster.tell_all(self, events.SealHeard(sealed.id, sealed.seal, sealed.signed, self.id))
            case events.Rollback():
                self.rollbacks += 1
                self.states.pop()
                self.rounds.pop()
                assert self.states[-1] == effect.state
            case events.FetchRounds():
                self._fetch(effect)
            case events.Resync():
                self.resyncs.append(effect)
                self._resync(effect.donor)
            case events.SendJoin():
                join = events.JoinReceived(self.id, self.machine.row)
                self.cluster.send(self, effect.sealer, lambda sealer: sealer.hears(join))
            case events.SendStatements():
                for statement in effect.statements:
                    self.cluster.send(self, effect.sealer, partial(Peer.hears, event=events.StatementHeard(statement)))
            case events.Note():
                self.notes.append(effect)
            case _:
                assert_never(effect)

    def _train(self, start: events.StartRound) -> None:
        """What the trainer does: who did not finish for one round goes on, and hands over in a later one."""
        self._current = start
        if start.key in self.sent or self._in_hand:
            self._hand_over()
        elif not self._busy and self.slowness is not None:
            self._busy = True
            self.cluster.at(start.seconds * self.slowness, self._finish)

    def _finish(self) -> None:
        self._busy, self._in_hand = False, True
        if self.alive:
            self._hand_over()

    def _hand_over(self) -> None:
        start, self._current = self._current, None
        if start is None:
            return
        self._in_hand = False
        self.sent.add(start.key)
        payloads = tuple(f"{self.name}/{start.key.round}/{n}".encode() for n in range(len(start.shape.parts)))
        self.later(0.0, events.ContributionReady(start.key, Row(4, 16_000, self.machine.row.uplink_kbit), payloads))

    def _deliver(self, message: events.SendContribution) -> None:
        """Send, and again until the reply is there or the round is over."""
        if self.machine.exchange_key != message.key or self.machine.held_reply(message.key, message.part):
            return
        self.cluster.send(self, message.reducer, lambda reducer: reducer.receives(self, message))
        self.cluster.at(1.0, lambda: self._deliver(message) if self.alive else None)

    def receives(self, sender: Peer, message: events.SendContribution) -> None:
        """What the servicer does with a contribution."""
        root = sender.machine.newest_root
        said = message.payload, message.signature
        event = events.ContributionReceived(message.key, message.part, sender.id, message.row, *root, *said)
        reason = self.machine.refusal(message.key, message.part, sender.id)
        if reason is None:
            self.hears(event)
        elif reason == "late":
            self.hears(events.CameLate(message.key, message.part, sender.id))
        elif reason != "twice":
            self.refused.append(reason)
            return
        self._answer(sender, message.key, message.part)

    def _answer(self, sender: Peer, key: Key, part: int) -> None:
        reply = self.frozen.get((key, part))
        if reply is None:
            self._waiting.setdefault((key, part), []).append(sender)
            return
        if self.replies_left is not None:
            if self.replies_left == 0:
                self.cluster.kill(self)
                return
            self.replies_left -= 1
        self.cluster.send(self, sender.id, lambda s: s.hears(events.ReplyHeld(key, part, reply)))

    def _reduce(self, effect: events.Reduce) -> None:
        members = [sent.member for sent in effect.contributions]
        data = json.dumps([members, [sent.payload.decode() for sent in effect.contributions]]).encode()
        reply = Reply(hashlib.sha256(data).digest(), frozenset(members), data)
        self.frozen[effect.key, effect.part] = reply
        self.later(0.0, events.ReplyHeld(effect.key, effect.part, reply))
        for sender in self._waiting.pop((effect.key, effect.part), []):
            self._answer(sender, effect.key, effect.part)

    def _fetch(self, effect: events.FetchRounds) -> None:
        donor = self.cluster.by_id[effect.donor]
        if not self.cluster.connected(self, donor):
            self.later(DELAY, events.FetchFailed(effect.donor))
            return

        def answer() -> None:
            ids = [state.id for state in donor.states]
            known = next((i for i in effect.locator if i in ids), None)
            rounds = tuple(donor.rounds[ids.index(known) :]) if known is not None else ()
            self.later(DELAY, events.RoundsFetched(effect.donor, known, rounds))

        self.cluster.at(DELAY, answer)

    def _resync(self, donor_id: bytes) -> None:
        donor = self.cluster.by_id[donor_id]

        def switch() -> None:
            if not self.cluster.connected(self, donor):
                self.hears(events.FetchFailed(donor_id))
                return
            self.states, self.rounds = list(donor.states), list(donor.rounds)
            self.hears(events.Synced(donor.head))

        self.cluster.at(4 * DELAY, switch)


made: list[Cluster] = []
"""The clusters of the test under way, whose decisions are printed when it fails."""


class Cluster:
    """All peers of a scenario."""

    def __init__(self, **rules: Any) -> None:
        self.rules = rules
        self.now = 100.0
        self.peers: list[Peer] = []
        self.by_id: dict[bytes, Peer] = {}
        self.cut: set[frozenset[bytes]] = set()
        #: seconds that a message from one peer to another takes
        self.delay: Callable[[Peer, Peer], float] = lambda sender, receiver: DELAY
        #: hears of every event and what it led to, before that is done
        self.listener: Callable[[Peer, events.Event, list[events.Effect]], None] | None = None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        self.at(1.0, self._heartbeat)
        made.append(self)

    def add(self, name: str, *, founder: bool = False, dialable: bool = True) -> Peer:
        peer = Peer(self, name, chain.genesis(RUN_ID), founder=founder, dialable=dialable)
        self.peers.append(peer)
        self.by_id[peer.id] = peer
        return peer

    def group(self, count: int, *, names: Sequence[str] = "abcdefgh", **options: Any) -> list[Peer]:
        """A founder and others, all of them members."""
        peers = [self.add(names[0], founder=True)]
        self.run(3)
        peers += [self.add(name, **options) for name in names[1:count]]
        reducers = count if options.get("dialable", True) else 1

        def settled() -> bool:
            shapes = [peer.machine.shape for peer in peers]
            return all(s and len(s.members) == count and len(s.parts) == reducers for s in shapes)

        self.until(settled, 60)
        return peers

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._sequence), action))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, action = heapq.heappop(self._queue)
            action()
        self.now = end

    def until(self, condition: Callable[[], bool], seconds: float) -> float:
        """Run until the condition holds; returns how long it took."""
        began = self.now
        while not condition():
            assert self._queue and self._queue[0][0] <= began + seconds, f"not within {seconds} s"
            self.now, _, action = heapq.heappop(self._queue)
            action()
        return self.now - began

    def connected(self, one: Peer, other: Peer) -> bool:
        return one.alive and other.alive and frozenset((one.id, other.id)) not in self.cut

    def send(self, sender: Peer, to: bytes, action: Callable[[Peer], None]) -> None:
        receiver = self.by_id[to]

        def arrive() -> None:
            if self.connected(sender, receiver) or (receiver.alive and not sender.alive):
                action(receiver)

        if self.connected(sender, receiver):
            self.at(self.delay(sender, receiver), arrive)

    def tell_all(self, sender: Peer, event: events.Event) -> None:
        for peer in self.peers:
            if peer is not sender:
                self.send(sender, peer.id, lambda p: p.hears(event))

    def decisions(self, last: int = 12) -> str:
        """What every peer heard and decided last, with seconds before now."""
        told = []
        for peer in self.peers:
            told += [f"{peer.name}:", *peer.machine.decisions.lines(self.name_of, last=last, now=self.now)]
        return "\n".join(told)

    def name_of(self, peer_id: bytes) -> str:
        """The name of a peer, for text."""
        return self.by_id[peer_id].name if peer_id in self.by_id else short_id(peer_id)

    def kill(self, peer: Peer) -> None:
        peer.alive = False

    def leave(self, peer: Peer) -> None:
        """A clean goodbye."""
        self.tell_all(peer, events.PeerLeft(peer.id))
        self.run(DELAY * 2)
        peer.alive = False

    def split(self, *sides: list[Peer]) -> None:
        """Cut every link between the sides."""
        for one, other in itertools.combinations(sides, 2):
            self.cut |= {frozenset((a.id, b.id)) for a in one for b in other}

    def heal(self) -> None:
        self.cut.clear()

    def one_chain(self, *peers: Peer) -> bool:
        """Whether these peers' chains are one, up to a seal on its way."""
        shortest = min(len(p.states) for p in peers)
        return (
            len({p.states[shortest - 1].id for p in peers}) == 1 and max(len(p.states) for p in peers) <= shortest + 1
        )

    def check(self) -> None:
        """Every chain is a gapless path, and one state id is one chain state."""
        known: dict[bytes, ChainState] = {}
        for peer in self.peers:
            state = peer.states[0]
            for sealed, expected in zip(peer.rounds, peer.states[1:], strict=True):
                state = chain.extend(state, sealed.id, sealed.seal, peer.machine.rules.chunks)
                assert state == expected
                assert known.setdefault(state.id, state) == state
            assert state == peer.head

    def _heartbeat(self) -> None:
        for peer in self.peers:
            if peer.alive:
                self.tell_all(peer, events.TipHeard(peer.id, peer.head.round, peer.head.id, peer.head.total))
        self.at(1.0, self._heartbeat)


def identity_of(name: str) -> Identity:
    """The same for the same name, so that ties between ids fall the same way in each run."""
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
    return Identity(bytes.fromhex("002408011220") + key.public_key().public_bytes_raw(), key)


def roots(peer: Peer, round: int, root: bytes) -> None:
    """The peer's trainer hashed its replica."""
    peer.hears(events.RootComputed(round, root))
