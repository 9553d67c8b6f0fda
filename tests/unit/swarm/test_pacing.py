"""A budget keeps its promise for whatever is sent, and gives all of it: on a clock and a wire that the test makes."""

from __future__ import annotations

import random
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain.swarm.pacing import BURST_SECONDS, WINDOW_SECONDS, Budget, spread_rate

LOOK_SECONDS = 0.25
OVERHEAD = 1.06
"""Of what the daemon and headers add to a frame."""


class Daemon:
    """Takes frames and carries them over a wire of its own: late, all at once after a stall, and with its own bytes."""

    def __init__(self, seed: int, stalls: bool, own_bytes: float) -> None:
        self._random, self._stalls, self._own_bytes = random.Random(seed), stalls, own_bytes
        self._queue: deque[float] = deque()
        self._stalled_until = 0.0
        #: (when, bytes)
        self.carried: list[tuple[float, float]] = []

    def take(self, size: float) -> None:
        self._queue.append(OVERHEAD * size)

    def step(self, now: float, seconds: float) -> float:
        """What is on the wire in the next `seconds`."""
        if self._stalls and self._random.random() < 0.05 * seconds:
            self._stalled_until = now + self._random.uniform(0, 4)
        sent = self._own_bytes * seconds
        if now >= self._stalled_until:
            sent += sum(self._queue)
            self._queue.clear()
        self.carried.append((now, sent))
        return sent

    def most_in_a_window(self) -> float:
        """An independent sum: of every window that begins with something carried."""
        return max(
            sum(size for when, size in self.carried[i:] if when < self.carried[i][0] + WINDOW_SECONDS)
            for i in range(len(self.carried))
        )


def play(rate: float, frame: float, seconds: float, daemon: Daemon, budget: Budget, pauses: bool, seed: int) -> None:
    """Somebody who always has a frame, but for pauses, and looks at the wire as a line does."""
    choose, now, looked_at, unseen, silent_until = random.Random(seed), 0.0, 0.0, 0.0, 0.0
    step = 0.05
    while now < seconds:
        if pauses and choose.random() < 0.02:
            silent_until = now + choose.uniform(0, 15)
        while now >= silent_until and not budget.wait_seconds(frame, now):
            budget.spend(frame, now)
            daemon.take(frame)
        unseen += daemon.step(now, step)
        now += step
        if now - looked_at >= LOOK_SECONDS:
            budget.observe(unseen, now)
            unseen, looked_at = 0.0, now


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rate=st.sampled_from([8e3, 125e3, 5e6]),
    stalls=st.booleans(),
    pauses=st.booleans(),
    own_share=st.floats(0, 0.1),
    seed=st.integers(0, 2**32),
)
def test_no_window_carries_more_than_the_limit_and_five_percent(
    rate: float, stalls: bool, pauses: bool, own_share: float, seed: int
) -> None:
    daemon = Daemon(seed, stalls, own_share * rate)
    play(rate, 0.1 * rate, 45.0, daemon, Budget(0.97 * rate, 0.0), pauses, seed)
    assert daemon.most_in_a_window() <= 1.05 * WINDOW_SECONDS * rate


def test_a_calm_line_is_used_to_the_full_with_the_daemons_bytes_in_it() -> None:
    daemon = Daemon(1, False, 5e3)
    play(125e3, 12.5e3, 120.0, daemon, Budget(125e3, 0.0), False, 1)
    mean = sum(size for _, size in daemon.carried) / 120
    assert 0.93 * 125e3 < mean <= 1.01 * 125e3


def test_a_message_longer_than_a_window_goes_and_is_paid_for_afterwards() -> None:
    budget = Budget(8e3, 0.0, burst_bytes=80e3)
    sent, now = 0, 0.0
    while now < 650.0:
        if not budget.wait_seconds(512e3, now):
            budget.spend(512e3, now)
            budget.observe(512e3, now)
            sent += 1
        budget.observe(0.2 * 8e3 * 0.25, now)  # the DHT goes on
        now += 0.25
    assert 7 <= sent <= 10


def test_what_never_reaches_the_wire_is_given_back() -> None:
    budget = Budget(1000.0, 0.0)
    budget.spend(9950.0, 0.0)
    assert budget.wait_seconds(100.0, 15.0)
    assert not budget.wait_seconds(100.0, 21.0)


def test_a_bucket_that_was_saved_up_gives_no_more_than_that_at_once() -> None:
    budget = Budget(100.0, 0.0, burst_bytes=60_000.0, filled=0.5, windowed=False)
    sent = 0
    while not budget.wait_seconds(1000.0, 0.0):
        budget.spend(1000.0, 0.0)
        sent += 1000
    assert 30_000 <= sent <= 31_000


@given(left=st.floats(0, 1e15), seconds=st.floats(1, 31 * 86400))
def test_a_month_that_is_spent_at_its_rate_lasts_to_its_end(left: float, seconds: float) -> None:
    assert spread_rate(left, seconds) * seconds <= left * (1 + 1e-9)


def test_a_burst_is_a_small_part_of_a_window() -> None:
    assert BURST_SECONDS / WINDOW_SECONDS <= 0.03
