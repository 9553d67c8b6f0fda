"""Flags that several commands share. None means not given: `config.node` settles the value and where it is from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Device = Literal["auto", "cpu", "cuda", "mps"]
LogFormat = Literal["text", "json"]

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        help="Directory of identity, checkpoints and journal.",
        show_default="$P2PTRAIN_HOME, else the platform's",
    ),
]
NameOption = Annotated[str | None, typer.Option("--name", help="Name that other peers show.")]
PortOption = Annotated[int | None, typer.Option("--port", help="TCP port; 0: a free one, remembered in the home.")]
HostOption = Annotated[str | None, typer.Option("--host", help="IP address to listen on.", show_default="0.0.0.0")]
AnnounceOption = Annotated[
    list[str] | None,
    typer.Option("--announce", metavar="ADDR", help="Address to hand out instead of those found; repeatable."),
]
DeviceOption = Annotated[Device | None, typer.Option("--device", help="Where to compute.", show_default="auto")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="CPU threads to compute with; 0: one a core.")]
RoundsOption = Annotated[
    int | None, typer.Option("--rounds", min=1, help="Stop after this many rounds in which this peer had a part.")
]
LogFormatOption = Annotated[
    LogFormat | None, typer.Option("--log-format", help="Form of the log on stderr.", show_default="text")
]
VerboseOption = Annotated[
    int, typer.Option("--verbose", "-v", count=True, show_default=False, help="More log; twice: all of it.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Log errors only.")]
