"""How much of its line and its time a donor gives."""

from __future__ import annotations

import math
from pathlib import Path

from p2ptrain.calls.handout import BUSY_BYTES_A_CORE, RATE_MIN_BYTES, SHARE, Handout
from p2ptrain.calls.uplink import MOST_KBIT, USUAL_KBIT, UplinkMeter
from p2ptrain.state.transfer import MonthlyTransfer
from p2ptrain.swarm.line import HEADROOM, Allowed, Line


def test_an_idle_donor_whose_line_nobody_else_needs_gives_all_of_it_from_a_standing_start() -> None:
    assert Handout(lambda: USUAL_KBIT, shared=lambda: False).rate == math.inf


def test_where_rounds_need_the_line_too_they_have_a_tenth_of_it() -> None:
    assert Handout(lambda: 10_000).rate == SHARE * 1_250_000
    assert Handout(lambda: MOST_KBIT).rate == math.inf, "such a line is not what limits a round"
    assert Handout(lambda: 0).rate == RATE_MIN_BYTES


def test_a_donor_that_trains_gives_what_its_cores_have_left() -> None:
    donor = Handout(lambda: MOST_KBIT, busy=lambda: True, cores=3)
    assert donor.rate == 3 * BUSY_BYTES_A_CORE


def test_a_donor_gives_what_the_owners_limit_leaves_over(tmp_path: Path) -> None:
    limit = 500_000
    line = Line(Allowed(upload_rate=limit), MonthlyTransfer(tmp_path / "transfer.json", 0.0))
    # Its line was measured as faster than the limit, which is what it is used and declared as.
    uplink = UplinkMeter(dialable=True, ceiling_kbit=lambda: line.ceiling_kbit)
    alone = Handout(lambda: uplink.line_kbit, shared=lambda: False, most_bytes=lambda: line.upload_rate)
    assert alone.rate == HEADROOM * limit, "nobody else needs the line"
    shared = Handout(lambda: uplink.line_kbit, most_bytes=lambda: line.upload_rate)
    assert 0.6 * limit < shared.rate < 0.8 * limit, "rounds and the DHT have the rest"


def test_no_donor_gives_more_than_the_owner_lets_it_send() -> None:
    assert Handout(lambda: 0, most_bytes=lambda: 8_000.0).rate == 8_000 < RATE_MIN_BYTES
    assert Handout(lambda: MOST_KBIT, busy=lambda: True, most_bytes=lambda: 1e5, cores=64).rate == 100_000
