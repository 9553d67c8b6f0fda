"""What a month has carried outlives a restart and a kill, and ends with the month."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from p2ptrain.errors import HomeError
from p2ptrain.state.transfer import WRITE_SECONDS, MonthlyTransfer, month_ends_at


def seconds(*when: int) -> float:
    return datetime.datetime(*when, tzinfo=datetime.UTC).timestamp()  # type: ignore[arg-type]


NOON = seconds(2026, 11, 29, 12)


def test_a_restart_goes_on_counting_and_a_kill_forgets_seconds_at_most(tmp_path: Path) -> None:
    path = tmp_path / "transfer.json"
    first = MonthlyTransfer(path, NOON)
    for second in range(100):
        first.count(1000, 10, NOON + second)
    killed = MonthlyTransfer(path, NOON + 100)
    assert 0 <= 100_000 - killed.sent_bytes <= 1000 * WRITE_SECONDS
    first.write(NOON + 100)
    again = MonthlyTransfer(path, NOON + 200)
    assert (again.sent_bytes, again.received_bytes, again.used_bytes(NOON + 200)) == (100_000, 1000, 101_000)


def test_the_next_month_begins_at_zero_in_a_running_peer_and_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "transfer.json"
    transfer = MonthlyTransfer(path, NOON)
    transfer.count(5, 5, NOON)
    december = seconds(2026, 12, 1)
    assert month_ends_at(NOON) == december and month_ends_at(december - 1) == december
    assert month_ends_at(december) == seconds(2027, 1, 1)
    assert MonthlyTransfer(path, december - 1).used_bytes(december - 1) == 10
    assert MonthlyTransfer(path, december).used_bytes(december) == 0
    assert transfer.used_bytes(december) == 0, "of which nothing was carried yet"
    transfer.count(1, 1, december)
    assert transfer.used_bytes(december) == 2 and MonthlyTransfer(path, december).used_bytes(december) == 2


def test_a_clock_that_is_set_back_forgets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "transfer.json"
    MonthlyTransfer(path, NOON).count(7, 0, NOON)
    assert MonthlyTransfer(path, seconds(2026, 3, 1)).used_bytes(seconds(2026, 3, 1)) == 7


def test_a_file_that_cannot_be_read_is_said_and_not_counted_anew(tmp_path: Path) -> None:
    path = tmp_path / "transfer.json"
    path.write_text('{"month": "2026-11", "sent_bytes": -1, "received_bytes": 0, "written_at": 0}')
    with pytest.raises(HomeError, match=r"transfer\.json"):
        MonthlyTransfer(path, NOON)
