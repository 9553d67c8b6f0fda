"""How long to wait for others: learned from when they came, never beyond what the manifest allows.

Fed with durations in seconds; no clock, no sockets. Of each member one number is kept, its *lateness*: a smoothed
time that rises by half of what an observation exceeds it by, and falls by a sixteenth. A wait is the larger of

- the lateness of the bulk, all but the slowest quarter and at least one, times 1.5, plus 0.05 s;
- the same for the slowest of all, but no more than `round / (2 x members)` plus 0.05 s: to wait for one member is worth
  half of what its work is worth, so that it can cost no more, whatever it does.

A member of whom nothing is known yet counts as the slowest that may be. One that is always later than all that is
left out, so it does its part too: `HeadStart` has it compute for less time, so that it is in time, and `StandIn` has it
heard of where its trainer has nothing to send. Memory: a number for each member.
"""

from __future__ import annotations

from collections.abc import Collection

FLOOR_SECONDS = 0.05
"""For timers and the network, whatever was observed."""
ROUNDS_LEARNING = 4
"""Rounds to observe before the manifest's bound is left."""
_RISE, _FALL = 1 / 2, 1 / 16
_RETURN = 1 / 32
_MARGIN = 1.5
_ROUND_GAIN = 1 / 8
_HALF_MARGIN = 4
"""Times the usual, before a round is one in which half of the others are silent."""


