"""Whether a volunteer's machine may train, and how a machine is looked at."""

from __future__ import annotations

import json
import math
import queue
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.config.home import Home
from p2ptrain.config.volunteer import Volunteer, parse_hours
from p2ptrain.peer.machine_use import VARIABLE, FileUse, MachineUse, idle_of_sessions, looker
from p2ptrain.peer.owner import Owner
from p2ptrain.peer.volunteering import LOAD_SECONDS, Judge, Seen, Watch

MONDAY_NOON = 12 * 60


def seen(at: float = 0.0, **other: Any) -> Seen:
    return Seen(at_seconds=at, week_minute=other.pop("week_minute", MONDAY_NOON), **other)


@pytest.mark.parametrize(
    ("wish", "use", "kind", "why"),
    [
        ({}, {}, "", ""),
        ({"not_while": ("Steam",)}, {"programs": frozenset({"steam", "bash"})}, "program", "Steam runs"),
        ({"not_while": ("steam",)}, {"programs": frozenset({"steamwebhelper"})}, "", ""),
        (
            {"hours": ("Mon-Fri 18:00-08:00",)},
            {},
            "hours",
            "Mon 12:00 is none of its hours; they begin Mon 18:00",
        ),
        ({}, {"on_battery": True}, "battery", "it runs on battery"),
        ({"on_battery": True}, {"on_battery": True}, "", ""),
        ({}, {"on_metered": True}, "metered", "its line is metered"),
        ({"on_metered": True}, {"on_metered": True}, "", ""),
        ({}, {"idle_seconds": 12.0}, "idle", "keyboard or mouse were used 12 s ago, and idle is 3 min"),
        ({}, {"idle_seconds": math.inf}, "", ""),
        ({"idle_minutes": 0}, {"idle_seconds": 0.0}, "", ""),
    ],
)
def test_each_preference_says_in_a_line_why_not(wish: dict[str, Any], use: dict[str, Any], kind: str, why: str) -> None:
    assert Judge(Volunteer(**wish))(seen(**use)) == (kind, why)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5)), max_size=60), st.integers(0, 2))
def test_load_of_others_counts_once_it_lasts_and_until_the_machine_was_calm_as_long_as_it_must_be_idle(
    looks: list[tuple[float, int]], minutes: int
) -> None:
    judge, at = Judge(Volunteer(idle_minutes=minutes)), 0.0
    past: list[tuple[float, float]] = []
    for load, later in looks:
        at += later
        past.append((at, load))
        # The plain reading: a look counts if no look within the last LOAD_SECONDS, one before them included, was calm.
        counted = [
            when
            for number, (when, _) in enumerate(past)
            if any(
                when - began >= LOAD_SECONDS and all(much > 25 for _, much in past[first : number + 1])
                for first, (began, _) in enumerate(past[: number + 1])
            )
        ]
        wanted = bool(counted) and (counted[-1] == at or at - counted[-1] < 60 * minutes)
        assert bool(judge(seen(at, other_load_percent=load)).kind) == wanted


@given(st.integers(0, 7 * 1440 - 1), st.booleans(), st.booleans(), st.floats(0, 1000))
def test_a_machine_trains_only_where_nothing_speaks_against_it(
    minute: int, battery: bool, metered: bool, idle: float
) -> None:
    hours = "Mon-Fri 18:00-08:00"
    verdict = Judge(Volunteer(hours=(hours,)))(
        seen(week_minute=minute, on_battery=battery, on_metered=metered, idle_seconds=idle)
    )
    free = minute in parse_hours(hours) and not battery and not metered and idle >= 180
    assert bool(verdict.kind) != free and bool(verdict.why) != free


def test_logind_counts_sessions_of_a_seat_and_the_one_used_last() -> None:
    def session(**fields: str) -> str:
        return "\n".join(f"{key}={value}" for key, value in fields.items())

    idle = session(Seat="seat0", Class="user", IdleHint="yes", IdleSinceHint="990000000")
    longer = session(Seat="seat0", Class="user", IdleHint="yes", IdleSinceHint="900000000")
    used = session(Seat="seat0", Class="user", IdleHint="no", IdleSinceHint="0")
    remote = session(Seat="", Class="user", IdleHint="no", IdleSinceHint="0")
    greeter = session(Seat="seat0", Class="greeter", IdleHint="no", IdleSinceHint="0")
    assert idle_of_sessions("\n\n".join([longer, idle, remote, greeter]), 1000.0) == pytest.approx(10.0)
    assert idle_of_sessions("\n\n".join([idle, used]), 1000.0) == 0.0
    assert idle_of_sessions("\n\n".join([remote, greeter]), 1000.0) == math.inf


