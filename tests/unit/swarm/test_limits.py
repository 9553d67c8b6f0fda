"""Claims about token buckets and pauses, on a clock that the test sets."""

from __future__ import annotations

from p2ptrain.swarm import limits
from p2ptrain.swarm.limits import KEYS_MAX, Allowance, Backoff


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_gives_its_burst_and_then_its_rate_to_each_key() -> None:
    clock = Clock()
    allowance = Allowance(2.0, 5.0, clock)
    assert sum(allowance.take("a") for _ in range(20)) == 5
    clock.now += 1.5
    assert sum(allowance.take("a") for _ in range(20)) == 3
    assert sum(allowance.take("b") for _ in range(20)) == 5
    clock.now += 1000
    assert sum(allowance.take("a") for _ in range(20)) == 5


def test_asking_in_vain_does_not_put_the_next_token_off() -> None:
    clock = Clock()
    allowance = Allowance(1.0, 1.0, clock)
    taken = 0
    for _ in range(1000):
        taken += allowance.take()
        clock.now += 0.01
    assert taken in (10, 11)


def test_a_pause_doubles_up_to_the_longest_and_ends_with_a_success() -> None:
    clock = Clock()
    backoff = Backoff(2.0, 7.0, clock)
    pauses = []
    for _ in range(4):
        backoff.failed("a")
        began = clock.now
        while not backoff.ready("a"):
            clock.now += 0.5
        pauses.append(clock.now - began)
    assert pauses == [2.0, 4.0, 7.0, 7.0]
    assert backoff.ready("b")
    backoff.succeeded("a")
    backoff.failed("a")
    clock.now += 2.0
    assert backoff.ready("a")


def test_any_number_of_keys_takes_bounded_memory() -> None:
    allowance, backoff = Allowance(1.0, 1.0), Backoff(1.0, 1.0)
    for key in range(2 * KEYS_MAX):
        allowance.take(key)
        backoff.failed(key)
    assert len(allowance._buckets) == len(backoff._pauses) == limits.KEYS_MAX
