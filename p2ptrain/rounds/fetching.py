"""Where the chains of others stand, and what we fetch of them.

Every seal that waits for replies continues our head, and each sealer has one at most. Every peer has one tip, its
latest. We fetch rounds from few peers at a time, from the next one when those asked are slow to answer. Strangers have
a share of their own, so that those who never answer keep nothing from us. A snapshot is fetched from one donor at a
time, and nothing from ourselves.

Memory: `STRANGERS_MAX` tips and seals of peers outside the group, and `SHUNNED_MAX` donors that failed us.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from p2ptrain.rounds import events

STRANGERS_MAX = 64  # peers outside the group whose tips or seals we remember
FETCH_TIMEOUT_SECONDS = 20.0
SHUNNED_MAX = 256
SHUN_DOUBLINGS = {False: 2, True: 8}  # by whether the donor is a stranger
SHUN_REMEMBERED_SECONDS = 120.0
INTRODUCER_SECONDS = 10.0  # that a newcomer leaves to those whose addresses a person gave it
KNOWN_ASKED_MAX = 3  # peers that we know and fetch rounds from at one time
STRANGERS_ASKED_MAX, NEWCOMER_ASKS_MAX = 1, 3  # strangers


class Waiting(NamedTuple):
    """A seal on our head that names a reply we lack."""

    heard: events.SealHeard
    at: float


class Fetch(NamedTuple):
    """Rounds that are being fetched."""

    since: float
    #: the donor was one when it was asked
    stranger: bool


class Shunned(NamedTuple):
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
    #: monotonic seconds
    at: float


@dataclass(slots=True)
class Fetching:
    """See the module docstring."""

    #: how long a peer waits for others before it looks elsewhere: a reply, a seal
    reply_timeout_seconds: float
    seal_timeout_seconds: float
    started_at: float = -math.inf
    #: peer id -> its tip, the one heard last at the end
    tips: dict[bytes, events.TipHeard] = field(default_factory=dict)
    #: id of a tip that we want -> when we first did
    wanted_since: dict[bytes, float] = field(default_factory=dict)
    #: sealer -> its seal on our head, while we lack a reply that it names
    waiting: dict[bytes, Waiting] = field(default_factory=dict)
    #: donors of the rounds that are being fetched
    asked: dict[bytes, Fetch] = field(default_factory=dict)
    #: donors that failed us, for longer each time, and those that did so lately
    shunned: dict[bytes, Shunned] = field(default_factory=dict)
    #: what was refused last
    refused: RefusedBranch | None = None
    #: the donor of the snapshot that is being fetched
    resyncing: bytes | None = None
    #: after a late timer: do not seal before this time
    hold_seal_until: float = -math.inf

    def note_tip(self, tip: events.TipHeard, members: Collection[bytes]) -> None:
        """Remember a peer's tip."""
        self.tips.pop(tip.peer_id, None)
        self.tips[tip.peer_id] = tip
        if len(self.tips) > len(members) + STRANGERS_MAX:
            # The one that has been silent for longest.
            del self.tips[next(peer for peer in self.tips if peer not in members)]

    def shun(self, donor: bytes, now: float, *, stranger: bool, seconds: float | None = None) -> None:
        """Leave a donor alone for a while, for longer each time, and look for what it had elsewhere."""
        seconds = self.seal_timeout_seconds if seconds is None else seconds
        before = self.shunned.pop(donor, None)
        times = 0 if before is None else before.times + 1
        self.shunned[donor] = Shunned(now + seconds * 2 ** min(times, SHUN_DOUBLINGS[stranger]), times)
        while len(self.shunned) > SHUNNED_MAX:
            del self.shunned[next(iter(self.shunned))]
        self.tips.pop(donor, None)
        self.waiting = {s: w for s, w in self.waiting.items() if w.heard.source != donor}

    def forgive(self, now: float) -> None:
        """Forget those that failed us long ago."""
        self.shunned = {
            donor: shunned for donor, shunned in self.shunned.items() if now < shunned.until + SHUN_REMEMBERED_SECONDS
        }

    def may_ask_from(self, peer: bytes, *, stranger: bool, newcomer: bool, introduced: bool) -> float:
        """Return when there is room for one more question to a peer; infinity: not before an answer.

        Args:
            stranger: the peer is one to us.
            newcomer: we have no rounds yet.
            introduced: a person gave us addresses.
        """
        if peer in self.asked:
            return math.inf
        earliest, most = -math.inf, KNOWN_ASKED_MAX
        if stranger:
            most = NEWCOMER_ASKS_MAX if newcomer else STRANGERS_ASKED_MAX
            if newcomer and introduced:
                earliest = self.started_at + INTRODUCER_SECONDS
        alike = [fetch.since for fetch in self.asked.values() if fetch.stranger == stranger]
        if len(alike) >= most:
            return math.inf
        return max([earliest, *(since + self.reply_timeout_seconds for since in alike)])

    @property
    def fetches_from_known(self) -> bool:
        """Whether rounds are being fetched from a peer that we know: it is not heard, but there."""
        return any(not fetch.stranger for fetch in self.asked.values())

    def invariants(self, head: bytes, me: bytes) -> Iterator[tuple[str, bool]]:
        """Yield what must hold between two events, and whether it does."""
        for sealer, waiting in self.waiting.items():
            yield "a seal that waits continues our head", waiting.heard.seal.parent == head
            yield "a seal that waits is filed under its sealer", waiting.heard.seal.sealer == sealer
        yield "tips are filed under their peers", all(tip.peer_id == peer for peer, tip in self.tips.items())
        yield "rounds are not fetched from ourselves", me not in self.asked
        strangers = sum(fetch.stranger for fetch in self.asked.values())
        yield "rounds are fetched from few known peers at a time", len(self.asked) - strangers <= KNOWN_ASKED_MAX
        yield "rounds are fetched from few strangers at a time", strangers <= NEWCOMER_ASKS_MAX
        yield "what is shunned is bounded", len(self.shunned) <= SHUNNED_MAX
        yield "no snapshot is fetched from ourselves", self.resyncing != me
