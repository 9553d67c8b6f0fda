"""`p2ptrain pause`, `resume`, `finish`, `leave` and `limits`: what an owner tells the peer of a home that runs."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

import typer

from p2ptrain.cli.options import HomeOption
from p2ptrain.cli.output import printable
from p2ptrain.cli.status import ANSWER_SECONDS, lines_of
from p2ptrain.config.amounts import format_amount, format_rate
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


def limits(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="KEY", help="upload-limit, download-limit or monthly-transfer; none: show all.", show_default="none"
        ),
    ] = None,
    value: Annotated[
        str | None, typer.Argument(metavar="VALUE", help="As the flag of that name takes it; 0: no limit.")
    ] = None,
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="Form of the output.")] = "text",
    home: HomeOption = None,
) -> None:
    """Show what the line of this home's peer may carry, or change it while the peer runs."""
    from p2ptrain.peer.control import Limit, ask

    if key is not None and value is None:
        raise UsageError(f"{key} needs a value", hint=f"p2ptrain limits {key} VALUE; 0: no limit")
    answer = ask(Home(home or default_home()).control, Limit(key or "", value or ""), ANSWER_SECONDS)
    if format == "json":
        print(json.dumps(answer, indent=2))
        return
    print(printable("\n".join(limits_of(answer))))
    if key is not None:
        setting = f'{key.replace("-", "_")} = "{value}"'
        print(printable(f"until this peer ends; from its next start on, too: {setting} in {answer['home']}/node.toml"))


def limits_of(answer: dict[str, Any]) -> list[str]:
    """Return the limits that a peer tells of, for people."""
    up, down = answer["upload_limit_bytes_per_second"], answer["download_limit_bytes_per_second"]
    whole, used = answer["monthly_transfer_bytes"], answer["month_sent_bytes"] + answer["month_received_bytes"]
    month = "none"
    if whole:
        rate = format_rate(answer["month_rate_bytes_per_second"])
        month = (
            f"{format_amount(whole)}, of which {format_amount(used)} are used; {rate} are left for both ways together"
        )
    return [
        f"upload-limit      {format_rate(up) if up else 'none'}",
        f"download-limit    {format_rate(down) if down else 'none'}",
        f"monthly-transfer  {month}",
    ]
