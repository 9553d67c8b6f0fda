"""Fork choice: which of two branches a peer stays on, judged by who stands behind each (docs/rounds.md, rule 9).

Rounds cost nothing to make, and a seal may claim to include anybody, so the length of a branch and its `total` prove
nothing. What proves something is a signature: of the members that both branches had at their last common state, who has
sealed on which branch, and who says of itself, on a stream that libp2p authenticates, that it stands there.

A peer remembers its own chain as marks: of each state as much as this takes. Memory: `PAST_MAX` marks; one set of
members serves all marks in a row that have the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from p2ptrain.chain.seal import Seal
from p2ptrain.chain.state import ChainState, better

PAST_MAX = 256
HEARD_SEALS_MIN = 16
"""Of a branch with more seals than this, and than twice the members, seals alone count: whoever is there has sealed."""


class Mark(NamedTuple):
    """One state of a chain, as far as fork choice needs it."""

    round: int
    id: bytes
    total: int
    #: peer id of who sealed it; empty where that is not known
    sealer: bytes
    #: whether by a solo seal
    solo: bool
    #: peer ids of the members of the next round and the one after it, but for newcomers that no seal has included yet
    members: frozenset[bytes]
    #: peer ids of these newcomers
    newcomers: frozenset[bytes] = frozenset()

    @classmethod
    def of(cls, state: ChainState, seal: Seal | None = None, before: Mark | None = None) -> Mark:
        """Return the mark of a state, which `seal` led to from the state that `before` marks."""
        listed = state.now + state.following
        members = frozenset(member.peer_id for member in listed if not member.is_newcomer)
        newcomers = frozenset(member.peer_id for member in listed) - members
        if before is not None and before.members == members:
            members = before.members
        sealer, solo = (b"", False) if seal is None else (seal.sealer, seal.solo)
        return cls(state.round, state.id, state.total, sealer, solo, members, newcomers)


class Past:
    """The last marks of one chain, the head's at the end; never empty."""

    def __init__(self, marks: Iterable[Mark]) -> None:
        self._marks: dict[bytes, Mark] = {}
        for mark in marks:
            self.append(mark)

    @property
    def head(self) -> Mark:
        """The newest mark."""
        return next(reversed(self._marks.values()))

    def __contains__(self, identifier: bytes) -> bool:
        return identifier in self._marks

    def __getitem__(self, identifier: bytes) -> Mark:
        return self._marks[identifier]

    def get(self, identifier: bytes) -> Mark | None:
        """Return the mark of a state id, or None."""
        return self._marks.get(identifier)

    def append(self, mark: Mark) -> None:
        """Take the next state's mark."""
        self._marks[mark.id] = mark
        if len(self._marks) > PAST_MAX:
            del self._marks[next(iter(self._marks))]

    def cut(self, identifier: bytes) -> None:
        """Forget all that comes after the state of this id, which is here."""
        while self.head.id != identifier:
            del self._marks[self.head.id]

    def after(self, identifier: bytes) -> list[Mark]:
        """Return the marks after the state of this id, which is here, in order."""
        found: list[Mark] = []
        for mark in reversed(self._marks.values()):
            if mark.id == identifier:
                break
            found.append(mark)
        return found[::-1]

    def last_common(self, ids: Sequence[bytes]) -> int | None:
        """Return the position of the last of these ids that is here, or None."""
        return next((n for n in range(len(ids) - 1, -1, -1) if ids[n] in self._marks), None)

    def locator(self, most: int) -> list[bytes]:
        """Return at most so many ids, the newest first, each second one twice as far back, and the oldest of all."""
        ids = list(reversed(self._marks))
        steps = list(itertools.islice(itertools.takewhile(lambda step: step < len(ids) - 1, _steps()), most - 1))
        return [ids[step] for step in (*steps, len(ids) - 1)]

    def between(self, older: bytes, newer: bytes, most: int) -> list[bytes]:
        """Return at most so many ids, evenly spread, between two, and the older one; the newest first. None of them,
        where one of the two is not here any more."""
        if older not in self._marks or newer not in self._marks:
            return []
        ids = list(self._marks)
        first, last = ids.index(older), ids.index(newer)
        count = min(most - 1, last - first - 1)
        places = [first + (last - first) * number // (count + 1) for number in range(count + 1)]
        return [ids[place] for place in reversed(places)]


def _steps() -> Iterator[int]:
    """Yield 0, 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
    yield from (0, 1)
    for octave in itertools.count(1):
        yield from (2**octave, 3 * 2 ** (octave - 1))


class Branch(NamedTuple):
    """What a fork has on one side."""

    #: of its states after the common one, in order
    marks: Sequence[Mark]
    #: peers that lately said of themselves that they stand on it
    voices: Collection[bytes]
    #: whose turn its first seal was; a solo seal is nobody's, and comes last
    place: int = 0
    #: how many of the first marks are before a solo seal by one that was no member
    before_stranger: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a fork is judged."""

    ours: int
    """Common members behind our branch."""
    theirs: int
    follow: bool
    """Whether theirs is the one to be on."""


def judge(common: Mark, ours: Branch, theirs: Branch, me: bytes = b"", *, whole: bool = True) -> Verdict:
    """Decide between two branches that part after `common`; `theirs` has one mark or more.

    More of the common state's members behind it wins. Who says that it stands on one stands there, whatever it sealed
    before; who has sealed on both and so spoke for either counts only where the others are even, by what it says.

    Where nobody is left to count, those do whom the members had admitted; at a tie of these, all that are known and say
    where they stand, but for `me`, who decides. Else the one member of a young run took those along who came after it,
    and anybody a run that was carried on when its members had died.

    A tie goes to the larger total, then to the smaller id. A seal against a seal is no more than two sealers that did
    not hear of each other: who says what is not counted yet, and a tie goes to whoever's turn came first, so that a
    member that seals out of turn undoes nobody's round. Where ours has no mark, theirs continues our chain: a tie goes
    to theirs then; if it begins with a solo seal, only with work in it.

    Whoever carries a run on, and was no member, does so because the members are silent. Those who sealed before it on
    that branch speak for it no more: it yields to any member that comes back.

    Args:
        whole: whether all seals of theirs are known. Else it would be unfair to count seals alone; and who has sealed
            ours and says that it stands on theirs may have sealed that too.
    """
    # Not all of its marks need be known.
    seals = tuple(branch.marks[-1].round - common.round if branch.marks else 0 for branch in (ours, theirs))
    hear = not whole or (seals != (1, 1) and seals[0] <= max(HEARD_SEALS_MIN, 2 * len(common.members)))
    branches = ours, theirs
    there = [{mark.sealer for mark in branch.marks} for branch in branches]
    twofold = there[0] & (there[1] if whole else there[1] | set(theirs.voices)) & common.members
    there = [{mark.sealer for mark in branch.marks[branch.before_stranger :]} for branch in branches]
    sealed = [sealers & common.members for sealers in there]
    said = [set(branch.voices) & common.members if hear else set[bytes]() for branch in branches]
    behind = [((sealed[n] - said[1 - n]) | said[n]) - twofold for n in (0, 1)]
    standing = len(behind[0]), len(behind[1])
    counts = [standing]
    if seals != (1, 1):
        if any(standing):
            counts.append((len(said[0] & twofold), len(said[1] & twofold)))
        else:
            newcomers = [(there[n] | set(branches[n].voices)) & common.newcomers for n in (0, 1)]
            counts.append((len(newcomers[0]), len(newcomers[1])))
            voices = [set(branch.voices) - twofold - {me} for branch in branches]
            counts.append((len(voices[0]), len(voices[1])))
    for behind_ours, behind_theirs in counts:
        if behind_ours != behind_theirs:
            return Verdict(*standing, follow=behind_theirs > behind_ours)
    if seals == (1, 1) and ours.place != theirs.place:
        return Verdict(*standing, follow=theirs.place < ours.place)
    end, head = theirs.marks[-1], ours.marks[-1] if ours.marks else None
    if head is None:
        return Verdict(*standing, follow=end.total >= common.total + theirs.marks[0].solo)
    return Verdict(*standing, follow=better(end.total, end.id, head.total, head.id))