class Lateness:
    """How late each member is, and how long to wait for them.

    Args:
        bound_seconds: from the manifest; no wait is longer.
    """

    def __init__(self, bound_seconds: float) -> None:
        self.bound_seconds = bound_seconds
        self._of: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._of)

    def observe(self, member: bytes, seconds: float) -> None:
        """`member` came `seconds` after the moment that waiting counts from; what is beyond the bound counts as it."""
        seconds = min(max(seconds, 0.0), self.bound_seconds)
        before = self._of.get(member, seconds)
        self._of[member] = before + (seconds - before) * (_RISE if seconds > before else _FALL)

    def keep_only(self, members: Collection[bytes]) -> None:
        """Forget who is no member any more."""
        self._of = {member: seconds for member, seconds in self._of.items() if member in members}

    def wait_seconds(self, round_seconds: float, unknown: int = 0) -> float:
        """How long to wait, in rounds that take about `round_seconds` until half of the others are heard.

        Args:
            round_seconds: see above.
            unknown: members to expect that were never observed.
        """
        ascending = sorted(self._of.values()) + [self.bound_seconds] * unknown
        count = len(ascending)
        outliers = max(1, count // 4)
        bulk = ascending[-1 - outliers] if count > outliers else 0.0
        slowest = ascending[-1] if ascending else 0.0
        worth = round_seconds / (2 * (count + 1))
        return min(FLOOR_SECONDS + max(_MARGIN * bulk, min(_MARGIN * slowest, worth)), self.bound_seconds)


class StandIn:
    """How long a member whose trainer is not ready leaves it time, before it sends a message of weight 0 instead.

    Half of the grace, by its own estimate: theirs it cannot know. A trainer that was not ready the round before either
    is given half as much, and so on: to wait for one far slower than the rest is for nothing. Where a seal leaves the
    message out all the same, the limit is halved; each time that it is included, the limit grows by a hundredth.
    """

    def __init__(self, bound_seconds: float) -> None:
        self._limit_seconds = self._bound_seconds = bound_seconds
        #: of the grace; for the coming round
        self._share = 1 / 2

    def observe_ready(self) -> None:
        """The trainer was in time."""
        self._share = 1 / 2

    def observe(self, included: bool, waited_seconds: float) -> None:
        """A message of weight 0 was sent after `waited_seconds`, and the seal did, or did not, include it."""
        self._share = max(self._share / 2, 1 / 64)
        if included:
            self._limit_seconds = min(self._limit_seconds * 1.01, self._bound_seconds)
        else:
            # Not to nothing, which could not grow again.
            self._limit_seconds = max(min(self._limit_seconds, waited_seconds) / 2, self._bound_seconds / 1000)

    def wait_seconds(self, grace_seconds: float) -> float:
        """How long to wait, where we would give the others `grace_seconds`."""
        return min(grace_seconds * self._share, self._limit_seconds)


class HeadStart:
    """How much less than the others a member computes that is left out for being late, so that it is in time.

    An eighth of the round's length less for each message that a seal left out, down to half; what it gave up comes
    back by a thirty-second with each message that was included: nobody waits for a member that the seal two rounds
    before left out, so to be late once may cost it more than one round. Before the last seal that may leave it out it
    takes no chance: what it has after three eighths of the length is in before anybody stops waiting.
    """

    def __init__(self) -> None:
        #: of the length
        self._share = 0.0

    def observe(self, included: bool) -> None:
        """A seal that includes others did, or did not, include our message."""
        self._share = self._share * (1 - _RETURN) if included else min(self._share + 1 / 8, 1 / 2)

    def computing_seconds(self, length_seconds: float, *, last_chance: bool) -> float:
        """For how long to compute in a round of this length."""
        return length_seconds * min(1.0 - self._share, 3 / 8 if last_chance else 1.0)


class Patience:
    """How long to wait for newcomers, of whom nothing is known yet.

    Half as long after each time that none of them came, and as long as ever once one comes, be it late: the first of a
    flood of newcomers that never answer costs a wait, the others next to nothing.
    """

    def __init__(self, bound_seconds: float) -> None:
        self._bound_seconds = self.seconds = bound_seconds

    def observe(self, came: bool) -> None:
        """One of them came, or none of them while they were waited for."""
        self.seconds = self._bound_seconds if came else max(self.seconds / 2, self._bound_seconds / 64)


class Deadlines:
    """All that one peer has learned of when others come.

    Args:
        grace_seconds: bound of the grace.
        reply_timeout_seconds: bound of the wait for replies.
        learns: False: the bounds themselves, always.
    """

    def __init__(self, grace_seconds: float, reply_timeout_seconds: float, *, learns: bool = True) -> None:
        #: messages, after half of the other members were heard
        self.contributions = Lateness(grace_seconds)
        #: replies, after the first one
        self.replies = Lateness(reply_timeout_seconds)
        self.patience = Patience(grace_seconds)
        self.stand_in = StandIn(grace_seconds)
        self.head_start = HeadStart()
        self._learns = learns
        self._rounds = 0
        self._round_seconds = 0.0
        #: times in a row that half of the others were not heard by when they should have been
        self._silences = 0
        #: whom it has been learned with
        self._group: frozenset[bytes] = frozenset()
        #: who was new among them when it was begun to be learned
        self._new: frozenset[bytes] = frozenset()
        #: how many others there are now
        self._members = 0
        #: the others did not wait for our reply, since this group began to be learned with
        self._hurries = False

    def observe_round(self, seconds: float) -> None:
        """Half of the others were heard this long after the round began."""
        self._silences = 0
        self._rounds = min(self._rounds + 1, ROUNDS_LEARNING)
        gain = 1.0 if self._rounds == 1 else _ROUND_GAIN
        self._round_seconds += (seconds - self._round_seconds) * gain

    def observe_own_part(self, *, sealed: bool) -> None:
        """A seal has our reply, or was made without it."""
        self._hurries = self._hurries or not sealed

    def observe_silence(self) -> None:
        """Half of the others were not heard by `half_seconds`."""
        self._silences += 1

    def keep_only(self, members: Collection[bytes]) -> None:
        """Forget all but these other members, newcomers apart; with a group a quarter of which is new, learn again.

        Who comes how late, after half of the others, depends on who they are: a fast newcomer makes all the rest late.
        """
        if len(members) <= 4 * len(set(members) - self._group):
            self._new = frozenset(members) - self._group
            self._group = frozenset(members)
            self._rounds = 0
            self._hurries = False
        self._members = len(members)
        self.contributions.keep_only(members)
        self.replies.keep_only(members)

    @property
    def grace_seconds(self) -> float:
        """How long a reducer waits for the rest, once half of the others were heard."""
        return self._learned(self.contributions, self._members - len(self.contributions))

    def wait_seconds(self, missing: Collection[bytes]) -> float:
        """How long a reducer waits for these members of whom something is known, once half of the others were heard.

        Where a group is learned anew, all the others may be later than they were, and have the manifest's time; those
        who made it new have as long as one member is worth, or peers that come and die would cost it each time. The
        same once a seal was made without our reply: others, who have learned, do not wait as long for us as we would
        for a member whose messages never come, or are of no use, and would take our turns to reduce.
        """
        grace = self.grace_seconds
        learning = self._learns and self._round_seconds and self._rounds < ROUNDS_LEARNING
        if learning and (self._hurries or self._new.issuperset(missing)):
            return min(grace, self._worth_seconds)
        return grace

    @property
    def newcomer_seconds(self) -> float:
        """How long a reducer waits for newcomers, once all others were heard."""
        if not self._learns or not self._round_seconds:
            return self.patience.seconds
        return min(self.patience.seconds, self._worth_seconds)

    def half_seconds(self, bound_seconds: float) -> float:
        """How long to wait for half of the others after our own message: longer each time that it was not enough."""
        if not self._learns or not self._round_seconds:
            return bound_seconds
        usual = _HALF_MARGIN * self._round_seconds + self.contributions.bound_seconds
        return min(usual * 2 ** min(self._silences, 16), bound_seconds)

    @property
    def _worth_seconds(self) -> float:
        return FLOOR_SECONDS + self._round_seconds / (2 * (self._members + 1))

    @property
    def reply_seconds(self) -> float:
        """How long a sealer waits for the rest of the replies after the first; other reducers may grant their grace."""
        return min(self._learned(self.replies) + self.grace_seconds, self.replies.bound_seconds)

    @property
    def stand_in_seconds(self) -> float:
        """How long a late trainer is given, once half of the others were heard."""
        return self.stand_in.wait_seconds(self.grace_seconds)

    def computing_seconds(self, length_seconds: float, *, last_chance: bool) -> float:
        """For how long to compute ourselves, in a round of this length; the next seal may be the last with us."""
        return (
            self.head_start.computing_seconds(length_seconds, last_chance=last_chance)
            if self._learns
            else length_seconds
        )

    def _learned(self, lateness: Lateness, unknown: int = 0) -> float:
        if not self._learns or self._rounds < ROUNDS_LEARNING or not len(lateness):
            return lateness.bound_seconds
        return lateness.wait_seconds(self._round_seconds, unknown)
