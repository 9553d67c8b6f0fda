"""The rate of a line, from messages that are sent anyway."""

from __future__ import annotations

import pytest

from p2ptrain.calls.uplink import CAREFUL_KBIT, LEAST_KBIT, MOST_KBIT, ROUNDS_NEEDED, USUAL_KBIT, UplinkMeter


def send_round(meter: UplinkMeter, kbit: float, *, way_seconds: float = 0.08, messages: int = 3) -> None:
    """Messages of 25 kB each over a line of this rate, to reducers `way_seconds` away, there and back."""
    burst, size = meter.burst(messages), 25_000
    carried_seconds = size * 8 / 1000 / kbit
    for number in range(messages):
        burst.heard(5.0, 5.0 + way_seconds + number * carried_seconds)
    for number in range(1, messages + 1):
        burst.arrived(5.0 + way_seconds + number * carried_seconds, size)


@pytest.mark.parametrize("kbit", [300, 1_000, 10_000, 90_000])
@pytest.mark.parametrize("way_seconds", [0.0, 0.3])
def test_the_rate_is_that_of_the_line_however_long_the_way(kbit: int, way_seconds: float) -> None:
    meter = UplinkMeter(dialable=True)
    for _ in range(5):
        send_round(meter, kbit, way_seconds=way_seconds)
    assert meter.declared_kbit == pytest.approx(kbit, rel=0.01)


def test_until_some_rounds_were_measured_a_peer_reduces_little() -> None:
    meter = UplinkMeter(dialable=True)
    for _ in range(ROUNDS_NEEDED - 1):
        send_round(meter, 3_000)
        assert meter.declared_kbit == CAREFUL_KBIT and meter.line_kbit == USUAL_KBIT
    send_round(meter, 3_000)
    assert meter.declared_kbit == meter.line_kbit == pytest.approx(3_000, rel=0.01)


def test_single_rounds_that_something_else_slowed_do_not_count() -> None:
    meter = UplinkMeter(dialable=True)
    for number in range(20):
        send_round(meter, 20_000 if number % 3 == 2 else 5_000 + 100 * number)
    assert meter.declared_kbit == pytest.approx(20_000, rel=0.01)


@pytest.mark.parametrize("late_seconds", [0.0, 2.0, 60.0])
def test_a_reducer_whose_answers_wait_in_its_own_line_does_not_make_ours_slow(late_seconds: float) -> None:
    meter = UplinkMeter(dialable=True)
    for _ in range(5):
        burst = meter.burst(3)
        for number in range(3):
            burst.heard(5.0, 5.08 + 0.2 * number)
        for number in range(1, 3):
            burst.arrived(5.08 + 0.2 * number, 25_000)
        burst.arrived(5.08 + 0.6 + late_seconds, 25_000)
    assert meter.declared_kbit == pytest.approx(1_000, rel=0.01)


def test_what_is_said_has_bounds_and_who_cannot_be_dialled_says_nothing() -> None:
    fast, slow, hidden = UplinkMeter(dialable=True), UplinkMeter(dialable=True), UplinkMeter(dialable=False)
    for _ in range(5):
        send_round(fast, 10_000_000)
        send_round(slow, 1)
        send_round(hidden, 10_000)
    assert (fast.declared_kbit, slow.declared_kbit, hidden.declared_kbit) == (MOST_KBIT, LEAST_KBIT, 0)


def test_a_message_sent_twice_or_never_answered_spoils_its_round_alone() -> None:
    meter = UplinkMeter(dialable=True)
    for _ in range(5):
        send_round(meter, 5_000)
        unanswered = meter.burst(2)
        unanswered.heard(0.0, 0.1)
        unanswered.arrived(100.0, 25_000)
        repeated = meter.burst(2)
        repeated.heard(0.0, 0.1)
        repeated.spoil()
        repeated.heard(49.9, 50.0)
        repeated.arrived(100.0, 25_000)
        repeated.arrived(100.0, 25_000)
    assert meter.declared_kbit == pytest.approx(5_000, rel=0.01)
