"""The rate of a line, from messages that are sent anyway."""

from __future__ import annotations

import pytest

from p2ptrain.calls.uplink import CAREFUL_KBIT, LEAST_KBIT, MOST_KBIT, ROUNDS_NEEDED, USUAL_KBIT, UplinkMeter


def send_round(
    meter: UplinkMeter, kbit: float, *, receivers: int = 3, parts: int = 2, at_once: bool = True, way: float = 0.08
) -> None:
    """Messages of 25 kB each over a line of this rate, each receiver's parts one after the other."""
    burst, size = meter.burst(receivers * parts), 25_000
    carried_seconds = size * 8 / 1000 / kbit
    took = carried_seconds * (receivers if at_once else 1)
    each = [(receiver, part) for receiver in range(receivers) for part in range(parts)]
    places = [(part if at_once else receiver * parts + part, receiver) for receiver, part in each]
    for place, receiver in sorted(places):
        began = 5.0 + place * took
        burst.arrived(bytes([receiver]), size, began, began + way + took, took)


@pytest.mark.parametrize("kbit", [300, 1_000, 10_000, 90_000])
@pytest.mark.parametrize("receivers, parts", [(1, 1), (3, 1), (1, 4), (5, 3)])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("way", [0.0, 0.3])
def test_the_rate_is_that_of_the_line(kbit: int, receivers: int, parts: int, at_once: bool, way: float) -> None:
    meter = UplinkMeter(dialable=True)
    for _ in range(5):
        send_round(meter, kbit, receivers=receivers, parts=parts, at_once=at_once, way=way)
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


def test_receivers_that_read_late_do_not_make_the_line_look_fast() -> None:
    """Their payloads had come with the headers; the last one's had not."""
    meter = UplinkMeter(dialable=True)
    for _ in range(5):
        burst = meter.burst(3)
        burst.arrived(b"a", 25_000, 5.0, 5.68, 0.0)
        burst.arrived(b"b", 25_000, 5.0, 5.68, 0.01)
        burst.arrived(b"c", 25_000, 5.0, 5.68, 0.6)
    assert meter.declared_kbit == pytest.approx(1_000, rel=0.05)


@pytest.mark.parametrize("late_seconds", [0.0, 2.0, 60.0])
def test_answers_that_wait_in_another_line_do_not_make_ours_slow(late_seconds: float) -> None:
    meter = UplinkMeter(dialable=True)
    for _ in range(5):
        burst = meter.burst(3)
        for number in range(3):
            burst.arrived(bytes([number]), 25_000, 5.0, 5.08 + 0.2 * (number + 1) + late_seconds, 0.2)
    assert meter.declared_kbit == pytest.approx(1_000, rel=0.01)


def test_who_lies_about_its_time_gains_no_more_than_by_a_late_answer() -> None:
    meter = UplinkMeter(dialable=True)
    for _ in range(5):
        burst = meter.burst(2)
        burst.arrived(b"a", 25_000, 5.0, 5.48, 0.4)
        burst.arrived(b"b", 25_000, 5.0, 5.48, 1e6)
    assert meter.declared_kbit == pytest.approx(1_000, rel=0.25)


def test_what_is_said_has_bounds_and_who_cannot_be_dialled_says_nothing() -> None:
    fast, slow, hidden = UplinkMeter(dialable=True), UplinkMeter(dialable=True), UplinkMeter(dialable=False)
    for _ in range(5):
        send_round(fast, 10_000_000)
        send_round(slow, 1)
        send_round(hidden, 10_000)
    assert (fast.declared_kbit, slow.declared_kbit, hidden.declared_kbit) == (MOST_KBIT, LEAST_KBIT, 0)


def test_an_owner_who_allows_less_than_any_line_has_is_heeded() -> None:
    allowed = [51]
    meter = UplinkMeter(dialable=True, ceiling_kbit=lambda: allowed[0])
    assert (meter.declared_kbit, meter.line_kbit) == (51, 51)
    for _ in range(ROUNDS_NEEDED):
        meter.observe(1_000_000, 1.0, 0.01)
    assert (meter.declared_kbit, meter.line_kbit) == (51, 51)
    allowed[0] = 0
    assert meter.declared_kbit == 1, "0 would say that nobody can dial this peer"


def test_a_message_sent_twice_or_never_answered_spoils_its_round_alone() -> None:
    meter = UplinkMeter(dialable=True)
    for _ in range(5):
        send_round(meter, 5_000)
        unanswered = meter.burst(2)
        unanswered.arrived(b"a", 25_000, 0.0, 100.0, 99.0)
        repeated = meter.burst(2)
        repeated.spoil()
        repeated.arrived(b"a", 25_000, 0.0, 100.0, 99.0)
        repeated.arrived(b"b", 25_000, 0.0, 100.0, 99.0)
    assert meter.declared_kbit == pytest.approx(5_000, rel=0.01)
