"""`p2ptrain service`: have systemd run the peer of a home, from the login or the boot of its owner on."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from p2ptrain.cli.options import HomeOption
from p2ptrain.cli.output import printable
from p2ptrain.config.home import Home, default_home
from p2ptrain.errors import HomeError, UsageError

WATCHDOG_SECONDS = 120
"""A network thread that does not answer for so long is stuck, whatever a busy machine does."""
STOP_SECONDS = 90
"""For the round under way, the goodbye and the checkpoint."""
RESTART_SECONDS = 20
USELESS_AGAIN = (2, 3, 4, 8, 11, 14, 15, 16, 18)
"""Exit codes of what a restart does not mend: it would be refused, or mistaken, again."""

UNIT = """\
[Unit]
Description=p2ptrain peer in {home}
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
Restart=on-failure
RestartSec={restart}
RestartPreventExitStatus={useless}
SuccessExitStatus=130
KillMode=mixed
TimeoutStartSec=infinity
TimeoutStopSec={stop}
WatchdogSec={watchdog}
Nice=10

[Install]
WantedBy=default.target
"""


def service(
    action: Annotated[Literal["install", "uninstall", "status"], typer.Argument(help="What to do.")],
    addresses: Annotated[
        list[str] | None, typer.Argument(metavar="[ADDR]...", help="Address to join at; none: the peers once met.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before writing.")] = False,
    start: Annotated[bool, typer.Option("--start/--no-start", help="Have systemd start it at once.")] = True,
    home: HomeOption = None,
) -> int:
    """Write a systemd user unit for the peer of this home, and start it; or remove it; or ask how it is."""
    here = Home((home or default_home()).absolute())
    path = unit_path(here)
    if action == "status":
        if not path.exists():
            print(f"no service: {path} is not there")
            return 3  # as systemctl has it
        return subprocess.run([_systemctl(), "--user", "--no-pager", "status", path.name]).returncode
    if action == "uninstall":
        if start and path.exists():
            subprocess.run([_systemctl(), "--user", "disable", "--now", path.name], check=False)
        path.unlink(missing_ok=True)
        print(f"removed {path}; the home {here.path} is as it was")
        return 0
    if not addresses and not here.manifest.exists():
        raise UsageError(f"home {here.path} is in no run yet", hint="p2ptrain service install ADDR")
    text = unit_of(here, addresses or [])
    print(printable(f"{path}:\n\n{text}"), flush=True)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody is there to say yes", hint="p2ptrain service install --yes")
        typer.confirm("write this file" + (" and start the service?" if start else "?"), abort=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise HomeError(f"cannot write {path}: {error.strerror}", hint="XDG_CONFIG_HOME=DIR names another") from error
    if start:
        for command in (["daemon-reload"], ["enable", "--now", path.name]):
            done = subprocess.run([_systemctl(), "--user", *command], capture_output=True, text=True)
            if done.returncode:
                raise HomeError(
                    f"systemctl --user {' '.join(command)}: {done.stderr.strip()}",
                    hint=f"the unit is written; start it in a session of systemd's: systemctl --user start {path.name}",
                )
    print("it starts when you log in; to have it start with the machine: loginctl enable-linger")
    print("look at it: p2ptrain service status; p2ptrain status; p2ptrain logs -f")
    return 0


def unit_path(home: Home) -> Path:
    """Return where the unit of a home is, one for each home."""
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    usual = home.path == default_home().absolute()
    name = "p2ptrain" if usual else "p2ptrain-" + re.sub(r"[^A-Za-z0-9_.]+", "-", str(home.path)).strip("-")
    return base / "systemd" / "user" / f"{name}.service"


def unit_of(home: Home, addresses: list[str]) -> str:
    """Return the unit's text, which runs this very Python and names all that it needs."""
    command = [sys.executable, "-m", "p2ptrain", "join", *addresses, "--home", str(home.path)]
    return UNIT.format(
        home=str(home.path).replace("%", "%%"),
        # systemd expands both in what it runs.
        command=shlex.join(command).replace("%", "%%").replace("$", "$$"),
        restart=RESTART_SECONDS,
        useless=" ".join(map(str, USELESS_AGAIN)),
        stop=STOP_SECONDS,
        watchdog=WATCHDOG_SECONDS,
    )


def _systemctl() -> str:
    found = shutil.which("systemctl")
    if found is None:
        raise HomeError(
            "this machine has no systemd", hint="nohup p2ptrain join &, or write the unit alone: --no-start"
        )
    return found
