"""`p2ptrain id`: this home's peer id, for the owner of a run to put on its list."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from p2ptrain.cli.options import HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import set_up_logging
from p2ptrain.config.home import Home, default_home


def print_id(
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="Form of the output.")] = "text",
    home: HomeOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Print the peer id of this home, which gets one if it has none."""
    set_up_logging(verbose, quiet)
    from p2ptrain.swarm.identity import format_peer_id, load_or_create_identity

    here = Home(home or default_home())
    here.create()
    peer_id = format_peer_id(load_or_create_identity(here.identity).peer_id)
    print(json.dumps({"peer_id": peer_id}) if format == "json" else peer_id)
