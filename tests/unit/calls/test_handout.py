"""How much of its line and its time a donor gives."""

from __future__ import annotations

import math

from p2ptrain.calls.handout import BUSY_BYTES_A_CORE, RATE_MIN_BYTES, SHARE, Handout
from p2ptrain.calls.uplink import MOST_KBIT, USUAL_KBIT


def test_an_idle_donor_whose_line_nobody_else_needs_gives_all_of_it_from_a_standing_start() -> None:
    assert Handout(lambda: USUAL_KBIT, shared=lambda: False).rate == math.inf


def test_where_rounds_need_the_line_too_they_have_a_tenth_of_it() -> None:
    assert Handout(lambda: 10_000).rate == SHARE * 1_250_000
    assert Handout(lambda: MOST_KBIT).rate == math.inf, "such a line is not what limits a round"
    assert Handout(lambda: 0).rate == RATE_MIN_BYTES


def test_a_donor_that_trains_gives_what_its_cores_have_left() -> None:
    donor = Handout(lambda: MOST_KBIT, busy=lambda: True, cores=3)
    assert donor.rate == 3 * BUSY_BYTES_A_CORE


def test_the_owner_says_how_much_at_most() -> None:
    for busy in (False, True):
        donor = Handout(lambda: 50_000, shared=lambda: False, busy=lambda of=busy: of, most_kbit=4000)  # type: ignore[misc]
        assert donor.rate == 500_000
