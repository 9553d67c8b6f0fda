"""Whether a volunteer's machine may train now, and why not, from what it shows of its use.

`Judge` decides and knows no clock and no machine; `Watch` asks it about once a second, in a thread of its own, so that
a command that a look runs holds up nothing else. `machine_use` looks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from p2ptrain.config.volunteer import DAY_MINUTES, DAYS, WEEK_MINUTES, Volunteer, all_hours

LOOK_SECONDS = 1.0
LOAD_SECONDS = 2.0
"""So long must others compute much: any machine has shorter bursts, and each pause costs the swarm a goodbye."""

_logger = logging.getLogger(__name__)


class Seen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a machine shows of its use; None: it does not show that."""

    at_seconds: float
    """Of a clock that goes on steadily."""
    week_minute: Annotated[int, Meta(ge=0, lt=WEEK_MINUTES)]
    """Since Monday 00:00, by the wall clock."""
    idle_seconds: Annotated[float, Meta(ge=0)] | None = None
    """Since keyboard or mouse were used; infinite: nobody sits there."""
    other_load_percent: Annotated[float, Meta(ge=0)] | None = None
    """Of all cores, what other programs compute."""
    on_battery: bool | None = None
    on_metered: bool | None = None
    programs: frozenset[str] | None = None
    """Names of those that run, in lower case."""


class Verdict(NamedTuple):
    """Whether to train."""

    kind: str = ""
    """Of what speaks against it: program, hours, battery, metered, idle or load; empty: nothing."""
    why: str = ""
    """In words, for people."""


class Judge:
    """Says whether the machine is wanted; remembers since when others have been computing.

    Args:
        preferences: of the owner.
    """

    def __init__(self, preferences: Volunteer) -> None:
        self._wish = preferences
        self._hours = all_hours(preferences.hours)
        self._not_while = {name.lower(): name for name in preferences.not_while}
        #: since when others have been computing much; None: they are not
        self._busy_since: float | None = None
        #: when they last were, for long enough to count
        self._busy_at: float | None = None

    def __call__(self, seen: Seen) -> Verdict:
        """Return what speaks against training, the most certain first; looks must come in order of their time."""
        wish = self._wish
        load = self._load(seen)
        for name in sorted(seen.programs & self._not_while.keys() if seen.programs else ()):
            return Verdict("program", f"{self._not_while[name]} runs")
        if self._hours is not None and seen.week_minute not in self._hours:
            return Verdict("hours", f"{_clock(seen.week_minute)} is none of its hours; they begin {self._next(seen)}")
        if seen.on_battery and not wish.on_battery:
            return Verdict("battery", "it runs on battery")
        if seen.on_metered and not wish.on_metered:
            return Verdict("metered", "its line is metered")
        if seen.idle_seconds is not None and seen.idle_seconds < 60 * wish.idle_minutes:
            ago = f"keyboard or mouse were used {seen.idle_seconds:.0f} s ago"
            return Verdict("idle", f"{ago}, and idle is {wish.idle_minutes:g} min")
        return load

    def _load(self, seen: Seen) -> Verdict:
        load, most = seen.other_load_percent, self._wish.other_load_percent
        if load is None or not most:
            return Verdict()
        if load <= most:
            self._busy_since = None
        elif self._busy_since is None:
            self._busy_since = seen.at_seconds
        if self._busy_since is not None and seen.at_seconds - self._busy_since >= LOAD_SECONDS:
            self._busy_at = seen.at_seconds
        if self._busy_at is None:
            return Verdict()
        ago = seen.at_seconds - self._busy_at
        if ago == 0:
            return Verdict("load", f"other programs compute: {load:.0f} % of its cores, more than {most:g} %")
        if ago < 60 * self._wish.idle_minutes:
            since = f"other programs computed much {ago:.0f} s ago"
            return Verdict("load", f"{since}, and idle is {self._wish.idle_minutes:g} min")
        return Verdict()

    def _next(self, seen: Seen) -> str:
        assert self._hours is not None
        ahead = next(n for n in range(WEEK_MINUTES) if (seen.week_minute + n) % WEEK_MINUTES in self._hours)
        return _clock((seen.week_minute + ahead) % WEEK_MINUTES)


def _clock(week_minute: int) -> str:
    day, minute = divmod(week_minute, DAY_MINUTES)
    return f"{DAYS[day]} {minute // 60:02}:{minute % 60:02}"


class Watch:
    """Looks at a machine about once a second until closed, and says so when it is wanted, or is not any more.

    Args:
        preferences: of the owner.
        look: at the machine; what it raises is logged once, and the verdict before it holds.
        tell: hears each verdict, in the watch's thread.
        missing: what the machine does not show, for people.
    """

    def __init__(
        self,
        preferences: Volunteer,
        look: Callable[[], Seen],
        tell: Callable[[Verdict], None],
        missing: Callable[[], list[str]] = list,
    ) -> None:
        self._judge, self._look, self._tell, self._missing = Judge(preferences), look, tell, missing
        #: what was found last, whole or replaced
        self.found: tuple[Seen, Verdict] | None = None
        self._failed = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="p2ptrain-volunteer", daemon=True)

    def start(self) -> None:
        """Look once, and from then on in a thread of its own."""
        self.once()
        self._thread.start()

    def close(self) -> None:
        """Look no more. Idempotent."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def once(self) -> None:
        """Look, judge and tell."""
        try:
            seen = self._look()
        except Exception as error:
            if self._failed != repr(error):
                self._failed = repr(error)
                _logger.warning("cannot see whether this machine is wanted: %r", error)
            return
        verdict = self._judge(seen)
        before = self.found[1].kind if self.found else ""
        self.found = seen, verdict
        if verdict.kind != before:
            _logger.info(
                "this machine is %s", f"wanted: {verdict.why}" if verdict.kind else "not wanted for anything else"
            )
        self._tell(verdict)

    def summary(self) -> dict[str, Any]:
        """Return what was found last, as an answer to an owner has it."""
        found = self.found
        seen = {} if found is None else msgspec.to_builtins(found[0])
        idle = seen.get("idle_seconds")
        return {
            "wanted": "" if found is None else found[1].why,
            "idle_seconds": None if idle == float("inf") else idle,
            "other_load_percent": seen.get("other_load_percent"),
            "on_battery": seen.get("on_battery"),
            "on_metered": seen.get("on_metered"),
            "not_seen": self._missing(),
        }

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.once()
