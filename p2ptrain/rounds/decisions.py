"""What a state machine heard last and what it decided, kept small until somebody asks why.

A record is made at each event and costs a few small objects and a checksum of each payload; payloads are kept as their
size and checksum, seals as what they say in short. News that changes nothing does not push older records out. Nothing
becomes text before `Decisions.lines` is called.
"""

from __future__ import annotations

import itertools
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import assert_never

from p2ptrain.chain import Seal
from p2ptrain.chain.admission import Grant, Statement
from p2ptrain.chain.sealed import Key, Reply
from p2ptrain.rounds import events

RECORDS = 256
LISTED = 16
"""As many payloads, contributions or joins of one event or effect are kept; of the others, their number."""
EFFECTS = 32
"""As many effects of one event are kept; of the others, their number."""

NameOf = Callable[[bytes], str]


def short_id(peer_id: bytes) -> str:
    """The last six characters of a peer id in hexadecimal."""
    return peer_id.hex()[-6:]


@dataclass(frozen=True, slots=True)
class _Peer:
    """A peer id, which becomes a name in the text."""

    id: bytes


@dataclass(frozen=True, slots=True)
class _Payload:
    """The size and the checksum of bytes that are not kept."""

    size: int
    checksum: int


@dataclass(frozen=True, slots=True)
class _List:
    """The first values of a sequence, and how many there are."""

    values: tuple[object, ...]
    count: int


@dataclass(frozen=True, slots=True)
class Told:
    """An event or effect in short: a template, and the small values that belong into it."""

    template: str
    values: tuple[object, ...]

    def line(self, name_of: NameOf = short_id) -> str:
        """One readable line."""
        return self.template.format(*(_text(value, name_of) for value in self.values))


@dataclass(slots=True)
class _Record:
    now: float
    event: Told
    effects: tuple[Told, ...] = ()


class Decisions:
    """The last `RECORDS` events of one machine, each with the effects that it led to."""

    def __init__(self) -> None:
        self._records: deque[_Record] = deque(maxlen=RECORDS)
        #: what kind of news the last record is, if it led to nothing: the next of that kind takes its place
        self._repeats: object = None

    def hear(self, event: events.Event | None, now: float) -> None:
        """Note an event before it is handled, so that one that fails is there too; None is the start."""
        kind = _kind_of_news(event)
        if kind is not None and kind == self._repeats:
            self._records.pop()
        self._repeats = kind
        self._records.append(_Record(now, Told("start", ()) if event is None else told(event)))

    def decide(self, effects: Collection[events.Effect]) -> None:
        """Note what the event heard last led to."""
        if effects:
            self._repeats = None
            kept = [told(effect) for effect in itertools.islice(effects, EFFECTS)]
            if len(effects) > EFFECTS:
                kept.append(Told("and {} more effects", (len(effects) - EFFECTS,)))
            self._records[-1].effects = tuple(kept)

    def lines(self, name_of: NameOf = short_id, *, last: int = RECORDS, now: float | None = None) -> list[str]:
        """Tell the last records as text, the oldest first; times are relative to `now`, or as they are."""
        found = []
        for record in tuple(self._records)[-last:]:
            at = record.now if now is None else record.now - now
            found.append(f"{at:9.2f}  {record.event.line(name_of)}")
            found += [f"{'':9}    -> {effect.line(name_of)}" for effect in record.effects]
        return found


def _kind_of_news(event: events.Event | None) -> object:
    """Return the same value for events of which, in a row and without effect, the last is enough; else None."""
    match event:
        case events.Tick(late=False) | events.TipHeard():
            return "tick or tip"
        case _:
            return None


def line(said: events.Event | events.Effect, name_of: NameOf = short_id) -> str:
    """Describe an event or an effect in one readable line."""
    return told(said).line(name_of)


