"""`p2ptrain replay`: a past moment of a swarm as the peer of a home saw it, from its events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from p2ptrain.cli.options import HomeOption, QuietOption, VerboseOption, path_parser
from p2ptrain.cli.output import set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.errors import UsageError


def replay(
    past: Annotated[
        Path | None,
        typer.Argument(
            metavar="HOME", parser=path_parser("HOME"), help="Home whose peer saw it.", show_default="that of --home"
        ),
    ] = None,
    round: Annotated[
        int | None, typer.Option("--round", min=0, help="As it was when this round was sealed.", show_default="newest")
    ] = None,
    format: Annotated[
        Literal["table", "json", "jsonl"], typer.Option("--format", help="Form of the output.")
    ] = "table",
    home: HomeOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Show a past moment of a swarm, as the peer of a home saw it."""
    set_up_logging(verbose, quiet)
    from p2ptrain.cli.inspect import show_overview
    from p2ptrain.observe.events import Sealed, read_events
    from p2ptrain.observe.projection import moment_at

    here = Home(past or home or default_home())
    events = list(read_events(here.events))
    if not events:
        raise UsageError(f"home {here.path} has no events", hint="p2ptrain replay HOME, of a peer that has trained")
    projection = moment_at(events, round)
    if projection.own is None:
        known = [event.round for event in events if isinstance(event, Sealed)]
        span = f"rounds {min(known)} to {max(known)}" if known else "no rounds"
        raise UsageError(f"home {here.path} knows nothing of round {round}", hint=f"its events are of {span}")
    if format == "jsonl":
        for row in projection.moment().as_json()["peers"]:
            print(json.dumps(row))
        return
    show_overview(projection.moment(), format, watch=False)
