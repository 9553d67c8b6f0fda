"""What a machine shows of its use by others: idle or not, load, battery, a metered line, programs.

Each source is asked in its own way: GNOME's shell and NetworkManager over D-Bus (`busctl`), X by `xprintidle`, logind
by `loginctl`, the rest by psutil. One that is not there is said once and left out. A look costs one or two small
commands, and a list of the processes where programs are named.

A file named by P2PTRAIN_VOLUNTEER_SEEN takes the place of all of them: JSON with the fields of `volunteering.Seen`,
read anew at each look, in which times may be left out. Tests and benchmarks use it; a script of the owner's may, too.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from p2ptrain.errors import UsageError
from p2ptrain.peer.volunteering import Seen

COMMAND_SECONDS = 2.0
"""For a small command to answer."""
SLOW_LOOK_SECONDS = 10.0
"""Between two looks at what changes rarely: the line, and which processes are this peer's own."""
FILE_MAX_BYTES = 65536
VARIABLE = "P2PTRAIN_VOLUNTEER_SEEN"

_logger = logging.getLogger(__name__)

T = TypeVar("T")


class NotThereError(Exception):
    """This machine has no such source; the text says what is missing."""


def looker(not_while: tuple[str, ...], environment: Mapping[str, str] = os.environ) -> MachineUse | FileUse:
    """Return what looks at this machine.

    Args:
        not_while: programs to look for; none: their names are not read.

    Raises:
        UsageError: psutil is not installed.
    """
    if environment.get(VARIABLE):
        return FileUse(Path(environment[VARIABLE]))
    return MachineUse(not_while, environment)


def _times() -> dict[str, Any]:
    now = time.localtime()
    return {"at_seconds": time.monotonic(), "week_minute": (now.tm_wday * 24 + now.tm_hour) * 60 + now.tm_min}