def told(said: events.Event | events.Effect) -> Told:
    """Keep of an event or an effect what one line says of it."""
    values: tuple[object, ...]
    match said:
        case events.ContributionReady():
            return Told("ready for {}: weight {}, {}", (said.key, said.row.weight, _payloads(said.payloads)))
        case events.ContributionReceived():
            values = (_Peer(said.peer_id), said.key, said.part, said.row.weight, _payload(said.payload))
            return Told("contribution of {} to {} part {}: weight {}, {}", values)
        case events.CameLate():
            return Told("contribution of {} to {} part {} came late", (_Peer(said.peer_id), said.key, said.part))
        case events.ReplyHeld():
            return Told("reply of {} part {} held: {}", (said.key, said.part, _reply(said.reply)))
        case events.SealHeard():
            return _seal("seal heard from {}: ", (_Peer(said.source),), said.id, said.seal)
        case events.TipHeard():
            return Told("tip of {}: round {}, total {}, {}", (_Peer(said.peer_id), said.round, said.total, said.id[:3]))
        case events.PeerLeft():
            return Told("{} says goodbye", (_Peer(said.peer_id),))
        case events.JoinReceived():
            return Told("{} asks to join", (_Peer(said.peer_id),))
        case events.StatementHeard():
            return Told("handed: {}", (_statements([said.statement]),))
        case events.RoundsFetched():
            rounds = tuple(sealed.seal.round for sealed in said.rounds)
            known = said.ancestor[:3] if said.ancestor is not None else "nothing that we know"
            return Told("rounds fetched from {}: {} after {}", (_Peer(said.donor), _first(rounds), known))
        case events.FetchFailed():
            return Told("fetching from {} failed", (_Peer(said.donor),))
        case events.Synced():
            return Told("synced to round {} {}", (said.state.round, said.state.id[:3]))
        case events.RootComputed():
            return Told("root of round {} computed: {}", (said.round, said.root[:3]))
        case events.Doubted():
            return Told("the reply of {} part {} points against what we sent", (said.key, said.part))
        case events.Audited():
            return Told("audit of {} ended: {}, {}", (_Peer(said.reducer), said.verdict, said.reply[:3]))
        case events.ProofHeard():
            return Told("proof against {} heard: {} B", (_Peer(said.reducer), len(said.proof)))
        case events.Tick():
            return Told("tick, late" if said.late else "tick", ())
        case events.StartRound():
            values = (said.key, said.index, len(said.shape.members), len(said.shape.parts), f"{said.seconds:.2f}")
            return Told("start {} as member {} of {}, {} parts, in {} s", values)
        case events.StoodIn():
            return Told("stand in for the trainer in {}", (said.key,))
        case events.SendContribution():
            values = (said.key, said.part, _Peer(said.reducer), said.row.weight, _payload(said.payload))
            return Told("send {} part {} to {}: weight {}, {}", values)
        case events.Reduce():
            messages = tuple(f"{one.member}:{one.row.weight}" for one in said.contributions[:LISTED])
            values = (said.key, said.part, _List(messages, len(said.contributions)), len(said.group.peer_ids))
            return Told("reduce {} part {} from member:weight {} of {}", values)
        case events.Audit():
            return Told("audit {} part {} of {}", (said.key, said.part, _Peer(said.reducer)))
        case events.SendProof():
            return Told("hand {} a proof against {}", (_Peer(said.sealer), _Peer(said.reducer)))
        case events.PublishSeal():
            return _seal("publish ", (), said.sealed.id, said.sealed.seal)
        case events.Apply():
            used = ", ours sent" if said.contributed else ""
            return _seal("apply ", (), said.sealed.id, said.sealed.seal, used)
        case events.Rollback():
            return Told("roll back to round {} {}", (said.state.round, said.state.id[:3]))
        case events.FetchRounds():
            return Told("fetch from {} what follows {}", (_Peer(said.donor), _first([i[:3] for i in said.locator])))
        case events.Resync():
            return Told("resync from {}: {}", (_Peer(said.donor), said.why))
        case events.SendJoin():
            return Told("ask {} to admit us", (_Peer(said.sealer),))
        case events.SendStatements():
            return Told("hand {}: {}", (_Peer(said.sealer), _statements(said.statements)))
        case events.LeftOut():
            return Told("{} leaves out {}", (_Peer(said.sealer), _first([_Peer(peer) for peer in said.members])))
        case events.Note():
            return Told("note {}: {}", (said.kind, said.text))
        case _:
            assert_never(said)


def _seal(template: str, values: tuple[object, ...], identifier: bytes, seal: Seal, ending: str = "") -> Told:
    # Counted, not checked: of a seal that was just heard, form and signature alone are known to be right.
    included = sum(byte.bit_count() for byte in seal.included)
    skipped = sum(not digest for digest in seal.parts)
    template += "{}seal {} of round {} by {}: includes {} of {}, total {}{}{}{}"
    more: tuple[object, ...] = (
        "solo " if seal.solo else "",
        identifier[:3],
        seal.round,
        _Peer(seal.sealer),
        included,
        len(seal.rows),
        seal.total,
        f", {skipped} of {len(seal.parts)} parts skipped" if skipped else "",
        f", root {seal.root[:3].hex()}" if seal.root else "",
        ending,
    )
    if seal.joins:
        template, more = template + ", admits {}", (*more, _first([_Peer(join.peer_id) for join in seal.joins]))
    if seal.amendments:
        template, more = template + ", amended: {}", (*more, _statements(seal.amendments))
    if seal.expelled:
        expelled = _first([_Peer(expulsion.peer_id) for expulsion in seal.expelled])
        template, more = template + ", expels {}", (*more, expelled)
    if seal.accused:
        template, more = template + ", accuses {}", (*more, _Peer(seal.accused))
    return Told(template, (*values, *more))


def _statements(statements: Iterable[Statement]) -> _List:
    whole = tuple(statements)
    kept = tuple(
        Told("let in {}", (_Peer(one.guest),)) if isinstance(one, Grant) else Told("shut out {}", (_Peer(one.subject),))
        for one in whole[:LISTED]
    )
    return _List(kept, len(whole))


def _first(values: Iterable[object]) -> _List:
    whole = tuple(values)
    return _List(whole[:LISTED], len(whole))


def _payload(payload: bytes) -> _Payload:
    return _Payload(len(payload), zlib.crc32(payload))


def _payloads(payloads: tuple[bytes, ...]) -> _List:
    return _List(tuple(_payload(payload) for payload in payloads[:LISTED]), len(payloads))


def _reply(reply: Reply) -> _List:
    return _first([f"{len(reply.data)} B", reply.digest[:3], f"{len(reply.included)} included"])


def _text(value: object, name_of: NameOf) -> str:
    match value:
        case _Peer():
            return name_of(value.id)
        case Told():
            return value.line(name_of)
        case _Payload():
            return f"{value.size} B {value.checksum:08x}" if value.size else "empty"
        case _List():
            if not value.count:
                return "nothing"
            more = value.count - len(value.values)
            return " ".join([*(_text(one, name_of) for one in value.values), *([f"and {more} more"] if more else [])])
        case Key():
            return f"{value.round}@{value.base.hex()[:6]}"
        case bytes():
            return value.hex() or "none"
        case _:
            return str(value)