def command(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_a_source_that_is_there_is_used_and_one_that_is_not_is_said_once(tmp_path: Path) -> None:
    """By commands of the names that they have, which print what those of a desktop print."""
    environment = {"PATH": str(tmp_path)}
    bare = MachineUse((), environment)
    assert bare.look().idle_seconds is None
    assert "keyboard and mouse by logind: no loginctl here" in bare.missing()
    assert "metered line: no busctl here" in bare.missing() and bare.look().programs is None

    command(tmp_path, "busctl", 'case "$*" in *GetIdletime*) echo "t 4200";; *Metered*) echo "u 3";; esac')
    command(tmp_path, "xprintidle", "echo 7000")
    session = "Seat=seat0\nClass=user\nIdleHint=no\nIdleSinceHint=0"
    command(tmp_path, "loginctl", f'case "$1" in list-sessions) echo "3 1000 ada";; *) echo "{session}";; esac')
    found = MachineUse((), environment).look()
    assert (found.idle_seconds, found.on_metered) == (0.0, True), "logind, as no session is known"
    assert MachineUse((), environment | {"DISPLAY": ":0"}).look().idle_seconds == 7.0
    assert MachineUse((), environment | {"XDG_CURRENT_DESKTOP": "ubuntu:GNOME"}).look().idle_seconds == 4.2


def test_a_named_program_is_found_while_it_runs_and_the_load_of_others_is_a_share(tmp_path: Path) -> None:
    name = "some-game"
    shutil.copy(shutil.which("sleep") or "", tmp_path / name)
    use = MachineUse((name,))
    assert name not in (use.look().programs or ())
    running = subprocess.Popen([tmp_path / name, "600"])
    try:
        found = use.look()
    finally:
        running.kill()
        running.wait()
    assert found.programs is not None and name in found.programs
    assert found.other_load_percent is not None and 0 <= found.other_load_percent <= 100
    assert name not in (use.look().programs or ())


def test_a_file_may_say_what_a_machine_shows_and_one_that_is_broken_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    use = looker((), {VARIABLE: str(path)})
    assert isinstance(use, FileUse)
    told: list[str] = []
    watch = Watch(Volunteer(), use.look, lambda verdict: told.append(verdict.kind))
    for text in ('{"idle_seconds": 1}', "{", '{"idle": 9}', '{"idle_seconds": 1000}', ""):
        path.write_text(text)
        watch.once()
    assert told == ["idle", ""]
    assert watch.summary()["wanted"] == "" and watch.summary()["idle_seconds"] == 1000.0
    json.dumps(watch.summary(), allow_nan=False)


def test_a_watch_that_is_closed_leaves_no_thread() -> None:
    watch = Watch(Volunteer(), lambda: seen(), lambda verdict: None)
    watch.start()
    watch.close()
    assert "p2ptrain-volunteer" not in {thread.name for thread in threading.enumerate()}


def test_without_psutil_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(Exception, match="volunteering needs psutil") as caught:
        MachineUse(())
    assert "p2ptrain[volunteer]" in caught.value.hint  # type: ignore[attr-defined]


def test_a_pause_of_the_owners_outlasts_the_machines_being_wanted(tmp_path: Path) -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    owner = Owner(Home(tmp_path), lambda: inbox.put(None))
    owner.want("steam runs")
    assert not owner.trains_on and owner.why_paused == "this machine is wanted: steam runs"
    owner.pause_until = math.inf
    waiting = threading.Thread(target=owner.await_resume, args=(inbox,), daemon=True)
    waiting.start()
    owner.want("")
    waiting.join(0.2)
    assert waiting.is_alive() and owner.why_paused == "its owner has paused it"
    owner.pause_until = None
    inbox.put(None)
    waiting.join(10)
    assert owner.trains_on and not waiting.is_alive()
