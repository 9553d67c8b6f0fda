"""Which chain this peer stands on: what it knows of others for the judgement, and the judgement (rule 9).

`chain/forks.py` judges two branches by the peers behind each. Here is kept who these peers are: whom this peer knows,
where each says that it stands, and the members of the last state that it shared with anybody. Pure, like the state
machine that asks: `now` is the caller's.

Memory: `PAST_MAX` marks of our chain, `KNOWN_MAX` former members, `VOICE_IDS` states of each peer that is known.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from p2ptrain import chain
from p2ptrain.chain import ChainState, RoundShape, Seal, SealError, forks
from p2ptrain.chain.forks import Branch, Mark, Past
from p2ptrain.chain.sealed import SealedRound
from p2ptrain.rounds import events

PARTED_MAX = 64  # donors whose chain parted from ours at a state that they named
KNOWN_MAX = 256  # former members whose word on forks still counts
VOICE_IDS = 4  # the last states that a peer said it stands at: the newest may be ahead of us


class Voice(NamedTuple):
    """Where a peer says that it stands."""

    #: the ids it said last, the newest at the end
    ids: deque[bytes]
    at: float


class Judgement(NamedTuple):
    """Whether to follow a chain, and why not."""

    follow: bool
    why: str = ""


FOLLOW = Judgement(follow=True)


class ForkChoice:
    """Judges chains for one peer.

    We know all members and the last `KNOWN_MAX` that were members before; what they say of where they stand counts in
    forks. Proven are those of them that a seal has included.

    Args:
        me: our peer id.
        alone_after_seconds: how long what a peer says counts.
        past: marks of our chain, the head's at the end.
        company: members of the last state that we shared with another peer, before this start.
        introducers: peers whose addresses a person gave us.
    """

    def __init__(
        self,
        me: bytes,
        alone_after_seconds: float,
        past: Sequence[Mark],
        company: frozenset[bytes],
        introducers: Collection[bytes],
    ) -> None:
        self.me = me
        self._counts_seconds = alone_after_seconds
        #: the chain up to the head
        self.past = Past(past)
        self.introducers = frozenset(introducers) - {me}
        #: introducers to whose chain we have gone over, or who handed it to us
        self.tried: set[bytes] = set()
        #: members of the last state that we shared with another peer
        self.company = company or self.past.head.members
        #: nothing was adopted since the start: others may have gone on for long
        self.returning = True
        #: peer that is or was a member, without us, the latest at the end -> the last state of ours that it shared
        self.known: dict[bytes, Mark] = {}
        self._know_members_of(past)
        # At which state they were is not remembered, so any that is heard of counts as later.
        met = self.past.head._replace(round=-1, members=self.company)
        self.known.update((peer, met) for peer in sorted(self.company - {me}) if peer not in self.known)
        #: donor -> the state of ours that its chain went through last, as it said; the latest at the end
        self.parted: dict[bytes, Mark] = {}
        #: those that we know and a seal has included
        self.proven: set[bytes] = set(self.company - {me})
        #: of the chain that is being fetched, from a state of ours on, by its seals; none: it is judged without
        self.shown: tuple[Mark, ...] = ()
        #: peer that we know, or whose address we were given -> where it says that it stands
        self.voices: dict[bytes, Voice] = {}

    # ---- what is heard and adopted ------------------------------------------------------------------------------

    def is_stranger(self, peer: bytes) -> bool:
        """Whether a peer is none that has been in a round with us, nor one whose address we were given."""
        return peer not in self.proven and peer not in self.introducers

    def note_tip(self, tip: events.TipHeard, now: float) -> None:
        """Hear where a peer says that it stands."""
        if tip.peer_id not in self.known and tip.peer_id not in self.introducers:
            return
        mark = self.past.get(tip.id)
        if not tip.round or (mark is not None and not mark.round):
            return  # at the beginning, which all chains share: it has chosen none
        if mark is not None and tip.peer_id in self.known and mark.round > self.known[tip.peer_id].round:
            self.known[tip.peer_id] = mark
        said = self.voices.get(tip.peer_id)
        ids = said.ids if said is not None else deque[bytes](maxlen=VOICE_IDS)
        if not ids or ids[-1] != tip.id:
            ids.append(tip.id)
        self.voices[tip.peer_id] = Voice(ids, now)

    def know_only(self, group: frozenset[bytes]) -> None:
        """Know the members `group`, and of those that were members before the latest."""
        for peer in sorted(group - {self.me}):
            self.known[peer] = self.known.pop(peer, self.past.head)
        while len(self.known) > KNOWN_MAX + len(group):
            del self.known[next(iter(self.known))]
        self.proven = (self.proven | self.past.head.members) & self.known.keys()
        heard_of = self.known.keys() | self.introducers
        self.voices = {peer: voice for peer, voice in self.voices.items() if peer in heard_of}

    def note_parting(self, donor: bytes, identifier: bytes) -> Mark | None:
        """Hear at which state a donor's chain parted from ours; None where that is our head, or we do not know it.

        A donor that has shared a later state with us parted from us there or later: it names no other to be judged by.
        """
        mark = self.past.get(identifier)
        shared = self.known.get(donor)
        if mark is not None and shared is not None and shared.round > mark.round:
            mark = self.past.get(shared.id)
        self.parted.pop(donor, None)
        if mark is None or mark is self.past.head:
            return None
        self.parted[donor] = mark
        while len(self.parted) > PARTED_MAX:
            del self.parted[next(iter(self.parted))]
        return mark

    def parted_from(self, donor: bytes) -> Mark | None:
        """Return the state at which a donor's chain parted from ours, where it named one that ours still has."""
        mark = self.parted.get(donor)
        return None if mark is None else self.past.get(mark.id)

    def shown_fork(self, shown: Sequence[Mark], tip: bytes) -> tuple[Mark, list[Mark]] | None:
        """Return the last state of ours that a chain goes through whose marks were shown, and those after it.

        None: they do not reach its tip, so they may be of an honest chain that the donor's only begins with.
        """
        ids = [mark.id for mark in shown]
        common = self.past.last_common(ids)
        if common is None or tip not in ids[common + 1 :]:
            return None
        return self.past[ids[common]], list(shown[common + 1 :])

    def joined(self, marks: Sequence[Mark]) -> Sequence[Mark]:
        """Return marks of a chain that was fetched after what was shown of it before, if it goes through that."""
        places = {mark.id: place for place, mark in enumerate(self.shown)}
        first = next((n for n, mark in enumerate(marks) if mark.id in places), None)
        if first is None:
            return marks
        return [*self.shown[: places[marks[first].id] + 1], *marks[first + 1 :]]

    def adopt(self, seal: Seal, shape: RoundShape, state: ChainState) -> None:
        """Go one seal further.

        Whose work is in a round was on our chain at its base; who sealed it, at the state before it.
        """
        base, head = self.past.get(shape.base), self.past.head
        there = {shape.members[index].peer_id: base for index in chain.bits(seal.included, len(shape.members))}
        there[seal.sealer] = head
        newest: Mark | None = None
        for peer, mark in there.items():
            if peer != self.me and mark is not None:
                newest = mark if newest is None or mark.round > newest.round else newest
                if peer in self.known and mark.round > self.known[peer].round:
                    self.known[peer] = mark
        if newest is not None:
            self.company = newest.members
        self.past.append(Mark.of(state, seal, head))
        self.returning = False

    def go_over_to(self, marks: Sequence[Mark], donor: bytes) -> None:
        """Take over a chain that was loaded: it goes through these states, the last of which is the head."""
        self.returning = False
        marks, self.shown = self.joined(marks), ()
        common = self.past.last_common([mark.id for mark in marks])
        parted_at = self.parted_from(donor)
        if common is not None:
            self.past.cut(marks[common].id)
            marks = marks[common + 1 :]
        elif parted_at is not None:
            # With a gap, but what is before it is what others who know that chain may yet remember, too.
            self.past.cut(parted_at.id)
        else:
            self._forget_shared_since(self.known.get(donor))
            self.past = Past(marks[:1])
        for mark in marks:
            self.past.append(mark)
        self._know_members_of(marks)
        self.company = self.past.head.members
        there = {
            peer for peer, voice in self.voices.items() if any(identifier in self.past for identifier in voice.ids)
        }
        self.tried |= (there | {donor}) & self.introducers

    def _forget_shared_since(self, parted_at: Mark | None) -> None:
        """Take the states of the chain that is left, after this one, for shared with nobody.

        Members of such a state stand on that chain, so the chain would win by their word whatever it is held against,
        and this peer would go to and fro between two chains.
        """
        if parted_at is not None:
            self.known = {
                peer: parted_at if mark.round > parted_at.round else mark for peer, mark in self.known.items()
            }

    def _know_members_of(self, marks: Sequence[Mark]) -> None:
        """Know those who were there at states that we came by otherwise than with them."""
        for mark in marks:
            for peer in sorted((mark.members | mark.newcomers) - {self.me}):
                if peer not in self.known or mark.round > self.known[peer].round:
                    self.known.pop(peer, None)
                    self.known[peer] = mark
        while len(self.known) > KNOWN_MAX:
            del self.known[next(iter(self.known))]

    # ---- what is judged -----------------------------------------------------------------------------------------

    def follows(
        self,
        common: Mark,
        theirs: Sequence[Mark],
        now: float,
        *,
        ids: Collection[bytes] | None,
        heard: Mapping[bytes, float],
        expected_from: Callable[[bytes], float],
        turn: Callable[[Sequence[Mark]], int],
    ) -> Judgement:
        """Judge a chain that has these states after `common`, a state of ours.

        Args:
            theirs: their members may be left empty where they are not known.
            ids: of their states; None: not all known, so whoever stands at no state of ours may stand there.
            heard: when each member last gave a sign of life.
            expected_from: from when a sealer's seal of the round under way is followed on its word alone.
            turn: whose turn the first of some seals was.
        """
        ours = self.past.after(common.id)
        if common.round and self._by_a_stranger(common, theirs, heard, now):
            return Judgement(follow=False, why="a solo seal by one that was no member")
        continues = not ours and (not common.round or theirs[0].sealer == self.me)
        in_time = not ours and len(theirs) == 1 and not theirs[0].solo and now >= expected_from(theirs[0].sealer)
        if continues or in_time:
            return Judgement(theirs[-1].total >= common.total, "its total is smaller")
        on, off = self._voices(ids, since=common.round, now=now)
        voices = on | {self.me}, off
        mine, other = (
            Branch(marks, voices[n], turn(marks), max(_strangers_solos(common, marks), default=0))
            for n, marks in enumerate((ours, theirs))
        )
        verdict = forks.judge(common, mine, other, self.me, whole=ids is not None)
        why = f"{verdict.theirs} of {len(common.members)} members behind it, {verdict.ours} behind ours"
        return Judgement(verdict.follow, why)

    def follows_from_afar(
        self, end: Mark, theirs: Collection[bytes] | None, donor: bytes, now: float, *, is_member: bool
    ) -> Judgement:
        """Judge a chain that ends so and has no state in common with what we remember of ours.

        Far behind it or off it: there is to judge by what members say who were there at the last state that we shared
        with its donor. Who comes back after a long time, and is told by a person whom to ask, goes where these are.

        Args:
            theirs: ids on it; None: not known yet, so whoever stands at no state of ours may stand there.
            is_member: whether we are listed as a member.
        """
        more = self.has_more(end.round, end.total, end.id)
        on, off = self._voices(theirs, since=0, now=now)
        # Of an introducer that is not the donor it takes the ids to know that it stands there.
        if donor in self.introducers or (theirs is not None and off & self.introducers):
            if not is_member:
                return self._as_told(on, off | {donor})
            if self.returning:
                return Judgement(more, "it claims less than ours")
        shared = self.known.get(donor)
        members = self.company if shared is None else shared.members
        behind_ours, behind_theirs = len((on | {self.me}) & members), len(off & members)
        if behind_theirs > behind_ours or (behind_theirs == behind_ours and more):
            return FOLLOW
        why = f"{behind_theirs} of {len(members)} members behind it, {behind_ours} behind ours, nothing in common"
        return Judgement(follow=False, why=why)

    def _as_told(self, on: set[bytes], off: set[bytes]) -> Judgement:
        """Judge as a newcomer: by how many of those to whom it was sent stand on either, then by all that it hears.

        At a tie it goes over once, because it hears the members of a chain only after it has been there. It does not
        go back and forth between two chains, which would cost a snapshot each time.
        """
        introduced, heard = (len(off & self.introducers), len(on & self.introducers)), (len(off), len(on))
        there, here = introduced if introduced[0] != introduced[1] else heard
        why = f"{there} of those that we hear are on it, {here} on ours"
        return Judgement(there > here or (there == here and not off & self.introducers <= self.tried), why)

    def has_more(self, round: int, total: int, identifier: bytes) -> bool:
        """Whether a chain that ends like this claims more than ours does, or may continue ours."""
        head = self.past.head
        return chain.better(total, identifier, head.total, head.id) or (round > head.round and total >= head.total)

    def wants(self, tip: events.TipHeard) -> bool:
        """Whether what this tip names may be better than our chain.

        Of peers that we know any other branch may be, however short: more members may stand on it. To a peer that is no
        member yet, of anybody: it may have been led astray.
        """
        if tip.id in self.past or not tip.round:
            return False
        more = self.has_more(tip.round, tip.total, tip.id)
        return more or tip.peer_id in self.known or self.me not in self.past.head.members

    def merit(self, tip: events.TipHeard) -> tuple[bool, int, bytes]:
        """Order tips, the best first: those of peers that we know before those of strangers."""
        return self.is_stranger(tip.peer_id), -tip.total, tip.id

    def _by_a_stranger(self, common: Mark, theirs: Sequence[Mark], heard: Mapping[bytes, float], now: float) -> bool:
        """Whether a solo seal by one that was no member would take members apart that are there."""
        solo = any(theirs[place].sealer != self.me for place in _strangers_solos(common, theirs))
        since = now - self._counts_seconds
        there = any(heard.get(peer, -math.inf) >= since for peer in common.members)
        return solo and (self.me in common.members or there)

    def _voices(self, theirs: Collection[bytes] | None, *, since: int, now: float) -> tuple[set[bytes], set[bytes]]:
        """Who says of itself that it stands on our chain, at round `since` or later, and who at a state in `theirs`.

        Args:
            theirs: None: whoever is heard and does not stand on ours.
        """
        on, off = set(), set()
        fresh = {peer: voice for peer, voice in self.voices.items() if now - voice.at <= self._counts_seconds}
        for peer, voice in fresh.items():
            oldest = since
            for identifier in reversed(voice.ids):
                if theirs is not None and identifier in theirs:
                    off.add(peer)
                    break
                mark = self.past.get(identifier)
                if mark is not None:
                    if mark.round >= oldest:
                        on.add(peer)
                    break
                # The newest may be one that we have not come to yet; then it stood at our head a moment ago.
                oldest = max(since, self.past.head.round - VOICE_IDS)
        return on, off if theirs is not None else fresh.keys() - on

    def invariants(self, members: frozenset[bytes]) -> Iterator[tuple[str, bool]]:
        """Yield what must hold between two events, and whether it does."""
        yield "members are known", members - {self.me} <= self.known.keys()
        yield "what others said of partings is bounded", len(self.parted) <= PARTED_MAX
        yield "who is proven is known", self.proven <= self.known.keys()
        yield "the known are bounded", len(self.known) <= KNOWN_MAX + len(members)
        yield "voices are of known peers", self.voices.keys() <= self.known.keys() | self.introducers


def _strangers_solos(common: Mark, marks: Sequence[Mark]) -> list[int]:
    """Return the places, in states after `common`, of solo seals by those that were no members."""
    return [
        place
        for place, (before, mark) in enumerate(zip([common, *marks], marks, strict=False))
        if mark.solo and before.members and mark.sealer not in before.members
    ]


def marks_after(common: Mark, rounds: Sequence[SealedRound], states: Sequence[ChainState]) -> list[Mark]:
    """Return the marks of the states after `common` that these rounds lead to."""
    marks = [common]
    for sealed, state in zip(rounds, states, strict=True):
        marks.append(Mark.of(state, sealed.seal, marks[-1]))
    return marks[1:]


def linked(common: Mark, rounds: Sequence[SealedRound]) -> list[Mark]:
    """Return marks of rounds after a state whose members in full are not at hand.

    Who signed is certain, who was a member not.

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
