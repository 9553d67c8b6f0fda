"""Which sealed replies we audit, what came of it, and what our next seal says of it (docs/rounds.md, rule 14).

Whom we audit nobody else can know before we ask: each member draws by a signature of its own over the seal, which it
shows to nobody. So neither a reducer nor a sealer can lie where nobody looks, or make up seals until the draw suits it.

An audit ends in one of three ways. The reply is right. Or it is wrong: then we hold a proof, which convicts its reducer
before everybody, and whoever seals next names it. Or the reducer does not show what it summed: that proves nothing, as
it may have crashed since, or the line is bad, or we lie. Our next seal in turn accuses it then, and all who adopt that
seal audit a part of the accused in each round until it answers them: so all soon accuse one that withholds.
An accusation costs the accuser as many strikes as the accused, and takes that it has none (`chain.state.may_accuse`).

A sealer that leaves work out is accused, too: one that has sealed without most reducers' replies, though we held them,
in each of its last `LEFT_OUT` seals. Replies carry the signed messages of those whose work is left out, so everybody
who got them sees it. No one reducer can bring that about by keeping its replies from the sealer.

Memory: `PROOFS_KEPT` proofs, and a few peer ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from p2ptrain import chain
from p2ptrain.chain import ChainState, Expulsion, RoundShape
from p2ptrain.chain.seal import proof_digest
from p2ptrain.chain.sealed import Key, Reply, SealedRound, reply_digest
from p2ptrain.chain.state import STRIKES_MAX, may_accuse
from p2ptrain.rounds import events

UNDER_WAY_MAX = 8
A_REDUCER_MAX = 2
"""Parts of one reducer that one member draws in a round; a reducer shows it one more, that it doubts."""
BELIEVED_MAX = 10_000
"""Rounds for which a reducer is believed, at most."""
PROOFS_KEPT = 8
LEFT_OUT = 3
"""Seals in a row without most replies that we held, after which we accuse their sealer: lines fail now and then."""
SUSPECTS_MAX = 64
_LOTS = 2**64


class HeldProof(NamedTuple):
    """A proof that convicts."""

    reducer: bytes
    encoded: bytes
    #: we found it, and hand it on until a seal names it
    found: bool


@dataclass(slots=True)
class Audits:
    """What we know of reducers; see the module docstring.

    No suspect, nobody who owes us an answer, and nobody that a proof of ours convicts is ourselves.
    """

    me: bytes
    sign: Callable[[bytes], bytes]
    #: expected audits of each part of a round, by all members together
    audits_a_part: float
    #: digests of the replies being audited
    under_way: set[bytes] = field(default_factory=set)
    #: reducers that have not answered us lately, or that a seal accuses and we have not heard yet
    suspects: set[bytes] = field(default_factory=set)
    #: reducers that our next seal in turn accuses, the first first
    owing: dict[bytes, None] = field(default_factory=dict)
    #: sealer -> how many of its last seals, in a row, left out most replies that we held
    left_out: dict[bytes, int] = field(default_factory=dict)
    #: reducer -> round from which on we may doubt a reply of it again
    believed_until: dict[bytes, int] = field(default_factory=dict)
    #: digest -> proof, the latest at the end
    proofs: dict[bytes, HeldProof] = field(default_factory=dict)

    def draw(self, sealed: SealedRound, shape: RoundShape) -> list[events.Audit]:
        """Return which replies of a round that we took part in we audit now."""
        others: dict[bytes, int] = {}
        drawn: list[events.Audit] = []
        seed = hashlib.sha256(b"p2ptrain lots 1\0" + self.sign(_to_draw(sealed.id))).digest()
        lots = [_lot(seed, number) for number in range(len(shape.parts))]
        chance = int(self.audits_a_part / len(shape.members) * _LOTS)
        # A suspect's first part by lot is always audited.
        for number in sorted(range(len(lots)), key=lots.__getitem__):
            reducer, reply = shape.members[shape.parts[number].reducer].peer_id, sealed.replies[number]
            asked = others.get(reducer, 0)
            wanted = lots[number] < chance or (reducer in self.suspects and not asked)
            if reducer == self.me or reply is None or not wanted or asked == A_REDUCER_MAX:
                continue
            digest = reply_digest(reply)
            if digest not in self.under_way and len(self.under_way) < UNDER_WAY_MAX:
                others[reducer] = asked + 1
                self.under_way.add(digest)
                drawn.append(events.Audit(Key(shape.round, shape.base), number, shape, reducer, reply))
        return drawn

    def doubt(self, event: events.Doubted, members: Collection[bytes]) -> list[events.Audit]:
        """Return the audit of a reply that our trainer doubts.

        There is none if its reducer has left `members`, or if we doubted another reply of it a short while ago: so
        doubts cost at most what lots do, even where somebody makes right replies look wrong.
        """
        shape = event.shape
        reducer, digest = shape.members[shape.parts[event.part].reducer].peer_id, reply_digest(event.reply)
        busy = digest in self.under_way or len(self.under_way) >= UNDER_WAY_MAX
        if busy or reducer == self.me or reducer not in members or not self.audits_a_part:
            return []
        if event.key.round < self.believed_until.get(reducer, 0):
            return []
        self.believed_until[reducer] = event.key.round + int(min(len(shape.members) / self.audits_a_part, BELIEVED_MAX))
        self.under_way.add(digest)
        return [events.Audit(event.key, event.part, shape, reducer, event.reply)]

    def note_two_replies(self, held: dict[int, Reply], sealed: SealedRound, shape: RoundShape) -> None:
        """Accuse reducers that gave us another reply than the sealed one.

        It convicts nobody: a reducer that crashed, or came back to the round from another branch, makes a second one.
        """
        for number, reply in held.items():
            reducer, digest = shape.members[shape.parts[number].reducer].peer_id, sealed.seal.parts[number]
            if reducer != self.me and digest not in (b"", reply.digest):
                self._accuse(reducer)

    def note_left_out(self, held: dict[int, Reply], sealed: SealedRound, shape: RoundShape) -> frozenset[int]:
        """Count a seal that lacks most reducers' replies, though we hold them; return whose work we accuse it for."""
        sealer = sealed.seal.sealer
        lacking = {n: reply for n, reply in held.items() if reply.included and not sealed.seal.parts[n]}
        others = {shape.parts[n].reducer for n in range(len(shape.parts))} - {shape.index(sealer)}
        lost = {shape.parts[n].reducer for n in lacking} & others
        if sealer == self.me or 2 * len(lost) <= len(others) or lost == {shape.index(self.me)}:
            self.left_out.pop(sealer, None)
            return frozenset()
        self.left_out[sealer] = min(self.left_out.get(sealer, 0) + 1, LEFT_OUT)
        if self.left_out[sealer] < LEFT_OUT:
            return frozenset()
        included = chain.bits(sealed.seal.included, len(shape.members))
        return frozenset[int]().union(*(reply.included for reply in lacking.values())) - included

    def conclude(self, event: events.Audited, *, owes: bool) -> None:
        """Take note of how an audit ended.

        Args:
            owes: whether a reducer that withheld what it summed is there to be blamed.
        """
        self.under_way.discard(event.reply)
        match event.verdict:
            case "right":
                self.suspects.discard(event.reducer)
                self.owing.pop(event.reducer, None)
            case "withheld" if owes:
                self._accuse(event.reducer)
                self._suspect(event.reducer)
            case "withheld" | "skipped":
                pass
            case "wrong":
                self.keep(event.reducer, event.proof, found=True)

    def _suspect(self, peer: bytes) -> None:
        if peer != self.me and len(self.suspects) < SUSPECTS_MAX:
            self.suspects.add(peer)

    def _accuse(self, peer: bytes) -> None:
        if len(self.owing) < SUSPECTS_MAX:
            self.owing[peer] = None

    def keep(self, reducer: bytes, encoded: bytes, *, found: bool) -> None:
        """Keep a proof that was checked."""
        digest = proof_digest(encoded)
        if reducer == self.me or digest in self.proofs:
            return
        self.proofs[digest] = HeldProof(reducer, encoded, found)
        while len(self.proofs) > PROOFS_KEPT:
            del self.proofs[next(iter(self.proofs))]

    def learn(self, sealed: SealedRound) -> None:
        """Take note of whom a round that we adopt accuses, and keep its proofs: a fork may undo it, and another branch
        need them."""
        if sealed.seal.accused:
            self._suspect(sealed.seal.accused)
        for named, encoded in zip(sealed.seal.expelled, sealed.proofs, strict=True):
            self.keep(named.peer_id, encoded, found=False)

    def forget_all_but(self, members: Collection[bytes]) -> None:
        """Forget suspicions of peers that are no members."""
        self.suspects &= set(members)
        self.believed_until = {peer: until for peer, until in self.believed_until.items() if peer in members}
        self.owing = {peer: None for peer in self.owing if peer in members}
        self.left_out = {peer: count for peer, count in self.left_out.items() if peer in members}

    def to_hand_on(self, head: ChainState) -> list[HeldProof]:
        """Return the proofs that we found and that no seal of this chain names."""
        members = {member.peer_id for member in head.following}
        return [proof for proof in self.proofs.values() if proof.found and proof.reducer in members]

    def expulsions(self, head: ChainState) -> tuple[tuple[Expulsion, ...], tuple[bytes, ...]]:
        """Return whom a seal of ours after `head` expels, and the proofs."""
        members = {member.peer_id for member in head.following}
        chosen: dict[bytes, tuple[Expulsion, bytes]] = {}
        for digest, proof in self.proofs.items():
            if proof.reducer in members and len(chosen) < chain.PROOFS_MAX:
                chosen.setdefault(proof.reducer, (Expulsion(proof.reducer, digest), proof.encoded))
        return tuple(named for named, _ in chosen.values()), tuple(encoded for _, encoded in chosen.values())

    def accusation(self, head: ChainState, shape: RoundShape, expelled: Sequence[Expulsion]) -> bytes:
        """Return whom a seal of ours in turn accuses; empty: nobody, also where an accusation would change nothing."""
        if not may_accuse(head, self.me):
            return b""
        strikes = {member.peer_id: member.strikes for member in head.following}
        named = {expulsion.peer_id for expulsion in expelled}
        for peer in [*self.owing, *(sealer for sealer, seals in self.left_out.items() if seals == LEFT_OUT)]:
            there = shape.index(peer) is not None and strikes.get(peer, STRIKES_MAX) < STRIKES_MAX
            if there and peer not in named:
                return peer
        return b""

    def have_accused(self, peer: bytes) -> None:
        """Take note that a seal of ours says so; one accusation for each reason."""
        self.owing.pop(peer, None)
        self.left_out.pop(peer, None)

    def holds(self, expelled: Sequence[Expulsion]) -> tuple[bytes, ...] | None:
        """Return the proofs that a seal names, if we hold them all and they convict whom it expels."""
        held = [self.proofs.get(named.proof) for named in expelled]
        if any(proof is None or proof.reducer != named.peer_id for proof, named in zip(held, expelled, strict=True)):
            return None
        return tuple(proof.encoded for proof in held if proof is not None)

    def invariants(self, members: Collection[bytes]) -> Iterator[tuple[str, bool]]:
        """Yield what must hold between two events, and whether it does."""
        yield "audits under way are bounded", len(self.under_way) <= UNDER_WAY_MAX
        yield "proofs are bounded", len(self.proofs) <= PROOFS_KEPT
        yield "whom we believe is a member", self.believed_until.keys() <= set(members)
        yield "suspects are members", self.suspects <= set(members)
        yield "who owes us an answer is a member", self.owing.keys() <= set(members)
        yield "who leaves work out is a member", self.left_out.keys() <= set(members)
        ours = [
            self.me in self.suspects,
            self.me in self.owing,
            self.me in self.left_out,
            any(p.reducer == self.me for p in self.proofs.values()),
        ]
        yield "we suspect, accuse and convict others alone", not any(ours)


def _to_draw(seal: bytes) -> bytes:
    return hashlib.sha256(b"p2ptrain draw 1\0" + seal).digest()


def _lot(seed: bytes, part: int) -> int:
    """A number below `_LOTS`."""
    return int.from_bytes(hashlib.sha256(seed + part.to_bytes(4, "little")).digest()[:8], "little")
