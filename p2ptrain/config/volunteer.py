"""When a volunteer's machine may be used, in the terms of BOINC's preferences; hours of a week as people write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
DAY_MINUTES = 24 * 60
WEEK_MINUTES = 7 * DAY_MINUTES
_HOURS = re.compile(r"(?P<days>[A-Za-z, -]+) +(?P<begin>\d\d?:\d\d) ?- ?(?P<end>\d\d?:\d\d)")

Hours = frozenset[int]
"""Minutes of a week, 0 being Monday 00:00."""


class Volunteer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When this machine may train: `[volunteer]` in node.toml."""

    enabled: bool = False
    """Train only when this machine is not wanted, as with --volunteer."""
    idle_minutes: Annotated[float, Meta(ge=0, le=DAY_MINUTES)] = 3.0
    """Since keyboard or mouse were used last, or since others computed much; 0: their use does not matter."""
    hours: tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...] = ()
    """Times of the week in which to train, by this machine's clock, as "Mon-Fri 18:00-08:00"; none: at any time."""
    on_battery: bool = False
    """Train on battery, too."""
    on_metered: bool = False
    """Train over a line that costs by its use, too."""
    not_while: tuple[Annotated[str, Meta(min_length=1, max_length=128)], ...] = ()
    """Programs by name, as "steam": no training while one of them runs."""
    other_load_percent: Annotated[float, Meta(ge=0, le=100)] = 25.0
    """Of all cores: no training while other programs compute more than this; 0: it does not matter."""

    def __post_init__(self) -> None:
        for number, text in enumerate(self.hours):
            try:
                parse_hours(text)
            except ValueError as error:
                raise ValueError(f'hours[{number}] = "{text}": {error}') from error


def parse_hours(text: str) -> Hours:
    """Return the minutes of a week that `text` names, such as `Mon-Fri 18:00-08:00` or `Sat, Sun 00:00-24:00`.

    A time that ends before it begins ends on the day after; days may go over the week's end, as in `Sat-Mon`.

    Raises:
        ValueError: it is none; says what is expected.
    """
    found = _HOURS.fullmatch(text.strip())
    if found is None:
        raise ValueError("expected days and a time, as Mon-Fri 18:00-08:00")
    begin, end = _minute(found["begin"]), _minute(found["end"])
    if begin in (end, DAY_MINUTES):
        raise ValueError("begins where it ends; a whole day is 00:00-24:00")
    length = (end - begin) % DAY_MINUTES or DAY_MINUTES
    return frozenset(
        (day * DAY_MINUTES + begin + minute) % WEEK_MINUTES for day in _days(found["days"]) for minute in range(length)
    )


def all_hours(texts: Sequence[str]) -> Hours | None:
    """Return what any of `texts` names; None: there are none, so that all times are meant."""
    return frozenset().union(*map(parse_hours, texts)) if texts else None


def _minute(text: str) -> int:
    hour, minute = map(int, text.split(":"))
    if minute > 59 or hour * 60 + minute > DAY_MINUTES:
        raise ValueError(f"there is no {text}; times are 00:00 to 24:00")
    return hour * 60 + minute


def _days(text: str) -> list[int]:
    days: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        begin = _day(first)
        end = _day(last) if dash else begin
        days += [(begin + more) % 7 for more in range((end - begin) % 7 + 1)]
    return days


def _day(text: str) -> int:
    name = text.capitalize()
    if name not in DAYS:
        raise ValueError(f"there is no day {text!r}; days are {', '.join(DAYS)}")
    return DAYS.index(name)