class FileUse:
    """Reads what a file says of the machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def look(self) -> Seen:
        """Read it. Raises OSError, ValueError."""
        with self._path.open("rb") as file:
            said = json.loads(file.read(FILE_MAX_BYTES))
        return msgspec.convert({**_times(), **said}, Seen)

    def missing(self) -> list[str]:
        """Return what is not shown: nothing, as the file says all."""
        return []


class MachineUse:
    """Looks at this machine.

    Raises:
        UsageError: psutil is not installed.
    """

    def __init__(self, not_while: tuple[str, ...], environment: Mapping[str, str] = os.environ) -> None:
        try:
            import psutil
        except ImportError as error:
            raise UsageError(
                "volunteering needs psutil, which is not installed", hint="pip install 'p2ptrain[volunteer]'"
            ) from error
        self._psutil, self._environment = psutil, environment
        self._not_while = not_while
        #: what this machine does not show -> why
        self._gone: dict[str, str] = {}
        #: what has answered before
        self._worked: set[str] = set()
        self._idle_sources = {"GNOME": self._idle_gnome, "X": self._idle_x, "logind": self._idle_logind}
        #: seconds of all cores, of others alone, at the last look
        self._computed: tuple[float, float] | None = None
        self._children: list[Any] = []
        self._children_at = -math.inf
        self._metered_at = -math.inf
        self._metered: bool | None = None
        #: pid -> name, and how often it was read: a process may still become another program
        self._names: dict[int, tuple[str, int]] = {}

    def missing(self) -> list[str]:
        """Return what this machine does not show, and why, for people."""
        return [f"{what}: {why}" for what, why in self._gone.items()]

    def look(self) -> Seen:
        """Ask every source that is there."""
        return Seen(
            **_times(),
            idle_seconds=self._idle(),
            other_load_percent=self._ask("load of others", self._other_load_percent),
            on_battery=self._ask("battery", self._on_battery),
            on_metered=self._ask("metered line", self._on_metered),
            programs=self._ask("programs", self._programs) if self._not_while else None,
        )

    def _ask(self, what: str, source: Callable[[], T]) -> T | None:
        if what in self._gone:
            return None
        try:
            found = source()
            self._worked.add(what)
            return found
        except NotThereError as error:
            # One that has answered once may again, as after its service was started anew.
            if what not in self._worked:
                self._gone[what] = str(error)
                _logger.info("volunteering goes without %s: %s", what, error)
        except (OSError, self._psutil.Error, subprocess.SubprocessError, ValueError) as error:
            _logger.debug("%s cannot be seen now: %r", what, error)
        return None

    def _idle(self) -> float | None:
        """Return what the first source that is there says: GNOME and X know the second, logind only what it is told."""
        for name, source in self._idle_sources.items():
            found = self._ask(f"keyboard and mouse by {name}", source)
            if found is not None:
                return found
        return None

    # ---- sources ----------------------------------------------------------------------------------------------

    def _idle_gnome(self) -> float:
        if "gnome" not in self._environment.get("XDG_CURRENT_DESKTOP", "").lower():
            raise NotThereError("no GNOME session of this user's is known here")
        name, path = "org.gnome.Mutter.IdleMonitor", "/org/gnome/Mutter/IdleMonitor/Core"
        return int(self._bus("--user", "call", name, path, name, "GetIdletime").split()[1]) / 1000

    def _idle_x(self) -> float:
        # Under Wayland, X sees only what goes to its own windows.
        if not self._environment.get("DISPLAY") or self._environment.get("XDG_SESSION_TYPE") == "wayland":
            raise NotThereError("no X session of this user's is known here")
        return int(self._run("xprintidle")) / 1000

    def _idle_logind(self) -> float:
        """Of all users' sessions at this machine's own seat; infinite where there is none."""
        listed = self._run("loginctl", "list-sessions", "--no-legend")
        names = [line.split()[0] for line in listed.splitlines() if line.split()]
        if not names:
            return math.inf
        wanted = ("Seat", "Class", "IdleHint", "IdleSinceHint")
        shown = self._run("loginctl", "show-session", *names, *(f"--property={key}" for key in wanted))
        return idle_of_sessions(shown, time.time())

    def _on_battery(self) -> bool:
        # Not to be had where the system has no /sys/class/power_supply.
        battery = getattr(self._psutil, "sensors_battery", lambda: None)()
        if battery is None:
            raise NotThereError("there is none")
        return battery.power_plugged is False

    def _on_metered(self) -> bool:
        now = time.monotonic()
        if self._metered is None or now - self._metered_at > SLOW_LOOK_SECONDS:
            name, path = "org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager"
            said = self._bus("--system", "get-property", name, path, name, "Metered").split()
            # NMMetered: 1 is yes, 3 is a guess that it is; 2 and 4 are no, 0 is unknown.
            self._metered, self._metered_at = int(said[1]) in (1, 3), now
        return self._metered

    def _programs(self) -> frozenset[str]:
        psutil = self._psutil
        names: dict[int, tuple[str, int]] = {}
        for pid in psutil.pids():
            name, reads = self._names.get(pid, ("", 0))
            # A new process is often still the one that made it; later it changes its program rarely.
            if reads < 3 or pid % 30 == int(time.monotonic()) % 30:
                try:
                    name = psutil.Process(pid).name()
                except psutil.Error:
                    continue
            names[pid] = name, reads + 1
        self._names = names
        return frozenset(name.lower() for name, _ in names.values())

    def _other_load_percent(self) -> float:
        times = self._psutil.cpu_times()
        busy = times.user + times.system + getattr(times, "nice", 0.0) + getattr(times, "irq", 0.0)
        whole = busy + times.idle + getattr(times, "iowait", 0.0) + getattr(times, "softirq", 0.0)
        others = busy - self._own_seconds()
        before, self._computed = self._computed, (whole, others)
        if before is None or whole <= before[0]:
            return 0.0
        return min(100.0, max(0.0, 100 * (others - before[1]) / (whole - before[0])))

    def _own_seconds(self) -> float:
        """Return what this process, and those that it has started, have computed."""
        psutil, now = self._psutil, time.monotonic()
        own = psutil.Process()
        if now - self._children_at > SLOW_LOOK_SECONDS:
            self._children, self._children_at = own.children(recursive=True), now
        # A child that ended is in its parent's figure of children.
        total = sum(own.cpu_times()[:4])
        for child in self._children:
            try:
                total += sum(child.cpu_times()[:4])
            except psutil.Error:
                continue
        return float(total)

    # ---- commands ---------------------------------------------------------------------------------------------

    def _bus(self, bus: str, *arguments: str) -> str:
        return self._run("busctl", bus, f"--timeout={COMMAND_SECONDS:.0f}", *arguments)

    def _run(self, program: str, *arguments: str) -> str:
        """Return what a command prints. Raises NotThereError: there is no such program, or it has nobody to ask."""
        path = shutil.which(program, path=self._environment.get("PATH"))
        if path is None:
            raise NotThereError(f"no {program} here")
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=COMMAND_SECONDS)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"{program} ended with {done.returncode}"])[0]
            raise NotThereError(said[:200])
        return done.stdout


def idle_of_sessions(shown: str, now: float) -> float:
    """Return since when all sessions of a seat have been idle, in seconds; infinite where there is none.

    Args:
        shown: what `loginctl show-session` prints: lines KEY=VALUE, sessions apart by empty lines.
        now: Unix seconds.
    """
    idle = math.inf
    for text in re.split(r"\n\s*\n", shown):
        session = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        if not session.get("Seat") or session.get("Class", "user") != "user":
            continue
        since = int(session.get("IdleSinceHint", "0") or 0) / 1e6
        idle = min(idle, max(0.0, now - since) if session.get("IdleHint") == "yes" else 0.0)
    return idle
