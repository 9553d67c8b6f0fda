"""The command line. One file a command; each imports what is heavy when it runs, so that `--help` is instant.

To add a command: a file with one function whose parameters are typer options (those shared are in `options`), and a
line below. It returns nothing, or an exit code, and raises `P2PTrainError`s, which `output` prints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from p2ptrain import __version__
from p2ptrain.cli import (
    bootstrap,
    control,
    dashboard,
    data,
    doctor,
    eval,
    export,
    id,
    init,
    inspect,
    invite,
    join,
    logs,
    meet,
    replay,
    revoke,
    sample,
    service,
    simulate,
    status,
    top,
)
from p2ptrain.cli.output import errors_reported

app = typer.Typer(
    name="p2ptrain",
    help="Train one model on many people's machines, with no server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("init")(init.init)
app.command("bootstrap")(bootstrap.bootstrap)
app.command("join")(join.join)
app.command("meet")(meet.meet)
app.command("data")(data.data)
app.command("id")(id.print_id)
app.command("invite")(invite.invite)
app.command("revoke")(revoke.revoke)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.command("status")(status.status)
app.command("pause")(control.pause)
app.command("resume")(control.resume)
app.command("finish")(control.finish)
app.command("leave")(control.leave)
app.command("limits")(control.limits)
app.command("logs")(logs.logs)
app.command("service")(service.service)
app.command("dashboard")(dashboard.dashboard)
app.command("top")(top.top)
app.command("replay")(replay.replay)
app.command("sample")(sample.sample)
app.command("eval")(eval.evaluate)
app.command("export")(export.export)
app.command("simulate")(simulate.simulate)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"p2ptrain {__version__}")
        raise typer.Exit


@app.callback()
def _all_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command line (default: this process's) and exit with its code.

    Raises:
        SystemExit: always.
    """
    with errors_reported():
        code = app(args=arguments, standalone_mode=False, prog_name="p2ptrain")
        # Here, where a reader of stdout who has gone is still handled.
        sys.stdout.flush()
    sys.exit(code)
