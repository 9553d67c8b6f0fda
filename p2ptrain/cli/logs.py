"""`p2ptrain logs`: what the peer of a home said, also when it runs no more."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Annotated

import typer

from p2ptrain.cli.options import HomeOption
from p2ptrain.config.home import Home, default_home
from p2ptrain.errors import HomeError

LOOK_SECONDS = 0.25


def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing what is new, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", min=0, help="How many of the last ones.")] = 40,
    home: HomeOption = None,
) -> None:
    """Print the end of this home's log."""
    path = Home(home or default_home()).log
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise HomeError(
            f"no peer has left a log at {path}: {error.strerror}", hint="p2ptrain join; or name its home: --home DIR"
        ) from error
    with file:
        sys.stdout.writelines(deque(file, maxlen=lines))
        number, position = os.fstat(file.fileno()).st_ino, file.tell()
    if follow:
        _follow(path, number, position)


def _follow(path: Path, number: int, position: int) -> None:
    """Print what is written from `position` of file `number` on, and then of those that take its place."""
    while True:
        sys.stdout.flush()
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                if os.fstat(file.fileno()).st_ino == number:
                    file.seek(position)
                else:
                    number = os.fstat(file.fileno()).st_ino
                sys.stdout.write(file.read())
                position = file.tell()
        except FileNotFoundError:
            pass  # it is being replaced
        time.sleep(LOOK_SECONDS)
