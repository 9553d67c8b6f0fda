"""`p2ptrain top`: a swarm in the terminal, to be kept open; plain lines where there is no terminal."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from p2ptrain.cli.options import HomeOption, QuietOption, VerboseOption
from p2ptrain.cli.output import printable, set_up_logging
from p2ptrain.config.home import Home, default_home
from p2ptrain.errors import UsageError

if TYPE_CHECKING:
    from p2ptrain.observe.census import Inspection
    from p2ptrain.peer.observing import Observer


def top(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADDR...", help="Address of any peer of the swarm; default: the peer of this home."),
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="NAME|ID", help="Another run than that of the peer at ADDR.")
    ] = None,
    home: HomeOption = None,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Show a swarm in the terminal, kept up to date: curves, peers, rounds; ? lists the keys."""
    set_up_logging(verbose, quiet)
    from p2ptrain.cli.inspect import addresses_of, until_interrupted
    from p2ptrain.peer.observing import Observer
    from p2ptrain.swarm.addresses import parse_addresses
    from p2ptrain.swarm.thread import new_network_loop

    here = Home(home or default_home())
    given = addresses or addresses_of(here)
    parse_addresses(given)

    async def show() -> None:
        observer = await Observer.create(given, run, here)
        try:
            if not (sys.stdin.isatty() and sys.stdout.isatty()):
                await _plain(observer)
                return
            try:
                from p2ptrain.cli.screen import Screen
            except ImportError as error:
                raise UsageError(
                    f"top needs {error.name}, which is not installed", hint="pip install 'p2ptrain[top]'"
                ) from error
            await Screen(observer.look, lambda: observer.pause_seconds).run_async()
        finally:
            await observer.close()

    with asyncio.Runner(loop_factory=new_network_loop) as runner:
        if not runner.run(until_interrupted(show())):
            raise typer.Abort


def plain_line(seen: Inspection) -> str:
    """Return one look in one line."""
    value = seen.as_json()
    overview = value["overview"]
    loss = "-" if overview["train_loss"] is None else f"{overview['train_loss']:.3f}"
    return printable(
        f"round {value['run']['round']}  {value['health']['text']}  train loss {loss}  "
        f"{overview['tokens_per_second']:,.0f} tokens/s"
    )


async def _plain(observer: Observer) -> None:
    while True:
        print(plain_line(await observer.look()), flush=True)
        await asyncio.sleep(observer.pause_seconds)
