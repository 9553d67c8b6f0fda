"""`p2ptrain pause`, `resume`, `finish`, `leave` and `limits`: what an owner tells the peer of a home that runs."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from p2ptrain.cli.options import HomeOption
from p2ptrain.cli.output import printable
from p2ptrain.cli.status import lines_of
from p2ptrain.config.home import Home, default_home
from p2ptrain.errors import UsageError

END_SECONDS = 75.0
"""For a round under way to end, the goodbye, and all that a peer closes behind itself."""
BEGIN_SECONDS = 120.0
"""To build the model again and meet the others."""
UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(text: str) -> float:
    """Return the seconds of a duration such as 90, 90s, 30m, 8h or 2d.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no duration", hint="as 90s, 30m, 8h or 2d")
    return float(found[1]) * UNITS[found[2]]


def pause(
    duration: Annotated[
        str | None, typer.Argument(metavar="DURATION", help="As 30m, 8h, 2d; none: until `p2ptrain resume`.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Have the peer of this home stop computing and give its memory back; others train on without it."""
    from p2ptrain.peer.control import Pause, ask

    request = Pause(None if duration is None else seconds_of(duration))
    answer = ask(Home(home or default_home()).control, request, END_SECONDS)
    print(printable("\n".join(lines_of(answer)) if answer else "it has left"))


def resume(home: HomeOption = None) -> None:
    """Have the paused peer of this home take part again."""
    from p2ptrain.peer.control import Resume, ask

    answer = ask(Home(home or default_home()).control, Resume(), BEGIN_SECONDS)
    print(printable("\n".join(lines_of(answer)) if answer else "it has left"))


def finish(home: HomeOption = None) -> None:
    """Have the peer of this home end its round, say goodbye, write its checkpoint and exit, as Ctrl-C does."""
    from p2ptrain.peer.control import Finish, ask

    ask(Home(home or default_home()).control, Finish(), END_SECONDS)
    print("it has finished its round and left")


def leave(home: HomeOption = None) -> None:
    """Have the peer of this home leave now, in the midst of a round; it says goodbye and writes its checkpoint."""
    from p2ptrain.peer.control import Leave, ask

    ask(Home(home or default_home()).control, Leave(), END_SECONDS)
    print("it has left")
