"""Fork choice: which of two branches a peer stays on, judged by who stands behind each (docs/rounds.md, rule 9).

Rounds cost nothing to make, and a seal may claim to include anybody, so the length of a branch and its `total` prove
nothing. What proves something is a signature: of the members that both branches had at their last common state, who has
sealed on which branch, and who says of itself, on a stream that libp2p authenticates, that it stands there.

A peer remembers its own chain as marks: of each state as much as this takes. Memory: `PAST_MAX` marks; one set of
members serves all marks in a row that have the same.
"""

from __future__ import annotations

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

    @classmethod
    def of(cls, state: ChainState, seal: Seal | None = None, before: Mark | None = None) -> Mark:
        """Return the mark of a state, which `seal` led to from the state that `before` marks."""
        members = frozenset(member.peer_id for member in state.now + state.following if not member.is_newcomer)
        if before is not None and before.members == members:
            members = before.members
        sealer, solo = (b"", False) if seal is None else (seal.sealer, seal.solo)
        return cls(state.round, state.id, state.total, sealer, solo, members)


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
        """Return at most so many ids, the newest first, each twice as far back as the one before it."""
        ids = list(reversed(self._marks))
        steps = _doubling(len(ids))
        return [ids[step] for _, step in zip(range(most), steps, strict=False)]


def _doubling(below: int) -> Iterator[int]:
    step = 0
    while step < below:
        yield step
        step = max(step + 1, 2 * step)


class Branch(NamedTuple):
    """What a fork has on one side."""

    #: of its states after the common one, in order
    marks: Sequence[Mark]
    #: peers that lately said of themselves that they stand on it
    voices: Collection[bytes]
    #: whose turn its first seal was; a solo seal is nobody's, and comes last
    place: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a fork is judged."""

    ours: int
    """Common members behind our branch."""
    theirs: int
    follow: bool
    """Whether theirs is the one to be on."""


def judge(common: Mark, ours: Branch, theirs: Branch) -> Verdict:
    """Decide between two branches that part after `common`; `theirs` has one mark or more.

    More of the common state's members behind it wins; a tie goes to the larger total, then to the smaller id. A seal
    against a seal is no more than two sealers that did not hear of each other: who says what is not counted yet, and a
    tie goes to whoever's turn came first, so that a member that seals out of turn undoes nobody's round. Where ours has
    no mark, theirs continues our chain: a tie goes to theirs then; if it begins with a solo seal, only with work in it.
    """
    seals = len(ours.marks), len(theirs.marks)
    hear = seals != (1, 1) and seals[0] <= max(HEARD_SEALS_MIN, 2 * len(common.members))

    def behind(branch: Branch) -> int:
        peers = {mark.sealer for mark in branch.marks} | (set(branch.voices) if hear else set())
        return len(peers & common.members)

    standing = behind(ours), behind(theirs)
    if standing[0] != standing[1]:
        return Verdict(*standing, follow=standing[1] > standing[0])
    if seals == (1, 1) and ours.place != theirs.place:
        return Verdict(*standing, follow=theirs.place < ours.place)
    end, head = theirs.marks[-1], ours.marks[-1] if ours.marks else None
    if head is None:
        return Verdict(*standing, follow=end.total >= common.total + theirs.marks[0].solo)
    return Verdict(*standing, follow=better(end.total, end.id, head.total, head.id))
