"""Claims about a clock that goes wrong while a peer runs, on clocks that the test sets."""

from __future__ import annotations

from hivemind.dht.protocol import MAX_DHT_TIME_DISCREPANCY_SECONDS

from p2ptrain.swarm.clock import WRONG_SECONDS, ClockWatch


def test_a_clock_is_wrong_where_hivemind_does_not_believe_it() -> None:
    assert WRONG_SECONDS == MAX_DHT_TIME_DISCREPANCY_SECONDS


def test_a_sleep_and_a_clock_that_is_set_are_said_once_each() -> None:
    watch = ClockWatch()
    said = [watch.looked(1000.0 + second, 50.0 + second) for second in range(60)]
    assert not any(said), "both go on alike"
    # Asleep for an hour: the monotonic clock stands still.
    assert "slept for 3600 s" in watch.looked(4660.0, 110.0)
    assert watch.looked(4670.0, 120.0) == ""
    assert "set back by 3600 s" in watch.looked(1080.0, 130.0)
    assert watch.looked(1090.0, 140.0) == ""


def test_a_drift_too_slow_for_a_jump_is_said_once_and_so_is_its_end() -> None:
    watch = ClockWatch()
    said = [watch.looked(1000.0 + 10.1 * n, 10.0 * n) for n in range(100)]
    assert not any(said), "no single look shows it"
    off = [0.1 * n for n in range(100)]
    told = [text for text in (watch.compared([ahead, ahead + 0.2, ahead - 0.2]) for ahead in off) if text]
    assert len(told) == 1 and "3 s ahead of the swarm's" in told[0]
    assert watch.compared([2.5]) == "", "it may go to and fro"
    assert watch.compared([0.1]) == "this machine's clock is right again"
    assert "20 s behind" in watch.compared([-20.0])


def test_one_of_three_who_lies_is_outvoted_and_nobody_says_nothing() -> None:
    watch = ClockWatch()
    assert watch.compared([0.1, -0.2, 1e9]) == ""
    assert watch.compared([]) == ""
