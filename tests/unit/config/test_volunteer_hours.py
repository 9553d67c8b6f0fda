"""Hours of the week, against a plain reading of the clock; and what `[volunteer]` of node.toml may say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.config.node import resolve_settings
from p2ptrain.config.volunteer import DAYS, Volunteer, parse_hours
from p2ptrain.errors import UsageError

MINUTES = st.integers(0, 1439)


def text_of(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


@given(st.integers(0, 6), st.integers(0, 6), MINUTES, st.integers(1, 1440), st.integers(0, 6), MINUTES)
def test_a_minute_is_within_if_it_is_on_such_a_day_or_on_the_morning_after(
    first: int, last: int, begin: int, end: int, day: int, minute: int
) -> None:
    if begin == end:
        return
    hours = parse_hours(f"{DAYS[first]}-{DAYS[last]} {text_of(begin)}-{text_of(end)}")

    def named(day: int) -> bool:
        return first <= day <= last if first <= last else day >= first or day <= last

    if begin < end:
        expected = named(day) and begin <= minute < end
    else:
        expected = (named(day) and minute >= begin) or (named((day - 1) % 7) and minute < end)
    assert (day * 1440 + minute in hours) == expected


@given(st.lists(st.sampled_from(DAYS), min_size=1, max_size=7), MINUTES)
def test_days_may_be_listed_one_by_one(days: list[str], minute: int) -> None:
    hours = parse_hours(f"{','.join(days)} 00:00-24:00")
    assert {number // 1440 for number in hours} == {DAYS.index(day) for day in days}
    assert len(hours) == 1440 * len(set(days))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weekends", "expected days and a time"),
        ("Mon-Fry 18:00-08:00", "there is no day 'Fry'"),
        ("Mon 25:00-08:00", "there is no 25:00"),
        ("Mon 08:00-08:00", "a whole day is 00:00-24:00"),
    ],
)
def test_hours_that_are_none_are_refused_with_what_is_expected(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        parse_hours(text)
    (tmp_path / "node.toml").write_text(f'[volunteer]\nhours = ["{text}"]')
    with pytest.raises(UsageError, match=said) as caught:
        resolve_settings(tmp_path, {}, {})
    assert str(tmp_path / "node.toml") in str(caught.value)


def test_the_flag_turns_on_what_the_file_describes_and_the_environment_may_too(tmp_path: Path) -> None:
    assert not resolve_settings(tmp_path, {"volunteer": None}, {}).volunteer.enabled
    (tmp_path / "node.toml").write_text('[volunteer]\nidle_minutes = 5\nnot_while = ["steam"]')
    wish = Volunteer(idle_minutes=5, not_while=("steam",))
    assert resolve_settings(tmp_path, {}, {}).volunteer == wish
    for settings in (
        resolve_settings(tmp_path, {"volunteer": True}, {}),
        resolve_settings(tmp_path, {}, {"P2PTRAIN_VOLUNTEER": "1"}),
    ):
        assert settings.volunteer.enabled and settings.volunteer.not_while == ("steam",)


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("idle_minute = 3", "unknown key volunteer.idle_minute", "did you mean volunteer.idle_minutes?"),
        ("other_load_percent = 250", "volunteer.other_load_percent: Expected `float` <= 100", "Of all cores"),
        ('on_battery = "no"', "volunteer.on_battery", "Train on battery"),
    ],
)
def test_a_preference_that_does_not_fit_is_named_with_what_it_means(
    text: str, said: str, hint: str, tmp_path: Path
) -> None:
    (tmp_path / "node.toml").write_text(f"[volunteer]\n{text}")
    with pytest.raises(UsageError) as caught:
        resolve_settings(tmp_path, {}, {})
    assert said in str(caught.value) and hint in caught.value.hint
