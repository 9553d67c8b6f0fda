"""What the state machine keeps of the round under way and of the rounds beside it.

Memory: one round of contributions to our own parts, plus those for the round after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from p2ptrain import chain
from p2ptrain.chain import ChainState, RoundShape, Row
from p2ptrain.chain.sealed import Key, Reply
from p2ptrain.rounds import events


class Missed(NamedTuple):
    """A part that we closed before all were heard."""

    #: when its grace began
    since: float
    #: members not heard yet
    members: set[bytes]
    #: newcomers among them
    hoped_for: frozenset[bytes]


@dataclass(slots=True)
class OwnPart:
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
class Exchange:
    """The round now under way, as one member (or onlooker) sees it."""

    shape: RoundShape
    key: Key
    #: our index among the members; None: we look on
    index: int | None
    started_at: float
    #: when computing for it began: with it, or with overlap when our message of the round before was due
    computing_since: float
    #: parts we reduce, by part number
    reducing: dict[int, OwnPart]
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

    def half_heard(self, part: OwnPart) -> bool:
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
class Exchanges:
    """The round under way and what is kept for the rounds beside it.

    The round under way is the one after the head and has the shape that the head gives it; there is none once the run
    is over. We reduce those of its parts whose reducer we are, and no other. A part has messages of members only, and
    its reply is held only after it is closed. Replies are held only once we have sent, and the round is complete when
    there is one for each part. Early messages are for the coming round and for parts that we reduce in it. What was
    sent, and who was missed, is kept for the round of the head and later ones.
    """

    current: Exchange | None = None
    #: the round after the one under way, unless a solo seal changes it
    coming: RoundShape | None = None
    #: (part, peer id) -> message for the coming round
    early: dict[tuple[int, bytes], events.ContributionReceived] = field(default_factory=dict)
    #: rounds that the trainer's payloads were sent for, and the shape they were cut for; a fork may come back to it
    sent: dict[Key, RoundShape] = field(default_factory=dict)
    #: who may yet come late, in the round under way and the one before
    missed: dict[tuple[Key, int], Missed] = field(default_factory=dict)
    #: our last message in the trainer's stead came too late to be sealed
    stood_in_late: bool = False

    def forget_before(self, round: int) -> None:
        """Drop what is of rounds before this one."""
        self.sent = {key: shape for key, shape in self.sent.items() if key.round >= round}
        self.missed = {of: missed for of, missed in self.missed.items() if of[0].round >= round}

    def invariants(self, head: ChainState, me: bytes, chunks: int) -> Iterator[tuple[str, bool]]:
        """Yield what must hold between two events, and whether it does."""
        rounds = [key.round for key in self.sent] + [key.round for key, _ in self.missed]
        yield "what was sent or missed is of the head's round or later", all(r >= head.round for r in rounds)
        coming = self.coming
        yield "there are early messages for the coming round alone", not self.early or coming is not None
        if coming is not None:
            ours = {n for n, p in enumerate(coming.parts) if coming.members[p.reducer].peer_id == me}
            key = Key(coming.round, coming.base)
            for (part, peer), message in self.early.items():
                yield "an early message is for the coming round", message.key == key
                yield "an early message is a member's", coming.index(peer) is not None
                yield "an early message is for a part that we shall reduce", part in ours
        exchange = self.current
        if exchange is None:
            return
        shape, replies = exchange.shape, exchange.replies
        yield "the round under way is the one after the head", shape.round == head.round + 1
        yield "its shape is the head's", shape == chain.shape_of(head, chunks)
        yield "its key is its shape's", exchange.key == Key(shape.round, shape.base)
        yield "our index in it is its shape's", exchange.index == shape.index(me)
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
